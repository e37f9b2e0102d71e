"""Live connections of one process, each registered under its token, and closed the moment that its token ends."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from knell.errors import KnellError
from knell.handlers.tombstones import names_in, names_of
from knell.integrations.asgi import CLOSE_TRY_AGAIN, CLOSE_UNAUTHORIZED, Scope
from knell.notices import Notice
from knell.tokens import TokenRef
from knell.verifier import TokenEnd, Verifier

MAX_CONNECTIONS = 10_000
# A client that reads slower than it is told things is let go when so many messages wait for it.
MAX_WAITING = 100
# How long the last words to a client may take.
CLOSE_SECONDS = 5.0
# RFC 6455's registry: service restart.
CLOSE_RESTART = 1012

Item = TypeVar("Item")


class HubFull(KnellError):
    """The hub has as many connections as it may have."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """Why a connection is closed.

    Attributes:
        code: the close code of a WebSocket.
        reason: for whoever looks at the client; it names nobody.
    """

    code: int
    reason: str


TOO_SLOW = Goodbye(CLOSE_TRY_AGAIN, "too slow")
RESTART = Goodbye(CLOSE_RESTART, "restart")


class Connection(Generic[Item]):
    """One live connection. It belongs to the event loop that it was made in.

    Attributes:
        token: whose it is.
        waiting: what is still to be sent.
        ended: done when it has to be closed.
    """

    token: TokenRef

    def __init__(self, max_waiting: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.waiting: asyncio.Queue[Item] = asyncio.Queue(max_waiting)
        self.ended: asyncio.Future[Goodbye] = self.loop.create_future()

    def end(self, goodbye: Goodbye) -> None:
        """Have it closed. From any thread; the first goodbye counts."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and the connection with it
            self.loop.call_soon_threadsafe(self._end, goodbye)

    def offer(self, item: Item) -> None:
        """Have something sent. In its own event loop."""
        try:
            self.waiting.put_nowait(item)
        except asyncio.QueueFull:
            self._end(TOO_SLOW)

    def _end(self, goodbye: Goodbye) -> None:
        if not self.ended.done():
            self.ended.set_result(goodbye)


class Hub(Generic[Item]):
    """What the hubs for WebSockets and for server-sent events have in common. Thread-safe.

    A connection is closed when the verifier learns that its token has ended, by expiry or by a revocation of whatever
    scope; that takes no message from a service. `end` does the same for a process that is told notices.

    Args:
        verifier: checks tokens in this process.
        max_connections: how many there may be in this process; others are asked to come back later.
        max_waiting: how many messages may wait for one client before it is let go.
    """

    def __init__(
        self, verifier: Verifier, *, max_connections: int = MAX_CONNECTIONS, max_waiting: int = MAX_WAITING
    ) -> None:
        self._verifier = verifier
        self._max_connections = max_connections
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._connections: dict[Connection[Item], list[str]] = {}
        self._by_name: dict[str, dict[Connection[Item], None]] = {}

    def __len__(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    def end(self, notices: Sequence[Notice]) -> None:
        """Close the connections that these notices end, and no other. A batch handler; from any thread.

        By claims that is left to the verifier, which knows all that a token says.
        """
        for notice in notices:
            with self._lock:
                named = [each for name in names_in(notice) for each in self._by_name.get(name, ())]
            for connection in named:
                if notice.matches(connection.token):
                    connection.end(Goodbye(CLOSE_UNAUTHORIZED, f"token {notice.cause.value}"))

    def close(self) -> None:
        """Close every connection: before the server stops. From any thread."""
        for connection in self._all():
            connection.end(RESTART)

    def _publish(self, item: Item, to: Callable[[TokenRef], bool] | None) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[Connection[Item]]] = defaultdict(list)
        for connection in self._all():
            if to is None or to(connection.token):
                by_loop[connection.loop].append(connection)
        for loop, connections in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(_offer_all, connections, item)

    @contextlib.contextmanager
    def _joined(self, claims: Mapping[str, Any]) -> Iterator[Connection[Item]]:
        """A connection, registered while the context lasts; HubFull if there are too many."""
        connection = Connection[Item](self._max_waiting)
        # An end is either known to the verifier by now, or will be told to this watch.
        with self._verifier.watch(claims, lambda end: connection.end(_of_token(end))) as watch:
            connection.token = watch.token
            self._register(connection)
            try:
                yield connection
            finally:
                self._forget(connection)

    def _register(self, connection: Connection[Item]) -> None:
        names = names_of(connection.token)
        with self._lock:
            if len(self._connections) >= self._max_connections:
                raise HubFull(f"there are {self._max_connections} connections")
            self._connections[connection] = names
            for name in names:
                self._by_name.setdefault(name, {})[connection] = None

    def _forget(self, connection: Connection[Item]) -> None:
        with self._lock:
            for name in self._connections.pop(connection):
                named = self._by_name[name]
                del named[connection]
                if not named:
                    del self._by_name[name]

    def _all(self) -> list[Connection[Item]]:
        with self._lock:
            return list(self._connections)


def claims_of(scope: Scope) -> Mapping[str, Any]:
    """The verified claims that the middleware has put into the scope; RuntimeError if there is no middleware."""
    claims: Mapping[str, Any] | None = scope.get("knell.claims")
    if claims is None:
        raise RuntimeError("there are no verified claims; put knell.integrations.asgi.KnellMiddleware around the hub")
    return claims


async def first_of(*waited: asyncio.Future[Any]) -> None:
    """Wait until one is done, and cancel the others; what it raised is raised."""
    try:
        done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
    finally:
        left = [each for each in waited if not each.done()]
        for each in left:
            each.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    for each in done:
        each.result()


def _offer_all(connections: Sequence[Connection[Item]], item: Item) -> None:
    for connection in connections:
        connection.offer(item)


def _of_token(end: TokenEnd) -> Goodbye:
    return Goodbye(CLOSE_UNAUTHORIZED, f"token {end.cause}")
