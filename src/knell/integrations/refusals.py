"""What a client is told when its token is refused: one mapping, the same in every framework."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from knell.errors import NotDecided, TokenExpired, TokenRefused, TokenRevoked
from knell.verifier import TokenEnd, Verifier

REALM = "api"
RETRY_AFTER_SECONDS = 5
# In the range that RFC 6455, section 7.4.2, leaves to applications: "401" and "403" for a WebSocket.
CLOSE_UNAUTHORIZED = 4401
CLOSE_FORBIDDEN = 4403
# RFC 6455's registry: try again later.
CLOSE_TRY_AGAIN = 1013


class NoToken(TokenRefused):
    """A request has no token at all, so that the answer names no error (RFC 6750, section 3.1)."""


class InsufficientScope(TokenRefused):
    """A token is good, but its `scope` claim lacks what is asked for (RFC 6750, section 3.1).

    Attributes:
        needed: the scopes that are asked for.
    """

    def __init__(self, needed: Collection[str]) -> None:
        super().__init__(f"the token's scope lacks some of: {' '.join(needed)}")
        self.needed = tuple(needed)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told.

    Attributes:
        status: 401, 403, or 503 while the denylist is too old.
        challenge: the `WWW-Authenticate` header (RFC 6750, section 3); None for 503.
        said: `error` and `error_description`, as JSON for the body.
        close_code, close_reason: the same for a WebSocket that is open, or whose server cannot answer with HTTP.
    """

    status: int
    challenge: str | None
    said: Mapping[str, str]
    close_code: int
    close_reason: str

    @property
    def headers(self) -> dict[str, str]:
        """The headers that say so, without those of the body."""
        if self.challenge is None:
            return {"Cache-Control": "no-store", "Retry-After": str(RETRY_AFTER_SECONDS)}
        return {"Cache-Control": "no-store", "WWW-Authenticate": self.challenge}

    @property
    def body(self) -> bytes:
        """A JSON object."""
        return json.dumps(dict(self.said)).encode()


def refusal(error: TokenRefused, realm: str = REALM) -> Refusal:
    """What a client is told of an error.

    Args:
        error: what `Verifier.verify`, `claims_of` or `check_scopes` raised.
        realm: names the protected space.
    """
    reason = close_reason(error)
    if isinstance(error, NotDecided):
        said = {"error": "temporarily_unavailable", "error_description": reason}
        return Refusal(503, None, said, CLOSE_TRY_AGAIN, reason)
    if isinstance(error, NoToken):
        return Refusal(401, _challenge(realm, {}), {"error": "unauthorized"}, CLOSE_UNAUTHORIZED, reason)
    if isinstance(error, InsufficientScope):
        said = {"error": "insufficient_scope", "error_description": quotable(str(error))}
        challenge = _challenge(realm, said | {"scope": quotable(" ".join(error.needed))})
        return Refusal(403, challenge, said, CLOSE_FORBIDDEN, reason)
    said = {"error": "invalid_token", "error_description": quotable(str(error))}
    return Refusal(401, _challenge(realm, said), said, CLOSE_UNAUTHORIZED, reason)


def bearer(authorization: str | None) -> str | None:
    """The Bearer token of an Authorization header (RFC 6750, section 2.1); None if there is none."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def claims_of(verifier: Verifier, token: str | None) -> dict[str, Any]:
    """The claims of a request's token.

    Raises:
        NoToken: there is none.
        TokenRefused: as `Verifier.verify`.
    """
    if token is None:
        raise NoToken("the request has no Bearer token")
    return verifier.verify(token)


def scopes_of(claims: Mapping[str, Any]) -> list[str]:
    """The scopes that a token was given: its `scope` claim (RFC 8693, section 4.2; RFC 9068, section 2.2.3)."""
    granted = claims.get("scope")
    return granted.split() if isinstance(granted, str) else []


def check_scopes(claims: Mapping[str, Any], needed: Collection[str]) -> None:
    """InsufficientScope if a token lacks one of the scopes that are asked for."""
    if not set(needed) <= set(scopes_of(claims)):
        raise InsufficientScope(needed)


def close_reason(end: TokenEnd | TokenRefused) -> str:
    """Why a WebSocket is closed, in a few words. It is for whoever looks at the client, and names nobody."""
    # A close frame has room for 123 bytes.
    if isinstance(end, TokenEnd):
        return f"token {end.cause}"
    if isinstance(end, NotDecided):
        return "try again later"
    kinds = {
        TokenExpired: "token expired",
        TokenRevoked: "token revoked",
        NoToken: "token missing",
        InsufficientScope: "scope insufficient",
    }
    return kinds.get(type(end), "token invalid")


def quotable(text: str) -> str:
    """Text with nothing in it but what RFC 6750, section 3, allows in a quoted value, 500 characters at most."""
    # It also keeps a line end out of the header.
    return "".join(c if " " <= c <= "~" and c not in '"\\' else ("'" if c == '"' else "?") for c in text)[:500]


def _challenge(realm: str, said: Mapping[str, str]) -> str:
    parts = {"realm": quotable(realm), **said}
    return "Bearer " + ", ".join(f'{name}="{text}"' for name, text in parts.items())
