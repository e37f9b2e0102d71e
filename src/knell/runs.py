"""One run: a service's handlers, called for the entries of one batch. Knows nothing of brokers and stores."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from celery.exceptions import SoftTimeLimitExceeded

from knell.errors import BatchFailed
from knell.notices import Cause, Notice

# How many calls of an async handler run at the same time.
MAX_CONCURRENT = 32


@dataclass(frozen=True, slots=True)
class Handler:
    """A handler as it was registered.

    Attributes:
        call: the function; what it returns is awaited if it can be.
        batch: True if it takes a sequence of notices.
    """

    call: Callable[[Any], Any]
    batch: bool = False

    @property
    def is_async(self) -> bool:
        """True for an `async def`."""
        return inspect.iscoroutinefunction(self.call) or inspect.iscoroutinefunction(type(self.call).__call__)


@dataclass(slots=True)
class Handlers:
    """What a service does, by event. What has no handler counts as handled."""

    token_end: Handler | None = None
    session_end: Handler | None = None
    missed: Handler | None = None
    undone: Handler | None = None

    def in_order(self) -> list[Handler]:
        """Those that are registered, in the order in which their events come."""
        found = (self.missed, self.undone, self.token_end, self.session_end)
        return [handler for handler in found if handler is not None]

    def of(self, notice: Notice) -> list[Handler]:
        """The handlers of an entry, in the order in which they are called: token end, then session end."""
        if notice.cause is Cause.MISSED:
            found = [self.missed]
        elif notice.cause is Cause.UNDONE:
            found = [self.undone]
        else:
            found = [
                self.token_end if "token" in notice.ends else None,
                self.session_end if "session" in notice.ends else None,
            ]
        return [handler for handler in found if handler is not None]


class Progress(Protocol):
    """Where a run says what it has done. `lost` turns True when it must call nothing more."""

    lost: bool

    def add(self, n: int) -> None:
        """Entry `n` is done."""


class Loop(Protocol):
    """Where coroutines run."""

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Run it to its end and return what it returns. An exception in the calling thread cancels it first."""


class Run:
    """Calls handlers for notices, and keeps who failed with what.

    Attributes:
        failed: the error of each entry that failed, by its number.
    """

    def __init__(self, handlers: Handlers, progress: Progress, loop: Loop, *, one_at_a_time: bool = False) -> None:
        self._handlers = handlers
        self._progress = progress
        self._loop = loop
        self._one_at_a_time = one_at_a_time
        self._running: set[int] = set()
        self.failed: dict[int, Exception] = {}

    def run(self, notices: Sequence[Notice]) -> None:
        """Call what there is to call. Afterwards each entry is done, failed, or, if the run was stopped, neither.

        A time limit fails what was running when it struck, and stops the run.
        """
        groups = [[notice] for notice in notices] if self._one_at_a_time else [notices]
        try:
            for group in groups:
                if any(handler.batch for notice in group for handler in self._handlers.of(notice)):
                    self._by_event(group)
                else:
                    self._by_entry(group)
        except SoftTimeLimitExceeded as error:
            self.failed.update(dict.fromkeys(self._running, error))

    def _by_entry(self, notices: Sequence[Notice]) -> None:
        self._each(notices, self._handlers.of, closes={notice.n for notice in notices})

    def _by_event(self, notices: Sequence[Notice]) -> None:
        """A batch handler gets all that apply at once: so all tokens end before the first session does."""
        self._done([notice for notice in notices if not self._handlers.of(notice)])
        for handler in self._handlers.in_order():
            given = [n for n in notices if handler in self._handlers.of(n) and n.n not in self.failed]
            last = [notice for notice in given if self._handlers.of(notice)[-1] is handler]
            if not given or self._progress.lost:
                continue
            if handler.batch:
                self._batch(handler, given)
                self._done(last)
            else:
                self._each(given, _only(handler), closes={notice.n for notice in last})

    def _batch(self, handler: Handler, given: Sequence[Notice]) -> None:
        self._running = {notice.n for notice in given}
        try:
            result = handler.call(tuple(given))
            if inspect.isawaitable(result):
                self._loop.run(result)
        except SoftTimeLimitExceeded:
            raise
        except BatchFailed as error:
            named = {notice.n: error.errors[notice.id] for notice in given if notice.id in error.errors}
            # An error that names nothing of this batch says nothing about it: all of it is tried again.
            failed = named or {notice.n: error for notice in given}
            self.failed.update({n: _as_exception(e) for n, e in failed.items()})
        except Exception as error:
            self.failed.update({notice.n: error for notice in given})
        self._running = set()

    def _each(
        self, notices: Sequence[Notice], handlers_of: Callable[[Notice], list[Handler]], *, closes: Collection[int]
    ) -> None:
        """Call plain handlers entry by entry; an entry in `closes` is done when its handlers have returned."""

        def finished(notice: Notice) -> None:
            if notice.n in closes:
                self._done([notice])

        if any(handler.is_async for notice in notices for handler in handlers_of(notice)):
            self._loop.run(self._gather(notices, handlers_of, finished))
            return
        for notice in notices:
            if self._progress.lost:
                return
            self._running = {notice.n}
            try:
                for handler in handlers_of(notice):
                    result = handler.call(notice)
                    if inspect.isawaitable(result):
                        self._loop.run(result)
            except SoftTimeLimitExceeded:
                raise
            except Exception as error:
                self.failed[notice.n] = error
            else:
                finished(notice)

    async def _gather(
        self,
        notices: Sequence[Notice],
        handlers_of: Callable[[Notice], list[Handler]],
        finished: Callable[[Notice], None],
    ) -> None:
        waiting = iter(notices)

        async def work() -> None:
            for notice in waiting:
                if self._progress.lost:
                    return
                self._running.add(notice.n)
                try:
                    for handler in handlers_of(notice):
                        result = handler.call(notice)
                        if inspect.isawaitable(result):
                            await result
                except asyncio.CancelledError as error:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    # Nobody cancelled this run: it was something of the handler's own that it waited for.
                    self.failed[notice.n] = _as_exception(error)
                except (SystemExit, KeyboardInterrupt) as error:
                    # It would end the thread of the event loop, and every async handler of the process with it.
                    self.failed[notice.n] = _as_exception(error)
                except Exception as error:
                    self.failed[notice.n] = error
                else:
                    finished(notice)
                self._running.discard(notice.n)

        self._running = set()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(MAX_CONCURRENT, len(notices))):
                group.create_task(work())

    def _done(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            if notice.n not in self.failed:
                self._progress.add(notice.n)


def _only(handler: Handler) -> Callable[[Notice], list[Handler]]:
    return lambda notice: [handler]


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(repr(error))
