"""What the denylist in SQL says of tokens. Each function is one step inside a transaction."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, delete, insert, select, update

from knell.revocations import Revocation, Scope, claims_of, named_by
from knell.stores.denied import names_of, values_by_claims
from knell.stores.sql_database import Tx, chunks
from knell.stores.sql_schema import key_of
from knell.tokens import TokenRef


@dataclass(frozen=True, slots=True)
class Denied:
    """The strongest revocation that lives of each target that some tokens have."""

    found: Mapping[bytes, Revocation]
    targets: Sequence[Sequence[bytes]]
    claims: Sequence[Mapping[str, Any]]
    predecessor: Sequence[tuple[Scope, str]]

    def refusal(self, n: int, ref: TokenRef, started: float | None) -> Revocation | None:
        """The one that refuses the `n`th of the tokens, whose session began at `started`; None if none does."""
        if not self.found:
            return None
        for scope, value in self.predecessor:
            if (stolen := self.found.get(target_of(scope, ref.iss, value))) is not None:
                return stolen
        named = (self.found[target] for target in self.targets[n] if target in self.found)
        return next((one for one in named if one.refuses(ref, started=started, claims=self.claims[n])), None)


def look(
    tx: Tx,
    refs: Sequence[TokenRef],
    *,
    predecessor: Sequence[tuple[Scope, str]],
    claims: Sequence[Mapping[str, Any]] | None,
) -> Denied:
    """What is denied of these tokens, and of their predecessor."""
    known = [claims_of(ref) for ref in refs] if claims is None else claims
    names = _names(tx, {ref.iss for ref in refs})
    targets = [_targets(ref, its, names.get(ref.iss, ())) for ref, its in zip(refs, known, strict=True)]
    wanted = {target for some in targets for target in some}
    wanted |= {target_of(scope, ref.iss, value) for ref in refs for scope, value in predecessor}
    return Denied(_strongest(tx, wanted), targets, known, predecessor)


def _strongest(tx: Tx, targets: Collection[bytes]) -> dict[bytes, Revocation]:
    table, found = tx.tables.denylist, dict[bytes, Revocation]()
    for chunk in chunks(targets):
        for row in tx.rows(select(table.c.target).where(table.c.target.in_(chunk)).distinct()):
            lives = and_(table.c.target == row.target, table.c.expires_at > tx.now)
            strongest_first = (table.c.strength.desc(), table.c.id.desc())
            body = tx.value(select(table.c.body).where(lives).order_by(*strongest_first).limit(1))
            if body is not None:
                found[row.target] = Revocation.from_json(json.loads(body))
    return found


def target_of(scope: Scope, iss: str, value: str) -> bytes:
    """The key that a revocation is looked up by."""
    return key_of(scope.value, iss, value)


def _targets(ref: TokenRef, claims: Mapping[str, Any], names: Iterable[Sequence[str]]) -> list[bytes]:
    found = [target_of(scope, ref.iss, value) for scope, value in named_by(ref)]
    found += [target_of(Scope.CLAIMS, ref.iss, value) for value in values_by_claims(claims, names)]
    return found


# ---- the sets of claims' names that revocations are by


def _names(tx: Tx, issuers: Collection[str]) -> dict[str, list[list[str]]]:
    table, by_key = tx.tables.claim_names, {key_of(iss): iss for iss in issuers}
    found: dict[str, list[list[str]]] = defaultdict(list)
    for chunk in chunks(by_key):
        for row in tx.rows(select(table.c.iss, table.c.names).where(table.c.iss.in_(chunk))):
            found[by_key[row.iss]].append(json.loads(row.names))
    return found


def count_names(tx: Tx, revocation: Revocation, amount: int) -> None:
    """Take note that a revocation by claims has come (1) or gone (-1); of any other scope, do nothing."""
    if revocation.scope is not Scope.CLAIMS:
        return
    table, names = tx.tables.claim_names, json.dumps(names_of(revocation))
    mine = and_(table.c.iss == key_of(revocation.iss), table.c.names == names)
    if not tx.run(update(table).where(mine).values(revocations=table.c.revocations + amount)):
        tx.run(insert(table), [{"iss": key_of(revocation.iss), "names": names, "revocations": amount}])
    tx.run(delete(table).where(and_(mine, table.c.revocations <= 0)))


def prune(tx: Tx, *, limit: int) -> int:
    """Remove at most `limit` revocations that have expired. Returns how many went."""
    table = tx.tables.denylist
    old = select(table.c.id, table.c.body).where(table.c.expires_at <= tx.now).order_by(table.c.expires_at).limit(limit)
    rows = tx.rows(old)
    for row in rows:
        count_names(tx, Revocation.from_json(json.loads(row.body)), -1)
    for chunk in chunks([row.id for row in rows]):
        tx.run(delete(table).where(table.c.id.in_(chunk)))
    return len(rows)
