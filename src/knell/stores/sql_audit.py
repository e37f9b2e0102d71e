"""The audit log in SQL. Each function is one step inside a transaction."""

from __future__ import annotations

import json

from sqlalchemy import and_, delete, insert, or_, select

from knell.store import AuditEntry
from knell.stores.sql_database import Tx


def note(tx: Tx, entry: AuditEntry) -> None:
    """See `Store.note`."""
    table = tx.tables.audit
    tx.run(delete(table).where(table.c.id == entry.id))
    body = json.dumps(entry.as_json(), separators=(",", ":"), ensure_ascii=False)
    tx.run(insert(table), [{"id": entry.id, "at": entry.at, "body": body}])


def audit(tx: Tx, *, before: tuple[float, str] | None, limit: int) -> list[AuditEntry]:
    """See `Store.audit`."""
    table = tx.tables.audit
    query = select(table.c.body).order_by(table.c["at"].desc(), table.c.id.desc()).limit(limit)
    if before is not None:
        at, id = before
        query = query.where(or_(table.c["at"] < at, and_(table.c["at"] == at, table.c.id < id)))
    return [AuditEntry.from_json(json.loads(row.body)) for row in tx.rows(query)]
