"""Django: middleware that asks for a bearer token, and sessions that end with the token they were opened with.

All of it is configured in Django's settings:

    KNELL = {
        "VERIFIER": "shop.tokens.verifier",  # a Verifier, or the dotted path of one; middleware starts it
        "EXEMPT": ["/health", "/admin/*"],   # BearerMiddleware: paths that need no token; default none
        "REALM": "api",                      # names the protected space in WWW-Authenticate
        "SESSIONS": "shop.ends.sessions",    # bind_session: where sessions are indexed by their token; default nowhere
        "ISSUER": "shop.tokens.issuer",      # simplejwt: an Issuer
        "USER": "shop.users.of_claims",      # drf: a function from claims to a user, or None; default a TokenUser
    }
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, cast

from knell.errors import InvalidClaims, KnellError, NotDecided, TokenInvalid, TokenRefused
from knell.integrations import needs
from knell.integrations.refusals import REALM, bearer, claims_of, refusal
from knell.tokens import TokenRef
from knell.verifier import Verifier

with needs("django"):
    from asgiref.sync import iscoroutinefunction, markcoroutinefunction
    from django.conf import settings
    from django.core.exceptions import ImproperlyConfigured
    from django.core.signals import setting_changed
    from django.http import HttpRequest, HttpResponse
    from django.http.response import HttpResponseBase
    from django.utils.module_loading import import_string

__all__ = ["BearerMiddleware", "EndedSessionMiddleware", "SessionIndex", "bind_session", "configured"]

NAMES = ("EXEMPT", "ISSUER", "REALM", "SESSIONS", "USER", "VERIFIER")
# Those that may be the dotted path of what is meant.
DOTTED = ("ISSUER", "SESSIONS", "USER", "VERIFIER")
# Where a Django session keeps the token that it hangs on.
SESSION_KEY = "knell.token"

Answer = HttpResponseBase | Awaitable[HttpResponseBase]


class SessionIndex(Protocol):
    """Finds Django sessions by the token that they hang on: `knell.handlers.django.DjangoSessions` is one."""

    def add(self, session_key: str, token: TokenRef) -> None:
        """Remember that a session ends with a token."""


@functools.cache
def configured(name: str, default: Any = None) -> Any:
    """A value of `settings.KNELL`; a dotted path is imported. ImproperlyConfigured if it cannot be used."""
    found = getattr(settings, "KNELL", {})
    if unknown := set(found) - set(NAMES):
        raise ImproperlyConfigured(f"settings.KNELL has {sorted(unknown)}; it knows {', '.join(NAMES)}")
    value = found.get(name, default)
    return import_string(value) if name in DOTTED and isinstance(value, str) else value


def verifier() -> Verifier:
    """The Verifier of `settings.KNELL`."""
    found = configured("VERIFIER")
    if not isinstance(found, Verifier):
        raise ImproperlyConfigured("settings.KNELL['VERIFIER'] must be a knell.Verifier, or the dotted path of one")
    return found


def _forget(*, setting: str, **_: object) -> None:
    if setting == "KNELL":
        configured.cache_clear()


setting_changed.connect(_forget)


class _Middleware:
    """Asks `refused` first, sync and async."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._verifier = verifier()
        self._verifier.start()
        self._realm: str = configured("REALM", REALM)
        self._on_a_loop = iscoroutinefunction(get_response)
        if self._on_a_loop:
            markcoroutinefunction(cast(Any, self))

    def refused_response(self, error: TokenRefused) -> HttpResponse:
        told = refusal(error, self._realm)
        return HttpResponse(told.body, status=told.status, headers=told.headers, content_type="application/json")


class BearerMiddleware(_Middleware):
    """Lets through only requests with a token that the verifier accepts; its claims are `request.knell_claims`.

    The token is the Bearer token of `Authorization` (RFC 6750, section 2.1). Without an accepted one the answer is 401
    with `WWW-Authenticate` (section 3), or 503 with `Retry-After` while the denylist is too old. A path of EXEMPT is
    left alone, and so is all that begins with one that ends in `/*`; `request.knell_claims` is then None.
    """

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        super().__init__(get_response)
        exempt = configured("EXEMPT", ())
        if isinstance(exempt, str):
            raise ImproperlyConfigured("settings.KNELL['EXEMPT'] is a list of paths, not one string")
        self._exempt = frozenset(exempt)
        self._below = tuple(path[:-1] for path in exempt if path.endswith("/*"))

    def __call__(self, request: HttpRequest) -> Answer:
        """The middleware. What it does is no I/O, so that it is the same on an event loop."""
        request.knell_claims = None  # type: ignore[attr-defined]
        if request.path_info not in self._exempt and not request.path_info.startswith(self._below):
            try:
                token = bearer(request.META.get("HTTP_AUTHORIZATION"))
                request.knell_claims = claims_of(self._verifier, token)  # type: ignore[attr-defined]
            except TokenRefused as error:
                refused = self.refused_response(error)
                return _later(refused) if self._on_a_loop else refused
        response: Answer = self.get_response(request)
        return response


class EndedSessionMiddleware(_Middleware):
    """Flushes a Django session of `bind_session` whose token's session was revoked: the request is then anonymous.

    It stands right behind SessionMiddleware. It asks the denylist in this process, so a session ends here with the next
    request, whether or not a worker has come to delete it. While the denylist is too old, such a session gets 503.
    """

    def __call__(self, request: HttpRequest) -> Answer:
        """The middleware."""
        if self._on_a_loop:
            return self._awaited(request)
        refused = None
        if (found := self._ended(request.session.get(SESSION_KEY))) is not None:
            refused = self._stale(found)
            if refused is None:
                request.session.flush()
        response: Answer = self.get_response(request) if refused is None else refused
        return response

    async def _awaited(self, request: HttpRequest) -> HttpResponseBase:
        refused = None
        if (found := self._ended(await request.session.aget(SESSION_KEY))) is not None:
            refused = self._stale(found)
            if refused is None:
                await request.session.aflush()
        response: HttpResponseBase = await self.get_response(request) if refused is None else refused
        return response

    def _ended(self, token: Mapping[str, Any] | None) -> TokenRefused | None:
        if token is None:
            return None
        try:
            self._verifier.check(TokenRef.from_json(token), of_session=True)
        except TokenRefused as error:
            return error
        except InvalidClaims as error:  # not what bind_session has put there
            return TokenInvalid(str(error))
        return None

    def _stale(self, found: TokenRefused) -> HttpResponse | None:
        return self.refused_response(found) if isinstance(found, NotDecided) else None


def bind_session(request: HttpRequest, claims: Mapping[str, Any]) -> TokenRef:
    """Make the request's Django session end with a token's session. Call it after `login`, which renames the session.

    Args:
        request: its session is saved, which is I/O: in an async view, call this with `sync_to_async`.
        claims: what `Verifier.verify` returned: `request.knell_claims`.

    Returns:
        What was kept in the session, and put into the index of SESSIONS.

    Raises:
        InvalidClaims: these are no claims of a token.
        KnellError: the index does not take it: the token has ended, or the index is away. The session was flushed.
    """
    token = verifier().reference(claims)
    request.session[SESSION_KEY] = token.as_json()
    request.session.save()
    sessions: SessionIndex | None = configured("SESSIONS")
    if sessions is not None:
        assert request.session.session_key is not None
        try:
            sessions.add(request.session.session_key, token)
        except KnellError:
            request.session.flush()
            raise
    return token


async def _later(response: HttpResponse) -> HttpResponse:
    return response
