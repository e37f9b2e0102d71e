"""Making the topology on a broker. Everything here can be repeated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from amqp.exceptions import PreconditionFailed
from kombu import Connection
from kombu.transport.native_delayed_delivery import declare_native_delayed_delivery_exchanges_and_queues

from knell.connection import BROKER_ERRORS
from knell.errors import BrokerUnavailable, InvalidSettings, KnellError
from knell.settings import Settings
from knell.topology.names import DELAYED, service_queue
from knell.topology.plan import EXCHANGES, queues


def declare(connection: Connection, services: Iterable[str], *, settings: Settings) -> None:
    """Declare every exchange, queue and binding, those of these services included. `apply_policies` does the rest.

    Raises:
        InvalidSettings: something exists with other arguments; the text names it.
        BrokerUnavailable: the broker did not answer, or does not let this account declare.
    """
    try:
        if not settings.embedded:
            declare_native_delayed_delivery_exchanges_and_queues(connection, "quorum")
        opened: Any = connection.channel()
        with opened as channel:
            _declare(channel, services, settings)
    except PreconditionFailed as error:
        raise InvalidSettings(
            f"the broker has it with other arguments: {error}. Did the retention change? "
            "Let its queue run empty, delete it, and apply the topology again"
        ) from error
    except BROKER_ERRORS as error:
        raise _unavailable("the topology was not declared", error) from error


def remove_service(connection: Connection, name: str) -> int:
    """Delete a service's queue, its bindings with it. Returns how many messages it still had.

    Raises:
        BrokerUnavailable: the broker did not answer, or does not let this account delete.
    """
    try:
        opened: Any = connection.channel()
        with opened as channel:
            count: int = channel.queue_delete(service_queue(name))
            return count
    except BROKER_ERRORS as error:
        raise _unavailable(f"the queue of {name} was not deleted", error) from error


def _declare(channel: Any, services: Iterable[str], settings: Settings) -> None:
    for exchange in EXCHANGES:
        channel.exchange_declare(
            exchange.name, exchange.type, durable=True, auto_delete=False, arguments=dict(exchange.arguments)
        )
    for queue in queues(services, settings.rules):
        channel.queue_declare(queue.name, durable=True, auto_delete=False, arguments=dict(queue.arguments))
        for exchange_name, routing_key in queue.bindings:
            if exchange_name != DELAYED or not settings.embedded:
                channel.queue_bind(queue.name, exchange_name, routing_key)


def _unavailable(what: str, error: Exception) -> KnellError:
    return BrokerUnavailable(f"{what}: {error or type(error).__name__}")
