"""Connections to the broker whose every wait is bounded, and what can be asked over one."""

from __future__ import annotations

import itertools
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from amqp.exceptions import AMQPError, NotFound
from amqp.serialization import PROPERTY_CLASSES, decode_properties_basic
from amqp.spec import Basic
from kombu import Connection
from kombu.exceptions import KombuError
from kombu.message import Message

from knell.errors import BrokerUnavailable
from knell.settings import Settings

# What kombu, py-amqp and SQLite raise when the broker does not do what it was asked.
BROKER_ERRORS = (AMQPError, KombuError, OSError, sqlite3.Error)
# How long one server of the URL has to take a connection before the next one is tried.
CONNECT_SECONDS = 2.0
# The only header of a message whose properties cannot be decoded; its value is what went wrong.
UNDECODABLE = "knell-undecodable"


def connect(
    settings: Settings,
    *,
    heartbeat: float = 0,
    timeout_seconds: float = 5.0,
    connect_timeout_seconds: float = CONNECT_SECONDS,
) -> Connection:
    """An open connection to the broker; each server of a failover list is tried once.

    Args:
        heartbeat: seconds; whoever sets it has to call `heartbeat_check` several times within it. 0: none.
        timeout_seconds: the longest that a read or a write may take; a read that has a time-out of its own keeps it.
        connect_timeout_seconds: the same for connecting, for each server.

    Raises:
        BrokerUnavailable: no server took the connection, or the account was refused.
    """
    if settings.embedded:
        from knell import embedded

        embedded.register()
    urls = settings.broker_url.split(";")
    tls = _tls(urls)

    def bounded(opened: Any) -> None:
        # A frozen broker keeps its side of TCP alive: only a time-out of our own ends a read or a write.
        opened.sock.settimeout(timeout_seconds)

    connection = Connection(
        settings.broker_url,
        heartbeat=heartbeat,
        connect_timeout=connect_timeout_seconds,
        ssl=tls or False,
        failover_strategy=lambda alternates: _in_turn(alternates, tls),
        # Of what is published unconfirmed just before it is closed, a quorum queue may lack some (measured on 3.10).
        transport_options={} if settings.embedded else {"on_open": bounded, "confirm_publish": True},
    )
    try:
        connection.ensure_connection(
            max_retries=len(urls) - 1,
            interval_start=0,
            interval_step=0,
            interval_max=0,
            reraise_as_library_errors=False,
        )
    except BROKER_ERRORS as error:
        abandon(connection)
        raise BrokerUnavailable(f"no connection to {hosts(settings)}: {error or type(error).__name__}") from error
    return connection


def abandon(connection: Connection) -> None:
    """Drop a connection without a word to the broker: asking it to close could wait for a broker that is frozen."""
    connection.collect()


def hosts(settings: Settings) -> str:
    """The broker's URLs with nothing secret in them, for a message to a person."""
    shown = []
    for url in settings.broker_url.split(";"):
        parts = urlsplit(url)
        shown.append(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
    return ";".join(shown)


def queue_depth(where: Settings | Connection, queue: str) -> int | None:
    """How many messages of a queue wait to be fetched; None if the queue does not exist.

    Raises:
        BrokerUnavailable: the broker did not answer, or does not let this account ask.
    """
    if isinstance(where, Settings):
        with connect(where) as connection:
            return queue_depth(connection, queue)
    try:
        opened: Any = where.channel()
        with opened as channel:
            count: int = channel.queue_declare(queue, passive=True).message_count
            return count
    except NotFound:
        return None
    except BROKER_ERRORS as error:
        raise BrokerUnavailable(f"the depth of {queue} is unknown: {error or type(error).__name__}") from error


def _decoded(buffer: Any, offset: int) -> tuple[dict[str, Any], int]:
    """The properties of a message as py-amqp decodes them; never an error.

    One that comes out of it is taken for a lost connection: the message is delivered again, and again, and nothing
    behind it is ever read. A time-stamp beyond the year 9999 is enough, and a service's account may send that.
    """
    try:
        found: tuple[dict[str, Any], int] = decode_properties_basic(buffer, offset)
    except (ValueError, TypeError, ArithmeticError, LookupError, OSError, RecursionError, struct.error, AMQPError) as e:
        return {"application_headers": {UNDECODABLE: type(e).__name__}}, offset
    return found


# For the whole process: py-amqp has no other place for it.
PROPERTY_CLASSES[Basic.CLASS_ID] = _decoded  # type: ignore[assignment] # its stubs say a type


def leave_compressed(channel: Any) -> None:
    """Keep kombu from decompressing bodies as they arrive on a channel: a small one can inflate to fill the memory.

    The header stays on the message, for whoever decides about it.
    """
    convert = channel.message_to_python

    def converted(raw: Any) -> Message:
        headers = (getattr(raw, "properties", None) or {}).get("application_headers") or {}
        compression = headers.pop("compression", None)
        message: Message = convert(raw)
        if compression is not None:
            message.headers["compression"] = compression
        return message

    channel.message_to_python = converted


def _tls(urls: Sequence[str]) -> dict[str, str | None] | None:
    # kombu puts the host's name in; without this entry py-amqp checks the certificate but not whose it is.
    return {"server_hostname": None} if urlsplit(urls[0]).scheme == "amqps" else None


def _in_turn(alternates: Iterable[str], tls: dict[str, str | None] | None) -> Iterator[str]:
    for url in itertools.cycle(alternates):
        if tls is not None:  # kombu wrote the name of the server before this one into it
            tls["server_hostname"] = None
        yield url
