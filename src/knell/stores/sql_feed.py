"""Revocations and the change feed in SQL. Each function is one step inside a transaction."""

from __future__ import annotations

import json

from sqlalchemy import delete, insert, select, update

from knell.errors import CursorLost
from knell.notices import batch_id_of_revocation
from knell.revocations import Revocation
from knell.store import FEED_LENGTH, Change, Cursor, Recorded
from knell.stores import sql_log
from knell.stores.sql_database import Tx
from knell.stores.sql_tokens import target_of


def revoke(tx: Tx, revocation: Revocation, *, batch_id: str, jws: str) -> Recorded:
    """See `Store.revoke`."""
    # The head's row stays locked to the commit: positions become visible in the order that they were given out in.
    position = tx.add("head", 1)
    known = _position_of(tx, revocation.id)
    if known is not None:
        tx.add("head", -1)
        services = sql_log.waiting_services(tx, batch_id_of_revocation(revocation.id))
        return Recorded(Cursor(tx.epoch, known), False, services)
    body = json.dumps(revocation.as_json(), separators=(",", ":"), ensure_ascii=False)
    entry = {
        "id": revocation.id,
        "target": target_of(revocation.scope, revocation.iss, revocation.value),
        "position": position,
        "expires_at": revocation.expires_at,
        "body": body,
    }
    tx.run(insert(tx.tables.denylist), [entry])
    tx.run(insert(tx.tables.feed), [{"position": position, "kind": "revoked", "body": body}])
    table = tx.tables.services
    services = tuple(row.name for row in tx.rows(select(table.c.name).order_by(table.c.name)))
    sql_log.add_revocation(tx, batch_id, jws, services, position)
    return Recorded(Cursor(tx.epoch, position), True, services)


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
    body = tx.value(select(denylist.c.body).where(denylist.c.id == revocation_id))
    return None if body is None else Revocation.from_json(json.loads(body))


def head(tx: Tx) -> Cursor:
    """See `Feed.head`."""
    return Cursor(tx.epoch, tx.counter("head"))


def changes(tx: Tx, cursor: Cursor, *, limit: int) -> list[Change]:
    """See `Feed.changes`; without the waiting."""
    position = tx.counter("head")
    if cursor.epoch != tx.epoch:
        # The part before the point is the database's, the rest its file's: a copy of the file has lost nothing by that.
        emptied = cursor.epoch.partition(".")[0] != tx.epoch.partition(".")[0]
        raise CursorLost(
            f"the feed is in epoch {tx.epoch} and the cursor in {cursor.epoch}: the store was emptied or replaced; "
            "take a snapshot",
            went_back=emptied or position < cursor.position,
        )
    if position < cursor.position:
        raise CursorLost(
            f"the feed is at position {position}, behind the cursor's {cursor.position}: the store lost data; "
            "take a snapshot",
            went_back=True,
        )
    if position == cursor.position:
        return []
    trimmed = tx.counter("trimmed")
    if cursor.position < trimmed:
        raise CursorLost(
            f"the feed begins after position {trimmed}, and the cursor is at {cursor.position}; take a snapshot",
            went_back=False,
        )
    feed = tx.tables.feed
    rows = tx.rows(select(feed).where(feed.c.position > cursor.position).order_by(feed.c.position).limit(limit))
    return [Change(row.position, row.kind, Revocation.from_json(json.loads(row.body))) for row in rows]


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
