"""Tokens, sessions and expiry seconds in SQL. Each function is one step inside a transaction."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, and_, insert, select, update

from knell.errors import NotDue
from knell.notices import new_batch_id
from knell.revocations import Scope
from knell.store import ARM_LEASE_SECONDS, IMMEDIATE_SECONDS, Claim, Claimed, Detached, Tracked
from knell.stores import sql_denylist, sql_log
from knell.stores.sql_database import Tx, chunks
from knell.stores.sql_ledger import (
    Ledger,
    SessionRow,
    TokenRow,
    read_ref,
    session_key,
    token_key,
)
from knell.stores.sql_schema import key_of
from knell.tokens import TokenRef

_BOTH = frozenset({"token", "session"})
_TOKEN = frozenset({"token"})
_SESSION = frozenset({"session"})


def track(
    tx: Tx,
    refs: Sequence[TokenRef],
    *,
    must_continue: bool,
    predecessor: Sequence[tuple[Scope, str]],
    claims: Sequence[Mapping[str, Any]] | None,
) -> list[Tracked]:
    """See `Store.track`."""
    keys = [token_key(ref.iss, ref.jti) for ref in refs]
    ledger = Ledger(tx)
    ledger.load(keys, {key for ref in refs if (key := session_key(ref)) is not None})
    denylist = sql_denylist.look(tx, refs, predecessor=predecessor, claims=claims)
    answers, seconds = [], []
    for n, (key, ref) in enumerate(zip(keys, refs, strict=True)):
        life = ledger.life_of(session_key(ref))
        started = ref.started if life is None or life.started is None else life.started
        denied = denylist.refusal(n, ref, started)
        ended = denied is None and must_continue and ref.sid is not None and life is None
        put = ledger.put(key, ref) if denied is None and not ended else []
        answers.append(Tracked(ref, denied=denied, session_ended=ended, started=started))
        seconds.append(put)
    emptied = ledger.flush()
    return _with_timers(answers, seconds, _arm(tx, {second for put in seconds for second in put} - emptied))


def _with_timers(answers: list[Tracked], seconds: list[list[int]], to_arm: set[int]) -> list[Tracked]:
    found = []
    for answer, put in zip(answers, seconds, strict=True):
        mine = tuple(dict.fromkeys(second for second in put if second in to_arm))
        to_arm -= set(mine)
        found.append(Tracked(answer.ref, mine, answer.denied, answer.session_ended, answer.started))
    return found


# ---- timers


def _arm(tx: Tx, wanted: Collection[int]) -> set[int]:
    """Which of these seconds need a timer. They are leased to the caller."""
    table = tx.tables.seconds
    known, needed = set[int](), set[int]()
    for chunk in chunks(sorted(wanted)):
        # Nobody removes these rows before this transaction has ended.
        kept = select(table).where(table.c.second.in_(chunk)).order_by(table.c.second)
        for row in tx.rows(kept.with_for_update(read=True, key_share=True)):
            known.add(row.second)
            if row.second <= tx.now + IMMEDIATE_SECONDS or _is_free(tx, row):
                needed.add(row.second)
    new = sorted(set(wanted) - known)
    tx.run(insert(table), [{"second": second, "armed": False, "leased_at": tx.now} for second in new])
    return set(new) | {second for chunk in chunks(sorted(needed)) for second in _lease(tx, chunk)}


def _is_free(tx: Tx, row: Row[Any]) -> bool:
    return not row.armed and row.leased_at <= tx.now - ARM_LEASE_SECONDS


def _lease(tx: Tx, seconds: list[int]) -> list[int]:
    """Lease these to the caller, without those that somebody else has leased meanwhile."""
    table = tx.tables.seconds
    rows = select(table).where(table.c.second.in_(seconds)).order_by(table.c.second)
    found = [
        row.second
        for row in tx.rows(rows.with_for_update(key_share=True))
        if row.second <= tx.now + IMMEDIATE_SECONDS or _is_free(tx, row)
    ]
    tx.run(update(table).where(table.c.second.in_(found)).values(leased_at=tx.now))
    return found


def armed(tx: Tx, seconds: Collection[int]) -> None:
    """See `Store.armed`."""
    table = tx.tables.seconds
    for chunk in chunks(sorted(set(seconds))):
        waiting = and_(table.c.second.in_(chunk), ~table.c.armed)
        rows = tx.rows(select(table.c.second).where(waiting).order_by(table.c.second).with_for_update(key_share=True))
        tx.run(update(table).where(table.c.second.in_([row.second for row in rows])).values(armed=True))


def due(tx: Tx, *, before: float, limit: int) -> list[int]:
    """See `Store.due`."""
    table = tx.tables.seconds
    query = select(table.c.second).where(table.c.second <= math.floor(before)).order_by(table.c.second).limit(limit)
    return [row.second for row in tx.rows(query)]


# ---- sessions


def session(tx: Tx, iss: str, sid: str) -> float | None:
    """See `Store.session`."""
    table = tx.tables.sessions
    is_open = and_(table.c.key == key_of(iss, sid), table.c.closed_by.is_(None))
    found = tx.row(select(table.c.started).where(is_open))
    return None if found is None else found.started or 0.0


def detach(tx: Tx, iss: str, jti: str, revocation_id: str) -> Detached:
    """See `Store.detach`."""
    ledger, token = _load_one(tx, iss, jti)
    if token is None:
        return Detached(None, False)
    ref = read_ref(token.ref)
    if token.detached is not None:
        return Detached(ref, token.closed and token.detached == revocation_id)
    life = ledger.own_life(token)
    if life is not None:
        ledger.count_out(life)
        if life.live == 0 and life.due is None:
            life.closed_by, token.closed = revocation_id, True
    token.detached = revocation_id
    ledger.changed(token)
    ledger.flush()
    return Detached(ref, token.closed)


def attach(tx: Tx, iss: str, jti: str, revocation_id: str) -> None:
    """See `Store.attach`."""
    ledger, token = _load_one(tx, iss, jti)
    if token is None or token.detached != revocation_id:
        return
    life = ledger.closed_life(token)
    if life is not None:
        life.closed_by = None
    elif token.closed:
        # The session was opened again meanwhile: the token is one more of that life, if it is still there.
        life = ledger.life_of(token.session)
    else:
        life = ledger.own_life(token)
    if life is not None:
        ledger.count_in(life)
        if token.second > math.ceil(life.last_exp):
            # It was moved while it was detached. Up to a second late, and never early: as the store on Redis does it.
            life.last_exp = float(token.second)
        token.life = life.life
    token.detached, token.closed = None, False
    ledger.changed(token)
    ledger.flush()


def _load_one(tx: Tx, iss: str, jti: str) -> tuple[Ledger, TokenRow | None]:
    ledger, key = Ledger(tx), token_key(iss, jti)
    ledger.load([key])
    return ledger, ledger.token(key)


# ---- claims


def claim(tx: Tx, second: int, *, services: Sequence[str], limit: int) -> Claim | None:
    """See `Store.claim`."""
    if tx.now < second:
        raise NotDue(second, second - tx.now)
    ledger = Ledger(tx)
    tokens, sessions = ledger.load_second(second, limit)
    if not tokens and not sessions:
        return None
    closed = frozenset(n for n, token in enumerate(tokens) if ledger.closed_life(token) is not None)
    ended = [_claim_token(ledger, token) for token in tokens]
    moved = set()
    for row in sessions:
        end = row.end(tx.rules.session_grace_seconds)
        if end is not None and end > second:
            ledger.move_session(row, math.ceil(end))
            moved.add(math.ceil(end))
        else:
            ended.append((row.as_ref(row.last_exp if end is None else end), _SESSION, row.started))
            ledger.drop_session(row)
    more = second not in ledger.flush()
    entries = tuple(Claimed(n, *one) for n, one in enumerate(ended))
    rearm = tuple(sorted(_arm(tx, moved)))
    services = sql_log.without_removed(tx, services)
    batch_id = new_batch_id("e") if entries and services else ""
    if batch_id:
        sql_log.add_expiry(tx, batch_id, entries, services)
    return Claim(batch_id, entries, rearm, more, closed)


def _claim_token(ledger: Ledger, token: TokenRow) -> tuple[TokenRef, frozenset[str], float | None]:
    ref = read_ref(token.ref)
    closed, life, known = ledger.closed_life(token), ledger.own_life(token), ledger.last_life(token)
    started = ref.started if known is None or known.started is None else known.started
    ends = _TOKEN
    if closed is not None:
        ends = _BOTH
        ledger.drop_session(closed)
    elif life is not None and token.detached is None:
        ends = _claim_live(ledger, life)
    ledger.drop_token(token)
    return ref, ends, started


def _claim_live(ledger: Ledger, life: SessionRow) -> frozenset[str]:
    ledger.count_out(life)
    if life.live > 0 or life.due is not None:
        return _TOKEN
    ledger.drop_session(life)
    return _BOTH
