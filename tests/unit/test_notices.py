"""Notices, batches and receipts: what crosses the wire, and which sessions a notice ends."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knell.errors import MessageRefused
from knell.notices import (
    MAX_ENTRIES,
    Cause,
    Notice,
    NoticeBatch,
    Receipt,
    batch_id_of_revocation,
    batch_id_of_undo,
    entry_numbers,
    new_batch_id,
    partition_of_batch,
)
from knell.revocations import Revocation, Scope, make_revocation
from knell.settings import Rules
from knell.tokens import TokenRef
from tests.unit.strategies import batches, json_values, receipts, revocations, token_refs

ISS = "https://auth.example"
BOTH = frozenset({"token", "session"})
NOW = 1_000_000.0


def notice(**changes: Any) -> Notice:
    """A notice that session "s" ended with its token "t" at NOW."""
    given: dict[str, Any] = {
        "batch_id": "e0-1",
        "at": NOW,
        "iss": ISS,
        "cause": Cause.EXPIRED,
        "scope": Scope.TOKEN,
        "ends": BOTH,
        "jti": "t",
        "sid": "s",
        "sub": "alice",
    }
    return Notice(**given | changes)


def session(**changes: Any) -> TokenRef:
    """A session as a service keeps it."""
    given: dict[str, Any] = {
        "iss": ISS,
        "exp": NOW,
        "jti": "t",
        "sid": "s",
        "sub": "alice",
        "iat": NOW - 900,
        "auth_time": NOW - 900,
    }
    return TokenRef(**given | changes)


def payload(batch: NoticeBatch) -> dict[str, Any]:
    """A batch as it crosses the wire."""
    sent: dict[str, Any] = json.loads(json.dumps(batch.as_payload(signer="s", audience="knell:test")))
    return sent


@given(batches())
def test_batch_round_trip(batch: NoticeBatch) -> None:
    """What is put into a message reads back as the same batch."""
    assert NoticeBatch.from_payload(payload(batch)) == batch


@given(receipts)
def test_receipt_round_trip(receipt: Receipt) -> None:
    """What is put into a receipt reads back as the same."""
    assert Receipt.from_json(json.loads(json.dumps(receipt.as_json()))) == receipt


@given(st.data())
def test_only_message_refused_comes_out_of_a_batch(data: st.DataObject) -> None:
    """Whatever a payload holds, the answer is a batch or MessageRefused."""
    found: Any = data.draw(st.dictionaries(st.text(max_size=10), json_values))
    if data.draw(st.booleans()):
        found = payload(data.draw(batches()))
        into = data.draw(st.sampled_from([found, found["entries"][0]]))
        into[data.draw(st.sampled_from(sorted(into)))] = data.draw(json_values)
    try:
        batch = NoticeBatch.from_payload(found)
    except MessageRefused:
        return
    assert NoticeBatch.from_payload(payload(batch)) == batch


@given(st.data())
def test_only_message_refused_comes_out_of_a_receipt(data: st.DataObject) -> None:
    """Whatever a body holds, the answer is a receipt or MessageRefused."""
    found: Any = data.draw(json_values)
    if data.draw(st.booleans()):
        found = data.draw(receipts).as_json()
        found[data.draw(st.sampled_from(sorted(found)))] = data.draw(json_values)
    try:
        Receipt.from_json(found)
    except MessageRefused:
        return


@pytest.mark.parametrize("found", [None, [], "text", 7, [1], {"v": 1}])
def test_a_payload_that_is_no_object(found: Any) -> None:
    """A signed payload of another shape is refused like any other."""
    with pytest.raises(MessageRefused):
        NoticeBatch.from_payload(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"v": 2}, "version 2 is not known"),
        ({"v": None}, "version None is not known"),
        ({"id": ""}, "'id' is empty"),
        ({"entries": []}, "1 to 500 entries"),
        ({"entries": {}}, "1 to 500 entries"),
        ({"entries": [{}] * (MAX_ENTRIES + 1)}, "1 to 500 entries"),
        ({"entries": [notice().as_json(), notice().as_json()]}, "the same number"),
        ({"entries": [notice().as_json() | {"n": MAX_ENTRIES}]}, "entry number 500"),
        ({"entries": [notice().as_json() | {"n": True}]}, "entry number True"),
        ({"entries": [notice().as_json() | {"cause": "bored"}]}, "not a notice"),
        ({"entries": [notice().as_json() | {"iss": None}]}, "'iss'"),
        ({"entries": ["text"]}, "not a notice"),
        ({"iat": float("nan")}, "nan"),
        ({"expires_at": True}, "not bool"),
    ],
)
def test_bad_batches_are_named(change: dict[str, Any], said: str) -> None:
    """A batch that cannot be read is refused with the reason."""
    good = NoticeBatch(id="e0-1", entries=(notice(),), issued_at=NOW, expires_at=NOW + 60)
    with pytest.raises(MessageRefused) as caught:
        NoticeBatch.from_payload(payload(good) | change)
    assert said in str(caught.value)


def test_unknown_fields_are_ignored() -> None:
    """A newer sender may say more, in the batch, in a notice and in a receipt."""
    batch = NoticeBatch(id="e0-1", entries=(notice(),), issued_at=NOW, expires_at=NOW + 60)
    sent = payload(batch) | {"colour": "red"}
    sent["entries"][0]["colour"] = "red"
    assert NoticeBatch.from_payload(sent) == batch
    receipt = Receipt(batch_id="e0-1", at=NOW, done=(0,))
    assert Receipt.from_json(receipt.as_json() | {"colour": "red"}) == receipt


def test_every_entry_has_an_id_of_its_own() -> None:
    """An id names batch and entry, and is the same in every copy."""
    assert notice(n=7).id == "e0-1.7" == notice(n=7, cause=Cause.REVOKED).id


# ---- which sessions a notice ends


def test_a_token_s_notice_matches_that_token() -> None:
    """The token itself is matched, and no other of another session."""
    only_token = notice(ends=frozenset({"token"}))
    assert only_token.matches(session())
    assert not only_token.matches(session(jti="other"))
    assert not only_token.matches(session(iss="https://other.example"))


def test_a_session_s_end_matches_all_of_its_tokens() -> None:
    """A notice that ends the session matches each of its tokens by sid."""
    assert notice().matches(session(jti="other"))
    assert not notice().matches(session(jti="other", sid="s-2"))
    assert not notice().matches(session(jti="other", sid=None))
    assert not notice(sid=None).matches(session(jti="other", sid=None))


def test_an_end_by_time_spares_a_new_life() -> None:
    """A session of the same sid that began after the end is another life, and a late copy does not end it."""
    late = notice(scope=Scope.SESSION, jti=None)
    assert late.matches(session(jti="new", auth_time=NOW))
    assert not late.matches(session(jti="new", auth_time=NOW + 1))
    assert late.matches(session(jti="new", auth_time=None, iat=None))


def test_a_revoked_session_has_no_new_life() -> None:
    """A revoked session is refused whenever it says that it began."""
    revoked = notice(scope=Scope.SESSION, cause=Cause.REVOKED, jti=None)
    assert revoked.matches(session(jti="new", auth_time=NOW + 1))


@pytest.mark.parametrize(
    ("auth_time", "iat", "ended"),
    [
        (NOW - 1, NOW - 1, True),
        (NOW, NOW, True),
        (NOW + 0.5, NOW + 0.5, False),
        (NOW, NOW + 0.5, False),
        (None, NOW + 1, False),
        (None, None, True),
    ],
)
def test_a_wide_scope_goes_by_its_cut_off(auth_time: float | None, iat: float | None, ended: bool) -> None:
    """A subject's sessions end if they began at or before the cut-off, by the same rule as the denylist's."""
    wide = notice(scope=Scope.SUBJECT, cause=Cause.REVOKED, jti=None, sid=None, issued_before=NOW)
    assert wide.matches(session(auth_time=auth_time, iat=iat)) is ended
    assert not wide.matches(session(sub="bob", auth_time=auth_time, iat=iat))
    assert not wide.matches(session(sub=None, auth_time=auth_time, iat=iat))


@given(revocations(), token_refs)
def test_services_and_verifiers_agree(revocation: Revocation, ref: TokenRef) -> None:
    """A session that ends both ways is ended by a revocation's notice exactly if a verifier refuses its token."""
    claim = revocation.scope.claim
    ref = ref.replace(
        **{"iss": revocation.iss, **({"claims": revocation.match} if claim is None else revocation.match)}
    )
    told = Notice.of_revocation(revocation)
    if told.ends == BOTH:
        assert told.matches(ref) is revocation.refuses(ref)


def test_the_notice_of_a_revoked_token_tells_what_is_known() -> None:
    """With the token's record at hand, services learn its session and subject as well."""
    revocation = make_revocation("token", {"jti": "t"}, iss=ISS, now=NOW, rules=Rules(), reason="stolen")
    told = Notice.of_revocation(revocation, session())
    assert (told.jti, told.sid, told.sub, told.exp) == ("t", "s", "alice", NOW)
    assert (told.revocation_id, told.reason, told.at) == (revocation.id, "stolen", NOW)
    assert told.batch_id == batch_id_of_revocation(revocation.id)


# ---- ids and numbers


@pytest.mark.parametrize(
    ("batch_id", "partition"),
    [
        (new_batch_id("e", 12), 12),
        (new_batch_id("e"), 0),
        (new_batch_id("m"), None),
        (batch_id_of_revocation("x"), None),
        (batch_id_of_undo("x"), None),
        (batch_id_of_revocation("e1-x"), None),
    ],
    ids=["partition 12", "partition 0", "missed", "revocation", "undo", "like an expiry"],
)
def test_a_batch_id_tells_where_its_record_is(batch_id: str, partition: int | None) -> None:
    """An expiry's record lies in a partition, the others beside the feed."""
    assert partition_of_batch(batch_id) == partition


@pytest.mark.parametrize("batch_id", ["", "x", "-", "e-1", "e²-1", "r1-x", "rx", "q0-1", "e0"])
def test_what_is_no_batch_id(batch_id: str) -> None:
    """Anything else is refused."""
    with pytest.raises(MessageRefused):
        partition_of_batch(batch_id)


@given(st.text())
def test_only_message_refused_comes_out_of_a_batch_id(text: str) -> None:
    """Whatever the text is, the answer is a partition, None or MessageRefused."""
    try:
        partition_of_batch(text)
    except MessageRefused:
        return


@pytest.mark.parametrize("found", [None, 5, "12", {"1": 2}, [True], [1.0], [-1], [MAX_ENTRIES], [0] * 501])
def test_what_are_no_entry_numbers(found: Any) -> None:
    """Entry numbers are a list of whole numbers below the limit."""
    with pytest.raises(MessageRefused):
        entry_numbers(found)
