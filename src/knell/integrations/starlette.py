"""Starlette: `request.user`, `request.auth` and `@requires`, by the claims that `asgi.KnellMiddleware` has checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knell.integrations import needs
from knell.integrations.refusals import scopes_of

with needs("starlette"):
    from starlette.authentication import AuthCredentials, AuthenticationBackend, BaseUser
    from starlette.requests import HTTPConnection

__all__ = ["ClaimsBackend", "TokenUser"]


class TokenUser(BaseUser):
    """Whoever a token speaks of.

    Attributes:
        claims: the token's claims.
    """

    def __init__(self, claims: Mapping[str, Any]) -> None:
        self.claims = claims

    @property
    def is_authenticated(self) -> bool:
        """True."""
        return True

    @property
    def identity(self) -> str:
        """The token's `sub`; "" if it has none."""
        return str(self.claims.get("sub", ""))

    @property
    def display_name(self) -> str:
        """The token's `name`, else its `sub`."""
        return str(self.claims.get("name", self.identity))


class ClaimsBackend(AuthenticationBackend):
    """For Starlette's AuthenticationMiddleware, which has to stand behind (after) KnellMiddleware.

    The credentials are "authenticated" and the scopes of the token's `scope` claim. A request on an exempt path is
    unauthenticated.
    """

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        """The credentials and the user of a request."""
        claims = conn.scope.get("knell.claims")
        if claims is None:
            return None
        return AuthCredentials(["authenticated", *scopes_of(claims)]), TokenUser(claims)
