"""The notice log in SQL: what services still have to be told. Each function is one step inside a transaction."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, and_, bindparam, delete, exists, func, insert, select, update

from knell.notices import Receipt, batch_id_of_revocation, new_batch_id
from knell.store import (
    FIRST_RESEND_SECONDS,
    LONGEST_RESEND_SECONDS,
    RETRY_MARGIN_SECONDS,
    Claimed,
    OpenNotice,
    ServiceStatus,
    Waiting,
)
from knell.stores.notices import read_notices
from knell.stores.sql_database import Tx, chunks
from knell.tokens import TokenRef

_CLOSED = "0"
# What a record takes beside its text: its row and the index entries, and a row for each service.
_RECORD_BYTES = 200
_WAITING_BYTES = 120


# ---- recording


def add_expiry(tx: Tx, batch_id: str, entries: Sequence[Claimed], services: Sequence[str]) -> None:
    """Record what a claim took out of a second."""
    _add(tx, batch_id, "expiry", services, todo=(1 << len(entries)) - 1, entries=_write_entries(entries))


def without_removed(tx: Tx, services: Sequence[str]) -> list[str]:
    """The services without those that were removed since the list was read."""
    table = tx.tables.services
    removed = {row.name for row in tx.rows(select(table.c.name).where(table.c.removed))}
    return [name for name in services if name not in removed]


def add_revocation(tx: Tx, batch_id: str, jws: str, services: Sequence[str], position: int) -> None:
    """Record the notice of a revocation. Without services the record is closed, and kept for `status`."""
    _add(tx, batch_id, "revocation", services, todo=1, jws=jws, position=position)


def mark_missed(tx: Tx, service: str, since: float) -> None:
    """See `Store.mark_missed`. A service that was removed has missed nothing."""
    notices, waiting, services = tx.tables.notices, tx.tables.waiting, tx.tables.services
    if tx.row(select(services.c.name).where(and_(services.c.name == service, ~services.c.removed))) is None:
        return
    found = tx.row(
        select(notices.c.batch_id, notices.c.since, notices.c.attempts, notices.c.resend_at)
        .join(waiting, waiting.c.batch_id == notices.c.batch_id)
        .where(and_(waiting.c.service == service, notices.c.kind == "missed"))
    )
    if found is None:
        _add(tx, new_batch_id("m"), "missed", [service], todo=1, since=since, resend_at=tx.now)
    elif found.attempts == 0:
        earlier = min(since, found.since)
        tx.run(update(notices).where(notices.c.batch_id == found.batch_id).values(since=earlier))
    else:
        # It was sent already, and its receipt would close what was dropped since: a new id outlives that receipt.
        _remove(tx, [found.batch_id])
        _add(tx, new_batch_id("m"), "missed", [service], todo=1, since=min(since, found.since),
             resend_at=found.resend_at, attempts=found.attempts)  # fmt: skip


def _add(
    tx: Tx,
    batch_id: str,
    kind: str,
    services: Sequence[str],
    *,
    todo: int,
    jws: str | None = None,
    entries: str | None = None,
    since: float | None = None,
    resend_at: float | None = None,
    attempts: int = 0,
    position: int | None = None,
) -> None:
    text = (jws or "") + (entries or "")
    size = len(text.encode()) + _RECORD_BYTES + _WAITING_BYTES * len(services)
    row = {
        "batch_id": batch_id,
        "kind": kind,
        "created_at": tx.now,
        "jws": jws,
        "entries": entries,
        "settled": kind != "expiry",
        "since": since,
        "attempts": attempts,
        "resend_at": (tx.now + FIRST_RESEND_SECONDS if resend_at is None else resend_at) if services else None,
        "size": size,
        "position": position,
    }
    tx.run(insert(tx.tables.notices), [row])
    common = {"batch_id": batch_id, "todo": f"{todo:x}", "state": "waiting", "at": None, "hold_until": 0.0}
    tx.run(insert(tx.tables.waiting), [common | {"service": service} for service in dict.fromkeys(services)])
    if services:
        tx.add("log_bytes", size)


def _write_entries(entries: Iterable[Claimed]) -> str:
    rows = [[entry.n, entry.ref.as_json(), sorted(entry.ends), entry.started] for entry in entries]
    return json.dumps(rows, separators=(",", ":"), ensure_ascii=False)


def _read_entries(text: str | None) -> tuple[Claimed, ...]:
    rows = json.loads(text) if text else []
    return tuple(Claimed(n, TokenRef(**ref), frozenset(ends), started) for n, ref, ends, started in rows)


# ---- closing


def settle(tx: Tx, batch_id: str, dead: Collection[int]) -> None:
    """See `Store.settle`."""
    notices, waiting = tx.tables.notices, tx.tables.waiting
    found = tx.row(select(notices.c.entries, notices.c.size, notices.c.settled).where(notices.c.batch_id == batch_id))
    if found is None or found.settled:
        return
    if not dead:
        tx.run(update(notices).where(notices.c.batch_id == batch_id).values(settled=True))
        return
    left = _write_entries(entry for entry in _read_entries(found.entries) if entry.n not in dead)
    size = found.size - len(found.entries.encode()) + len(left.encode())
    tx.add("log_bytes", size - found.size)
    tx.run(update(notices).where(notices.c.batch_id == batch_id).values(settled=True, entries=left, size=size))
    mask = _bits(dead)
    rows = tx.rows(select(waiting.c.service, waiting.c.todo).where(waiting.c.batch_id == batch_id))
    for row in rows:
        todo = int(row.todo, 16) & ~mask
        mine = and_(waiting.c.batch_id == batch_id, waiting.c.service == row.service)
        tx.run(update(waiting).where(mine).values(todo=f"{todo:x}") if todo else delete(waiting).where(mine))
    _close_finished(tx, [batch_id])


def receive(tx: Tx, receipts: Sequence[tuple[str, Receipt]]) -> None:
    """See `Store.receive`."""
    rows = _waiting_rows(tx, {receipt.batch_id for _, receipt in receipts})
    changed = {}
    for service, receipt in receipts:
        row = rows.get((receipt.batch_id, service))
        if row is not None and _apply(row, receipt, tx.now):
            changed[receipt.batch_id, service] = row
    waiting = tx.tables.waiting
    tx.run(
        update(waiting)
        .where(and_(waiting.c.batch_id == bindparam("of_batch"), waiting.c.service == bindparam("of_service")))
        .values({name: bindparam(name) for name in ("todo", "state", "at", "hold_until")}),
        [row | {"of_batch": batch_id, "of_service": service} for (batch_id, service), row in changed.items()],
    )
    _close_finished(tx, {batch_id for (batch_id, _), row in changed.items() if row["todo"] == _CLOSED})


def _waiting_rows(tx: Tx, batch_ids: Collection[str]) -> dict[tuple[str, str], dict[str, Any]]:
    waiting, found = tx.tables.waiting, {}
    for chunk in chunks(batch_ids):
        for row in tx.rows(select(waiting).where(waiting.c.batch_id.in_(chunk))):
            kept = {"todo": row.todo, "state": row.state, "at": row.at, "hold_until": row.hold_until}
            found[row.batch_id, row.service] = kept
    return found


def _apply(row: dict[str, Any], receipt: Receipt, now: float) -> bool:
    """Change a row of `waiting` as a receipt says; False if it says nothing new."""
    todo, state = int(row["todo"], 16), str(row["state"])
    done, parked, retrying = _bits(receipt.done), _bits(receipt.parked), _bits(receipt.retrying)
    left = todo & ~done & ~parked
    if left != todo:
        if not left:
            state = "parked" if todo & parked & ~done else "done"
    elif state == "parked" and done & 1:
        state = "done"
    elif not left & retrying:
        return False
    if left & retrying:
        state = "retrying"
        row["hold_until"] = (now if receipt.until is None else receipt.until) + RETRY_MARGIN_SECONDS
    row.update(todo=f"{left:x}", state=state, at=now)
    return True


def close_undone(tx: Tx, batch_id: str) -> tuple[str, ...]:
    """Close the record of a revocation that is undone. Returns the services that had not closed it."""
    waiting = tx.tables.waiting
    still = and_(waiting.c.batch_id == batch_id, waiting.c.todo != _CLOSED)
    services = tuple(row.service for row in tx.rows(select(waiting.c.service).where(still).order_by(waiting.c.service)))
    tx.run(update(waiting).where(still).values({"todo": _CLOSED, "state": "undone", "at": tx.now}))
    _close_finished(tx, [batch_id])
    return services


def _close_finished(tx: Tx, batch_ids: Collection[str]) -> None:
    """Close those of these records that nobody waits for: a revocation's is kept, any other goes."""
    notices, waiting = tx.tables.notices, tx.tables.waiting
    for chunk in chunks(batch_ids):
        still = exists().where(and_(waiting.c.batch_id == notices.c.batch_id, waiting.c.todo != _CLOSED))
        finished = tx.rows(
            select(notices.c.batch_id, notices.c.kind, notices.c.size).where(
                and_(notices.c.batch_id.in_(chunk), notices.c.resend_at.is_not(None), ~still)
            )
        )
        kept = [row.batch_id for row in finished if row.kind == "revocation"]
        if kept:
            tx.run(update(notices).where(notices.c.batch_id.in_(kept)).values(resend_at=None))
            tx.add("log_bytes", -sum(row.size for row in finished if row.kind == "revocation"))
        _remove(tx, [row.batch_id for row in finished if row.kind != "revocation"])


def _remove(tx: Tx, batch_ids: Collection[str]) -> None:
    """Remove records, and take those that were open out of the log's size."""
    notices, waiting = tx.tables.notices, tx.tables.waiting
    for chunk in chunks(batch_ids):
        among = and_(notices.c.batch_id.in_(chunk), notices.c.resend_at.is_not(None))
        size = tx.value(select(func.coalesce(func.sum(notices.c.size), 0)).where(among))
        if size:
            tx.add("log_bytes", -int(size))
        tx.run(delete(waiting).where(waiting.c.batch_id.in_(chunk)))
        tx.run(delete(notices).where(notices.c.batch_id.in_(chunk)))


def forget_service(tx: Tx, service: str) -> None:
    """Let no record wait for a service any more. What it has closed stays, for `status`."""
    waiting = tx.tables.waiting
    mine = and_(waiting.c.service == service, waiting.c.todo != _CLOSED)
    batch_ids = [row.batch_id for row in tx.rows(select(waiting.c.batch_id).where(mine))]
    tx.run(delete(waiting).where(mine))
    _close_finished(tx, batch_ids)


# ---- reading


def open_notices(tx: Tx, *, limit: int) -> list[OpenNotice]:
    """See `Store.open_notices`."""
    notices = tx.tables.notices
    oldest = (notices.c.created_at, notices.c.batch_id)
    query = select(notices.c.batch_id).where(notices.c.resend_at <= tx.now).order_by(*oldest).limit(limit)
    due = [row.batch_id for row in tx.rows(query)]
    found = [row for chunk in chunks(due) for row in tx.rows(select(notices).where(notices.c.batch_id.in_(chunk)))]
    tx.run(
        update(notices)
        .where(notices.c.batch_id == bindparam("of_batch"))
        .values(attempts=bindparam("attempts"), resend_at=bindparam("resend_at")),
        [
            {"of_batch": row.batch_id, "attempts": row.attempts + 1, "resend_at": tx.now + _backoff(row.attempts)}
            for row in found
        ],
    )
    waiting: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for (batch_id, service), one in _waiting_rows(tx, due).items():
        if one["todo"] != _CLOSED:
            waiting[batch_id][service] = one
    found.sort(key=lambda row: (row.created_at, row.batch_id))
    records = {row.batch_id: row for row in found}
    return read_notices(
        {batch_id: row.attempts + 1 for batch_id, row in records.items()},
        lambda batch_id: _open_notice(records[batch_id], waiting[batch_id]),
    )


def _backoff(attempts: int) -> float:
    # The exponent is bounded, or a record that is open for years would overflow a float.
    return min(FIRST_RESEND_SECONDS * 2.0 ** min(attempts, 20), LONGEST_RESEND_SECONDS)


def _open_notice(row: Row[Any], waiting: Mapping[str, Mapping[str, Any]]) -> OpenNotice:
    entries = _read_entries(row.entries)
    everything = _bits(entry.n for entry in entries) if row.kind == "expiry" else 1
    return OpenNotice(
        batch_id=row.batch_id,
        kind=row.kind,
        created_at=row.created_at,
        jws=row.jws,
        entries=entries,
        settled=row.settled,
        since=row.since,
        attempts=row.attempts + 1,
        waiting={
            service: Waiting(_numbers(int(one["todo"], 16), everything), one["hold_until"])
            for service, one in waiting.items()
        },
        unsent=row.kind != "missed" and row.resend_at == 0,
    )


def resend_at(tx: Tx, batch_ids: Collection[str], at: float) -> None:
    """See `Store.resend_at`."""
    notices = tx.tables.notices
    for chunk in chunks(batch_ids):
        still_open = and_(notices.c.batch_id.in_(chunk), notices.c.resend_at.is_not(None))
        tx.run(update(notices).where(still_open).values(resend_at=at))


def status(tx: Tx, revocation_id: str) -> dict[str, ServiceStatus] | None:
    """See `Store.status`."""
    notices, waiting = tx.tables.notices, tx.tables.waiting
    batch_id = batch_id_of_revocation(revocation_id)
    if tx.row(select(notices.c.batch_id).where(notices.c.batch_id == batch_id)) is None:
        return None
    columns = (waiting.c.service, waiting.c.state, waiting.c["at"])
    rows = tx.rows(select(*columns).where(waiting.c.batch_id == batch_id).order_by(waiting.c.service))
    return {row.service: ServiceStatus(row.state, row.at) for row in rows}


def services_of(tx: Tx, batch_id: str) -> tuple[str, ...]:
    """The services that a revocation's record was made for."""
    waiting = tx.tables.waiting
    query = select(waiting.c.service).where(waiting.c.batch_id == batch_id)
    return tuple(row.service for row in tx.rows(query.order_by(waiting.c.service)))


def missed_since(tx: Tx) -> dict[str, float]:
    """Since when each service that has an open "missed" record has missed notices."""
    notices, waiting = tx.tables.notices, tx.tables.waiting
    query = select(waiting.c.service, notices.c.since).join(waiting, waiting.c.batch_id == notices.c.batch_id)
    return {row.service: row.since for row in tx.rows(query.where(notices.c.kind == "missed"))}


# ---- pruning


def prune(tx: Tx, *, limit: int) -> tuple[int, dict[str, float]]:
    """Remove records past the retention, and the oldest expiries while the log is too large; mark who lacks them.

    Returns:
        How many records went, and for each service that lacks some since when.
    """
    notices = tx.tables.notices
    old = select(notices.c.batch_id).where(
        and_(notices.c.kind.in_(("expiry", "revocation")), notices.c.created_at <= tx.now - tx.rules.retention_seconds)
    )
    batch_ids = [row.batch_id for row in tx.rows(old.limit(limit))]
    missed = _drop(tx, batch_ids)
    too_large = _beyond_size(tx, limit - len(batch_ids))
    for service, since in _drop(tx, too_large).items():
        missed[service] = min(since, missed.get(service, since))
    return len(batch_ids) + len(too_large), missed


def _beyond_size(tx: Tx, limit: int) -> list[str]:
    notices, found = tx.tables.notices, []
    excess = tx.counter("log_bytes") - tx.rules.log_max_bytes
    if excess <= 0 or limit <= 0:
        return []
    oldest = select(notices.c.batch_id, notices.c.size).where(notices.c.kind == "expiry")
    for row in tx.rows(oldest.order_by(notices.c.created_at, notices.c.batch_id).limit(limit)):
        if excess <= 0:
            break
        found.append(row.batch_id)
        excess -= row.size
    return found


def _drop(tx: Tx, batch_ids: Collection[str]) -> dict[str, float]:
    """Remove records and mark the services that still waited for them."""
    notices, waiting, services = tx.tables.notices, tx.tables.waiting, tx.tables.services
    missed: dict[str, float] = {}
    for chunk in chunks(batch_ids):
        query = (
            select(waiting.c.service, func.min(notices.c.created_at).label("since"))
            .join(notices, notices.c.batch_id == waiting.c.batch_id)
            .join(services, and_(services.c.name == waiting.c.service, ~services.c.removed))
            .where(and_(waiting.c.batch_id.in_(chunk), waiting.c.todo != _CLOSED))
            .group_by(waiting.c.service)
        )
        for row in tx.rows(query):
            missed[row.service] = min(row.since, missed.get(row.service, row.since))
    _remove(tx, batch_ids)
    for service, since in missed.items():
        mark_missed(tx, service, since)
    return missed


# ---- bitmaps: bit n is entry n


def _bits(numbers: Iterable[int]) -> int:
    found = 0
    for n in numbers:
        found |= 1 << n
    return found


def _numbers(todo: int, everything: int) -> tuple[int, ...] | None:
    if todo == everything:
        return None
    return tuple(n for n in range(todo.bit_length()) if todo >> n & 1)
