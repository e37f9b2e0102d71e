"""A hub of WebSockets: pushes messages to whoever is connected, and closes each the moment that its token ends.

hub = WebSocketHub(verifier)
app = KnellMiddleware(Starlette(routes=[WebSocketRoute("/live", hub), ...]), verifier)

hub.publish("your order has left", to=lambda token: token.sub == "alice")  # from any thread
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from knell.handlers.hub import (
    CLOSE_SECONDS,
    MAX_CONNECTIONS,
    MAX_WAITING,
    Connection,
    Hub,
    HubFull,
    claims_of,
    first_of,
)
from knell.integrations.asgi import CLOSE_TRY_AGAIN, Receive, Scope, Send
from knell.tokens import TokenRef
from knell.verifier import Verifier


class WebSocketHub(Hub[str | bytes]):
    """An ASGI application for a WebSocket route behind KnellMiddleware.

    When a token ends its connection is closed with code 4401 and the reason "token expired" or "token revoked"; a
    client that does not read what waits for it, with 1013.

    Args:
        verifier: the middleware's own.
        on_message: is given whose connection it is and what the client has sent. Default: that is ignored.
        max_connections, max_waiting: see Hub.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        on_message: Callable[[TokenRef, str | bytes], Awaitable[None]] | None = None,
        max_connections: int = MAX_CONNECTIONS,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        super().__init__(verifier, max_connections=max_connections, max_waiting=max_waiting)
        self._on_message = on_message

    def publish(self, message: str | bytes, *, to: Callable[[TokenRef], bool] | None = None) -> None:
        """Send a message to those that `to` picks, or to all. From any thread; to connections of this process."""
        self._publish(message, to)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        claims = claims_of(scope)
        await receive()  # websocket.connect
        try:
            with self._joined(claims) as connection:
                await send({"type": "websocket.accept"})
                await first_of(
                    asyncio.ensure_future(self._read(connection, receive)),
                    asyncio.ensure_future(_write(connection, send)),
                    connection.ended,
                )
                await _say_goodbye(connection, send)
        except HubFull:
            await send({"type": "websocket.close", "code": CLOSE_TRY_AGAIN, "reason": "try again later"})

    async def _read(self, connection: Connection[str | bytes], receive: Receive) -> None:
        """Hand on what the client sends, until it leaves."""
        while (message := await receive())["type"] != "websocket.disconnect":
            if self._on_message is not None:
                text: Any = message.get("text")
                await self._on_message(connection.token, message["bytes"] if text is None else text)


async def _write(connection: Connection[str | bytes], send: Send) -> None:
    """Send what waits, until the client has gone."""
    # To say that the client has gone, servers raise an OSError, and uvicorn's `websockets` a RuntimeError.
    with contextlib.suppress(OSError, RuntimeError):
        while True:
            message = await connection.waiting.get()
            kind = "text" if isinstance(message, str) else "bytes"
            await send({"type": "websocket.send", kind: message})


async def _say_goodbye(connection: Connection[str | bytes], send: Send) -> None:
    if not connection.ended.done() or connection.ended.cancelled():
        return
    goodbye = connection.ended.result()
    with contextlib.suppress(OSError, RuntimeError, TimeoutError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await send({"type": "websocket.close", "code": goodbye.code, "reason": goodbye.reason})
