"""The publisher: messages go to the broker from a thread of its own, and nobody else waits for the broker."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import structlog
from amqp.exceptions import ChannelError
from kombu import Connection

from knell.confirms import BatchChannel, ConfirmChannel, EmbeddedChannel, address
from knell.connection import BROKER_ERRORS, CONNECT_SECONDS, abandon, connect, queue_depth
from knell.errors import BrokerUnavailable, InvalidInput
from knell.messages import Message
from knell.settings import Settings

__all__ = ["Publisher", "connect", "queue_depth"]

log = structlog.get_logger()

# Enough to make one wait for confirms cheap; small enough for its confirms to come well within the time-out.
BATCH = 1000
# While there is nothing to publish: finds a connection that died within two of these.
HEARTBEAT_SECONDS = 10.0
# After a failure nothing is tried for this long, doubled with each further one, up to the second.
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 15.0


class _Call:
    """One call of `send`: its future, and how many of its messages are not confirmed yet."""

    def __init__(self, count: int) -> None:
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()
        self._lock = threading.Lock()
        self._unconfirmed = count
        self._settled = False

    def confirm(self) -> None:
        with self._lock:
            self._unconfirmed -= 1
            if self._unconfirmed or self._settled:
                return
            self._settled = True
        self.future.set_result(None)

    def fail(self, error: Exception) -> None:
        with self._lock:
            if self._settled:
                return
            self._settled = True
        self.future.set_exception(error)


class _Entry:
    """One message of a call, until it is answered."""

    __slots__ = ("answered", "call", "message")

    def __init__(self, call: _Call, message: Message) -> None:
        self.call = call
        self.message = message
        self.answered = False

    def confirm(self) -> None:
        self.answered = True
        self.call.confirm()

    def fail(self, error: Exception) -> None:
        self.answered = True
        self.call.fail(error)


class _Answers:
    """Hands the broker's answers to the entries of one batch."""

    def __init__(self, entries: Sequence[_Entry]) -> None:
        self._entries = entries

    def confirmed(self, number: int) -> None:
        self._entries[number].confirm()

    def refused(self, number: int, reason: str) -> None:
        self._entries[number].fail(BrokerUnavailable(reason))


class _Breaker:
    """Says for how long a broker that failed is not to be asked again."""

    def __init__(self) -> None:
        self.pause_seconds = 0.0
        self._until = 0.0
        self._reason = ""

    def trip(self, reason: str) -> None:
        self.pause_seconds = min(max(FIRST_PAUSE_SECONDS, 2 * self.pause_seconds), LONGEST_PAUSE_SECONDS)
        self._until = time.monotonic() + self.pause_seconds
        self._reason = reason

    def reset(self) -> None:
        self.pause_seconds = self._until = 0.0

    def error(self) -> BrokerUnavailable | None:
        left = self._until - time.monotonic()
        if left <= 0:
            return None
        return BrokerUnavailable(f"the broker failed ({self._reason}); the next attempt is in {left:.1f} s")


class Publisher:
    """Publishes messages with confirms, in batches, from one daemon thread with a connection of its own.

    The thread starts with the first message, and again in a child after a fork. Several threads may call `send`.

    Args:
        settings: which broker.
        capacity: how many messages may wait for their confirm; `send` fails at once beyond it.
        confirm_timeout_seconds: how long the broker has to confirm a batch. A message that waits behind another batch
            is answered within twice that, and the time to connect (2 s for each server of the URL).
        clock: Unix seconds, by which an eta's delay is told.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        capacity: int = 20_000,
        confirm_timeout_seconds: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._capacity = capacity
        self._confirm_timeout = confirm_timeout_seconds
        self._clock = clock
        self._closed = False
        self._start_afresh()
        _publishers.add(self)

    def send(self, messages: Sequence[Message]) -> Future[None]:
        """Publish messages; never blocks.

        Returns:
            A future that is done when the broker has confirmed all of them. It fails with BrokerUnavailable if that
            did not happen (some may have arrived all the same), or InvalidInput for an eta or a routing key that no
            broker takes. Its callbacks run on the publisher's thread and must be short.
        """
        call = _Call(len(messages))
        if not messages:
            call.future.set_result(None)
        elif (refusal := self._refusal(messages)) is not None:
            call.fail(refusal)
        else:
            self._put(call, messages)
        return call.future

    @property
    def broken(self) -> bool:
        """True from a failure of the broker to the next batch that it confirms."""
        return self._breaker.pause_seconds > 0

    @property
    def waiting(self) -> int:
        """How many messages are not answered yet."""
        return len(self._queue) + len(self._batch)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Publish what waits, for at most this long, and end. What is left then fails with BrokerUnavailable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_seconds)
        self._fail([*self._batch, *self._take(self._capacity)], BrokerUnavailable("the publisher was closed"))

    # ---- the callers' side

    def _start_afresh(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._batch: list[_Entry] = []
        self._thread: threading.Thread | None = None
        self._connection: Connection | None = None
        self._channel: BatchChannel | None = None
        self._breaker = _Breaker()

    def _refusal(self, messages: Sequence[Message]) -> Exception | None:
        now = self._clock()
        try:
            for message in messages:
                address(message, now=now)
        except InvalidInput as error:
            return error
        return self._breaker.error()

    def _put(self, call: _Call, messages: Sequence[Message]) -> None:
        with self._changed:
            if self._closed:
                call.fail(BrokerUnavailable("the publisher was closed"))
            elif self.waiting + len(messages) > self._capacity:
                text = f"{self.waiting} messages wait for the broker and the publisher holds {self._capacity}"
                call.fail(BrokerUnavailable(text))
            else:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="knell-publisher", daemon=True)
                    try:
                        thread.start()
                    except RuntimeError as error:  # the system has no thread to give; the next call tries again
                        call.fail(BrokerUnavailable(f"nothing can be published: {error}"))
                        return
                    self._thread = thread
                self._queue.extend(_Entry(call, message) for message in messages)
                self._changed.notify()

    # ---- the thread's side

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._queue and not self._closed:
                    self._changed.wait(HEARTBEAT_SECONDS / 2)
                if not self._queue and self._closed:
                    break
            self._batch = [entry for entry in self._take(BATCH) if not entry.call.future.done()]
            if self._batch:
                self._publish(self._batch)
                self._batch = []
            else:
                self._keep_alive()
        self._hang_up()

    def _take(self, count: int) -> list[_Entry]:
        with self._changed:
            return [self._queue.popleft() for _ in range(min(count, len(self._queue)))]

    def _publish(self, entries: Sequence[_Entry]) -> None:
        known = self._channel is not None
        try:
            self._attempt(entries)
        except ChannelError as error:
            self._abandon()
            self._without_exchange(_open(entries), error)
        except Exception as error:
            # Whatever it is, the thread has to go on: a future that nobody answers holds its caller for ever.
            self._abandon()
            left = _open(entries)
            if known and isinstance(error, BROKER_ERRORS) and not isinstance(error, TimeoutError):
                self._publish(left)  # the connection was lost while it was idle: that says nothing about the broker
            else:
                self._give_up(left, error)
        else:
            self._breaker.reset()

    def _attempt(self, entries: Sequence[_Entry]) -> None:
        channel = self._channel or self._open_channel()
        deadline = time.monotonic() + self._confirm_timeout
        messages = [entry.message for entry in entries]
        channel.publish(messages, _Answers(entries), now=self._clock(), deadline=deadline)

    def _open_channel(self) -> BatchChannel:
        self._connection = connect(
            self._settings,
            heartbeat=HEARTBEAT_SECONDS,
            timeout_seconds=self._confirm_timeout,
            connect_timeout_seconds=min(CONNECT_SECONDS, self._confirm_timeout),
        )
        make = EmbeddedChannel if self._settings.embedded else ConfirmChannel
        self._channel = make(self._connection)
        return self._channel

    def _without_exchange(self, entries: Sequence[_Entry], error: ChannelError) -> None:
        """The broker has closed the channel over an exchange; only the messages to that one are to blame."""
        exchanges: dict[str, list[_Entry]] = {}
        for entry in entries:
            exchanges.setdefault(entry.message.exchange, []).append(entry)
        if len(exchanges) > 1:
            for group in exchanges.values():
                self._publish(group)
        else:
            log.error("publish_refused", exchange="".join(exchanges), error=str(error))
            self._fail(entries, BrokerUnavailable(f"the broker refused: {error}"))

    def _give_up(self, entries: Sequence[_Entry], error: Exception) -> None:
        reason = str(error) or type(error).__name__
        self._breaker.trip(reason)
        log.warning("broker_unavailable", error=reason, pause_seconds=self._breaker.pause_seconds)
        failure = BrokerUnavailable(f"the broker did not confirm: {reason}")
        failure.__cause__ = error
        self._fail([*entries, *self._take(self._capacity)], failure)

    @staticmethod
    def _fail(entries: Sequence[_Entry], error: Exception) -> None:
        for entry in entries:
            entry.fail(error)

    def _keep_alive(self) -> None:
        if self._connection is None or self._settings.embedded:
            return
        try:
            try:
                self._connection.drain_events(timeout=0)
            except TimeoutError:
                self._connection.heartbeat_check()
        except BROKER_ERRORS as error:
            log.info("broker_connection_lost", error=str(error))
            self._abandon()

    def _abandon(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            abandon(connection)

    def _hang_up(self) -> None:
        if self._connection is not None:
            try:
                self._connection.release()
            except BROKER_ERRORS as error:
                log.info("broker_connection_lost", error=str(error))
            self._connection = self._channel = None


def _open(entries: Sequence[_Entry]) -> list[_Entry]:
    return [entry for entry in entries if not entry.answered]


_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The thread, and whoever held a lock, stayed in the parent; so do its connection and what waits there.
    for publisher in list(_publishers):
        inherited: Any = publisher._connection
        _left_to_parent.append(inherited)
        publisher._start_afresh()


# A connection that is collected as garbage says good-bye to the broker, on the socket that the parent still uses.
_left_to_parent: list[Any] = []

os.register_at_fork(after_in_child=_after_fork_in_child)
