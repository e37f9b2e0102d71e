"""The messages that Knell puts on its broker: Celery tasks, receipts, and what was parked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any
from uuid import uuid4

from celery import Celery

from knell import topology
from knell.notices import Receipt

EXPIRE = "knell.expire"
SWEEP = "knell.sweep"
TRACK = "knell.track"
REVOKE = "knell.revoke"
TERMINATE = "knell.terminate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message for the publisher.

    Attributes:
        exchange, routing_key: where it goes.
        body: JSON, in UTF-8.
        headers: Celery's, for a task.
        correlation_id: the task's id; None for a message that is no task.
        eta: Unix seconds; the broker holds it until then. None: at once.
    """

    exchange: str
    routing_key: str
    body: bytes
    headers: Mapping[str, Any] = field(default_factory=dict)
    correlation_id: str | None = None
    eta: float | None = None


def expire(second: int, *, eta: float | None) -> Message:
    """The timer of an expiry second. `eta` is by this process's clock; None: at once."""
    shown = f"{datetime.fromtimestamp(second, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return _task(EXPIRE, [second], exchange=topology.EXPIRY, routing_key=topology.EXPIRY, eta=eta, shown=shown)


def track_command(jws: str, *, shown: str) -> Message:
    """A signed command to track tokens, for when the store cannot be reached."""
    return _task(TRACK, [jws], exchange=topology.COMMANDS, routing_key=topology.COMMANDS, shown=shown)


def revoke_command(jws: str, *, shown: str) -> Message:
    """A signed command to revoke, for when the store cannot be reached."""
    return _task(REVOKE, [jws], exchange=topology.COMMANDS, routing_key=topology.COMMANDS, shown=shown)


def notice(jws: str, *, shown: str) -> Message:
    """A signed notice to every service."""
    return _task(TERMINATE, [jws, None, 0], exchange=topology.NOTICES, routing_key="", shown=shown)


def notice_to(
    service: str,
    jws: str,
    *,
    shown: str,
    todo: Sequence[int] | None = None,
    attempt: int = 0,
    replay: bool = False,
    eta: float | None = None,
    root_id: str | None = None,
) -> Message:
    """A signed notice to one service: sent again by the sweep, retried by the service itself, or replayed.

    Args:
        todo: the entry numbers to handle; None for all.
        attempt: how often they were tried.
        replay: handle them although they were parked.
        root_id: the task id that it goes back to.
    """
    arguments: list[Any] = [jws, None if todo is None else list(todo), attempt]
    if replay:
        arguments.append(True)
    key = topology.retry_key(service)
    return _task(TERMINATE, arguments, exchange=topology.RETRY, routing_key=key, eta=eta, shown=shown, root_id=root_id)


def receipt(service: str, answer: Receipt) -> Message:
    """A service's receipt."""
    return Message(exchange=topology.RECEIPTS, routing_key=topology.receipt_key(service), body=_json(answer.as_json()))


def parked(service: str, jws: str, errors: Mapping[int, str], *, attempts: int) -> Message:
    """What a service gave up on: the signed notice, and for each entry number the error in one line."""
    body = {"v": 1, "jws": jws, "errors": {str(n): error for n, error in errors.items()}, "attempts": attempts}
    return Message(exchange=topology.RECEIPTS, routing_key=topology.parked_key(service), body=_json(body))


def _task(
    name: str,
    arguments: Sequence[Any],
    *,
    exchange: str,
    routing_key: str,
    shown: str,
    eta: float | None = None,
    root_id: str | None = None,
) -> Message:
    task_id = str(uuid4())
    made = _celery().amqp.as_task_v2(
        task_id,
        name,
        tuple(arguments),
        {},
        eta=None if eta is None else datetime.fromtimestamp(eta, UTC),
        root_id=root_id,
        ignore_result=True,
        argsrepr=shown,
        kwargsrepr="{}",
        origin="knell",
    )
    return Message(
        exchange=exchange,
        routing_key=routing_key,
        body=_json(made.body),
        headers=made.headers,
        correlation_id=task_id,
        eta=eta,
    )


@cache
def _celery() -> Celery:
    # Knows how to write a task message, and does nothing else: it is nobody's current app.
    return Celery("knell-messages", set_as_current=False)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
