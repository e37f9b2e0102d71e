"""From the text of a token to claims that can be believed: signature, issuer, audience, the shape of each claim."""

from __future__ import annotations

import binascii
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jwt
from jwt.utils import base64url_decode

from knell.errors import InvalidClaims, InvalidSettings, TokenInvalid
from knell.keyring import KeyRing
from knell.keys import OWN_TYPES
from knell.keysource import KeySource
from knell.revocations import has_claims
from knell.settings import Rules
from knell.tokens import Claims, ClaimValue, TokenRef, check_claim_value, check_identifier, check_time

# Above any token in use (a header line is mostly limited to 8 KiB), and small enough to refuse at no cost.
MAX_TOKEN_BYTES = 16 * 1024
# Without these a token could be neither named nor ended.
ALWAYS_REQUIRED = frozenset({"iss", "exp"})


class Decoder:
    """Decodes and checks everything about a token that does not change with time."""

    def __init__(
        self,
        keys: object,
        *,
        algorithms: Collection[str],
        issuer: str | Sequence[str],
        audience: str | Sequence[str] | None,
        rules: Rules,
        require: Collection[str] = ("exp", "jti"),
        match: Mapping[str, ClaimValue] | None = None,
    ) -> None:
        """Make a decoder. The arguments are those of `knell.Verifier`.

        Raises:
            InvalidSettings: says which argument cannot be used, and why.
        """
        self._ring = KeyRing(keys, algorithms)
        self._issuers = _names("issuer", issuer)
        self._audiences = None if audience is None else _names("audience", audience)
        self._rules = rules
        if isinstance(require, str):
            raise InvalidSettings(f'require is {require!r}; give a list, for example ["exp", "jti"]')
        self._match = {} if match is None else _checked_match(match)
        self._options: Any = {
            "require": sorted(ALWAYS_REQUIRED.union(require)),
            # Times are checked against the verifier's own clock, and more strictly.
            "verify_exp": False,
            "verify_iat": False,
            "verify_nbf": False,
        }

    @property
    def source(self) -> KeySource | None:
        """Where the keys come from, if they change."""
        return self._ring.source

    @property
    def only_kid(self) -> str | None:
        """See KeyRing.only_kid."""
        return self._ring.only_kid

    @property
    def issuers(self) -> Sequence[str]:
        """Whose tokens are accepted."""
        return self._issuers

    def decode(self, token: str) -> tuple[Claims, TokenRef]:
        """The claims of a token and what Knell keeps of them; a token without jti has the jti "".

        Raises:
            TokenInvalid: it is not a token of this issuer for this audience. The text never has the token in it.
            KeysUnavailable: there is no key now to check it with.
        """
        header = read_header(token)
        key = self._ring.choose(header)
        try:
            claims = Claims(
                jwt.decode(
                    token,
                    key.key,
                    algorithms=key.algorithms,
                    issuer=self._issuers,
                    audience=self._audiences,
                    options=self._options,
                )
            )
        except jwt.PyJWTError as error:
            raise TokenInvalid(f"the token is not accepted: {error}") from None
        claims.kid = key.kid_in(header)
        if not has_claims(claims, self._match):
            wrong = next(name for name, value in self._match.items() if not has_claims(claims, {name: value}))
            raise TokenInvalid(f"the token's {wrong!r} is not {self._match[wrong]!r}, which is asked for here")
        return claims, self.checked(claims)

    def reference(self, claims: Mapping[str, Any]) -> TokenRef:
        """What Knell keeps of claims that `decode` gave. InvalidClaims if they are not such claims."""
        kid = claims.kid if isinstance(claims, Claims) else None
        if claims.get("jti") is not None:
            return TokenRef.from_claims({**claims, "kid": kid})
        # No revocation can name an empty jti; the other scopes still find the token.
        return TokenRef.from_claims({**claims, "kid": kid, "jti": "-"}).replace(jti="")

    def checked(self, claims: Claims) -> TokenRef:
        """The same, of claims whose signature was verified. TokenInvalid if they are out of order, or live too long."""
        try:
            found = self.reference(claims)
            if claims.get("nbf") is not None:
                check_time("nbf", claims["nbf"])
        except InvalidClaims as error:
            raise TokenInvalid(str(error)) from None
        limit = self._rules.max_token_seconds
        if found.iat is not None and found.exp - found.iat > limit:
            raise TokenInvalid(f"the token is valid for {found.exp - found.iat:.0f} s; the maximum is {limit:.0f} s")
        return found


def read_header(token: str) -> dict[str, Any]:
    """The header of a token, before anything is verified: what it says of keys (jku, jwk, x5u, x5c) is never looked at.

    Raises:
        TokenInvalid: it has the shape of no token, or asks for what no token here needs.
    """
    if not isinstance(token, str):
        raise TokenInvalid(f"a token is a string, not {type(token).__name__}")
    if len(token) > MAX_TOKEN_BYTES:
        raise TokenInvalid(f"the token is {len(token)} characters long; the limit is {MAX_TOKEN_BYTES}")
    if not token.isascii() or token.count(".") != 2:
        raise TokenInvalid("not a token: it must be three parts of base64url with a dot between them")
    try:
        header = json.loads(base64url_decode(token.partition(".")[0].encode()))
    except (ValueError, binascii.Error, RecursionError):
        raise TokenInvalid("not a token: its header is not JSON in base64url") from None
    if not isinstance(header, dict):
        raise TokenInvalid("not a token: its header is not a JSON object")
    if "crit" in header or "b64" in header:
        raise TokenInvalid("the token's header has crit or b64, extensions that no token here needs")
    typ = header.get("typ")
    if isinstance(typ, str) and typ.lower().removeprefix("application/").startswith(OWN_TYPES):
        raise TokenInvalid("this is a signed message of Knell, not an access token")
    return header


def _checked_match(match: Mapping[str, ClaimValue]) -> dict[str, ClaimValue]:
    try:
        return {check_identifier("a claim's name", name): check_claim_value(name, match[name]) for name in match}
    except (InvalidClaims, TypeError) as error:
        raise InvalidSettings(
            f'match is {match!r}; give claims and values, like {{"token_type": "access"}}: {error}'
        ) from None


def _names(called: str, given: str | Sequence[str]) -> list[str]:
    names = [given] if isinstance(given, str) else list(given or ())
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidSettings(f"{called} is {given!r}; give a string, or a list of strings")
    return names
