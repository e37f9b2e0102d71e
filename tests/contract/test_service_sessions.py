"""One suite for every place where a service keeps its sessions."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from django.test import override_settings

from knell import Cause, InvalidClaims, InvalidSettings, Issuer, KeptOut, Notice, Scope, Settings, TokenRef
from knell.errors import StoreUnavailable
from knell.handlers import redis as redis_sessions
from knell.handlers import sql as sql_sessions
from knell.handlers.django import DjangoSessions
from knell.handlers.redis import RedisSessions
from knell.handlers.sessions import Ended, Sessions, end_missed, end_sessions, open_sessions
from knell.handlers.sql import SqlSessions
from knell.handlers.tombstones import IN_FLIGHT_SECONDS
from knell.keys import SigningKey
from knell.notices import MAX_ENTRIES
from tests import servers
from tests.apps import django_site
from tests.contract.making import Clock
from tests.servers import free_port

ISS = "https://auth.example"
BOTH = frozenset({"token", "session"})
# The clock of a test stands here; every token lives until then, and longer.
NOW = 1_800_000_000.0
DAY = 86_400.0
DEADLINE_SECONDS = 20.0
# Where the sessions are, and for Django's own also where the index is.
KINDS = [
    "sqlite",
    "django.contrib.sessions.backends.db, sqlite",
    pytest.param("redis", marks=pytest.mark.redis),
    pytest.param("django.contrib.sessions.backends.cached_db, redis", marks=pytest.mark.redis),
]
if hasattr(servers, "start_postgresql"):
    KINDS.append(pytest.param("postgresql", marks=pytest.mark.postgresql))


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sessions(kind: str, request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[Sessions]:
    """A service's sessions, kept in a place of their own."""
    engine, _, index = kind.rpartition(", ")
    made: Sessions
    if index == "redis":
        made = RedisSessions(request.getfixturevalue("redis_url"), prefix=uuid4().hex, clock=clock)
    elif index == "postgresql":
        made = SqlSessions(request.getfixturevalue("postgresql_server").url, name=f"t{uuid4().hex}", clock=clock)
    else:
        made = SqlSessions(f"sqlite:///{tmp_path / 'sessions.db'}", name="shop", clock=clock)
    with contextlib.ExitStack() as stack:
        if engine:
            django_site.set_up()
            stack.enter_context(override_settings(SESSION_ENGINE=engine))
            made = DjangoSessions(made)
        yield made
    made.close()


def token(**changes: Any) -> TokenRef:
    fields = {"iss": ISS, "jti": uuid4().hex, "exp": NOW + 600, "iat": NOW - 60, "auth_time": NOW - 60}
    return TokenRef(**fields | {"sid": "s-1", "sub": "alice", "client_id": "web", "kid": "k-1"} | changes)


def notice(scope: Scope, **changes: Any) -> Notice:
    fields: dict[str, Any] = {"batch_id": f"r-{uuid4()}", "cause": Cause.REVOKED, "ends": BOTH, "at": NOW, "iss": ISS}
    if scope.has_cut_off:
        fields["issued_before"] = NOW
    return Notice(scope=scope, **fields | changes)


def add(sessions: Sessions, ref: TokenRef) -> str:
    session_id = secrets.token_hex(16)
    sessions.add(session_id, ref)
    return session_id


def ids(sessions: Sessions) -> set[str]:
    return {held.session_id for page in sessions.all() for held in page}


# ---- what a notice ends


@pytest.mark.parametrize(
    ("scope", "match"),
    [
        (Scope.TOKEN, {"jti": "t-1", "sid": "s-1"}),
        (Scope.TOKEN, {"jti": "a later token of the session", "sid": "s-1"}),
        (Scope.SESSION, {"sid": "s-1"}),
        (Scope.SUBJECT, {"sub": "alice"}),
        (Scope.CLIENT, {"client_id": "web"}),
        (Scope.KEY, {"kid": "k-1"}),
        (Scope.CLAIMS, {"claims": {"tenant": "acme"}}),
        (Scope.CLAIMS, {"claims": {"role": "admin", "tenant": "acme"}}),
        (Scope.CLAIMS, {"claims": {"sub": "alice", "level": 3}}),
    ],
)
def test_a_notice_ends_the_sessions_that_it_names_and_no_other(
    sessions: Sessions, scope: Scope, match: dict[str, Any]
) -> None:
    """Sessions are found by every scope, within one issuer."""
    claims = {"tenant": "acme", "role": ["dev", "admin"], "level": 3}
    ended = add(sessions, token(jti="t-1", claims=claims))
    other = {"sid": "s-2", "sub": "bob", "client_id": "app", "kid": "k-2"}
    others = {
        add(sessions, token(**other)),
        add(sessions, token(**other, claims={"tenant": "other", "role": "admin", "level": True})),
        add(sessions, token(jti="t-1", claims=claims, iss="https://other.example")),
    }
    assert end_sessions(sessions, [notice(scope, **match)]) == 1
    assert sessions.get(ended) is None
    assert ids(sessions) == others


def test_an_issuer_s_end_ends_all_of_its_sessions(
    sessions: Sessions, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a page of them, and none of another issuer's, nor any that began later."""
    for module in (redis_sessions, sql_sessions):
        monkeypatch.setattr(module, "PAGE", 7)
    count = 160 if kind.endswith("redis") else 20  # a sorted set of more than 128 is scanned in several steps
    for n in range(count):
        add(sessions, token(sid=f"s-{n}"))
    others = {add(sessions, token(iss="https://other.example")), add(sessions, token(auth_time=NOW + 1, iat=NOW + 1))}
    assert end_sessions(sessions, [notice(Scope.ISSUER)]) == count
    assert ids(sessions) == others


def test_a_message_of_500_notices_is_handled_as_one(sessions: Sessions) -> None:
    """Every session of the batch ends, with the notice that named it; every other stays."""
    given = {add(sessions, token(jti=f"t-{n}", sid=f"s-{n}")): f"s-{n}" for n in range(0, MAX_ENTRIES, 20)}
    staying = {add(sessions, token(jti=f"u-{n}", sid=f"u-{n}")) for n in range(5)}
    batch = [
        notice(Scope.TOKEN, batch_id="e0-1", n=n, cause=Cause.EXPIRED, jti=f"t-{n}", sid=f"s-{n}")
        for n in range(MAX_ENTRIES)
    ]
    told: list[Ended] = []
    assert end_sessions(sessions, batch, on_end=told.extend) == len(given) > 0
    assert {(each.session_id, each.notice.sid) for each in told if each.notice} == set(given.items())
    assert ids(sessions) == staying


def test_a_notice_that_comes_twice_ends_nothing_more(sessions: Sessions) -> None:
    """A copy finds nothing left to end, and a second session with the same token is not let in by it."""
    add(sessions, token())
    told = notice(Scope.SESSION, sid="s-1")
    assert end_sessions(sessions, [told]) == 1
    assert end_sessions(sessions, [told, told]) == 0
    with pytest.raises(KeptOut):
        add(sessions, token())


def test_an_end_of_the_token_alone_leaves_sessions_of_other_tokens(sessions: Sessions) -> None:
    """The token's end ends what hangs on that very token."""
    one, other = add(sessions, token(jti="t-1")), add(sessions, token(jti="t-2"))
    end_sessions(sessions, [notice(Scope.TOKEN, ends=frozenset({"token"}), cause=Cause.EXPIRED, jti="t-1", sid="s-1")])
    assert sessions.get(one) is None
    assert sessions.get(other) is not None


def test_what_began_after_the_cut_off_stays(sessions: Sessions) -> None:
    """`Notice.matches` decides by the session's start; a start that nobody knows counts as before."""
    late = add(sessions, token(auth_time=NOW - 10))
    early = add(sessions, token(auth_time=NOW - 30))
    unknown = add(sessions, token(auth_time=None, iat=None))
    end_sessions(sessions, [notice(Scope.SUBJECT, sub="alice", issued_before=NOW - 20)])
    assert ids(sessions) == {late}
    assert sessions.get(early) is None
    assert sessions.get(unknown) is None


def test_whoever_looks_after_the_sessions_is_told_before_they_go(sessions: Sessions) -> None:
    """When what it does fails, the sessions are still there, and the notice that comes again ends them."""
    session_id = add(sessions, token())
    told = notice(Scope.SESSION, sid="s-1")

    def fail(found: object) -> None:
        raise ConnectionError("the other store is away")

    with pytest.raises(ConnectionError):
        end_sessions(sessions, [told], on_end=fail)
    assert sessions.get(session_id) is not None
    assert end_sessions(sessions, [told]) == 1


# ---- tombstones


@pytest.mark.parametrize(
    ("scope", "match"),
    [
        (Scope.TOKEN, {"jti": "t-9", "sid": "s-1", "cause": Cause.EXPIRED, "batch_id": "e0-1"}),
        (Scope.TOKEN, {"jti": "t-1", "ends": frozenset({"token"})}),
        (Scope.SESSION, {"sid": "s-1"}),
        (Scope.SUBJECT, {"sub": "alice"}),
        (Scope.CLIENT, {"client_id": "web"}),
        (Scope.KEY, {"kid": "k-1"}),
        (Scope.CLAIMS, {"claims": {"role": "admin", "tenant": "acme"}}),
        (Scope.ISSUER, {}),
    ],
)
def test_a_request_in_flight_cannot_open_an_ended_session_again(
    sessions: Sessions, scope: Scope, match: dict[str, Any]
) -> None:
    """A tombstone keeps out whatever its notice matches, and a session that hung on another token before goes too."""
    claims = {"tenant": "acme", "role": ["admin"]}
    moved = add(sessions, token(sid="s-2", sub="bob", client_id="app", kid="k-2", iss="https://other.example"))
    told = notice(scope, **match)
    end_sessions(sessions, [told])
    with pytest.raises(KeptOut) as caught:
        add(sessions, token(jti="t-1", claims=claims))
    assert (caught.value.notice_id, caught.value.cause) == (told.id, told.cause)
    with pytest.raises(KeptOut):
        sessions.add(moved, token(jti="t-1", claims=claims))
    assert ids(sessions) == set()


def test_a_new_life_is_not_kept_out(sessions: Sessions) -> None:
    """Who logs in after the end that a tombstone tells of gets a session, and a late copy of the notice spares it."""
    told = [
        notice(Scope.SUBJECT, sub="alice"),
        notice(Scope.TOKEN, jti="t-1", sid="s-1", cause=Cause.EXPIRED),
    ]
    end_sessions(sessions, told)
    session_id = add(sessions, token(auth_time=NOW + 1, iat=NOW + 1))
    assert end_sessions(sessions, told) == 0
    assert sessions.get(session_id) is not None


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        (notice(Scope.SESSION, sid="s-1"), 31 * DAY + 10 + IN_FLIGHT_SECONDS),
        (notice(Scope.TOKEN, jti="t-1", ends=frozenset({"token"})), DAY + 10 + IN_FLIGHT_SECONDS),
        (notice(Scope.TOKEN, jti="t-1", ends=frozenset({"token"}), exp=NOW + 50), 60 + IN_FLIGHT_SECONDS),
        (notice(Scope.TOKEN, jti="t-1", sid="s-1", cause=Cause.EXPIRED), 10 + IN_FLIGHT_SECONDS),
    ],
    ids=["session", "token", "token with exp", "expired"],
)
def test_a_tombstone_stays_for_as_long_as_it_is_needed(
    sessions: Sessions, clock: Clock, told: Notice, seconds: float
) -> None:
    """Until no token that it keeps out can be accepted by anybody, and no request with one is in flight."""
    end_sessions(sessions, [told])
    lasting = token(jti="t-1", exp=NOW + 300 * DAY)
    clock.reach(NOW + seconds - 1)
    with pytest.raises(KeptOut):
        sessions.add("one", lasting)
    clock.reach(NOW + seconds)
    end_sessions(sessions, [notice(Scope.SESSION, sid="another", at=clock.now)])
    sessions.add("one", lasting)
    assert sessions.get("one") == lasting


def test_an_undone_revocation_keeps_nobody_out(sessions: Sessions) -> None:
    """Its tombstone goes, and that of another revocation of the same session stays."""
    revoked = [notice(Scope.KEY, kid="k-1", revocation_id=name) for name in ("one", "two")]
    end_sessions(sessions, revoked)
    for told in revoked:
        with pytest.raises(KeptOut):
            add(sessions, token())
        sessions.unearth([replace(told, cause=Cause.UNDONE, ends=frozenset(), batch_id="u-1")])
    assert add(sessions, token()) in ids(sessions)


def test_of_an_end_and_an_opening_whichever_is_second_sees_the_other(sessions: Sessions) -> None:
    """However requests and a notice interleave, no session of what has ended is left."""
    told = notice(Scope.SESSION, sid="s-1")
    opened: list[str] = []

    def log_in() -> None:
        with contextlib.suppress(KeptOut):
            opened.append(add(sessions, token()))

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(log_in) for _ in range(15)]
        running += [pool.submit(end_sessions, sessions, [told])]
        running += [pool.submit(log_in) for _ in range(15)]
        for each in running:
            each.result(DEADLINE_SECONDS)
    assert [session_id for session_id in opened if sessions.get(session_id)] == []
    assert ids(sessions) == set()


# ---- the sessions themselves


def test_a_session_is_kept_with_all_of_its_token(sessions: Sessions) -> None:
    """What `Notice.matches` needs comes back as it was."""
    ref = token(session_exp=NOW + 900, claims={"tenant": "acmé", "admin": True, "groups": ["a", "b"]})
    assert sessions.get(add(sessions, ref)) == ref
    assert sessions.get("nobody's") is None


def test_a_session_that_moves_to_another_token_is_found_by_that_alone(sessions: Sessions) -> None:
    """After a refresh the old token's end leaves it, and the new token's ends it."""
    session_id = add(sessions, token(jti="old", sid=None))
    sessions.add(session_id, token(jti="new", sid=None))
    end_sessions(sessions, [notice(Scope.TOKEN, ends=frozenset({"token"}), jti="old")])
    assert sessions.get(session_id) is not None
    end_sessions(sessions, [notice(Scope.TOKEN, ends=frozenset({"token"}), jti="new")])
    assert sessions.get(session_id) is None


def test_a_session_that_moves_while_it_is_ended_is_spared(sessions: Sessions) -> None:
    """It was found by a token that it hangs on no more."""
    session_id = add(sessions, token(jti="old", sid=None))

    def refresh(_: object) -> None:
        sessions.add(session_id, token(jti="new", sid=None))

    end_sessions(sessions, [notice(Scope.TOKEN, ends=frozenset({"token"}), jti="old")], on_end=refresh)
    found = sessions.get(session_id)
    assert found is not None
    assert found.jti == "new"


def test_a_logout_removes_one_session(sessions: Sessions) -> None:
    """Removing a session leaves its user's others, and no tombstone."""
    ref = token()
    first, second = add(sessions, ref), add(sessions, token())
    assert sessions.remove(first) == ref
    assert sessions.remove(first) is None
    assert ids(sessions) == {second}
    add(sessions, token())


@pytest.mark.parametrize("session_id", ["", "x" * 257, "line\nbreak", None])
def test_a_session_id_that_cannot_be_one_is_refused(sessions: Sessions, session_id: Any) -> None:
    """Nothing is kept under it, and the error does not show it."""
    with pytest.raises(InvalidClaims, match="session_id"):
        sessions.add(session_id, token())
    assert ids(sessions) == set()


def test_a_session_that_nobody_is_told_of_goes_by_itself(sessions: Sessions, clock: Clock) -> None:
    """At its session_exp, or when no session that old can be alive: it is no session from then on, and then it goes."""
    with_end, without = add(sessions, token(session_exp=NOW + 100)), add(sessions, token())
    clock.reach(NOW + 111)
    assert sessions.get(with_end) is None
    assert sessions.get(without) is not None
    clock.reach(NOW + 31 * DAY)
    assert sessions.get(without) is None
    later = add(sessions, token(exp=clock.now + 600, iat=clock.now, auth_time=clock.now))
    end_sessions(sessions, [notice(Scope.SESSION, sid="another", at=clock.now)])
    assert ids(sessions) == {later}


def test_after_missed_notices_every_session_is_looked_up(
    sessions: Sessions, clock: Clock, settings: Callable[..., Settings]
) -> None:
    """What is on the denylist or past its own end goes, and the rest stays."""
    made = settings()
    clock.now = time.time()
    with Issuer(ISS, SigningKey.generate(), settings=made) as issuer:
        refs = [issuer.issue({"sub": "alice", "sid": sid}, ttl_seconds=60).ref for sid in ("s-1", "s-2", "s-3")]
        issuer.revoke("session", {"sid": "s-2"})
    living = add(sessions, refs[0])
    add(sessions, refs[1])
    add(sessions, refs[2].replace(exp=time.time() - 1))
    told: list[Ended] = []
    assert end_missed(sessions, made, on_end=told.extend) == 2
    assert sorted((str(each.token.sid), each.notice) for each in told) == [("s-2", None), ("s-3", None)]
    assert ids(sessions) == {living}
    assert end_missed(sessions, made) == 0


# ---- opening them


@pytest.mark.parametrize("url", ["rds://:hunter2@h", "sqlite://u:hunter2@h/db", "redis://:hunter2@h/0?bogus=1"])
def test_a_url_for_sessions_that_cannot_be_used_is_not_shown(url: str, settings: Callable[..., Settings]) -> None:
    """It is refused when it is opened, and the text has no password in it."""
    with pytest.raises(InvalidSettings, match="the URL of the shop's sessions") as caught:
        open_sessions(url, settings=settings(), name="shop")
    assert "hunter2" not in str(caught.value)


def test_the_sqlite_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """A session's id opens the session: nobody else on the machine may read the file, or what SQLite puts beside it."""
    path = tmp_path / "home" / "shop.db"
    before = os.umask(0o022)
    try:
        sessions = SqlSessions(f"sqlite:///{path}")
        with sessions._begun() as connection:
            connection.execute(sessions._sessions.delete())
            modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert modes == dict.fromkeys(modes, 0o600)
    assert "shop.db" in modes


def test_a_store_that_is_away_is_one_kind_of_error() -> None:
    """It is told within seconds, and the service tries again."""
    sessions = RedisSessions(f"redis://127.0.0.1:{free_port()}/0", prefix="shop")
    for call in (
        lambda: sessions.add("one", token()),
        lambda: sessions.get("one"),
        lambda: sessions.remove("one"),
        lambda: end_sessions(sessions, [notice(Scope.SESSION, sid="s-1")]),
        lambda: sessions.unearth([notice(Scope.SESSION, sid="s-1")]),
        lambda: ids(sessions),
    ):
        with pytest.raises(StoreUnavailable):
            call()
