"""What the contract tests are made of: a clock that moves, and short ways to write tokens and revocations."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

import knell.stores
from knell.notices import Receipt, batch_id_of_revocation
from knell.revocations import Revocation, Scope, make_revocation
from knell.settings import Rules
from knell.store import AuditEntry, Claim, Claimed, OpenNotice, Recorded, Store
from knell.tokens import ClaimValue, TokenRef

ISS = "https://issuer.example"
BEGAN = 1_900_000_000.0
BOTH = frozenset({"token", "session"})
TOKEN = frozenset({"token"})
SESSION = frozenset({"session"})


class Clock:
    """A store's clock that stands still until a test moves it."""

    def __init__(self, now: float = BEGAN) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def reach(self, moment: float) -> None:
        self.now = max(self.now, moment)


def token(jti: str = "t1", *, ends_in: float = 60.0, **more: Any) -> TokenRef:
    """A token of ISS that was issued at BEGAN and ends `ends_in` seconds later."""
    return TokenRef(**({"iss": ISS, "jti": jti, "exp": BEGAN + ends_in, "iat": BEGAN} | more))


def revocation(scope: str, value: str | dict[str, ClaimValue], *, now: float = BEGAN, **more: Any) -> Revocation:
    """A revocation of ISS, made at `now`; of scope claims the value is the match."""
    match = value if isinstance(value, dict) else {str(Scope(scope).claim): value}
    return make_revocation(scope, match, **({"iss": ISS, "now": now, "rules": Rules()} | more))


def noted(made: Revocation) -> AuditEntry:
    """What the audit log is told of a revocation that nobody in particular has made."""
    return AuditEntry.of_revocation(made, actor=None, counts={})


def record(store: Store, made: Revocation, jws: str = "a.b.c") -> Recorded:
    """Revoke, with the batch id that goes with it."""
    return store.revoke(made, batch_id=batch_id_of_revocation(made.id), jws=jws, audit=noted(made))


def claim_all(store: Store, second: int, *, services: Sequence[str] = ("shop",), limit: int = 500) -> list[Claim]:
    """Claim a due second until it is empty."""
    claims = []
    while (claim := store.claim(second, services=services, limit=limit)) is not None:
        claims.append(claim)
        if not claim.more:
            break
    return claims


def claim_one(store: Store, second: int, *, services: Sequence[str] = ("shop",)) -> Claim:
    """The one claim that empties a due second."""
    claim = store.claim(second, services=services)
    assert claim is not None
    assert not claim.more
    return claim


def told(claims: Iterable[Claim]) -> dict[tuple[str, str | None], frozenset[str]]:
    """What claims say has ended, by (jti, sid)."""
    found: dict[tuple[str, str | None], frozenset[str]] = {}
    for entry in entries(claims):
        name = (entry.ref.jti, entry.ref.sid)
        assert name not in found, f"{name} was told twice"
        found[name] = entry.ends
    return found


def entries(claims: Iterable[Claim]) -> list[Claimed]:
    return [entry for claim in claims for entry in claim.entries]


def done(store: Store, service: str, batch_id: str, *numbers: int) -> None:
    """A receipt that says done; of entry 0 if none is named."""
    store.receive([(service, Receipt(batch_id=batch_id, at=BEGAN, done=numbers or (0,)))])


def open_again(store: Store, *batch_ids: str) -> dict[str, OpenNotice]:
    """The open records out of `batch_ids`, by id, however long they still had to wait."""
    store.resend_at(batch_ids, 0)
    return {notice.batch_id: notice for notice in store.open_notices(limit=10_000) if notice.batch_id in batch_ids}


def set_everywhere(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Change a constant of `knell.store` in every module that implements it."""
    monkeypatch.setattr(f"knell.store.{name}", value)
    for module in pkgutil.iter_modules(knell.stores.__path__, "knell.stores."):
        monkeypatch.setattr(importlib.import_module(module.name), name, value, raising=False)
