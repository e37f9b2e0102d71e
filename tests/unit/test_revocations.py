"""Revocations: what may be recorded, what is refused by one, and when it may be forgotten."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knell.errors import InvalidRevocation
from knell.notices import Notice, NoticeBatch, Receipt
from knell.revocations import (
    MAX_REVOCATION_ID_BYTES,
    NEVER,
    SKEW_SECONDS,
    Revocation,
    Scope,
    began_by,
    make_revocation,
)
from knell.settings import Rules
from knell.tokens import TokenRef
from tests.unit.strategies import json_values, revocations, token_refs

ISS = "https://auth.example"
NOW = 1_000_000.0
RULES = Rules()
MATCHES: dict[str, Any] = {
    "token": {"jti": "x"},
    "session": {"sid": "x"},
    "subject": {"sub": "x"},
    "client": {"client_id": "x"},
    "key": {"kid": "x"},
    "claims": {"tenant": "x", "admin": True},
    "issuer": {"iss": ISS},
}


def made(scope: str = "subject", match: Any = None, **changes: Any) -> Revocation:
    """A revocation made at NOW."""
    given: dict[str, Any] = {"iss": ISS, "now": NOW, "rules": RULES}
    return make_revocation(scope, MATCHES[scope] if match is None else match, **given | changes)


def token(**claims: Any) -> TokenRef:
    """A token of ISS that every revocation of MATCHES names."""
    given: dict[str, Any] = {"iss": ISS, "exp": NOW + 900, "claims": {"tenant": "x", "admin": True}}
    given |= dict.fromkeys(("jti", "sid", "sub", "client_id", "kid"), "x")
    return TokenRef(**given | claims)


@pytest.mark.parametrize("id", ["k" * MAX_REVOCATION_ID_BYTES, "é" * (MAX_REVOCATION_ID_BYTES // 2)])
def test_the_longest_id_fits_into_everything_that_is_named_after_it(id: str) -> None:
    """A notice and a receipt carry the id with a prefix: what is accepted here is accepted there."""
    notice = Notice.of_revocation(made(id=id))
    batch = NoticeBatch(id=notice.batch_id, entries=(notice,), issued_at=NOW, expires_at=NOW + 1)
    assert NoticeBatch.from_payload(batch.as_payload(signer=ISS, audience="a")).entries == (notice,)
    receipt = Receipt(batch_id=notice.batch_id, at=NOW, done=(0,))
    assert Receipt.from_json(receipt.as_json()) == receipt


def test_a_longer_id_is_refused() -> None:
    """Whether it is given or read."""
    with pytest.raises(InvalidRevocation, match="limit is 200"):
        made(id="k" * (MAX_REVOCATION_ID_BYTES + 1))
    with pytest.raises(InvalidRevocation, match="limit is 200"):
        Revocation.from_json(made().as_json() | {"id": "k" * 256})


@given(revocations())
def test_json_round_trip(revocation: Revocation) -> None:
    """What is written as JSON reads back as the same value."""
    assert Revocation.from_json(json.loads(json.dumps(revocation.as_json()))) == revocation


@given(st.data())
def test_only_invalid_revocation_comes_out(data: st.DataObject) -> None:
    """Whatever is read, the answer is a Revocation or InvalidRevocation."""
    found: Any = data.draw(json_values)
    if data.draw(st.booleans()):
        # Nearly right reaches further than noise does.
        found = data.draw(revocations()).as_json()
        found[data.draw(st.sampled_from(sorted(found)))] = data.draw(json_values)
    try:
        revocation = Revocation.from_json(found)
    except InvalidRevocation:
        return
    assert Revocation.from_json(revocation.as_json()) == revocation


@pytest.mark.parametrize(
    ("scope", "match", "changes", "said"),
    [
        (
            "user",
            {"sub": "x"},
            {},
            "unknown scope 'user'; use one of token, session, subject, client, key, claims",
        ),
        ("claims", {}, {}, "the match is empty; scope claims needs {'name': ...}"),
        ("claims", {"tenant": 1.5}, {}, "'tenant' is of type float; only text, whole numbers, true and false do"),
        ("claims", {"tenant": None}, {}, "NoneType"),
        ("claims", {"tenant": 2**53}, {}, "must be below 2**53"),
        ("claims", {"exp": 5}, {}, "does not match by 'exp'"),
        ("claims", {"iss": ISS}, {}, "does not match by 'iss'"),
        ("claims", {7: "x"}, {}, "must be a string, not int"),
        ("claims", {f"c{n}": n for n in range(9)}, {}, "has 9 claims; the limit is 8"),
        ("issuer", {"iss": "https://other.example"}, {}, "names issuer 'https://other.example'"),
        ("client", {"sub": "x"}, {}, "matches by 'client_id' alone"),
        ("client", {"client_id": "x"}, {"issued_before": NOW + SKEW_SECONDS + 1}, "in the future"),
        ("key", {"kid": "x"}, {"issued_before": NOW}, "absolute and has no issued_before"),
        ("token", {}, {}, "the match is empty; scope token needs {'jti': ...}"),
        ("session", None, {"match": None}, "the match is empty"),
        ("session", "s-1", {}, "the match is empty"),
        ("token", {"sid": "x"}, {}, "matches by 'jti' alone, not by 'sid'"),
        ("subject", {"sub": "x", "sid": "y"}, {}, "matches by 'sub' alone"),
        ("token", {"jti": ""}, {}, "'jti' is empty"),
        ("token", {"jti": 7}, {}, "must be a string, not int"),
        ("token", {"jti": "x" * 300}, {}, "300 bytes long"),
        ("token", {"jti": "x"}, {"iss": ""}, "'iss' is empty"),
        ("token", {"jti": "x"}, {"id": "y" * 300}, "'id' is 300 bytes long"),
        ("token", {"jti": "x"}, {"exp": math.nan}, "'exp' is nan"),
        ("token", {"jti": "x"}, {"exp": True}, "not bool"),
        ("token", {"jti": "x"}, {"exp": "soon"}, "not str"),
        ("session", {"sid": "x"}, {"exp": NOW}, "exp is a token's end"),
        ("subject", {"sub": "x"}, {"issued_before": NOW + SKEW_SECONDS + 1}, "in the future"),
        ("subject", {"sub": "x"}, {"issued_before": math.nan}, "nan"),
        ("subject", {"sub": "x"}, {"issued_before": math.inf}, "inf"),
        ("subject", {"sub": "x"}, {"issued_before": True}, "not bool"),
        ("subject", {"sub": "x"}, {"issued_before": -1}, "no time"),
        ("session", {"sid": "x"}, {"issued_before": NOW}, "absolute and has no issued_before"),
        ("token", {"jti": "x"}, {"initiating_entity": "root"}, "use one of admin, user, policy, system"),
        ("token", {"jti": "x"}, {"reason": 7}, "reason must be a string"),
        ("token", {"jti": "x"}, {"reason": "é" * 513}, "1026 bytes long; the limit is 1024"),
    ],
)
def test_bad_input_is_named(scope: str, match: Any, changes: dict[str, Any], said: str) -> None:
    """What cannot be recorded is refused, with what was found and what to do."""
    with pytest.raises(InvalidRevocation) as caught:
        make_revocation(scope, **({"match": match, "iss": ISS, "now": NOW, "rules": RULES} | changes))
    assert said in str(caught.value)


@pytest.mark.parametrize("reason", ["\ud800", "a\udfffb"])
def test_a_reason_is_text(reason: str) -> None:
    """A reason that no UTF-8 can carry is refused here, and not by the store or the broker later."""
    with pytest.raises(InvalidRevocation, match="Unicode"):
        made("token", reason=reason)


def test_a_cut_off_within_the_skew_is_accepted() -> None:
    """A clock that runs ahead by a little is no mistake."""
    assert made(issued_before=NOW + SKEW_SECONDS).issued_before == NOW + SKEW_SECONDS


def test_a_cut_off_is_now_by_default() -> None:
    """Only a subject has a cut-off; without one it is the moment of the revocation."""
    assert made("subject").issued_before == NOW
    assert made("session").issued_before is None
    assert made("token").issued_before is None


def test_ids_are_new_or_given() -> None:
    """Without an idempotency key each revocation has an id of its own."""
    assert made().id != made().id
    assert made(id="logout-17").id == "logout-17"


@pytest.mark.parametrize(
    ("scope", "changes", "after"),
    [
        ("token", {"exp": NOW + 60}, 60 + RULES.leeway_seconds),
        ("token", {}, RULES.max_token_seconds + RULES.leeway_seconds),
        ("session", {}, RULES.max_session_seconds + RULES.max_token_seconds + RULES.leeway_seconds),
        ("subject", {}, RULES.max_session_seconds + RULES.max_token_seconds + RULES.leeway_seconds),
        (
            "subject",
            {"issued_before": NOW - 100},
            RULES.max_session_seconds + RULES.max_token_seconds + RULES.leeway_seconds - 100,
        ),
        *(
            (scope, {}, RULES.max_session_seconds + RULES.max_token_seconds + RULES.leeway_seconds)
            for scope in ("client", "claims", "issuer")
        ),
        ("key", {}, NEVER - NOW),
    ],
)
def test_an_entry_leaves_when_nothing_it_refuses_can_live(scope: str, changes: dict[str, Any], after: float) -> None:
    """A token's entry leaves at its exp plus leeway, a key's never, others when the longest session and token have."""
    assert made(scope, **changes).expires_at == NOW + after


@pytest.mark.parametrize("scope", [scope for scope in Scope if scope != "token"])
def test_wide_scopes_end_both(scope: str) -> None:
    """Revoking anything but a token ends tokens and sessions, whatever the caller says."""
    assert made(scope, ends=frozenset({"token"})).ends == {"token", "session"}
    assert made("token", ends=frozenset({"token"})).ends == {"token"}


@pytest.mark.parametrize("scope", list(Scope))
def test_only_the_same_issuer_and_value_are_refused(scope: Scope) -> None:
    """Everything is qualified by iss: the same id of another issuer is another thing."""
    revocation = made(scope)
    assert revocation.refuses(token())
    assert not revocation.refuses(token(iss="https://other.example"))
    if scope is Scope.CLAIMS:
        assert not revocation.refuses(token(claims={"tenant": "x", "admin": 1}))
        assert not revocation.refuses(token(claims={"tenant": "x"}))
    elif scope is not Scope.ISSUER:
        assert not revocation.refuses(token(**{str(scope.claim): "y"}))


@pytest.mark.parametrize("scope", [Scope.SESSION, Scope.SUBJECT, Scope.CLIENT, Scope.KEY, Scope.CLAIMS])
def test_a_token_without_the_claim_is_not_refused(scope: Scope) -> None:
    """A token that has no sid is of no session, and one without sub of no subject."""
    assert not made(scope).refuses(token(**{scope.claim or "claims": None}))


@pytest.mark.parametrize("scope", [Scope.TOKEN, Scope.SESSION, Scope.KEY])
def test_token_session_and_key_are_absolute(scope: Scope) -> None:
    """What began after the revocation is refused too."""
    assert made(scope).refuses(token(iat=NOW + 100, auth_time=NOW + 100))


@pytest.mark.parametrize(
    ("cut_off", "started", "iat", "dead"),
    [
        # Equal is dead.
        (100.5, 100.5, None, True),
        (100.5, 100.4, None, True),
        (100.5, 100.6, None, False),
        # A refresh has a new iat; the session's start decides.
        (100.5, 90.0, 200.0, True),
        (100.5, 100.6, 90.0, False),
        # Cut to the whole second, the start may have been before or after the cut-off: iat decides.
        (100.5, 100.0, 100.7, False),
        (100.5, 100.0, 100.5, True),
        (100.5, 100.0, 100.3, True),
        (100.5, 100.0, None, True),
        (100.0, 100.0, 100.0, True),
        (100.0, 100.0, 100.2, False),
        # A whole second that is not the cut-off's own needs no help.
        (100.5, 99.0, 200.0, True),
        (100.5, 101.0, 50.0, False),
        # No start known: iat; nothing known: older.
        (100.5, None, 100.6, False),
        (100.5, None, 100.5, True),
        (100.5, None, None, True),
    ],
)
def test_cut_offs(cut_off: float, started: float | None, iat: float | None, dead: bool) -> None:
    """Equal is dead; iat decides for a whole-second start in the cut-off's second; what is unknown counts as older."""
    assert began_by(cut_off, started, iat) is dead
    assert made(issued_before=cut_off, now=cut_off).refuses(token(auth_time=started, iat=iat)) is dead


def test_the_store_s_start_counts_where_the_token_has_none() -> None:
    """A refreshed token without auth_time is judged by the first iat that the store saw for its session."""
    revocation = made(issued_before=NOW)
    refreshed = token(iat=NOW + 50)
    assert not revocation.refuses(refreshed)
    assert revocation.refuses(refreshed, started=NOW - 50)
    assert not revocation.refuses(refreshed.replace(auth_time=NOW + 1), started=NOW - 50)


@given(st.floats(0, 1_000), token_refs)
def test_a_later_cut_off_refuses_no_less(cut_off: float, ref: TokenRef) -> None:
    """Moving a cut-off by whole seconds towards the future never accepts what was refused."""
    if began_by(cut_off, ref.auth_time, ref.iat):
        assert began_by(cut_off + 10_000, ref.auth_time, ref.iat)
