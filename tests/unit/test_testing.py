"""knell.testing, used as its users do: by fixtures, on services and verifiers of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from knell import (
    BatchFailed,
    Cause,
    GiveUp,
    InvalidInput,
    KeptOut,
    Notice,
    Rules,
    Service,
    Settings,
    TokenEnd,
    TokenExpired,
    TokenRevoked,
    TryLater,
)
from knell.handlers.sessions import attach
from knell.handlers.sql import SqlSessions
from knell.testing import Knell

CLAIMS = {"sub": "alice", "sid": "s-1"}


@pytest.fixture
def shop(tmp_path: Path) -> Service:
    """A service as a user writes it, with settings of its own that no test may touch."""
    return Service("shop", settings=Settings(home=tmp_path / "elsewhere"), first_retry_seconds=10.0, max_attempts=3)


# ---- the main job


def test_a_session_ends_when_its_token_expires_and_not_before(knell: Knell) -> None:
    """The clock stands until the test moves it."""
    shop = knell.record("shop")
    issued = knell.issue(CLAIMS, ttl_seconds=60)
    knell.advance(issued.ref.exp - knell.clock.now - 0.001)
    assert shop.calls == []
    knell.advance(1)
    [notice] = shop.session_ends
    assert (notice.cause, notice.sid, notice.jti) == (Cause.EXPIRED, "s-1", issued.ref.jti)
    assert shop.token_ends == [notice]


def test_a_revocation_is_told_and_refused_at_once(knell: Knell) -> None:
    """By every service that takes part, and by every verifier; and the receipts are in."""
    shop, partner = knell.record("shop"), knell.record("partner")
    issued = knell.issue(CLAIMS)
    assert knell.verifier.verify(issued.token)["sub"] == "alice"
    revoked = knell.revoke("session", {"sid": "s-1"}, reason="logout")
    assert [notice.reason for notice in (*shop.session_ends, *partner.session_ends)] == ["logout", "logout"]
    with pytest.raises(TokenRevoked):
        knell.verifier.verify(issued.token)
    status = knell.issuer.status(revoked.id)
    assert status is not None
    assert {name: each.state for name, each in status.items()} == {"shop": "done", "partner": "done"}


def test_what_the_issuer_does_is_delivered_when_the_test_says_so(knell: Knell) -> None:
    """In between a test can look at what is not there yet."""
    shop = knell.record("shop")
    knell.issue(CLAIMS)
    knell.issuer.revoke("session", {"sid": "s-1"})
    assert shop.session_ends == []
    assert knell.run() == 2  # the notice, and its receipt
    assert len(shop.session_ends) == 1
    assert knell.run() == 0


def test_an_undone_revocation_is_told_and_accepted_again(knell: Knell) -> None:
    """Handlers of ends are not called."""
    shop = knell.record("shop")
    issued = knell.issue(CLAIMS)
    revoked = knell.revoke("session", {"sid": "s-1"})
    knell.undo(revoked.id)
    assert [notice.revocation_id for notice in shop.undone] == [revoked.id]
    assert len(shop.session_ends) == 1
    knell.verifier.verify(issued.token)


def test_an_expired_token_is_refused_and_a_watch_called_back(knell: Knell) -> None:
    """When `advance` returns, connections have been told."""
    issued, other = knell.issue(CLAIMS, ttl_seconds=60), knell.issue({"sub": "bob"}, ttl_seconds=600)
    ends: list[TokenEnd] = []
    for each in (issued, other):
        knell.verifier.watch(knell.verifier.verify(each.token), ends.append)
    knell.advance(61)
    with pytest.raises(TokenExpired):
        knell.verifier.verify(issued.token)
    assert [end.cause for end in ends] == ["expired"]
    knell.revoke("subject", {"sub": "bob"})
    assert [end.cause for end in ends] == ["expired", "revoked"]


@pytest.fixture
def knell_rules(request: pytest.FixtureRequest) -> Rules:
    return getattr(request, "param", Rules())


@pytest.mark.parametrize("knell_rules", [Rules(session_grace_seconds=30)], indirect=True)
def test_the_rules_are_the_test_s_own(knell: Knell) -> None:
    """Here a session outlives its last token by the grace."""
    shop = knell.record("shop")
    knell.issue(CLAIMS, ttl_seconds=60)
    knell.advance(70)
    assert (len(shop.token_ends), shop.session_ends) == (1, [])
    knell.advance(30)
    assert len(shop.session_ends) == 1


# ---- services of the user's own


def test_the_user_s_handlers_are_called_and_recorded(knell: Knell, shop: Service) -> None:
    """Plain and async ones, in a batch and one by one."""
    called: list[str] = []

    @shop.on_session_end
    async def end(notice: Notice) -> None:
        called.append(f"session {notice.sid}")

    @shop.on_token_end(batch=True)
    def void(notices: Sequence[Notice]) -> None:
        called.append(f"{len(notices)} tokens")

    recorder = knell.record(shop)
    for n in range(3):
        knell.issue({"sub": "alice", "sid": f"s-{n}"}, ttl_seconds=60)
    knell.advance(61)
    assert called[0] == "3 tokens"
    assert sorted(called[1:]) == ["session s-0", "session s-1", "session s-2"]
    assert len(recorder.session_ends) == len(recorder.token_ends) == 3


def test_a_service_is_given_back_as_it_was(tmp_path: Path, shop: Service) -> None:
    """Nothing of its own was opened, and nothing of the test's is left in it."""
    before = dict(vars(shop))
    with Knell(tmp_path / "knell") as knell:
        knell.record(shop)
        assert shop.settings is knell.settings
        knell.issue(CLAIMS)
        knell.revoke("session", {"sid": "s-1"})
    assert vars(shop) == before
    assert not (tmp_path / "elsewhere").exists()


def test_a_handler_that_fails_is_called_again_as_time_moves(knell: Knell, shop: Service) -> None:
    """After the waits of its own service, for the entry that failed only, and with the same id."""
    seen: list[Notice] = []

    @shop.on_session_end
    def end(notice: Notice) -> None:
        seen.append(notice)
        if len(seen) < 3:
            raise ConnectionError("the session store is away")

    recorder = knell.record(shop)
    other = knell.record("partner")
    knell.issue(CLAIMS)
    began = knell.clock.now
    knell.revoke("session", {"sid": "s-1"})
    assert recorder.session_ends == []
    assert len(seen) == 1
    knell.advance(9.9)
    assert len(seen) == 1
    knell.advance(0.1)
    assert len(seen) == 2
    knell.advance(20)
    assert [call.at - began for call in recorder.calls] == [0, 10, 30]
    assert [str(call.error) for call in recorder.failures] == ["the session store is away"] * 2
    assert {notice.id for notice in seen} == {recorder.session_ends[0].id}
    assert len(other.session_ends) == 1


def test_what_a_service_gives_up_on_is_parked(knell: Knell, shop: Service) -> None:
    """After max_attempts, or at once with GiveUp."""
    shop.on_session_end(lambda notice: None)
    recorder = knell.record(shop)
    knell.issue(CLAIMS)
    recorder.fail(times=3)
    knell.revoke("session", {"sid": "s-1"})
    knell.advance(60)
    assert [parked.attempts for parked in recorder.parked] == [3]
    recorder.fail(GiveUp("never"))
    knell.revoke("session", {"sid": "s-2"})
    assert len(recorder.parked) == 2
    assert recorder.session_ends == []


def test_a_handler_s_wish_to_be_called_later_is_respected(knell: Knell, shop: Service) -> None:
    """TryLater asks for longer than the service would wait."""
    shop.on_session_end(lambda notice: None)
    recorder = knell.record(shop)
    recorder.fail(TryLater("busy", 120))
    knell.issue(CLAIMS)
    knell.revoke("session", {"sid": "s-1"})
    knell.advance(119)
    assert recorder.session_ends == []
    knell.advance(1)
    assert len(recorder.session_ends) == 1


def test_of_a_batch_the_notices_that_failed_come_again(knell: Knell, shop: Service) -> None:
    """BatchFailed names them."""
    given: list[list[str | None]] = []

    @shop.on_session_end(batch=True)
    def end(notices: Sequence[Notice]) -> None:
        given.append([notice.sid for notice in notices])
        if len(given) == 1:
            raise BatchFailed({notice.id: OSError("away") for notice in notices if notice.sid == "s-1"})

    recorder = knell.record(shop)
    for n in range(3):
        knell.issue({"sid": f"s-{n}"}, ttl_seconds=60)
    knell.advance(61)
    knell.advance(10)
    assert [sorted(map(str, each)) for each in given] == [["s-0", "s-1", "s-2"], ["s-1"]]
    assert sorted(str(notice.sid) for notice in recorder.session_ends) == ["s-0", "s-1", "s-2"]
    assert [call.notice.sid for call in recorder.failures] == ["s-1"]


def test_a_service_takes_part_once(knell: Knell) -> None:
    """Two of one name would share a queue."""
    knell.record("shop")
    with pytest.raises(InvalidInput, match="takes part already"):
        knell.record("shop")


# ---- trouble


def test_a_broker_that_was_away_loses_nothing(knell: Knell) -> None:
    """The revocation is recorded and refused; services are told by the sweep."""
    shop = knell.record("shop")
    issued = knell.issue(CLAIMS)
    knell.courier.down = True
    revoked = knell.revoke("session", {"sid": "s-1"})
    assert (revoked.recorded, revoked.published) == ("store", False)
    with pytest.raises(TokenRevoked):
        knell.verifier.verify(issued.token)
    knell.courier.down = False
    knell.advance(60)
    assert shop.session_ends == []
    knell.sweep()
    assert len(shop.session_ends) == 1


def test_a_receipt_that_is_not_taken_leaves_the_notice_where_it_is(knell: Knell, shop: Service) -> None:
    """The message is delivered again when the broker is back, and the handler is not called again."""

    @shop.on_session_end
    def end(_: Notice) -> None:
        knell.courier.down = True

    recorder = knell.record(shop)
    knell.issue(CLAIMS)
    knell.revoke("session", {"sid": "s-1"})
    knell.courier.down = False
    knell.run()
    assert len(recorder.session_ends) == 1
    assert knell.courier.waiting == 0


def test_a_service_that_missed_notices_is_told(knell: Knell) -> None:
    """on_missed gets since when."""
    shop = knell.record("shop")
    since = float(int(knell.clock.now)) - 3600
    knell.miss("shop", since=since)
    assert shop.missed == [since]


# ---- the ready-made sessions, as a service has them


def test_attached_sessions_end_and_are_kept_out(knell: Knell, shop: Service, tmp_path: Path) -> None:
    """One line: session ends, tombstones, undone revocations, and what was missed."""
    sessions = SqlSessions(f"sqlite:///{tmp_path / 'sessions.db'}", clock=knell.clock)
    attach(sessions, shop)
    knell.record(shop)
    token, other = knell.issue(CLAIMS).ref, knell.issue({"sub": "bob", "sid": "s-2"}).ref
    sessions.add("one", token)
    sessions.add("two", other)
    revoked = knell.revoke("session", {"sid": "s-1"})
    assert (sessions.get("one"), sessions.get("two")) == (None, other)
    with pytest.raises(KeptOut):
        sessions.add("one", token)
    knell.undo(revoked.id)
    sessions.add("one", token)
    assert sessions.get("one") == token


def test_a_service_s_sessions_are_attached_once(shop: Service, tmp_path: Path) -> None:
    """A second handler for the same event would never be called."""
    sessions = SqlSessions(f"sqlite:///{tmp_path / 'sessions.db'}")
    attach(sessions, shop)
    with pytest.raises(InvalidInput):
        attach(sessions, shop)
    with pytest.raises(InvalidInput, match="undone"):
        shop.on_undone(lambda notice: None)


def test_sessions_end_with_their_token_where_that_is_asked_for(knell: Knell, shop: Service, tmp_path: Path) -> None:
    """token_ends: a session that goes on does not keep what hung on the token alone."""
    sessions = SqlSessions(f"sqlite:///{tmp_path / 'sessions.db'}", clock=knell.clock)
    attach(sessions, shop, token_ends=True)
    knell.record(shop)
    first = knell.issue(CLAIMS, ttl_seconds=60)
    second = knell.issuer.refresh(first.token, ttl_seconds=600)
    sessions.add("one", first.ref)
    sessions.add("two", second.ref)
    knell.advance(61)
    assert (sessions.get("one"), sessions.get("two")) == (None, second.ref)


def test_sessions_are_looked_up_after_missed_notices(knell: Knell, shop: Service, tmp_path: Path) -> None:
    """Against the denylist of the test's own store."""
    sessions = SqlSessions(f"sqlite:///{tmp_path / 'sessions.db'}", clock=knell.clock)
    attach(sessions, shop)
    recorder = knell.record(shop)
    token, other = knell.issue(CLAIMS).ref, knell.issue({"sub": "bob", "sid": "s-2"}).ref
    sessions.add("one", token)
    sessions.add("two", other)
    recorder.fail(GiveUp("this notice is lost"))
    knell.revoke("session", {"sid": "s-1"})
    assert sessions.get("one") is not None
    knell.miss("shop")
    assert len(recorder.missed) == 1
    assert (sessions.get("one"), sessions.get("two")) == (None, other)


# ---- the clock


def test_the_clock_does_not_run_back(knell: Knell) -> None:
    """And it does not run by itself."""
    with pytest.raises(ValueError, match="moves on"):
        knell.clock.advance(-1)
    assert abs(knell.clock.now - time.time()) < 3600
    assert knell.clock() == knell.clock() == knell.store.time()
