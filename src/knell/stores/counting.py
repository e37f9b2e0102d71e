"""How many live tokens and sessions a revocation names: the part of the count that is the same for every store."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Generic, NamedTuple, TypeVar

from knell.revocations import Revocation, Scope
from knell.store import Counted
from knell.tokens import TokenRef

Place = TypeVar("Place")
# What every token is kept with, beside the claims that are tracked.
_KEPT = frozenset({"jti", "sid", "sub", "client_id"})


class Found(NamedTuple):
    """A live token, and the start of its session as the store knows it."""

    ref: TokenRef
    started: float | None


class Page(NamedTuple, Generic[Place]):
    """Some of the live tokens, and where the next page begins; None after the last one."""

    tokens: Sequence[Found]
    after: Place | None


def count(
    revocation: Revocation,
    read: Callable[[Place | None], Page[Place]],
    *,
    tracked: Collection[str],
    enough: int,
    within_seconds: float,
) -> Counted | None:
    """See `Store.count`.

    Args:
        read: reads the page at a place; the first one at None.
        tracked: the claims that are kept with tokens.
    """
    if revocation.scope is Scope.CLAIMS and not _KEPT.union(tracked).issuperset(revocation.match):
        return None
    deadline = time.monotonic() + within_seconds
    tokens, alone, sessions, place = 0, 0, set[str](), None
    while True:
        page = read(place)
        for ref, started in page.tokens:
            if revocation.refuses(ref, started=started):
                tokens += 1
                if ref.sid is None:
                    alone += 1
                else:
                    sessions.add(ref.sid)
        place, ended = page.after, alone + len(sessions)
        if place is None or ended > enough or time.monotonic() >= deadline:
            return Counted(tokens, ended, complete=place is None)
