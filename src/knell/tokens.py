"""What Knell keeps of a token: enough to name it and to know when it ends, never the token itself."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from knell.errors import InvalidClaims

# Long enough for any identifier in use (a URL, a distinguished name), short enough to bound a record.
MAX_ID_BYTES = 256
# 2**40 s is the year 36812: what is beyond it is a mistake (milliseconds, most often).
MAX_TIME = 2.0**40
# Larger numbers are not spelt out in an error.
MAX_SHOWN = 10**20
# What is kept of the claims that a deployment tracks: a record of a token stays small.
MAX_TRACKED_BYTES = 1024

# A claim's value that can be compared: text, a whole number, true or false.
ClaimValue = str | int | bool


class Claims(dict[str, Any]):
    """A verified token's claims set (RFC 7519, section 4), which also knows the key that the token was signed with.

    Attributes:
        kid: that key's id (RFC 7515, section 4.1.4). It is no claim: what the payload says of a "kid" does not count.
    """

    kid: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRef:
    """A token as Knell knows it. (iss, jti) is its name; times are Unix seconds, as NumericDate (RFC 7519, section 2).

    Attributes:
        iss, jti, exp: RFC 7519, sections 4.1.1, 4.1.7 and 4.1.4. Always present.
        iat: RFC 7519, section 4.1.6. None for a token that carries none.
        sid: the session that it belongs to (OpenID Connect Front-Channel Logout 1.0, section 3).
        sub: RFC 7519, section 4.1.2.
        client_id: RFC 8693, section 4.3 and RFC 9068, section 2.2.
        kid: the key that signed it (RFC 7515, section 4.1.4).
        auth_time: when the session's user authenticated (OpenID Connect Core 1.0, section 2).
        session_exp: when its session ends whatever is refreshed; Knell's own claim.
        claims: those of its other claims that the deployment tracks (`Rules.tracked_claims`): each a value or a list of
            values. None if there are none.
    """

    iss: str
    jti: str
    exp: float
    iat: float | None = None
    sid: str | None = None
    sub: str | None = None
    client_id: str | None = None
    kid: str | None = None
    auth_time: float | None = None
    session_exp: float | None = None
    claims: Mapping[str, ClaimValue | list[ClaimValue]] | None = field(default=None, hash=False)

    @property
    def second(self) -> int:
        """The expiry second that it is due in: the first whole second at which it has ended, ceil(exp)."""
        return math.ceil(self.exp)

    @property
    def started(self) -> float | None:
        """The start of its session as the token tells it: auth_time, else iat."""
        return self.auth_time if self.auth_time is not None else self.iat

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def as_json(self) -> dict[str, Any]:
        """A JSON object of the fields that are present, named as the claims are."""
        return {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}

    @classmethod
    def from_claims(
        cls, claims: Mapping[str, Any], *, kid: str | None = None, tracked: Collection[str] = ()
    ) -> TokenRef:
        """Take what Knell keeps out of a token's claims set.

        Args:
            claims: a decoded claims set. Claims that Knell does not keep are ignored.
            kid: the key that verified the token. Default that of `Claims` (what `Verifier.verify` returns), else "kid"
                among the claims.
            tracked: further claims to keep.

        Raises:
            InvalidClaims: a claim is missing, has the wrong type, or is out of range.
        """
        if not isinstance(claims, Mapping):
            raise InvalidClaims(f"claims must be a mapping, not {type(claims).__name__}")
        if kid is None and isinstance(claims, Claims):
            kid = claims.kid
        exp = _time(claims, "exp")
        if exp is None:
            raise InvalidClaims("the token has no 'exp': Knell tracks tokens that end; add an expiry")
        return cls(
            iss=_required(claims, "iss"),
            jti=_required(claims, "jti"),
            exp=exp,
            iat=_time(claims, "iat"),
            sid=_identifier(claims, "sid"),
            sub=_identifier(claims, "sub"),
            client_id=_identifier(claims, "client_id"),
            kid=_identifier({"kid": kid} if kid is not None else claims, "kid"),
            auth_time=_time(claims, "auth_time"),
            session_exp=_time(claims, "session_exp"),
            claims=_tracked({name: claims[name] for name in tracked if name in claims}) if tracked else None,
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> TokenRef:
        """Read what `as_json` wrote. InvalidClaims if it is no such object."""
        ref = cls.from_claims(found)
        claims = found.get("claims")
        if claims is None:
            return ref
        if not isinstance(claims, Mapping):
            raise InvalidClaims(f"the tracked claims must be an object, not {type(claims).__name__}")
        return ref.replace(claims=_tracked(claims))


_FIELDS = tuple(field.name for field in fields(TokenRef))


def comparable(value: object) -> bool:
    """Whether a claim's value can be compared: text, a whole number, true or false (and no number of other kinds)."""
    return isinstance(value, str | int)


def same_value(one: object, other: object) -> bool:
    """Whether two values of claims are the same; true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def values_of(claim: object) -> list[Any]:
    """The values that a claim has: the members of a list (such as `aud`), or the one value."""
    return claim if isinstance(claim, list) else [claim]


def check_claim_value(name: str, value: object) -> ClaimValue:
    """A value that can be compared, of at most 256 bytes; InvalidClaims otherwise."""
    if isinstance(value, str):
        return check_identifier(name, value)
    if not isinstance(value, int):
        raise InvalidClaims(f"{name!r} is of type {type(value).__name__}; only text, whole numbers, true and false do")
    if abs(value) >= 2**53:
        raise InvalidClaims(f"{name!r} is a number that JSON does not keep exactly; it must be below 2**53")
    return value


def _tracked(claims: Mapping[str, Any]) -> dict[str, ClaimValue | list[ClaimValue]] | None:
    kept: dict[str, ClaimValue | list[ClaimValue]] = {}
    for name, claim in claims.items():
        check_identifier("a claim's name", name)
        if isinstance(claim, list):
            kept[name] = [check_claim_value(name, value) for value in claim if comparable(value)]
        elif comparable(claim):
            kept[name] = check_claim_value(name, claim)
    if len(json.dumps(kept)) > MAX_TRACKED_BYTES:
        raise InvalidClaims(
            f"the tracked claims {', '.join(sorted(kept))} take more than {MAX_TRACKED_BYTES} bytes; track fewer "
            "(KNELL_TRACKED_CLAIMS)"
        )
    return kept or None


def check_identifier(name: str, value: object) -> str:
    """A non-empty string of at most 256 bytes in UTF-8, with no control characters; InvalidClaims otherwise."""
    if not isinstance(value, str):
        raise InvalidClaims(f"{name!r} must be a string, not {type(value).__name__}")
    if not value:
        raise InvalidClaims(f"{name!r} is empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidClaims(f"{name!r} is not valid Unicode text") from None
    if size > MAX_ID_BYTES:
        raise InvalidClaims(f"{name!r} is {size} bytes long; the limit is {MAX_ID_BYTES}")
    if any(ord(character) < 0x20 or ord(character) == 0x7F for character in value):
        raise InvalidClaims(f"{name!r} contains a control character")
    return value


def check_time(name: str, value: object) -> float:
    """A finite number of Unix seconds, not negative and before the year 36812; InvalidClaims otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidClaims(f"{name!r} must be a number of Unix seconds, not {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidClaims(f"{name!r} is {value}; it must be a finite number of Unix seconds")
    if not 0 <= value < MAX_TIME:
        # A whole number may have more digits than Python agrees to print.
        shown = f"{value}" if abs(value) < MAX_SHOWN else "far out of range"
        raise InvalidClaims(f"{name!r} is {shown}, which is no time in Unix seconds (milliseconds, perhaps?)")
    return float(value)


def _required(claims: Mapping[str, Any], name: str) -> str:
    if claims.get(name) is None:
        raise InvalidClaims(f"the token has no {name!r}; (iss, jti) is how Knell names a token, so both are needed")
    return check_identifier(name, claims[name])


def _identifier(claims: Mapping[str, Any], name: str) -> str | None:
    return None if claims.get(name) is None else check_identifier(name, claims[name])


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    return None if claims.get(name) is None else check_time(name, claims[name])
