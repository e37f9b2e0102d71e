"""The notifier: tells services what has ended, at its second, and sweeps up what was missed."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import structlog
from kombu import Connection
from uuid6 import uuid7

from knell import messages
from knell.arming import Armer
from knell.clock import StoreClock
from knell.commands import CommandReader, ends_key
from knell.errors import (
    BrokerUnavailable,
    InvalidRevocation,
    InvalidSettings,
    MessageRefused,
    NotDue,
    Unavailable,
)
from knell.follower import Follower
from knell.keys import NOTICE_TYPE, NOTIFIER, Signer
from knell.keyset import notice_keys
from knell.notices import Cause, Notice, NoticeBatch, describe
from knell.publisher import Publisher, connect, queue_depth
from knell.revocations import Revocation, Scope, revocation_of_refreshed
from knell.revoking import first_of_that_id, with_what_is_known
from knell.settings import Settings
from knell.store import AuditEntry, Claim, Claimed, OpenNotice, Pruned, Store, open_store
from knell.tokens import TokenRef
from knell.topology import service_queue
from knell.trust import Trust, TrustFile

# A timer that fires this much early waits in place; one that fires earlier is armed again.
PATIENCE_SECONDS = 2.0
# How long a page of notices may take to be confirmed before the sweep is asked to send it again.
CONFIRM_SECONDS = 10.0
# How long a revocation may take from the moment that it closes a session to the moment that it is recorded: a call of
# the store. An end that would be told twice is held back as long, and looked at this often.
REVOKE_SECONDS = 2.0
REVOKE_PAUSE_SECONDS = 0.05
# Revocations that have served their time are remembered this much longer: an end that is claimed late, after an outage,
# may have been told by one.
KEEP_SECONDS = 6 * 3600.0
# How many due seconds a sweep looks at, and how long it tells, sends again, and prunes; the next one goes on.
SWEEP_SECONDS_LIMIT = 10_000
SWEEP_PART_SECONDS = 15.0
RESEND_PAGE = 100

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep did.

    Attributes:
        told: tokens and sessions whose end was overdue, and is now told.
        armed: expiry seconds that got a timer.
        resent: notices that were sent again, counted per service.
        pruned: what was removed.
    """

    told: int = 0
    armed: int = 0
    resent: int = 0
    pruned: Pruned = field(default_factory=Pruned)


class Ended(NamedTuple):
    """One entry of a claim after the denylist was looked at: what of it is still to be told."""

    entry: Claimed
    ends: frozenset[str]


class Notifier:
    """All that the notifier's Celery tasks do. Thread-safe; one for each process.

    Args:
        settings: default `Settings.from_environ()`.
        store, publisher: default those that the settings name.
        key: signs expiry notices; default the file that KNELL_NOTICE_KEY names, read again when it changes.
        trust: whose commands count; default the list that KNELL_TRUST names.
        clock: this process's clock, Unix seconds.

    Raises:
        InvalidSettings: there is no key to sign with, or no trust list.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        store: Store | None = None,
        publisher: Publisher | None = None,
        key: Signer | None = None,
        trust: Trust | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings = settings or Settings.from_environ()
        found = key or notice_keys(self.settings)
        if found is None:
            raise InvalidSettings("the notifier has no key to sign with; set KNELL_NOTICE_KEY to an EdDSA key in PEM")
        self._key = found
        self.store = store or open_store(
            self.settings.store_url,
            namespace=self.settings.namespace,
            rules=self.settings.rules,
            partitions=self.settings.partitions,
        )
        self.publisher = publisher or Publisher(self.settings)
        self._clock = StoreClock(self.store, clock)
        self.trust = trust or _readable(TrustFile(self.settings))
        self._commands = CommandReader(
            self.trust,
            self.settings.audience,
            self._clock.now,
            self.settings.rules,
        )
        self._armer = Armer(self.store, self.publisher, self._clock)
        self._follower = Follower(self.store, clock=clock, keep_seconds=KEEP_SECONDS)
        self._sleep = sleep
        self._name = f"{os.getpid()}-{uuid7()}"

    # ---- expiry

    def expire(self, second: int) -> int:
        """Tell every service what ended at `second` (Unix seconds). Returns how many tokens and sessions were told.

        Several may run for the same second; each member is claimed once. What the broker does not take is in the notice
        log, and the sweep sends it.

        Raises:
            StoreUnavailable: call it again; what was claimed before that is in the notice log.
        """
        sent: list[tuple[str, Future[None]]] = []
        told = 0
        while (claim := self._claim(second)) is not None:
            self._armer.arm(claim.rearm)
            if claim.batch_id and (ended := self._settle(claim)):
                sent.append((claim.batch_id, self._tell(claim.batch_id, ended)))
                told += len(ended)
            if not claim.more:
                break
        self._confirm(sent)
        return told

    def _claim(self, second: int) -> Claim | None:
        while True:
            # Asked for each claim: a second may take long, and a new service is told what is recorded from now on.
            services = [service.name for service in self.store.services()]
            try:
                return self.store.claim(second, services=services)
            except NotDue as early:
                if early.wait_seconds > PATIENCE_SECONDS:
                    log.warning("timer_early", second=second, wait_seconds=round(early.wait_seconds, 3))
                    self._armer.arm([second])
                    return None
                self._sleep(early.wait_seconds)

    def _settle(self, claim: Claim | OpenNotice) -> list[Ended]:
        """Drop what a revocation has told. The feed is read after the claim: whatever was revoked before it is seen."""
        closed = claim.closed if isinstance(claim, Claim) else frozenset()
        ended = self._still_untold(claim.entries)
        for _ in range(round(REVOKE_SECONDS / REVOKE_PAUSE_SECONDS)):
            if not any(each.entry.n in closed and "session" in each.ends for each in ended):
                break
            # Somebody revokes such a token at this moment, and tells of its session too; or died before he could.
            self._sleep(REVOKE_PAUSE_SECONDS)
            ended = self._still_untold(claim.entries)
        kept = {each.entry.n for each in ended}
        self.store.settle(claim.batch_id, dead=[entry.n for entry in claim.entries if entry.n not in kept])
        return ended

    def _still_untold(self, entries: Iterable[Claimed]) -> list[Ended]:
        self._follower.catch_up()
        found = []
        for entry in entries:
            ends = entry.ends - self._ends_by_revocation(entry)
            if ends:
                found.append(Ended(entry, ends))
        return found

    def _as_told(self, entries: Iterable[Claimed]) -> list[Ended]:
        """Entries of a page that was told before: each is told again, without the part that a revocation has told."""
        self._follower.catch_up()
        return [Ended(entry, entry.ends - self._ends_by_revocation(entry) or entry.ends) for entry in entries]

    def _ends_by_revocation(self, entry: Claimed) -> frozenset[str]:
        denylist = self._follower.denylist
        denied = denylist.find(entry.ref, started=entry.started)
        if denied is None:
            return frozenset()
        if denied.scope is Scope.TOKEN and not entry.ends <= denied.ends:
            # The token alone was revoked; its session may still be under a wider revocation.
            wider = denylist.find(entry.ref.replace(jti=""), started=entry.started)
            return denied.ends if wider is None else denied.ends | wider.ends
        return denied.ends

    def _tell(self, batch_id: str, ended: Sequence[Ended]) -> Future[None]:
        notices = [_expiry_notice(batch_id, each) for each in ended]
        return self.publisher.send([messages.notice(self._sign(batch_id, notices), shown=describe(notices))])

    def _confirm(self, sent: Sequence[tuple[str, Future[None]]]) -> None:
        """Wait for the confirms of what was sent; what has none is sent again by the next sweep."""
        lost = []
        deadline = time.monotonic() + CONFIRM_SECONDS
        for batch_id, future in sent:
            try:
                future.result(max(0.0, deadline - time.monotonic()))
            except (BrokerUnavailable, TimeoutError) as error:
                log.warning("notice_not_confirmed", batch_id=batch_id, error=str(error))
                lost.append(batch_id)
        if lost:
            self.store.resend_at(lost, 0)

    def _sign(self, batch_id: str, notices: Sequence[Notice]) -> str:
        now = self._clock.now()
        batch = NoticeBatch(
            id=batch_id,
            entries=notices,
            issued_at=now,
            expires_at=now + self.settings.rules.retention_seconds,
        )
        payload = batch.as_payload(signer=NOTIFIER, audience=self.settings.audience)
        return self._key.active.sign(payload, typ=NOTICE_TYPE)

    # ---- the sweep

    def sweep(self) -> Swept:
        """The pull-based backstop: arm what falls due soon, tell what is overdue, send again what is open, prune.

        One sweep runs at a time, whoever asks: the others return at once.

        Raises:
            StoreUnavailable: the next sweep goes on.
        """
        # A name for each sweep: one that takes longer than the interval keeps out the next one of its own process too.
        holder = str(uuid7())
        if not self._hold_sweep(holder):
            return Swept()
        try:
            now = self.store.time()
            soon = self.store.due(before=now + 2 * self.settings.sweep_interval_seconds, limit=SWEEP_SECONDS_LIMIT)
            coming = [second for second in soon if second > now]
            self._armer.arm(coming)
            told = self._tell_overdue([second for second in soon if second <= now])
            self._hold_sweep(holder)
            resent = self._resend_open()
            self._hold_sweep(holder)
            pruned = self._prune()
        finally:
            self.store.lease("sweep", holder=holder, seconds=0)
        if pruned.missed:
            log.error("notices_dropped_before_delivery", services=dict(pruned.missed))
        for service in self.store.services():
            if service.missed_since is not None:
                log.warning("service_has_missed_notices", service=service.name, since=service.missed_since)
        return Swept(told=told, armed=len(coming), resent=resent, pruned=pruned)

    def _hold_sweep(self, holder: str) -> bool:
        # Longer than a part of a sweep takes, with the confirm that it may wait for at its end.
        seconds = max(2 * SWEEP_PART_SECONDS, 3 * self.settings.sweep_interval_seconds)
        return self.store.lease("sweep", holder=holder, seconds=seconds)

    def _tell_overdue(self, seconds: Sequence[int]) -> int:
        told = 0
        deadline = time.monotonic() + SWEEP_PART_SECONDS
        for second in seconds:
            if time.monotonic() > deadline:
                log.warning("sweep_left_overdue_seconds_to_the_next", oldest=second)
                break
            told += self.expire(second)
        return told

    def _prune(self) -> Pruned:
        """The store removes a bounded amount a call: call it until nothing is left, or the sweep has to end."""
        pruned = Pruned()
        deadline = time.monotonic() + SWEEP_PART_SECONDS
        while (more := self.store.prune()) != Pruned() and time.monotonic() < deadline:
            pruned += more
        return pruned + more

    def _resend_open(self) -> int:
        """Send again what is open. With the broker away nothing is taken out: its next time would move away with it."""
        resent = 0
        lacking: dict[str, bool] = {}  # looked up once a sweep: what the sweep itself sends does not count
        deadline = time.monotonic() + SWEEP_PART_SECONDS
        try:
            connection = connect(self.settings)
        except BrokerUnavailable as error:
            log.warning("nothing_sent_again", error=str(error))
            return 0
        with connection:
            while time.monotonic() < deadline and (page := self.store.open_notices(limit=RESEND_PAGE)):
                counts = {notice.batch_id: self._resend(notice, lacking, connection) for notice in page}
                resent += sum(count for count in counts.values() if count is not None)
                unsent = [batch_id for batch_id, count in counts.items() if count is None]
                if unsent and self.publisher.broken:
                    self.store.resend_at(unsent, 0)
                    break
        return resent

    def _resend(self, notice: OpenNotice, lacking: dict[str, bool], connection: Connection) -> int | None:
        """Send an open notice to the services whose queue cannot have it any more: absent, or empty.

        One that was never confirmed goes to all that wait for it, behind whatever is in their queues: to wait for an
        empty queue would put it off for as long as a service is behind. Returns how many got it; None if the broker
        did not confirm.
        """
        now = self._clock.now()
        waiting = {name: each for name, each in notice.waiting.items() if each.hold_until <= now}
        if not notice.unsent:
            for name in waiting.keys() - lacking.keys():
                lacking[name] = _lacks(name, connection)
            waiting = {name: each for name, each in waiting.items() if lacking[name]}
        if not waiting:
            return 0
        jws, shown = self._written(notice)
        if jws is None:
            return 0
        future = self.publisher.send(
            [messages.notice_to(name, jws, shown=shown, todo=each.todo) for name, each in waiting.items()]
        )
        try:
            future.result(CONFIRM_SECONDS)
        except (BrokerUnavailable, TimeoutError) as error:
            log.warning("notice_not_confirmed", batch_id=notice.batch_id, error=str(error))
            return None
        log.info("notice_sent_again", batch_id=notice.batch_id, services=sorted(waiting), attempts=notice.attempts)
        return len(waiting)

    def _written(self, notice: OpenNotice) -> tuple[str | None, str]:
        if notice.kind == "revocation":
            return notice.jws, "revoked or undone (sent again)"
        if notice.kind == "missed":
            since = notice.since if notice.since is not None else notice.created_at
            return self._sign(notice.batch_id, [_missed_notice(notice.batch_id, since)]), "missed notices"
        ended = self._as_told(notice.entries) if notice.settled else self._settle(notice)
        if not ended:
            return None, ""
        notices = [_expiry_notice(notice.batch_id, each) for each in ended]
        return self._sign(notice.batch_id, notices), f"{describe(notices)} (sent again)"

    # ---- commands

    def track(self, jws: str) -> int:
        """Carry out a signed command to track tokens. Returns how many are tracked now.

        Raises:
            MessageRefused: it is not signed by a key that may speak for each token's issuer.
            StoreUnavailable: call it again.
        """
        command = self._commands.track(jws)
        if self._done(command.id):
            return 0
        tracked = self.store.track(command.refs)
        self._armer.arm(second for each in tracked for second in each.must_arm)
        for each in tracked:
            if each.denied is not None and not each.denied.refuses(each.ref):
                self._revoke_refreshed(each.ref, each.denied)
        self._mark_done(command.id)
        return sum(each.denied is None for each in tracked)

    def revoke(self, jws: str) -> bool:
        """Carry out a signed command to revoke. Returns False if it was recorded before.

        Raises:
            MessageRefused: it is not signed by a key that may revoke for that issuer.
            StoreUnavailable: call it again.
        """
        command = self._commands.revoke(jws)
        revocation = command.revocation
        if revocation.scope is Scope.KEY and revocation.value == self._key.active.kid:
            raise MessageRefused("the command revokes the key that the notifier signs with; let it have another first")
        ref: TokenRef | None = None
        if revocation.scope is Scope.TOKEN:
            detached = self.store.detach(revocation.iss, revocation.value, revocation_id=revocation.id)
            revocation = with_what_is_known(revocation, detached, self.settings.rules.leeway_seconds)
            ref = detached.ref
        notice = Notice.of_revocation(revocation, ref)
        if ref is not None and self.trust.may_tell(self._key.active.kid, revocation.iss, Cause.REVOKED):
            # The issuer could not ask the store; this notice also says which session and subject the token was of.
            jws = self._sign(notice.batch_id, [notice])
        else:
            jws = command.notices.get(ends_key(revocation.ends)) or next(iter(command.notices.values()))
        return self._record(revocation, notice, jws, actor=command.actor)

    def _record(self, revocation: Revocation, notice: Notice, jws: str, *, actor: str | None = None) -> bool:
        audit = AuditEntry.of_revocation(revocation, actor=actor, counts={})
        recorded = self.store.revoke(revocation, batch_id=notice.batch_id, jws=jws, audit=audit)
        if recorded.created:
            future = self.publisher.send([messages.notice(jws, shown=describe([notice]))])
            self._confirm([(notice.batch_id, future)])
        else:
            try:
                first_of_that_id(self.store, revocation, undone=recorded.undone)
            except InvalidRevocation as error:
                raise MessageRefused(str(error)) from None
            # Whoever recorded it may have been killed before it was sent.
            self.store.resend_at([notice.batch_id], 0)
        return recorded.created

    def _revoke_refreshed(self, ref: TokenRef, denied: Revocation) -> None:
        revocation = revocation_of_refreshed(ref, denied, now=self._clock.now(), rules=self.settings.rules)
        notice = Notice.of_revocation(revocation)
        self._record(revocation, notice, self._sign(notice.batch_id, [notice]))

    def _done(self, command_id: str) -> bool:
        begun = self.store.begin(_COMMANDS, command_id, holder=self._name, lease_seconds=0.0)
        return bool(begun.done)

    def _mark_done(self, command_id: str) -> None:
        self.store.mark(_COMMANDS, command_id, holder=self._name, done=1, lease_seconds=0.0)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Publish what waits, for at most so long, and give everything back."""
        self._armer.close(timeout_seconds)
        self.publisher.close(timeout_seconds)
        self._follower.close()
        self.store.close()


# Commands are remembered as done in the same place as services' batches, under a name that no service can have.
_COMMANDS = "knell.commands"


def _readable(trust: TrustFile) -> TrustFile:
    _ = trust.current  # a list that cannot be read is to be found now, and not with the first command
    return trust


def _lacks(service: str, connection: Connection) -> bool:
    try:
        depth = queue_depth(connection, service_queue(service))
    except Unavailable as error:
        log.warning("queue_depth_unknown", service=service, error=str(error))
        return False
    return not depth


def _expiry_notice(batch_id: str, ended: Ended) -> Notice:
    ref = ended.entry.ref
    return Notice(
        batch_id=batch_id,
        n=ended.entry.n,
        cause=Cause.EXPIRED,
        ends=ended.ends,
        scope=Scope.TOKEN if ref.jti else Scope.SESSION,
        at=ref.exp,
        iss=ref.iss,
        jti=ref.jti or None,
        sid=ref.sid,
        sub=ref.sub,
        client_id=ref.client_id,
        exp=ref.exp if ref.jti else None,
        started=ended.entry.started,
    )


def _missed_notice(batch_id: str, since: float) -> Notice:
    return Notice(
        batch_id=batch_id, cause=Cause.MISSED, ends=frozenset(), scope=Scope.SESSION, at=math.floor(since), iss=""
    )
