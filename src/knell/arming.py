"""Arming: a timer on the broker for each expiry second, published in the background."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable

import structlog

from knell import messages
from knell.clock import StoreClock
from knell.errors import Unavailable
from knell.publisher import Publisher
from knell.redaction import traceback_of
from knell.settings import LONGEST_TIMER_SECONDS
from knell.store import IMMEDIATE_SECONDS, Store

# Seconds that may wait for the broker. Beyond it the sweep arms them; a second is an int in a set.
CAPACITY = 200_000
# How many timers are published before their confirms are waited for.
PAGE = 1000
# A confirm that takes longer leaves the seconds to the sweep.
CONFIRM_SECONDS = 10.0

log = structlog.get_logger()


class Armer:
    """Publishes timers in a thread of its own, and tells the store which ones the broker has. Never blocks its caller.

    A second that waits already is not queued again. What cannot be armed (the broker is away, too many wait, too far in
    the future for the broker) is left to the sweep, which arms whatever falls due soon.
    """

    def __init__(self, store: Store, publisher: Publisher, clock: StoreClock) -> None:
        self._store = store
        self._publisher = publisher
        self._clock = clock
        self._begin()
        _armers.add(self)

    def _begin(self) -> None:
        self._waiting: set[int] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._closed = False

    def arm(self, seconds: Iterable[int]) -> None:
        """Publish a timer for each of these expiry seconds, soon."""
        wanted = set(seconds)
        if not wanted:
            return
        with self._changed:
            if len(self._waiting) + len(wanted) > CAPACITY:
                log.warning("arming_left_to_the_sweep", seconds=len(wanted), waiting=len(self._waiting))
                return
            self._waiting |= wanted
            self._changed.notify_all()
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="knell-armer", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no thread to give; the next call tries again
                log.warning("arming_left_to_the_sweep", seconds=len(self._waiting), error=str(error))
            else:
                self._thread = thread

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until nothing waits any more; False if that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_seconds)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Publish what waits, for at most so long, and stop."""
        if self._thread is None:
            return
        self.flush(timeout_seconds)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                page = sorted(self._waiting)[:PAGE]
                self._waiting.difference_update(page)
                self._busy = True
            self._publish(page)

    def _publish(self, seconds: list[int]) -> None:
        now = self._clock.now()
        near = [second for second in seconds if second - now <= LONGEST_TIMER_SECONDS]
        try:
            self._publisher.send([messages.expire(second, eta=self._eta(second, now)) for second in near]).result(
                CONFIRM_SECONDS
            )
            self._store.armed(near)
        except (Unavailable, TimeoutError) as error:
            log.warning("arming_left_to_the_sweep", seconds=len(near), error=str(error))
        except Exception as error:
            # Whatever it is, the thread has to go on: without it every timer of this process is left to the sweep.
            log.error("arming_left_to_the_sweep", seconds=len(near), traceback=traceback_of(error))

    def _eta(self, second: int, now: float) -> float | None:
        return None if second - now <= IMMEDIATE_SECONDS else self._clock.local(second)


_armers: weakref.WeakSet[Armer] = weakref.WeakSet()


def _begin_anew_in_child() -> None:
    # The thread, and what waits for it, stayed in the parent.
    for armer in list(_armers):
        armer._begin()


os.register_at_fork(after_in_child=_begin_anew_in_child)
