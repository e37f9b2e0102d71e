"""ASGI middleware: a bearer token on every request, and a WebSocket that closes the moment its token ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any

from knell.errors import TokenRefused
from knell.integrations import refusals
from knell.integrations.refusals import (
    CLOSE_TRY_AGAIN,
    CLOSE_UNAUTHORIZED,
    REALM,
    RETRY_AFTER_SECONDS,
    claims_of,
    close_reason,
    refusal,
)
from knell.verifier import TokenEnd, Verifier

__all__ = [
    "CLOSE_SECONDS",
    "CLOSE_TRY_AGAIN",
    "CLOSE_UNAUTHORIZED",
    "RETRY_AFTER_SECONDS",
    "Connection",
    "KnellMiddleware",
    "bearer",
    "bearer_of_websocket",
    "connected",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# How long the close of a WebSocket may take: a client that does not read keeps it, and the application, waiting.
CLOSE_SECONDS = 5.0
SUBPROTOCOL = "bearer"


class KnellMiddleware:
    """Lets through only requests with a token that the verifier accepts.

    - HTTP: the token is the Bearer token of `Authorization` (RFC 6750, section 2.1). Without an accepted one the answer
      is 401 with `WWW-Authenticate` (section 3), or 503 with `Retry-After` while the denylist is too old.
    - WebSocket: the token is that of `Authorization`, or the item after "bearer" in `Sec-WebSocket-Protocol`, which a
      browser can set: `new WebSocket(url, ["bearer", token])`. Refused before the handshake; and once open, closed with
      code 4401 the moment the token or its session ends, when the application receives `websocket.disconnect`. One that
      is held in `send`, because the client does not read, is cancelled CLOSE_SECONDS later.
    - The claims are `scope["knell.claims"]`, and `knell_claims` of the scope's state, where the server has one.
    """

    def __init__(
        self,
        app: App,
        verifier: Verifier,
        *,
        exempt: Collection[str] = (),
        realm: str = REALM,
        websocket_token: Callable[[Scope], str | None] | None = None,
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            verifier: it is started with the server (ASGI lifespan), and stays yours to close.
            exempt: paths, exactly as in `scope["path"]`, that need no token. They get no claims.
            realm: names the protected space in `WWW-Authenticate`.
            websocket_token: takes the token from a WebSocket's scope in another way; None if there is none.
        """
        if isinstance(exempt, str):
            raise TypeError("exempt is a collection of paths, not one string")
        self._app = app
        self._verifier = verifier
        self._exempt = frozenset(exempt)
        self._realm = realm
        self._websocket_token = websocket_token or bearer_of_websocket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        kind = scope["type"]
        if kind == "lifespan":
            self._verifier.start()
        if kind not in ("http", "websocket") or scope["path"] in self._exempt:
            await self._app(scope, receive, send)
        elif kind == "http":
            await self._http(scope, receive, send)
        else:
            await self._websocket(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            claims = claims_of(self._verifier, bearer(scope))
        except TokenRefused as error:
            await self._refuse(error, send)
            return
        await self._app(_with_claims(scope, claims), receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            claims = claims_of(self._verifier, self._websocket_token(scope))
        except TokenRefused as error:
            await self._refuse_websocket(error, scope, receive, send)
            return
        async with connected(self._verifier, claims, scope, receive, send) as connection:
            await self._app(connection.scope, connection.receive, connection.send)

    async def _refuse_websocket(self, error: TokenRefused, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        if can_deny(scope):
            await self._refuse(error, send, prefix="websocket.")
            return
        told = refusal(error, self._realm)
        await send({"type": "websocket.close", "code": told.close_code, "reason": told.close_reason})

    async def _refuse(self, error: TokenRefused, send: Send, prefix: str = "") -> None:
        told = refusal(error, self._realm)
        of_body = {"Content-Type": "application/json", "Content-Length": str(len(told.body))}
        headers = [(name.lower().encode(), value.encode("ascii")) for name, value in (of_body | told.headers).items()]
        await send({"type": f"{prefix}http.response.start", "status": told.status, "headers": headers})
        await send({"type": f"{prefix}http.response.body", "body": told.body})


class _Ended(OSError):
    """What `send` raises once the connection was closed here, as servers do when the client has gone."""


@contextlib.asynccontextmanager
async def connected(
    verifier: Verifier, claims: Mapping[str, Any], scope: Scope, receive: Receive, send: Send
) -> AsyncIterator[Connection]:
    """One WebSocket whose token was accepted, closed with code 4401 when the token ends. Run the application inside.

    Args:
        claims: what `verifier.verify` returned for it.
        scope, receive, send: as the server gave them. The application is to use those of the Connection in their place.
    """
    connection = Connection(claims, scope, receive, send)
    with verifier.watch(claims, connection.ends):
        async with connection.running():
            yield connection


class Connection:
    """One WebSocket between the server and the application, that can be closed from outside.

    Attributes:
        scope: for the application: with the claims, and without the token among the subprotocols.
    """

    def __init__(self, claims: Mapping[str, Any], scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = _with_claims(scope, claims)
        offered = list(scope.get("subprotocols") or ())
        if SUBPROTOCOL in offered:
            # The application is to see, log and choose from what is left: the token is no subprotocol.
            at = offered.index(SUBPROTOCOL)
            self.scope["subprotocols"] = offered[:at] + offered[at + 2 :]
        self._receive = receive
        self._send = send
        self._answer = SUBPROTOCOL if SUBPROTOCOL in offered else None
        self._loop = asyncio.get_running_loop()
        self._end: asyncio.Future[Message] = self._loop.create_future()
        self._sending = asyncio.Lock()
        self._running = asyncio.timeout(None)  # around the application: a deadline is how it is cancelled
        self._over = False  # closed by the application or by the client
        self._receiving: asyncio.Task[Message] | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """True once the token has ended."""
        return self._closing is not None

    def ends(self, end: TokenEnd) -> None:
        """The token has ended; called from the verifier's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and the connection with it
            self._loop.call_soon_threadsafe(self._begin_to_close, close_reason(end))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around the application on this connection."""
        try:
            async with self._running:
                yield
        except _Ended:
            pass  # it did not catch what `send` raised; the connection is closed, as it should be
        except TimeoutError:
            if not self._running.expired():
                raise  # the application's own
        finally:
            # From here on the server closes it, if it still is open; and an end must not begin to close it.
            self._end.cancel()
            if self._receiving is not None:
                self._receiving.cancel()
                await asyncio.gather(self._receiving, return_exceptions=True)
            if self._closing is not None:
                await self._closing

    def _begin_to_close(self, reason: str) -> None:
        if not self._end.done():
            self._end.set_result({"type": "websocket.disconnect", "code": CLOSE_UNAUTHORIZED, "reason": reason})
            self._closing = self._loop.create_task(self._close(reason))

    async def _close(self, reason: str) -> None:
        message = {"type": "websocket.close", "code": CLOSE_UNAUTHORIZED, "reason": reason}
        try:
            async with asyncio.timeout(CLOSE_SECONDS), self._sending:
                if not self._over:
                    # To say that the client leaves at this moment, uvicorn's `websockets` raises a RuntimeError.
                    with contextlib.suppress(OSError, RuntimeError):
                        await self._send(message)
        except TimeoutError:
            if self._sending.locked():  # by a `send` of the application's that waits for the client to read
                with contextlib.suppress(RuntimeError):  # it has returned; a task that it left behind is what sends
                    self._running.reschedule(self._loop.time())

    async def send(self, message: Message) -> None:
        """For the application; an OSError once the connection was closed here."""
        async with self._sending:
            if self._end.done() and not self._over:
                raise _Ended("the WebSocket was closed because its token ended")
            if message["type"] in ("websocket.close", "websocket.http.response.start"):
                self._over = True
            if message["type"] == "websocket.accept" and self._answer and not message.get("subprotocol"):
                message = {**message, "subprotocol": self._answer}
            await self._send(message)

    async def receive(self) -> Message:
        """For the application; a disconnect with code 4401 once the token has ended."""
        if not self._end.done():
            if self._receiving is None:
                # It outlives a call that the application cancels, so that no message is lost with it.
                self._receiving = self._loop.create_task(self._next())
            await asyncio.wait([self._receiving, self._end], return_when=asyncio.FIRST_COMPLETED)
        if self._end.done():
            return dict(self._end.result())
        assert self._receiving is not None
        received, self._receiving = self._receiving.result(), None
        return received

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            self._over = True  # whether or not the application ever asks for it
        return message


def can_deny(scope: Scope) -> bool:
    """Whether the server can answer the handshake of a WebSocket with an HTTP response."""
    return "websocket.http.response" in (scope.get("extensions") or {})


def bearer(scope: Scope) -> str | None:
    """The Bearer token of a request's only Authorization header (RFC 6750, section 2.1); None if there is none."""
    found = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    return refusals.bearer(found[0].decode("latin-1")) if len(found) == 1 else None


def bearer_of_websocket(scope: Scope) -> str | None:
    """The token of Authorization, else the item after "bearer" in Sec-WebSocket-Protocol; None if there is none."""
    found = bearer(scope)
    if found is not None:
        return found
    offered = list(scope.get("subprotocols") or ())
    at = offered.index(SUBPROTOCOL) + 1 if SUBPROTOCOL in offered else len(offered)
    return offered[at] if at < len(offered) else None


def _with_claims(scope: Scope, claims: Mapping[str, Any]) -> dict[str, Any]:
    inner = {**scope, "knell.claims": claims}
    if "state" in scope:
        inner["state"] = {**scope["state"], "knell_claims": claims}
    return inner
