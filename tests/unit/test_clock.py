"""The store's clock, told without asking each time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knell.clock import FIRST_MEASURE_SECONDS, MEASURE_EVERY_SECONDS, StoreClock
from knell.errors import StoreUnavailable


class Times:
    """This process's clock and a store's, both set by hand."""

    def __init__(self, local: float, ahead: float) -> None:
        self.local = local
        self.ahead = ahead
        self.asked = 0
        self.away = False
        self.round_trip = 0.0

    def clock(self) -> float:
        """This process's clock."""
        return self.local

    def time(self) -> float:
        """The store's clock, read in the middle of a round trip."""
        self.asked += 1
        if self.away:
            raise StoreUnavailable("the store is away")
        self.local += self.round_trip / 2
        told = self.local + self.ahead
        self.local += self.round_trip / 2
        return told


def made(local: float = 1_000.0, ahead: float = 3.0) -> tuple[StoreClock, Times]:
    """A StoreClock, and what it measures."""
    times = Times(local, ahead)
    store: Any = times
    return StoreClock(store, times.clock), times


def test_the_store_s_time_is_told() -> None:
    """now() is the store's clock, local() the way back."""
    clock, _ = made()
    assert clock.now() == 1_003.0
    assert clock.offset_seconds == 3.0
    assert clock.local(1_003.0) == 1_000.0


def test_the_store_is_asked_once_a_minute() -> None:
    """Between two measurements the own clock goes on, corrected."""
    clock, times = made()
    clock.now()
    times.local += MEASURE_EVERY_SECONDS - 1
    assert clock.now() == times.local + 3.0
    assert times.asked == 1
    times.local += 1
    times.ahead = 5.0
    assert clock.now() == times.local + 5.0
    assert times.asked == 2


def test_a_step_back_is_measured_at_once() -> None:
    """An own clock that was set back is noticed at the next call."""
    clock, times = made()
    clock.now()
    times.local -= 100
    times.ahead += 100
    assert clock.now() == times.local + 103.0
    assert times.asked == 2


def test_a_round_trip_is_halved() -> None:
    """What the question took does not count as an offset."""
    clock, times = made()
    times.round_trip = 0.5
    assert clock.now() == times.local + 3.0


def test_a_store_that_is_away_is_no_error() -> None:
    """The last offset stays; the store is asked again a minute later, not at each call."""
    clock, times = made()
    clock.now()
    times.away = True
    times.local += MEASURE_EVERY_SECONDS
    assert clock.now() == times.local + 3.0
    times.local += 1
    clock.now()
    assert times.asked == 2


def test_a_store_that_was_away_from_the_start_is_asked_again_soon() -> None:
    """Before the first answer the offset is a guess, so the next question does not wait for a minute."""
    clock, times = made()
    times.away = True
    assert clock.now() == times.local
    clock.now()
    assert times.asked == 1
    times.away = False
    times.local += FIRST_MEASURE_SECONDS
    assert clock.now() == times.local + 3.0


@given(st.floats(0, 1e9), st.floats(-1e6, 1e6))
def test_there_and_back(local: float, ahead: float) -> None:
    """A time of the store by the own clock, plus the offset, is that time."""
    clock, _ = made(local, ahead)
    assert clock.local(clock.now()) == pytest.approx(local, abs=1e-3)
