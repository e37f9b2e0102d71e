"""What one worker process of a service holds open: its trust list, its dedupe store, its publisher, its event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from knell.errors import BrokerUnavailable
from knell.keys import TrustList
from knell.messages import Message
from knell.publisher import Publisher
from knell.settings import Settings
from knell.store import Dedupe, open_store
from knell.trust import TrustFile

# The publisher answers by itself, within its own time-outs; this is for the case that it cannot.
CONFIRM_SECONDS = 60.0
# How long a cancelled coroutine may take to end.
CANCEL_SECONDS = 5.0

log = structlog.get_logger(__name__)


class EventLoop:
    """An asyncio event loop in a thread of its own: one for all async handlers of a process.

    A handler's HTTP client or database pool belongs to a loop, so there is one, for as long as the process lives.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="knell-loop", daemon=True)
        self._thread.start()

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Run it to its end and return what it returns.

        An exception that strikes the calling thread while it waits (a time limit) cancels it, and waits for its end.
        """
        ended = threading.Event()
        started: list[asyncio.Task[Any] | None] = []

        async def run() -> Any:
            started.append(asyncio.current_task())
            try:
                return await awaitable
            except (SystemExit, KeyboardInterrupt) as error:
                # asyncio would let it end the thread of the loop, and the caller would wait for ever.
                raise RuntimeError(f"an async handler raised {error!r}") from error
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:
            if not ended.is_set():
                self._loop.call_soon_threadsafe(_cancel, started)
                if not ended.wait(CANCEL_SECONDS):
                    log.error("async_handler_ignores_cancellation", waited_seconds=CANCEL_SECONDS)
            raise

    def close(self) -> None:
        """Stop the loop and its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CANCEL_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


@dataclass(slots=True)
class _Opened:
    trust: TrustFile
    pid: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    dedupe: Dedupe | None = None
    publisher: Publisher | None = None
    loop: EventLoop | None = None


class Resources:
    """Opened when first used, and opened anew after a fork: a socket that two processes share serves neither."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened = _Opened(TrustFile(self._settings))

    @property
    def trust(self) -> TrustList:
        """The trust list, read again when its file has changed. InvalidSettings if it never could be read."""
        return self._mine().trust.current

    @property
    def dedupe(self) -> Dedupe:
        """The store of KNELL_DEDUPE_URL."""
        mine = self._mine()
        with mine.lock:
            if mine.dedupe is None:
                mine.dedupe = open_store(
                    self._settings.dedupe_url,
                    namespace=self._settings.namespace,
                    rules=self._settings.rules,
                    partitions=self._settings.partitions,
                )
            return mine.dedupe

    def run(self, awaitable: Awaitable[Any]) -> Any:
        """Run a coroutine on the event loop of this process's async handlers; see `EventLoop.run`."""
        mine = self._mine()
        with mine.lock:
            mine.loop = mine.loop or EventLoop()
        return mine.loop.run(awaitable)

    def publish(self, messages: Sequence[Message]) -> None:
        """Send messages and wait until the broker has confirmed them all. BrokerUnavailable otherwise."""
        mine = self._mine()
        with mine.lock:
            mine.publisher = mine.publisher or Publisher(self._settings)
        try:
            mine.publisher.send(messages).result(CONFIRM_SECONDS)
        except concurrent.futures.TimeoutError:
            raise BrokerUnavailable(f"no confirm within {CONFIRM_SECONDS:g} s") from None

    def close(self) -> None:
        """Close what this process has opened; it is opened again when it is used again."""
        mine, self._opened = self._mine(), _Opened(TrustFile(self._settings))
        for opened in (mine.publisher, mine.dedupe, mine.loop):
            if opened is not None:
                opened.close()

    def _mine(self) -> _Opened:
        if self._opened.pid != os.getpid():
            self._opened = _Opened(TrustFile(self._settings))
        return self._opened


def _cancel(started: Sequence[asyncio.Task[Any] | None]) -> None:
    if started and started[0] is not None:
        started[0].cancel()
