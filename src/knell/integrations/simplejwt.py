"""djangorestframework-simplejwt: its tokens are tracked, refused once revoked, and a logout ends the whole session.

    SIMPLE_JWT = {
        "ISSUER": "https://auth.example",
        "TOKEN_OBTAIN_SERIALIZER": "knell.integrations.simplejwt.TokenObtainPairSerializer",
        "TOKEN_REFRESH_SERIALIZER": "knell.integrations.simplejwt.TokenRefreshSerializer",
        "TOKEN_VERIFY_SERIALIZER": "knell.integrations.simplejwt.TokenVerifySerializer",
        "TOKEN_BLACKLIST_SERIALIZER": "knell.integrations.simplejwt.TokenBlacklistSerializer",
        "AUTH_TOKEN_CLASSES": ["knell.integrations.simplejwt.AccessToken"],
    }
    KNELL = {"ISSUER": Issuer("https://auth.example")}  # or a dotted path
    REST_FRAMEWORK = {"DEFAULT_AUTHENTICATION_CLASSES": ["knell.integrations.simplejwt.JWTAuthentication"]}

simplejwt signs and verifies, as ever. Without a `KNELL["VERIFIER"]` one is made of simplejwt's own key and algorithm.
A login is a session: `sid` and `auth_time` are in its refresh token, and in every token that comes of it. simplejwt's
blacklist app may stay installed, and is not needed.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from knell.errors import NotDecided, SessionRevoked, TokenInvalid, TokenRefused, Unavailable
from knell.integrations import needs
from knell.integrations.django import configured, verifier
from knell.integrations.drf import TryAgainLater, challenge, remember
from knell.issuer import Issuer
from knell.verifier import Verifier

with needs("simplejwt"):
    from django.core.exceptions import ImproperlyConfigured
    from rest_framework.request import Request
    from rest_framework_simplejwt import authentication, serializers, tokens
    from rest_framework_simplejwt.exceptions import AuthenticationFailed, TokenError
    from rest_framework_simplejwt.settings import api_settings

if TYPE_CHECKING:
    _Token = tokens.Token
else:
    _Token = object

__all__ = [
    "AccessToken",
    "JWTAuthentication",
    "RefreshToken",
    "TokenBlacklistSerializer",
    "TokenObtainPairSerializer",
    "TokenRefreshSerializer",
    "TokenVerifySerializer",
    "Tracked",
]


def issuer() -> Issuer:
    """The Issuer of `settings.KNELL`; its `iss` has to be that of SIMPLE_JWT, if that has one."""
    found = configured("ISSUER")
    if not isinstance(found, Issuer):
        raise ImproperlyConfigured("settings.KNELL['ISSUER'] must be a knell.Issuer, or the dotted path of one")
    if api_settings.ISSUER not in (None, found.iss):
        raise ImproperlyConfigured(f"SIMPLE_JWT['ISSUER'] is {api_settings.ISSUER!r}, KNELL's issuer is {found.iss!r}")
    return found


def checker() -> Verifier:
    """The Verifier of `settings.KNELL`, else one made of SIMPLE_JWT."""
    return _own_verifier() if configured("VERIFIER") is None else verifier()


@functools.cache
def _own_verifier() -> Verifier:
    # Only its denylist is asked: signatures stay simplejwt's.
    return Verifier(
        api_settings.VERIFYING_KEY or api_settings.SIGNING_KEY,
        algorithms=[api_settings.ALGORITHM],
        issuer=issuer().iss,
        audience=api_settings.AUDIENCE,
    )


def _revoke(scope: str, match: dict[str, str], **options: Any) -> None:
    try:
        issuer().revoke(scope, match, initiating_entity="user", **options)
    except Unavailable:
        raise TryAgainLater from None


class Tracked(_Token):
    """A mixin, to stand before simplejwt's token class: tracked when it is signed, refused once it is revoked."""

    _signed: tuple[Any, Any] | None = None

    def __init__(self, token: Any = None, verify: bool = True) -> None:
        super().__init__(token, verify)
        if token is None:
            self.payload.setdefault("iss", issuer().iss)
            self.payload["sid"] = uuid4().hex
            # With milliseconds: the cut-off of a revocation has to tell what began before it in one second.
            self.payload["auth_time"] = round(time.time(), 3)
        else:
            self._signed = self._name()

    def __str__(self) -> str:
        """Sign it, and track it before that.

        Raises:
            TokenError: its session is revoked.
            TryAgainLater: neither store nor broker answers.
        """
        if self._signed != self._name():
            self.payload.update(self._claims())
            try:
                issuer().track({**self.payload, "kid": checker().only_kid})
            except SessionRevoked:
                raise TokenError("Token's session is revoked") from None
            except Unavailable:
                raise TryAgainLater from None
            self._signed = self._name()
        return super().__str__()

    def verify(self, *args: Any, **kwargs: Any) -> None:
        """simplejwt's own checks, then the denylist."""
        super().verify(*args, **kwargs)
        try:
            checker().check(self._claims())
        except NotDecided:
            raise TryAgainLater from None
        except TokenRefused as error:
            raise TokenError(str(error)) from None

    def _claims(self) -> dict[str, Any]:
        # What Knell names a token by, also of one that was issued before Knell was there.
        found = {"iss": issuer().iss, **self.payload, "jti": self.payload.get(api_settings.JTI_CLAIM)}
        if api_settings.USER_ID_CLAIM in found:
            found.setdefault("sub", str(found[api_settings.USER_ID_CLAIM]))
        return found

    def _name(self) -> tuple[Any, Any]:
        return self.payload.get(api_settings.JTI_CLAIM), self.payload.get("exp")


class AccessToken(Tracked, tokens.AccessToken):
    """simplejwt's AccessToken, tracked."""


class RefreshToken(Tracked, tokens.RefreshToken):  # type: ignore[misc] # simplejwt types for_user in two ways
    """simplejwt's RefreshToken, tracked; `blacklist` revokes its session."""

    access_token_class = AccessToken

    def blacklist(self) -> Any:
        """Log out: revoke the session with all its tokens, here and in every service; then as simplejwt has it.

        Raises:
            TryAgainLater: nothing was revoked.
        """
        if "sid" in self.payload:
            _revoke("session", {"sid": self.payload["sid"]}, reason="logout")
        else:
            self._revoke_token("logout")
        return self._into_the_table()

    def _revoke_token(self, reason: str) -> None:
        claims = self._claims()
        _revoke("token", {"jti": claims["jti"]}, exp=claims["exp"], reason=reason)

    def _into_the_table(self) -> Any:
        blacklist = getattr(super(), "blacklist", None)  # not there without simplejwt's blacklist app
        return None if blacklist is None else blacklist()


class _Rotated(RefreshToken):
    """What a rotation blacklists is the old refresh token; the session goes on."""

    def blacklist(self) -> Any:
        self._revoke_token("rotated")
        return self._into_the_table()


class _Untyped(Tracked, tokens.UntypedToken):
    """Any of them, to be looked at."""


class TokenObtainPairSerializer(serializers.TokenObtainPairSerializer):
    """Log in."""

    token_class = RefreshToken


class TokenRefreshSerializer(serializers.TokenRefreshSerializer):
    """Carry the session on."""

    token_class = _Rotated


class TokenBlacklistSerializer(serializers.TokenBlacklistSerializer):
    """Log out."""

    token_class = RefreshToken


class TokenVerifySerializer(serializers.TokenVerifySerializer):
    """Look at a token."""

    def validate(self, attrs: dict[str, Any]) -> dict[Any, Any]:
        """simplejwt's own checks, then the denylist."""
        found: dict[Any, Any] = super().validate(attrs)
        _Untyped(attrs["token"])
        return found


class JWTAuthentication(authentication.JWTAuthentication):
    """simplejwt's JWTAuthentication, whose 401 says `error="invalid_token"` (RFC 6750, section 3)."""

    def authenticate(self, request: Request) -> Any:
        """The user and the token; None without one."""
        try:
            return super().authenticate(request)
        except AuthenticationFailed as error:
            remember(request, TokenInvalid("the token is not accepted"))
            raise error

    def get_validated_token(self, raw_token: bytes) -> Any:
        """simplejwt's own. ImproperlyConfigured if AUTH_TOKEN_CLASSES has a class that does not ask the denylist."""
        found = super().get_validated_token(raw_token)
        if not isinstance(found, Tracked):
            raise ImproperlyConfigured(
                f"SIMPLE_JWT['AUTH_TOKEN_CLASSES'] has {type(found).__name__}, which accepts revoked tokens; use "
                "knell.integrations.simplejwt.AccessToken"
            )
        return found

    def authenticate_header(self, request: Request) -> str:
        """`WWW-Authenticate`, for what was refused of this request."""
        return challenge(request)
