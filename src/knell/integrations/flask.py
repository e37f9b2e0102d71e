"""Flask: an extension whose decorator asks for a token; its claims are `flask.g.knell_claims`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from knell.errors import InvalidSettings, TokenRefused
from knell.integrations import needs
from knell.integrations.refusals import REALM, bearer, check_scopes, claims_of, refusal
from knell.verifier import Verifier

with needs("flask"):
    from flask import Flask, Response, current_app, g, request

__all__ = ["Knell"]

View = TypeVar("View", bound=Callable[..., Any])
EXTENSION = "knell"


class Knell:
    """The extension. With an application factory: `knell = Knell()` at import, and `knell.init_app(app, verifier)`."""

    def __init__(self, app: Flask | None = None, verifier: Verifier | None = None, *, realm: str = REALM) -> None:
        """Make the extension.

        Args:
            app: the application; None to give it to `init_app` later.
            verifier: it stays yours to close; None to give it to `init_app`.
            realm: names the protected space in `WWW-Authenticate`.
        """
        self._verifier = verifier
        self._realm = realm
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, verifier: Verifier | None = None) -> None:
        """Name the verifier of an application.

        Raises:
            InvalidSettings: there is none, neither here nor in the constructor.
        """
        found = verifier or self._verifier
        if found is None:
            raise InvalidSettings("Knell has no verifier; use Knell(app, verifier), or init_app(app, verifier)")
        app.extensions[EXTENSION] = found

    def require(self, *scopes: str) -> Callable[[View], View]:
        """A decorator, below the route's: the view is called only with a token that the verifier accepts.

        Without one the answer is 401 or 403 with `WWW-Authenticate` (RFC 6750, section 3), or 503 with `Retry-After`
        while the denylist is too old.

        Args:
            scopes: what the token's `scope` claim has to have in it.
        """

        def decorate(view: View) -> View:
            @functools.wraps(view)
            def checked(*args: Any, **kwargs: Any) -> Any:
                refused = self.check(*scopes)
                return current_app.ensure_sync(view)(*args, **kwargs) if refused is None else refused

            return checked  # type: ignore[return-value] # called as the view is

        return decorate

    def check(self, *scopes: str) -> Response | None:
        """The answer to a request without a good token; None if it has one. `app.before_request(knell.check)` asks for
        a token on every request of an application, or of a blueprint."""
        verifier = current_app.extensions.get(EXTENSION)
        if verifier is None:
            raise InvalidSettings("this application has no verifier; call knell.init_app(app, verifier)")
        try:
            claims = claims_of(verifier, bearer(request.headers.get("Authorization")))
            check_scopes(claims, scopes)
        except TokenRefused as error:
            told = refusal(error, self._realm)
            return Response(told.body, told.status, told.headers, mimetype="application/json")
        g.knell_claims = claims
        return None
