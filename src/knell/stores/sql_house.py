"""Services, dedupe, parked entries, leases and pruning in SQL. Each function is one step inside a transaction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, fields

from sqlalchemy import Table, and_, bindparam, delete, exists, insert, select, update

from knell.store import Begun, Parked, Pruned, ServiceInfo
from knell.stores import sql_denylist, sql_feed, sql_log
from knell.stores.sql_database import Tx, chunks
from knell.stores.sql_schema import key_of

# How much of each kind one call of `prune` removes at most: a short transaction, whatever has piled up.
_PRUNE_LIMIT = 1000
# A copy of a notice may come up a little after the retention: what was done is remembered a day longer.
_DEDUPE_MARGIN_SECONDS = 86_400.0


# ---- services


def add_service(tx: Tx, name: str) -> bool:
    """See `Store.add_service`."""
    table = tx.tables.services
    if tx.row(select(table.c.name).where(and_(table.c.name == name, ~table.c.removed))) is not None:
        return False
    tx.run(delete(table).where(table.c.name == name))
    tx.run(insert(table), [{"name": name, "added_at": tx.now, "removed": False}])
    return True


def remove_service(tx: Tx, name: str) -> bool:
    """See `Store.remove_service`."""
    table = tx.tables.services
    if not tx.run(update(table).where(and_(table.c.name == name, ~table.c.removed)).values(removed=True)):
        return False
    sql_log.forget_service(tx, name)
    return True


def services(tx: Tx) -> list[ServiceInfo]:
    """See `Store.services`."""
    table, missed = tx.tables.services, sql_log.missed_since(tx)
    rows = tx.rows(select(table).where(~table.c.removed).order_by(table.c.name))
    return [ServiceInfo(row.name, row.added_at, missed.get(row.name)) for row in rows]


# ---- dedupe


def begin(tx: Tx, service: str, batch_id: str, *, holder: str, lease_seconds: float) -> Begun:
    """See `Dedupe.begin`."""
    table = tx.tables.dedupe
    mine = and_(table.c.service == service, table.c.batch_id == batch_id)
    found = tx.row(select(table).where(mine).with_for_update())
    lease = {"holder": holder, "leased_until": tx.now + lease_seconds, "expires_at": _forgotten_at(tx)}
    if found is None:
        row = {"service": service, "batch_id": batch_id, "done": "0", "parked": "0"}
        tx.run(insert(table), [row | lease])
        return Begun(True, 0, 0)
    done, parked = int(found.done, 16), int(found.parked, 16)
    others = found.holder not in (None, holder)
    if others and found.leased_until > tx.now:
        return Begun(False, done, parked)
    tx.run(update(table).where(mine).values(lease))
    return Begun(True, done, parked, abandoned=found.holder if others and found.leased_until > 0 else None)


def mark(
    tx: Tx, service: str, batch_id: str, *, holder: str, done: int, parked: int, unparked: int, lease_seconds: float
) -> bool:
    """See `Dedupe.mark`."""
    table = tx.tables.dedupe
    mine = and_(table.c.service == service, table.c.batch_id == batch_id)
    found = tx.row(select(table).where(mine).with_for_update())
    held = found is not None and found.holder == holder
    before = (0, 0) if found is None else (int(found.done, 16), int(found.parked, 16))
    values: dict[str, object] = {
        "done": f"{before[0] | done:x}",
        "parked": f"{(before[1] | parked) & ~unparked:x}",
        "expires_at": _forgotten_at(tx),
    }
    if held:
        # One that is given back has run out, whatever the clock does next.
        values["leased_until"] = tx.now + lease_seconds if lease_seconds > 0 else 0.0
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
    table, rows, jws = tx.tables.parked_jws, {}, dict[bytes, str]()
    for entry in entries:
        row = asdict(entry)
        text = row.pop("jws")
        row["jws_key"] = None if text is None else key_of(text)
        rows[entry.id] = row
        if text is not None:
            jws[row["jws_key"]] = text
    unpark(tx, rows)
    known = {row.key for chunk in chunks(jws) for row in tx.rows(select(table.c.key).where(table.c.key.in_(chunk)))}
    tx.run(insert(table), [{"key": key, "jws": text} for key, text in jws.items() if key not in known])
    tx.run(insert(tx.tables.parked), list(rows.values()))


def parked(tx: Tx, *, service: str | None, after: str, limit: int) -> list[Parked]:
    """See `Store.parked`."""
    table, jws = tx.tables.parked, tx.tables.parked_jws
    columns = [jws.c.jws if field.name == "jws" else table.c[field.name] for field in fields(Parked)]
    query = select(*columns).join(jws, jws.c.key == table.c.jws_key, isouter=True).where(table.c.id > after)
    if service is not None:
        query = query.where(table.c.service == service)
    return [Parked(**row._mapping) for row in tx.rows(query.order_by(table.c.id).limit(limit))]


def unpark(tx: Tx, ids: Collection[str]) -> int:
    """See `Store.unpark`."""
    table, jws = tx.tables.parked, tx.tables.parked_jws
    removed = 0
    for chunk in chunks(ids):
        keys = [row.jws_key for row in tx.rows(select(table.c.jws_key).where(table.c.id.in_(chunk)).distinct())]
        removed += tx.run(delete(table).where(table.c.id.in_(chunk)))
        tx.run(delete(jws).where(and_(jws.c.key.in_(keys), ~exists().where(table.c.jws_key == jws.c.key))))
    return removed


# ---- leases


def lease(tx: Tx, name: str, *, holder: str, seconds: float) -> bool:
    """See `Store.lease`."""
    table = tx.tables.leases
    found = tx.row(select(table).where(table.c.name == name).with_for_update())
    if found is not None and found.holder != holder and found.leased_until > tx.now:
        return False
    tx.run(delete(table).where(table.c.name == name))
    if seconds > 0:
        tx.run(insert(table), [{"name": name, "holder": holder, "leased_until": tx.now + seconds}])
    return True


# ---- pruning


def prune_log(tx: Tx) -> Pruned:
    """The part of `Store.prune` that holds up those who write to the notice log."""
    notices, missed = sql_log.prune(tx, limit=_PRUNE_LIMIT)
    return Pruned(notices=notices, missed=missed)


def prune_denylist(tx: Tx) -> Pruned:
    """The part that holds up those who track and revoke."""
    return Pruned(revocations=sql_denylist.prune(tx, limit=_PRUNE_LIMIT))


def prune_rest(tx: Tx) -> Pruned:
    """All else that `Store.prune` removes."""
    tables = tx.tables
    return Pruned(
        changes=sql_feed.trim(tx, limit=_PRUNE_LIMIT),
        dedupe=_prune_past(tx, tables.dedupe, "expires_at", tx.now),
        parked=_prune_parked(tx, tx.now - tx.rules.retention_seconds),
        audit=_prune_past(tx, tables.audit, "at", tx.now - tx.rules.audit_seconds),
    )


def _prune_parked(tx: Tx, moment: float) -> int:
    table = tx.tables.parked
    old = select(table.c.id).where(table.c["at"] <= moment).order_by(table.c["at"]).limit(_PRUNE_LIMIT)
    return unpark(tx, [row.id for row in tx.rows(old)])


def _prune_past(tx: Tx, table: Table, column: str, moment: float) -> int:
    """Remove at most _PRUNE_LIMIT rows whose time has come."""
    keys = list(table.primary_key.columns)
    # The oldest of them, and no key list: a row is named by as many columns as its table's key has.
    old = select(*keys).where(table.c[column] <= moment).order_by(table.c[column]).limit(_PRUNE_LIMIT)
    # One that somebody is writing to at this moment lives on.
    rows = tx.rows(old.with_for_update(skip_locked=True))
    named = and_(*(key == bindparam(f"of_{key.name}") for key in keys))
    tx.run(delete(table).where(named), [{f"of_{name}": value for name, value in row._mapping.items()} for row in rows])
    return len(rows)
