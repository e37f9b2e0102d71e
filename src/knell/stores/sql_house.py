"""Services, dedupe, parked entries, leases and pruning in SQL. Each function is one step inside a transaction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, fields

from sqlalchemy import Table, and_, delete, insert, select, update

from knell.store import Begun, Parked, Pruned, ServiceInfo
from knell.stores import sql_feed, sql_log
from knell.stores.sql_database import Tx, chunks

# How much of each kind one call of `prune` removes at most: a short transaction, whatever has piled up.
_PRUNE_LIMIT = 1000
# A copy of a notice may come up a little after the retention: what was done is remembered a day longer.
_DEDUPE_MARGIN_SECONDS = 86_400.0


# ---- services


def add_service(tx: Tx, name: str) -> bool:
    """See `Store.add_service`."""
    table = tx.tables.services
    if tx.row(select(table.c.name).where(table.c.name == name)) is not None:
        return False
    tx.run(insert(table), [{"name": name, "added_at": tx.now}])
    return True


def remove_service(tx: Tx, name: str) -> bool:
    """See `Store.remove_service`."""
    table = tx.tables.services
    if not tx.run(delete(table).where(table.c.name == name)):
        return False
    sql_log.forget_service(tx, name)
    return True


def services(tx: Tx) -> list[ServiceInfo]:
    """See `Store.services`."""
    table, missed = tx.tables.services, sql_log.missed_since(tx)
    return [
        ServiceInfo(row.name, row.added_at, missed.get(row.name)) for row in tx.rows(select(table).order_by("name"))
    ]


# ---- dedupe


def begin(tx: Tx, service: str, batch_id: str, *, holder: str, lease_seconds: float) -> Begun:
    """See `Dedupe.begin`."""
    table = tx.tables.dedupe
    mine = and_(table.c.service == service, table.c.batch_id == batch_id)
    found = tx.row(select(table).where(mine))
    if found is not None and found.holder != holder and found.leased_until > tx.now:
        return Begun(False, int(found.done, 16), int(found.parked, 16))
    lease = {"holder": holder, "leased_until": tx.now + lease_seconds, "expires_at": _forgotten_at(tx)}
    if found is None:
        row = {"service": service, "batch_id": batch_id, "done": "0", "parked": "0"}
        tx.run(insert(table), [row | lease])
        return Begun(True, 0, 0)
    tx.run(update(table).where(mine).values(lease))
    return Begun(True, int(found.done, 16), int(found.parked, 16))


def mark(
    tx: Tx, service: str, batch_id: str, *, holder: str, done: int, parked: int, unparked: int, lease_seconds: float
) -> bool:
    """See `Dedupe.mark`."""
    table = tx.tables.dedupe
    mine = and_(table.c.service == service, table.c.batch_id == batch_id)
    found = tx.row(select(table).where(mine))
    held = found is not None and found.holder == holder
    before = (0, 0) if found is None else (int(found.done, 16), int(found.parked, 16))
    values: dict[str, object] = {
        "done": f"{before[0] | done:x}",
        "parked": f"{(before[1] | parked) & ~unparked:x}",
        "expires_at": _forgotten_at(tx),
    }
    if held:
        values |= {"holder": holder if lease_seconds > 0 else None, "leased_until": tx.now + lease_seconds}
    if found is None:
        nobodys = {"service": service, "batch_id": batch_id, "holder": None, "leased_until": 0.0}
        tx.run(insert(table), [nobodys | values])
    else:
        tx.run(update(table).where(mine).values(values))
    return held


def _forgotten_at(tx: Tx) -> float:
    return tx.now + tx.rules.retention_seconds + _DEDUPE_MARGIN_SECONDS


# ---- parked entries


def park(tx: Tx, entries: Sequence[Parked]) -> None:
    """See `Store.park`."""
    rows = {entry.id: asdict(entry) for entry in entries}
    unpark(tx, rows)
    tx.run(insert(tx.tables.parked), list(rows.values()))


def parked(tx: Tx, *, service: str | None, after: str, limit: int) -> list[Parked]:
    """See `Store.parked`."""
    table = tx.tables.parked
    query = select(*(table.c[field.name] for field in fields(Parked))).where(table.c.id > after)
    if service is not None:
        query = query.where(table.c.service == service)
    return [Parked(**row._mapping) for row in tx.rows(query.order_by(table.c.id).limit(limit))]


def unpark(tx: Tx, ids: Collection[str]) -> int:
    """See `Store.unpark`."""
    table = tx.tables.parked
    return sum(tx.run(delete(table).where(table.c.id.in_(chunk))) for chunk in chunks(ids))


# ---- leases


def lease(tx: Tx, name: str, *, holder: str, seconds: float) -> bool:
    """See `Store.lease`."""
    table = tx.tables.leases
    found = tx.row(select(table).where(table.c.name == name))
    if found is not None and found.holder != holder and found.leased_until > tx.now:
        return False
    tx.run(delete(table).where(table.c.name == name))
    if seconds > 0:
        tx.run(insert(table), [{"name": name, "holder": holder, "leased_until": tx.now + seconds}])
    return True


# ---- pruning


def prune(tx: Tx) -> Pruned:
    """See `Store.prune`."""
    tables = tx.tables
    notices, missed = sql_log.prune(tx, limit=_PRUNE_LIMIT)
    return Pruned(
        revocations=_prune_past(tx, tables.denylist, "expires_at", tx.now),
        changes=sql_feed.trim(tx, limit=_PRUNE_LIMIT),
        notices=notices,
        dedupe=_prune_past(tx, tables.dedupe, "expires_at", tx.now),
        parked=_prune_past(tx, tables.parked, "at", tx.now - tx.rules.retention_seconds),
        missed=missed,
    )


def _prune_past(tx: Tx, table: Table, column: str, moment: float) -> int:
    """Remove at most _PRUNE_LIMIT rows whose time has come."""
    keys = list(table.primary_key.columns)
    # The oldest of them, and no key list: a row is named by as many columns as its table's key has.
    old = select(*keys).where(table.c[column] < moment).order_by(table.c[column]).limit(_PRUNE_LIMIT)
    rows = tx.rows(old)
    for row in rows:
        tx.run(delete(table).where(and_(*(key == value for key, value in zip(keys, row, strict=True)))))
    return len(rows)
