"""The thread that publishes timers goes on, whatever becomes of one page of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from knell import Settings
from knell.arming import Armer
from knell.clock import StoreClock
from knell.errors import BrokerUnavailable, InvalidInput
from knell.messages import Message
from knell.settings import LONGEST_TIMER_SECONDS
from knell.store import ARM_LEASE_SECONDS, IMMEDIATE_SECONDS, Store, open_store
from tests.contract.making import BEGAN, Clock, token


class Broker:
    """Answers each call of `send` with the next of these errors, then with a confirm."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.sent: list[Sequence[Message]] = []

    def send(self, messages: Sequence[Message]) -> Future[None]:
        """What Publisher.send promises."""
        future: Future[None] = Future()
        if self.errors:
            future.set_exception(self.errors.pop(0))
        else:
            self.sent.append(messages)
            future.set_result(None)
        return future

    @property
    def timers(self) -> dict[int, float | None]:
        """The eta of each second that has a timer."""
        return {json.loads(timer.body)[0][0]: timer.eta for page in self.sent for timer in page}


@pytest.fixture
def clock() -> Clock:
    """The store's."""
    return Clock()


@pytest.fixture
def store(settings: Callable[..., Settings], clock: Clock) -> Iterator[Store]:
    made = settings()
    store = open_store(made.store_url, namespace=made.namespace, rules=made.rules, clock=clock)
    yield store
    store.close()


def arm(store: Store, broker: Any, *seconds: int, local: Callable[[], float] | None = None) -> None:
    armer = Armer(store, broker, StoreClock(store, local or store.time))
    armer.arm(seconds)
    assert armer.flush(10)
    armer.close()


@pytest.mark.parametrize(
    "error", [BrokerUnavailable("away"), InvalidInput("the clock was set back"), RuntimeError("unforeseen")]
)
def test_a_page_that_fails_does_not_stop_the_next(settings: Callable[..., Settings], error: Exception) -> None:
    """It is left to the sweep, and what is to be armed afterwards is armed."""
    made = settings()
    store = open_store(made.store_url, namespace=made.namespace, rules=made.rules)
    broker: Any = Broker(error)
    armer = Armer(store, broker, StoreClock(store))
    armer.arm([int(store.time()) + 10])
    assert armer.flush(10)
    armer.arm([int(store.time()) + 20])
    assert armer.flush(10)
    assert len(broker.sent) == 1
    armer.close()
    store.close()


@pytest.mark.parametrize("ahead", [3.0, 0.0, -3.0])
def test_a_timer_fires_by_the_store_s_clock_whatever_this_process_s_says(
    store: Store, clock: Clock, ahead: float
) -> None:
    """The eta is by the clock of whoever publishes: at that moment of it, the store's clock shows the expiry second."""
    broker, second = Broker(), int(BEGAN) + 60
    arm(store, broker, second, local=lambda: clock() - ahead)
    assert broker.timers == {second: second - ahead}


@pytest.mark.parametrize("ahead", [3.0, 0.0, -3.0])
def test_what_is_due_at_once_by_the_store_s_clock_is_sent_without_a_delay(
    store: Store, clock: Clock, ahead: float
) -> None:
    """A second within 1 s of the store's time has no eta, and a later one has, however much the clocks differ."""
    broker, now = Broker(), int(BEGAN)
    at_once, later = now + int(IMMEDIATE_SECONDS), now + int(IMMEDIATE_SECONDS) + 1
    arm(store, broker, now - 5, at_once, later, local=lambda: clock() - ahead)
    assert broker.timers == {now - 5: None, at_once: None, later: later - ahead}


def test_the_store_hears_of_confirmed_timers_alone(store: Store, clock: Clock) -> None:
    """A second whose timer the broker did not confirm is asked for again; one that it has is not."""
    lost, kept = int(BEGAN) + 60, int(BEGAN) + 70
    store.track([token("t1", ends_in=60), token("t2", ends_in=70)])
    arm(store, Broker(BrokerUnavailable("away")), lost)
    arm(store, Broker(), kept)
    clock.advance(ARM_LEASE_SECONDS + 1)
    again = store.track([token("t3", ends_in=60), token("t4", ends_in=70)])
    assert [answer.must_arm for answer in again] == [(lost,), ()]


def test_what_is_too_far_for_the_broker_is_left_for_later(store: Store) -> None:
    """The broker's delays end at 2^28 s: a later second is not sent, at a wrong time; its neighbour is."""
    broker, near = Broker(), int(BEGAN + LONGEST_TIMER_SECONDS)
    arm(store, broker, near, near + 1)
    assert list(broker.timers) == [near]
