"""Finds the revocations of scope claims that could name a token, at a cost that their number does not raise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from knell.revocations import Revocation
from knell.tokens import ClaimValue, comparable, values_of

# Of one anchor: the texts of the matches that hang on it. Replaced as a whole, so that readers need no lock.
_Bucket = tuple[str, ...]


class ClaimIndex:
    """Matches of several claims, each kept under one of its claims: the one that the fewest others are kept under.

    A token is looked up by each of its claims, so that the cost is that of its own claims, whatever the number of
    matches and of sets of names. One thread may write while others read: see `Denylist`.
    """

    def __init__(self) -> None:
        self._issuers: dict[str, dict[str, dict[Any, _Bucket]]] = {}
        # Where each match is kept; for the writer only.
        self._anchors: dict[tuple[str, str], str] = {}

    def candidates(self, iss: str, claims: Mapping[str, Any]) -> Iterator[str]:
        """The matches (`Revocation.value`) that are kept under a claim of this claims set."""
        names = self._issuers.get(iss)
        if names is None:
            return
        for name, claim in claims.items():
            buckets = names.get(name)
            if buckets is not None:
                for value in values_of(claim):
                    if comparable(value):
                        yield from buckets.get(_key(value), ())

    def add(self, revocation: Revocation) -> None:
        """Keep a match that is not kept yet."""
        names = self._issuers.setdefault(revocation.iss, {})

        def crowd(name: str) -> tuple[int, str]:
            return len(names.get(name, {}).get(_key(revocation.match[name]), ())), name

        anchor = min(revocation.match, key=crowd)
        self._anchors[revocation.iss, revocation.value] = anchor
        buckets, key = names.setdefault(anchor, {}), _key(revocation.match[anchor])
        buckets[key] = (*buckets.get(key, ()), revocation.value)

    def remove(self, revocation: Revocation) -> None:
        """Forget a match."""
        anchor = self._anchors.pop((revocation.iss, revocation.value))
        names = self._issuers[revocation.iss]
        buckets, key = names[anchor], _key(revocation.match[anchor])
        left = tuple(value for value in buckets[key] if value != revocation.value)
        if left:
            buckets[key] = left
            return
        del buckets[key]
        if not buckets:
            del names[anchor]
        if not names:
            del self._issuers[revocation.iss]


def _key(value: ClaimValue) -> object:
    # True equals 1 in Python, and they are two values in JSON.
    return (value,) if isinstance(value, bool) else value
