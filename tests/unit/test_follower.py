"""The follower against a feed in memory: in order, without gaps, through every loss."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from knell.denylist import Denylist
from knell.errors import StoreUnavailable
from knell.follower import PAGE, Follower
from knell.store import Change, Cursor, Feed
from knell.tokens import TokenRef
from tests.unit.memory_feed import ISS, MemoryFeed, eventually, revocation


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed(clock=lambda: 1000.0)


@pytest.fixture
def follower(feed: MemoryFeed) -> Iterator[Follower]:
    made = Follower(feed, clock=lambda: 1000.0, wait_seconds=0.05)
    yield made
    made.close()


def _token(jti: str) -> TokenRef:
    return TokenRef(iss=ISS, jti=jti, exp=5000.0, iat=1000.0)


def test_the_memory_feed_is_a_feed(feed: MemoryFeed) -> None:
    """The feed that these tests use has the methods of the Protocol."""
    as_feed: Feed = feed
    assert as_feed.head() == Cursor("e1", 0)


def test_a_snapshot_of_several_pages_is_read_in_full(feed: MemoryFeed, follower: Follower) -> None:
    """catch_up reads every page of the snapshot before it returns."""
    feed.revoke(*(revocation("token", f"t{n}") for n in range(2 * PAGE + 1)))
    follower.catch_up()
    assert len(follower.denylist) == 2 * PAGE + 1
    assert follower.resyncs == 0


def test_catch_up_beside_a_snapshot_that_is_nearly_read_misses_nothing(
    feed: MemoryFeed, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded before the call is applied when it returns, although another thread read the snapshot."""
    held, let_go = threading.Event(), threading.Event()
    changes = feed.changes

    def slow(*args: Any, **options: Any) -> list[Change]:
        found = changes(*args, **options)
        if not held.is_set():
            held.set()
            assert let_go.wait(20)
        return found

    class Noting:
        """The lock of the snapshot, which lets the first thread go on once a second one waits for it."""

        def __init__(self) -> None:
            self.lock = follower._resyncing

        def __enter__(self) -> None:
            if held.is_set():
                let_go.set()
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    monkeypatch.setattr(feed, "changes", slow)
    monkeypatch.setattr(follower, "_resyncing", Noting())
    first = threading.Thread(target=follower.catch_up)
    first.start()
    assert held.wait(20)
    feed.revoke(revocation("token", "late"))
    follower.catch_up()
    assert follower.denylist.find(_token("late")) is not None
    first.join(20)


def test_changes_are_applied_in_order(feed: MemoryFeed) -> None:
    """After the snapshot every change is applied and told, in the order of the feed."""
    told: list[Change] = []
    follower = Follower(feed, on_change=told.append)
    follower.catch_up()
    one, other = revocation("token", "a"), revocation("token", "b")
    feed.revoke(one, other)
    feed.undo(one)
    follower.catch_up()
    assert [(change.kind, change.revocation) for change in told] == [
        ("revoked", one),
        ("revoked", other),
        ("undone", one),
    ]
    assert follower.denylist.find(_token("a")) is None
    assert follower.denylist.find(_token("b")) is other


def test_a_backlog_of_several_pages_is_caught_up_with(feed: MemoryFeed, follower: Follower) -> None:
    """catch_up goes on until the feed has nothing more."""
    follower.catch_up()
    feed.revoke(*(revocation("token", f"t{n}") for n in range(2 * PAGE)))
    follower.catch_up()
    assert len(follower.denylist) == 2 * PAGE


def test_catch_up_to_a_known_place_asks_nobody(feed: MemoryFeed, follower: Follower) -> None:
    """catch_up with a cursor that was reached already does not contact the store."""
    cursor = feed.revoke(revocation("token", "a"))
    follower.catch_up(cursor)
    feed.down = True
    follower.catch_up(cursor)
    with pytest.raises(StoreUnavailable):
        follower.catch_up(Cursor(cursor.epoch, cursor.position + 1))


def test_changes_during_the_snapshot_are_not_missed(feed: MemoryFeed, follower: Follower) -> None:
    """What is revoked or undone while the snapshot is read is in the denylist, or out of it, afterwards."""
    early, late = revocation("token", "early"), revocation("token", "late")
    feed.revoke(early)

    def meanwhile() -> None:
        feed.before_snapshot = lambda: None
        feed.undo(early)
        feed.revoke(late)

    feed.before_snapshot = meanwhile
    follower.catch_up()
    assert follower.denylist.find(_token("early")) is None
    assert follower.denylist.find(_token("late")) is late


def test_a_trimmed_feed_means_a_new_denylist(feed: MemoryFeed, follower: Follower) -> None:
    """Past a trimmed feed the whole denylist is read anew, and put in place when it is complete."""
    gone, stays = revocation("token", "gone"), revocation("token", "stays")
    feed.revoke(gone)
    follower.catch_up()
    old = follower.denylist
    feed.undo(gone)
    feed.revoke(stays)
    feed.trim()
    seen: list[Denylist] = []
    feed.before_snapshot = lambda: seen.append(follower.denylist)
    follower.catch_up()
    assert all(during is old for during in seen)
    assert seen
    assert follower.denylist is not old
    assert follower.denylist.find(_token("gone")) is None
    assert follower.denylist.find(_token("stays")) is stays
    assert (follower.resyncs, follower.alarms) == (1, 0)


def test_a_clean_restart_is_a_resync_and_no_alarm(feed: MemoryFeed, follower: Follower) -> None:
    """A new epoch with the same data is counted, and does not alarm."""
    feed.revoke(revocation("token", "a"))
    follower.catch_up()
    feed.restart()
    follower.catch_up()
    assert (follower.resyncs, follower.alarms) == (1, 0)
    assert follower.denylist.find(_token("a")) is not None


def test_a_store_that_lost_data_alarms_and_is_not_followed_into_forgetting(feed: MemoryFeed) -> None:
    """When the store was emptied, that is an alarm, and what this process knew stays refused."""
    resynced: list[Denylist] = []
    follower = Follower(feed, on_resync=resynced.append)
    known, later = revocation("token", "known"), revocation("token", "later")
    feed.revoke(known)
    follower.catch_up()
    feed.lose()
    follower.catch_up()
    feed.revoke(later)
    follower.catch_up()
    assert (follower.resyncs, follower.alarms) == (1, 1)
    assert follower.denylist.find(_token("known")) == known
    assert follower.denylist.find(_token("later")) is later
    assert resynced[-1] is follower.denylist


def test_an_epoch_that_changes_during_the_snapshot_begins_it_anew(feed: MemoryFeed, follower: Follower) -> None:
    """A snapshot that a restart interrupted is thrown away; what is put in place is of one epoch."""
    feed.revoke(revocation("token", "a"), revocation("token", "b"))

    def meanwhile() -> None:
        feed.before_snapshot = lambda: None
        feed.lose()

    feed.before_snapshot = meanwhile
    follower.catch_up()
    assert len(follower.denylist) == 0
    assert follower.cursor == Cursor("e2", 0)


def test_a_store_that_never_holds_still_is_unavailable(feed: MemoryFeed, follower: Follower) -> None:
    """If each snapshot is interrupted, catch_up says so in the end."""
    feed.before_snapshot = feed.restart
    with pytest.raises(StoreUnavailable, match="epoch"):
        follower.catch_up()


def test_staleness_counts_from_the_last_answer(feed: MemoryFeed) -> None:
    """Staleness is infinite before the first answer, 0 at an answer, and grows while the store is silent."""
    now = 50.0
    follower = Follower(feed, monotonic=lambda: now)
    assert follower.staleness_seconds == math.inf
    follower.catch_up()
    assert follower.staleness_seconds == 0.0
    now = 57.0
    feed.down = True
    with pytest.raises(StoreUnavailable):
        follower.catch_up()
    assert follower.staleness_seconds == 7.0
    feed.down = False
    follower.catch_up()
    assert follower.staleness_seconds == 0.0


def test_a_full_page_is_no_proof_of_being_up_to_date(feed: MemoryFeed) -> None:
    """While there is more to read, the denylist stays as old as it was."""
    now = 50.0
    follower = Follower(feed, monotonic=lambda: now)
    follower.catch_up()
    now = 60.0
    cursor = feed.revoke(*(revocation("token", f"t{n}") for n in range(PAGE + 1)))
    follower.catch_up(Cursor(cursor.epoch, 1))
    assert follower.staleness_seconds == 10.0
    follower.catch_up()
    assert follower.staleness_seconds == 0.0


def test_entries_leave_when_their_time_has_passed(feed: MemoryFeed) -> None:
    """Expired entries are removed by the earlier of the store's clock and this process's."""
    now, at = 1000.0, 0.0
    follower = Follower(feed, clock=lambda: now, monotonic=lambda: at)
    feed._clock = lambda: 9_000.0
    feed.revoke(revocation("token", "a", exp=2000.0))
    follower.catch_up()
    at += 100.0
    follower.catch_up()
    assert len(follower.denylist) == 1
    now, at = 9_000.0, at + 100.0
    follower.catch_up()
    assert len(follower.denylist) == 0


def test_the_thread_follows_and_comes_back_after_an_outage(feed: MemoryFeed, follower: Follower) -> None:
    """The thread applies changes as they come, and goes on by itself once the store answers again."""
    feed.down = True
    follower.start()
    assert not follower.wait_ready(0.1)
    feed.down = False
    assert follower.wait_ready(20)
    feed.revoke(revocation("token", "a"))
    eventually(lambda: follower.denylist.find(_token("a")))
    feed.down = True
    reads = feed.reads
    eventually(lambda: feed.reads > reads + 2)
    feed.down = False
    feed.revoke(revocation("token", "b"))
    eventually(lambda: follower.denylist.find(_token("b")))
    assert follower.resyncs == 0


def test_both_ways_at_once_apply_each_change_once(feed: MemoryFeed) -> None:
    """With the thread running and catch_up called beside it, every change is told exactly once, in order."""
    told: list[int] = []
    follower = Follower(feed, wait_seconds=0.05, on_change=lambda change: told.append(change.position))
    follower.catch_up()
    follower.start()
    for n in range(300):
        cursor = feed.revoke(revocation("token", f"t{n}"))
        follower.catch_up(cursor)
        assert follower.denylist.find(_token(f"t{n}")) is not None
    follower.close()
    assert told == list(range(1, 301))


def test_close_leaves_a_feed_that_was_given_and_closes_one_that_was_opened(feed: MemoryFeed) -> None:
    """A follower closes only a feed that it opened itself."""
    given = Follower(feed)
    given.catch_up()
    given.close()
    assert not feed.closed
    opened = Follower(lambda: feed)
    opened.catch_up()
    opened.close()
    assert feed.closed


def test_nothing_is_opened_before_it_is_needed() -> None:
    """Making a follower opens no feed and starts no thread, so that servers can fork afterwards."""
    threads = threading.active_count()

    def refuse() -> Feed:
        raise AssertionError("opened")

    Follower(refuse)
    assert threading.active_count() == threads


def test_a_forked_child_has_a_replica_of_its_own(feed: MemoryFeed) -> None:
    """After a fork the child opens its own feed, reads its own snapshot and follows with its own thread."""
    opened: list[int] = []
    feed.revoke(revocation("token", "a"))

    def open_feed() -> Feed:
        opened.append(os.getpid())
        fresh = MemoryFeed(clock=lambda: 1000.0)
        fresh.revoke(revocation("token", f"of {'parent' if os.getpid() == parent else 'child'}"))
        return fresh

    parent = os.getpid()
    follower = Follower(open_feed, clock=lambda: 1000.0, wait_seconds=0.05)
    follower.start()
    assert follower.wait_ready(20)
    child = os.fork()
    if child == 0:
        try:
            fresh = len(follower.denylist) == 0 and not follower.ready and follower.staleness_seconds == math.inf
            follower.start()
            found = follower.wait_ready(20) and follower.denylist.find(_token("of child")) is not None
            os._exit(0 if fresh and found and opened == [parent, os.getpid()] else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert follower.denylist.find(_token("of parent")) is not None
    follower.close()
