"""The keys of an issuer that publishes them at a URL, fetched in the background."""

from __future__ import annotations

import asyncio
import math
import os
import random
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import structlog
from jwt.exceptions import PyJWKClientError

from knell.errors import InvalidSettings, KeysUnavailable
from knell.jwks_client import JwksClient, check_url
from knell.keys import KEY_ERRORS, thumbprint
from knell.keysource import KeySource
from knell.redaction import traceback_of
from knell.tokens import check_identifier

log = structlog.get_logger(__name__)

# The share of the lifespan after which the next fetch begins: one that fails has time to be tried again.
REFRESH_AT = 0.7
FIRST_BACKOFF_SECONDS = 1.0
# Members of a private or a symmetric JWK (RFC 7518, section 6).
PRIVATE_MEMBERS = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


class JwksUrl(KeySource):
    """The public keys that an issuer publishes as a JWK Set (RFC 7517, section 5) at a URL.

    For `Verifier(keys=JwksUrl("https://auth.example/.well-known/jwks.json"), algorithms=["RS256"], ...)`, and for an
    Issuer's `foreign_keys`. A thread fetches them before they are `lifespan_seconds` old, so that no request waits for
    that; it starts with the first use in each process, and ends with `close`. What was fetched before a fork is used
    after it.

    - A kid that is not known is looked for with one fetch, for as long as `timeout_seconds`, which all who wait share;
      not if there was one in the last `cooldown_seconds`. On an event loop nobody waits: KeysUnavailable says to try
      again.
    - When a fetch fails, it is logged once, tried again, and the keys are used on until they are `max_age_seconds` old.
      So long may a key be believed that the issuer has taken back; to refuse its tokens at once, revoke the key.
    - https only, or http to this machine. Redirects are refused, an answer has at most 256 KiB, and all of it arrives
      within the time-out. A proxy that the environment names (HTTPS_PROXY) is used as by every client.
    - Keys that are not for verifying signatures (`use`, `key_ops`), symmetric and private ones are left out. A kid that
      names two keys names none. A key is only ever used with the verifier's own algorithms, and its own `alg`.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 2.0,
        lifespan_seconds: float = 300.0,
        cooldown_seconds: float = 30.0,
        max_age_seconds: float = 86_400.0,
        headers: Mapping[str, str] | None = None,
        ssl_context: ssl.SSLContext | None = None,
        allow_http: bool = False,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Name the URL; nothing is fetched yet.

        Args:
            url: where the JWK Set is.
            timeout_seconds: how long a fetch may take, from the connection to the last byte.
            lifespan_seconds: how old the keys get while the server answers; so long before a new key signs, it has to
                be published.
            cooldown_seconds: how long after a fetch no unknown kid causes another one.
            max_age_seconds: how old the keys may get while the server does not answer.
            headers: more request headers.
            ssl_context: trusted authorities, client certificates. Default the system's authorities.
            allow_http: take keys over plain http from another machine, which whoever sits in between can replace.
            monotonic: what ages are measured with, in seconds.

        Raises:
            InvalidSettings: says which argument cannot be used, and why.
        """
        check_url(url, allow_http=allow_http)
        times = {"timeout_seconds": timeout_seconds, "lifespan_seconds": lifespan_seconds}
        for name, value in (times | {"cooldown_seconds": cooldown_seconds, "max_age_seconds": max_age_seconds}).items():
            if not (math.isfinite(value) and value > 0):
                raise InvalidSettings(f"{name} is {value}; it must be a finite number of seconds above 0")
        if max_age_seconds < lifespan_seconds:
            raise InvalidSettings(f"max_age_seconds is {max_age_seconds}, less than lifespan_seconds")
        self._client = JwksClient(url, timeout_seconds=timeout_seconds, headers=headers or {}, ssl_context=ssl_context)
        self._where = urlsplit(url)._replace(query="", fragment="").geturl()
        self._timeout_seconds = timeout_seconds
        self._lifespan_seconds = lifespan_seconds
        self._cooldown_seconds = cooldown_seconds
        self._max_age_seconds = max_age_seconds
        self._monotonic = monotonic
        self._fetched: _Fetched | None = None
        self._trouble: str | None = None
        self._ignored: Mapping[str, str] = {}
        self._begin()
        _sources.add(self)

    def _begin(self) -> None:
        """What belongs to one process. Everything of it is changed under its own lock."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._started_at = 0.0
        self._asked_at = -math.inf
        self._wanted = False
        self._fetching = False
        self._fetches = 0

    # ---- for a KeyRing

    def keys(self) -> Mapping[str, Any]:
        """By kid, the public JWKs. At the start of a process it waits for the end of the first fetch.

        Raises:
            KeysUnavailable: none were fetched yet, or they are older than `max_age_seconds`.
        """
        if not self._running():
            self._start_or_log()
        if self._fetched is None:
            self._wait_at_start()
        fetched = self._fetched
        if fetched is None:
            raise KeysUnavailable(f"no keys were fetched from {self._where} yet ({self._trouble or 'no answer yet'})")
        age = self._monotonic() - fetched.at
        if age > self._max_age_seconds:
            raise KeysUnavailable(
                f"the keys of {self._where} are {age:.0f} s old, and may get {self._max_age_seconds:.0f} s old "
                f"({self._trouble or 'no answer yet'})"
            )
        return fetched.keys

    def look_again(self) -> None:
        """See KeySource.look_again: one fetch, which all who wait share, unless there was one a short time ago."""
        self._start_or_log()
        with self._changed:
            if not (self._fetching or self._wanted):
                if self._monotonic() - self._asked_at < self._cooldown_seconds:
                    return
                self._wanted = True
                self._changed.notify_all()
            ended = self._fetches + 1
            patience = 0.0 if _on_event_loop() else self._timeout_seconds
            if not self._changed.wait_for(lambda: self._fetches >= ended, patience):
                raise KeysUnavailable("the token's kid is not known yet, and is being looked up; try again")

    # ---- the thread

    def start(self) -> None:
        """Begin to fetch in this process, and return at once. Calling again is without effect.

        Raises:
            RuntimeError: the system has no thread to give. Call it again.
        """
        if self._running():
            return
        with self._changed:
            if not self._running():
                thread = threading.Thread(target=self._run, name="knell-jwks", daemon=True)
                thread.start()
                self._started_at = self._monotonic()
                self._thread = thread

    def wait_ready(self, timeout_seconds: float) -> bool:
        """Wait until keys were fetched. False if they were not after `timeout_seconds`."""
        self._start_or_log()
        with self._changed:
            return self._changed.wait_for(lambda: self._fetched is not None, max(0.0, timeout_seconds))

    def close(self) -> None:
        """End the thread. The keys stay, and the next use starts it again."""
        with self._changed:
            self._thread = None
            self._changed.notify_all()

    def _running(self) -> bool:
        # One that a broken log handler has ended is started again.
        return self._thread is not None and self._thread.is_alive()

    def _wait_at_start(self) -> None:
        left = self._started_at + self._timeout_seconds - self._monotonic()
        with self._changed:
            # Once a fetch has failed, whoever comes is told at once.
            self._changed.wait_for(lambda: self._fetched is not None or self._fetches > 0, max(0.0, left))

    def _start_or_log(self) -> None:
        try:
            self.start()
        except RuntimeError as error:
            log.error("jwks_not_followed", url=self._where, error=str(error))

    def _run(self) -> None:
        me, failures = threading.current_thread(), 0
        with self._changed:
            pass  # `start` has set the thread by then
        while self._thread is me:
            failures = 0 if self._fetch() else failures + 1
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._thread is not me, self._pause(failures))

    def _pause(self, failures: int) -> float:
        backoff = FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16) if failures else 0.0
        backoff = min(backoff, self._cooldown_seconds)
        if self._fetched is None:
            return backoff
        # A look-up of an unknown kid that fails while the keys are young is not tried again before they have aged.
        due = self._fetched.at + self._lifespan_seconds * REFRESH_AT * random.uniform(0.9, 1.0)  # noqa: S311
        return max(due - self._monotonic(), backoff)

    def _fetch(self) -> bool:
        with self._changed:
            self._wanted, self._fetching, self._asked_at = False, True, self._monotonic()
        try:
            error = self._attempt()
            self._tell(error)
        finally:
            with self._changed:
                self._fetching = False
                self._fetches += 1
                self._changed.notify_all()
        return error is None

    def _attempt(self) -> str | None:
        try:
            self._take(*_usable(self._client.fetch_data()))
        except PyJWKClientError as failed:
            return str(failed)
        except Exception as failed:  # a mistake in here must not end the thread
            log.error("jwks_fetch_broke", url=self._where, traceback=traceback_of(failed))
            return repr(failed)
        return None

    def _take(self, keys: Mapping[str, Any], ignored: Mapping[str, str]) -> None:
        before = self._fetched
        for kid in [] if ignored == self._ignored else sorted(ignored):
            log.error("jwks_key_ignored", url=self._where, kid=kid, why=ignored[kid])
        self._ignored = ignored
        # The same object while nothing has changed: whoever uses it has read the keys already.
        same = before is not None and before.keys == keys
        self._fetched = _Fetched(before.keys if before is not None and same else keys, self._asked_at)
        if not same:
            log.info("jwks_fetched", url=self._where, kids=sorted(keys))

    def _tell(self, error: str | None) -> None:
        before, self._trouble = self._trouble, error
        if error is not None and error != before:
            fetched = self._fetched
            age = None if fetched is None else round(self._monotonic() - fetched.at)
            log.warning("jwks_not_fetched", url=self._where, error=error, keys_age_seconds=age)
        elif error is None and before is not None:
            log.info("jwks_answers_again", url=self._where)

    def __repr__(self) -> str:
        return f"JwksUrl({self._where!r})"


@dataclass(frozen=True, slots=True)
class _Fetched:
    keys: Mapping[str, Any]
    at: float


def _usable(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys of a JWK Set that may verify signatures, by kid; and why others with a kid are dangerous.

    Raises:
        PyJWKClientError: it has no such key. A set that is empty for a moment must not lock everybody out.
    """
    if not isinstance(found.get("keys"), list):
        raise PyJWKClientError("the answer is no JWK Set")
    usable: dict[str, Any] = {}
    ignored: dict[str, str] = {}
    for jwk in found["keys"]:
        if not isinstance(jwk, dict) or not _verifies(jwk):
            continue
        try:
            kid = check_identifier("kid", jwk["kid"] if "kid" in jwk else thumbprint(jwk))
        except (KeyError, *KEY_ERRORS):
            continue
        if PRIVATE_MEMBERS & jwk.keys():
            ignored[kid] = "it is published with its secret half: everybody can sign with it; replace it"
        elif usable.setdefault(kid, jwk) != jwk:
            ignored[kid] = "another key has the same kid, so neither is used; give each a kid of its own"
    usable = {kid: jwk for kid, jwk in usable.items() if kid not in ignored}
    if not usable:
        raise PyJWKClientError("the answer has no public key that verifies signatures")
    return usable, ignored


def _verifies(jwk: Mapping[str, Any]) -> bool:
    operations = jwk.get("key_ops")
    allowed = operations is None or (isinstance(operations, list) and "verify" in operations)
    return allowed and jwk.get("use") in (None, "sig")


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


_sources: weakref.WeakSet[JwksUrl] = weakref.WeakSet()


def _begin_anew_in_child() -> None:
    # The thread is the parent's, and so might be whoever holds the lock. What was fetched is as good here.
    for source in list(_sources):
        source._begin()


os.register_at_fork(after_in_child=_begin_anew_in_child)
