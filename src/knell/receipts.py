"""What comes back to the notifier: receipts, what services parked, and what the broker gave up on."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import structlog
from kombu import Connection, Consumer, Queue
from kombu.message import Message
from uuid6 import uuid7

from knell import commands, topology
from knell.answers import in_one_line
from knell.connection import BROKER_ERRORS, UNDECODABLE, connect, leave_compressed
from knell.errors import KnellError, MessageRefused, Unavailable
from knell.keys import NOTICE_TYPE
from knell.notices import NoticeBatch, Receipt, entry_numbers
from knell.redaction import bytes_without_tokens, traceback_of
from knell.settings import Settings, check_service_name
from knell.store import Parked, Store
from knell.trust import Trust
from knell.wire import MAX_BODY_BYTES

# As many as are written to the store at once. They are acknowledged only after that.
PAGE = 200
# How long a page may wait to fill: receipts are not urgent, and a page of them is one write.
GATHER_SECONDS = 0.02
# Finds a frozen broker within two of these.
HEARTBEAT_SECONDS = 10.0
# Between two attempts, doubled with each that fails soon.
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
# A body that is no notice is kept to be looked at, not to be replayed.
KEPT_BYTES = 64 * 1024
# More attempts than that are no count; and a store's integers end somewhere.
MOST_ATTEMPTS = 2**31 - 1

# JSON has the numbers of entries as text.
_NUMBER = re.compile(r"[0-9]{1,9}")

log = structlog.get_logger()


class ReceiptsConsumer:
    """Reads `knell.receipts` and `knell.dead` in a thread of its own, with a connection of its own, until stopped.

    Nothing is acknowledged before the store has it; a store or broker that is away is waited for.
    """

    def __init__(self, settings: Settings, store: Store, trust: Trust) -> None:
        self._settings = settings
        self._store = store
        self._trust = trust
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="knell-receipts", daemon=True)

    def start(self) -> None:
        """Begin to consume."""
        self._thread.start()

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Stop. What was not written yet stays on the broker."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                with connect(self._settings, heartbeat=HEARTBEAT_SECONDS) as connection:
                    self._consume(connection)
            except Exception as error:
                if time.monotonic() - began > LONGEST_PAUSE_SECONDS:
                    pause = FIRST_PAUSE_SECONDS
                # Whatever it is, the thread must live: without it every record of the notice log would stay open.
                if isinstance(error, (Unavailable, *BROKER_ERRORS)):
                    log.warning("receipts_wait", error=in_one_line(str(error)), pause_seconds=pause)
                else:
                    log.error("receipts_failed", pause_seconds=pause, traceback=traceback_of(error))
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _consume(self, connection: Connection) -> None:
        page: list[tuple[str, Message]] = []
        channel = connection.channel()
        leave_compressed(channel)
        consumers = [
            Consumer(
                channel,
                [Queue(queue, no_declare=True)],
                on_message=partial(_keep, page, queue),
                # Of a body that kombu cannot decode the bytes are kept, like any other that says nothing.
                on_decode_error=partial(_keep, page, queue),
                prefetch_count=PAGE,
                auto_declare=False,
            )
            for queue in (topology.RECEIPTS, topology.DEAD)
        ]
        for consumer in consumers:
            consumer.consume()
        while not self._stopping.is_set():
            connection.heartbeat_check()
            _drain(connection, page, wait_seconds=0.5)
            if page:
                self._write(page)
                for _, message in page:
                    message.ack()
                page.clear()

    def _write(self, page: list[tuple[str, Message]]) -> None:
        """Write a page to the store; Unavailable if it cannot be, and the page is then delivered again."""
        receipts: list[tuple[str, Receipt]] = []
        parked: list[Parked] = []
        for queue, message in page:
            try:
                if UNDECODABLE in (message.headers or {}):
                    raise MessageRefused("its properties cannot be decoded")
                if queue == topology.RECEIPTS:
                    self._read(message, receipts, parked)
                else:
                    self._bury(message, receipts, parked)
            except MessageRefused as refusal:
                log.error("message_refused", queue=queue, reason=str(refusal))
                parked.append(_unreadable(message, service="", queue=queue, error=str(refusal), at=time.time()))
        if parked:
            self._store.park(parked)
        if receipts:
            self._store.receive(receipts)

    def _read(self, message: Message, receipts: list[tuple[str, Receipt]], parked: list[Parked]) -> None:
        kind, _, service = str(message.delivery_info.get("routing_key", "")).partition(".")
        try:
            check_service_name(service)
        except KnellError as error:
            raise MessageRefused(str(error)) from None
        if kind == "receipt":
            receipts.append((service, Receipt.from_json(_json(message))))
        elif kind == "parked":
            parked.extend(self._given_up(service, _json(message)))
        else:
            raise MessageRefused(f"routing key {kind!r} is neither receipt nor parked")

    def _given_up(self, service: str, found: Any) -> list[Parked]:
        if not isinstance(found, Mapping) or not isinstance(found.get("errors"), Mapping):
            raise MessageRefused("not what a service parks")
        batch = self._verified(found.get("jws"))
        attempts = found.get("attempts")
        counted = attempts if isinstance(attempts, int) and 0 <= attempts <= MOST_ATTEMPTS else 0
        now = self._store.time()
        kept = []
        for n, error in found["errors"].items():
            [number] = entry_numbers([int(n) if _NUMBER.fullmatch(n) else n])
            kept.append(
                Parked(
                    id=f"{service}/{batch.id}.{number}",
                    service=service,
                    queue=topology.service_queue(service),
                    error=in_one_line(str(error)),
                    at=now,
                    attempts=counted,
                    notice_id=f"{batch.id}.{number}",
                    jws=found["jws"],
                )
            )
        return kept

    def _verified(self, jws: object) -> NoticeBatch:
        if not isinstance(jws, str):
            raise MessageRefused("there is no signed notice in it")
        payload, _ = self._trust.verify(jws, typ=NOTICE_TYPE, audience=self._settings.audience)
        return NoticeBatch.from_payload(payload)

    def _bury(self, message: Message, receipts: list[tuple[str, Receipt]], parked: list[Parked]) -> None:
        """Keep what the broker gave up on: rejected, too old, delivered too often, or with nowhere to go."""
        queue, reason = _death(message)
        if queue == topology.SWEEP and reason == "expired":
            return  # the notifier was stopped meanwhile; the next sweep does the same and more
        if not queue and message.delivery_info.get("exchange") == topology.NOTICES:
            return  # no service has a queue: whoever is registered all the same is told from the notice log
        service = topology.service_of_queue(queue) or ""
        now = self._store.time()
        if queue == topology.COMMANDS and (command := _command(message)) is not None:
            # An issuer was told that it is queued: it is kept whole, to be sent again when what refused it is mended.
            parked.append(Parked(id=f"/{uuid7()}", service="", queue=queue, error=reason, at=now, jws=command))
            return
        try:
            batch = self._verified(_first_argument(message)) if service else None
        except MessageRefused as refusal:
            parked.append(_unreadable(message, service=service, queue=queue, error=f"{reason}: {refusal}", at=now))
            return
        if batch is None:
            parked.append(_unreadable(message, service="", queue=queue, error=reason, at=now))
        elif reason == "expired":
            log.error("notice_too_old", service=service, batch_id=batch.id)
            self._store.mark_missed(service, batch.issued_at)
        else:
            numbers = _todo(message, batch)
            jws = _first_argument(message)
            assert isinstance(jws, str)
            parked.extend(
                Parked(
                    id=f"{service}/{batch.id}.{n}",
                    service=service,
                    queue=queue,
                    error=reason,
                    at=now,
                    notice_id=f"{batch.id}.{n}",
                    jws=jws,
                )
                for n in numbers
            )
            receipts.append((service, Receipt(batch_id=batch.id, at=now, parked=numbers)))


def _keep(page: list[tuple[str, Message]], queue: str, message: Message, _: Exception | None = None) -> None:
    page.append((queue, message))


def _drain(connection: Connection, page: list[tuple[str, Message]], *, wait_seconds: float) -> None:
    """Wait for a first message, then gather what comes right behind it."""
    until: float | None = None
    timeout = wait_seconds
    while len(page) < PAGE:
        try:
            connection.drain_events(timeout=timeout)
        except TimeoutError:
            return
        if page:
            now = time.monotonic()
            until = until or now + GATHER_SECONDS
            timeout = until - now
            if timeout <= 0:
                return


def _body(message: Message) -> bytes:
    body = message.body or b""
    return body.encode() if isinstance(body, str) else bytes(body)


def _json(message: Message) -> Any:
    body = _body(message)
    if len(body) > MAX_BODY_BYTES:
        raise MessageRefused(f"the body has {len(body)} bytes; the limit is {MAX_BODY_BYTES}")
    try:
        return json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MessageRefused(f"not JSON: {str(error)[:100]}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _arguments(message: Message) -> list[Any]:
    found = _json(message)
    if isinstance(found, list) and found and isinstance(found[0], list):
        return found[0]
    raise MessageRefused("not a task message")


def _first_argument(message: Message) -> object:
    arguments = _arguments(message)
    return arguments[0] if arguments else None


def _command(message: Message) -> str | None:
    """The signed command of a message; None if it is none. Nobody has checked it, but by its type it is no token."""
    try:
        jws = _first_argument(message)
        return jws if isinstance(jws, str) and commands.is_command(jws) else None
    except MessageRefused:
        return None


def _todo(message: Message, batch: NoticeBatch) -> tuple[int, ...]:
    arguments = _arguments(message)
    if len(arguments) > 1 and arguments[1] is not None:
        return entry_numbers(arguments[1])
    return tuple(entry.n for entry in batch.entries)


def _death(message: Message) -> tuple[str, str]:
    """The queue that a dead letter came from, and why (RabbitMQ's x-death header)."""
    if message.delivery_info.get("exchange") != topology.DEAD:
        # It came by an alternate exchange, and did not die: whatever its headers say, its sender has written.
        return "", "unroutable"
    deaths = (message.headers or {}).get("x-death")
    last: Mapping[str, Any] = (
        deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], Mapping) else {}
    )
    return in_one_line(str(last.get("queue", ""))), in_one_line(str(last.get("reason", "unroutable")))


def _unreadable(message: Message, *, service: str, queue: str, error: str, at: float) -> Parked:
    return Parked(
        id=f"{service}/x-{uuid7()}",
        service=service,
        queue=queue,
        error=in_one_line(error),
        at=at,
        body=bytes_without_tokens(_body(message))[:KEPT_BYTES],
    )
