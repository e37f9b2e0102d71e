"""Tokens and their sessions in one transaction: read once, changed in memory, written back in a few statements."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Select, Table, bindparam, delete, exists, insert, or_, select, update

from knell.stores.sql_database import Tx, chunks
from knell.stores.sql_schema import key_of
from knell.tokens import TokenRef


@dataclass(slots=True)
class TokenRow:
    """A row of `tokens`."""

    key: bytes
    second: int
    session: bytes | None
    life: int | None
    detached: str | None
    closed: bool
    ref: str


@dataclass(slots=True)
class SessionRow:
    """A row of `sessions`: the open life of a session, or one that a detach has closed.

    `ref` is the token that told its start, or opened it.
    """

    key: bytes
    ref: str
    started: float | None
    live: int
    last_exp: float
    session_exp: float | None
    due: int | None
    life: int
    closed_by: str | None

    def end(self, grace_seconds: float) -> float | None:
        """When it ends by time; None if it ends with its last token."""
        if self.session_exp is not None:
            return self.session_exp
        return self.last_exp + grace_seconds if grace_seconds > 0 or self.due is not None else None

    def as_ref(self, end: float) -> TokenRef:
        """What is told of its end by time."""
        first = read_ref(self.ref)
        return first.replace(jti="", exp=end, auth_time=None, session_exp=self.session_exp)


def token_key(iss: str, jti: str) -> bytes:
    """The key of a token."""
    return key_of(iss, jti)


def session_key(ref: TokenRef) -> bytes | None:
    """The key of a token's session; None without sid."""
    return None if ref.sid is None else key_of(ref.iss, ref.sid)


def write_ref(ref: TokenRef) -> str:
    """A TokenRef as it is stored."""
    return json.dumps(ref.as_json(), separators=(",", ":"), ensure_ascii=False)


def read_ref(text: str) -> TokenRef:
    """Read what `write_ref` wrote."""
    return TokenRef(**json.loads(text))


Kind = TypeVar("Kind", TokenRow, SessionRow)


class Ledger:
    """The working set of one transaction. `flush` writes what has changed."""

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self._tokens: _Rows[TokenRow] = _Rows(tx, tx.tables.tokens, TokenRow)
        self._sessions: _Rows[SessionRow] = _Rows(tx, tx.tables.sessions, SessionRow)
        self._left: set[int] = set()

    # ---- reading

    def load(self, tokens: Collection[bytes], sessions: Collection[bytes] = ()) -> None:
        """Read tokens, their sessions, and further sessions."""
        self._tokens.load(tokens)
        held = {row.session for key in tokens if (row := self._tokens.get(key)) is not None}
        self._sessions.load({key for key in held | set(sessions) if key is not None})

    def load_second(self, second: int, limit: int) -> tuple[list[TokenRow], list[SessionRow]]:
        """Read up to `limit` members of a second, with the tokens' sessions.

        Several callers each get others, the tokens side by side. A session's own end may hang on tokens that another
        caller has at this moment, so those that also want sessions come one after another.
        """
        tables = self._tx.tables
        tokens = self._tokens.take(tables.tokens.c.second == second, limit)
        due: list[bytes] = []
        if len(tokens) < limit:
            self._tx.hold(f"sessions due {second}")
            due = self._sessions.keys_of(tables.sessions.c.due == second, limit - len(tokens))
        self._sessions.load({row.session for row in tokens if row.session is not None} | set(due))
        found = (self._sessions.get(key) for key in due)
        return tokens, [row for row in found if row is not None and row.due == second]

    def token(self, key: bytes) -> TokenRow | None:
        """A token that was loaded."""
        return self._tokens.get(key)

    def life_of(self, key: bytes | None) -> SessionRow | None:
        """The open life of a session that was loaded."""
        row = None if key is None else self._sessions.get(key)
        return row if row is not None and row.closed_by is None else None

    def last_life(self, token: TokenRow) -> SessionRow | None:
        """The life that a token belongs to, open or closed, if no other was opened after it."""
        row = None if token.session is None else self._sessions.get(token.session)
        return row if row is not None and row.life == token.life else None

    def own_life(self, token: TokenRow) -> SessionRow | None:
        """The life that a token belongs to, if that is still the present one and open."""
        row = self.last_life(token)
        return row if row is not None and row.closed_by is None else None

    def closed_life(self, token: TokenRow) -> SessionRow | None:
        """The life that the token's detach closed, if it was not opened again."""
        row = self.last_life(token) if token.closed else None
        return row if row is not None and row.closed_by == token.detached else None

    # ---- changing

    def put(self, key: bytes, ref: TokenRef) -> list[int]:
        """Track a token. Returns the seconds that it, and its session's due entry, are now under."""
        token = self._tokens.get(key)
        if token is not None and token.detached is not None:
            # It is about to be revoked: it moves, and stays what it is to its session.
            self._left.add(token.second)
            token.second, token.ref = ref.second, write_ref(ref.replace(sid=read_ref(token.ref).sid))
            self._tokens.changed(key)
            return [ref.second]
        seconds = [ref.second]
        life = self._join(token, ref)
        if life is not None:
            end = life.end(self._tx.rules.session_grace_seconds)
            if life.due is None and end is not None:
                life.due = math.ceil(end)
            if life.due is not None:
                seconds.append(life.due)
        if token is not None:
            self._left.add(token.second)
        self._tokens.put(
            key,
            TokenRow(
                key, ref.second, session_key(ref), None if life is None else life.life, None, False, write_ref(ref)
            ),
        )
        return seconds

    def _join(self, token: TokenRow | None, ref: TokenRef) -> SessionRow | None:
        key = session_key(ref)
        counted = None if token is None else self.own_life(token)
        if token is not None and (counted is None or counted.key != key):
            self._leave(token)
            counted = None
        if key is None:
            return None
        life = self.life_of(key)
        if life is None:
            life = SessionRow(
                key=key,
                ref=write_ref(ref),
                started=ref.started,
                live=0,
                last_exp=ref.exp,
                session_exp=ref.session_exp,
                due=None,
                life=secrets.randbits(62),
                closed_by=None,
            )
            self._sessions.put(key, life)
        if counted is None:
            life.live += 1
        life.last_exp = max(life.last_exp, ref.exp)
        if ref.session_exp is not None:
            life.session_exp = max(life.session_exp or 0.0, ref.session_exp)
        if life.started is None:
            life.started, life.ref = ref.started, write_ref(ref)
        self._sessions.changed(key)
        return life

    def _leave(self, token: TokenRow) -> None:
        """Take a token out of its session's count; a session without due entry goes with its last one."""
        life = self.own_life(token)
        if token.detached is not None or life is None:
            life = self.closed_life(token)
            if life is not None:
                self._sessions.drop(life.key)
            return
        self.count_out(life)
        if life.live == 0 and life.due is None:
            self._sessions.drop(life.key)

    def drop_token(self, token: TokenRow) -> None:
        """Take a token out of its second, and leave its session to the caller."""
        self._left.add(token.second)
        self._tokens.drop(token.key)

    def drop_session(self, row: SessionRow) -> None:
        """Remove a session's record, and its due entry."""
        if row.due is not None:
            self._left.add(row.due)
        self._sessions.drop(row.key)

    def move_session(self, row: SessionRow, second: int) -> None:
        """Put a session's due entry under another second."""
        if row.due is not None:
            self._left.add(row.due)
        row.due = second
        self._sessions.changed(row.key)

    def count_in(self, row: SessionRow) -> None:
        """One more live token."""
        row.live += 1
        self._sessions.changed(row.key)

    def count_out(self, row: SessionRow) -> None:
        """One live token less."""
        row.live -= 1
        self._sessions.changed(row.key)

    def changed(self, token: TokenRow) -> None:
        """A field of a token was changed."""
        self._tokens.changed(token.key)

    # ---- writing

    def flush(self) -> set[int]:
        """Write everything back. Returns the seconds that have lost their last member; their timer state is gone."""
        self._tokens.flush()
        self._sessions.flush()
        seconds = self._tx.tables.seconds
        for chunk in chunks(sorted(self._left)):
            # Who tracks into one of them has its row until the end: from now on there are either members, or none.
            held = select(seconds.c.second).where(seconds.c.second.in_(chunk)).order_by(seconds.c.second)
            self._tx.rows(held.with_for_update())
        emptied = {second for second in self._left if not has_members(self._tx, second)}
        for chunk in chunks(emptied):
            self._tx.run(delete(seconds).where(seconds.c.second.in_(chunk)))
        return emptied


def has_members(tx: Tx, second: int) -> bool:
    """Whether any token or session is due in a second."""
    tokens, sessions = tx.tables.tokens, tx.tables.sessions
    found = or_(exists().where(tokens.c.second == second), exists().where(sessions.c.due == second))
    return bool(tx.value(select(found)))


class _Rows(Generic[Kind]):
    """Rows of one table, by key: what was read, and what has become of it."""

    def __init__(self, tx: Tx, table: Table, kind: type[Kind]) -> None:
        self._tx = tx
        self._table = table
        self._make: Callable[..., Kind] = kind
        self._columns = [table.c[field.name] for field in fields(kind)]
        self._now: dict[bytes, Kind | None] = {}
        self._stored: set[bytes] = set()
        self._changed: set[bytes] = set()

    def get(self, key: bytes) -> Kind | None:
        return self._now[key]

    def load(self, keys: Iterable[bytes]) -> None:
        missing = {key for key in keys if key not in self._now}
        for chunk in chunks(sorted(missing)):
            mine = select(*self._columns).where(self._table.c.key.in_(chunk))
            self._read(mine.order_by(self._table.c.key).with_for_update())
        for key in missing:
            self._now.setdefault(key, None)

    def take(self, condition: ColumnElement[bool], limit: int) -> list[Kind]:
        """Read rows that nobody else has; if there are none, those that others have and leave."""
        mine = select(*self._columns).where(condition).limit(limit)
        found = self._read(mine.with_for_update(skip_locked=True))
        if found or not self._tx.side_by_side:
            return found
        return self._read(mine.order_by(self._table.c.key).with_for_update())

    def keys_of(self, condition: ColumnElement[bool], limit: int) -> list[bytes]:
        return [row.key for row in self._tx.rows(select(self._table.c.key).where(condition).limit(limit))]

    def _read(self, query: Select[Any]) -> list[Kind]:
        found = [self._make(*row) for row in self._tx.rows(query)]
        for row in found:
            self._now[row.key] = row
            self._stored.add(row.key)
        return found

    def put(self, key: bytes, row: Kind) -> None:
        self._now[key] = row
        self._changed.add(key)

    def drop(self, key: bytes) -> None:
        self._now[key] = None
        self._changed.add(key)

    def changed(self, key: bytes) -> None:
        self._changed.add(key)

    def flush(self) -> None:
        changed = sorted(self._changed)
        gone = [key for key in changed if self._now[key] is None and key in self._stored]
        for chunk in chunks(gone):
            self._tx.run(delete(self._table).where(self._table.c.key.in_(chunk)))
        rows = {key: row for key in changed if (row := self._now[key]) is not None}
        self._tx.run(insert(self._table), [_as_dict(row) for key, row in rows.items() if key not in self._stored])
        others = [column.name for column in self._columns if column.name != "key"]
        self._tx.run(
            update(self._table)
            .where(self._table.c.key == bindparam("of_key"))
            .values({name: bindparam(name) for name in others}),
            [_as_dict(row, key="of_key") for key, row in rows.items() if key in self._stored],
        )


def _as_dict(row: TokenRow | SessionRow, *, key: str = "key") -> dict[str, Any]:
    found = {name: getattr(row, name) for name in row.__slots__}
    found[key] = found.pop("key")
    return found
