"""What hypothesis draws the words of Knell from."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from knell.notices import MAX_ENTRIES, Cause, Notice, NoticeBatch, Receipt
from knell.revocations import InitiatingEntity, Revocation, Scope
from knell.tokens import MAX_TIME, TokenRef

# No surrogates (no UTF-8 of their own) and no control characters; 60 characters are at most 240 bytes.
identifiers = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)
times = st.floats(0, MAX_TIME, exclude_max=True)
ends = st.sampled_from([frozenset({"token"}), frozenset({"session"}), frozenset({"token", "session"})])
numbers = st.integers(0, MAX_ENTRIES - 1)

# Anything that JSON can say, and what Python's json module reads beyond it.
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


claim_values = identifiers | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1)
claims = st.dictionaries(
    st.sampled_from(["tenant", "role", "level", "admin", "a", "ä"]), claim_values, min_size=1, max_size=4
)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The same, or None."""
    return st.none() | strategy


token_refs = st.builds(
    TokenRef,
    iss=identifiers,
    jti=identifiers,
    exp=times,
    iat=maybe(times),
    sid=maybe(identifiers),
    sub=maybe(identifiers),
    client_id=maybe(identifiers),
    kid=maybe(identifiers),
    auth_time=maybe(times),
    session_exp=maybe(times),
    claims=maybe(claims),
)


@st.composite
def revocations(draw: st.DrawFn) -> Revocation:
    """A revocation of any scope, as `make_revocation` could have made it."""
    scope = draw(st.sampled_from(Scope))
    iss = draw(identifiers)
    return Revocation(
        id=draw(identifiers),
        scope=scope,
        iss=iss,
        match={scope.claim: iss if scope is Scope.ISSUER else draw(identifiers)} if scope.claim else draw(claims),
        made_at=draw(times),
        expires_at=draw(times),
        issued_before=draw(times) if scope.has_cut_off else None,
        ends=draw(ends),
        reason=draw(maybe(st.text(max_size=80))),
        initiating_entity=draw(st.sampled_from(InitiatingEntity)),
    )


def notices(batch_id: str, n: int) -> st.SearchStrategy[Notice]:
    """A notice of any cause, at a given place."""
    return st.builds(
        Notice,
        batch_id=st.just(batch_id),
        n=st.just(n),
        cause=st.sampled_from([Cause.EXPIRED, Cause.REVOKED, Cause.UNDONE]),
        ends=ends,
        scope=st.sampled_from(Scope),
        at=times,
        iss=identifiers,
        jti=maybe(identifiers),
        sid=maybe(identifiers),
        sub=maybe(identifiers),
        client_id=maybe(identifiers),
        kid=maybe(identifiers),
        claims=maybe(claims),
        exp=maybe(times),
        started=maybe(times),
        issued_before=maybe(times),
        revocation_id=maybe(identifiers),
        reason=maybe(st.text(max_size=80)),
        initiating_entity=maybe(st.sampled_from(InitiatingEntity)),
    )


@st.composite
def batches(draw: st.DrawFn) -> NoticeBatch:
    """A batch whose entry numbers may have gaps."""
    batch_id = draw(identifiers)
    places = sorted(draw(st.sets(numbers, min_size=1, max_size=4)))
    return NoticeBatch(
        id=batch_id,
        entries=tuple(draw(notices(batch_id, n)) for n in places),
        issued_at=draw(times),
        expires_at=draw(times),
    )


entry_numbers = st.lists(numbers, max_size=6).map(tuple)
receipts = st.builds(
    Receipt,
    batch_id=st.uuids().map(lambda id: f"e0-{id}") | identifiers.map(lambda id: f"r-{id}"),
    at=times,
    done=entry_numbers,
    parked=entry_numbers,
    retrying=entry_numbers,
    until=maybe(times),
)
