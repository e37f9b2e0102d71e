"""Notices: what a service is told. And receipts: what it answers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from uuid6 import uuid7

from knell.errors import InvalidInput, MessageRefused
from knell.revocations import (
    InitiatingEntity,
    Revocation,
    Scope,
    began_by,
    check_claims,
    check_reason,
    claims_of,
    has_claims,
)
from knell.tokens import ClaimValue, TokenRef, check_identifier, check_time

VERSION = 1
# What one expiry message carries at most: large enough to make the signature and the receipt cheap, small enough that
# a message stays far below any broker's limit.
MAX_ENTRIES = 500


class Cause(StrEnum):
    """Why an entry is told. `missed` is told to one service: notices were dropped before it came back for them."""

    EXPIRED = "expired"
    REVOKED = "revoked"
    UNDONE = "undone"
    MISSED = "missed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """One thing that has ended, as a handler receives it. Times are Unix seconds.

    Attributes:
        batch_id: the id of the record in the notice log that it belongs to.
        n: its place in that record; `id` is made of both.
        cause: expired, revoked, undone or missed.
        ends: "token", "session" or both.
        scope: what it names: a token, a session, or all of a subject's, a client's, a key's, an issuer's, or all that
            have certain claims.
        at: the moment of the end: the exp, or when the revocation was made. For `missed`: since when.
        iss: the issuer of what has ended. For `missed`: empty.
        jti, sid, sub, client_id, kid: what is known of it; a notice of scope session may know only the sid.
        claims: of scope claims, the claims and their values, all of which a token must have.
        exp: the token's exp, where one token is meant.
        started: the start of its session, where known.
        issued_before: the cut-off of a wide scope.
        revocation_id, reason, initiating_entity: of a revocation.
    """

    batch_id: str
    n: int = 0
    cause: Cause
    ends: frozenset[str]
    scope: Scope
    at: float
    iss: str
    jti: str | None = None
    sid: str | None = None
    sub: str | None = None
    client_id: str | None = None
    kid: str | None = None
    claims: Mapping[str, ClaimValue] | None = field(default=None, hash=False)
    exp: float | None = None
    started: float | None = None
    issued_before: float | None = None
    revocation_id: str | None = None
    reason: str | None = None
    initiating_entity: InitiatingEntity | None = None

    @property
    def id(self) -> str:
        """Names this notice, the same in every copy of it: a handler may use it as an idempotency key."""
        return f"{self.batch_id}.{self.n}"

    @property
    def dedupe_id(self) -> str:
        """What a service remembers the batch of this notice as.

        Of a revocation it has the issuer in it: with another issuer's id, known or guessed, nobody marks as done, or
        takes back, anything but their own. All other batches are the notifier's.
        """
        if not is_of_revocation(self.batch_id):
            return self.batch_id
        return f"{self.batch_id} {hashlib.sha256(self.iss.encode()).hexdigest()[:16]}"

    def matches(self, session: TokenRef) -> bool:
        """Whether a session that a service keeps is ended by this notice.

        Keep a TokenRef (iss, jti, sid, sub, client_id, kid, iat, auth_time, and the claims that you revoke by) with
        each session. A session that began after the end that this notice tells of is not matched, so that a late copy
        ends nothing new.
        """
        if self.iss != session.iss:
            return False
        if self.scope is Scope.TOKEN and self.jti == session.jti:
            return True
        if "session" not in self.ends:
            return False
        if self.scope is Scope.KEY:
            return self.kid is not None and self.kid == session.kid
        if self.issued_before is not None:
            return self._names(session) and began_by(self.issued_before, session.auth_time, session.iat)
        if self.sid is None or self.sid != session.sid:
            return False
        # A revoked session stays refused whenever it says that it began; after an end by time, a new life may begin.
        return self.cause is Cause.REVOKED or session.started is None or session.started <= self.at

    def _names(self, session: TokenRef) -> bool:
        claim = self.scope.claim
        if claim is None:
            return self.claims is not None and has_claims(claims_of(session), self.claims)
        named = getattr(self, claim)
        return named is not None and bool(getattr(session, claim) == named)

    def as_json(self) -> dict[str, Any]:
        """The entry as it stands on the wire: what is None is left out."""
        found: dict[str, Any] = {
            "n": self.n,
            "cause": self.cause.value,
            "ends": sorted(self.ends),
            "scope": self.scope.value,
            "at": self.at,
            "iss": self.iss,
        }
        for name in _OPTIONAL:
            if (value := getattr(self, name)) is not None:
                found[name] = value
        return found

    @classmethod
    def from_json(cls, batch_id: str, found: Mapping[str, Any]) -> Notice:
        """Read what `as_json` wrote; unknown fields are ignored. MessageRefused if it is not a notice."""
        try:
            n = found["n"]
            if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < MAX_ENTRIES:
                raise MessageRefused(f"entry number {n!r} is not between 0 and {MAX_ENTRIES - 1}")
            cause = Cause(found["cause"])
            entity = found.get("initiating_entity")
            return cls(
                batch_id=batch_id,
                n=n,
                cause=cause,
                ends=frozenset(end for end in found["ends"] if end in ("token", "session")),
                scope=Scope(found["scope"]),
                at=check_time("at", found["at"]),
                iss="" if cause is Cause.MISSED else check_identifier("iss", found["iss"]),
                **_present(found, _IDS, check_identifier),
                **_present(found, _TIMES, check_time),
                claims=None if found.get("claims") is None else check_claims(found["claims"]),
                reason=None if found.get("reason") is None else check_reason(found["reason"]),
                initiating_entity=None if entity is None else InitiatingEntity(entity),
            )
        except MessageRefused:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MessageRefused(f"not a notice: {error!r}") from None

    @classmethod
    def of_revocation(cls, revocation: Revocation, token: TokenRef | None = None) -> Notice:
        """The one notice of a revocation; `token` is what the store knows of a revoked token."""
        known: dict[str, Any] = {"iss": revocation.iss}
        if token is not None:
            known |= {"jti": token.jti, "sid": token.sid, "sub": token.sub, "exp": token.exp}
        known |= {"claims": revocation.match} if revocation.scope is Scope.CLAIMS else revocation.match
        return cls(
            batch_id=batch_id_of_revocation(revocation.id),
            cause=Cause.REVOKED,
            ends=revocation.ends,
            scope=revocation.scope,
            at=revocation.made_at,
            **known,
            issued_before=revocation.issued_before,
            revocation_id=revocation.id,
            reason=revocation.reason,
            initiating_entity=revocation.initiating_entity,
        )

    @classmethod
    def of_undo(
        cls, revocation: Revocation, *, at: float, reason: str | None, initiating_entity: InitiatingEntity
    ) -> Notice:
        """The one notice that a revocation was undone: it ends nothing, and has the waiting notice of that one dropped.

        Args:
            at: when it was undone, Unix seconds.
            reason: why it was undone.
            initiating_entity: who undid it.
        """
        return replace(
            cls.of_revocation(revocation),
            batch_id=batch_id_of_undo(revocation.id),
            cause=Cause.UNDONE,
            ends=frozenset(),
            at=at,
            reason=reason,
            initiating_entity=initiating_entity,
        )


def _present(found: Mapping[str, Any], names: Iterable[str], check: Callable[[str, object], Any]) -> dict[str, Any]:
    return {name: check(name, found[name]) for name in names if found.get(name) is not None}


_IDS = ("jti", "sid", "sub", "client_id", "kid", "revocation_id")
_TIMES = ("exp", "started", "issued_before")
_OPTIONAL = (*_IDS, *_TIMES, "claims", "reason", "initiating_entity")


@dataclass(frozen=True, slots=True, kw_only=True)
class NoticeBatch:
    """One message to services: up to 500 notices under one id and one signature.

    Attributes:
        id: names the record in the notice log; the same each time it is sent.
        entries: the notices. Their numbers may have gaps.
        issued_at, expires_at: Unix seconds; a service refuses a batch after expires_at.
    """

    id: str
    entries: Sequence[Notice]
    issued_at: float
    expires_at: float

    def as_payload(self, *, signer: str, audience: str) -> dict[str, Any]:
        """The payload of its JWS. `signer` is the `iss` of the message, which need not be that of the tokens."""
        return {
            "v": VERSION,
            "iss": signer,
            "aud": audience,
            "iat": self.issued_at,
            "id": self.id,
            "expires_at": self.expires_at,
            "entries": [entry.as_json() for entry in self.entries],
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> NoticeBatch:
        """Read the payload of a JWS whose signature was checked; MessageRefused if it is not a batch of notices."""
        if not isinstance(payload, Mapping):
            raise MessageRefused("not a batch of notices: the payload is no JSON object")
        try:
            if payload.get("v") != VERSION:
                raise MessageRefused(f"notice version {payload.get('v')!r} is not known here (known: {VERSION})")
            batch_id = check_identifier("id", payload["id"])
            entries = payload["entries"]
            if not isinstance(entries, list) or not 0 < len(entries) <= MAX_ENTRIES:
                raise MessageRefused(f"a batch of notices must have 1 to {MAX_ENTRIES} entries")
            notices = tuple(Notice.from_json(batch_id, entry) for entry in entries)
            if len({notice.n for notice in notices}) != len(notices):
                raise MessageRefused("two entries of a batch have the same number")
            return cls(
                id=batch_id,
                entries=notices,
                issued_at=check_time("iat", payload["iat"]),
                expires_at=check_time("expires_at", payload["expires_at"]),
            )
        except (KeyError, TypeError, InvalidInput) as error:
            raise MessageRefused(f"not a batch of notices: {error!r}") from None


def batch_id_of_revocation(revocation_id: str) -> str:
    """The id of the notice-log record of a revocation."""
    return f"r-{revocation_id}"


def batch_id_of_undo(revocation_id: str) -> str:
    """The id of the notice-log record that tells that a revocation was undone."""
    return f"u-{revocation_id}"


def is_of_revocation(batch_id: str) -> bool:
    """Whether a batch is that of a revocation, or of its undo: an issuer signs it, and it has one entry."""
    return batch_id.startswith(("r-", "u-"))


def new_batch_id(kind: str, partition: int = 0) -> str:
    """A fresh id for a notice-log record that is not a revocation's: kind "e" (expiry) or "m" (missed).

    The partition is part of it, so that a receipt finds its record without a search.
    """
    return f"{kind}{partition}-{uuid7()}"


def partition_of_batch(batch_id: str) -> int | None:
    """The partition that holds an expiry record; None for one that lives beside the feed.

    Raises:
        MessageRefused: it is not a batch id.
    """
    kind, dash, _ = batch_id.partition("-")
    if dash and kind[:1] == "e" and kind[1:].isascii() and kind[1:].isdigit():
        return int(kind[1:])
    if dash and (kind in ("r", "u") or kind[:1] == "m"):
        return None
    raise MessageRefused(f"{batch_id[:64]!r} is no id of a notice batch")


class Outcome(StrEnum):
    """What became of an entry in one service."""

    DONE = "done"
    PARKED = "parked"
    RETRYING = "retrying"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a service answers to one batch: for each entry done, parked, or retrying.

    The service's name is not in it: it is the routing key of the message, which the broker checks.

    Attributes:
        batch_id: the batch.
        done, parked, retrying: entry numbers; an entry stands in one of them.
        until: when the next retry is due, Unix seconds; None when nothing is retrying.
        at: when it was written, by the service's clock.
    """

    batch_id: str
    at: float
    done: Sequence[int] = ()
    parked: Sequence[int] = ()
    retrying: Sequence[int] = ()
    until: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The body of the message."""
        return {
            "v": VERSION,
            "batch_id": self.batch_id,
            "at": self.at,
            "done": list(self.done),
            "parked": list(self.parked),
            "retrying": list(self.retrying),
            "until": self.until,
        }

    @classmethod
    def from_json(cls, found: object) -> Receipt:
        """Read a message body; MessageRefused if it is not a receipt."""
        if not isinstance(found, Mapping) or found.get("v") != VERSION:
            raise MessageRefused("not a receipt of a known version")
        try:
            batch_id = check_identifier("batch_id", found["batch_id"])
            partition_of_batch(batch_id)
            return cls(
                batch_id=batch_id,
                at=check_time("at", found["at"]),
                done=entry_numbers(found["done"]),
                parked=entry_numbers(found["parked"]),
                retrying=entry_numbers(found["retrying"]),
                until=None if found.get("until") is None else check_time("until", found["until"]),
            )
        except (KeyError, TypeError, InvalidInput) as error:
            raise MessageRefused(f"not a receipt: {error!r}") from None


def entry_numbers(found: Iterable[Any]) -> tuple[int, ...]:
    """Entry numbers from the wire, checked; MessageRefused otherwise."""
    numbers = tuple(found) if isinstance(found, list | tuple) else None
    if (
        numbers is None
        or len(numbers) > MAX_ENTRIES
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < MAX_ENTRIES for n in numbers)
    ):
        raise MessageRefused(f"entry numbers must be a list of at most {MAX_ENTRIES} numbers below {MAX_ENTRIES}")
    return numbers


def describe(notices: Sequence[Notice]) -> str:
    """Notices for Flower and logs, without personal data: "revoked 1 subject (admin)", "expired 12 tokens"."""
    found = Counter((notice.cause.value, notice.scope.value, notice.initiating_entity) for notice in notices)
    parts = []
    for (cause, scope, entity), count in sorted(found.items(), key=str):
        counted = f"{count} set{'' if count == 1 else 's'} of" if scope == Scope.CLAIMS else str(count)
        plural = "" if count == 1 or scope == Scope.CLAIMS else "s"
        parts.append(f"{cause} {counted} {scope}{plural}" + (f" ({entity.value})" if entity is not None else ""))
    return ", ".join(parts)
