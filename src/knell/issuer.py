"""The issuer's face: mint tokens, track them, refresh sessions, revoke."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import jwt
import structlog

from knell import commands, messages
from knell.arming import Armer
from knell.clock import StoreClock
from knell.errors import (
    BrokerUnavailable,
    InvalidClaims,
    InvalidRevocation,
    InvalidSettings,
    SessionEnded,
    SessionRevoked,
    StoreUnavailable,
    Unavailable,
    UnknownService,
)
from knell.keys import NOTICE_TYPE, OWN_TYPES, SigningKey, notice_key
from knell.minting import merged_claims, new_claims, read_foreign, refreshed_claims
from knell.notices import Notice, NoticeBatch, describe
from knell.publisher import Publisher
from knell.revocations import Revocation, Scope, make_revocation, revocation_of_refreshed
from knell.settings import Rules, Settings
from knell.store import Detached, ServiceStatus, Store, Tracked, open_store
from knell.tokens import TokenRef

# How long a call waits for the broker's confirm before it answers "not yet". The store's own time-out comes before it.
BROKER_SECONDS = 2.0
# track_many hands the store this many at a time.
PAGE = 1000

Recorded = Literal["store", "queued", "nowhere"]
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Issued:
    """A token that was minted.

    Attributes:
        token: the JWT, in compact form. Knell keeps no copy.
        ref: what Knell keeps of it.
        recorded: "store": its end will be told. "queued": the store was away, the broker has the command. "nowhere":
            both were away, and the policy is to allow; its end will be told to nobody.
    """

    token: str = field(repr=False)
    ref: TokenRef
    recorded: Recorded


@dataclass(frozen=True, slots=True)
class Tracking:
    """A token that somebody else minted, tracked.

    Attributes:
        ref: what Knell keeps of it.
        recorded: as of Issued; None if it was refused.
        refused: SessionRevoked, if it or its session is on the denylist; `track` raises it, `track_many` returns it.
    """

    ref: TokenRef
    recorded: Recorded | None
    refused: SessionRevoked | None = None


@dataclass(frozen=True, slots=True)
class Revoked:
    """What became of a revocation.

    Attributes:
        revocation: what is on the denylist, or will be.
        recorded: "store": verifiers refuse from now on. "queued": the store was away, the broker has the command.
        published: True if the broker has confirmed the notice. If not, the sweep sends it: it is in the notice log.
        created: False if the same idempotency key was used before; the first revocation counts.
        services: how far each service is; empty when queued.
    """

    revocation: Revocation
    recorded: Literal["store", "queued"]
    published: bool
    created: bool
    services: Mapping[str, ServiceStatus] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The revocation's id: `knell status` asks by it."""
        return self.revocation.id

    def pending(self, services: Iterable[str]) -> list[str]:
        """Which of these services have not answered yet: neither done nor parked."""
        states = {name: self.services[name].state for name in services if name in self.services}
        return [name for name, state in states.items() if state in ("waiting", "retrying")]


class Issuer:
    """Mints, tracks, refreshes and revokes. Thread-safe, and safe to use after a fork.

    Every call is bounded: 1 to 2 s when the store does not answer, 2 s more when the broker does not either.

    Args:
        iss: the `iss` of its tokens.
        key: a SigningKey; or a PEM private key or secret, with `algorithm`. None: this process mints nothing.
        algorithm: HS256, RS256, ES256 or EdDSA.
        kid: names the key; default its thumbprint.
        notice_key: the EdDSA key that signs revocation notices. Default the one that KNELL_NOTICE_KEY names, else
            `key` if it is asymmetric. A symmetric key never signs a notice: whoever can verify could forge.
        foreign_keys: for `track` and `refresh` with tokens of other issuers: by `iss`, the public key (PEM, or a
            PyJWK) and the algorithm it verifies.
        when_unavailable: with store and broker both away, "raise" Unavailable (default), or "allow": mint all the
            same, and say `recorded="nowhere"`. A revocation always raises.
        settings: default `Settings.from_environ()`.
        store, publisher: default those that the settings name.
        clock: this process's clock, Unix seconds.

    Raises:
        InvalidSettings: a key or setting cannot be used.
    """

    def __init__(
        self,
        iss: str,
        key: SigningKey | str | bytes | None = None,
        *,
        algorithm: str | None = None,
        kid: str | None = None,
        notice_key: SigningKey | None = None,
        foreign_keys: Mapping[str, tuple[Any, str]] | None = None,
        when_unavailable: Literal["raise", "allow"] = "raise",
        settings: Settings | None = None,
        store: Store | None = None,
        publisher: Publisher | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not isinstance(iss, str) or not iss:
            raise InvalidSettings("an Issuer needs the iss of its tokens, for example 'https://auth.example'")
        if when_unavailable not in ("raise", "allow"):
            raise InvalidSettings(f"when_unavailable is {when_unavailable!r}; use 'raise' or 'allow'")
        self.iss = iss
        self._settings = settings or Settings.from_environ()
        self._key = _load(key, algorithm, kid)
        self._foreign_keys = dict(foreign_keys or {})
        self._allow = when_unavailable == "allow"
        self._notice_key = _notice_key(notice_key, self._key, self._settings)
        self._own_store = store is None
        self._own_publisher = publisher is None
        self._store = store or open_store(
            self._settings.store_url,
            namespace=self._settings.namespace,
            rules=self._settings.rules,
            partitions=self._settings.partitions,
        )
        self._publisher = publisher or Publisher(self._settings)
        self._clock = StoreClock(self._store, clock)
        self._armer = Armer(self._store, self._publisher, self._clock)

    # ---- tokens

    def issue(
        self, claims: Mapping[str, Any], *, ttl_seconds: float, headers: Mapping[str, Any] | None = None
    ) -> Issued:
        """Mint a JWT (RFC 7519) and track it.

        Args:
            claims: what the token says, for example {"sub": "alice", "sid": "s-1", "aud": "shop"}. iss, iat, exp and
                (unless given) jti are added, and with a sid `auth_time` (unless given). A `session_exp` is when the
                session ends whatever is refreshed; the token ends no later.
            ttl_seconds: the token's lifetime.
            headers: more header parameters, for example {"typ": "at+jwt"} (RFC 9068).

        Raises:
            InvalidClaims: the claims or the lifetime cannot be used; nothing was changed.
            SessionRevoked: the session, or the subject since before auth_time, is revoked.
            Unavailable: store and broker are both away (see `when_unavailable`).
        """
        now, away = self._clock.read()
        made = new_claims(claims, iss=self.iss, now=now, ttl_seconds=ttl_seconds, rules=self._rules)
        return self._mint(made, headers, away=away)

    def refresh(
        self,
        token: str | Mapping[str, Any],
        *,
        ttl_seconds: float,
        claims: Mapping[str, Any] | None = None,
        reopen: bool = False,
        headers: Mapping[str, Any] | None = None,
    ) -> Issued:
        """Carry a session on: a new token with the old one's sid, auth_time, session_exp and other claims.

        Args:
            token: the token to go on from, whose signature is checked (it may have expired), or its verified claims.
            claims: changes to the claims.
            reopen: start a new life of a session that has ended.

        Raises:
            InvalidClaims: there is no sid, the signature is wrong, or session_exp has passed.
            SessionEnded: the session has ended, and `reopen` is False.
            SessionRevoked: as `issue`; or the token to go on from is revoked: what was stolen is not refreshed.
            Unavailable: as `issue`. While the store is away, neither an ended session nor a revoked token is noticed.
        """
        old = self._read(token) if isinstance(token, str) else dict(token)
        now, away = self._clock.read()
        made = refreshed_claims(old, claims, iss=self.iss, now=now, ttl_seconds=ttl_seconds, rules=self._rules)
        jti = old.get("jti")
        predecessor = jti if isinstance(jti, str) else None
        return self._mint(made, headers, away=away, continuing=True, reopen=reopen, predecessor=predecessor)

    def track(self, token: str | Mapping[str, Any] | TokenRef) -> Tracking:
        """Track a token that somebody else minted.

        Args:
            token: its verified claims; or the JWT itself, whose signature is checked with `foreign_keys`.

        Raises:
            InvalidClaims: no jti, no exp, exp in the past, too long a lifetime, an oversized claim, and so on.
            SessionRevoked: it, its session or its subject is on the denylist.
            Unavailable: store and broker are both away (see `when_unavailable`).
        """
        tracking = self.track_many([token])[0]
        if tracking.refused is not None:
            raise tracking.refused
        return tracking

    def track_many(self, tokens: Iterable[str | Mapping[str, Any] | TokenRef]) -> list[Tracking]:
        """Track thousands of tokens, in a round trip for each thousand. All are checked before any is tracked.

        Returns:
            One answer for each, in order. Those on the denylist are refused, and not tracked.

        Raises:
            InvalidClaims: one of them cannot be tracked; none was.
            Unavailable: as `track`; those before it in the list may be tracked, repeating the call is harmless.
        """
        now, away = self._clock.read()
        return self._track([self._foreign_ref(token, now) for token in tokens], away=away)

    # ---- revocations

    def revoke(
        self,
        scope: str,
        match: Mapping[str, str],
        *,
        reason: str | None = None,
        initiating_entity: str = "admin",
        issued_before: float | None = None,
        exp: float | None = None,
        iss: str | None = None,
        idempotency_key: str | None = None,
        wait_for: Sequence[str] = (),
        timeout_seconds: float = 5.0,
    ) -> Revoked:
        """Refuse a token, a session, or all of a subject's sessions that have begun, and tell every service.

        Args:
            scope: "token", "session" or "subject".
            match: {"jti": ...}, {"sid": ...} or {"sub": ...}.
            reason: why; shown to whoever is refused.
            initiating_entity: "admin", "user", "policy" or "system".
            issued_before: the cut-off of a subject, Unix seconds; default now.
            exp: a token's exp, if the caller knows it and Knell does not track it: its entry can leave early.
            iss: the issuer of the match; default this issuer's own.
            idempotency_key: the revocation's id; the same key twice is one revocation.
            wait_for: wait until these services have said that they are done with it (or have parked it).
            timeout_seconds: for how long.

        Returns:
            What was recorded. That a service in `wait_for` did not answer in time is no error: see `services`.

        Raises:
            InvalidRevocation: it cannot be recorded; nothing was changed.
            UnknownService: `wait_for` names a service that is not registered; nothing was changed.
            Unavailable: nothing was recorded.
        """
        revoked = self._record(
            scope,
            match,
            reason=reason,
            initiating_entity=initiating_entity,
            issued_before=issued_before,
            exp=exp,
            iss=iss,
            idempotency_key=idempotency_key,
            wait_for=wait_for,
        )
        deadline = time.monotonic() + timeout_seconds
        for pause in pauses():
            left = deadline - time.monotonic()
            if left <= 0 or not revoked.pending(wait_for):
                break
            time.sleep(min(pause, left))
            revoked = self._look(revoked)
        return revoked

    def _record(
        self,
        scope: str,
        match: Mapping[str, str],
        *,
        reason: str | None = None,
        initiating_entity: str = "admin",
        issued_before: float | None = None,
        exp: float | None = None,
        iss: str | None = None,
        idempotency_key: str | None = None,
        wait_for: Sequence[str] = (),
    ) -> Revoked:
        """`revoke`, up to where it would begin to wait for services; those of `wait_for` are only checked."""
        now, away = self._clock.read()
        revocation = make_revocation(
            scope,
            match,
            iss=self.iss if iss is None else iss,
            now=now,
            rules=self._rules,
            id=idempotency_key,
            exp=exp,
            issued_before=issued_before,
            ends=frozenset({"token"}),
            reason=reason,
            initiating_entity=initiating_entity,
        )
        _ = self._signer  # without a key to sign the notice nothing may be changed
        if away is not None:
            return self._queue_revocation(revocation, away)
        try:
            self._check_services(wait_for)
            return self._revoke(revocation)
        except StoreUnavailable as error:
            return self._queue_revocation(revocation, error)

    def _look(self, revoked: Revoked) -> Revoked:
        """The same revocation, with how far each service is by now; as it was, if the store does not answer."""
        try:
            return replace(revoked, services=self._store.status(revoked.id) or revoked.services)
        except StoreUnavailable as error:
            log.warning("status_unknown", revocation_id=revoked.id, error=str(error))
            return revoked

    def status(self, revocation_id: str) -> Mapping[str, ServiceStatus] | None:
        """Who has applied a revocation, and who has not; None if it is unknown, or its record has gone."""
        return self._store.status(revocation_id)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Publish what waits, for at most so long, and give everything back."""
        self._armer.close(timeout_seconds)
        if self._own_publisher:
            self._publisher.close(timeout_seconds)
        if self._own_store:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside

    @property
    def _rules(self) -> Rules:
        return self._settings.rules

    def _mint(
        self,
        claims: dict[str, Any],
        headers: Mapping[str, Any] | None,
        *,
        away: StoreUnavailable | None,
        continuing: bool = False,
        reopen: bool = False,
        predecessor: str | None = None,
    ) -> Issued:
        if self._key is None:
            raise InvalidSettings("this Issuer has no key to sign tokens with; pass key= and algorithm=")
        key = self._key
        if str((headers or {}).get("typ", "")).lower().removeprefix("application/").startswith(OWN_TYPES):
            raise InvalidClaims("the header's typ is that of Knell's own messages, which no token may pass for")
        ref = TokenRef.from_claims(claims, kid=key.kid)
        try:
            token = jwt.encode(claims, key.key, algorithm=key.algorithm, headers={**(headers or {}), "kid": key.kid})
        except (TypeError, ValueError) as error:
            raise InvalidClaims(f"the claims cannot be written as JSON: {error}") from None
        tracking = self._track([ref], away=away, continuing=continuing, reopen=reopen, predecessor=predecessor)[0]
        if tracking.refused is not None:
            raise tracking.refused
        assert tracking.recorded is not None
        return Issued(token, ref, tracking.recorded)

    def _read(self, token: str) -> dict[str, Any]:
        own = {} if self._key is None else {self.iss: (self._key.verifying_key, self._key.algorithm)}
        return read_foreign(token, own | self._foreign_keys)

    def _foreign_ref(self, token: str | Mapping[str, Any] | TokenRef, now: float) -> TokenRef:
        if isinstance(token, TokenRef):
            claims: Mapping[str, Any] = token.as_json()
        elif isinstance(token, str):
            claims = self._read(token)
        else:
            claims = token
        return merged_claims(claims, now=now, rules=self._rules)

    def _track(
        self,
        refs: Sequence[TokenRef],
        *,
        away: StoreUnavailable | None,
        continuing: bool = False,
        reopen: bool = False,
        predecessor: str | None = None,
    ) -> list[Tracking]:
        """Track in pages. A store that does not answer is waited for once: all that is left is queued together."""
        found: list[Tracking] = []
        while away is None and len(found) < len(refs):
            try:
                page = refs[len(found) :][:PAGE]
                tracked = self._store.track(page, continuing=continuing, reopen=reopen, predecessor=predecessor)
            except StoreUnavailable as error:
                away = error
            else:
                self._armer.arm(second for each in tracked for second in each.must_arm)
                found += [self._tracking(each, predecessor) for each in tracked]
        if away is not None and (left := refs[len(found) :]):
            recorded = self._queue_tracking(left, away)
            found += [Tracking(ref, recorded) for ref in left]
        return found

    def _tracking(self, tracked: Tracked, predecessor: str | None) -> Tracking:
        if tracked.session_ended:
            assert tracked.ref.sid is not None
            raise SessionEnded(tracked.ref.iss, tracked.ref.sid)
        denied = tracked.denied
        if denied is None:
            return Tracking(tracked.ref, "store")
        of_predecessor = denied.scope is Scope.TOKEN and denied.value == predecessor
        if not denied.refuses(tracked.ref) and not of_predecessor:
            # Only the store knows how old its session is; verifiers see a fresh token, so it is revoked by name.
            self._revoke(revocation_of_refreshed(tracked.ref, denied, now=self._clock.now(), rules=self._rules))
        return Tracking(tracked.ref, None, SessionRevoked(denied.id, denied.reason))

    def _revoke(self, revocation: Revocation) -> Revoked:
        ref: TokenRef | None = None
        if revocation.scope is Scope.TOKEN:
            detached = self._store.detach(revocation.iss, revocation.value, revocation_id=revocation.id)
            ref = detached.ref
            revocation = with_what_is_known(revocation, detached, self._rules.leeway_seconds)
        notice, jws = self._sign(revocation, ref)
        recorded = self._store.revoke(revocation, batch_id=notice.batch_id, jws=jws)
        if not recorded.created:
            revocation = first_of_that_id(self._store, revocation)
        published = recorded.created and self._publish([messages.notice(jws, shown=describe([notice]))])
        if not published:
            # Of one that was recorded before as well: whoever did may have been killed before it was sent.
            self._send_soon(notice.batch_id)
        waiting = {name: ServiceStatus("waiting", None) for name in recorded.services}
        return Revoked(revocation, "store", published, recorded.created, waiting)

    def _sign(self, revocation: Revocation, ref: TokenRef | None) -> tuple[Notice, str]:
        notice = Notice.of_revocation(revocation, ref)
        now = self._clock.now()
        batch = NoticeBatch(
            id=notice.batch_id, entries=(notice,), issued_at=now, expires_at=now + self._rules.retention_seconds
        )
        payload = batch.as_payload(signer=self.iss, audience=self._settings.audience)
        return notice, self._signer.sign(payload, typ=NOTICE_TYPE)

    @property
    def _signer(self) -> SigningKey:
        if self._notice_key is None:
            raise InvalidSettings(
                "no key signs notices: a symmetric token key must not; set KNELL_NOTICE_KEY to an EdDSA key in PEM"
            )
        return self._notice_key

    def _publish(self, sent: Sequence[messages.Message]) -> bool:
        try:
            self._publisher.send(sent).result(BROKER_SECONDS)
        except (BrokerUnavailable, TimeoutError) as error:
            log.warning("broker_unavailable", error=str(error))
            return False
        return True

    def _send_soon(self, batch_id: str) -> None:
        try:
            self._store.resend_at([batch_id], 0)
        except StoreUnavailable as error:
            log.warning("notice_waits_for_its_first_resend", batch_id=batch_id, error=str(error))

    def _check_services(self, wait_for: Sequence[str]) -> None:
        if not wait_for:
            return
        known = {service.name for service in self._store.services()}
        if unknown := sorted(set(wait_for) - known):
            raise UnknownService(
                f"no service {unknown[0]!r} is registered (known: {', '.join(sorted(known)) or 'none'}); "
                f"register it with `knell services add {unknown[0]}`"
            )

    def _queue_tracking(self, refs: Sequence[TokenRef], error: StoreUnavailable) -> Recorded:
        if self._notice_key is None:
            why = (
                f"the store does not answer ({error}), and no key signs a command for the broker: set KNELL_NOTICE_KEY"
            )
        elif self._publish(self._track_commands(refs, self._notice_key)):
            return "queued"
        else:
            why = f"neither the store ({error}) nor the broker answers"
        if self._allow:
            log.error("token_recorded_nowhere", tokens=len(refs), error=why)
            return "nowhere"
        raise Unavailable(f"{why}; nothing was tracked") from None

    def _track_commands(self, refs: Sequence[TokenRef], key: SigningKey) -> list[messages.Message]:
        audience, now = self._settings.audience, self._clock.now()
        pages = [refs[start : start + commands.MAX_TOKENS] for start in range(0, len(refs), commands.MAX_TOKENS)]
        return [
            messages.track_command(
                commands.sign_track(page, key=key, signer=self.iss, audience=audience, now=now),
                shown=f"{len(page)} tokens",
            )
            for page in pages
        ]

    def _queue_revocation(self, revocation: Revocation, error: StoreUnavailable) -> Revoked:
        notices = {commands.ends_key(revocation.ends): self._sign(revocation, None)[1]}
        if revocation.scope is Scope.TOKEN:
            both = replace(revocation, ends=frozenset({"token", "session"}))
            notices[commands.ends_key(both.ends)] = self._sign(both, None)[1]
        jws = commands.sign_revoke(
            revocation,
            notices,
            key=self._signer,
            signer=self.iss,
            audience=self._settings.audience,
            now=self._clock.now(),
        )
        if not self._publish([messages.revoke_command(jws, shown=describe([Notice.of_revocation(revocation)]))]):
            raise Unavailable(f"neither the store ({error}) nor the broker answers; nothing was revoked") from None
        return Revoked(revocation, "queued", published=True, created=True)


def pauses() -> Iterator[float]:
    """How long to wait between two looks at a revocation, in seconds: 5 ms at first, 100 ms at last."""
    pause = 0.005
    while True:
        yield pause
        pause = min(pause * 1.5, 0.1)


def first_of_that_id(store: Store, revocation: Revocation) -> Revocation:
    """The revocation that was recorded under this one's id before it, and counts. Takes a detach for this one back."""
    first = store.revocation(revocation.id)
    if first is None:
        return revocation
    if first.iss != revocation.iss:
        # The caller thinks that it has revoked; another issuer's key must not silence it.
        if revocation.scope is Scope.TOKEN:
            store.attach(revocation.iss, revocation.value, revocation_id=revocation.id)
        raise InvalidRevocation("the idempotency key was used by another issuer; choose another, nothing was revoked")
    same = (first.scope, first.iss, first.value) == (revocation.scope, revocation.iss, revocation.value)
    if revocation.scope is Scope.TOKEN and not same:
        store.attach(revocation.iss, revocation.value, revocation_id=revocation.id)
    return first


def with_what_is_known(revocation: Revocation, detached: Detached, leeway_seconds: float) -> Revocation:
    """A token's revocation once the store has told what hangs on the token: its exp, and whether its session ends."""
    ends = frozenset({"token", "session"}) if detached.ends_session else revocation.ends
    expires_at = revocation.expires_at if detached.ref is None else detached.ref.exp + leeway_seconds
    return replace(revocation, ends=ends, expires_at=expires_at)


def _load(key: SigningKey | str | bytes | None, algorithm: str | None, kid: str | None) -> SigningKey | None:
    if key is None or isinstance(key, SigningKey):
        return key
    if algorithm is None:
        raise InvalidSettings("name the key's algorithm: algorithm='EdDSA', 'ES256', 'RS256' or 'HS256'")
    return SigningKey.load(key, algorithm=algorithm, kid=kid)


def _notice_key(given: SigningKey | None, token_key: SigningKey | None, settings: Settings) -> SigningKey | None:
    if given is not None:
        if given.symmetric:
            raise InvalidSettings(f"notice_key is {given.algorithm}: whoever can verify could forge; use an EdDSA key")
        return given
    found = notice_key(settings)
    if found is None and token_key is not None and not token_key.symmetric:
        return token_key
    return found
