"""How a revocation is made, and taken back: recorded in one step, signed, and told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from knell import commands, messages
from knell.clock import StoreClock
from knell.errors import (
    BrokerUnavailable,
    ConfirmationNeeded,
    InvalidRevocation,
    InvalidSettings,
    StoreUnavailable,
    Unavailable,
)
from knell.keys import NOTICE_TYPE, Signer, SigningKey
from knell.notices import Notice, NoticeBatch, batch_id_of_undo, describe
from knell.publisher import Publisher
from knell.results import Revoked, Undone
from knell.revocations import InitiatingEntity, Revocation, Scope, check_reason
from knell.settings import Settings
from knell.store import AuditEntry, Counted, Detached, ServiceStatus, Store, about
from knell.tokens import TokenRef, check_identifier

# How long a call waits for the broker's confirm before it answers "not yet". The store's own time-out comes before it.
BROKER_SECONDS = 2.0
# How long a count may take before a wide revocation; one that takes longer has to be confirmed without it.
COUNT_SECONDS = 2.0
# A dry run has time: it looks at every token of a store with millions of them.
DRY_RUN_SECONDS = 120.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Revoker:
    """Records revocations, and undoes them.

    Attributes:
        signer: the `iss` of the notices.
        key: signs them; None if this process has no key that may.
    """

    store: Store
    publisher: Publisher
    clock: StoreClock
    settings: Settings
    signer: str
    key: Signer | None

    @property
    def signing_key(self) -> SigningKey:
        """The key, which must be there before anything is changed; InvalidSettings if it is not."""
        if self.key is None:
            raise InvalidSettings(
                "no key signs notices: a symmetric token key must not; set KNELL_NOTICE_KEY to an EdDSA key in PEM"
            )
        return self.key.active

    # ---- making one

    def check(self, revocation: Revocation, *, confirm: str | None) -> Counted | None:
        """Refuse what would lock Knell itself out, and what is wide and not confirmed.

        Returns:
            How many tokens and sessions it names; None if that was not counted.

        Raises:
            InvalidRevocation: it names the key that signs notices here, or is confirmed by another name.
            ConfirmationNeeded: it names more sessions than the limit, or nobody knows how many.
        """
        if revocation.scope is Scope.KEY and revocation.value == self.signing_key.kid:
            raise InvalidRevocation(
                f"key {revocation.value!r} signs the notices of this very process, which nobody would hear any more; "
                "let another key sign them first (KNELL_NOTICE_KEY), then revoke this one"
            )
        if not revocation.scope.is_wide:
            return None
        name = confirmed_by(revocation)
        if confirm is not None:
            if confirm != name:
                raise InvalidRevocation(f"confirm is {confirm!r}; for this revocation it has to be {name!r}")
            return None
        limit = self.settings.confirm_sessions
        counted = self.store.count(revocation, enough=limit, within_seconds=COUNT_SECONDS)
        if counted is None or not counted.complete or counted.sessions > limit:
            sessions, complete = (None, False) if counted is None else (counted.sessions, counted.complete)
            raise ConfirmationNeeded(name, limit=limit, sessions=sessions, complete=complete)
        return counted

    def check_unseen(self, revocation: Revocation, *, confirm: str | None) -> None:
        """`check`, while the store is away: what is wide cannot be counted, and has to be confirmed."""
        if not revocation.scope.is_wide:
            return
        if confirm is None:
            limit = self.settings.confirm_sessions
            raise ConfirmationNeeded(confirmed_by(revocation), limit=limit, sessions=None, complete=False)
        self.check(revocation, confirm=confirm)

    def count(self, revocation: Revocation) -> Counted | None:
        """How many tokens and sessions a revocation names, for a dry run."""
        return self.store.count(revocation, enough=2**53, within_seconds=DRY_RUN_SECONDS)

    def record(self, revocation: Revocation, *, actor: str | None = None, counted: Counted | None = None) -> Revoked:
        """Record a revocation and tell of it.

        Raises:
            InvalidRevocation: its id was used by another issuer, or was undone.
            StoreUnavailable: nothing was recorded.
        """
        ref: TokenRef | None = None
        if revocation.scope is Scope.TOKEN:
            detached = self.store.detach(revocation.iss, revocation.value, revocation_id=revocation.id)
            ref = detached.ref
            revocation = with_what_is_known(revocation, detached, self.settings.rules.leeway_seconds)
            counted = Counted(int(ref is not None), int(detached.ends_session))
        notice = Notice.of_revocation(revocation, ref)
        jws = self._sign(notice)
        audit = AuditEntry.of_revocation(revocation, actor=actor, counts=_counts(counted))
        recorded = self.store.revoke(revocation, batch_id=notice.batch_id, jws=jws, audit=audit)
        if not recorded.created:
            revocation = first_of_that_id(self.store, revocation, undone=recorded.undone)
        published = recorded.created and self.publish([messages.notice(jws, shown=describe([notice]))])
        if not published:
            # Of one that was recorded before as well: whoever did may have been killed before it was sent.
            self._send_soon(notice.batch_id)
        if recorded.created and counted is None and revocation.scope.is_wide:
            counted = self._count_late(revocation, audit)
        known: Mapping[str, ServiceStatus] = {name: ServiceStatus("waiting", None) for name in recorded.services}
        if not recorded.created:
            known = self.store.status(revocation.id) or known
        return Revoked(revocation, "store", published, recorded.created, known, **_counts(counted))

    def _count_late(self, revocation: Revocation, audit: AuditEntry) -> Counted | None:
        """Count what a confirmed revocation has ended, now that it has: nobody waits for a number to be safe."""
        try:
            counted = self.store.count(revocation, enough=2**53, within_seconds=COUNT_SECONDS)
            if counted is None or not counted.complete:
                return None
            self.store.note(replace(audit, counts=_counts(counted)))
        except StoreUnavailable as error:
            log.warning("revocation_not_counted", revocation_id=revocation.id, error=str(error))
            return None
        return counted

    def queue(self, revocation: Revocation, error: StoreUnavailable, *, actor: str | None) -> Revoked:
        """Hand a revocation to the broker as a signed command, because the store does not answer.

        Raises:
            Unavailable: the broker does not answer either; nothing was recorded.
        """
        notices = {commands.ends_key(revocation.ends): self._sign(Notice.of_revocation(revocation))}
        if revocation.scope is Scope.TOKEN:
            both = replace(revocation, ends=frozenset({"token", "session"}))
            notices[commands.ends_key(both.ends)] = self._sign(Notice.of_revocation(both))
        jws = commands.sign_revoke(
            revocation,
            notices,
            key=self.signing_key,
            signer=self.signer,
            audience=self.settings.audience,
            now=self.clock.now(),
            actor=actor,
        )
        if not self.publish([messages.revoke_command(jws, shown=describe([Notice.of_revocation(revocation)]))]):
            raise Unavailable(f"neither the store ({error}) nor the broker answers; nothing was revoked") from None
        return Revoked(revocation, "queued", published=True, created=True)

    # ---- taking one back

    def undo(
        self, revocation_id: str, *, reason: str | None, initiating_entity: InitiatingEntity, actor: str | None
    ) -> Undone:
        """Take a revocation back. See `Issuer.undo`."""
        self.signing_key  # noqa: B018 - without one nothing may be changed
        if reason is not None:
            check_reason(reason)
        batch_id = batch_id_of_undo(revocation_id)
        revocation = self.store.revocation(revocation_id)
        if revocation is None:
            if self.store.undone(revocation_id):
                self._send_soon(batch_id)
                return Undone(revocation_id, published=False, created=False)
            raise InvalidRevocation(f"no revocation {revocation_id!r} is on the denylist: unknown, or expired")
        now = self.clock.now()
        notice = Notice.of_undo(revocation, at=now, reason=reason, initiating_entity=initiating_entity)
        audit = AuditEntry(
            at=now,
            action="undone",
            actor=actor,
            initiating_entity=initiating_entity,
            reason=reason,
            revocation_id=revocation_id,
            what=about(revocation),
        )
        if revocation.scope is Scope.TOKEN:
            # Before the undo: if that does not happen, the token is on the denylist still, and this one is harmless.
            self.store.attach(revocation.iss, revocation.value, revocation_id=revocation_id)
        jws = self._sign(notice)
        recorded = self.store.undo(revocation_id, batch_id=batch_id, jws=jws, audit=audit)
        if recorded is None:
            raise InvalidRevocation(f"revocation {revocation_id!r} has just expired")
        self._settle_with(revocation, recorded.untold)
        published = recorded.created and self.publish([messages.notice(jws, shown=describe([notice]))])
        if not published:
            self._send_soon(batch_id)
        return Undone(revocation_id, published, recorded.created, recorded.untold)

    def _settle_with(self, revocation: Revocation, untold: Sequence[str]) -> None:
        """Mark the revocation's notice as done for who has not handled it: it may lie in a queue before the undo's.

        Where a service keeps its marks elsewhere (KNELL_DEDUPE_URL), the undo's own notice does that, when it comes.
        """
        record = Notice.of_revocation(revocation).dedupe_id
        for service in untold:
            try:
                self.store.mark(service, record, holder="undo", done=1, lease_seconds=0)
            except StoreUnavailable as error:
                log.warning("undo_not_marked", service=service, revocation_id=revocation.id, error=str(error))

    # ---- telling

    def _sign(self, notice: Notice) -> str:
        now = self.clock.now()
        expires_at = now + self.settings.rules.retention_seconds
        batch = NoticeBatch(id=notice.batch_id, entries=(notice,), issued_at=now, expires_at=expires_at)
        payload = batch.as_payload(signer=self.signer, audience=self.settings.audience)
        return self.signing_key.sign(payload, typ=NOTICE_TYPE)

    def publish(self, sent: Sequence[messages.Message]) -> bool:
        """Hand messages to the broker. False if it has not confirmed them within BROKER_SECONDS."""
        try:
            self.publisher.send(sent).result(BROKER_SECONDS)
        except (BrokerUnavailable, TimeoutError) as error:
            log.warning("broker_unavailable", error=str(error))
            return False
        return True

    def _send_soon(self, batch_id: str) -> None:
        try:
            self.store.resend_at([batch_id], 0)
        except StoreUnavailable as error:
            log.warning("notice_waits_for_its_first_resend", batch_id=batch_id, error=str(error))


def confirmed_by(revocation: Revocation) -> str:
    """What a wide revocation is confirmed by: the value of its match; of claims each as name=value, in order."""
    if revocation.scope is not Scope.CLAIMS:
        return revocation.value
    return ",".join(f"{name}={_plain(value)}" for name, value in sorted(revocation.match.items()))


def check_actor(actor: object) -> str | None:
    """Who did something: a text of at most 256 bytes, or None; InvalidRevocation otherwise."""
    if actor is None:
        return None
    try:
        return check_identifier("actor", actor)
    except ValueError as error:
        raise InvalidRevocation(str(error)) from None


def first_of_that_id(store: Store, revocation: Revocation, *, undone: bool = False) -> Revocation:
    """The revocation that was recorded under this one's id before it, and counts. Takes a detach for this one back.

    Raises:
        InvalidRevocation: it is another issuer's, or was undone: the caller would think that it has revoked.
    """

    def give_back() -> None:
        if revocation.scope is Scope.TOKEN:
            store.attach(revocation.iss, revocation.value, revocation_id=revocation.id)

    if undone:
        give_back()
        raise InvalidRevocation(
            f"revocation {revocation.id!r} was made before, and undone; choose another idempotency key"
        )
    first = store.revocation(revocation.id)
    if first is None:
        return revocation
    if first.iss != revocation.iss:
        give_back()
        raise InvalidRevocation("the idempotency key was used by another issuer; choose another, nothing was revoked")
    if (first.scope, first.value) != (revocation.scope, revocation.value):
        give_back()
    return first


def with_what_is_known(revocation: Revocation, detached: Detached, leeway_seconds: float) -> Revocation:
    """A token's revocation once the store has told what hangs on the token: its exp, and whether its session ends."""
    ends = frozenset({"token", "session"}) if detached.ends_session else revocation.ends
    expires_at = revocation.expires_at if detached.ref is None else detached.ref.exp + leeway_seconds
    return replace(revocation, ends=ends, expires_at=expires_at)


def _counts(counted: Counted | None) -> dict[str, int]:
    return {} if counted is None else {"tokens": counted.tokens, "sessions": counted.sessions}


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
