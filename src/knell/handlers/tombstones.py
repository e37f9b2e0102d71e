"""Names that a notice may call a session by, and tombstones: what keeps a request in flight from re-creating one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from knell.notices import Cause, Notice
from knell.revocations import Scope, claims_of
from knell.settings import Rules
from knell.tokens import ClaimValue, TokenRef, values_of

# Longer than a request is in flight between the check of its token and the session that it opens.
IN_FLIGHT_SECONDS = 600.0


def names_of(token: TokenRef) -> list[str]:
    """Every name that a notice may call a session by, which hangs on this token. Short, and no personal data."""
    claims: dict[str, object] = {"iss": token.iss, **claims_of(token)}
    if token.kid is not None:
        claims["kid"] = token.kid
    return sorted({_name(token.iss, claim, value) for claim, found in claims.items() for value in values_of(found)})


def names_in(notice: Notice) -> list[str]:
    """What a notice calls the sessions that it ends by: each of them has one of these among its own names.

    Of scope claims, which is an AND, the first one is enough: `Notice.matches` decides.
    """
    if notice.scope is Scope.CLAIMS:
        return [_name(notice.iss, claim, value) for claim, value in sorted((notice.claims or {}).items())[:1]]
    claim = notice.scope.claim
    assert claim is not None
    found = [_name(notice.iss, claim, getattr(notice, claim))]
    if notice.scope is Scope.TOKEN and notice.sid is not None and "session" in notice.ends:
        found.append(_name(notice.iss, "sid", notice.sid))
    return found


def buried_under(notice: Notice) -> list[str]:
    """The names that its tombstone lies under. Ends by time are many, and there the last one is enough: with the sid
    every token of the session has it, the one that has ended too.
    """  # fmt: skip
    return names_in(notice)[-1:] if notice.cause is Cause.EXPIRED else names_in(notice)


def kept_until(notice: Notice, rules: Rules) -> float:
    """Until when a tombstone is needed, Unix seconds: then no token that it keeps out can be accepted any more.

    A token that has expired is refused by everybody from its exp on, so what may still come is what is in flight. What
    was revoked may be accepted, by whoever does not look at a denylist, for as long as it lives: the tombstone then
    stays as long as the entry of the denylist does (one of a key, for as long as one of an issuer).
    """
    if notice.cause is Cause.EXPIRED:
        last = notice.at if notice.scope is Scope.TOKEN else notice.at + rules.max_token_seconds
    elif notice.scope is Scope.TOKEN and "session" not in notice.ends:
        last = notice.at + rules.max_token_seconds if notice.exp is None else notice.exp
    else:
        began = notice.at if notice.issued_before is None else notice.issued_before
        last = began + rules.max_session_seconds + rules.max_token_seconds
    return last + rules.leeway_seconds + IN_FLIGHT_SECONDS


def written(notice: Notice) -> str:
    """A tombstone: the notice itself, so that `Notice.matches` decides whom it keeps out. The same for every copy."""
    return json.dumps([notice.batch_id, notice.as_json()], sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def that_keeps_out(token: TokenRef, tombstones: Iterable[str]) -> Notice | None:
    """The first notice that says that the token's session has ended; None if none does."""
    return next((notice for notice in map(_read, tombstones) if notice.matches(token)), None)


def of_revocation(undone: Notice, tombstones: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Those that a revocation has left which was undone, each with the names that it lies under."""
    found = [(text, _read(text)) for text in tombstones]
    return [(text, buried_under(each)) for text, each in found if each.revocation_id == undone.revocation_id]


def _read(text: str) -> Notice:
    return Notice.from_json(*json.loads(text))


def _name(iss: str, claim: str, value: ClaimValue) -> str:
    # A hash: an iss, a name and a value may be long, and the index is no place for people's identifiers.
    return hashlib.sha256(json.dumps([claim, iss, value]).encode()).hexdigest()[:32]
