"""FastAPI: a dependency that gives a token's claims, and one for WebSockets that close the moment the token ends."""

# Without `from __future__ import annotations`: FastAPI reads these signatures, and of an object with `__call__` it does
# not know in which module to look names up.

from collections.abc import AsyncIterator
from typing import Any, NoReturn

from knell.errors import TokenRefused
from knell.integrations import needs
from knell.integrations.asgi import Message, bearer, bearer_of_websocket, can_deny, connected
from knell.integrations.refusals import REALM, Refusal, check_scopes, claims_of, refusal
from knell.verifier import Verifier

with needs("fastapi"):
    from fastapi import HTTPException, Request, WebSocket, WebSocketDisconnect, WebSocketException
    from fastapi.openapi.models import HTTPBearer
    from fastapi.security import SecurityScopes
    from fastapi.security.base import SecurityBase

__all__ = ["Bearer", "LiveWebSocket"]


class LiveWebSocket(WebSocket):
    """A WebSocket that is closed with code 4401 when its token ends; see `Bearer.websocket`.

    Attributes:
        claims: the token's claims.
    """

    claims: dict[str, Any]


class Bearer(SecurityBase):
    """A dependency: only requests with a token that the verifier accepts get through, and the claims are its value.

    `Depends(bearer)`, or `Security(bearer, scopes=["orders:read"])`, which also asks for scopes in the token's `scope`
    claim. It stands in OpenAPI as an HTTP bearer scheme. What is refused is an HTTPException: 401 or 403 with
    `WWW-Authenticate` (RFC 6750, section 3), or 503 with `Retry-After` while the denylist is too old.
    """

    def __init__(
        self,
        verifier: Verifier,
        *,
        realm: str = REALM,
        scheme_name: str = "Bearer",
        description: str | None = None,
    ) -> None:
        """Make a dependency.

        Args:
            verifier: it stays yours to start and to close.
            realm: names the protected space in `WWW-Authenticate`.
            scheme_name, description: in OpenAPI.
        """
        self.verifier = verifier
        self._realm = realm
        self.model = HTTPBearer(bearerFormat="JWT", description=description)
        self.scheme_name = scheme_name

    async def __call__(self, request: Request, security_scopes: SecurityScopes) -> dict[str, Any]:
        """The claims of a request's token."""
        try:
            return self._claims(bearer(request.scope), security_scopes)
        except TokenRefused as error:
            raise _http(refusal(error, self._realm)) from None

    async def websocket(self, websocket: WebSocket, security_scopes: SecurityScopes) -> AsyncIterator[LiveWebSocket]:
        """A dependency for a WebSocket route: `Depends(bearer.websocket)`. Use the LiveWebSocket that it gives.

        The token is that of `Authorization`, or the item after "bearer" in `Sec-WebSocket-Protocol`. Refused before the
        handshake; and once open, closed with code 4401 the moment the token or its session ends, when a `receive` in
        the route raises WebSocketDisconnect. A route that is held in a `send`, because the client does not read, is
        cancelled `asgi.CLOSE_SECONDS` later.
        """
        try:
            claims = self._claims(bearer_of_websocket(websocket.scope), security_scopes)
        except TokenRefused as error:
            _refuse(websocket, refusal(error, self._realm))

        async def send(message: Message) -> None:
            try:
                await websocket.send(message)
            except WebSocketDisconnect as gone:
                raise OSError("the client has gone") from gone  # what a server says, and Starlette has translated

        async with connected(self.verifier, claims, websocket.scope, websocket.receive, send) as connection:
            live = LiveWebSocket(connection.scope, connection.receive, connection.send)
            live.claims = claims
            try:
                yield live
            except WebSocketDisconnect:
                if not connection.ended:
                    raise

    def _claims(self, token: str | None, asked: SecurityScopes) -> dict[str, Any]:
        claims = claims_of(self.verifier, token)
        check_scopes(claims, asked.scopes)
        return claims


def _http(told: Refusal) -> HTTPException:
    return HTTPException(told.status, dict(told.said), told.headers)


def _refuse(websocket: WebSocket, told: Refusal) -> NoReturn:
    if can_deny(websocket.scope):
        raise _http(told) from None
    raise WebSocketException(told.close_code, told.close_reason) from None
