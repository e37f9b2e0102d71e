"""Publishing a batch: everything is sent, then the confirms are awaited once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

import amqp
from amqp.exceptions import ChannelError, NotFound
from kombu import Connection
from kombu.transport.native_delayed_delivery import MAX_LEVEL, calculate_routing_key, level_name

from knell import topology
from knell.embedded_routing import ETA_HEADER
from knell.errors import InvalidInput
from knell.messages import Message
from knell.settings import LONGEST_TIMER_SECONDS

CONTENT_TYPE = "application/json"
CONTENT_ENCODING = "utf-8"
PERSISTENT = 2
# AMQP's short strings end here (AMQP 0-9-1, section 4.2.5.3).
MAX_KEY_BYTES = 255
# The ladder counts whole seconds; what is due sooner goes straight to its queue.
SHORTEST_DELAY_SECONDS = 1.0
# With these the broker's answer cannot be "no queue": an alternate exchange, or the delay ladder, takes everything.
NEVER_RETURNED = frozenset({topology.NOTICES, topology.DEAD})


class Outcome(Protocol):
    """Who is told what became of the messages of a batch, by their number in it."""

    def confirmed(self, number: int) -> None:
        """The broker has it."""

    def refused(self, number: int, reason: str) -> None:
        """The broker has answered that it does not take it."""


class BatchChannel(Protocol):
    """A channel that publishes batches. After an exception it must not be used again."""

    def publish(self, messages: Sequence[Message], outcome: Outcome, *, now: float, deadline: float) -> None:
        """Publish, and return when every message was answered.

        Args:
            now: Unix seconds, to tell delays by.
            deadline: by time.monotonic().

        Raises:
            TimeoutError: not all were answered by then; those that were have been told.
            ChannelError: an exchange does not exist, or may not be written to.
            OSError, AMQPError, SQLite's errors: the connection was lost.
        """


@dataclass(frozen=True, slots=True)
class Address:
    """Where a message enters the broker."""

    exchange: str
    routing_key: str
    mandatory: bool


def address(message: Message, *, now: float) -> Address:
    """Straight to its exchange, or the level of the delay ladder at which its delay starts.

    The same key at the ladder's top, where Celery enters, is delivered the same, ten times slower.

    Raises:
        InvalidInput: the eta is too far away for the ladder, or the key is too long.
    """
    delay = 0.0 if message.eta is None else message.eta - now
    if delay < SHORTEST_DELAY_SECONDS:
        mandatory = message.exchange not in NEVER_RETURNED
        return _checked(Address(message.exchange, message.routing_key, mandatory))
    if delay > LONGEST_TIMER_SECONDS:
        raise InvalidInput(
            f"the eta is {delay:.0f} s away and the delay ladder holds {LONGEST_TIMER_SECONDS:.0f} s; "
            "send it nearer to its time"
        )
    if not message.routing_key:
        raise InvalidInput(f"a message to {message.exchange!r} has an eta and no routing key; the key routes after it")
    seconds = int(delay)
    level = min(seconds.bit_length() - 1, MAX_LEVEL)
    return _checked(Address(level_name(level), calculate_routing_key(seconds, message.routing_key), False))


def _checked(found: Address) -> Address:
    if (size := len(found.routing_key.encode())) > MAX_KEY_BYTES:
        raise InvalidInput(f"routing key {found.routing_key!r} has {size} bytes; the limit is {MAX_KEY_BYTES}")
    return found


@dataclass(slots=True)
class _Batch:
    """What is on its way on a channel: delivery tags in order, and what came back as unroutable."""

    outcome: Outcome
    numbers: dict[int, int] = field(default_factory=dict)
    ids: dict[int, str] = field(default_factory=dict)
    returned: dict[str, str] = field(default_factory=dict)

    def settle(self, tag: int, *, multiple: bool, nacked: bool) -> None:
        """Apply one confirm, for one delivery tag or for all up to it."""
        for one in [waiting for waiting in self.numbers if waiting <= tag] if multiple else [tag]:
            number = self.numbers.pop(one, None)
            if number is None:
                continue
            if nacked:
                self.outcome.refused(number, "the broker refused it (basic.nack): a queue is full, or failed")
            elif (reason := self.returned.pop(self.ids.pop(one), None)) is not None:
                self.outcome.refused(number, reason)
            else:
                self.outcome.confirmed(number)


class ConfirmChannel:
    """A RabbitMQ channel in confirm mode."""

    def __init__(self, connection: Connection) -> None:
        channel: Any = connection.channel()
        self._channel = channel
        self._connection: Any = connection.connection
        self._connection.on_blocked = self._on_blocked
        self._channel.confirm_select()
        self._channel.events["basic_ack"].add(lambda tag, multiple: self._settle(tag, multiple, nacked=False))
        self._channel.events["basic_nack"].add(lambda tag, multiple: self._settle(tag, multiple, nacked=True))
        self._channel.events["basic_return"].add(self._returned)
        self._tag = 0
        self._batch: _Batch | None = None
        self._blocked: str | None = None

    def publish(self, messages: Sequence[Message], outcome: Outcome, *, now: float, deadline: float) -> None:
        """See BatchChannel."""
        batch = self._batch = _Batch(outcome)
        for number, message in enumerate(messages):
            where = address(message, now=now)
            made = _amqp_message(message)
            self._tag += 1
            batch.numbers[self._tag], batch.ids[self._tag] = number, made.properties["message_id"]
            self._check(batch, deadline)
            self._channel._basic_publish(made, where.exchange, where.routing_key, mandatory=where.mandatory)
        while batch.numbers:
            self._connection.drain_events(timeout=self._check(batch, deadline))
        self._batch = None

    def _check(self, batch: _Batch, deadline: float) -> float:
        """How long is left; TimeoutError if nothing is, or if the broker said that waiting is in vain."""
        left = deadline - time.monotonic()
        if left <= 0 or self._blocked is not None:
            reason = self._blocked or "no confirm in time"
            raise TimeoutError(f"{reason}; {len(batch.numbers)} messages are unconfirmed")
        return left

    def _settle(self, tag: int, multiple: bool, *, nacked: bool) -> None:
        if self._batch is not None:
            self._batch.settle(tag, multiple=multiple, nacked=nacked)

    def _on_blocked(self, reason: str) -> None:
        # A memory or disk alarm: the broker reads nothing more from this connection until it is over.
        self._blocked = reason

    def _returned(self, error: Exception, exchange: str, routing_key: str, message: amqp.Message) -> None:
        if self._batch is not None:
            self._batch.returned[message.properties["message_id"]] = _no_route(exchange, routing_key)


class EmbeddedChannel:
    """A channel of the embedded broker, which has stored a message when publish returns."""

    def __init__(self, connection: Connection) -> None:
        self._channel: Any = connection.channel()

    def publish(self, messages: Sequence[Message], outcome: Outcome, *, now: float, deadline: float) -> None:
        """See BatchChannel."""
        for number, message in enumerate(messages):
            headers = dict(message.headers)
            if message.eta is not None:
                # The file holds it until then. Celery's own eta would have the worker hold it up to a second more.
                headers |= {ETA_HEADER: message.eta, "eta": None}
            properties = {"correlation_id": message.correlation_id, "message_id": str(uuid4())}
            made = self._channel.prepare_message(
                message.body,
                content_type=CONTENT_TYPE,
                content_encoding=CONTENT_ENCODING,
                headers=headers,
                properties=properties | {"delivery_mode": PERSISTENT},
            )
            mandatory = message.exchange not in NEVER_RETURNED
            try:
                self._channel.basic_publish(made, message.exchange, message.routing_key, mandatory=mandatory)
            except NotFound:
                raise
            except ChannelError:
                outcome.refused(number, _no_route(message.exchange, message.routing_key))
            else:
                outcome.confirmed(number)


def _amqp_message(message: Message) -> amqp.Message:
    properties: dict[str, Any] = {
        "content_type": CONTENT_TYPE,
        "content_encoding": CONTENT_ENCODING,
        "delivery_mode": PERSISTENT,
        "application_headers": dict(message.headers),
        "message_id": str(uuid4()),
    }
    if message.correlation_id is not None:
        properties["correlation_id"] = message.correlation_id
    return amqp.Message(message.body, **properties)


def _no_route(exchange: str, routing_key: str) -> str:
    return f"no queue takes {routing_key!r} from exchange {exchange!r}; `knell topology apply` declares what is missing"
