"""A recorder: what a service's handlers are called with, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from knell.errors import BatchFailed
from knell.notices import Notice
from knell.runs import Handler, Handlers
from knell.service import Service
from knell.store import Parked, Store

Event = Literal["token_end", "session_end", "missed", "undone"]
EVENTS: tuple[Event, ...] = ("token_end", "session_end", "missed", "undone")


@dataclass(frozen=True, slots=True)
class Call:
    """One notice that a handler was called with.

    Attributes:
        event: token_end, session_end, missed or undone.
        notice: the notice.
        at: when, Unix seconds by the test's clock.
        error: what the handler raised for it; None if it returned.
    """

    event: Event
    notice: Notice
    at: float
    error: Exception | None = None


class Recorder:
    """Records a service's handlers, which are called as ever. Made by `Knell.record`.

    Attributes:
        service: the service.
        calls: every call, in order, those that failed as well; a batch handler's call is one for each notice.
    """

    def __init__(self, service: Service, store: Store, clock: Callable[[], float], *, everything: bool) -> None:
        self.service = service
        self.calls: list[Call] = []
        self._store = store
        self._clock = clock
        self._everything = everything
        self._failures: list[Exception] = []

    @property
    def session_ends(self) -> list[Notice]:
        """The notices that on_session_end has handled."""
        return self._handled("session_end")

    @property
    def token_ends(self) -> list[Notice]:
        """The notices that on_token_end has handled."""
        return self._handled("token_end")

    @property
    def missed(self) -> list[float]:
        """Since when notices were missed, Unix seconds, for each time that on_missed has handled it."""
        return [notice.at for notice in self._handled("missed")]

    @property
    def undone(self) -> list[Notice]:
        """The notices of revocations that were undone."""
        return self._handled("undone")

    @property
    def failures(self) -> list[Call]:
        """The calls whose handler raised something."""
        return [call for call in self.calls if call.error is not None]

    @property
    def parked(self) -> list[Parked]:
        """What the service has given up on."""
        return self._store.parked(service=self.service.name, limit=1000)

    def fail(self, error: Exception | None = None, *, times: int = 1) -> None:
        """Let the next calls of a handler fail: it is not called, and this is raised in its place.

        Args:
            error: default a ConnectionError.
            times: how many calls. A batch is one.
        """
        self._failures += [ConnectionError("it fails, as the test wanted") if error is None else error] * times

    def clear(self) -> None:
        """Forget the calls."""
        self.calls.clear()

    # ---- for Knell

    def around(self, handlers: Handlers) -> Handlers:
        """Handlers that record, and call these; with `everything`, events that have none are recorded as well."""
        found = {event: getattr(handlers, event) for event in EVENTS}
        recorded = [event for event in EVENTS if self._everything or found[event] is not None]
        return replace(handlers, **{event: self._recorded(event, found[event]) for event in recorded})

    def _handled(self, event: Event) -> list[Notice]:
        return [call.notice for call in self.calls if call.event == event and call.error is None]

    def _recorded(self, event: Event, handler: Handler | None) -> Handler:
        if handler is None:
            return Handler(lambda given: self._call(event, given, lambda _: None))
        if handler.is_async:

            async def call(given: Any) -> None:
                await self._call_async(event, given, handler.call)

            return Handler(call, handler.batch)
        return Handler(lambda given: self._call(event, given, handler.call), handler.batch)

    def _call(self, event: Event, given: Notice | Sequence[Notice], call: Callable[[Any], Any]) -> Any:
        try:
            self._fail_if_wanted(event)
            result = call(given)
        except Exception as error:
            self._note(event, given, error)
            raise
        self._note(event, given, None)
        return result

    async def _call_async(self, event: Event, given: Notice | Sequence[Notice], call: Callable[[Any], Any]) -> None:
        try:
            self._fail_if_wanted(event)
            await call(given)
        except Exception as error:
            self._note(event, given, error)
            raise
        self._note(event, given, None)

    def _fail_if_wanted(self, event: Event) -> None:
        if self._failures and event != "undone":
            raise self._failures.pop(0)

    def _note(self, event: Event, given: Notice | Sequence[Notice], error: Exception | None) -> None:
        for notice in [given] if isinstance(given, Notice) else given:
            failed: Any = error
            if isinstance(error, BatchFailed):
                failed = error.errors.get(notice.id, None if error.errors else error)
            self.calls.append(Call(event, notice, self._clock(), failed))
