"""Watches: being told the moment that a token, or the session it belongs to, ends."""

from __future__ import annotations

import heapq
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import structlog

from knell.denylist import Denylist
from knell.redaction import traceback_of
from knell.revocations import Revocation, Scope, claims_of, named_by
from knell.store import Change
from knell.tokens import TokenRef

log = structlog.get_logger(__name__)

# The clock that tokens end by may be set while the timer sleeps; it looks again at least this often.
LONGEST_SLEEP_SECONDS = 1.0
# `close` waits this long for a callback that is running.
CLOSE_SECONDS = 5.0
# How many watches one step of a resync looks up before it lets other threads in.
_RECHECK_PAGE = 1000
# The timer heap may hold this many watches that have ended by other ways before it is made anew.
_SLACK = 1024

_Key = tuple[Scope, str, str]


@dataclass(frozen=True, slots=True)
class TokenEnd:
    """How a watched token, or its session, came to its end.

    Attributes:
        cause: "expired" or "revoked".
        at: when it ended, Unix seconds: its exp or session_exp, or when this process learned of the revocation.
        revocation_id: the revocation's id; None if it expired.
        reason: why it was revoked; None if nothing was given, or if it expired.
    """

    cause: Literal["expired", "revoked"]
    at: float
    revocation_id: str | None = None
    reason: str | None = None


class Watch:
    """One watched token. A context manager: leaving it cancels the watch.

    Attributes:
        token: what is watched.
        claims: its claims, as far as they are known.
    """

    def __init__(
        self, owner: Watches, token: TokenRef, on_end: Callable[[TokenEnd], None], claims: Mapping[str, Any]
    ) -> None:
        self.token = token
        self.claims = claims
        self._owner = owner
        self._on_end: Callable[[TokenEnd], None] | None = on_end

    def cancel(self) -> None:
        """Do not call back, unless the call has begun. Cancelling again is without effect."""
        self._owner._cancel(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()


class Watches:
    """The watches of a verifier: an index by what a revocation can name, a timer heap, one thread that calls back."""

    def __init__(
        self,
        denylist: Callable[[], Denylist],
        *,
        clock: Callable[[], float] = time.time,
        leeway_seconds: float = 0.0,
        issuers: Collection[str] = (),
    ) -> None:
        """Make a set of watches; its thread starts with the first one.

        Args:
            denylist: gives the denylist as it is now.
            clock: Unix seconds.
            leeway_seconds: how long after its exp a token is still accepted.
            issuers: see `Denylist.find`.
        """
        self._denylist = denylist
        self._issuers = tuple(issuers)
        self._clock = clock
        self._leeway_seconds = leeway_seconds
        self._closed = False
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._changed = threading.Condition()
        # Only the ends of a dict, never a set: callbacks come in the order in which the watches were made.
        self._by_key: dict[_Key, dict[Watch, None]] = {}
        self._live: dict[Watch, None] = {}
        self._timers: list[tuple[float, int, Watch]] = []
        self._made = 0
        self._ended: deque[tuple[Watch, TokenEnd]] = deque()
        self._recheck = False
        self._calling = 0
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """How many watches wait for their end."""
        return len(self._live)

    def add(
        self, token: TokenRef, on_end: Callable[[TokenEnd], None], *, claims: Mapping[str, Any] | None = None
    ) -> Watch:
        """Watch a token. `on_end` is called from the thread of the watches, at once if the token has ended already.

        Args:
            claims: its claims set, for revocations by claims. Default: what the token's reference has of it.
        """
        watch = Watch(self, token, on_end, claims_of(token) if claims is None else dict(claims))
        with self._changed:
            if self._closed:
                raise RuntimeError("the verifier was closed; it watches nothing any more")
            self._live[watch] = None
            for key in self._keys(token):
                self._by_key.setdefault(key, {})[watch] = None
            self._made += 1
            heapq.heappush(self._timers, (ends_at(token, self._leeway_seconds), self._made, watch))
            self._start()
            # Looked up after it was entered: a revocation is either in the denylist by now, or will find the watch.
            revocation = self._denylist().find(token, claims=watch.claims, issuers=self._issuers)
            if revocation is not None:
                self._end(watch, self._revoked(revocation))
            self._changed.notify()
        return watch

    def on_change(self, change: Change) -> None:
        """Take note of a change that was applied to the denylist."""
        if change.kind != "revoked":
            return
        revocation = change.revocation
        with self._changed:
            named = self._by_key.get(_key_of(revocation))
            if not named:
                return
            # Of a key all that are found by its name are meant, whichever of the issuers their tokens speak of.
            of_key = revocation.scope is Scope.KEY
            for watch in [one for one in named if of_key or revocation.refuses(one.token, claims=one.claims)]:
                self._end(watch, self._revoked(revocation))
            self._changed.notify()

    def on_resync(self, denylist: Denylist) -> None:
        """Take note that the denylist was replaced: every watch has to be looked up in the new one."""
        del denylist  # the thread takes the one that is there when it gets to it
        with self._changed:
            self._recheck = True
            self._changed.notify()

    def settle(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Call back for all that has ended by now, and wait for callbacks that run, for at most so long.

        For whoever moves the clock: the thread finds out by itself, within LONGEST_SLEEP_SECONDS.
        """
        with self._changed:
            self._end_what_is_due()
        self._call_back()
        with self._changed:
            self._changed.wait_for(lambda: not self._calling, timeout_seconds)

    def close(self) -> None:
        """Drop every watch without a call, and stop the thread."""
        with self._changed:
            self._closed = True
            self._live.clear()
            self._by_key.clear()
            self._timers.clear()
            self._ended.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_SECONDS)

    # ---- with the lock held

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="knell-watches", daemon=True)
            thread.start()  # may fail, and is then tried again with the next watch
            self._thread = thread

    def _end(self, watch: Watch, end: TokenEnd) -> None:
        if self._forget(watch):
            self._ended.append((watch, end))

    def _keys(self, token: TokenRef) -> dict[_Key, None]:
        found = dict.fromkeys((scope, token.iss, value) for scope, value in named_by(token))
        if token.kid is not None:
            found |= dict.fromkeys((Scope.KEY, iss, token.kid) for iss in self._issuers)
        return found

    def _revoked(self, revocation: Revocation) -> TokenEnd:
        return TokenEnd("revoked", self._clock(), revocation.id, revocation.reason)

    def _forget(self, watch: Watch) -> bool:
        if watch not in self._live:
            return False
        del self._live[watch]
        for key in self._keys(watch.token):
            named = self._by_key[key]
            del named[watch]
            if not named:
                del self._by_key[key]
        if len(self._timers) > 2 * len(self._live) + _SLACK:
            self._timers = [timer for timer in self._timers if timer[2] in self._live]
            heapq.heapify(self._timers)
        return True

    def _end_what_is_due(self) -> float:
        """How long, in seconds, until the next one is due."""
        while self._timers:
            at, _, watch = self._timers[0]
            wait_seconds = at - self._clock()
            if wait_seconds > 0 and watch in self._live:
                return min(wait_seconds, LONGEST_SLEEP_SECONDS)
            heapq.heappop(self._timers)
            self._end(watch, TokenEnd("expired", at - self._leeway_seconds))
        return LONGEST_SLEEP_SECONDS

    # ---- without it

    def _cancel(self, watch: Watch) -> None:
        with self._changed:
            self._forget(watch)
            watch._on_end = None

    def _run(self) -> None:
        changed = self._changed
        while True:
            with changed:
                if self._closed:
                    return
                wait_seconds = self._end_what_is_due()
                recheck, self._recheck = self._recheck, False
                if not (recheck or self._ended):
                    changed.wait(wait_seconds if self._live else None)
                    continue
            if recheck:
                self._look_all_up()
            self._call_back()

    def _look_all_up(self) -> None:
        with self._changed:
            watches = list(self._live)
        for first in range(0, len(watches), _RECHECK_PAGE):
            denylist = self._denylist()
            page = watches[first : first + _RECHECK_PAGE]
            found = [(watch, denylist.find(watch.token, claims=watch.claims, issuers=self._issuers)) for watch in page]
            with self._changed:
                for watch, revocation in found:
                    if revocation is not None:
                        self._end(watch, self._revoked(revocation))

    def _call_back(self) -> None:
        while True:
            with self._changed:
                if not self._ended:
                    return
                watch, end = self._ended.popleft()
                on_end, watch._on_end = watch._on_end, None
                if on_end is None:
                    continue
                self._calling += 1
            try:
                on_end(end)
            except BaseException as error:
                # SystemExit as well: in this thread it would end nothing but every other watch of the process.
                log.error(
                    "watch_callback_failed",
                    iss=watch.token.iss,
                    jti=watch.token.jti,
                    traceback=traceback_of(error),
                )
            finally:
                with self._changed:
                    self._calling -= 1
                    self._changed.notify_all()


def ends_at(token: TokenRef, leeway_seconds: float) -> float:
    """When a token stops being accepted, Unix seconds: at exp or session_exp, whichever is first, plus the leeway."""
    end = token.exp if token.session_exp is None else min(token.exp, token.session_exp)
    return end + leeway_seconds


def _key_of(revocation: Revocation) -> _Key:
    """The key of the watches that a revocation may name; by claims it may be any of the issuer's."""
    if revocation.scope is Scope.CLAIMS:
        return (Scope.ISSUER, revocation.iss, revocation.iss)
    return (revocation.scope, revocation.iss, revocation.value)


_all: weakref.WeakSet[Watches] = weakref.WeakSet()


def _drop_in_child() -> None:
    # What the callbacks of a parent's watches would close belongs to the parent.
    for watches in list(_all):
        watches._begin()


os.register_at_fork(after_in_child=_drop_in_child)
