"""Django REST framework: an authentication class, and a permission that asks for scopes. Configured as `.django` is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from knell.errors import NotDecided, TokenInvalid, TokenRefused
from knell.integrations import needs
from knell.integrations.django import configured, verifier
from knell.integrations.refusals import REALM, RETRY_AFTER_SECONDS, NoToken, bearer, check_scopes, refusal

with needs("drf"):
    from rest_framework.authentication import BaseAuthentication
    from rest_framework.exceptions import APIException, AuthenticationFailed, PermissionDenied
    from rest_framework.permissions import BasePermission
    from rest_framework.request import Request

__all__ = ["HasScopes", "KnellAuthentication", "TokenUser", "TryAgainLater", "has_scopes"]


class TokenUser:
    """Whoever a token speaks of, for services that have no user of their own for it.

    Attributes:
        claims: the token's claims.
        pk, id, username: its `sub`.
    """

    is_active = True
    is_anonymous = False
    is_authenticated = True
    is_staff = False
    is_superuser = False

    def __init__(self, claims: Mapping[str, Any]) -> None:
        self.claims = claims
        self.pk = self.id = self.username = str(claims.get("sub", ""))

    def __str__(self) -> str:
        return self.username


class TryAgainLater(APIException):
    """The denylist is too old to accept a token: 503 with `Retry-After`."""

    status_code = 503
    default_detail = "try again later"
    default_code = "temporarily_unavailable"
    wait = RETRY_AFTER_SECONDS  # DRF's exception handler makes Retry-After of it


class KnellAuthentication(BaseAuthentication):
    """`request.user` and `request.auth` (the claims) by the Bearer token of `Authorization` (RFC 6750, section 2.1).

    A refused token is 401 with `WWW-Authenticate` (section 3), or 503 with `Retry-After` while the denylist is too old.
    A request without a token is left to other authentication classes, and to permissions.
    """

    def authenticate(self, request: Request) -> tuple[Any, Any] | None:
        """The user and the claims; None without a Bearer token."""
        token = bearer(request.META.get("HTTP_AUTHORIZATION"))
        if token is None:
            return None
        try:
            claims = verifier().verify(token)
        except TokenRefused as error:
            refuse(request, error)
        user = configured("USER", TokenUser)(claims)
        if user is None:
            refuse(request, TokenInvalid("the token's subject is no user here"))
        return user, claims

    def authenticate_header(self, request: Request) -> str:
        """`WWW-Authenticate`, for what was refused of this request."""
        return challenge(request)


class HasScopes(BasePermission):
    """The token has every scope of `scopes`; else 403 with `WWW-Authenticate`. `has_scopes` makes subclasses of it."""

    scopes: tuple[str, ...] = ()

    def has_permission(self, request: Request, view: Any) -> bool:
        """Whether the request may go on. Without a token it may not."""
        del view
        if not isinstance(request.auth, Mapping):
            return False
        try:
            check_scopes(request.auth, self.scopes)
        except TokenRefused as error:
            denied = PermissionDenied("the token's scope does not suffice", "insufficient_scope")
            denied.auth_header = refusal(error, configured("REALM", REALM)).challenge  # type: ignore[attr-defined]
            raise denied from None
        return True


def has_scopes(*scopes: str) -> type[HasScopes]:
    """A permission class: `permission_classes = [has_scopes("orders:read")]`."""
    return type("HasScopes", (HasScopes,), {"scopes": scopes})


def refuse(request: Request, error: TokenRefused) -> NoReturn:
    """Raise what DRF answers a refused token with.

    Raises:
        AuthenticationFailed: 401; `challenge` has the header that goes with it.
        TryAgainLater: the denylist is too old.
    """
    if isinstance(error, NotDecided):
        raise TryAgainLater from None
    remember(request, error)
    raise AuthenticationFailed(dict(refusal(error).said), "invalid_token") from None


def remember(request: Request, error: TokenRefused) -> None:
    """Keep why a request was refused: DRF asks another object for the header."""
    request.knell_refused = error  # type: ignore[attr-defined]


def challenge(request: Request) -> str:
    """`WWW-Authenticate` for a request, by what was remembered of it."""
    # Of the underlying Django request it would be another's attribute.
    error = vars(request).get("knell_refused") or NoToken("the request has no Bearer token")
    return str(refusal(error, configured("REALM", REALM)).challenge)
