"""The store's clock, as this process can tell it without asking each time."""

from __future__ import annotations

import time
from collections.abc import Callable

from knell.errors import StoreUnavailable
from knell.store import Feed

# Clocks drift by milliseconds an hour; asking once a minute is cheap, and notices a step of the clock soon.
MEASURE_EVERY_SECONDS = 60.0
# Before the first answer the offset is a guess; not at each call, because asking a store that is away takes its time.
FIRST_MEASURE_SECONDS = 5.0


class StoreClock:
    """This process's clock, corrected by its measured offset from the store's.

    Args:
        store: whose clock is the reference.
        clock: this process's own, Unix seconds.
    """

    def __init__(self, store: Feed, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._offset = 0.0
        self._asked_at: float | None = None
        self._measured = False

    def now(self) -> float:
        """The store's time, Unix seconds. Asks it at first, then once a minute; one that is away is no error."""
        return self.read()[0]

    def read(self) -> tuple[float, StoreUnavailable | None]:
        """The same, and the error of the store if it was asked and did not answer: do not wait for it again."""
        local, away = self._clock(), None
        every = MEASURE_EVERY_SECONDS if self._measured else FIRST_MEASURE_SECONDS
        if self._asked_at is None or not 0 <= local - self._asked_at < every:
            self._asked_at = local
            away = self._measure()
        return self._clock() + self._offset, away

    def local(self, store_time: float) -> float:
        """A time of the store by this process's own clock."""
        return store_time - self._offset

    @property
    def offset_seconds(self) -> float:
        """The store's clock less this process's own, as measured last; 0 before that."""
        return self._offset

    def _measure(self) -> StoreUnavailable | None:
        before = self._clock()
        try:
            told = self._store.time()
        except StoreUnavailable as error:
            return error  # the last offset stays good: it changes slowly, and due times are checked by the store itself
        self._offset = told - (before + self._clock()) / 2
        self._measured = True
        return None
