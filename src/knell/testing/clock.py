"""A clock that a test moves."""

from __future__ import annotations


class Clock:
    """Tells Unix seconds when it is called, always the same until it is moved. It never goes back.

    Attributes:
        now: Unix seconds.
    """

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move it on. ValueError for a negative number: no clock of a store runs backwards."""
        if not seconds >= 0:
            raise ValueError(f"a clock moves on by 0 seconds or more, not by {seconds}")
        self.now += seconds

    def reach(self, moment: float) -> None:
        """Move it on to a moment, Unix seconds; without effect if that has passed."""
        self.now = max(self.now, moment)
