"""Keeps a denylist in step with the change feed of a store."""

from __future__ import annotations

import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable

import structlog

from knell.denylist import Denylist
from knell.errors import CursorLost, StoreUnavailable, Unavailable
from knell.redaction import traceback_of
from knell.store import Change, Cursor, Feed

log = structlog.get_logger(__name__)

PAGE = 1000
# How long one read of the feed waits for a change. An answer, even an empty one, is the proof that nothing is newer.
WAIT_SECONDS = 1.0
FIRST_BACKOFF_SECONDS = 0.05
LONGEST_BACKOFF_SECONDS = 1.0
# Between two looks for entries that have outlived their time; each look costs one question for the store's clock.
PRUNE_SECONDS = 10.0
# A snapshot is begun anew if the store lost its place meanwhile. More often than this in a row, it is out of order.
SNAPSHOT_ATTEMPTS = 5


class Follower:
    """A replica of the denylist: a snapshot, then every change, in order and without gaps.

    Use it from a thread of its own (`start`), or by hand (`catch_up`), or both. `denylist` is replaced as a whole when
    the feed cannot be read on, and only once the new one is complete, so take it anew for each look-up.

    After a fork the child has a new, empty replica: it reads nothing from the parent's connection, and starts its own
    thread at its next `start`.

    Attributes:
        denylist: the replica. Any thread may call its `find`.
        resyncs: how often the whole denylist was read anew after the first time.
        alarms: how many of those were because the store had lost data.
    """

    def __init__(
        self,
        feed: Feed | Callable[[], Feed],
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        wait_seconds: float = WAIT_SECONDS,
        keep_seconds: float = 0.0,
        on_change: Callable[[Change], None] | None = None,
        on_resync: Callable[[Denylist], None] | None = None,
    ) -> None:
        """Make a follower; nothing is opened or read yet.

        Args:
            feed: the feed, which stays the caller's to close and must itself survive a fork; or a function that opens
                one, called once in each process at the first use, and what it opened is closed by `close`.
            clock: this process's Unix time, in seconds.
            monotonic: what staleness is measured with, in seconds.
            wait_seconds: how long one read of the thread waits for a change; also how long `close` may take.
            keep_seconds: how long an entry stays in the replica beyond its time.
            on_change: called after each change was applied, in order, from whichever thread applied it. Must be quick,
                and must not call the follower.
            on_resync: called with the new denylist after it took the place of the old one; the same rules.
        """
        self._given = feed
        self._clock = clock
        self._monotonic = monotonic
        self._wait_seconds = wait_seconds
        self._keep_seconds = keep_seconds
        self._on_change = on_change
        self._on_resync = on_resync
        self._closed = threading.Event()
        self._begin()
        _followers.add(self)

    def _begin(self) -> None:
        self.denylist = Denylist()
        self.resyncs = 0
        self.alarms = 0
        self._feed: Feed | None = None
        self._cursor: Cursor | None = None
        self._answered_at: float | None = None
        self._prune_at = -math.inf
        self._applying = threading.Lock()  # guards the denylist's writers and the cursor; held for no network I/O
        self._resyncing = threading.RLock()
        self._opening = threading.Lock()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- what it knows

    @property
    def staleness_seconds(self) -> float:
        """Seconds since the store last proved that nothing newer is there; infinite before the first time."""
        answered_at = self._answered_at
        return math.inf if answered_at is None else max(0.0, self._monotonic() - answered_at)

    @property
    def cursor(self) -> Cursor | None:
        """The place in the feed up to which the denylist is complete; None before the first snapshot."""
        return self._cursor

    @property
    def started(self) -> bool:
        """True if the thread of this process was started, or the follower was closed."""
        return self._thread is not None or self._closed.is_set()

    @property
    def ready(self) -> bool:
        """True once the denylist was complete for the first time in this process."""
        return self._ready.is_set()

    # ---- following

    def start(self) -> None:
        """Start the thread that follows the feed, unless this process has one, or `close` was called.

        Raises:
            RuntimeError: the system has no thread to give. Call it again.
        """
        with self._opening:
            if not self.started:
                thread = threading.Thread(target=self._follow, name="knell-follower", daemon=True)
                thread.start()
                self._thread = thread

    def wait_ready(self, timeout_seconds: float) -> bool:
        """Wait until the denylist is complete for the first time. False if it was not after `timeout_seconds`."""
        return self._ready.wait(timeout_seconds)

    def catch_up(self, cursor: Cursor | None = None) -> None:
        """Apply, before returning, everything that is in the feed now.

        Args:
            cursor: stop early once the denylist is complete up to here; no question to the store if it already is.

        Raises:
            StoreUnavailable: the store did not answer. The denylist is as far as it got.
        """
        while not self._has(cursor):
            if self._read(wait_seconds=0.0):
                return

    def close(self) -> None:
        """Stop the thread. The denylist stays as it is, and grows stale. Closes the feed if it opened it."""
        self._closed.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self._wait_seconds + LONGEST_BACKOFF_SECONDS)
        with self._opening:
            feed, self._feed = self._feed, None
        if feed is not None and feed is not self._given:
            feed.close()

    def _follow(self) -> None:
        closed = self._closed
        backoff = FIRST_BACKOFF_SECONDS
        trouble: type[Exception] | None = None  # of its kind, one is said, and then that it is over
        while not closed.is_set():
            try:
                self._read(wait_seconds=self._wait_seconds)
            except Exception as error:
                if closed.is_set():
                    return
                # Whatever it is, the thread must live: a verifier without it would grow stale for good.
                if type(error) is not trouble:
                    if isinstance(error, Unavailable):
                        log.warning("denylist_out_of_contact", error=str(error))
                    else:
                        log.error("denylist_follower_failed", traceback=traceback_of(error))
                trouble = type(error)
                closed.wait(backoff * random.uniform(0.5, 1.0))  # noqa: S311 - spreads reconnects, keeps no secret
                backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)
                continue
            if trouble is not None:
                log.info("denylist_in_contact")
            trouble, backoff = None, FIRST_BACKOFF_SECONDS

    def _has(self, cursor: Cursor | None) -> bool:
        mine = self._cursor
        if cursor is None or mine is None:
            return False
        return mine.epoch == cursor.epoch and mine.position >= cursor.position

    def _read(self, *, wait_seconds: float) -> bool:
        """One read of the feed. True if that was all there is at the moment."""
        feed, cursor = self._opened(), self._cursor
        if cursor is None:
            return self._resync(feed, cursor, went_back=False)
        try:
            changes = feed.changes(cursor, wait_seconds=wait_seconds, limit=PAGE)
        except CursorLost as lost:
            return self._resync(feed, cursor, went_back=lost.went_back)
        exhausted = len(changes) < PAGE
        self._apply(cursor, changes)
        if exhausted:
            self._answered_at = self._monotonic()
        self._prune(feed)
        return exhausted

    def _apply(self, cursor: Cursor, changes: list[Change]) -> None:
        with self._applying:
            for change in changes:
                mine = self._cursor
                if mine is None or mine.epoch != cursor.epoch:
                    return  # another thread has read everything anew meanwhile
                if change.position <= mine.position:
                    continue  # another thread has applied it meanwhile
                _apply(self.denylist, change)
                self._cursor = mine.after(change)
                if self._on_change is not None:
                    self._on_change(change)

    def _resync(self, feed: Feed, lost: Cursor | None, *, went_back: bool) -> bool:
        """Read everything anew. False if another thread has done so meanwhile: it may have begun before this call."""
        with self._resyncing:
            if self._cursor != lost:
                return False
            for _ in range(SNAPSHOT_ATTEMPTS):
                try:
                    fresh, cursor = _read_anew(feed)
                    break
                except CursorLost as again:  # the store changed under our feet; begin anew
                    went_back = went_back or again.went_back
            else:
                raise StoreUnavailable(f"the store's epoch changed during each of {SNAPSHOT_ATTEMPTS} snapshots")
            with self._applying:
                if went_back:
                    # What the store has lost and this process still knows stays refused.
                    for revocation in self.denylist:
                        fresh.add(revocation)
                self.denylist = fresh
                self._cursor = cursor
                self._answered_at = self._monotonic()
                self._ready.set()
                self._count_resync(lost, went_back=went_back)
                if self._on_resync is not None:
                    self._on_resync(fresh)
        return True

    def _count_resync(self, lost: Cursor | None, *, went_back: bool) -> None:
        if lost is None:
            return
        self.resyncs += 1
        if went_back:
            self.alarms += 1
            log.error("store_lost_data", revocations=len(self.denylist), alarms=self.alarms)
        else:
            log.warning("denylist_resynced", revocations=len(self.denylist), resyncs=self.resyncs)

    def _prune(self, feed: Feed) -> None:
        at = self._monotonic()
        if at < self._prune_at:
            return
        # By the earlier of both clocks: an entry must outlive its tokens by the clock that they are checked with.
        now = min(feed.time(), self._clock())
        with self._applying:
            self.denylist.prune(now - self._keep_seconds)
        self._prune_at = at + PRUNE_SECONDS

    def _opened(self) -> Feed:
        with self._opening:
            if self._feed is None:
                if self._closed.is_set():
                    raise StoreUnavailable("this follower was closed; make a new one")
                self._feed = self._given() if callable(self._given) else self._given
            return self._feed


def _read_anew(feed: Feed) -> tuple[Denylist, Cursor]:
    """A denylist that is complete up to the cursor. CursorLost if the store lost it meanwhile."""
    fresh, cursor, after = Denylist(), feed.head(), 0
    while page := feed.snapshot(after=after, limit=PAGE):
        for change in page:
            fresh.add(change.revocation)
        after = page[-1].position
    while True:
        changes = feed.changes(cursor, limit=PAGE)
        for change in changes:
            _apply(fresh, change)
            cursor = cursor.after(change)
        if len(changes) < PAGE:
            return fresh, cursor


def _apply(denylist: Denylist, change: Change) -> None:
    if change.kind == "revoked":
        denylist.add(change.revocation)
    else:
        denylist.remove(change.revocation.id)


_followers: weakref.WeakSet[Follower] = weakref.WeakSet()
# Feeds that a fork brought into this process. Their sockets and files are the parent's as well: closing them here, or
# letting them be collected, could disturb the parent, so they are kept until the process ends.
_inherited: list[Feed] = []


def _begin_anew_in_child() -> None:
    for follower in list(_followers):
        if follower._feed is not None:
            _inherited.append(follower._feed)
        if follower._closed.is_set():
            continue
        follower._closed = threading.Event()
        follower._begin()


os.register_at_fork(after_in_child=_begin_anew_in_child)
