"""The revocations that live, in this process's memory: what a verifier looks a token up in."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from knell.claim_index import ClaimIndex
from knell.revocations import Revocation, Scope, claims_of
from knell.tokens import MAX_TIME, TokenRef

_Key = tuple[str, str]
# One call of `prune` removes at most this many entries, so that a reader's thread is never held up for long.
PRUNE_LIMIT = 10_000
# The timetable may hold this many entries of revocations that have left by other ways before it is made anew.
_SLACK = 1024


class Denylist:
    """Revocations, indexed so that a look-up costs the same whatever their number.

    One thread may write (`add`, `remove`, `prune`) while any number of threads call `find`, which takes no lock. That
    is safe because `find` reads by single `dict.get` calls on keys of plain strings, which the interpreter does in one
    step, because the values are frozen, and because a writer replaces a value in one step too: a key that some
    revocation still names is never absent for a moment.
    """

    def __init__(self) -> None:
        # The strongest revocation of each key: it refuses and tells whatever any other one of that key does.
        self._strongest: dict[Scope, dict[_Key, Revocation]] = {scope: {} for scope in Scope}
        self._tokens = self._strongest[Scope.TOKEN]
        self._sessions = self._strongest[Scope.SESSION]
        self._subjects = self._strongest[Scope.SUBJECT]
        self._clients = self._strongest[Scope.CLIENT]
        self._keys = self._strongest[Scope.KEY]
        self._issuers = self._strongest[Scope.ISSUER]
        self._claims = self._strongest[Scope.CLAIMS]
        self._claim_index = ClaimIndex()
        # The weaker ones of each key that has several, weakest first; only the writer looks here.
        self._weaker: dict[Scope, dict[_Key, list[_Ranked]]] = {scope: {} for scope in Scope}
        self._by_id: dict[str, Revocation] = {}
        self._timetable: list[tuple[float, str]] = []

    def __len__(self) -> int:
        """How many revocations there are."""
        return len(self._by_id)

    def __iter__(self) -> Iterator[Revocation]:
        """Every revocation. For the writing thread only."""
        return iter(self._by_id.values())

    def find(
        self,
        token: TokenRef,
        *,
        started: float | None = None,
        claims: Mapping[str, Any] | None = None,
        issuers: Collection[str] = (),
    ) -> Revocation | None:
        """A revocation that refuses a token; None if there is none.

        Args:
            token: the token.
            started: the start of its session where the store knows an earlier one than the token tells, Unix seconds.
            claims: its claims set, where that is at hand: without it, scope claims is judged by the claims that are
                tracked.
            issuers: those whose keys are one set, in which a kid names one key: whoever has stolen it can sign for any
                of them, and any of them can revoke it.
        """
        found = self._tokens.get((token.iss, token.jti))
        if found is not None:
            return found
        if token.sid is not None:
            found = self._sessions.get((token.iss, token.sid))
            if found is not None:
                return found
        if token.sub is not None:
            found = self._subjects.get((token.iss, token.sub))
            if found is not None and found.refuses(token, started=started):
                return found
        if token.kid is not None:
            for iss in (token.iss, *issuers):
                found = self._keys.get((iss, token.kid))
                if found is not None:
                    return found
        if token.client_id is not None:
            found = self._clients.get((token.iss, token.client_id))
            if found is not None and found.refuses(token, started=started):
                return found
        found = self._issuers.get((token.iss, token.iss))
        if found is not None and found.refuses(token, started=started):
            return found
        if self._claims:
            return self._find_by_claims(token, started, claims)
        return None

    def _find_by_claims(
        self, token: TokenRef, started: float | None, claims: Mapping[str, Any] | None
    ) -> Revocation | None:
        if claims is None:
            claims = claims_of(token)
        for value in self._claim_index.candidates(token.iss, claims):
            found = self._claims.get((token.iss, value))
            if found is not None and found.refuses(token, started=started, claims=claims):
                return found
        return None

    def add(self, revocation: Revocation) -> bool:
        """Add a revocation. False if its id is there already: the first one counts."""
        if revocation.id in self._by_id:
            return False
        self._by_id[revocation.id] = revocation
        heapq.heappush(self._timetable, (revocation.expires_at, revocation.id))
        strongest, key = self._strongest[revocation.scope], _key(revocation)
        present = strongest.get(key)
        if present is None:
            strongest[key] = revocation
            if revocation.scope is Scope.CLAIMS:
                self._claim_index.add(revocation)
            return True
        weak, strong = sorted((present, revocation), key=_rank)
        insort(self._weaker[revocation.scope].setdefault(key, []), _rank(weak))
        strongest[key] = strong
        return True

    def remove(self, revocation_id: str) -> Revocation | None:
        """Take a revocation out; another one of the same key shows again. Returns it, or None if it was not there."""
        revocation = self._by_id.pop(revocation_id, None)
        if revocation is None:
            return None
        strongest, weaker = self._strongest[revocation.scope], self._weaker[revocation.scope]
        key = _key(revocation)
        ranked = weaker.get(key)
        if strongest[key] is not revocation:
            assert ranked is not None
            del ranked[bisect_left(ranked, _rank(revocation))]
        elif ranked:
            strongest[key] = self._by_id[ranked.pop()[1]]
        else:
            del strongest[key]
            if revocation.scope is Scope.CLAIMS:
                self._claim_index.remove(revocation)
        if ranked is not None and not ranked:
            del weaker[key]
        self._shorten_timetable()
        return revocation

    def prune(self, now: float, *, limit: int = PRUNE_LIMIT) -> int:
        """Remove what expires at `now` (Unix seconds) or before, at most `limit` entries. Returns how many it was."""
        removed = 0
        while removed < limit and self._timetable and self._timetable[0][0] <= now:
            expires_at, revocation_id = heapq.heappop(self._timetable)
            revocation = self._by_id.get(revocation_id)
            if revocation is not None and revocation.expires_at == expires_at:
                self.remove(revocation_id)
                removed += 1
        return removed

    def _shorten_timetable(self) -> None:
        if len(self._timetable) > 2 * len(self._by_id) + _SLACK:
            self._timetable = [(revocation.expires_at, revocation.id) for revocation in self._by_id.values()]
            heapq.heapify(self._timetable)


def strength(revocation: Revocation) -> float:
    """By this the revocations of one key are compared: the strongest refuses and tells whatever the others do.

    Of two with a cut-off the later one refuses more. Of two absolute ones both refuse the same: one that tells of a
    session's end goes before one that does not, and then the longer-lived one leads.
    """
    if revocation.issued_before is not None:
        return revocation.issued_before
    return revocation.expires_at + (MAX_TIME if "session" in revocation.ends else 0.0)


_Ranked = tuple[float, str]


def _key(revocation: Revocation) -> _Key:
    return (revocation.iss, revocation.value)


def _rank(revocation: Revocation) -> _Ranked:
    return (strength(revocation), revocation.id)
