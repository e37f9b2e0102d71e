"""What happened, written as it happens: in colour on a terminal, plain in a pipe."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

# What one service does at one moment becomes one line, written this long after the first of it.
GATHER_SECONDS = 0.25
COLOURS = {"demo": "bold", "shop": "green", "gateway": "cyan", "partner": "magenta", "verifier": "yellow"}


class Timeline:
    """Writes lines with the seconds since it began.

    Args:
        console: where to.
        clock: Unix seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.time) -> None:
        self.console = console
        self._clock = clock
        self._began = clock()
        self._gathering: dict[tuple[str, str], tuple[float, list[float]]] = {}

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._began

    def say(self, text: str, *, who: str = "demo", at: float | None = None) -> None:
        """Write a line. `at`: when it happened, Unix seconds; default now."""
        when = (self._clock() if at is None else at) - self._began
        colour = COLOURS.get(who, "white")
        line = f"[dim]{when:7.3f} s[/dim]  [{colour}]{who:<9}{escape(text)}[/{colour}]"
        self.console.print(line, highlight=False, soft_wrap=True)

    def did(self, who: str, what: str, *, at: float, ms: float) -> None:
        """A service did something, `ms` milliseconds after the moment that it was for."""
        if (who, what) not in self._gathering:
            self._gathering[who, what] = (at, [])
            asyncio.get_running_loop().call_later(GATHER_SECONDS, self._write, who, what)
        self._gathering[who, what][1].append(ms)

    def flush(self) -> None:
        """Write what is still being gathered."""
        for who, what in list(self._gathering):
            self._write(who, what)

    def _write(self, who: str, what: str) -> None:
        if (who, what) not in self._gathering:
            return  # flushed meanwhile
        at, gathered = self._gathering.pop((who, what))
        first, last = round(min(gathered)), round(max(gathered))
        spread = f"{first} ms" if first == last else f"{first} to {last} ms"
        self.say(f"{what}: {len(gathered)}, {spread} after the moment", who=who, at=at)
