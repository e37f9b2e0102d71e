"""The rules for a token's claims: of a new one, of a refreshed one, and of one that somebody else minted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jwt
from uuid6 import uuid7

from knell.decoding import read_header
from knell.errors import InvalidClaims, TokenInvalid
from knell.keyring import KeyRing
from knell.settings import Rules
from knell.tokens import MAX_SHOWN, Claims, TokenRef, check_identifier, values_of

# What the issuer decides, and a caller of `issue` must not.
DECIDED = ("exp", "iat")
# What a refreshed token gets anew.
RENEWED = ("jti", "exp", "iat", "nbf", "kid")
# Clocks differ by a little: an iat this far ahead of the store's clock is no mistake.
SKEW_SECONDS = 5.0


def new_claims(claims: Mapping[str, Any], *, iss: str, now: float, ttl_seconds: float, rules: Rules) -> dict[str, Any]:
    """The claims set of a new token; InvalidClaims if it cannot be made."""
    if not isinstance(claims, Mapping):
        raise InvalidClaims(f"claims must be a mapping, not {type(claims).__name__}")
    for name in DECIDED:
        if name in claims:
            raise InvalidClaims(f"the claims have {name!r}, which issue() sets; leave it out and give ttl_seconds")
    if claims.get("iss", iss) != iss:
        raise InvalidClaims(f"the claims have iss {claims['iss']!r}, but this issuer is {iss!r}")
    made = {**claims, "iss": iss, "iat": _milliseconds(now), "exp": _milliseconds(now + _lifetime(ttl_seconds, rules))}
    made.setdefault("jti", str(uuid7()))
    if made.get("sid") is not None:
        made.setdefault("auth_time", made["iat"])
    made["exp"] = _end(made, now)
    _check_age(TokenRef.from_claims(made), now, rules)
    return made


def refreshed_claims(
    old: Mapping[str, Any],
    changes: Mapping[str, Any] | None,
    *,
    iss: str,
    now: float,
    ttl_seconds: float,
    rules: Rules,
) -> dict[str, Any]:
    """The claims set of a token that carries the session of `old` on; InvalidClaims if there is none to carry on."""
    if changes is not None and not isinstance(changes, Mapping):
        raise InvalidClaims(f"the changes must be a mapping of claims, not {type(changes).__name__}")
    if old.get("sid") is None:
        raise InvalidClaims("the token has no 'sid': there is no session to carry on; issue a new token")
    for name in ("iss", "sub", "sid", "auth_time", "session_exp"):
        if changes and name in changes and changes[name] != old.get(name):
            raise InvalidClaims(f"{name!r} stays the same through the life of a session; leave it out of the changes")
    if changes and old.get("client_id") is not None and changes.get("client_id", old["client_id"]) != old["client_id"]:
        raise InvalidClaims("'client_id' stays the same through the life of a session; leave it out of the changes")
    kept = {name: value for name, value in old.items() if name not in RENEWED}
    # A session of a token without auth_time began at that token at the latest.
    if kept.get("auth_time") is None and old.get("iat") is not None:
        kept["auth_time"] = old["iat"]
    return new_claims({**kept, **(changes or {})}, iss=iss, now=now, ttl_seconds=ttl_seconds, rules=rules)


def both_claims(old: Mapping[str, Any], made: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a refreshed token is judged by: its claims set, and what it had before where that was changed.

    A revocation by claims that refuses the old token has ended the session, whatever the new one says.
    """
    changed = {name for name in changes or () if name in old and name not in RENEWED}
    return {**made, **{name: [*values_of(made.get(name)), *values_of(old[name])] for name in changed}}


def check_foreign(ref: TokenRef, *, now: float, rules: Rules) -> None:
    """Check a token that somebody else minted against the rules; InvalidClaims if it cannot be tracked."""
    if ref.exp <= now:
        raise InvalidClaims(
            f"'exp' is {ref.exp:.0f}: the token ended {now - ref.exp:.0f} s ago; track it while it lives"
        )
    start = now if ref.iat is None else ref.iat
    if ref.exp - start > rules.max_token_seconds:
        raise InvalidClaims(
            f"the token lives for {ref.exp - start:.0f} s; the longest lifetime is {rules.max_token_seconds:.0f} s "
            "(KNELL_MAX_TOKEN_SECONDS)"
        )
    _check_age(ref, now, rules)


def read_foreign(token: str, keys: Mapping[str, KeyRing]) -> Claims:
    """The claims of a token whose signature a key of its `iss` verifies, expired or not.

    Raises:
        InvalidClaims: no key for its iss, or the signature is wrong. The text never has the token in it.
        KeysUnavailable: the keys of its iss come from a URL that does not answer.
    """
    try:
        header = read_header(token)
        iss = jwt.decode(token, options={"verify_signature": False}).get("iss")
    except (jwt.InvalidTokenError, TokenInvalid) as error:
        raise InvalidClaims(f"not a JWT: {error}") from None
    if not isinstance(iss, str) or iss not in keys:
        raise InvalidClaims(
            f"no key checks tokens of {str(iss)[:256]!r}; pass the verified claims, or give foreign_keys="
        )
    checks: Any = {"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False}
    try:
        key = keys[iss].choose(header)
        claims = Claims(jwt.decode(token, key.key, algorithms=key.algorithms, options=checks))
    except (jwt.PyJWTError, TokenInvalid, ValueError, TypeError) as error:
        raise InvalidClaims(f"the token's signature does not verify: {error}") from None
    claims.kid = check_identifier("kid", key.kid_in(header))
    return claims


def _lifetime(ttl_seconds: object, rules: Rules) -> float:
    if isinstance(ttl_seconds, bool) or not isinstance(ttl_seconds, int | float):
        raise InvalidClaims(f"ttl_seconds is a {type(ttl_seconds).__name__}; it must be a finite number of seconds")
    if isinstance(ttl_seconds, float) and not math.isfinite(ttl_seconds):
        raise InvalidClaims(f"ttl_seconds is {ttl_seconds}; it must be a finite number of seconds")
    if not 0 < ttl_seconds <= rules.max_token_seconds:
        shown = ttl_seconds if abs(ttl_seconds) < MAX_SHOWN else "far out of range"
        raise InvalidClaims(
            f"ttl_seconds is {shown}; it must be above 0 and at most {rules.max_token_seconds:.0f} "
            "(KNELL_MAX_TOKEN_SECONDS)"
        )
    return float(ttl_seconds)


def _end(claims: Mapping[str, Any], now: float) -> float:
    session_exp = TokenRef.from_claims(claims).session_exp
    if session_exp is None:
        return float(claims["exp"])
    if session_exp <= now:
        raise InvalidClaims(f"the session ended {now - session_exp:.0f} s ago ('session_exp'); log in again")
    return min(float(claims["exp"]), session_exp)


def _check_age(ref: TokenRef, now: float, rules: Rules) -> None:
    started = ref.started
    if started is None:
        return
    if started > now + SKEW_SECONDS:
        raise InvalidClaims(f"the session begins {started - now:.0f} s in the future; check the clock of its issuer")
    if ref.sid is None:
        return
    if started < now - rules.max_session_seconds:
        raise InvalidClaims(
            f"the session began {now - started:.0f} s ago; the longest is {rules.max_session_seconds:.0f} s "
            "(KNELL_MAX_SESSION_SECONDS); log in again"
        )
    if ref.session_exp is not None and ref.session_exp - started > rules.max_session_seconds:
        raise InvalidClaims(
            f"'session_exp' is {ref.session_exp - started:.0f} s after the session's start; the longest is "
            f"{rules.max_session_seconds:.0f} s (KNELL_MAX_SESSION_SECONDS)"
        )


def _milliseconds(time: float) -> float:
    # A cut-off has to tell apart what began before and after it in one second; RFC 7519 allows fractions.
    return round(time, 3)
