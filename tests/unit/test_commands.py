"""Commands: what an issuer signs when the store is away, and what the notifier then believes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knell.commands import MAX_TOKENS, SKEW_SECONDS, CommandReader, ends_key, sign_revoke, sign_track
from knell.errors import MessageRefused
from knell.keys import COMMAND_TYPE, NOTICE_TYPE, SigningKey, TrustList, trust_entry
from knell.notices import Cause, Notice, NoticeBatch
from knell.revocations import Revocation, make_revocation
from knell.settings import Rules
from knell.tokens import MAX_TIME, TokenRef
from tests.unit.strategies import json_values, revocations, token_refs

ISS = "https://auth.example"
AUDIENCE = "knell:test"
NOW = 1_000_000.0
AGE = 3_600.0
KEY = SigningKey.generate()
RULES = Rules(retention_seconds=AGE)
# Everything that can be written is within these, at the last moment that there is.
BOUNDLESS: Any = {
    "now": MAX_TIME,
    "rules": Rules(retention_seconds=2.0**41, max_token_seconds=2.0**41, max_session_seconds=2.0**41),
}
SIGNING: Any = {"key": KEY, "signer": ISS, "audience": AUDIENCE, "now": NOW}


def trust(*issuers: str, causes: tuple[Cause, ...] = tuple(Cause)) -> TrustList:
    """A trust list with KEY."""
    return TrustList.parse(json.dumps({"keys": [trust_entry(KEY, issuers=issuers or ["*"], causes=causes)]}))


def reader(
    *, trusted: TrustList | None = None, audience: str = AUDIENCE, now: float = NOW + 60, rules: Rules = RULES
) -> CommandReader:
    """A reader of commands, by default one minute after the signature and trusting KEY with everything."""
    return CommandReader(trust() if trusted is None else trusted, audience, lambda: now, rules)


REF = TokenRef(iss=ISS, jti="t", exp=NOW + 900)
REVOCATION = make_revocation("token", {"jti": "t"}, iss=ISS, now=NOW, rules=Rules(), ends=frozenset({"token"}))


def notice_of(revocation: Revocation, *ends: str, key: SigningKey = KEY) -> str:
    """A revocation's signed notice, of one that ends this."""
    told = Notice.of_revocation(replace(revocation, ends=frozenset(ends)))
    batch = NoticeBatch(id=told.batch_id, entries=(told,), issued_at=NOW, expires_at=NOW + AGE)
    return key.sign(batch.as_payload(signer=ISS, audience=AUDIENCE), typ=NOTICE_TYPE)


NOTICES = {
    "token": notice_of(REVOCATION, "token"),
    "session token": notice_of(REVOCATION, "token", "session"),
}


@given(st.lists(token_refs, min_size=1, max_size=4))
def test_track_round_trip(refs: list[TokenRef]) -> None:
    """The tokens of a command are the tokens that were signed."""
    assert list(reader(**BOUNDLESS).track(sign_track(refs, **SIGNING)).refs) == refs


@given(revocations())
def test_revoke_round_trip(revocation: Revocation) -> None:
    """The revocation of a command, and the notices with it, are those that were signed."""
    notices = {ends_key(revocation.ends): notice_of(revocation, *revocation.ends)}
    command = reader(**BOUNDLESS).revoke(sign_revoke(revocation, notices, **SIGNING))
    assert command.revocation == revocation
    assert command.notices == notices


def test_every_command_has_an_id() -> None:
    """Two commands are two, and a copy of one has the id of that one."""
    first, second = sign_track([REF], **SIGNING), sign_track([REF], **SIGNING)
    assert reader().track(first).id == reader().track(first).id
    assert reader().track(first).id != reader().track(second).id


def test_what_a_notice_ends_is_named_in_one_order() -> None:
    """The key of a notice does not depend on the order of a set."""
    assert ends_key(frozenset({"token", "session"})) == "session token"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trusted": trust("https://other.example")}, "may not speak for"),
        ({"audience": "knell:other"}, "audience"),
        ({"now": NOW + AGE + 1}, "older than the retention"),
        ({"now": NOW - SKEW_SECONDS - 1}, "of the future"),
        ({"trusted": TrustList([])}, "does not have"),
    ],
)
def test_a_track_command_that_does_not_count(changes: Any, said: str) -> None:
    """The wrong issuer, deployment, time or key: refused."""
    with pytest.raises(MessageRefused) as caught:
        reader(**changes).track(sign_track([REF], **SIGNING))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trusted": trust("https://other.example")}, "may not revoke for"),
        ({"trusted": trust(ISS, causes=(Cause.EXPIRED,))}, "may not revoke for"),
        ({"audience": "knell:other"}, "audience"),
        ({"now": NOW + AGE + 1}, "older than the retention"),
    ],
)
def test_a_revoke_command_that_does_not_count(changes: Any, said: str) -> None:
    """A key that may not tell of revocations of that issuer revokes nothing."""
    with pytest.raises(MessageRefused) as caught:
        reader(**changes).revoke(sign_revoke(REVOCATION, NOTICES, **SIGNING))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": NOW + RULES.max_token_seconds + 1000},
        {"exp": 2.0**39},
        {"sid": "s", "session_exp": 2.0**39},
        {"iat": NOW + 1000},
        {"sid": "s", "auth_time": NOW + 1000},
    ],
)
def test_a_command_tracks_nothing_that_its_issuer_could_not(changes: Any) -> None:
    """Whoever may sign commands is held to the longest lifetimes: else one entry would stay in the store for ever."""
    with pytest.raises(MessageRefused, match=r"longer than|of the future"):
        reader().track(sign_track([REF.replace(**changes)], **SIGNING))


@pytest.mark.parametrize(
    "changes",
    [{"expires_at": 2.0**39}, {"made_at": NOW + 1000}, {"issued_before": NOW + 1000}, {"issued_before": 2.0**39}],
)
def test_a_command_revokes_nothing_of_the_future_and_nothing_for_ever(changes: Any) -> None:
    """A cut-off in the future would end sessions that have not begun; an entry without an end would never leave."""
    good = make_revocation("subject", {"sub": "u"}, iss=ISS, now=NOW, rules=RULES)
    reader().revoke(sign_revoke(good, {"session token": notice_of(good, *good.ends)}, **SIGNING))
    bad = replace(good, **changes)
    with pytest.raises(MessageRefused, match=r"future|outlives"):
        reader().revoke(sign_revoke(bad, {"session token": notice_of(bad, *bad.ends)}, **SIGNING))


def test_a_command_carries_the_notice_of_its_own_revocation_alone() -> None:
    """What is sent to every service as it is must be signed, and tell of that revocation."""
    other = make_revocation("token", {"jti": "other"}, iss=ISS, now=NOW, rules=RULES, ends=frozenset({"token"}))
    foreign = make_revocation("session", {"sid": "s"}, iss="https://other.example", now=NOW, rules=RULES)
    unknown = SigningKey.generate()
    forged = (
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln",
        notice_of(other, "token"),
        notice_of(foreign, "session", "token"),
        notice_of(REVOCATION, "token", "session"),
        notice_of(REVOCATION, "token", key=unknown),
        sign_revoke(REVOCATION, NOTICES, **SIGNING),
    )
    for notice in forged:
        with pytest.raises(MessageRefused):
            reader().revoke(sign_revoke(REVOCATION, NOTICES | {"token": notice}, **SIGNING))


def test_two_signers_commands_of_one_id_are_two() -> None:
    """Whoever uses up an id uses up their own: the other's command is carried out all the same."""
    other = SigningKey.generate()
    entries = [trust_entry(key, issuers=["*"], causes=list(Cause)) for key in (KEY, other)]
    both = reader(trusted=TrustList.parse(json.dumps({"keys": entries})))
    command = {"v": 1, "do": "track", "aud": AUDIENCE, "iat": NOW, "id": "c-1", "tokens": [REF.as_json()]}
    first, second = (both.track(key.sign(command, typ=COMMAND_TYPE)) for key in (KEY, other))
    assert first.id != second.id


def test_one_foreign_token_spoils_a_track_command() -> None:
    """A key for one issuer cannot slip in another's token among its own."""
    jws = sign_track([REF, REF.replace(iss="https://other.example")], **SIGNING)
    with pytest.raises(MessageRefused, match=r"other\.example"):
        reader(trusted=trust(ISS)).track(jws)


def test_a_command_is_of_one_kind() -> None:
    """A track command does not revoke, a revoke command does not track, and a notice does neither."""
    track, revoke = sign_track([REF], **SIGNING), sign_revoke(REVOCATION, NOTICES, **SIGNING)
    notice = KEY.sign({"v": 1, "do": "track", "aud": AUDIENCE, "iat": NOW, "id": "c", "tokens": []}, typ=NOTICE_TYPE)
    for jws in (revoke, notice):
        with pytest.raises(MessageRefused):
            reader().track(jws)
    for jws in (track, notice):
        with pytest.raises(MessageRefused):
            reader().revoke(jws)


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"id": ""},
        {"id": None},
        {"iat": True},
        {"tokens": []},
        {"tokens": {}},
        {"tokens": ["t"]},
        {"tokens": [{"iss": ISS}]},
        {"tokens": [REF.as_json()] * (MAX_TOKENS + 1)},
    ],
)
def test_a_track_command_that_cannot_be_read(change: dict[str, Any]) -> None:
    """Signed by a trusted key or not, a command of another shape is refused."""
    good = {"v": 1, "do": "track", "aud": AUDIENCE, "iat": NOW, "id": "c-1", "tokens": [REF.as_json()]}
    reader().track(KEY.sign(good, typ=COMMAND_TYPE))
    with pytest.raises(MessageRefused):
        reader().track(KEY.sign(good | change, typ=COMMAND_TYPE))


def test_a_revoke_command_carries_its_notice() -> None:
    """Without the signed notice of what it ends, services could not be told."""
    for notices in ({}, {"session token": "d.e.f"}, {"token": 7}):
        with pytest.raises(MessageRefused):
            reader().revoke(sign_revoke(REVOCATION, notices, **SIGNING))  # type: ignore[arg-type]


@given(st.dictionaries(st.sampled_from(["v", "id", "iat", "tokens", "revocation", "notices"]), json_values))
def test_only_message_refused_comes_out(change: dict[str, Any]) -> None:
    """Whatever a trusted key signed, the answer is a command or MessageRefused."""
    good = {"v": 1, "aud": AUDIENCE, "iat": NOW, "id": "c-1", "tokens": [REF.as_json()], "notices": NOTICES}
    good["revocation"] = REVOCATION.as_json()
    for do, read in (("track", reader().track), ("revoke", reader().revoke)):
        try:
            read(KEY.sign(good | change | {"do": do}, typ=COMMAND_TYPE))
        except MessageRefused:
            continue


@given(st.text() | st.binary() | json_values)
def test_only_message_refused_comes_out_of_noise(jws: Any) -> None:
    """Whatever arrives in place of a command is refused."""
    for read in (reader().track, reader().revoke):
        with pytest.raises(MessageRefused):
            read(jws)
