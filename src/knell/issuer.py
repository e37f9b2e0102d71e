"""The issuer's face: mint tokens, track them, refresh sessions, revoke."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import jwt
import structlog

from knell import commands, messages
from knell.arming import Armer
from knell.clock import StoreClock
from knell.errors import (
    InvalidClaims,
    InvalidSettings,
    KeyRevoked,
    SessionEnded,
    SessionRevoked,
    StoreUnavailable,
    Unavailable,
    UnknownService,
)
from knell.keyring import KeyRing
from knell.keys import ALGORITHMS, OWN_TYPES, SYMMETRIC, Signer, SigningKey
from knell.keyset import KeyFile, notice_keys
from knell.minting import both_claims, check_foreign, new_claims, read_foreign, refreshed_claims
from knell.publisher import Publisher
from knell.results import Issued, Recorded, Revoked, Tracking, Undone, pauses
from knell.revocations import Revocation, Scope, check_entity, claims_of, make_revocation, revocation_of_refreshed
from knell.revoking import Revoker, check_actor
from knell.settings import Rules, Settings
from knell.store import ServiceStatus, Store, Tracked, open_store
from knell.tokens import Claims, ClaimValue, TokenRef

# track_many hands the store this many at a time.
PAGE = 1000

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Predecessor:
    """What names the token that a session is carried on from, as far as it is known."""

    jti: str | None
    kid: str | None


class Issuer:
    """Mints, tracks, refreshes and revokes. Thread-safe, and safe to use after a fork.

    Every call is bounded: 1 to 2 s when the store does not answer, 2 s more when the broker does not either.

    Args:
        iss: the `iss` of its tokens.
        key: a SigningKey; a `knell.KeyFile`, whose keys rotate while this runs; or a PEM private key or secret, with
            `algorithm`. None: this process mints nothing.
        algorithm: HS256, RS256, ES256 or EdDSA.
        kid: names the key; default its thumbprint.
        notice_key: the EdDSA key (or KeyFile) that signs revocation notices. Default the one that KNELL_NOTICE_KEY
            names, else `key` if it is asymmetric. A symmetric key never signs a notice: whoever can verify could forge.
        foreign_keys: for `track` and `refresh` with tokens of other issuers: by `iss`, the key and the algorithm it
            verifies. The key is a public key (PEM, or a PyJWK), a mapping of `kid` to these, or a `knell.JwksUrl`.
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
        key: SigningKey | KeyFile | str | bytes | None = None,
        *,
        algorithm: str | None = None,
        kid: str | None = None,
        notice_key: SigningKey | KeyFile | None = None,
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
        self._rings = {} if self._key is None else {iss: _own_ring(self._key)}
        self._rings |= {of: KeyRing(key, [named]) for of, (key, named) in (foreign_keys or {}).items()}
        self._allow = when_unavailable == "allow"
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
        signs = _notice_key(notice_key, self._key, self._settings)
        self._revoker = Revoker(self._store, self._publisher, self._clock, self._settings, iss, signs)

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
            claims: changes to the claims. A revocation by claims that refuses the old token counts for the new one too.
            reopen: start a new life of a session that has ended.

        Raises:
            InvalidClaims: there is no sid, the signature is wrong, or session_exp has passed.
            SessionEnded: the session has ended, and `reopen` is False.
            SessionRevoked: as `issue`; or the token to go on from is revoked: what was stolen is not refreshed.
            Unavailable: as `issue`. While the store is away, neither an ended session nor a revoked token is noticed.
        """
        given = self._read(token) if isinstance(token, str) else token
        old = dict(given)
        now, away = self._clock.read()
        made = refreshed_claims(old, claims, iss=self.iss, now=now, ttl_seconds=ttl_seconds, rules=self._rules)
        jti = old.get("jti")
        kid = given.kid if isinstance(given, Claims) else old.get("kid")
        predecessor = _Predecessor(jti if isinstance(jti, str) else None, kid if isinstance(kid, str) else None)
        return self._mint(
            made,
            headers,
            away=away,
            continuing=True,
            reopen=reopen,
            predecessor=predecessor,
            judged=both_claims(old, made, claims),
        )

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
        found = [self._foreign(token, now) for token in tokens]
        return self._track([ref for ref, _ in found], [claims for _, claims in found], away=away)

    # ---- revocations

    def revoke(
        self,
        scope: str,
        match: Mapping[str, ClaimValue],
        *,
        reason: str | None = None,
        initiating_entity: str = "admin",
        issued_before: float | None = None,
        exp: float | None = None,
        iss: str | None = None,
        idempotency_key: str | None = None,
        actor: str | None = None,
        confirm: str | None = None,
        dry_run: bool = False,
        wait_for: Sequence[str] = (),
        timeout_seconds: float = 5.0,
    ) -> Revoked:
        """Refuse a token, a session, or all sessions of one kind that have begun, and tell every service.

        Args:
            scope: "token", "session", "subject", "client", "key", "claims" or "issuer".
            match: {"jti": ...}, {"sid": ...}, {"sub": ...}, {"client_id": ...}, {"kid": ...}, {"iss": ...}; of scope
                claims one to eight claims, all of which a token must have, for example {"tenant": "acme"}.
            reason: why; shown to whoever is refused.
            initiating_entity: "admin", "user", "policy" or "system".
            issued_before: the cut-off of a subject, client, claims or issuer, Unix seconds; default now.
            exp: a token's exp, if the caller knows it and Knell does not track it: its entry can leave early.
            iss: the issuer of the match; default this issuer's own.
            idempotency_key: the revocation's id; the same key twice is one revocation.
            actor: who asks for it, for the audit log; at most 256 bytes.
            confirm: of a client, a key, claims or an issuer: its name once more (of claims "name=value,name=value", in
                the order of names). Needed if more sessions would end than KNELL_CONFIRM_SESSIONS, or nobody knows how
                many; with it nothing is counted first.
            dry_run: change nothing, and say how many live tokens and sessions it would end. May take a minute or two:
                every token that is tracked is looked at.
            wait_for: wait until these services have said that they are done with it (or have parked it).
            timeout_seconds: for how long.

        Returns:
            What was recorded. That a service in `wait_for` did not answer in time is no error: see `services`.

        Raises:
            InvalidRevocation: it cannot be recorded, or names the key that signs notices here; nothing was changed.
            ConfirmationNeeded: see `confirm`; nothing was changed.
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
            actor=actor,
            confirm=confirm,
            dry_run=dry_run,
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
        match: Mapping[str, ClaimValue],
        *,
        reason: str | None = None,
        initiating_entity: str = "admin",
        issued_before: float | None = None,
        exp: float | None = None,
        iss: str | None = None,
        idempotency_key: str | None = None,
        actor: str | None = None,
        confirm: str | None = None,
        dry_run: bool = False,
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
        if dry_run:
            return self._dry_run(revocation)
        check_actor(actor)
        _ = self._revoker.signing_key  # without a key to sign the notice nothing may be changed
        try:
            if away is not None:
                raise away
            self._check_services(wait_for)
            counted = self._revoker.check(revocation, confirm=confirm)
            return self._revoker.record(revocation, actor=actor, counted=counted)
        except StoreUnavailable as error:
            self._revoker.check_unseen(revocation, confirm=confirm)
            return self._revoker.queue(revocation, error, actor=actor)

    def _dry_run(self, revocation: Revocation) -> Revoked:
        counted = self._revoker.count(revocation)
        tokens, sessions = (None, None) if counted is None else (counted.tokens, counted.sessions)
        return Revoked(revocation, "dry_run", published=False, created=False, tokens=tokens, sessions=sessions)

    def undo(
        self,
        revocation_id: str,
        *,
        reason: str | None = None,
        initiating_entity: str = "admin",
        actor: str | None = None,
    ) -> Undone:
        """Take a revocation back: what it alone refused is accepted again, and who has not applied it yet does not.

        Sessions that services have ended stay ended. Undoing again is without effect.

        Args:
            revocation_id: as `revoke` has answered it.
            reason: why; services are told.
            initiating_entity: "admin", "user", "policy" or "system".
            actor: who asks for it, for the audit log; at most 256 bytes.

        Raises:
            InvalidRevocation: no such revocation is on the denylist: unknown, or expired. Nothing was changed.
            StoreUnavailable: nothing is known to have been changed; call it again.
        """
        entity = check_entity(initiating_entity)
        return self._revoker.undo(revocation_id, reason=reason, initiating_entity=entity, actor=check_actor(actor))

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
        predecessor: _Predecessor | None = None,
        judged: Mapping[str, Any] | None = None,
    ) -> Issued:
        if self._key is None:
            raise InvalidSettings("this Issuer has no key to sign tokens with; pass key= and algorithm=")
        key = self._key.active
        if str((headers or {}).get("typ", "")).lower().removeprefix("application/").startswith(OWN_TYPES):
            raise InvalidClaims("the header's typ is that of Knell's own messages, which no token may pass for")
        ref = TokenRef.from_claims(claims, kid=key.kid, tracked=self._rules.tracked_claims)
        try:
            token = jwt.encode(claims, key.key, algorithm=key.algorithm, headers={**(headers or {}), "kid": key.kid})
        except (TypeError, ValueError) as error:
            raise InvalidClaims(f"the claims cannot be written as JSON: {error}") from None
        [tracking] = self._track(
            [ref],
            [claims if judged is None else judged],
            away=away,
            continuing=continuing,
            reopen=reopen,
            predecessor=predecessor,
        )
        if tracking.refused is not None:
            raise tracking.refused
        assert tracking.recorded is not None
        return Issued(token, ref, tracking.recorded)

    def _read(self, token: str) -> Claims:
        return read_foreign(token, self._rings)

    def _foreign(self, token: str | Mapping[str, Any] | TokenRef, now: float) -> tuple[TokenRef, Mapping[str, Any]]:
        """What is kept of a token, and the claims set that it is judged by."""
        if isinstance(token, TokenRef):
            ref = TokenRef.from_json(token.as_json())
            claims: Mapping[str, Any] = claims_of(ref)
        else:
            claims = self._read(token) if isinstance(token, str) else token
            ref = TokenRef.from_claims(claims, tracked=self._rules.tracked_claims)
        check_foreign(ref, now=now, rules=self._rules)
        return ref, claims

    def _track(
        self,
        refs: Sequence[TokenRef],
        claims: Sequence[Mapping[str, Any]],
        *,
        away: StoreUnavailable | None,
        continuing: bool = False,
        reopen: bool = False,
        predecessor: _Predecessor | None = None,
    ) -> list[Tracking]:
        """Track in pages. A store that does not answer is waited for once: all that is left is queued together."""
        found: list[Tracking] = []
        while away is None and len(found) < len(refs):
            try:
                page, known = refs[len(found) :][:PAGE], claims[len(found) :][:PAGE]
                tracked = self._store.track(
                    page,
                    continuing=continuing,
                    reopen=reopen,
                    predecessor=None if predecessor is None else predecessor.jti,
                    predecessor_kid=None if predecessor is None else predecessor.kid,
                    claims=known,
                )
            except StoreUnavailable as error:
                away = error
            else:
                self._armer.arm(second for each in tracked for second in each.must_arm)
                found += [self._tracking(*each, predecessor) for each in zip(tracked, known, strict=True)]
        if away is not None and (left := refs[len(found) :]):
            recorded = self._queue_tracking(left, away)
            found += [Tracking(ref, recorded) for ref in left]
        return found

    def _tracking(self, tracked: Tracked, claims: Mapping[str, Any], predecessor: _Predecessor | None) -> Tracking:
        if tracked.session_ended:
            assert tracked.ref.sid is not None
            raise SessionEnded(tracked.ref.iss, tracked.ref.sid)
        denied = tracked.denied
        if denied is None:
            return Tracking(tracked.ref, "store")
        of_predecessor = predecessor is not None and (denied.scope, denied.value) in (
            (Scope.TOKEN, predecessor.jti),
            (Scope.KEY, predecessor.kid),
        )
        if not denied.refuses(tracked.ref, claims=claims) and not of_predecessor:
            # Only the store knows how old its session is; verifiers see a fresh token, so it is revoked by name.
            self._revoker.record(revocation_of_refreshed(tracked.ref, denied, now=self._clock.now(), rules=self._rules))
        refused = KeyRevoked if denied.scope is Scope.KEY else SessionRevoked
        return Tracking(tracked.ref, None, refused(denied.id, denied.reason))

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
        if self._revoker.key is None:
            why = (
                f"the store does not answer ({error}), and no key signs a command for the broker: set KNELL_NOTICE_KEY"
            )
        elif self._revoker.publish(self._track_commands(refs, self._revoker.signing_key)):
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


def _load(key: SigningKey | KeyFile | str | bytes | None, algorithm: str | None, kid: str | None) -> Signer | None:
    if isinstance(key, KeyFile):
        key.check()
    if key is None or isinstance(key, SigningKey | KeyFile):
        return key
    if algorithm is None:
        raise InvalidSettings("name the key's algorithm: algorithm='EdDSA', 'ES256', 'RS256' or 'HS256'")
    return SigningKey.load(key, algorithm=algorithm, kid=kid)


def _own_ring(key: Signer) -> KeyRing:
    if isinstance(key, KeyFile):
        return KeyRing(key.history, sorted(ALGORITHMS - SYMMETRIC))
    return KeyRing(key, [key.active.algorithm])


def _notice_key(given: Signer | None, token_key: Signer | None, settings: Settings) -> Signer | None:
    if given is not None:
        if given.active.symmetric:
            raise InvalidSettings(
                f"notice_key is {given.active.algorithm}: whoever can verify could forge; use an EdDSA key"
            )
        return given
    found = notice_keys(settings)
    if found is None and token_key is not None and not token_key.active.symmetric:
        return token_key
    return found
