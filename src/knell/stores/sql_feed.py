"""Revocations and the change feed in SQL. Each function is one step inside a transaction."""

from __future__ import annotations

import json

from sqlalchemy import and_, delete, insert, select, update

from knell.denylist import strength
from knell.notices import batch_id_of_revocation, batch_id_of_undo
from knell.revocations import Revocation
from knell.store import FEED_LENGTH, AuditEntry, Change, Cursor, Recorded
from knell.stores import sql_audit, sql_denylist, sql_log
from knell.stores.feed import changes_after
from knell.stores.sql_database import Tx


def revoke(tx: Tx, revocation: Revocation, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded:
    """See `Store.revoke`."""
    # The head's row stays locked to the commit: positions become visible in the order that they were given out in.
    position = tx.add("head", 1)
    known = _position_of(tx, revocation.id)
    if known is not None:
        tx.add("head", -1)
        services = sql_log.services_of(tx, batch_id_of_revocation(revocation.id))
        cursor = Cursor(tx.epoch, known, revocation.id)
        return Recorded(cursor, False, services, undone=undone(tx, revocation.id))
    body = json.dumps(revocation.as_json(), separators=(",", ":"), ensure_ascii=False)
    entry = {
        "id": revocation.id,
        "target": sql_denylist.target_of(revocation.scope, revocation.iss, revocation.value),
        "position": position,
        "expires_at": revocation.expires_at,
        "strength": strength(revocation),
        "body": body,
    }
    tx.run(insert(tx.tables.denylist), [entry])
    sql_denylist.count_names(tx, revocation, 1)
    services = _tell(tx, "revoked", revocation.id, body, position, batch_id, jws)
    sql_audit.note(tx, audit)
    return Recorded(Cursor(tx.epoch, position, revocation.id), True, services)


def undo(tx: Tx, revocation_id: str, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded | None:
    """See `Store.undo`."""
    position = tx.add("head", 1)
    denylist, notices = tx.tables.denylist, tx.tables.notices
    body = tx.value(select(denylist.c.body).where(denylist.c.id == revocation_id))
    if body is None:
        tx.add("head", -1)
        known: int | None = tx.value(select(notices.c.position).where(notices.c.batch_id == batch_id))
        services = sql_log.services_of(tx, batch_id)
        return None if known is None else Recorded(Cursor(tx.epoch, known, revocation_id), False, services)
    tx.run(delete(denylist).where(denylist.c.id == revocation_id))
    revocation = Revocation.from_json(json.loads(body))
    sql_denylist.count_names(tx, revocation, -1)
    untold = sql_log.close_undone(tx, batch_id_of_revocation(revocation_id))
    for service in untold:
        # Ends that this revocation was to tell are told by nobody now.
        sql_log.mark_missed(tx, service, revocation.made_at)
    services = _tell(tx, "undone", revocation_id, body, position, batch_id, jws)
    sql_audit.note(tx, audit)
    return Recorded(Cursor(tx.epoch, position, revocation_id), True, services, untold)


def undone(tx: Tx, revocation_id: str) -> bool:
    """See `Store.undone`."""
    notices = tx.tables.notices
    found = tx.value(select(notices.c.batch_id).where(notices.c.batch_id == batch_id_of_undo(revocation_id)))
    return found is not None


def _tell(tx: Tx, kind: str, revocation_id: str, body: str, position: int, batch_id: str, jws: str) -> tuple[str, ...]:
    """Add a change to the feed, and its notice to the log. Returns the services that it waits for."""
    change = {"position": position, "kind": kind, "revocation_id": revocation_id, "body": body}
    tx.run(insert(tx.tables.feed), [change])
    table = tx.tables.services
    registered = select(table.c.name).where(~table.c.removed).order_by(table.c.name)
    services = tuple(row.name for row in tx.rows(registered))
    sql_log.add_revocation(tx, batch_id, jws, services, position)
    tx.announce()
    return services


def _position_of(tx: Tx, revocation_id: str) -> int | None:
    denylist, notices = tx.tables.denylist, tx.tables.notices
    found: int | None = tx.value(select(denylist.c.position).where(denylist.c.id == revocation_id))
    if found is None:
        # It has left the denylist, and its record is still there.
        batch_id = batch_id_of_revocation(revocation_id)
        found = tx.value(select(notices.c.position).where(notices.c.batch_id == batch_id))
    return found


def revocation(tx: Tx, revocation_id: str) -> Revocation | None:
    """See `Store.revocation`."""
    denylist = tx.tables.denylist
    mine = and_(denylist.c.id == revocation_id, denylist.c.expires_at > tx.now)
    body = tx.value(select(denylist.c.body).where(mine))
    return None if body is None else Revocation.from_json(json.loads(body))


def head(tx: Tx) -> Cursor:
    """See `Feed.head`."""
    feed, position = tx.tables.feed, tx.counter("head")
    return Cursor(tx.epoch, position, tx.value(select(feed.c.revocation_id).where(feed.c.position == position)))


def changes(tx: Tx, cursor: Cursor, *, limit: int) -> list[Change]:
    """See `Feed.changes`; without the waiting."""
    feed = tx.tables.feed
    from_cursor = select(feed).where(feed.c.position >= cursor.position).order_by(feed.c.position).limit(limit + 1)
    entries = [
        Change(row.position, row.kind, Revocation.from_json(json.loads(row.body))) for row in tx.rows(from_cursor)
    ]
    # The feed has no gaps: the last one that was read stands for the head, where a reader that waits asks most often.
    last = Cursor(tx.epoch, entries[-1].position, entries[-1].revocation.id) if entries else head(tx)
    return changes_after(cursor, last, entries, limit=limit)


def snapshot(tx: Tx, *, after: int, limit: int) -> list[Change]:
    """See `Feed.snapshot`."""
    denylist = tx.tables.denylist
    rows = tx.rows(
        select(denylist.c.position, denylist.c.body)
        .where(denylist.c.position > after)
        .order_by(denylist.c.position)
        .limit(limit)
    )
    return [Change(row.position, "revoked", Revocation.from_json(json.loads(row.body))) for row in rows]


def trim(tx: Tx, *, limit: int) -> int:
    """Remove at most `limit` changes beyond FEED_LENGTH. Returns how many went."""
    trimmed = tx.counter("trimmed")
    until = min(tx.counter("head") - FEED_LENGTH, trimmed + limit)
    if until <= trimmed:
        return 0
    feed, counters = tx.tables.feed, tx.tables.counters
    tx.run(update(counters).where(counters.c.name == "trimmed").values(value=until))
    return tx.run(delete(feed).where(feed.c.position <= until))
