"""What the broker has to have, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kombu import Exchange, Queue
from kombu.transport.native_delayed_delivery import MAX_NUMBER_OF_BITS_TO_USE

from knell.errors import InvalidInput
from knell.settings import Rules, check_service_name
from knell.topology.names import (
    COMMANDS,
    DEAD,
    DELAYED,
    EVENTS,
    EXPIRY,
    NOTICES,
    QUORUM,
    RECEIPTS,
    RETRY,
    SWEEP,
    retry_key,
    service_of_queue,
    service_queue,
)

# Each lost connection counts as a delivery of all that it had prefetched: a low limit buries messages that nobody
# touched. RabbitMQ 4 sets 20 where nothing is said; 3.10 knows no "unlimited"; both take this.
DELIVERY_LIMIT = 1_000_000
# RabbitMQ takes no time-to-live above this, in milliseconds: 49 days.
LONGEST_TTL = 2**32 - 1


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """An exchange; durable, as all of them are."""

    name: str
    type: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QueuePlan:
    """A queue, and its bindings as (exchange, routing key)."""

    name: str
    arguments: Mapping[str, Any]
    bindings: tuple[tuple[str, str], ...]


# No queue has reject-publish: one full queue would refuse a notice for all, although the others have taken it.
EXCHANGES = (
    ExchangePlan(DEAD, "fanout"),
    ExchangePlan(EXPIRY, "topic"),
    ExchangePlan(NOTICES, "fanout", {"alternate-exchange": DEAD}),
    ExchangePlan(RETRY, "topic"),
    ExchangePlan(RECEIPTS, "topic"),
    ExchangePlan(COMMANDS, "direct"),
    ExchangePlan(SWEEP, "direct"),
    # As Celery and Flower declare it; services, which send to it, may not.
    ExchangePlan(EVENTS, "topic"),
)
_DELAY = re.compile(rf"(?:[01]\.){{{MAX_NUMBER_OF_BITS_TO_USE}}}")
_TYPES = {exchange.name: exchange.type for exchange in EXCHANGES}
_LIMITED = QUORUM | {"x-delivery-limit": DELIVERY_LIMIT}
_NOTIFIER = _LIMITED | {"x-dead-letter-exchange": DEAD}


def queues(services: Iterable[str], rules: Rules) -> tuple[QueuePlan, ...]:
    """Every queue: the notifier's, and one for each service."""
    return (
        QueuePlan(DEAD, _LIMITED, ((DEAD, ""),)),
        QueuePlan(EXPIRY, _NOTIFIER, ((EXPIRY, EXPIRY), delayed(EXPIRY))),
        QueuePlan(RECEIPTS, _NOTIFIER, ((RECEIPTS, "receipt.*"), (RECEIPTS, "parked.*"))),
        QueuePlan(COMMANDS, _NOTIFIER, ((COMMANDS, COMMANDS),)),
        QueuePlan(SWEEP, _NOTIFIER, ((SWEEP, SWEEP),)),
        *(_service(name, rules) for name in services),
    )


def delayed(routing_key: str) -> tuple[str, str]:
    """The binding by which a queue is given what comes off the delay ladder under this key.

    Straight to the queue: a binding over the queue's own exchange would outlive the queue, and what is then delivered
    into nothing blocks the ladder for everybody. `#.` stands for the 28 words of the delay.
    """
    return (DELAYED, f"#.{routing_key}")


def belongs(queue: str, *, exchange: str, routing_key: str) -> bool:
    """Whether a message that was read from a queue was sent to it, by somebody who may.

    A message may name further keys in its headers CC and BCC. Older brokers (RabbitMQ 3.10 among them) hold an
    account to its topic permissions by the first key only, so that a service's account could write into the queues of
    others. The first key is what the message shows here. Whoever may write to the exchanges that look at no key, the
    fanout and the default exchange, is the notifier, an issuer or an operator.
    """
    service = service_of_queue(queue)
    own = queue if service is None else retry_key(service)
    return exchange in ("", NOTICES) or _DELAY.sub("", routing_key, count=1) == own


def kombu_queue(name: str, *, rules: Rules | None = None) -> Queue:
    """A queue for Celery's `task_queues`. Celery consumes from it and never declares it.

    Args:
        name: EXPIRY, SWEEP, COMMANDS, or a service's queue (see `service_queue`).
        rules: the deployment's; their retention is in a service queue's arguments.
    """
    service = service_of_queue(name)
    found = {plan.name: plan for plan in queues([] if service is None else [service], rules or Rules())}.get(name)
    if found is None:
        raise InvalidInput(f"Knell has no queue {name!r}; a service's is {service_queue('NAME')!r}")
    exchange, routing_key = found.bindings[0]
    return Queue(
        name,
        Exchange(exchange, type=_TYPES[exchange], durable=True, no_declare=True),
        routing_key=routing_key,
        queue_arguments=dict(found.arguments),
        durable=True,
        no_declare=True,
    )


def _service(name: str, rules: Rules) -> QueuePlan:
    key = retry_key(check_service_name(name))
    limits = {"x-message-ttl": min(int(rules.retention_seconds * 1000), LONGEST_TTL)}
    return QueuePlan(service_queue(name), _NOTIFIER | limits, ((RETRY, key), (NOTICES, ""), delayed(key)))
