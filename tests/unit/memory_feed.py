"""A change feed in memory: what knell.store.Feed promises, with switches for what can go wrong."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from knell.errors import CursorLost, StoreUnavailable
from knell.revocations import Revocation, Scope, make_revocation
from knell.settings import Rules
from knell.store import Change, Cursor
from knell.tokens import ClaimValue

ISS = "https://auth.example"
# A feed may answer sooner than it was asked to wait; here it does, so that closing a follower takes no second.
LONGEST_WAIT_SECONDS = 0.05
T = TypeVar("T")
_numbers = itertools.count(1)


def revocation(
    scope: str, value: str | dict[str, ClaimValue], *, iss: str = ISS, now: float = 1000.0, **more: object
) -> Revocation:
    """A revocation with an id of its own; of scope claims the value is the match."""
    match = value if isinstance(value, dict) else {str(Scope(scope).claim): value}
    more.setdefault("id", f"r{next(_numbers):06}")
    return make_revocation(scope, match, iss=iss, now=now, rules=Rules(), **more)  # type: ignore[arg-type]


def eventually(condition: Callable[[], T], *, seconds: float = 20.0) -> T:
    """Wait until a condition holds, and return what it said."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not come true within {seconds} s; last: {found!r}"
        time.sleep(0.005)
    return found


class MemoryFeed:
    """Attributes: `down` makes every call fail; `reads` counts the calls; `before_snapshot` runs before each page."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.down = False
        self.reads = 0
        self.closed = False
        self.before_snapshot: Callable[[], None] = lambda: None
        self._clock = clock
        self._epochs = itertools.count(1)
        self._changed = threading.Condition()
        self._empty()

    def _empty(self) -> None:
        self._epoch = f"e{next(self._epochs)}"
        self._changes: list[Change] = []
        self._position = 0
        self._last: str | None = None
        self._live: dict[str, Change] = {}

    # ---- the writer's side

    def revoke(self, *revocations: Revocation) -> Cursor:
        """Record revocations."""
        with self._changed:
            for one in revocations:
                change = self._append("revoked", one)
                self._live[one.id] = change
            self._changed.notify_all()
            return self._head()

    def undo(self, one: Revocation) -> Cursor:
        """Take a revocation back."""
        with self._changed:
            del self._live[one.id]
            self._append("undone", one)
            self._changed.notify_all()
            return self._head()

    def lose(self) -> None:
        """Lose all data, as a store that was emptied."""
        with self._changed:
            self._empty()
            self._changed.notify_all()

    def restart(self) -> None:
        """Change the epoch and keep the data, as after a clean restart."""
        with self._changed:
            self._epoch = f"e{next(self._epochs)}"
            self._changed.notify_all()

    def roll_back(self, count: int) -> None:
        """Lose the last changes and keep the epoch, as a server that nobody noticed was restored."""
        with self._changed:
            self._changes, gone = self._changes[:-count], self._changes[-count:]
            self._position -= count
            self._last = self._changes[-1].revocation.id if self._changes else None
            for change in gone:
                self._live.pop(change.revocation.id, None)
            self._changed.notify_all()

    def trim(self) -> None:
        """Forget the changes; what lives stays."""
        with self._changed:
            self._changes.clear()
            self._changed.notify_all()

    def _append(self, kind: str, one: Revocation) -> Change:
        self._position += 1
        self._last = one.id
        change = Change(self._position, kind, one)  # type: ignore[arg-type]
        self._changes.append(change)
        return change

    def _head(self) -> Cursor:
        return Cursor(self._epoch, self._position, self._last)

    # ---- knell.store.Feed

    def time(self) -> float:
        self._answer()
        return self._clock()

    def head(self) -> Cursor:
        self._answer()
        with self._changed:
            return self._head()

    def changes(self, cursor: Cursor, *, wait_seconds: float = 0.0, limit: int = 1000) -> list[Change]:
        self._answer()
        deadline = time.monotonic() + min(wait_seconds, LONGEST_WAIT_SECONDS)
        with self._changed:
            while True:
                self._check(cursor)
                found = [change for change in self._changes if change.position > cursor.position]
                left = deadline - time.monotonic()
                if found or left <= 0:
                    self._answer()
                    return found[:limit]
                self._changed.wait(left)

    def snapshot(self, *, after: int = 0, limit: int = 1000) -> list[Change]:
        self.before_snapshot()
        self._answer()
        with self._changed:
            return [change for change in self._live.values() if change.position > after][:limit]

    def close(self) -> None:
        self.closed = True

    def _check(self, cursor: Cursor) -> None:
        if cursor.epoch != self._epoch:
            raise CursorLost("another epoch", went_back=self._position < cursor.position)
        present = {change.position: change.revocation.id for change in self._changes} | {self._position: self._last}
        known, found = cursor.revocation_id, present.get(cursor.position)
        if cursor.position > self._position or (known is not None and found not in (None, known)):
            raise CursorLost("data was lost", went_back=True)
        oldest = self._changes[0].position if self._changes else self._position + 1
        if cursor.position + 1 < oldest or (known is not None and found is None):
            raise CursorLost("trimmed", went_back=False)

    def _answer(self) -> None:
        self.reads += 1
        if self.down:
            raise StoreUnavailable("the feed is down")
