"""What both stores know of revocations by claims: under which matches a token may be found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

from knell.revocations import Revocation, Scope, written_claims
from knell.tokens import comparable, values_of

# Claims that are lists multiply: of a token with more combinations than this, and than its lists have values in all,
# the others are not looked at here. Verifiers look at all of them.
MOST_COMBINATIONS = 100


def names_of(revocation: Revocation) -> list[str]:
    """The names of the claims that a revocation is by, in order."""
    return sorted(revocation.match)


def names_of_token(jti: str | None, kid: str | None) -> list[tuple[Scope, str]]:
    """What names a token of which only this is known: its jti and its key, each with its scope."""
    return [(scope, value) for scope, value in ((Scope.TOKEN, jti), (Scope.KEY, kid)) if value is not None]


def values_by_claims(claims: Mapping[str, Any], sets_of_names: Iterable[Sequence[str]]) -> Iterator[str]:
    """What revocations that name a token by its claims have as their `value`.

    Args:
        claims: the token's claims set.
        sets_of_names: which claims revocations are by.
    """
    for names in sets_of_names:
        if all(name in claims for name in names):
            choices = [[value for value in values_of(claims[name]) if _nameable(value)] for name in names]
            most = max(MOST_COMBINATIONS, sum(map(len, choices)))
            for values in islice(product(*choices), most):
                yield written_claims(dict(zip(names, values, strict=True)))


def _nameable(value: object) -> bool:
    """Whether a revocation can name a value. JSON can write half of a character, which is no text and has no bytes."""
    return comparable(value) and not (isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value))
