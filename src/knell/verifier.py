"""The face for whoever checks tokens: no network call for a token, and a stated age of what it knows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import structlog

from knell.decoding import Decoder
from knell.errors import DenylistStale, InvalidSettings, TokenExpired, TokenInvalid, TokenRevoked
from knell.follower import Follower
from knell.settings import Settings
from knell.store import Feed, open_store
from knell.tokens import Claims, ClaimValue, TokenRef
from knell.watches import TokenEnd, Watch, Watches, ends_at

__all__ = ["AVAILABLE", "STRICT", "Policy", "TokenEnd", "Verifier", "Watch"]

log = structlog.get_logger(__name__)

# How long after the start in a process `verify` may wait for the first snapshot. It mostly takes a few milliseconds;
# without the wait the first requests of every process would be refused.
START_WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Policy:
    """What a verifier does when it has been out of contact with the store.

    A token that is known to be revoked is refused under every policy.

    Attributes:
        name: for logs and health pages.
        refuse_after_seconds: once the denylist is older than this, every token is refused (DenylistStale).
        needs_snapshot: True to refuse every token until the denylist was read for the first time. False to accept
            tokens without it, for refuse_after_seconds from the verifier's start in this process.
    """

    name: str
    refuse_after_seconds: float
    needs_snapshot: bool = True

    def __post_init__(self) -> None:
        if not self.refuse_after_seconds > 0:
            raise InvalidSettings(f"refuse_after_seconds is {self.refuse_after_seconds}; it must be above 0")


# Security first: a revocation is never ignored for longer than this, at the price of refusing everybody.
STRICT = Policy("strict", 10.0)
# Service first: an hour without the store goes unnoticed by users, and so may a revocation made in that hour.
AVAILABLE = Policy("available", 3600.0, needs_snapshot=False)


class Verifier:
    """Checks tokens: signature and claims, expiry, and the denylist.

    The denylist is a replica in this process, fed by a thread that starts at the first `verify`, `watch`, `wait_ready`
    or `start` in each process: make a verifier at import, fork afterwards, and each child gets a replica of its own.
    A `verify` is no network I/O; only in the first `start_wait_seconds` of a process does it wait until the
    denylist is there. Call `wait_ready` (or `start`) when a process begins, and it does not wait either. With a
    `JwksUrl`, a token whose kid is not known may wait for one fetch, seldom and for a bounded time.
    """

    def __init__(
        self,
        keys: object,
        *,
        algorithms: Collection[str],
        issuer: str | Sequence[str],
        audience: str | Sequence[str] | None,
        policy: Policy = STRICT,
        leeway_seconds: float = 0.0,
        settings: Settings | None = None,
        store: Feed | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        require: Collection[str] = ("exp", "jti"),
        match: Mapping[str, ClaimValue] | None = None,
        start_wait_seconds: float = START_WAIT_SECONDS,
    ) -> None:
        """Make a verifier; nothing is opened yet.

        Args:
            keys: PEM text of a public (or private) key; for HS256 a secret of 32 bytes or more; a public key object; a
                `jwt.PyJWK`; a `knell.keys.SigningKey`; or a mapping of `kid` to these. With a mapping, a token whose
                kid is not in it is refused, and one without kid is accepted only if there is a single key. Keys that
                change: a `knell.JwksUrl`, which is then started and closed with the verifier, or a `knell.KeyFile`.
                Revocations by kid need keys with names: of a key without one, the token says itself what it is called.
            algorithms: the JWS algorithms that are accepted, for example ["EdDSA"]; never taken from the token. HMAC
                and public-key algorithms do not mix, and "none" is refused.
            issuer: the `iss` that is accepted, or several. Every key may sign for each of them: issuers that do not
                trust each other need a verifier each.
            audience: the `aud` that is accepted, or several. None: only tokens without `aud` are accepted.
            policy: what to do when the denylist is old. Default STRICT, refuse everything after 10 s.
            leeway_seconds: how long after its exp a token is still accepted, for clocks that differ. Default 0; at most
                the leeway of the rules, which revocations outlive their tokens by.
            settings: where the store is, and the rules. Default `Settings.from_environ()`.
            store: a store to follow in place of the settings' own. It stays yours to close, and if you fork, it has to
                survive that.
            clock: Unix time, in seconds.
            monotonic: what the denylist's age is measured with, in seconds.
            require: claims that a token must have, besides iss and exp. Without "jti" among them, a token that has none
                is accepted, and can only be revoked by its sid or sub. Add "iat" if tokens of this issuer could lack
                it: the lifetime of a token without iat cannot be checked, so revoking one by a jti that was never
                tracked holds for the maximum token lifetime only.
            match: claims that a token must have with these values, such as {"token_type": "access"} where the same key
                signs refresh tokens as well; a claim that is a list has the value in it. Default none.
            start_wait_seconds: how long after the start in a process `verify` may wait for the denylist. Default 1.

        Raises:
            InvalidSettings: says which argument cannot be used, and why.
        """
        settings = settings or Settings.from_environ()
        limit = settings.rules.leeway_seconds
        if not (math.isfinite(leeway_seconds) and 0 <= leeway_seconds <= limit):
            raise InvalidSettings(
                f"leeway_seconds is {leeway_seconds}; use 0 to {limit:g}, or raise KNELL_LEEWAY_SECONDS everywhere: a "
                "revocation leaves the denylist that long after its token's exp"
            )
        self._decoder = Decoder(
            keys,
            algorithms=algorithms,
            issuer=issuer,
            audience=audience,
            rules=settings.rules,
            require=require,
            match=match,
        )
        self._keys = self._decoder.source
        # Of a single one the token itself tells.
        self._issuers = self._decoder.issuers if len(self._decoder.issuers) > 1 else ()
        self.policy = policy
        self._rules = settings.rules
        self._leeway_seconds = leeway_seconds
        self._clock = clock
        self._monotonic = monotonic
        self._start_wait_seconds = start_wait_seconds
        self._watches = Watches(
            lambda: self._follower.denylist,
            clock=clock,
            leeway_seconds=leeway_seconds,
            issuers=self._issuers,
        )
        self._follower = Follower(
            store if store is not None else lambda: _open(settings),
            clock=clock,
            monotonic=monotonic,
            on_change=self._watches.on_change,
            on_resync=self._watches.on_resync,
        )
        self._started_at = monotonic()

    # ---- checking

    def verify(self, token: str) -> Claims:
        """Check a token. Returns its claims, a dict that is the caller's own.

        Raises:
            TokenInvalid: malformed, not signed by a trusted key, for someone else, or a claim is wrong or missing.
            TokenExpired: its exp or session_exp has passed.
            TokenRevoked: it is on the denylist.
            DenylistStale: by the policy, nothing can be accepted now; try again later.
            KeysUnavailable: the keys come from a URL that does not answer; try again later.
        """
        claims, ref = self._decoder.decode(token)
        self._check(ref, claims)
        return claims

    def check(self, token: Mapping[str, Any] | TokenRef, *, kid: str | None = None, of_session: bool = False) -> None:
        """Check once more that a token lives, by claims that were verified before: its end, the denylist, the policy.

        For sessions and streams that outlive the request which brought the token, and for tokens whose signature
        another library has verified. It looks at no signature, and at neither issuer nor audience.

        Args:
            token: what `verify` returned, another library's verified claims, or what `reference` made of them. They
                need iss, jti and exp.
            kid: the `kid` of the token's header, where only the caller knows it. Of claims that come without one it
                is that of the verifier's key, if it has a single one.
            of_session: ask for the token's session, where it has a sid: its exp does not count, since the session may
                have been refreshed, nor does a revocation of this one token.

        Raises:
            TokenInvalid: these are no claims of a token, or they are out of order.
            TokenExpired, TokenRevoked, DenylistStale: as `verify`.
        """
        claims = Claims(token.as_json() if isinstance(token, TokenRef) else token)
        if isinstance(token, TokenRef):
            claims.update(claims.pop("claims", {}))
        claims.kid = kid or (token.kid if isinstance(token, Claims | TokenRef) else self.only_kid)
        ref = self._decoder.checked(claims)
        if not of_session or ref.sid is None:
            self._check(ref, claims)
            return
        if ref.session_exp is not None and ref.session_exp + self._leeway_seconds <= self._clock():
            raise TokenExpired("the session has expired")
        self._check_denylist(ref.replace(jti=""), claims)

    def reference(self, claims: Mapping[str, Any]) -> TokenRef:
        """What to keep with a session that hangs on a token: all that `check` and `Notice.matches` ask for.

        Args:
            claims: what `verify` returned.

        Raises:
            InvalidClaims: these are no claims of a token.
        """
        kid = claims.kid if isinstance(claims, Claims) else None
        return TokenRef.from_claims(claims, kid=kid, tracked=self._rules.tracked_claims)

    @property
    def only_kid(self) -> str | None:
        """The name of its key, where it has a single one that never changes: what is accepted was signed with it."""
        return self._decoder.only_kid

    def _check(self, ref: TokenRef, claims: Mapping[str, Any]) -> None:
        now = self._clock()
        if ends_at(ref, self._leeway_seconds) <= now:
            raise TokenExpired("the token has expired" if ref.exp <= now else "the token's session has expired")
        nbf = claims.get("nbf")
        if nbf is not None and nbf > now + self._leeway_seconds:
            raise TokenInvalid(f"the token is valid only in {nbf - now:.0f} s (nbf)")
        # The most skew that any process may forgive: what begins later than that was not issued in good order, and
        # would escape the cut-off of a revocation that is yet to come.
        if ref.iat is not None and ref.iat > now + self._rules.leeway_seconds:
            raise TokenInvalid(f"the token was issued {ref.iat - now:.0f} s in the future (iat); check the clocks")
        if ref.auth_time is not None and ref.auth_time > now + self._rules.leeway_seconds:
            raise TokenInvalid(f"its session begins {ref.auth_time - now:.0f} s in the future (auth_time)")
        if ref.exp > now + self._rules.max_token_seconds + self._rules.leeway_seconds:
            raise TokenInvalid(f"the token's exp is more than {self._rules.max_token_seconds:.0f} s off, the maximum")
        self._check_denylist(ref, claims)

    def _check_denylist(self, ref: TokenRef, claims: Mapping[str, Any]) -> None:
        if not self._follower.ready:
            self._wait_at_start()
        found = self._follower.denylist.find(ref, claims=claims, issuers=self._issuers)
        if found is not None:
            raise TokenRevoked(found.id, found.reason)
        self._check_age()

    def _wait_at_start(self) -> None:
        try:
            self.start()
        except RuntimeError as error:
            # The system has no thread to give. The policy decides about this token; the next one tries again.
            log.error("denylist_not_followed", error=str(error))
            return
        left = self._started_at + self._start_wait_seconds - self._monotonic()
        if left > 0:
            self._follower.wait_ready(left)

    def _check_age(self) -> None:
        stale = self._follower.staleness_seconds
        age = stale
        if math.isinf(stale) and not self.policy.needs_snapshot:
            age = self._monotonic() - self._started_at
        # "Not within" instead of "above": of a policy without a limit, no denylist at all is still too old.
        if math.isinf(age) or age > self.policy.refuse_after_seconds:
            raise DenylistStale(stale, self.policy.refuse_after_seconds)

    # ---- watching

    def watch(self, claims: Mapping[str, Any], on_end: Callable[[TokenEnd], None]) -> Watch:
        """Be called once, when a token or its session ends: by expiry or by revocation, whichever is first.

        `on_end` is called from a thread of the verifier, one callback after the other: it must be quick. If the token
        has ended already, it is called at once. An error that it raises is logged. A denylist that is out of contact
        ends no watch. After a fork, the child has none of the parent's watches.

        Args:
            claims: what `verify` returned: itself, because a plain copy of it does not know the token's key any more.
            on_end: is given a `TokenEnd`.

        Returns:
            The watch; call its `cancel`, or leave it as a context manager, when it is of no more use.

        Raises:
            InvalidClaims: these are no claims of a token.
        """
        self.start()
        return self._watches.add(self._decoder.reference(claims), on_end, claims=claims)

    # ---- the replica

    @property
    def staleness_seconds(self) -> float:
        """Seconds since the store last proved that nothing newer is there; infinite before the first time."""
        return self._follower.staleness_seconds

    @property
    def resyncs(self) -> int:
        """How often the whole denylist had to be read anew, in this process."""
        return self._follower.resyncs

    @property
    def alarms(self) -> int:
        """How often the store was found to have lost data, in this process."""
        return self._follower.alarms

    def start(self) -> None:
        """Begin to follow the denylist (and a JwksUrl) in this process, and return at once. Calling again is harmless.

        Raises:
            RuntimeError: the system has no thread to give. Call it again.
        """
        if self._keys is not None:
            self._keys.start()
        if self._follower.started:
            return
        before, self._started_at = self._started_at, self._monotonic()
        try:
            self._follower.start()
        except RuntimeError:
            self._started_at = before  # what fails again and again must not look young for ever
            raise

    def catch_up(self) -> None:
        """Take in, before returning, all that was revoked or has expired by now, and call the watches back.

        Nobody has to: the replica follows by itself. For what must not wait for it, such as a test.

        Raises:
            StoreUnavailable: the store did not answer.
        """
        self._follower.catch_up()
        self._watches.settle()

    def wait_ready(self, timeout_seconds: float) -> bool:
        """Wait until the denylist and the keys are there. False if they were not after `timeout_seconds`."""
        self.start()
        deadline = self._monotonic() + timeout_seconds
        if self._keys is not None and not self._keys.wait_ready(timeout_seconds):
            return False
        return self._follower.wait_ready(max(0.0, deadline - self._monotonic()))

    def close(self) -> None:
        """Stop the threads and close the store, if the verifier opened it. Watches are dropped without a call.

        A JwksUrl that another verifier uses too starts again by itself.
        """
        self._watches.close()
        self._follower.close()
        if self._keys is not None:
            self._keys.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _open(settings: Settings) -> Feed:
    return open_store(
        settings.store_url, namespace=settings.namespace, rules=settings.rules, partitions=settings.partitions
    )
