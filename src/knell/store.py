"""What Knell asks of a store. Implementations: `knell.stores.sql`, `knell.stores.redis`; open one with `open_store`.

Every time is Unix seconds by the *store's* clock unless a docstring says otherwise: that clock decides what is due.
Every method may raise StoreUnavailable, within the store's time-out, and has then changed nothing that it knows of;
repeating the call is always safe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from uuid6 import uuid7

from knell.errors import InvalidSettings
from knell.notices import Receipt
from knell.revocations import InitiatingEntity, Revocation
from knell.settings import REDIS_SCHEMES, STORE_SCHEMES, Rules
from knell.tokens import TokenRef

# A publisher that got "must arm" has this long to have the timer confirmed before another caller is told the same.
ARM_LEASE_SECONDS = 2.0
# What is due this soon is published with no delay, whatever is armed: a timer could come too late.
IMMEDIATE_SECONDS = 1.0
# The notice log waits this long for receipts before it sends again, then doubles, up to the second.
FIRST_RESEND_SECONDS = 30.0
LONGEST_RESEND_SECONDS = 3600.0
# How long a receipt that says "retrying until t" keeps the sweep away, beyond t.
RETRY_MARGIN_SECONDS = 60.0
# How many changes the feed keeps for readers that fell behind; beyond it they take a snapshot.
FEED_LENGTH = 100_000


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the change feed. Positions count up by one, with no gaps, within an epoch.

    Attributes:
        epoch: names the data and the server that it lies on; see `Feed.head`.
        position: the last change that was read; 0 before the first.
        revocation_id: of the change at that position: by it a feed that lost that change, and has another one there by
            now, is noticed. None at position 0; elsewhere None leaves that unchecked.
    """

    epoch: str
    position: int
    revocation_id: str | None = None

    def after(self, change: Change) -> Cursor:
        """The place after a change that was read from here."""
        return Cursor(self.epoch, change.position, change.revocation.id)


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the change feed."""

    position: int
    kind: Literal["revoked", "undone"]
    revocation: Revocation


@dataclass(frozen=True, slots=True)
class Tracked:
    """What `track` did with one token.

    Attributes:
        ref: the token.
        must_arm: the seconds that have no timer yet; the caller publishes one for each, then calls `armed`.
        denied: the revocation that refuses it, or its predecessor; the token is then not tracked. None if it is alive.
        session_ended: True if it was to continue a session that has ended; the token is then not tracked.
        started: the start of its session as the store knows it: auth_time, else the first iat seen for (iss, sid).
    """

    ref: TokenRef
    must_arm: tuple[int, ...] = ()
    denied: Revocation | None = None
    session_ended: bool = False
    started: float | None = None


@dataclass(frozen=True, slots=True)
class Detached:
    """What `detach` found of a token that is about to be revoked.

    Attributes:
        ref: the token, if it is tracked.
        ends_session: True if it was the only live token of a session with neither session_exp nor grace.
    """

    ref: TokenRef | None
    ends_session: bool


@dataclass(frozen=True, slots=True)
class Claimed:
    """One member of a claimed expiry second.

    Attributes:
        n: its number in the record.
        ref: the token. For a session's own due entry a TokenRef whose jti is "" and whose exp is the session's end;
            with its session_exp, and with iat, sub, client_id, kid and claims of the token that told its start.
        ends: "token", "session", or both.
        started: the start of its session, where known.
    """

    n: int
    ref: TokenRef
    ends: frozenset[str]
    started: float | None


@dataclass(frozen=True, slots=True)
class Claim:
    """What one `claim` took out of an expiry second, now a record of the notice log.

    Attributes:
        batch_id: the record's id; "" if nothing was recorded (only session entries that moved).
        entries: what has ended, in the order of their numbers.
        rearm: seconds to which session entries were moved and that have no timer yet.
        more: True if the second still has members.
        closed: the numbers of the tokens whose detach had closed their session's life. Such an entry ends the session,
            should the revocation not have been made; it may be about to be recorded at this very moment.
    """

    batch_id: str
    entries: tuple[Claimed, ...]
    rearm: tuple[int, ...]
    more: bool
    closed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Waiting:
    """What one service still owes a receipt for.

    Attributes:
        todo: the entry numbers that are open; None means all of them.
        hold_until: the service said that it is retrying; do not send before then. 0 if it did not.
    """

    todo: tuple[int, ...] | None
    hold_until: float


@dataclass(frozen=True, slots=True)
class OpenNotice:
    """A record of the notice log that some service has not closed.

    Attributes:
        batch_id: its id.
        kind: "expiry", "revocation" or "missed".
        created_at: when it was recorded.
        jws: the signed notice, for a revocation; None otherwise: those are signed each time they are sent.
        entries: the members, for an expiry; empty otherwise.
        settled: for an expiry, False if nobody has yet said which entries were dead by revocation (see `settle`).
        since: for kind "missed", since when notices were dropped.
        attempts: how often it was handed out by `open_notices`.
        waiting: the services that have not closed it.
        unsent: an expiry or revocation that `resend_at(..., 0)` asked for: as far as anybody knows, no queue has it.
    """

    batch_id: str
    kind: Literal["expiry", "revocation", "missed"]
    created_at: float
    jws: str | None
    entries: tuple[Claimed, ...]
    settled: bool
    since: float | None
    attempts: int
    waiting: Mapping[str, Waiting]
    unsent: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """What `revoke` or `undo` did.

    Attributes:
        cursor: its place in the change feed.
        created: False if it was recorded before; nothing changed then.
        services: the services that its notice was recorded for.
        untold: of an undo, the services that had not closed the revocation's own notice.
        undone: of a revoke, True if it was recorded before and was undone since: it is not in force.
    """

    cursor: Cursor
    created: bool
    services: tuple[str, ...]
    untold: tuple[str, ...] = ()
    undone: bool = False


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """How far one service is with one revocation.

    Attributes:
        state: waiting, retrying, done or parked; undone, if it was undone before this service had applied it.
        at: when it said so, by the store's clock; None while waiting.
    """

    state: Literal["waiting", "retrying", "done", "parked", "undone"]
    at: float | None


@dataclass(frozen=True, slots=True)
class Counted:
    """How many live tokens, and sessions, a revocation names.

    Attributes:
        sessions: a token that has none counts as one: it is somebody's, too.
        complete: False if the store was not searched to its end: these are at least so many.
    """

    tokens: int
    sessions: int
    complete: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One thing that somebody did.

    Attributes:
        id: names the entry; a UUIDv7.
        at: when, Unix seconds.
        action: revoked, undone or replayed.
        actor: who: a name that the caller gave; None if none was given.
        initiating_entity: on whose behalf.
        reason: why; None if nothing was given.
        revocation_id: which revocation was made or undone; None for a replay.
        what: the revocation's scope, iss, match and issued_before, or the service whose entries were replayed.
        counts: how many "tokens" and "sessions" it named, or "entries" were replayed, as far as that was counted.
    """

    id: str = field(default_factory=lambda: str(uuid7()))
    at: float
    action: Literal["revoked", "undone", "replayed"]
    actor: str | None = None
    initiating_entity: InitiatingEntity = InitiatingEntity.ADMIN
    reason: str | None = None
    revocation_id: str | None = None
    what: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_revocation(cls, revocation: Revocation, *, actor: str | None, counts: Mapping[str, int]) -> AuditEntry:
        """That a revocation was made."""
        return cls(
            at=revocation.made_at,
            action="revoked",
            actor=actor,
            initiating_entity=revocation.initiating_entity,
            reason=revocation.reason,
            revocation_id=revocation.id,
            what=about(revocation),
            counts=counts,
        )

    def as_json(self) -> dict[str, Any]:
        """A JSON object, as stores and `--json` write it."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return found | {"what": dict(self.what), "counts": dict(self.counts)}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> AuditEntry:
        """Read what `as_json` wrote."""
        known = {each.name: found[each.name] for each in fields(cls) if each.name in found}
        return cls(**known | {"initiating_entity": InitiatingEntity(found["initiating_entity"])})


def about(revocation: Revocation) -> dict[str, Any]:
    """What an audit entry says of a revocation."""
    found = {"scope": revocation.scope.value, "iss": revocation.iss, "match": dict(revocation.match)}
    return found if revocation.issued_before is None else found | {"issued_before": revocation.issued_before}


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """A registered service. `missed_since`: an open "missed" record of it tells since when; None if there is none."""

    name: str
    added_at: float
    missed_since: float | None


@dataclass(frozen=True, slots=True)
class Begun:
    """What `begin` says of one (service, batch).

    Attributes:
        granted: True if the caller holds the lease and may run.
        done: bitmap of the entries whose done mark is stored (bit n is entry n).
        parked: bitmap of the entries that were parked.
        abandoned: the holder before, if its lease has run out and was never given back: that process has died over
            the batch, or was cut off. None if it was given back, or was this caller's own.
    """

    granted: bool
    done: int
    parked: int
    abandoned: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked:
    """What was given up on, kept to be looked at and replayed: a notice, a command, or a message that is neither.

    Attributes:
        id: names it: "<service>/<batch id>.<n>", or a fresh id for what is no notice.
        service: the service whose queue it came from; "" for a queue that is no service's.
        queue: the queue's name; a command's is knell.commands.
        notice_id: the notice's id; None for what is no notice.
        jws: the signed notice that it was part of, or the signed command, which nobody has checked; None for a message
            that is neither.
        body: such a message's body, at most its first 64 KiB; None for the others.
        error: why, in one line.
        attempts: how often it was tried.
        at: when it was parked.
    """

    id: str
    service: str
    queue: str
    error: str
    at: float
    attempts: int = 0
    notice_id: str | None = None
    jws: str | None = None
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Pruned:
    """How much `prune` removed. `missed` maps each service that lost open notices to since when."""

    revocations: int = 0
    changes: int = 0
    notices: int = 0
    dedupe: int = 0
    parked: int = 0
    audit: int = 0
    missed: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Pruned) -> Pruned:
        """What two calls removed together."""
        return Pruned(
            revocations=self.revocations + other.revocations,
            changes=self.changes + other.changes,
            notices=self.notices + other.notices,
            dedupe=self.dedupe + other.dedupe,
            parked=self.parked + other.parked,
            audit=self.audit + other.audit,
            missed={
                name: min(since, self.missed.get(name, since))
                for name, since in {**self.missed, **other.missed}.items()
            },
        )


class Feed(Protocol):
    """The part of a store that a verifier reads."""

    def time(self) -> float:
        """The store's clock."""

    def head(self) -> Cursor:
        """The last position of the feed (0 before the first change) in the present epoch.

        The epoch changes when data may have been lost: the store was emptied, restored, or failed over.
        """

    def changes(self, cursor: Cursor, *, wait_seconds: float = 0.0, limit: int = 1000) -> list[Change]:
        """Changes after `cursor`, in order, without gaps; at most `limit`. Fewer than that: nothing was newer.

        Waits up to `wait_seconds` for one if there is none, and then returns an empty list: proof that the store was
        reached and that nothing is newer.

        Raises:
            CursorLost: the epoch is another one, the change at the cursor is another one (data was lost), or the feed
                was trimmed up to the cursor.
        """

    def snapshot(self, *, after: int = 0, limit: int = 1000) -> list[Change]:
        """Revocations that were not pruned, in the order of their positions, those after `after`, at most `limit`.

        Take `head` first, then page through, then read `changes` from that head: nothing is missed.
        """

    def close(self) -> None:
        """Give back connections. The store can not be used afterwards."""


class Dedupe(Protocol):
    """What a service needs: a lease and a record for each (service, batch) that it works on."""

    def begin(self, service: str, batch_id: str, *, holder: str, lease_seconds: float) -> Begun:
        """Ask to run a batch. Granted unless another holder's lease is live; the lease is then this holder's."""

    def mark(
        self,
        service: str,
        batch_id: str,
        *,
        holder: str,
        done: int,
        parked: int = 0,
        unparked: int = 0,
        lease_seconds: float,
    ) -> bool:
        """Add done and parked marks (bitmaps, OR-ed to what is stored; `unparked` bits are taken out of parked) and
        renew the lease; a lease of 0 s gives it back.

        The marks are stored even if another holder has the lease; returns False in that case. Records live for the
        retention plus a day.
        """  # fmt: skip

    def close(self) -> None:
        """Give back connections."""


class Store(Feed, Dedupe, Protocol):
    """The whole store: issuers, the notifier and the command line use it."""

    rules: Rules

    # ---- tokens and sessions

    def track(
        self,
        refs: Sequence[TokenRef],
        *,
        continuing: bool = False,
        reopen: bool = False,
        predecessor: str | None = None,
        predecessor_kid: str | None = None,
        claims: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Tracked]:
        """Record tokens, each under its expiry second and its session.

        One round trip for all of them; a second one if the denylist has anything on them, or has learned of a new set
        of claims' names since the last call.

        - A jti that is tracked already is moved to its new second. One that was detached stays so, with the sid that it
          had: only the token moves, and no session changes.
        - The first token of a (iss, sid) opens a life of the session; its start is auth_time, else iat.
        - A session with session_exp, or under a grace above 0, gets a due entry of its own at ceil(session_exp), or
          ceil(exp + grace); a later token does not move it (a claim does).
        - `continuing`: the token carries a session on. If (iss, sid) has no open life the answer says session_ended
          and nothing is recorded, unless `reopen`.
        - `predecessor`: the jti, of the same issuer, that a session is carried on from. If that token is revoked, the
          answer is denied, whatever else is true, and nothing is recorded: what was stolen is not refreshed.
        - `predecessor_kid`: the key that it was signed with; the same if that key is revoked.
        - `claims`: each token's claims set, in the same order, for revocations by claims: nothing of it is kept.
          Without it, a token is judged by the claims that are tracked.
        - A token that the denylist refuses (with the session's start) is not recorded, and the answer says which
          revocation it was. If it was tracked before it stays as it was: its entry is dropped when it is claimed, or
          told, if the revocation was undone by then.
        - A second is in must_arm unless its timer is confirmed, or was handed to a publisher less than
          ARM_LEASE_SECONDS ago; one that is due within IMMEDIATE_SECONDS always is. Each second is in must_arm of at
          most one answer of a call.
        """

    def armed(self, seconds: Collection[int]) -> None:
        """The broker has confirmed timers for these seconds. Seconds without members are ignored."""

    def due(self, *, before: float, limit: int = 1000) -> list[int]:
        """Seconds at or before `before` that still have members, oldest first."""

    def detach(self, iss: str, jti: str, *, revocation_id: str) -> Detached:
        """First step of revoking a token: it stops counting as a live token of its session.

        If it was the last one and the session has neither session_exp nor grace, the session's life is closed, under
        this revocation: `track(continuing=True)` finds it ended, and a new token opens a new life. The token stays in
        its second until it is claimed. Repeating it with the same revocation_id gives the same answer; with another
        one, ends_session is False.
        """

    def attach(self, iss: str, jti: str, *, revocation_id: str) -> None:
        """Take `detach` back: the revocation was not made. No effect if the token was claimed meanwhile.

        The token counts again in its own life, if that is open; a life that this detach closed is opened again, or, if
        a new one was opened meanwhile, the token joins that.
        """

    def session(self, iss: str, sid: str) -> float | None:
        """The start of a session with an open life; None if it has none.

        0.0 if none of its tokens told a time: it is older than any cut-off.
        """

    def claim(self, second: int, *, services: Sequence[str], limit: int = 500) -> Claim | None:
        """Take up to `limit` members out of a second and record them in the notice log, in one atomic step.

        - A token that was not detached: one entry. It ends its session too if no live token of it is left and it has
          neither session_exp nor grace; the session's record goes.
        - A token that was detached: one entry that ends the token; and the session if the life was closed under that
          same detach and not opened again.
        - A session's due entry: if its session_exp, or the last exp seen for it plus grace, is later than this second,
          it is moved there (see `Claim.rearm`) and makes no entry. Otherwise one entry that ends the session, and its
          record goes. If the session's record has gone, no entry.
        - The record waits for `services`, without those that were removed meanwhile. With none, the members are taken
          out and nothing is recorded.
        - The claim that empties a second removes it and its timer state.

        Returns:
            None if the second has no members.

        Raises:
            NotDue: the store's clock has not reached `second`.
        """

    # ---- revocations

    def revoke(self, revocation: Revocation, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded:
        """Record a revocation: in denylist, change feed, notice log and audit log, in one atomic step.

        The record waits for the services that are registered at that moment. Recording the same id twice is one
        revocation; the first one counts.
        """

    def undo(self, revocation_id: str, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded | None:
        """Take a revocation back, in one atomic step: it leaves the denylist, and the change feed says so.

        - The revocation's own notice-log record is closed; the services that had not closed it are undone there, and
          are in the answer. They have missed what ended meanwhile and was left to that revocation to tell: see
          `mark_missed`.
        - The undo's record waits for the services that are registered at that moment.
        - Undoing again changes nothing, and answers as the first time, with created False.

        Returns:
            None if the revocation is not on the denylist: unknown, or expired.
        """

    def undone(self, revocation_id: str) -> bool:
        """Whether a revocation was taken back. False as well once the record of that has gone, after the retention."""

    def count(self, revocation: Revocation, *, enough: int, within_seconds: float) -> Counted | None:
        """How many live tokens that are tracked, and sessions of these, a revocation names.

        Looks at every token, a page at a time, where the scope has no index (all but token and session). Stops once it
        has found more than `enough` sessions, or after `within_seconds`: it has then not looked at all of them.

        Returns:
            None if it cannot be known: scope claims, by a claim that is not tracked.
        """

    def revocation(self, revocation_id: str) -> Revocation | None:
        """A revocation whose denylist entry lives, by its id; None once it has expired, pruned or not, or is undone."""

    def status(self, revocation_id: str) -> Mapping[str, ServiceStatus] | None:
        """Who has applied a revocation, who has not. None if its record is unknown, or gone after the retention."""

    # ---- the notice log

    def settle(self, batch_id: str, *, dead: Collection[int]) -> None:
        """Say, once, which entries of an expiry record were told by a revocation instead, and drop them from it.

        A record with nothing left is removed. Settling again is without effect.
        """

    def open_notices(self, *, limit: int = 100) -> list[OpenNotice]:
        """Records whose time to be sent again has come, oldest first.

        Each is handed out to one caller, and comes up again after FIRST_RESEND_SECONDS, doubled with each attempt up
        to LONGEST_RESEND_SECONDS. An expiry or revocation first comes up FIRST_RESEND_SECONDS after it was recorded; a
        "missed" at once. A record that cannot be read is left out, and logged the first time.
        """

    def resend_at(self, batch_ids: Collection[str], at: float) -> None:
        """Let `open_notices` hand these out from `at` on; 0: at once, as `unsent`."""

    def receive(self, receipts: Sequence[tuple[str, Receipt]]) -> None:
        """Apply receipts, each with the service's name.

        done and parked entries are closed for that service, retrying ones are held until `until` plus
        RETRY_MARGIN_SECONDS. A record that no service waits for is removed if it is an expiry's or a missed one, and
        kept for `status` if it is a revocation's. Unknown records, services and entries are ignored; a closed entry
        stays closed, and "done" after "parked" is done.
        """

    # ---- services

    def add_service(self, name: str) -> bool:
        """Register a service. It is told what is recorded from now on. False if it was registered already."""

    def remove_service(self, name: str) -> bool:
        """Remove a service; no record waits for it any more. False if it was not registered."""

    def services(self) -> list[ServiceInfo]:
        """The registered services, by name."""

    def mark_missed(self, service: str, since: float) -> None:
        """Notices for a service were dropped: open a "missed" record for it, or let its open one begin earlier.

        One that was sent before gets a new id, so that a receipt for that copy does not close it, and keeps its turn.
        A service that is not registered has missed nothing.
        """

    # ---- parked entries

    def park(self, parked: Sequence[Parked]) -> None:
        """Keep what was given up on. An id that is there already is replaced."""

    def parked(self, *, service: str | None = None, after: str = "", limit: int = 100) -> list[Parked]:
        """Parked entries in the order of their ids, those after id `after`; of one service, or of all."""

    def unpark(self, ids: Collection[str]) -> int:
        """Remove parked entries. Returns how many there were."""

    # ---- the audit log

    def note(self, entry: AuditEntry) -> None:
        """Add an entry to the audit log, in place of one with the same id. It is kept for `Rules.audit_seconds`."""

    def audit(self, *, before: tuple[float, str] | None = None, limit: int = 100) -> list[AuditEntry]:
        """Entries of the audit log, the latest first, at most `limit`.

        Args:
            before: `at` and `id` of the last entry that was read, to read on from.
        """

    # ---- keeping house

    def lease(self, name: str, *, holder: str, seconds: float) -> bool:
        """Take or renew a named lease; False if another holder's is live. 0 seconds gives it back."""

    def prune(self) -> Pruned:
        """Remove what has outlived its time; a bounded amount per call (about 1,000 of each kind).

        Denylist entries past expires_at; the feed beyond FEED_LENGTH; notice-log records, dedupe records and parked
        entries past the retention; audit entries past audit_seconds; and, while the open log is larger than
        log_max_bytes, the oldest expiry records.
        Services that a removed record still waited for get a "missed" record, and are in the answer.
        """

    def ping(self) -> str:
        """The server and its version, for example "Redis 7.0.15"."""

    def warnings(self) -> list[str]:
        """What an operator should change about the server (for example: AOF is off). Empty if all is well."""


def open_store(
    url: str,
    *,
    namespace: str = "knell",
    rules: Rules | None = None,
    partitions: int = 1,
    clock: Callable[[], float] | None = None,
) -> Store:
    """Open a store by its URL: see KNELL_STORE_URL in docs/settings.md.

    Args:
        clock: replaces the store's own clock, for tests that move it. Default: the server's.

    Raises:
        InvalidSettings: the URL has a scheme that no store answers to.
        StoreUnavailable: SQLite could not open its file. A server is not contacted here.
    """
    scheme = url.partition("://")[0].lower()
    rules = rules or Rules()
    if scheme in REDIS_SCHEMES:
        from knell.stores.redis import RedisStore

        return RedisStore(url, namespace=namespace, rules=rules, partitions=partitions, clock=clock)
    if scheme in ("postgresql", "sqlite"):
        from knell.stores.sql import SqlStore

        return SqlStore(url, namespace=namespace, rules=rules, clock=clock)
    raise InvalidSettings(f"KNELL_STORE_URL has scheme {scheme!r}; use {STORE_SCHEMES}")
