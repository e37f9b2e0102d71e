"""What stands in for the broker: a list of messages, each of which a test has delivered when its time has come."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from knell import topology
from knell.errors import BrokerUnavailable
from knell.messages import Message
from knell.publisher import Publisher
from knell.settings import Settings


@dataclass(frozen=True, slots=True, order=True)
class Parcel:
    """A message on its way to one queue.

    Attributes:
        at: when it may be delivered, Unix seconds.
        number: in which order those are delivered that come at the same time.
        queue: where to.
        message: what was sent.
    """

    at: float
    number: int
    queue: str
    message: Message


class Courier(Publisher):
    """Takes messages as a publisher does, confirms them at once, and keeps a copy for each queue that they are for.

    Timers are not kept: `Knell.run` looks at what is due, as the embedded notifier does.

    Attributes:
        down: True while there is "no broker": nothing is taken, which senders are told, and nothing is delivered.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        super().__init__(settings, clock=clock)
        self._now = clock
        self._numbers = itertools.count()
        self._parcels: list[Parcel] = []
        self._held = threading.Lock()
        self.services: list[str] = []
        self.down = False

    def send(self, messages: Sequence[Message]) -> Future[None]:
        """Take messages. The future is done, or has failed with BrokerUnavailable while the courier is down."""
        future: Future[None] = Future()
        if self.down:
            future.set_exception(BrokerUnavailable("the courier of knell.testing is down, as the test wanted"))
            return future
        with self._held:
            for message in messages:
                self._parcels += [self._parcel(queue, message) for queue in self._queues(message)]
        future.set_result(None)
        return future

    @property
    def broken(self) -> bool:
        """True while it is down."""
        return self.down

    @property
    def waiting(self) -> int:
        """How many messages wait to be delivered, those with a time in the future as well."""
        return len(self._parcels)

    @property
    def next_at(self) -> float | None:
        """When the next message is due, Unix seconds; None if there is none, or it is down."""
        with self._held:
            return min(self._parcels).at if self._parcels and not self.down else None

    def take(self) -> Parcel | None:
        """The next message that is due, taken out; None if there is none, or it is down."""
        with self._held:
            due = min(self._parcels, default=None)
            if due is None or due.at > self._now() or self.down:
                return None
            self._parcels.remove(due)
            return due

    def give_back(self, parcel: Parcel) -> None:
        """Put a message back that could not be handled."""
        with self._held:
            self._parcels.append(parcel)

    def _parcel(self, queue: str, message: Message) -> Parcel:
        return Parcel(self._now() if message.eta is None else message.eta, next(self._numbers), queue, message)

    def _queues(self, message: Message) -> list[str]:
        if message.exchange == topology.NOTICES:
            return [topology.service_queue(name) for name in self.services]
        if message.exchange == topology.RETRY:
            names = [name for name in self.services if message.routing_key == topology.retry_key(name)]
            return [topology.service_queue(name) for name in names]
        return [message.exchange] if message.exchange in (topology.RECEIPTS, topology.COMMANDS) else []
