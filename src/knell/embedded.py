"""The embedded broker: a kombu transport over one SQLite file, for development and for trying Knell.

Its URLs are `knell+sqlite:///relative/broker.db` and `knell+sqlite:////absolute/broker.db`. Importing this module makes
kombu and Celery know them. See `knell.embedded_file` for what it promises; beyond that:

- A header `x-knell-eta` (Unix seconds) keeps a message invisible until then.
- Queue arguments x-message-ttl, x-dead-letter-exchange and x-dead-letter-routing-key, and the exchange argument
  alternate-exchange, mean what they mean on RabbitMQ. Other arguments are kept and have no effect.
- An exclusive or auto-delete queue lives as long as the channel that declared it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import uuid4

from amqp.exceptions import NotFound, RecoverableConnectionError
from amqp.protocol import queue_declare_ok_t
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport.base import to_rabbitmq_queue_arguments  # type: ignore[attr-defined]

from knell.embedded_file import BrokerFile, Delivery, Owner
from knell.embedded_routing import ETA_HEADER
from knell.errors import InvalidSettings

__all__ = ["ETA_HEADER", "Channel", "Transport", "register"]

# What a poll without messages costs is one indexed read; this bounds how late a message may be seen.
POLL_SECONDS = 0.015
# How long the messages of a killed consumer wait for another one, at most.
MAINTENANCE_SECONDS = 2.0
# The most that one fetch leases where the consumer sets no prefetch limit.
FETCH_LIMIT = 50
# Celery's blocking loop looks for a shutdown only between two waits, and asks for waits of 2 s.
LONGEST_WAIT_SECONDS = 0.5
_PREFIX = "sqlite:///"


def register() -> None:
    """Make kombu know `knell+sqlite://`. Importing this module does it; doing it again is harmless."""
    # kombu takes what stands before the "+" for the transport, and leaves the rest to it.
    TRANSPORT_ALIASES["knell"] = "knell.embedded:Transport"
    TRANSPORT_ALIASES["knell+sqlite"] = "knell.embedded:Transport"


class QoS(virtual.QoS):
    """Answers each delivery in the file. What a channel did not answer is released when it closes."""

    channel: Channel

    def ack(self, delivery_tag: Any) -> None:
        """Delete the message."""
        self.channel.file.ack([delivery_tag], self.channel.owner.token)
        super().ack(delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Put the message back, or drop it to its queue's dead-letter exchange."""
        answer = self.channel.file.release if requeue else self.channel.file.reject
        answer([delivery_tag], self.channel.owner.token)
        super().ack(delivery_tag)

    def restore_unacked(self) -> None:
        """Put back everything that was not answered."""
        self._flush()  # type: ignore[attr-defined]
        if self._delivered:
            self.channel.file.release([int(tag) for tag in self._delivered], self.channel.owner.token)
            self._delivered.clear()

    def unanswered(self) -> Iterator[Any]:
        """The delivery tags that were not answered, in the order of their delivery."""
        self._flush()  # type: ignore[attr-defined]
        return iter(list(self._delivered or ()))


class Channel(virtual.Channel):
    """A channel: its consumers, and the leases on what they were given."""

    QoS = QoS
    connection: Transport
    do_restore = False
    supports_fanout = True
    # Bodies are text on their way into the file, whatever they were.
    body_encoding = "base64"

    def __init__(self, connection: Transport, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self.file = connection.file
        self.owner = Owner()
        self._callbacks: dict[str, Callable[[Any], Any]] = {}
        self._maintained = float("-inf")

    # ---- what is declared

    def prepare_queue_arguments(self, arguments: Mapping[str, Any] | None, **kwargs: Any) -> dict[str, Any]:
        """kombu's own options (message_ttl and so on) as the arguments that RabbitMQ knows."""
        return dict(to_rabbitmq_queue_arguments(arguments or {}, **kwargs))

    def exchange_declare(  # type: ignore[override]
        self,
        exchange: str,
        type: str = "direct",
        durable: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, Any] | None = None,
        nowait: bool = False,
        passive: bool = False,
    ) -> None:
        """Declare an exchange of type direct, topic or fanout."""
        if not passive:
            self.file.declare_exchange(exchange, type or "direct", arguments or {})
        elif exchange not in self.file.exchanges():
            raise NotFound(f"NOT_FOUND - no exchange {exchange!r}", (40, 10), "Exchange.declare", 404)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Delete an exchange with its bindings."""
        self.file.delete_exchange(exchange)

    def queue_declare(self, queue: str | None = None, passive: bool = False, **kwargs: Any) -> queue_declare_ok_t:
        """Declare a queue, or with `passive` ask for it. Answers how many messages are ready.

        Raises:
            NotFound: passive, and there is none.
        """
        name = queue or f"amq.gen-{uuid4()}"
        if not passive:
            passing = kwargs.get("exclusive") or kwargs.get("auto_delete")
            owner = self.owner.token if passing else None
            self.file.declare_queue(name, kwargs.get("arguments") or {}, owner=owner)
        ready = self.file.ready(name)
        if ready is None:
            raise NotFound(f"NOT_FOUND - no queue {name!r}", (50, 10), "Queue.declare", 404)
        return queue_declare_ok_t(name, ready, 0)

    def queue_bind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Bind a queue to an exchange. The default exchange has every queue bound to it anyway."""
        if exchange:
            self.file.bind(queue, exchange, routing_key)

    def queue_unbind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take a binding away."""
        self.file.unbind(queue, exchange or "", routing_key)

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> int:
        """Delete a queue. Returns how many messages it had."""
        return self.file.delete_queue(queue, if_empty=if_empty)

    def list_bindings(self) -> Iterator[tuple[str, str, str]]:  # type: ignore[override]
        """(queue, exchange, routing key) of every binding."""
        return ((queue, exchange, key) for exchange, key, queue in self.file.bindings())

    # ---- messages

    def basic_publish(
        self, message: Any, exchange: str = "", routing_key: str = "", mandatory: bool = False, **kwargs: Any
    ) -> None:
        """Publish; with `mandatory`, ChannelError 312 if no queue takes it."""
        self._inplace_augment_message(message, exchange, routing_key)
        self.file.publish(message, exchange or "", routing_key or "", mandatory=mandatory)

    def basic_consume(
        self, queue: str, no_ack: bool, callback: Any, consumer_tag: str | None = None, **kwargs: Any
    ) -> str:
        """Consume. What consumers that are gone held is released first."""
        if self.file.ready(queue) is None:
            raise NotFound(f"NOT_FOUND - no queue {queue!r}", (60, 20), "Basic.consume", 404)
        self.file.maintain()
        tag = consumer_tag or str(uuid4())
        self._tag_to_queue[tag] = queue
        self._active_queues.append(queue)
        self._consumers.add(tag)
        self._callbacks[queue] = lambda delivery: callback(self._received(delivery, no_ack=no_ack, consumer_tag=tag))
        return tag

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop consuming. What was delivered can still be answered."""
        if consumer_tag in self._consumers:
            self._consumers.remove(consumer_tag)
            queue = self._tag_to_queue.pop(consumer_tag)
            self._active_queues.remove(queue)
            if queue not in self._active_queues:
                del self._callbacks[queue]

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> virtual.Message | None:
        """One message, or None."""
        found = self.file.fetch([queue], self.owner.token, limit=1)
        return self._received(found[0], no_ack=no_ack) if found else None

    def basic_ack(self, delivery_tag: Any, multiple: bool = False) -> None:
        """Acknowledge a message; with `multiple`, all up to it as well."""
        self._check_open()
        for tag in self._up_to(delivery_tag) if multiple else (delivery_tag,):
            self.qos.ack(tag)

    def basic_reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Reject a message."""
        self._check_open()
        self.qos.reject(delivery_tag, requeue=requeue)

    def drain_events(self, timeout: float | None = None, callback: Callable[..., Any] | None = None) -> None:
        """Deliver what is visible, as much as the prefetch limit allows; Empty if there is nothing."""
        if not self._consumers:
            raise Empty
        if time.monotonic() - self._maintained > MAINTENANCE_SECONDS:
            self.file.maintain()
            self._maintained = time.monotonic()
        room = self.qos.can_consume_max_estimate() if self.qos.prefetch_count else FETCH_LIMIT
        found = self.file.fetch(self._active_queues, self.owner.token, limit=min(room, FETCH_LIMIT)) if room else []
        if not found:
            raise Empty
        for delivery in found:
            self._deliver(delivery)

    def close(self) -> None:
        """Close the channel; what it holds is there for others at once."""
        if not self.closed:
            self.owner.end()
            self.file.end_owner(self.owner.token)
        super().close()

    def _deliver(self, delivery: Delivery) -> None:
        callback = self._callbacks.get(delivery.queue)
        if callback is None:  # a callback before this one has cancelled the consumer
            self.file.release([delivery.id], self.owner.token)
        else:
            callback(delivery)

    def _received(self, delivery: Delivery, *, no_ack: bool, consumer_tag: str = "") -> virtual.Message:
        properties = delivery.payload["properties"]
        properties["delivery_tag"] = delivery.id
        properties["delivery_info"] |= {"redelivered": delivery.redelivered, "consumer_tag": consumer_tag}
        message = self.Message(delivery.payload, channel=self)
        if no_ack:
            self.file.ack([delivery.id], self.owner.token)
        else:
            self.qos.append(message, message.delivery_tag)  # type: ignore[arg-type]
        return message

    def _up_to(self, delivery_tag: Any) -> list[Any]:
        tags = list(self.qos.unanswered())  # type: ignore[attr-defined]
        return tags[: tags.index(delivery_tag) + 1]

    def _check_open(self) -> None:
        if self.closed:
            raise RecoverableConnectionError("the channel is closed; what it held has been released")

    def _purge(self, queue: str) -> int:
        return self.file.purge(queue)

    def _size(self, queue: str) -> int:
        return self.file.ready(queue) or 0

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return self.file.ready(queue) is not None


class Transport(virtual.Transport):
    """The transport: one file, and the channels on it."""

    Channel = Channel
    polling_interval = POLL_SECONDS
    driver_type = "knell"
    driver_name = "sqlite3"
    connection_errors = (*virtual.Transport.connection_errors, sqlite3.Error, OSError)
    implements = virtual.Transport.implements.extend(exchange_type=frozenset({"direct", "topic", "fanout"}))

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        clock = client.transport_options.get("clock", time.time)
        self.file = BrokerFile(_path(client.hostname), clock=clock)

    def drain_events(self, connection: Any, timeout: float | None = None, **kwargs: Any) -> None:
        """Wait for messages and deliver them; socket.timeout after LONGEST_WAIT_SECONDS, or sooner if asked to."""
        super().drain_events(connection, None if timeout is None else min(timeout, LONGEST_WAIT_SECONDS))

    def driver_version(self) -> str:
        """SQLite's own."""
        return sqlite3.sqlite_version

    def close_connection(self, connection: Any) -> None:
        """Close every channel, and the file."""
        super().close_connection(connection)
        self.file.close()


def _path(hostname: str | None) -> Path:
    if not hostname or not hostname.startswith(_PREFIX) or len(hostname) == len(_PREFIX):
        raise InvalidSettings(f"the broker URL goes on with {hostname!r}; use knell+sqlite:///path/to/broker.db")
    return Path(hostname.removeprefix(_PREFIX))


register()
