"""The done marks of one run: written while handlers run, so that a killed process repeats little."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

import structlog

from knell.errors import StoreUnavailable
from knell.store import Dedupe

# A mark is stored within 100 ms of the handler's return; half of that leaves room for the write itself.
TICK_SECONDS = 0.05
# The last write is worth more patience than the others: without it a second copy of the batch runs everything again.
LAST_WRITES = 3
LAST_WRITE_PAUSE_SECONDS = 0.5

log = structlog.get_logger(__name__)


class Marks:
    """What of a batch is done, held under a lease. A context: leaving it writes what was not written yet.

    A thread of its own writes new marks and renews the lease. With `each`, `add` writes by itself, before it returns.

    Attributes:
        lost: True when another holder has taken the lease, or, with `each`, a mark could not be stored. The run must
            call no other handler.
    """

    def __init__(
        self, dedupe: Dedupe, service: str, batch_id: str, *, holder: str, lease_seconds: float, each: bool
    ) -> None:
        self._dedupe = dedupe
        self._service = service
        self._batch_id = batch_id
        self._holder = holder
        self._lease_seconds = lease_seconds
        self._each = each
        self._done = 0
        self._stored = 0
        self._renewed = time.monotonic()
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="knell-marks", daemon=True)
        self.lost = False

    @property
    def done(self) -> int:
        """The bitmap of the entries that this run has done."""
        return self._done

    def add(self, n: int) -> None:
        """Entry `n` is done. Called from one thread at a time."""
        self._done |= 1 << n
        if self._each:
            try:
                self._write()
            except StoreUnavailable as error:
                self.lost = True
                log.warning("mark_not_stored", batch_id=self._batch_id, n=n, error=str(error))

    def unpark(self, parked: int) -> None:
        """Take entries out of the parked ones, to run them again. StoreUnavailable if that was not stored."""
        self._dedupe.mark(
            self._service,
            self._batch_id,
            holder=self._holder,
            done=0,
            unparked=parked,
            lease_seconds=self._lease_seconds,
        )

    def release(self, *, parked: int = 0) -> None:
        """Give the lease back, and mark entries as parked. A store that is down is logged: the lease runs out."""
        try:
            self._dedupe.mark(
                self._service, self._batch_id, holder=self._holder, done=self._done, parked=parked, lease_seconds=0
            )
        except StoreUnavailable as error:
            log.warning("lease_not_given_back", batch_id=self._batch_id, error=str(error))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        for left in reversed(range(LAST_WRITES)):
            try:
                if self._stored != self._done:
                    self._write()
                return
            except StoreUnavailable as failure:
                # The handlers have run all the same: to answer for them without marks is better than to run them again.
                log.error("marks_not_stored", batch_id=self._batch_id, tries_left=left, error=str(failure))
                if left:
                    time.sleep(LAST_WRITE_PAUSE_SECONDS)

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            due = time.monotonic() - self._renewed > self._lease_seconds / 3
            if self._stored == self._done and not due:
                continue
            try:
                self._write()
            except StoreUnavailable as error:
                log.warning("marks_not_stored_yet", batch_id=self._batch_id, error=str(error))

    def _write(self) -> None:
        with self._writing:
            done = self._done
            held = self._dedupe.mark(
                self._service,
                self._batch_id,
                holder=self._holder,
                done=done,
                lease_seconds=self._lease_seconds,
            )
            self._stored = done
            self._renewed = time.monotonic()
            if not held and not self.lost:
                self.lost = True
                log.warning("lease_lost", service=self._service, batch_id=self._batch_id)
