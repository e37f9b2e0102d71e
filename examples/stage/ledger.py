"""What should end and what was seen to end, service by service."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.table import Table

from knell import Issued

How = Literal["lives", "expires", "revoked"]
# An exp has milliseconds, and so has a moment; what a log line is written with has not.
ROUNDING_MS = 1.0


@dataclass(eq=False)
class Session:
    """One session of one user, as the issuer knows it.

    Attributes:
        how: what is to become of it.
        moment: when that is, Unix seconds; None while it is not known.
        cookie: what the shop gave for it.
        tokens: its tokens, in the order in which they were issued.
    """

    user: str
    sid: str
    how: How
    moment: float | None = None
    cookie: str = ""
    tokens: list[Token] = field(default_factory=list)


@dataclass(eq=False)
class Token:
    """One token: it may end before its session, when that was refreshed.

    Attributes:
        how, moment: as of Session.
        ticket: what the gateway gave for it.
    """

    session: Session
    issued: Issued
    how: How
    moment: float | None = None
    ticket: str = ""

    @property
    def jti(self) -> str:
        """Its id."""
        return self.issued.ref.jti


@dataclass
class Row:
    """What one service was to end, named by sid or jti, and what became of it.

    Attributes:
        due: what was to end.
        others: what was to live.
        late: how long after its moment each end was seen, in milliseconds; None where that cannot be said.
        late_after_return: the same for what ended while the service was down, counted from its return.
        alive: what still works when all is over; a service is not believed when it says that something has ended.
    """

    title: str
    due: set[str]
    others: set[str]
    late: dict[str, float | None] = field(default_factory=dict)
    late_after_return: dict[str, float | None] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)

    @property
    def said(self) -> set[str]:
        """What the service was seen to end."""
        return self.late.keys() | self.late_after_return.keys()

    @property
    def ended(self) -> set[str]:
        """What was to end, was seen to end, and is gone indeed."""
        return (self.due & self.said) - self.alive

    @property
    def wrongly_ended(self) -> set[str]:
        """What was to live and does not, and what was ended before its moment."""
        early = {name for name, ms in self.late.items() if ms is not None and ms < -ROUNDING_MS}
        return (self.others & self.said) | (self.others - self.alive) | early

    @property
    def right(self) -> bool:
        """Whether all that should have ended has, and no other."""
        return self.ended == self.due and not self.wrongly_ended


def row(title: str, named: Iterable[tuple[str, How]]) -> Row:
    """A row for things by name, each with what is to become of it."""
    found = dict(named)
    return Row(
        title,
        due={name for name, how in found.items() if how != "lives"},
        others={name for name, how in found.items() if how == "lives"},
    )


def table(rows: Iterable[Row]) -> Table:
    """The summary."""
    made = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    made.add_column("", no_wrap=True)
    for heading in ("should\nend", "ended", "should\nlive", "ended\nwrongly", "latest\nms", "ms after\nreturn"):
        made.add_column(heading, justify="right")
    for each in rows:
        made.add_row(
            each.title,
            str(len(each.due)),
            _judged(len(each.ended), good=each.ended == each.due),
            str(len(each.others)),
            _judged(len(each.wrongly_ended), good=not each.wrongly_ended),
            _latest(each.late),
            _latest(each.late_after_return),
        )
    return made


def _judged(count: int, *, good: bool) -> str:
    return f"[{'green' if good else 'bold red'}]{count}[/]"


def _latest(late: dict[str, float | None]) -> str:
    known = [ms for ms in late.values() if ms is not None]
    return str(round(max(known))) if known else ""
