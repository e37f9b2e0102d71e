"""The issuer's face for code that runs on an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

from knell.issuer import Issued, Issuer, Revoked, Tracking
from knell.store import ServiceStatus
from knell.tokens import TokenRef

T = TypeVar("T")


class AsyncIssuer:
    """An Issuer whose methods are awaited. They run in a bounded pool of threads, so that no event loop is held up.

    Takes what Issuer takes, and `threads`: how many calls run at once, default 16.
    """

    def __init__(self, *args: Any, threads: int = 16, **options: Any) -> None:
        self._issuer = Issuer(*args, **options)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="knell-issuer")
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

    async def revoke(self, scope: str, match: Mapping[str, str], **options: Any) -> Revoked:
        """See Issuer.revoke."""
        return await self._run(partial(self._issuer.revoke, scope, match, **options))

    async def status(self, revocation_id: str) -> Mapping[str, ServiceStatus] | None:
        """See Issuer.status."""
        return await self._run(partial(self._issuer.status, revocation_id))

    async def close(self, timeout_seconds: float = 5.0) -> None:
        """See Issuer.close."""
        await self._run(partial(self._issuer.close, timeout_seconds))
        self._pool.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)
