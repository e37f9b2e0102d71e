"""Revocations: what is refused from now on, and the rules that say which tokens that is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from uuid6 import uuid7

from knell.errors import InvalidClaims, InvalidRevocation
from knell.settings import Rules
from knell.tokens import (
    MAX_TIME,
    ClaimValue,
    TokenRef,
    check_claim_value,
    check_identifier,
    check_time,
    same_value,
    values_of,
)

MAX_REASON_BYTES = 1024
# Notices, receipts and records are named after it, with a prefix, and their names end at 256 bytes.
MAX_REVOCATION_ID_BYTES = 200
# How many claims one revocation may ask for.
MAX_CLAIMS = 8
# How far in the future a cut-off may lie before it is a mistake and not a clock that runs ahead.
SKEW_SECONDS = 5.0
# When the entry of a key leaves: never by itself.
NEVER = MAX_TIME - 1


class Scope(StrEnum):
    """What a revocation names. Token, session and key are absolute; the others have a cut-off."""

    TOKEN = "token"  # noqa: S105 - a scope, not a secret
    SESSION = "session"
    SUBJECT = "subject"
    CLIENT = "client"
    KEY = "key"
    CLAIMS = "claims"
    ISSUER = "issuer"

    @property
    def claim(self) -> str | None:
        """What a match of this scope names: jti, sid, sub, client_id, kid or iss. None for claims: any names do."""
        return _CLAIM.get(self)

    @property
    def has_cut_off(self) -> bool:
        """True if it refuses only what began at or before `issued_before`."""
        return self not in (Scope.TOKEN, Scope.SESSION, Scope.KEY)

    @property
    def is_wide(self) -> bool:
        """True if it may name the sessions of many people: more than one token, session or subject."""
        return self not in (Scope.TOKEN, Scope.SESSION, Scope.SUBJECT)


_CLAIM = {
    Scope.TOKEN: "jti",
    Scope.SESSION: "sid",
    Scope.SUBJECT: "sub",
    Scope.CLIENT: "client_id",
    Scope.KEY: "kid",
    Scope.ISSUER: "iss",
}
# Not claims, or not of use: the issuer is always given, and a time is not one value but a range.
_NEVER_MATCHED = frozenset({"iss", "exp", "iat", "nbf", "auth_time", "session_exp", "kid"})


class InitiatingEntity(StrEnum):
    """Who asked for it (OpenID CAEP 1.0, section 2)."""

    ADMIN = "admin"
    USER = "user"
    POLICY = "policy"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """One entry of the denylist. Times are Unix seconds.

    Attributes:
        id: a UUIDv7 as text, or the caller's idempotency key.
        scope: what `match` names.
        iss: the issuer that the match belongs to.
        match: what it names: {"jti": ...}, {"sid": ...}, {"sub": ...}, {"client_id": ...}, {"kid": ...}, {"iss": ...};
            of scope claims one to eight claims and their values, all of which a token must have. A claim that is a
            list has each value in it.
        made_at: when it was made, by the clock of whoever made it.
        expires_at: when it may leave the denylist, because no token that it refuses can still be alive.
        issued_before: the cut-off of a wide scope: what began at or before it is refused. None where it is absolute.
        ends: "token", "session", or both: what its notice tells services to end.
        reason: why; shown to whoever is refused.
        initiating_entity: who asked for it.
    """

    id: str
    scope: Scope
    iss: str
    match: Mapping[str, ClaimValue]
    made_at: float
    expires_at: float
    issued_before: float | None = None
    ends: frozenset[str] = frozenset({"token", "session"})
    reason: str | None = None
    initiating_entity: InitiatingEntity = InitiatingEntity.ADMIN

    @property
    def value(self) -> str:
        """What it matches, as text: the jti, the sid and so on; of scope claims their JSON, in the order of names."""
        claim = self.scope.claim
        return written_claims(self.match) if claim is None else str(self.match[claim])

    def names(self, token: TokenRef, claims: Mapping[str, Any] | None = None) -> bool:
        """Whether its match is that of a token, whatever the cut-off.

        Args:
            token: the token.
            claims: its claims set, where that is at hand. Default: what the token's reference has of it.
        """
        if self.iss != token.iss:
            return False
        claim = self.scope.claim
        if claim is None:
            return has_claims(claims_of(token) if claims is None else claims, self.match)
        return bool(getattr(token, claim) == self.match[claim])

    def refuses(
        self, token: TokenRef, *, started: float | None = None, claims: Mapping[str, Any] | None = None
    ) -> bool:
        """Whether it refuses a token.

        Args:
            token: the token.
            started: the start of its session where the store knows an earlier one than the token tells.
            claims: see `names`.
        """
        if not self.names(token, claims):
            return False
        if self.issued_before is None:
            return True
        return began_by(self.issued_before, token.auth_time if token.auth_time is not None else started, token.iat)

    def as_json(self) -> dict[str, Any]:
        """A JSON object, as commands, stores and `--json` write it."""
        found: dict[str, Any] = {
            "id": self.id,
            "scope": self.scope.value,
            "iss": self.iss,
            "match": dict(self.match),
            "made_at": self.made_at,
            "expires_at": self.expires_at,
            "ends": sorted(self.ends),
            "initiating_entity": self.initiating_entity.value,
        }
        if self.issued_before is not None:
            found["issued_before"] = self.issued_before
        if self.reason is not None:
            found["reason"] = self.reason
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Revocation:
        """Read what `as_json` wrote. Unknown fields are ignored; InvalidRevocation if it is not a revocation."""
        try:
            scope = Scope(found["scope"])
            cut_off = found.get("issued_before")
            if scope.has_cut_off != (cut_off is not None):
                raise InvalidRevocation(f"scope {scope} and issued_before {cut_off!r} do not go together")
            iss = check_identifier("iss", found["iss"])
            return cls(
                id=_check_id(found["id"]),
                scope=scope,
                iss=iss,
                match=_check_match(scope, found["match"], iss),
                made_at=check_time("made_at", found["made_at"]),
                expires_at=check_time("expires_at", found["expires_at"]),
                issued_before=None if cut_off is None else check_time("issued_before", cut_off),
                ends=frozenset(end for end in found["ends"] if end in ("token", "session")),
                reason=None if found.get("reason") is None else check_reason(found["reason"]),
                initiating_entity=InitiatingEntity(found["initiating_entity"]),
            )
        except InvalidRevocation:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidRevocation(f"not a revocation: {error!r}") from None


def began_by(cut_off: float, started: float | None, iat: float | None) -> bool:
    """Whether something that began at `started` falls under a cut-off. Equal does, and so does an unknown start.

    Args:
        cut_off: Unix seconds.
        started: the start of the session: its auth_time, else the first iat that the store saw; None if unknown.
        iat: the token's own iat; decides when `started` is unknown, or is a whole second equal to the cut-off's second
            (an auth_time is often cut to the second, and would then always count as older).
    """
    whole_second = started is not None and started == math.floor(started) == math.floor(cut_off)
    if started is None or (whole_second and iat is not None):
        started = iat
    return started is None or started <= cut_off


def named_by(token: TokenRef) -> Iterator[tuple[Scope, str]]:
    """What a token is named by: its jti, sid, sub, client_id, kid and iss, those that it has, each with its scope."""
    for scope, claim in _CLAIM.items():
        value = getattr(token, claim)
        if value:
            yield scope, value


def claims_of(token: TokenRef) -> dict[str, Any]:
    """The claims that are known of a token from its reference alone."""
    found: dict[str, Any] = dict(token.claims or {})
    for name in ("jti", "sid", "sub", "client_id"):
        if (value := getattr(token, name)) is not None:
            found[name] = value
    return found


def has_claims(claims: Mapping[str, Any], match: Mapping[str, ClaimValue]) -> bool:
    """Whether a claims set has every claim of a match, with its value or with that value in its list."""
    return all(
        name in claims and any(same_value(value, wanted) for value in values_of(claims[name]))
        for name, wanted in match.items()
    )


def written_claims(match: Mapping[str, ClaimValue]) -> str:
    """The match of scope claims as text, the same for the same claims."""
    return json.dumps(dict(match), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def make_revocation(
    scope: str,
    match: Mapping[str, ClaimValue],
    *,
    iss: str,
    now: float,
    rules: Rules,
    id: str | None = None,
    exp: float | None = None,
    issued_before: float | None = None,
    ends: frozenset[str] = frozenset({"token", "session"}),
    reason: str | None = None,
    initiating_entity: str = "admin",
) -> Revocation:
    """Check everything and make a revocation; its id is a new UUIDv7 unless one is given.

    Args:
        scope: "token", "session", "subject", "client", "key", "claims" or "issuer".
        match: exactly the one claim of that scope, for example {"sub": "alice"}; for claims one to eight of them. For
            issuer {"iss": iss}.
        id: at most 200 bytes in UTF-8.
        now: the moment it is made, Unix seconds.
        exp: of scope token, its exp where that is known: the entry can then leave the denylist early.
        issued_before: the cut-off, where the scope has one; default `now`.

    Raises:
        InvalidRevocation: says what was found and what to do.
    """
    try:
        known = Scope(scope)
    except ValueError:
        raise InvalidRevocation(f"unknown scope {scope!r}; use one of {', '.join(Scope)}") from None
    try:
        check_identifier("iss", iss)
        checked = _check_match(known, match, iss)
        if id is not None:
            _check_id(id)
        if issued_before is not None:
            check_time("issued_before", issued_before)
        if exp is not None:
            check_time("exp", exp)
    except InvalidClaims as error:
        raise InvalidRevocation(str(error)) from None
    if issued_before is not None:
        if not known.has_cut_off:
            raise InvalidRevocation(f"scope {known} is absolute and has no issued_before; leave it out")
        if issued_before > now + SKEW_SECONDS:
            raise InvalidRevocation(
                f"issued_before is {issued_before - now:.0f} s in the future; it would end sessions that have not begun"
            )
    if exp is not None and known is not Scope.TOKEN:
        raise InvalidRevocation(f"exp is a token's end, and scope {known} names more than a token; leave it out")
    entity = check_entity(initiating_entity)
    if reason is not None:
        check_reason(reason)
    cut_off = (now if issued_before is None else issued_before) if known.has_cut_off else None
    return Revocation(
        id=id or str(uuid7()),
        scope=known,
        iss=iss,
        match=checked,
        made_at=now,
        expires_at=_leaves_at(known, made_at=now, cut_off=cut_off, exp=exp, rules=rules),
        issued_before=cut_off,
        ends=ends if known is Scope.TOKEN else frozenset({"session", "token"}),
        reason=reason,
        initiating_entity=entity,
    )


def revocation_of_refreshed(token: TokenRef, refused_by: Revocation, *, now: float, rules: Rules) -> Revocation:
    """The revocation, by name, of a token that carries a dead session on and does not show how old that session is."""
    return make_revocation(
        Scope.TOKEN,
        {"jti": token.jti},
        iss=token.iss,
        now=now,
        rules=rules,
        exp=token.exp,
        ends=frozenset({"token"}),
        reason=refused_by.reason,
        initiating_entity=refused_by.initiating_entity,
    )


def _check_match(scope: Scope, match: Any, iss: str) -> dict[str, ClaimValue]:
    claim = scope.claim
    if not isinstance(match, Mapping) or not match:
        raise InvalidRevocation(f"the match is empty; scope {scope} needs {{{claim or 'name'!r}: ...}}")
    if claim is None:
        return check_claims(match)
    if set(match) != {claim}:
        raise InvalidRevocation(f"scope {scope} matches by {claim!r} alone, not by {', '.join(map(repr, match))}")
    value = check_identifier(claim, match[claim])
    if scope is Scope.ISSUER and value != iss:
        raise InvalidRevocation(f"the match names issuer {value!r}, and the revocation is of {iss!r}; they must agree")
    return {claim: value}


def check_claims(match: Mapping[Any, Any]) -> dict[str, ClaimValue]:
    """The match of scope claims, checked: one to eight claims and their values; InvalidInput otherwise."""
    if not isinstance(match, Mapping) or not match:
        raise InvalidRevocation("the match of scope claims must be an object of one claim or more")
    if len(match) > MAX_CLAIMS:
        raise InvalidRevocation(f"the match has {len(match)} claims; the limit is {MAX_CLAIMS}")
    if unfit := sorted(_NEVER_MATCHED.intersection(match)):
        raise InvalidRevocation(f"scope claims does not match by {unfit[0]!r}; use another scope, or issued_before")
    return {
        check_identifier("a claim's name", name): check_claim_value(str(name), value) for name, value in match.items()
    }


def _leaves_at(scope: Scope, *, made_at: float, cut_off: float | None, exp: float | None, rules: Rules) -> float:
    if scope is Scope.TOKEN:
        return (made_at + rules.max_token_seconds if exp is None else exp) + rules.leeway_seconds
    if scope is Scope.KEY:
        return NEVER
    last_start = made_at if cut_off is None else cut_off
    return last_start + rules.max_session_seconds + rules.max_token_seconds + rules.leeway_seconds


def _check_id(id: object) -> str:
    known = check_identifier("id", id)
    if (size := len(known.encode())) > MAX_REVOCATION_ID_BYTES:
        raise InvalidRevocation(f"the id is {size} bytes long; the limit is {MAX_REVOCATION_ID_BYTES}")
    return known


def check_entity(initiating_entity: str) -> InitiatingEntity:
    """Who asked for something; InvalidRevocation if it is none of the known."""
    try:
        return InitiatingEntity(initiating_entity)
    except ValueError:
        allowed = ", ".join(InitiatingEntity)
        raise InvalidRevocation(f"unknown initiating_entity {initiating_entity!r}; use one of {allowed}") from None


def check_reason(reason: object) -> str:
    """A text of at most 1024 bytes in UTF-8; InvalidRevocation otherwise."""
    if not isinstance(reason, str):
        raise InvalidRevocation(f"reason must be a string, not {type(reason).__name__}")
    try:
        size = len(reason.encode())
    except UnicodeEncodeError:
        raise InvalidRevocation("reason is not valid Unicode text") from None
    if size > MAX_REASON_BYTES:
        raise InvalidRevocation(f"reason is {size} bytes long; the limit is {MAX_REASON_BYTES}")
    return reason
