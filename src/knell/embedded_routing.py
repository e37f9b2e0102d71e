"""How the embedded broker routes: exchanges to queues, copies, age limits, and dead letters.

Every function works inside the transaction of its caller.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from amqp.exceptions import NotFound

ETA_HEADER = "x-knell-eta"

Payload = dict[str, Any]


def publish(database: sqlite3.Connection, payload: Payload, exchange: str, routing_key: str, *, now: float) -> int:
    queues = _route(database, exchange, routing_key)
    eta = payload["headers"].get(ETA_HEADER)
    visible_at = now if eta is None else max(float(eta), now)
    text = json.dumps(payload, separators=(",", ":"))
    for queue in queues:
        ttl = _ttl_seconds(queue_arguments(database, queue), payload)
        expires_at = None if ttl is None else visible_at + ttl
        database.execute(
            "INSERT INTO message (queue, visible_at, expires_at, payload) VALUES (?, ?, ?, ?)",
            (queue, visible_at, expires_at, text),
        )
    return len(queues)


def _route(database: sqlite3.Connection, exchange: str, routing_key: str) -> set[str]:
    if not exchange:  # the default exchange: the key is the queue's name
        found = database.execute("SELECT name FROM queue WHERE name = ?", (routing_key,)).fetchone()
        return set(found or ())
    tried: set[str] = set()
    queues: set[str] = set()
    following: str | None = exchange
    while following and not queues and following not in tried:
        kind, arguments = find_exchange(database, following)
        tried.add(following)
        rows = database.execute("SELECT routing_key, queue FROM binding WHERE exchange = ?", (following,))
        queues = {queue for key, queue in rows if _matches(kind, key, routing_key)}
        following = arguments.get("alternate-exchange")
    return queues


def _matches(kind: str, binding_key: str, routing_key: str) -> bool:
    if kind == "fanout":
        return True
    if kind == "topic":
        return _topic(binding_key).fullmatch("." + routing_key) is not None
    return binding_key == routing_key


@lru_cache(maxsize=1024)
def _topic(binding_key: str) -> re.Pattern[str]:
    """A pattern for "." + routing key: `*` is one word, `#` none or more (AMQP 0-9-1, section 3.1.3.3)."""
    words = {"#": r"(?:\.[^.]*)*", "*": r"\.[^.]*"}
    return re.compile("".join(words.get(word, r"\." + re.escape(word)) for word in binding_key.split(".")))


def dead_letter(database: sqlite3.Connection, id_: int, reason: str, *, now: float) -> None:
    queue, text = database.execute("DELETE FROM message WHERE id = ? RETURNING queue, payload", (id_,)).fetchone()
    arguments = queue_arguments(database, queue)
    target = arguments.get("x-dead-letter-exchange")
    if target is None:
        return
    payload: Payload = json.loads(text)
    came_from = payload["properties"]["delivery_info"]
    routing_key = arguments.get("x-dead-letter-routing-key", came_from["routing_key"])
    payload["headers"] = _with_death(payload["headers"], queue, reason, came_from, now=now)
    payload["properties"].pop("expiration", None)
    payload["properties"]["delivery_info"] = {"exchange": target, "routing_key": routing_key}
    if database.execute("SELECT 1 FROM exchange WHERE name = ?", (target,)).fetchone():
        publish(database, payload, target, routing_key, now=now)


def _with_death(
    headers: Payload, queue: str, reason: str, came_from: Mapping[str, str], *, now: float
) -> dict[str, Any]:
    """Headers with an x-death entry as RabbitMQ writes it: one for each queue and reason, the last one first."""
    deaths = list(headers.get("x-death", ()))
    same: list[Payload] = [death for death in deaths if (death["queue"], death["reason"]) == (queue, reason)]
    death: Payload = same[0] if same else {"queue": queue, "reason": reason, "count": 0}
    death |= {
        "count": death["count"] + 1,
        "time": int(now),
        "exchange": came_from["exchange"],
        "routing-keys": [came_from["routing_key"]],
    }
    first = {
        "x-first-death-queue": queue,
        "x-first-death-reason": reason,
        "x-first-death-exchange": came_from["exchange"],
    }
    kept = {name: value for name, value in headers.items() if name != ETA_HEADER}
    return first | kept | {"x-death": [death, *(other for other in deaths if other is not death)]}


def _ttl_seconds(arguments: Mapping[str, Any], payload: Payload) -> float | None:
    """The shorter of the queue's limit and the message's own, both of which are in milliseconds."""
    limits = (arguments.get("x-message-ttl"), payload["properties"].get("expiration"))
    return min((float(limit) / 1000 for limit in limits if limit is not None), default=None)


def find_exchange(database: sqlite3.Connection, name: str) -> tuple[str, dict[str, Any]]:
    found = database.execute("SELECT type, arguments FROM exchange WHERE name = ?", (name,)).fetchone()
    if found is None:
        raise NotFound(f"NOT_FOUND - no exchange {name!r}; run `knell topology apply` first", (40, 10), "Exchange", 404)
    return found[0], json.loads(found[1])


def queue_arguments(database: sqlite3.Connection, name: str) -> dict[str, Any]:
    found = database.execute("SELECT arguments FROM queue WHERE name = ?", (name,)).fetchone()
    if found is None:
        raise NotFound(f"NOT_FOUND - no queue {name!r}; run `knell topology apply` first", (50, 10), "Queue", 404)
    arguments: dict[str, Any] = json.loads(found[0])
    return arguments


def delete_queue(database: sqlite3.Connection, name: str) -> None:
    for table, column in (("message", "queue"), ("binding", "queue"), ("queue", "name")):
        database.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))  # noqa: S608
