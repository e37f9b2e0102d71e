"""fastapi-users: a strategy in place of its JWTStrategy: tokens are tracked, and a logout ends them everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic
from uuid import uuid4

from knell.async_issuer import AsyncIssuer
from knell.errors import NotDecided, TokenRefused, Unavailable
from knell.integrations import needs
from knell.integrations.refusals import RETRY_AFTER_SECONDS, refusal
from knell.verifier import Verifier

with needs("fastapi-users"):
    from fastapi import HTTPException
    from fastapi_users import exceptions, models
    from fastapi_users.authentication import Strategy
    from fastapi_users.manager import BaseUserManager

__all__ = ["AUDIENCE", "KnellStrategy"]

# What fastapi-users' own JWTStrategy names; the verifier has to accept it.
AUDIENCE = "fastapi-users:auth"


class KnellStrategy(Strategy[models.UP, models.ID], Generic[models.UP, models.ID]):
    """For `AuthenticationBackend(get_strategy=...)`, with any transport.

    A login opens a session of its own (`sid`), a logout revokes it. A token that is refused counts as none, as
    fastapi-users has it: 401, or an anonymous user where the route takes one. While the denylist is too old it is 503.
    """

    def __init__(
        self,
        issuer: AsyncIssuer,
        verifier: Verifier,
        *,
        ttl_seconds: float = 3600.0,
        audience: str | list[str] = AUDIENCE,
    ) -> None:
        """Make a strategy.

        Args:
            issuer: mints, tracks and revokes. It needs a key.
            verifier: accepts what that issuer mints for that audience. Both stay yours to close.
            ttl_seconds: a token's lifetime.
            audience: the tokens' `aud`.
        """
        self._issuer = issuer
        self._verifier = verifier
        self._ttl_seconds = ttl_seconds
        self._audience = audience

    async def read_token(
        self, token: str | None, user_manager: BaseUserManager[models.UP, models.ID]
    ) -> models.UP | None:
        """The user of a token; None if it is refused, or the user is not known."""
        if token is None:
            return None
        claims = self._claims(token)
        if claims is None:
            return None
        try:
            return await user_manager.get(user_manager.parse_id(claims.get("sub")))
        except (exceptions.UserNotExists, exceptions.InvalidID):
            return None

    async def write_token(self, user: models.UP) -> str:
        """A tracked token for a user, in a new session; 503 if store and broker are both away."""
        claims: dict[str, Any] = {"sub": str(user.id), "aud": self._audience, "sid": uuid4().hex}
        with _or_try_again():
            return (await self._issuer.issue(claims, ttl_seconds=self._ttl_seconds)).token

    async def destroy_token(self, token: str, user: models.UP) -> None:
        """Log out: revoke the token's session, here and in every other service; 503 if nothing could be revoked."""
        del user  # its token says whose it is
        claims = self._claims(token)
        if claims is None:
            return  # it has ended since the request began
        scope, claim = ("session", "sid") if "sid" in claims else ("token", "jti")
        with _or_try_again():
            await self._issuer.revoke(scope, {claim: claims[claim]}, reason="logout", initiating_entity="user")

    def _claims(self, token: str) -> dict[str, Any] | None:
        try:
            return self._verifier.verify(token)
        except NotDecided as error:
            told = refusal(error)
            raise HTTPException(told.status, dict(told.said), told.headers) from None
        except TokenRefused:
            return None


@contextmanager
def _or_try_again() -> Iterator[None]:
    try:
        yield
    except Unavailable:
        headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        raise HTTPException(503, {"error": "temporarily_unavailable"}, headers) from None
