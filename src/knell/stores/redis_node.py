"""One Redis server: its connections, each of them bounded in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError
from redis.retry import Retry

from knell.errors import StoreUnavailable

# A request path waits for this: one attempt to connect and one to read, each twice, stays within 2 s.
TIMEOUT_SECONDS = 0.5
# A connection that was idle for so long is tried with a PING first.
HEALTH_CHECK_SECONDS = 30
# How long one XREAD may block: between two, the server's identity is looked at.
BLOCK_SECONDS = 1.0

Argument = str | bytes | int | float
# One command: either ("EVALSHA", sha, number of keys, tag, ...), made by `script`, or any other.
Command = tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many replicas must have what was written before it is acknowledged, and how long they have for it (ms)."""

    least: int
    wait_ms: int


class Node:
    """One server. Threads may share it; after a fork each process opens connections of its own.

    Args:
        url: as redis-py reads it. Nothing is contacted here.
        replicas: who must have what is written here; None for nobody.
        opened: called with each connection that was opened. What it raises refuses the connection.
    """

    def __init__(
        self, url: str, *, replicas: Replicas | None = None, opened: Callable[[Any], None] = lambda connection: None
    ) -> None:
        self._replicas = replicas
        self._client = open_client(url, TIMEOUT_SECONDS, opened)
        self._reader = open_client(url, BLOCK_SECONDS + TIMEOUT_SECONDS, opened)

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands in one round trip, in order, and return their answers, errors among them.

        Raises:
            StoreUnavailable: they were run, and too few replicas have what they wrote.
            ReadOnlyError: this is a replica, and one of them writes.
        """
        awaited = self._replicas if any(command[0] == "EVALSHA" for command in commands) else None
        with self._client.pipeline(transaction=False) as pipe:
            queue: Callable[..., Any] = pipe.execute_command
            for command in commands:
                queue(*command)
            if awaited is not None:
                queue("WAIT", awaited.least, awaited.wait_ms)
            answers = list(pipe.execute(raise_on_error=False))
        if refused := next((one for one in answers if isinstance(one, ReadOnlyError)), None):
            raise refused
        if awaited is not None:
            _check_replicas(answers.pop(), awaited)
        return answers

    def load(self, scripts: Iterable[str]) -> None:
        """Bring scripts to the server."""
        with self._client.pipeline(transaction=False) as pipe:
            for text in scripts:
                pipe.script_load(text)
            pipe.execute()

    def block(self, stream: str, after: int, milliseconds: int) -> None:
        """Wait until a stream has an entry after `<after>-0`."""
        self._reader.xread({stream: f"{after}-0"}, count=1, block=milliseconds)

    def forget(self) -> None:
        """Close the idle connections: they may be dead, or lead to what is no primary any more."""
        for client in (self._client, self._reader):
            client.connection_pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close the idle connections, for good."""
        self._client.close()
        self._reader.close()


def open_client(
    url: str, timeout_seconds: float, opened: Callable[[Any], None] = lambda connection: None
) -> redis.Redis:
    """A client that tries once, and waits half a second for a connection. What the URL says goes before it."""

    def connected(connection: Any) -> None:
        # The library's name is not told (CLIENT SETINFO): that costs round trips, and a right.
        connection.driver_info = connection.lib_name = connection.lib_version = None
        connection.on_connect()
        opened(connection)

    return redis.Redis.from_url(
        url,
        decode_responses=False,
        protocol=2,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=TIMEOUT_SECONDS,
        health_check_interval=HEALTH_CHECK_SECONDS,
        retry=Retry(NoBackoff(), 0),
        redis_connect_func=connected,
    )


def _check_replicas(answer: Any, awaited: Replicas) -> None:
    if isinstance(answer, Exception):
        raise answer
    if answer < awaited.least:
        raise StoreUnavailable(
            f"written, but after {awaited.wait_ms} ms only {answer} of {awaited.least} replicas have it "
            "(min_replicas in the store's URL); the same call again asks them again"
        )
