"""What Knell's exchanges, queues and routing keys are called."""

from __future__ import annotations

# Exchanges and queues. What a service has is named after it: see `service_queue`.
EXPIRY = "knell.expiry"
NOTICES = "knell.notices"
RETRY = "knell.retry"
RECEIPTS = "knell.receipts"
COMMANDS = "knell.commands"
SWEEP = "knell.sweep"
DEAD = "knell.dead"

QUORUM = {"x-queue-type": "quorum"}

# Where the delay ladder delivers (the name is Celery's), and the policy that catches what it cannot deliver.
DELAYED = "celery_delayed_delivery"
UNROUTED_POLICY = "knell-delayed-unrouted"
# Where Celery workers send the events that Flower shows.
EVENTS = "celeryev"


def service_queue(name: str) -> str:
    """The name of a service's queue."""
    return f"knell.service.{name}"


def service_of_queue(queue: str) -> str | None:
    """The service that a queue belongs to; None if it is no service's."""
    return queue.removeprefix("knell.service.") if queue.startswith("knell.service.") else None


def retry_key(name: str) -> str:
    """The routing key that reaches one service alone, through the exchange knell.retry."""
    return f"retry.{name}"


def receipt_key(name: str) -> str:
    """The routing key of a service's receipts; the broker holds each service's account to its own."""
    return f"receipt.{name}"


def parked_key(name: str) -> str:
    """The routing key of what a service parked."""
    return f"parked.{name}"
