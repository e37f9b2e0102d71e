"""Which server a command goes to: the one of the URL, or the primary that sentinels name."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import redis
from redis.exceptions import RedisError

from knell.errors import StoreUnavailable
from knell.stores.redis_node import Command, Node, Replicas, open_client
from knell.stores.redis_url import RedisUrl

# A sentinel answers from memory. Those that do not answer in time must not use up the time that a call has.
SENTINEL_SECONDS = 0.25
# How long all of them together are asked.
LOOK_UP_SECONDS = 0.6


class Servers(Protocol):
    """Where commands run. Whatever redis-py raises may come out of each of these."""

    def run(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands, those of one server in one round trip, and return their answers, errors among them."""

    def each(self, keys: Sequence[str], commands: Sequence[Command]) -> dict[str, list[Any]]:
        """The answers of every server that has one of these keys, by what to call it."""

    def load(self, scripts: Sequence[str], commands: Sequence[Command]) -> None:
        """Bring scripts to every server that one of these commands goes to."""

    def block(self, stream: str, after: int, milliseconds: int) -> None:
        """Wait until a stream has an entry after `<after>-0`."""

    def look(self) -> None:
        """Make sure that what is asked is still the server to ask."""

    def forget(self) -> None:
        """After trouble: close idle connections, and look anew where commands go."""

    def close(self) -> None:
        """Close the idle connections, for good."""


class OneServer:
    """The server that the URL names."""

    def __init__(self, url: RedisUrl, replicas: Replicas | None, changed: Callable[[], None]) -> None:
        self._where = url.where
        self._node = Node(url.server(*url.hosts[0] if url.hosts else ()), replicas=replicas, opened=lambda _: changed())

    def run(self, commands: Sequence[Command]) -> list[Any]:
        return self._node.run(commands)

    def each(self, keys: Sequence[str], commands: Sequence[Command]) -> dict[str, list[Any]]:
        return {self._where: self.run(commands)}

    def load(self, scripts: Sequence[str], commands: Sequence[Command]) -> None:
        self._node.load(scripts)

    def block(self, stream: str, after: int, milliseconds: int) -> None:
        self._node.block(stream, after, milliseconds)

    def look(self) -> None:
        """There is no other."""

    def forget(self) -> None:
        self._node.forget()

    def close(self) -> None:
        self._node.close()


class Sentinels:
    """The primary that sentinels name. Each connection to it makes sure that it is one.

    See https://redis.io/docs/latest/develop/reference/sentinel-clients/
    """

    def __init__(self, url: RedisUrl, replicas: Replicas | None, changed: Callable[[], None]) -> None:
        self._url = url
        self._replicas = replicas
        self._changed = changed
        # The one that answered last comes first. Threads only ever put another list in its place.
        self._sentinels = [open_client(url.sentinel(*each), SENTINEL_SECONDS) for each in url.hosts]
        self._primary: tuple[tuple[str, int], Node] | None = None

    def run(self, commands: Sequence[Command]) -> list[Any]:
        return self._node().run(commands)

    def each(self, keys: Sequence[str], commands: Sequence[Command]) -> dict[str, list[Any]]:
        return {self._url.where: self.run(commands)}

    def load(self, scripts: Sequence[str], commands: Sequence[Command]) -> None:
        self._node().load(scripts)

    def block(self, stream: str, after: int, milliseconds: int) -> None:
        self._node().block(stream, after, milliseconds)

    def look(self) -> None:
        # An old primary that was cut off from its sentinels takes itself for one still, and knows nothing newer.
        self._node(ask=True)

    def forget(self) -> None:
        primary, self._primary = self._primary, None
        if primary is not None:
            primary[1].forget()

    def close(self) -> None:
        for sentinel in self._sentinels:
            sentinel.close()
        if self._primary is not None:
            self._primary[1].close()

    def _node(self, *, ask: bool = False) -> Node:
        primary = self._primary
        if primary is not None and not ask:
            return primary[1]
        try:
            address = self._ask()
        except StoreUnavailable:
            if primary is None:
                raise
            return primary[1]  # the sentinels' trouble is not the primary's
        if primary is None or primary[0] != address:
            primary = address, Node(self._url.server(*address), replicas=self._replicas, opened=self._opened)
            self._primary = primary
            self._changed()
        return primary[1]

    def _ask(self) -> tuple[str, int]:
        deadline = time.monotonic() + LOOK_UP_SECONDS
        answered: Any = None
        for sentinel in list(self._sentinels):
            if time.monotonic() > deadline:
                break
            try:
                ask: Callable[..., Any] = sentinel.execute_command
                answered = ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.service)
            except (RedisError, OSError) as error:
                trouble = f"{type(error).__name__}: {error}"
                self._sentinels = [*(each for each in self._sentinels if each is not sentinel), sentinel]
                continue
            if answered:
                return answered[0].decode(), int(answered[1])
            trouble = f"none that answered knows a primary called {self._url.service!r}"
        raise StoreUnavailable(f"the sentinels at {self._url.where} do not say where the primary is: {trouble}")

    def _opened(self, connection: Any) -> None:
        # HELLO needs no right, and tells the role.
        connection.send_command("HELLO")
        answer = connection.read_response()
        role = dict(zip(answer[::2], answer[1::2], strict=True)).get(b"role")
        if role != b"master":
            raise redis.ConnectionError(f"a sentinel says that it is the primary, and it is a {role!r}")
        self._changed()
