"""One run of handlers: what a time limit, and a handler that wants to exit, make of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from knell import Notice
from knell.notices import Cause
from knell.resources import EventLoop
from knell.revocations import Scope
from knell.runs import Handler, Handlers, Run

NOTICES = [
    Notice(batch_id="e0-x", n=n, cause=Cause.EXPIRED, ends=frozenset({"session"}), scope=Scope.SESSION, at=1.0, iss="i")
    for n in range(5)
]


class Done:
    """Keeps what a run has done."""

    lost = False

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def add(self, n: int) -> None:
        self.numbers.append(n)


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


def test_one_at_a_time_is_so_for_batch_handlers_too(loop: EventLoop) -> None:
    """With two handlers, an entry is done before the first one of the next entry is called."""
    done, seen = Done(), []

    def token_end(notice: Notice) -> None:
        seen.append(("token", notice.n, list(done.numbers)))

    def session_end(notices: Sequence[Notice]) -> None:
        seen.append(("session", *(notice.n for notice in notices), list(done.numbers)))

    both = [replace(notice, ends=frozenset({"token", "session"})) for notice in NOTICES[:2]]
    handlers = Handlers(token_end=Handler(token_end), session_end=Handler(session_end, batch=True))
    Run(handlers, done, loop, one_at_a_time=True).run(both)
    assert seen == [("token", 0, []), ("session", 0, []), ("token", 1, [0]), ("session", 1, [0])]


def run(call: Callable[[Any], Any], loop: Any, *, batch: bool = False) -> tuple[Run, list[int]]:
    """Run a handler of session ends over all of NOTICES."""
    done = Done()
    made = Run(Handlers(session_end=Handler(call, batch)), done, loop)
    made.run(NOTICES)
    return made, done.numbers


def test_a_time_limit_fails_what_was_running_and_nothing_else(loop: EventLoop) -> None:
    """What was done stays done; what was not begun is neither, so that it comes again without counting as tried."""

    def handler(notice: Notice) -> None:
        if notice.n == 2:
            raise SoftTimeLimitExceeded

    found, done = run(handler, loop)
    assert done == [0, 1]
    assert set(found.failed) == {2}


def test_a_time_limit_in_a_batch_handler_fails_the_batch(loop: EventLoop) -> None:
    """Nobody can tell how far it had come."""

    def handler(notices: object) -> None:
        raise SoftTimeLimitExceeded

    found, done = run(handler, loop, batch=True)
    assert done == []
    assert set(found.failed) == {0, 1, 2, 3, 4}


def test_a_time_limit_fails_the_async_calls_that_were_running() -> None:
    """Those that had returned are done."""

    class Interrupted:
        """An event loop whose caller is struck by the limit while it waits; the coroutine is cancelled, as is told."""

        def run(self, awaitable: Any) -> None:
            async def limited() -> None:
                task = asyncio.ensure_future(awaitable)
                await waiting.wait()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            asyncio.run(limited())
            raise SoftTimeLimitExceeded

    waiting = asyncio.Event()

    async def handler(notice: Notice) -> None:
        if notice.n < 3:
            return
        waiting.set()
        await asyncio.sleep(3600)

    found, done = run(handler, Interrupted())
    assert done == [0, 1, 2]
    assert set(found.failed) == {3, 4}


@pytest.mark.parametrize("batch", [False, True])
def test_an_async_handler_that_exits_fails_like_any_other(loop: EventLoop, batch: bool) -> None:
    """asyncio would end the loop's thread, and every async handler of the process would hang from then on."""

    async def handler(given: Any) -> None:
        if batch or given.n == 1:
            raise SystemExit(3)

    found, done = run(handler, loop, batch=batch)
    assert set(found.failed) == ({0, 1, 2, 3, 4} if batch else {1})
    assert done == ([] if batch else [0, 2, 3, 4])

    async def next_one() -> str:
        return threading.current_thread().name

    assert loop.run(next_one()) == "knell-loop"
