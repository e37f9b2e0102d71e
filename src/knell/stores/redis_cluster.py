"""The nodes of a Redis Cluster: each command goes to the one that has its slot.

A slot that is moved key by key answers nothing meanwhile (Redis says ASK or TRYAGAIN): a script that ran on either side
would see half of the keys, and make anew what is about to come. So those redirections are not followed, but waited for,
within the bound of a call. See https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
"""

from __future__ import annotations

import time
from binascii import crc_hqx
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from redis.exceptions import (
    AskError,
    ClusterDownError,
    ConnectionError,
    MasterDownError,
    MovedError,
    RedisError,
    TimeoutError,
    TryAgainError,
)

from knell.errors import StoreUnavailable
from knell.stores.redis_node import Command, Node, Replicas
from knell.stores.redis_servers import LOOK_UP_SECONDS
from knell.stores.redis_url import RedisUrl

SLOTS = 16_384
# A call waits so long for a slot that is being moved, or has no primary; and then no longer for the other nodes.
SETTLE_SECONDS = 0.8
PAUSE_SECONDS = 0.05
# A MovedError is an AskError too, and is followed.
_REDIRECTED = (AskError, TryAgainError, ClusterDownError, MasterDownError)
_SCRIPTS = ("EVALSHA", "EVALSHA_RO")
_WITHOUT_KEY = ("INFO", "SCRIPT", "TIME")

T = TypeVar("T")
Address = tuple[str, int]


class Cluster:
    """The primaries of a cluster, by the slots that are used here.

    Args:
        home: the key whose node answers what names no key.
        changed: called when another node may answer than before.
    """

    def __init__(self, url: RedisUrl, replicas: Replicas | None, changed: Callable[[], None], *, home: str) -> None:
        self._url = url
        self._replicas = replicas
        self._changed = changed
        self._home = home
        # The one that answered last comes first.
        self._known: list[Address] = list(url.hosts)
        # The slots that are used, and what a node told of all of them.
        self._slots: dict[int, Address] = {}
        self._ranges: list[tuple[int, int, Address]] = []
        self._nodes: dict[Address, Node] = {}

    def run(self, commands: Sequence[Command]) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + SETTLE_SECONDS
        left: Sequence[int] = range(len(commands))
        while left:
            for address, numbers in self._by_node(commands, left).items():
                # Whatever it took to learn where the slots are, one node is asked: that is bounded by itself.
                if answers and time.monotonic() > deadline:
                    raise StoreUnavailable(self._late(answers.values()))
                node = self._node(address)
                found = self._on(address, partial(node.run, [commands[n] for n in numbers]))
                answers.update(zip(numbers, found, strict=True))
                self._learn(address, found)
            again = [n for n in left if isinstance(answers[n], _REDIRECTED)]
            if len(again) == len(left) or any(not isinstance(answers[n], MovedError) for n in again):
                time.sleep(PAUSE_SECONDS)
            left = again
        return [answers[n] for n in range(len(commands))]

    def each(self, keys: Sequence[str], commands: Sequence[Command]) -> dict[str, list[Any]]:
        addresses = dict.fromkeys(self._address(slot_of(key)) for key in keys)
        return {
            f"{host}:{port}": self._on((host, port), partial(self._node((host, port)).run, commands))
            for host, port in addresses
        }

    def load(self, scripts: Sequence[str], commands: Sequence[Command]) -> None:
        for address in self._by_node(commands, range(len(commands))):
            self._on(address, partial(self._node(address).load, scripts))

    def block(self, stream: str, after: int, milliseconds: int) -> None:
        address = self._address(slot_of(stream))
        try:
            self._on(address, partial(self._node(address).block, stream, after, milliseconds))
        except _REDIRECTED as error:
            # Whoever waits reads the feed next, and is told there what is wrong.
            self._learn(address, [error])
            time.sleep(PAUSE_SECONDS)

    def look(self) -> None:
        """A primary that is cut off from the others answers nothing any more."""

    def forget(self) -> None:
        self._slots, self._ranges = {}, []
        for node in list(self._nodes.values()):
            node.forget()

    def close(self) -> None:
        for node in list(self._nodes.values()):
            node.close()

    def _by_node(self, commands: Sequence[Command], numbers: Sequence[int]) -> dict[Address, list[int]]:
        found: dict[Address, list[int]] = {}
        for n in numbers:
            found.setdefault(self._address(slot_of(_key_of(commands[n]) or self._home)), []).append(n)
        return found

    def _node(self, address: Address) -> Node:
        found = self._nodes.get(address)
        if found is None:
            made = Node(self._url.server(*address), replicas=self._replicas, opened=lambda _: self._changed())
            found = self._nodes.setdefault(address, made)
        return found

    def _on(self, address: Address, action: Callable[[], T]) -> T:
        try:
            return action()
        except (ConnectionError, TimeoutError, OSError):
            # Another is asked first who has its slots by now.
            self._known = [*(each for each in self._known if each != address), address]
            raise

    def _learn(self, asked: Address, answers: Sequence[Any]) -> None:
        for answer in answers:
            if isinstance(answer, MovedError):
                # No host: the one that was asked, at another port.
                self._slots[answer.slot_id] = answer.host or asked[0], answer.port
                self._changed()

    def _late(self, answers: Iterable[Any]) -> str:
        why = next((one for one in answers if isinstance(one, _REDIRECTED)), None)
        if why is None:
            return f"the nodes of the cluster at {self._url.where} did not all answer in time"
        return f"the cluster at {self._url.where} is moving a slot, or lacks a node: {type(why).__name__}: {why}"

    def _address(self, slot: int) -> Address:
        if slot not in self._slots:
            found = self._in_ranges(slot)
            if found is None:
                self._ranges = self._look_up()
                found = self._in_ranges(slot)
            if found is None:
                raise StoreUnavailable(f"no node of the cluster at {self._url.where} has slot {slot}")
            self._slots[slot] = found
        return self._slots[slot]

    def _in_ranges(self, slot: int) -> Address | None:
        return next((address for first, last, address in self._ranges if first <= slot <= last), None)

    def _look_up(self) -> list[tuple[int, int, Address]]:
        deadline = time.monotonic() + LOOK_UP_SECONDS
        trouble = "no time is left"
        for address in list(self._known):
            if time.monotonic() > deadline:
                break
            try:
                [answer] = self._on(address, partial(self._node(address).run, [("CLUSTER", "SLOTS")]))
                if isinstance(answer, RedisError):
                    raise answer
            except (RedisError, OSError) as error:
                trouble = f"{type(error).__name__}: {error}"
                continue
            ranges = [
                (int(first), int(last), (host.decode() if host else address[0], int(port)))
                for first, last, (host, port, *_), *_ in answer
            ]
            self._known = list(dict.fromkeys([*(each for *_, each in ranges), *self._known]))
            return ranges
        raise StoreUnavailable(f"no node of the cluster at {self._url.where} tells where the slots are: {trouble}")


def slot_of(key: str) -> int:
    """The slot of a key: of what stands between its first braces, if anything does."""
    tag = key.partition("{")[2].partition("}")
    return crc_hqx((tag[0] if tag[1] and tag[0] else key).encode(), 0) % SLOTS


def _key_of(command: Command) -> str | None:
    """The key that places a command; None if it has none."""
    if command[0] in _SCRIPTS:
        return str(command[3])
    return None if command[0] in _WITHOUT_KEY else str(command[1])
