"""Watches: told once, in time, from the verifier's own thread."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from knell.decoding import Claims
from knell.revocations import Revocation
from knell.tokens import ClaimValue, TokenRef
from knell.verifier import TokenEnd, Verifier
from knell.watches import Watches
from tests.unit.memory_feed import ISS, MemoryFeed, eventually, revocation
from tests.unit.tokens_for_tests import NOW, claims, verifier

Ends = queue.Queue[TokenEnd]


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed(clock=time.time)


@pytest.fixture
def make(feed: MemoryFeed) -> Iterator[Callable[..., Verifier]]:
    """Makes verifiers on the test's feed, by the real clock, and closes them."""
    made: list[Verifier] = []

    def _make(**changes: Any) -> Verifier:
        made.append(verifier(feed, **{"clock": time.time, **changes}))
        assert made[-1].wait_ready(20)
        return made[-1]

    yield _make
    for one in made:
        one.close()


def _live(**changes: Any) -> dict[str, Any]:
    now = time.time()
    return claims(**{"iat": now, "exp": now + 600} | changes)


def _revocation(scope: str, value: str | dict[str, ClaimValue], **more: Any) -> Revocation:
    return revocation(scope, value, now=time.time(), **more)


@pytest.mark.parametrize(
    ("scope", "value"),
    [
        ("token", "j1"),
        ("session", "s1"),
        ("subject", "alice"),
        ("client", "web"),
        ("key", "k1"),
        ("claims", {"tenant": "acme", "roles": "admin"}),
        ("issuer", "https://auth.example"),
    ],
)
def test_a_revocation_ends_what_it_names(
    make: Callable[..., Verifier], feed: MemoryFeed, scope: str, value: str | dict[str, ClaimValue]
) -> None:
    """A watch is told of a revocation of each scope, with its id and reason; other tokens' watches are not."""
    one, ends, others = make(), Ends(), Ends()
    mine = Claims(_live(client_id="web", tenant="acme", roles=["user", "admin"]))
    mine.kid = "k1"
    one.watch(mine, ends.put)
    if scope != "issuer":
        one.watch(_live(jti="j2", sid="s2", sub="bob", tenant="acme", roles=["user"]), others.put)
    one.watch(_live(iss="https://b.example", client_id="web", tenant="acme", roles=["admin"]), others.put)
    revoked = _revocation(scope, value, reason="stolen")
    feed.revoke(revoked)
    end = ends.get(timeout=20)
    assert (end.cause, end.revocation_id, end.reason) == ("revoked", revoked.id, "stolen")
    feed.revoke(_revocation("token", "j1"), _revocation("token", "unknown"))
    feed.undo(revoked)
    eventually(lambda: one._follower.cursor == feed.head())
    assert ends.empty()
    assert others.empty()
    assert len(one._watches) == (1 if scope == "issuer" else 2)


def test_a_session_that_began_after_the_cut_off_is_left_alone(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """A subject's revocation ends the watches of sessions from before its cut-off alone."""
    one, old, new = make(), Ends(), Ends()
    now = time.time()
    one.watch(_live(jti="new"), new.put)
    one.watch(_live(jti="old", auth_time=now - 100), old.put)
    feed.revoke(_revocation("subject", "alice", issued_before=now - 50))
    assert old.get(timeout=20).cause == "revoked"
    assert new.empty()


@pytest.mark.parametrize("claim", ["exp", "session_exp"])
def test_a_token_ends_on_time_and_never_early(make: Callable[..., Verifier], claim: str) -> None:
    """A watch is told at the token's exp, or its session's, whichever is first."""
    one, told = make(), queue.Queue[tuple[float, TokenEnd]]()
    at = time.time() + 0.3
    one.watch(_live(**{claim: at}), lambda end: told.put((time.time(), end)))
    when, end = told.get(timeout=20)
    assert when >= at
    assert end == TokenEnd("expired", at)


def test_the_leeway_counts_for_watches_too(make: Callable[..., Verifier]) -> None:
    """A token that verify still accepts by its leeway is not ended before that has passed."""
    one, told = make(leeway_seconds=1.0), queue.Queue[tuple[float, TokenEnd]]()
    at = time.time() - 0.7
    one.watch(_live(exp=at), lambda end: told.put((time.time(), end)))
    when, _ = told.get(timeout=20)
    assert when >= at + 1.0


def test_what_is_dead_already_is_told_at_once(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """Watching a token that was revoked or has expired before calls back at once."""
    feed.revoke(_revocation("token", "j1"))
    one, ends = make(), Ends()
    one.watch(_live(), ends.put)
    assert ends.get(timeout=20).cause == "revoked"
    one.watch(_live(jti="j2", exp=time.time() - 5), ends.put)
    assert ends.get(timeout=20).cause == "expired"
    assert len(one._watches) == 0


def test_a_wall_clock_that_is_set_is_noticed(make: Callable[..., Verifier]) -> None:
    """When the clock jumps past a token's exp, its watch is told without waiting for the old time."""
    now = NOW
    one, ends = make(clock=lambda: now), Ends()
    one.watch(claims(), ends.put)
    now = NOW + 600
    assert ends.get(timeout=20) == TokenEnd("expired", NOW + 600)


def test_many_timers_end_in_order(make: Callable[..., Verifier]) -> None:
    """Watches end in the order of their exp, whatever the order that they were made in."""
    one, told = make(), queue.Queue[str]()
    now = time.time()
    for n in (3, 1, 4, 0, 2):
        one.watch(_live(jti=f"j{n}", exp=now + 0.2 + n / 50), lambda end, n=n: told.put(str(n)))  # type: ignore[misc]
    assert [told.get(timeout=20) for _ in range(5)] == list("01234")


def test_a_cancelled_watch_is_not_told(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """After cancel, or after its with block, a watch is gone; cancelling again does no harm."""
    one, cancelled, ends = make(), Ends(), Ends()
    watch = one.watch(_live(), cancelled.put)
    with one.watch(_live(), cancelled.put):
        assert len(one._watches) == 2
    watch.cancel()
    watch.cancel()
    assert len(one._watches) == 0
    one.watch(_live(), ends.put)
    feed.revoke(_revocation("token", "j1"))
    ends.get(timeout=20)
    assert cancelled.empty()


def test_an_error_in_a_callback_does_not_hurt_the_others(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """A callback that raises is logged, and the next ones are called."""
    one, ends = make(), Ends()

    def fail(end: TokenEnd) -> None:
        raise RuntimeError("no")

    one.watch(_live(), fail)
    one.watch(_live(), ends.put)
    feed.revoke(_revocation("session", "s1"))
    assert ends.get(timeout=20).cause == "revoked"


def test_a_callback_that_wants_to_exit_ends_no_other_watch(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """sys.exit in a callback would end the thread of all watches: it is an error like any other."""
    one, ends = make(), Ends()
    one.watch(_live(jti="first"), lambda end: sys.exit(1))
    one.watch(_live(jti="second"), ends.put)
    feed.revoke(_revocation("token", "first"), _revocation("token", "second"))
    assert ends.get(timeout=20).cause == "revoked"


def test_a_callback_may_use_the_verifier(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """A callback is called with no lock held: it can watch, cancel and ask as it likes, from the watches' thread."""
    one, told = make(), queue.Queue[str]()

    def again(end: TokenEnd) -> None:
        other.cancel()
        helper = threading.Thread(target=lambda: one.watch(_live(jti="j3"), print))
        helper.start()
        helper.join(20)
        told.put("stuck" if helper.is_alive() else threading.current_thread().name)

    other = one.watch(_live(jti="j2"), print)
    one.watch(_live(sid="s9"), again)
    feed.revoke(_revocation("session", "s9"))
    assert told.get(timeout=30) == "knell-watches"
    assert len(one._watches) == 1


def test_a_resync_ends_what_the_new_denylist_refuses(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """When the feed could not be read on, every watch is looked up in the new denylist."""
    one, ends, others = make(), Ends(), Ends()
    one.watch(_live(), ends.put)
    one.watch(_live(jti="j2", sid="s2", sub="bob"), others.put)
    feed.down = True
    eventually(lambda: one.staleness_seconds > 0.1)
    feed.revoke(_revocation("session", "s1"))
    feed.trim()
    feed.down = False
    assert ends.get(timeout=20).cause == "revoked"
    assert one.resyncs == 1
    assert others.empty()


def test_no_wake_up_is_lost_between_the_check_and_the_watch(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """Whenever a token is revoked while it is being watched, its watch is told, and told once."""
    one, told = make(), queue.Queue[int]()
    total = 300

    def revoke() -> None:
        for n in range(total):
            feed.revoke(_revocation("token", f"j{n}"))

    thread = threading.Thread(target=revoke)
    thread.start()
    for n in range(total):
        one.watch(_live(jti=f"j{n}"), lambda end, n=n: told.put(n))  # type: ignore[misc]
    thread.join()
    assert sorted(told.get(timeout=20) for _ in range(total)) == list(range(total))
    assert told.empty()
    assert len(one._watches) == 0


def test_watches_that_come_and_go_leave_nothing_behind(make: Callable[..., Verifier]) -> None:
    """The memory of watches is bounded by those that live."""
    one = make()
    keep = one.watch(_live(jti="keep"), print)
    for n in range(5000):
        one.watch(_live(jti=f"j{n}"), print).cancel()
    watches = one._watches
    assert len(watches) == 1
    assert len(watches._timers) < 2000
    assert {key[2] for key in watches._by_key} == {"keep", "s1", "alice", "https://auth.example"}
    keep.cancel()
    assert not watches._by_key


def test_a_revocation_looks_only_at_what_it_names(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """A change asks the watches of its own key, not all of them."""
    one, ends = make(), Ends()
    for n in range(500):
        one.watch(_live(jti=f"j{n}", sid=f"s{n}", sub=f"u{n}"), ends.put)
    asked: list[TokenRef] = []

    class Counted(Revocation):
        def refuses(self, token: TokenRef, **more: Any) -> bool:
            asked.append(token)
            return Revocation.refuses(self, token, **more)

    made = _revocation("session", "s7")
    feed.revoke(Counted(**{name: getattr(made, name) for name in Revocation.__dataclass_fields__}))
    ends.get(timeout=20)
    assert [token.jti for token in asked] == ["j7"]


def test_closing_drops_watches_without_a_call(feed: MemoryFeed) -> None:
    """Closing the verifier ends no token; nothing is called afterwards, and nothing can be watched."""
    ends = Ends()
    one = verifier(feed, clock=time.time)
    one.watch(_live(exp=time.time() + 0.2), ends.put)
    one.close()
    with pytest.raises(RuntimeError, match="closed"):
        one.watch(_live(), ends.put)
    assert ends.empty()
    assert "knell-watches" not in {thread.name for thread in threading.enumerate()}


def test_watches_without_a_denylist_still_expire() -> None:
    """Watches need no store to end what expires."""
    from knell.denylist import Denylist

    watches, ends = Watches(Denylist), Ends()
    watches.add(TokenRef(iss=ISS, jti="j", exp=time.time() + 0.1), ends.put)
    assert ends.get(timeout=20).cause == "expired"
    watches.close()
