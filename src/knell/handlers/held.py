"""A session as it is kept: how it is written and read, and for how long it can live."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from knell.settings import Rules
from knell.tokens import TokenRef, check_identifier

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Held:
    """A session as it is kept.

    Attributes:
        session_id: its id: a secret of its client, never to be logged.
        token: the token that it hangs on.
        text: how that stands in the store; it tells a session that has changed meanwhile.
    """

    session_id: str = field(repr=False)
    token: TokenRef
    text: str = field(repr=False)

    @classmethod
    def read(cls, session_id: str, text: str) -> Held:
        """Read what `written` wrote."""
        return cls(session_id, TokenRef.from_json(json.loads(text)), text)


def written(token: TokenRef) -> str:
    """The token that a session hangs on, as text."""
    return json.dumps(token.as_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def check_session_id(session_id: object) -> str:
    """A session's id: text of at most 256 bytes. InvalidClaims otherwise; the error does not show it."""
    return check_identifier("session_id", session_id)


def lives_until(token: TokenRef, rules: Rules, *, now: float) -> float:
    """When a session goes by itself, Unix seconds: at its session_exp, or when no session that old can be alive.

    Its end is told long before; this is for the one that nobody is told of, so that none is kept for ever.
    """
    if token.session_exp is not None:
        return token.session_exp + rules.leeway_seconds
    began = now if token.started is None else token.started
    return max(token.exp, began + rules.max_session_seconds + rules.max_token_seconds) + rules.leeway_seconds


def in_pages(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of at most `size` of the values."""
    left = iter(values)
    while page := list(islice(left, size)):
        yield page
