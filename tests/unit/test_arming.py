"""The thread that publishes timers goes on, whatever becomes of one page of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from knell import Settings
from knell.arming import Armer
from knell.clock import StoreClock
from knell.errors import BrokerUnavailable, InvalidInput
from knell.messages import Message
from knell.store import open_store


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
