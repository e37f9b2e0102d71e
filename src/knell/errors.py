"""Every error that Knell raises. The root is KnellError; what an error knows is on its attributes too."""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote


class KnellError(Exception):
    """The root of every error that Knell raises by itself."""


class InvalidInput(KnellError, ValueError):
    """Something that the caller gave cannot be used. Nothing was changed; the text says what to do."""


class InvalidClaims(InvalidInput):
    """Claims that Knell cannot track: no jti, no exp, an exp that is not a number, a value too long, and so on."""


class InvalidRevocation(InvalidInput):
    """A revocation that cannot be recorded: an unknown scope, an empty match, a cut-off in the future, and so on."""


class ConfirmationNeeded(InvalidRevocation):
    """A revocation would end many sessions, or nobody knows how many, and was not confirmed. Nothing was changed.

    Attributes:
        confirm: what has to be passed as `confirm`.
        sessions: how many sessions it would end, as far as that was counted; None if it cannot be known.
        complete: False if there may be more.
    """

    def __init__(self, confirm: str, *, limit: int, sessions: int | None, complete: bool) -> None:
        found = "it cannot be known how many" if sessions is None else f"{sessions}{'' if complete else ' or more'}"
        super().__init__(
            f"sessions that it would end: {found}; more than {limit} (KNELL_CONFIRM_SESSIONS) have to be "
            f"confirmed by name: if that is meant, pass confirm={confirm!r} (`--confirm {quote(confirm)}`)"
        )
        self.confirm = confirm
        self.sessions = sessions
        self.complete = complete


class InvalidSettings(InvalidInput):
    """A setting (`KNELL_*`, or an argument in its place) has a value that cannot be used."""


class UnknownService(InvalidInput):
    """A service name that is not registered. `knell services add NAME` registers one."""


class TokenRefused(KnellError):
    """A verifier does not accept a token. The subclass says why."""


class TokenInvalid(TokenRefused):
    """A token is malformed, its signature does not verify, or a claim is not what the verifier asks for."""


class TokenExpired(TokenRefused):
    """A token's `exp` (or its session's `session_exp`) has passed."""


class TokenRevoked(TokenRefused):
    """A token is on the denylist.

    Attributes:
        revocation_id: the id of the revocation that refuses it.
        reason: why, as given by whoever revoked; None if nothing was given.
    """

    def __init__(self, revocation_id: str, reason: str | None) -> None:
        super().__init__(f"the token was revoked by {revocation_id}" + (f": {reason}" if reason else ""))
        self.revocation_id = revocation_id
        self.reason = reason


class NotDecided(TokenRefused):
    """The verifier cannot tell now whether a token is good, and the token may be: try again later (HTTP 503)."""


class KeysUnavailable(NotDecided):
    """The verifier has no keys to check with: none were fetched yet, or the last ones are older than they may get."""


class DenylistStale(NotDecided):
    """The verifier has been out of contact with the store for longer than its policy allows.

    Attributes:
        staleness_seconds: how old the denylist is; infinite before the first contact.
        limit_seconds: the policy's limit.
    """

    def __init__(self, staleness_seconds: float, limit_seconds: float) -> None:
        super().__init__(
            f"the denylist is {staleness_seconds:.1f} s old and the policy allows {limit_seconds:g} s; "
            "is the store reachable from this process?"
        )
        self.staleness_seconds = staleness_seconds
        self.limit_seconds = limit_seconds


class SessionRevoked(KnellError):
    """issue, track or refresh met a token or session that is on the denylist. The token is not tracked.

    Attributes:
        revocation_id: the id of the revocation.
        reason: why; None if nothing was given.
    """

    def __init__(self, revocation_id: str, reason: str | None) -> None:
        super().__init__(f"the session was revoked by {revocation_id}" + (f": {reason}" if reason else ""))
        self.revocation_id = revocation_id
        self.reason = reason


class KeyRevoked(SessionRevoked):
    """issue, track or refresh met a token whose signing key is revoked. Give the issuer another key."""


class SessionEnded(KnellError):
    """refresh met a session that has ended. `reopen=True` starts a new life of it.

    Attributes:
        iss: the session's issuer.
        sid: the session's id.
    """

    def __init__(self, iss: str, sid: str) -> None:
        super().__init__(f"session {sid!r} of {iss!r} has ended; log in again, or pass reopen=True to start a new life")
        self.iss = iss
        self.sid = sid


class KeptOut(KnellError):
    """A session was to be kept that hangs on something which has ended: a tombstone is there. Its client logs in again.

    Attributes:
        notice_id: the notice that told of the end.
        cause: "expired" or "revoked".
    """

    def __init__(self, notice_id: str, cause: str) -> None:
        super().__init__(f"what the session hangs on has ended ({cause}, notice {notice_id}); log in again")
        self.notice_id = notice_id
        self.cause = cause


class Unavailable(KnellError):
    """Something outside of the process did not answer in time. Nothing is known to have been recorded; try again."""


class StoreUnavailable(Unavailable):
    """The store did not answer, or refused."""


class BrokerUnavailable(Unavailable):
    """The broker did not take a message: no connection, no confirm in time, unroutable, or nacked."""


class CursorLost(KnellError):
    """The change feed cannot be read on from a cursor: it was trimmed past it, or the store lost data. Take a snapshot.

    Attributes:
        went_back: True if the head is behind the cursor or the store was emptied: data was lost.
    """

    def __init__(self, text: str, *, went_back: bool) -> None:
        super().__init__(text)
        self.went_back = went_back


class NotDue(KnellError):
    """An expiry second was claimed before its time by the store's clock.

    Attributes:
        wait_seconds: how long until it is due, by the store's clock.
    """

    def __init__(self, second: int, wait_seconds: float) -> None:
        super().__init__(f"second {second} is due in {wait_seconds:.3f} s")
        self.second = second
        self.wait_seconds = wait_seconds


class MessageRefused(KnellError):
    """A message from the broker is not one that Knell acts on: undecodable, forged, expired, from the wrong party."""


class GiveUp(KnellError):
    """Raised by a handler: this notice can never be handled here, park it now instead of trying again."""


class TryLater(KnellError):
    """Raised by a handler: try this notice again, but not before that time. Any other error is tried again sooner.

    Attributes:
        after_seconds: how long to wait at least; more than an hour counts as an hour.
    """

    def __init__(self, text: str, after_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.after_seconds = float(after_seconds)


class ProcessDied(KnellError):
    """Stands where a handler's error would: the process that called it died over it, and could not say why."""


class BatchFailed(KnellError):
    """Raised by a batch handler: only these notices failed, the others are done.

    Attributes:
        errors: the error of each failed notice, by its `Notice.id`.
    """

    def __init__(self, errors: Mapping[str, BaseException]) -> None:
        super().__init__(f"{len(errors)} notices of the batch failed")
        self.errors = dict(errors)
