"""flask-jwt-extended: its tokens are tracked, and what Knell knows to be revoked is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knell.errors import NotDecided, TokenInvalid, TokenRefused
from knell.integrations import needs
from knell.integrations.refusals import REALM, refusal
from knell.issuer import Issuer
from knell.verifier import Verifier

with needs("flask-jwt-extended"):
    from flask import Flask, Response, jsonify
    from flask_jwt_extended import JWTManager, decode_token, get_unverified_jwt_headers

__all__ = ["Blocklist", "track"]


class Blocklist:
    """Has flask-jwt-extended look into the verifier's denylist, in this process: `token_in_blocklist_loader`.

    A revoked token is 401 with `WWW-Authenticate` (RFC 6750, section 3). While the denylist is too old by the policy of
    the verifier, every token is 503 with `Retry-After`.
    """

    def __init__(
        self, app: Flask, jwt: JWTManager, verifier: Verifier, *, iss: str | None = None, realm: str = REALM
    ) -> None:
        """Register with both.

        Args:
            app: the application.
            jwt: its JWTManager.
            verifier: whose denylist and policy count; signatures stay flask-jwt-extended's. It stays yours to close.
            iss: the issuer of tokens that carry no `iss`, as without JWT_ENCODE_ISSUER; what they are revoked under.
            realm: names the protected space in `WWW-Authenticate`.
        """
        self._verifier = verifier
        self._iss = iss
        self._realm = realm
        jwt.token_in_blocklist_loader(self)
        jwt.revoked_token_loader(self._revoked)
        app.register_error_handler(NotDecided, self._answer)

    def __call__(self, jwt_header: Mapping[str, Any], jwt_payload: Mapping[str, Any]) -> bool:
        """Whether a token, whose signature was verified, is to be refused. NotDecided if nobody can tell."""
        return self._found(jwt_header, jwt_payload) is not None

    def _found(self, jwt_header: Mapping[str, Any], jwt_payload: Mapping[str, Any]) -> TokenRefused | None:
        claims = dict(jwt_payload) if self._iss is None else {"iss": self._iss, **jwt_payload}
        try:
            self._verifier.check(claims, kid=jwt_header.get("kid"))
        except NotDecided:
            raise
        except TokenRefused as error:
            return error
        return None

    def _revoked(self, jwt_header: Mapping[str, Any], jwt_payload: Mapping[str, Any]) -> Response:
        found = self._found(jwt_header, jwt_payload)
        return self._answer(found or TokenInvalid("the token was refused"))

    def _answer(self, error: TokenRefused) -> Response:
        told = refusal(error, self._realm)
        # `msg` is where its clients look.
        answer = jsonify({**told.said, "msg": told.close_reason.capitalize()})
        answer.status_code = told.status
        answer.headers.update(told.headers)
        return answer


def track(issuer: Issuer, token: str) -> str:
    """Track what create_access_token or create_refresh_token made. Returns the token.

    Args:
        issuer: whose `iss` counts for tokens that carry none.
        token: its signature is verified by flask-jwt-extended; needs an application context.

    Raises:
        InvalidClaims, SessionRevoked, Unavailable: as `Issuer.track`.
    """
    claims = decode_token(token)
    issuer.track({"iss": issuer.iss, **claims, "kid": get_unverified_jwt_headers(token).get("kid")})
    return token
