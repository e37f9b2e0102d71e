"""Sessions in a database: SQLite for one machine, PostgreSQL for several."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from sqlalchemy import (
    Column,
    Connection,
    Float,
    ForeignKey,
    MetaData,
    Select,
    String,
    Table,
    Text,
    delete,
    insert,
    or_,
    select,
    text,
)
from sqlalchemy.exc import SQLAlchemyError

from knell.errors import InvalidSettings, KeptOut, StoreUnavailable
from knell.handlers.held import Held, check_session_id, in_pages, lives_until, written
from knell.handlers.sql_engine import BUSY_SECONDS, open_engine
from knell.handlers.tombstones import buried_under, kept_until, names_in, names_of, of_revocation, that_keeps_out
from knell.handlers.tombstones import written as written_notice
from knell.notices import Notice
from knell.settings import Rules
from knell.tokens import TokenRef
from knell.turns import Turns

# How many sessions one query reads, how many names it asks for, and how many rows that have served their time one
# step takes away.
PAGE = 500
NAMES_AT_ONCE = 200
PRUNED_AT_ONCE = 100
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")


class SqlSessions:
    """See `knell.handlers.sessions.Sessions`. The tables are made when they are missing.

    Args:
        url: `sqlite:///path` (a file for this account alone, made when missing), or `postgresql://...`.
        name: what the tables are called: NAME_sessions, NAME_session_names, NAME_session_tombstones.
        rules: the lifetimes of the deployment. Default `Rules()`.
        clock: Unix seconds; for tests.

    Raises:
        InvalidSettings: the URL or the name cannot be used.
        StoreUnavailable: the database did not answer, or refused to make the tables.
    """

    def __init__(
        self, url: str, *, name: str = "knell", rules: Rules | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        if not _NAME.fullmatch(name.replace("-", "_")):
            raise InvalidSettings(f"{name!r} cannot name tables; use a lower-case letter, then letters, digits or '_'")
        self._rules = rules or Rules()
        self._clock = clock
        self._make_tables(name.replace("-", "_"))
        self._engine = open_engine(url)
        # What has to see each other takes turns: SQLite has one writer at a time, PostgreSQL a lock to ask for.
        self._locks = self._engine.dialect.name == "postgresql"
        self._turns = Turns(1)
        with self._begun() as connection:
            self._lock(connection, shared=False)
            self._metadata.create_all(connection)

    def _make_tables(self, name: str) -> None:
        self._metadata = MetaData()
        self._sessions = Table(
            f"{name}_sessions",
            self._metadata,
            Column("id", String(256), primary_key=True),
            Column("token", Text, nullable=False),
            Column("until", Float(53), nullable=False, index=True),
        )
        self._names = Table(
            f"{name}_session_names",
            self._metadata,
            Column("name", String(32), primary_key=True),
            Column("id", ForeignKey(self._sessions.c.id, ondelete="CASCADE"), primary_key=True, index=True),
            Column("started", Float(53), nullable=False),
        )
        self._tombstones = Table(
            f"{name}_session_tombstones",
            self._metadata,
            Column("name", String(32), primary_key=True),
            Column("notice_id", String(300), primary_key=True),
            Column("notice", Text, nullable=False),
            Column("until", Float(53), nullable=False, index=True),
        )
        self._lock_key = f"{name}_sessions"

    def add(self, session_id: str, token: TokenRef) -> None:
        """See Sessions.add."""
        check_session_id(session_id)
        now, names = self._clock(), names_of(token)
        until = lives_until(token, self._rules, now=now)
        started = 0.0 if token.started is None else token.started
        tombstones = select(self._tombstones.c.notice).where(
            self._tombstones.c.name.in_(names), self._tombstones.c.until > now
        )
        with self._begun() as connection:
            self._lock(connection, shared=True)
            connection.execute(delete(self._sessions).where(self._sessions.c.id == session_id))
            over = that_keeps_out(token, connection.execute(tombstones).scalars().all())
            if over is None:
                connection.execute(insert(self._sessions).values(id=session_id, token=written(token), until=until))
                rows = [{"name": name, "id": session_id, "started": started} for name in names]
                connection.execute(insert(self._names), rows)
        if over is not None:
            raise KeptOut(over.id, over.cause.value)

    def get(self, session_id: str) -> TokenRef | None:
        """See Sessions.get."""
        alive = (self._sessions.c.id == session_id, self._sessions.c.until > self._clock())
        with self._begun(writing=False) as connection:
            token = connection.execute(select(self._sessions.c.token).where(*alive)).scalar()
        return None if token is None else Held.read(session_id, token).token

    def remove(self, session_id: str) -> TokenRef | None:
        """See Sessions.remove."""
        gone = delete(self._sessions).where(self._sessions.c.id == session_id).returning(self._sessions.c.token)
        with self._begun() as connection:
            token = connection.execute(gone).scalar()
        return None if token is None else Held.read(session_id, token).token

    def bury(self, notices: Sequence[Notice]) -> None:
        """See Sessions.bury."""
        now = self._clock()
        rows = {
            (name, notice.id): {
                "name": name,
                "notice_id": notice.id,
                "notice": written_notice(notice),
                "until": until,
            }
            for notice in notices
            if (until := kept_until(notice, self._rules)) > now
            for name in buried_under(notice)
        }
        mine = self._tombstones.c
        with self._begun() as connection:
            self._lock(connection, shared=False)
            self._prune(connection, now)
            for some in in_pages(rows.values(), NAMES_AT_ONCE):
                there = select(mine.name, mine.notice_id).where(mine.name.in_([row["name"] for row in some]))
                known = {(row.name, row.notice_id) for row in connection.execute(there)}
                if new := [row for row in some if (row["name"], row["notice_id"]) not in known]:
                    connection.execute(insert(self._tombstones), new)

    def unearth(self, undone: Sequence[Notice]) -> None:
        """See Sessions.unearth."""
        mine = self._tombstones.c
        with self._begun() as connection:
            for notice in undone:
                texts = connection.execute(select(mine.notice).where(mine.name.in_(names_in(notice)))).scalars().all()
                for written_, names in of_revocation(notice, texts):
                    gone = delete(self._tombstones).where(mine.name.in_(names), mine.notice == written_)
                    connection.execute(gone)

    def named_in(self, notices: Sequence[Notice]) -> Iterator[Sequence[Held]]:
        """See Sessions.named_in."""
        cut_offs = [notice.issued_before for notice in notices]
        latest = max((each for each in cut_offs if each is not None), default=0.0)
        names = {name for notice in notices for name in names_in(notice)}
        for some in in_pages(names, NAMES_AT_ONCE):
            named = select(self._names.c.id).where(self._names.c.name.in_(some))
            if None not in cut_offs:
                # What began after the cut-off is not even read.
                named = named.where(self._names.c.started <= latest)
            yield from self._paged(select(self._sessions).where(self._sessions.c.id.in_(named)))

    def all(self) -> Iterator[Sequence[Held]]:
        """See Sessions.all."""
        return self._paged(select(self._sessions))

    def discard(self, held: Sequence[Held]) -> None:
        """See Sessions.discard."""
        same = [(self._sessions.c.id == each.session_id) & (self._sessions.c.token == each.text) for each in held]
        with self._begun() as connection:
            for some in in_pages(same, PRUNED_AT_ONCE):
                connection.execute(delete(self._sessions).where(or_(*some)))

    def close(self) -> None:
        """See Sessions.close."""
        self._engine.dispose()

    def _paged(self, query: Select[tuple[str, str, float]]) -> Iterator[Sequence[Held]]:
        after = ""
        while True:
            page = query.where(self._sessions.c.id > after).order_by(self._sessions.c.id).limit(PAGE)
            with self._begun(writing=False) as connection:
                rows = connection.execute(page).all()
            if rows:
                yield [Held.read(row.id, row.token) for row in rows]
            if len(rows) < PAGE:
                return
            after = rows[-1].id

    def _prune(self, connection: Connection, now: float) -> None:
        """Take away some of what has served its time."""
        for table, key in ((self._sessions, self._sessions.c.id), (self._tombstones, self._tombstones.c.notice_id)):
            over = select(key).where(table.c.until <= now).limit(PRUNED_AT_ONCE)
            gone: Collection[str] = connection.execute(over).scalars().all()
            if gone:
                connection.execute(delete(table).where(key.in_(gone), table.c.until <= now))

    def _lock(self, connection: Connection, *, shared: bool) -> None:
        """Of adding a session and leaving a tombstone, let one be committed before the other begins to look."""
        if self._locks:
            kind = "_shared" if shared else ""
            wanted = text(f"SELECT pg_advisory_xact_lock{kind}(hashtext(:key))")
            connection.execute(wanted, {"key": self._lock_key})

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """SQLite lets its writers sleep and poll, and some of many never get their turn."""
        with self._turns.taken(BUSY_SECONDS) as free:
            if not free:
                raise StoreUnavailable(
                    f"other threads kept the sessions' database busy for {BUSY_SECONDS:g} s; try again"
                )
            yield

    @contextmanager
    def _begun(self, *, writing: bool = True) -> Iterator[Connection]:
        try:
            turn = nullcontext() if self._locks or not writing else self._turn()
            with turn, self._engine.connect() as connection:
                connection = connection.execution_options(knell_begin="BEGIN IMMEDIATE" if writing else "BEGIN")
                with connection.begin():
                    yield connection
        except (SQLAlchemyError, OSError) as error:
            cause = getattr(error, "orig", None) or error
            raise StoreUnavailable(f"the sessions' database did not answer, or refused: {cause}") from error
