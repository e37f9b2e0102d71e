"""The face of whoever terminates: a service and its handlers.

    shop = Service("shop")

    @shop.on_session_end
    def end_session(notice: Notice) -> None:
        sessions.delete(notice.iss, notice.sid)

    app = shop.celery_app()  # celery -A services.shop worker

Each end is told at least once. A handler may be called again for the same notice, after a failure or a crash, so it
should be idempotent; `Notice.id` is the same each time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload
from uuid import uuid4

import structlog

from knell.answers import Answer, Errand, Patience, answer, one_line
from knell.errors import InvalidInput, InvalidSettings, MessageRefused, ProcessDied, StoreUnavailable, Unavailable
from knell.keys import NOTICE_TYPE, TrustedKey
from knell.marks import Marks
from knell.notices import (
    Cause,
    Notice,
    NoticeBatch,
    Receipt,
    batch_id_of_revocation,
    entry_numbers,
    is_of_revocation,
    partition_of_batch,
)
from knell.resources import Resources
from knell.runs import Handler, Handlers, Run
from knell.settings import Settings, check_service_name

if TYPE_CHECKING:
    from celery import Celery

# A copy that cannot run now comes back after 3 to 8 s: longer than a short outage, shorter than a lease.
PUT_BACK_SECONDS = 3.0
PUT_BACK_SPREAD_SECONDS = 5.0

Plain = TypeVar("Plain", bound=Callable[[Notice], Awaitable[None] | None])
Batch = TypeVar("Batch", bound=Callable[[Sequence[Notice]], Awaitable[None] | None])
Missed = TypeVar("Missed", bound=Callable[[float], Awaitable[None] | None])
Undone = TypeVar("Undone", bound=Callable[[Notice], Awaitable[None] | None])

log = structlog.get_logger(__name__)


class Service:
    """A named receiver of notices.

    Args:
        name: as registered with `knell services add`; `^[a-z][a-z0-9_-]{0,62}$`.
        settings: default `Settings.from_environ()`.
        max_attempts: how often an entry is tried in all before it is parked. Default 8.
        first_retry_seconds: the longest wait before the second try; it doubles with each. The wait itself is drawn
            between 1 s and that. Default 1.
        longest_retry_seconds: what the doubling stops at. Default 600.
        dedupe: "batch" stores what is done at least every 100 ms; "each" stores it before the next entry, one at a
            time (batch handlers get one notice), for handlers that cannot be idempotent. Either way an entry is done
            when all its handlers have returned: where one notice is for two of them, both are called again if the
            second fails, or the process dies between them.
        lease_seconds: how long a process that died keeps others from its batch. Default 30.
        clock: Unix seconds; for tests. Default time.time.
        jitter: a number in [0, 1) at each call; for tests. Default random.random.

    Raises:
        InvalidSettings: an argument cannot be used.
    """

    def __init__(
        self,
        name: str,
        *,
        settings: Settings | None = None,
        max_attempts: int = 8,
        first_retry_seconds: float = 1.0,
        longest_retry_seconds: float = 600.0,
        dedupe: Literal["batch", "each"] = "batch",
        lease_seconds: float = 30.0,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.name = check_service_name(name)
        self.settings = Settings.from_environ() if settings is None else settings
        if max_attempts < 1:
            raise InvalidSettings(f"max_attempts is {max_attempts}; use 1 (never try again) or more")
        if not 0 < first_retry_seconds <= longest_retry_seconds:
            raise InvalidSettings(
                f"first_retry_seconds is {first_retry_seconds} and longest_retry_seconds {longest_retry_seconds}; "
                "the first must be above 0 and at most the longest"
            )
        if dedupe not in ("batch", "each"):
            raise InvalidSettings(f"dedupe is {dedupe!r}; use 'batch' or 'each'")
        if lease_seconds < 1:
            raise InvalidSettings(f"lease_seconds is {lease_seconds}; use 1 or more (30 is usual)")
        self._patience = Patience(
            max_attempts=max_attempts,
            first_seconds=first_retry_seconds,
            longest_seconds=longest_retry_seconds,
            jitter=jitter,
        )
        self._each = dedupe == "each"
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._handlers = Handlers(undone=Handler(self._take_back))
        self._forget: Callable[[Notice], Awaitable[None] | None] | None = None
        self.resources = Resources(self.settings)

    def now(self) -> float:
        """The time by its clock, Unix seconds."""
        return self._clock()

    # ---- handlers: one for each event

    @overload
    def on_token_end(self, handler: Plain, /) -> Plain: ...
    @overload
    def on_token_end(self, /, *, batch: Literal[False] = False) -> Callable[[Plain], Plain]: ...
    @overload
    def on_token_end(self, /, *, batch: Literal[True]) -> Callable[[Batch], Batch]: ...
    def on_token_end(self, handler: Any = None, /, *, batch: bool = False) -> Any:
        """Decorate what is called when a token has ended, by its exp or by a revocation.

        Args:
            batch: True for a handler that takes all such notices of a message at once. It raises BatchFailed to say
                which of them failed; any other exception fails them all.

        The handler may be `async def`. Raising GiveUp parks the notice at once; any other exception has it tried
        again later. InvalidInput if there is a handler already.
        """
        return self._register("token_end", handler, batch)

    @overload
    def on_session_end(self, handler: Plain, /) -> Plain: ...
    @overload
    def on_session_end(self, /, *, batch: Literal[False] = False) -> Callable[[Plain], Plain]: ...
    @overload
    def on_session_end(self, /, *, batch: Literal[True]) -> Callable[[Batch], Batch]: ...
    def on_session_end(self, handler: Any = None, /, *, batch: bool = False) -> Any:
        """Decorate what is called when a session has ended; see `on_token_end`.

        Where one notice ends a token and its session, the token's handler is called first.
        """
        return self._register("session_end", handler, batch)

    def on_missed(self, handler: Missed, /) -> Missed:
        """Decorate what is called when notices were dropped before this service came for them.

        It gets the time since when (Unix seconds), and has to compare each stored session with the denylist.
        """
        called: Missed = self._register("missed", handler, False)
        return called

    def on_undone(self, handler: Undone, /) -> Undone:
        """Decorate what is called when a revocation was undone: to forget what was kept of it, such as a tombstone.

        Nothing has to be brought back: sessions that were ended stay ended.
        """
        if self._forget is not None:
            raise InvalidInput(f"service {self.name!r} has a handler for undone already ({_name_of(self._forget)})")
        self._forget = handler
        return handler

    def _register(self, event: str, handler: Any, batch: bool) -> Any:
        if handler is None:
            return lambda decorated: self._register(event, decorated, batch)
        if not callable(handler):
            raise InvalidInput(f"on_{event} got {handler!r}, which cannot be called")
        if (there := getattr(self._handlers, event)) is not None:
            raise InvalidInput(
                f"service {self.name!r} has a handler for {event} already ({_name_of(there.call)}); "
                f"call both from one function instead of registering {_name_of(handler)}"
            )
        setattr(self._handlers, event, Handler(_given_since(handler) if event == "missed" else handler, batch))
        return handler

    # ---- notices

    def handle(
        self,
        jws: str,
        todo: Sequence[int] | None = None,
        attempt: int = 0,
        replay: bool = False,
        *,
        root_id: str | None = None,
    ) -> Receipt | None:
        """Work on one message. When it returns, the message may be acked.

        Args:
            jws: the signed notice.
            todo: the entry numbers to handle; None for all.
            attempt: how often they were tried before.
            replay: handle them although they were parked.
            root_id: the task id that the message goes back to.

        Returns:
            The receipt that was sent; None if the message was put back, to come again in a few seconds.

        Raises:
            MessageRefused: it is not to be acted on, ever.
            Unavailable: the broker did not confirm what was to be sent. The message must be redelivered; what is done
                is marked, and will not be repeated.
        """
        asked = self._asked(self._read(jws), todo)
        if isinstance(attempt, bool) or not isinstance(attempt, int) or attempt < 0:
            raise MessageRefused("the attempt is no number, 0 or more")
        if not isinstance(replay, bool):
            raise MessageRefused("replay is neither true nor false")
        errand = Errand(service=self.name, jws=jws, attempt=attempt, root_id=root_id)
        holder, batch_id, record = _holder(asked), asked[0].batch_id, asked[0].dedupe_id
        marks = Marks(
            self.resources.dedupe,
            self.name,
            record,
            holder=holder,
            lease_seconds=self._lease_seconds,
            each=self._each,
        )
        try:
            begun = self.resources.dedupe.begin(self.name, record, holder=holder, lease_seconds=self._lease_seconds)
            if begun.granted and replay:
                marks.unpark(sum(1 << notice.n for notice in asked))
        except StoreUnavailable as error:
            self._put_back(errand, asked, replay, why=str(error))
            return None
        if not begun.granted:
            self._put_back(errand, asked, replay, why="another copy of it is being worked on")
            return None
        done, parked = begun.done, 0 if replay else begun.parked
        left = [notice for notice in asked if not (done | parked) >> notice.n & 1]
        # The last process that worked on these has died: if one of them killed it, it kills the next one too. They come
        # again in two messages, those in two, until the one that kills is alone; then it counts as tried.
        suspects = [notice for notice in left if begun.abandoned and _worked_on(begun.abandoned) >> notice.n & 1]
        failed = self._run([notice for notice in left if notice not in suspects], marks)
        if len(suspects) == 1:
            failed[suspects[0].n] = ProcessDied("the process that handled it has died")
        done |= marks.done
        found = answer(
            errand,
            asked,
            done={notice.n for notice in asked if done >> notice.n & 1},
            parked_before={notice.n for notice in asked if parked >> notice.n & 1},
            failed=failed,
            patience=self._patience,
            now=self._clock(),
            put_back_at=self._soon(),
            in_halves=bool(suspects),
        )
        for n, failure in failed.items():
            log.warning("handler_failed", service=self.name, notice=f"{batch_id}.{n}", error=one_line(failure))
        return self._send(found, marks)

    def _run(self, left: Sequence[Notice], marks: Marks) -> dict[int, Exception]:
        run = Run(self._handlers, marks, self.resources, one_at_a_time=self._each)
        with marks:
            run.run(left)
        return run.failed

    def _send(self, found: Answer, marks: Marks) -> Receipt:
        try:
            self.resources.publish(found.messages)
        except Unavailable:
            marks.release()
            raise
        # After the confirm: an entry that is marked as parked is skipped, so its error must be out by then.
        marks.release(parked=sum(1 << n for n in found.receipt.parked))
        return found.receipt

    def _put_back(self, errand: Errand, asked: Sequence[Notice], replay: bool, *, why: str) -> None:
        log.info("put_back", service=self.name, batch_id=asked[0].batch_id, why=why)
        self.resources.publish([errand.again(asked, attempt=errand.attempt, eta=self._soon(), replay=replay)])

    def _soon(self) -> float:
        return self._clock() + PUT_BACK_SECONDS + PUT_BACK_SPREAD_SECONDS * self._patience.jitter()

    def _read(self, jws: str) -> NoticeBatch:
        if not isinstance(jws, str):
            raise MessageRefused("the notice is no text")
        payload, key = self.resources.trust.verify(jws, typ=NOTICE_TYPE, audience=self.settings.audience)
        batch = NoticeBatch.from_payload(payload)
        for notice in batch.entries:
            if not key.may_tell(notice.iss, notice.cause):
                raise MessageRefused(
                    f"key {key.kid[:64]!r} may not say that something of {notice.iss!r} is {notice.cause.value}"
                )
        _check_name(batch, key)
        if (late := self._clock() - batch.expires_at) >= 0:
            raise MessageRefused(f"the notice expired {late:.0f} s ago")
        return batch

    def _asked(self, batch: NoticeBatch, todo: Sequence[int] | None) -> list[Notice]:
        if todo is None:
            return list(batch.entries)
        wanted = set(entry_numbers(todo))
        asked = [notice for notice in batch.entries if notice.n in wanted]
        if not asked or len(asked) != len(wanted):
            raise MessageRefused("the message asks for entries that its notice does not have")
        return asked

    def _take_back(self, notice: Notice) -> Awaitable[None] | None:
        """A revocation was undone: its own notice, if it still waits here, is then done without a handler."""
        if notice.revocation_id is not None:
            record = replace(notice, batch_id=batch_id_of_revocation(notice.revocation_id)).dedupe_id
            self.resources.dedupe.mark(self.name, record, holder=uuid4().hex, done=1, lease_seconds=0)
        return None if self._forget is None else self._forget(notice)

    # ---- the worker

    @contextmanager
    def elsewhere(
        self,
        settings: Settings,
        resources: Resources,
        *,
        clock: Callable[[], float],
        jitter: Callable[[], float],
        around: Callable[[Handlers], Handlers],
    ) -> Iterator[None]:
        """Let it work elsewhere while the context lasts: what `knell.testing` does. Afterwards it is as it was.

        Args:
            settings, resources, clock, jitter: take the place of its own.
            around: is given its handlers, and gives what is called in their place.
        """
        before = (self.settings, self.resources, self._clock, self._patience, self._handlers)
        self.settings, self.resources, self._clock = settings, resources, clock
        self._patience, self._handlers = replace(self._patience, jitter=jitter), around(self._handlers)
        try:
            yield
        finally:
            self.settings, self.resources, self._clock, self._patience, self._handlers = before

    def celery_app(self) -> Celery:
        """The Celery app of this service's worker: `celery -A services.shop worker`. See `knell.service_app`."""
        from knell.service_app import make_app

        return make_app(self)

    def close(self) -> None:
        """Close what this process has opened for the service: connections and the event loop of async handlers."""
        self.resources.close()

    def __repr__(self) -> str:
        return f"Service({self.name!r})"


def _holder(asked: Sequence[Notice]) -> str:
    """Names a run for its lease. It also tells, should the process die, which entries it was working on."""
    return f"{uuid4().hex}-{sum(1 << notice.n for notice in asked):x}"


def _worked_on(holder: str) -> int:
    return int(holder.rpartition("-")[2] or "0", 16)


def _check_name(batch: NoticeBatch, key: TrustedKey) -> None:
    """MessageRefused if a batch is named as one that its signer cannot have made."""
    partition_of_batch(batch.id)
    if not is_of_revocation(batch.id):
        # Records of expiries are the notifier's, over all issuers; of its causes, `missed` is nobody else's.
        if not key.may_tell("", Cause.MISSED):
            raise MessageRefused(f"key {key.kid[:64]!r} is not the notifier's, and may name no batch {batch.id[:64]!r}")
    elif len(batch.entries) != 1:
        raise MessageRefused("the notice of a revocation, or of an undo, has more than one entry")


def _given_since(handler: Callable[[float], Any]) -> Callable[[Notice], Any]:
    def missed(notice: Notice) -> Any:
        return handler(notice.at)

    return missed


def _name_of(handler: Any) -> str:
    return getattr(handler, "__qualname__", None) or repr(handler)
