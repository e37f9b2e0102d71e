"""What every part of the Redis store stands on."""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from knell.settings import Rules
from knell.stores.redis_link import Link
from knell.stores.redis_node import Argument

# A script looks at this many things at most, so that it blocks the server for milliseconds.
CHUNK = 500

T = TypeVar("T")


class RedisPart:
    """One part of the store: its link, and the tags of its slots."""

    rules: Rules
    _link: Link
    _clock: Callable[[], float] | None
    _partitions: int
    _feed: str
    _namespace: str

    def time(self) -> float:
        if self._clock is not None:
            return float(self._clock())
        [(seconds, microseconds)] = self._link.run(("TIME",))
        return int(seconds) + int(microseconds) / 1_000_000

    @property
    def _now(self) -> str:
        """The `now` argument of a script: "" for the server's own clock."""
        return "" if self._clock is None else repr(float(self._clock()))

    @property
    def _tags(self) -> list[str]:
        """The tags of the partitions."""
        return [self._tag(partition) for partition in range(self._partitions)]

    def _tag(self, partition: int) -> str:
        # The first lies in the feed's slot: where it is the only one, a script sees the tokens and the denylist.
        return f"{{{self._namespace}:{partition}}}" if partition else f"{self._feed}:0"

    def _partition_of(self, iss: str, id: str) -> int:
        """The partition of a session, or of a token without one."""
        return crc_hqx(f"{iss}\0{id}".encode(), 0) % self._partitions

    def _call_feed(self, name: str, *arguments: Argument) -> Any:
        return self._link.call(name, self._feed, *arguments)


def chunks(items: Iterable[T], size: int = CHUNK) -> Iterator[list[T]]:
    """The items in lists of at most `size`."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk
