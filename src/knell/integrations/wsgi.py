"""WSGI middleware: a bearer token on every request, for any WSGI application (PEP 3333)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING

from knell.errors import TokenRefused
from knell.integrations.refusals import REALM, bearer, claims_of, refusal
from knell.verifier import Verifier

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["KnellMiddleware"]


class KnellMiddleware:
    """Lets through only requests with a token that the verifier accepts; its claims are `environ["knell.claims"]`.

    The token is the Bearer token of `Authorization` (RFC 6750, section 2.1). Without an accepted one the answer is 401
    with `WWW-Authenticate` (section 3), or 503 with `Retry-After` while the denylist is too old.
    """

    def __init__(
        self, app: WSGIApplication, verifier: Verifier, *, exempt: Collection[str] = (), realm: str = REALM
    ) -> None:
        """Wrap an application.

        Args:
            app: the application.
            verifier: it stays yours to close.
            exempt: paths, exactly as in `environ["PATH_INFO"]`, that need no token. They get no claims.
            realm: names the protected space in `WWW-Authenticate`.
        """
        if isinstance(exempt, str):
            raise TypeError("exempt is a collection of paths, not one string")
        self._app = app
        self._verifier = verifier
        self._exempt = frozenset(exempt)
        self._realm = realm

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The WSGI application."""
        if environ.get("PATH_INFO", "") in self._exempt:
            return self._app(environ, start_response)
        try:
            environ["knell.claims"] = claims_of(self._verifier, bearer(environ.get("HTTP_AUTHORIZATION")))
        except TokenRefused as error:
            told = refusal(error, self._realm)
            of_body = {"Content-Type": "application/json", "Content-Length": str(len(told.body))}
            status = f"{told.status} {HTTPStatus(told.status).phrase}"
            start_response(status, [*of_body.items(), *told.headers.items()])
            return [told.body]
        return self._app(environ, start_response)
