"""Turns: so many threads of this process pass at a time, in the order that they came in."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """Lets so many threads pass at a time, in the order that they came in.

    A pool of connections, or SQLite's lock, goes to whoever is quickest: a busy thread takes it again and again, and
    others starve. In a child after a fork every place is free: whoever had one is a thread of the parent.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self.begin_anew()
        _all.add(self)

    def begin_anew(self) -> None:
        """Free every place, and forget who waits."""
        self._free = self._places
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()

    @contextmanager
    def taken(self, timeout_seconds: float) -> Iterator[bool]:
        """A place, given back at the end; False if there was none in time."""
        got = self._take(timeout_seconds)
        try:
            yield got
        finally:
            if got:
                self._give_back()

    def _take(self, timeout_seconds: float) -> bool:
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return True
            turn = threading.Event()
            self._waiting.append(turn)
        if turn.wait(max(0.0, timeout_seconds)):
            return True
        with self._lock:
            if turn.is_set():
                return True
            self._waiting.remove(turn)
            return False

    def _give_back(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1


_all: weakref.WeakSet[Turns] = weakref.WeakSet()
_of_files: weakref.WeakValueDictionary[Path, Turns] = weakref.WeakValueDictionary()
_making = threading.Lock()


def turns_of_file(path: Path) -> Turns:
    """One turn at a time at writing to a file, whoever in this process has opened it."""
    with _making:
        found = _of_files.get(path)
        if found is None:
            found = _of_files[path] = Turns(1)
        return found


def _begin_anew_in_child() -> None:
    global _making
    _making = threading.Lock()
    for turns in list(_all):
        turns.begin_anew()


os.register_at_fork(after_in_child=_begin_anew_in_child)
