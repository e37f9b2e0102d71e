"""The live tokens in SQL, a page at a time, to be counted."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, select, true

from knell.revocations import Revocation, Scope
from knell.stores.counting import Found, Page
from knell.stores.sql_database import Tx
from knell.stores.sql_ledger import read_ref
from knell.stores.sql_schema import Tables, key_of

_PAGE = 1000


def page(tx: Tx, revocation: Revocation, after: bytes | None) -> Page[bytes]:
    """Live tokens that a revocation could name, those with keys after `after`."""
    tokens, sessions = tx.tables.tokens, tx.tables.sessions
    rows = tx.rows(
        select(tokens.c.key, tokens.c.ref, sessions.c.started)
        .join(sessions, and_(sessions.c.key == tokens.c.session, sessions.c.life == tokens.c.life), isouter=True)
        .where(tokens.c.key > (after or b""), tokens.c.second > tx.now, tokens.c.detached.is_(None))
        .where(_could_be(tx.tables, revocation))
        .order_by(tokens.c.key)
        .limit(_PAGE)
    )
    return Page([Found(read_ref(row.ref), row.started) for row in rows], rows[-1].key if len(rows) == _PAGE else None)


def _could_be(tables: Tables, revocation: Revocation) -> ColumnElement[bool]:
    if revocation.scope is Scope.TOKEN:
        return tables.tokens.c.key == key_of(revocation.iss, revocation.value)
    if revocation.scope is Scope.SESSION:
        return tables.tokens.c.session == key_of(revocation.iss, revocation.value)
    return true()
