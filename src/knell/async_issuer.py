"""The issuer's face for code that runs on an event loop."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

from knell.errors import Unavailable
from knell.issuer import Issuer
from knell.results import Issued, Revoked, Tracking, Undone, pauses
from knell.store import ServiceStatus
from knell.tokens import ClaimValue, TokenRef

# With every thread waiting for a store or a broker that is away, a call that has not begun by then would wait as well.
BEGIN_SECONDS = 2.0

T = TypeVar("T")


class AsyncIssuer:
    """An Issuer whose methods are awaited. They run in a bounded pool of threads, so that no event loop is held up.

    Takes what Issuer takes, and `threads`: how many calls run at once, default 16. A call that finds no free thread
    within 2 s raises Unavailable, and has done nothing. A `wait_for` holds no thread while it waits.
    """

    def __init__(self, *args: Any, threads: int = 16, **options: Any) -> None:
        self._issuer = Issuer(*args, **options)
        self._threads = threads
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self.iss = self._issuer.iss

    async def issue(self, claims: Mapping[str, Any], **options: Any) -> Issued:
        """See Issuer.issue."""
        return await self._run(partial(self._issuer.issue, claims, **options))

    async def refresh(self, token: str | Mapping[str, Any], **options: Any) -> Issued:
        """See Issuer.refresh."""
        return await self._run(partial(self._issuer.refresh, token, **options))

    async def track(self, token: str | Mapping[str, Any] | TokenRef) -> Tracking:
        """See Issuer.track."""
        return await self._run(partial(self._issuer.track, token))

    async def track_many(self, tokens: Iterable[str | Mapping[str, Any] | TokenRef]) -> list[Tracking]:
        """See Issuer.track_many."""
        return await self._run(partial(self._issuer.track_many, tokens))

    async def revoke(
        self,
        scope: str,
        match: Mapping[str, ClaimValue],
        *,
        wait_for: Sequence[str] = (),
        timeout_seconds: float = 5.0,
        **options: Any,
    ) -> Revoked:
        """See Issuer.revoke."""
        revoked = await self._run(partial(self._issuer._record, scope, match, wait_for=wait_for, **options))
        deadline = time.monotonic() + timeout_seconds
        for pause in pauses():
            left = deadline - time.monotonic()
            if left <= 0 or not revoked.pending(wait_for):
                break
            await asyncio.sleep(min(pause, left))
            revoked = await self._run(partial(self._issuer._look, revoked))
        return revoked

    async def undo(self, revocation_id: str, **options: Any) -> Undone:
        """See Issuer.undo."""
        return await self._run(partial(self._issuer.undo, revocation_id, **options))

    async def status(self, revocation_id: str) -> Mapping[str, ServiceStatus] | None:
        """See Issuer.status."""
        return await self._run(partial(self._issuer.status, revocation_id))

    async def close(self, timeout_seconds: float = 5.0) -> None:
        """See Issuer.close."""
        await self._run(partial(self._issuer.close, timeout_seconds))
        self._pool().shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: Callable[[], T]) -> T:
        future = self._pool().submit(call)
        running = asyncio.wrap_future(future)
        try:
            await asyncio.wait([running], timeout=BEGIN_SECONDS)
            if not running.done() and future.cancel():  # only one that has not begun can be
                raise Unavailable(f"all {self._threads} threads of this issuer have been busy for {BEGIN_SECONDS:g} s")
            return await running
        except asyncio.CancelledError:
            running.cancel()  # and with it the call, if it has not begun; nobody looks at what it comes to
            raise

    def _pool(self) -> ThreadPoolExecutor:
        # One for each process: after a fork the threads are the parent's, and the pool does not know.
        if (pool := self._pools.get(os.getpid())) is None:
            pool = ThreadPoolExecutor(self._threads, thread_name_prefix="knell-issuer")
            self._pools[os.getpid()] = pool
        return pool
