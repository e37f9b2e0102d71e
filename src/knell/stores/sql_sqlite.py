"""SQLite under the SQL store: connections, transactions, and what it needs to serve several processes at once."""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, insert, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from knell.errors import InvalidSettings, StoreUnavailable
from knell.settings import Rules
from knell.stores.sql_database import BUSY_SECONDS, Lock, T, Tx
from knell.stores.sql_schema import SCHEMA_VERSION, Tables, make_tables
from knell.turns import turns_of_file

# How often a reader that waits for changes looks: a change is seen within this, for about one query per look.
POLL_SECONDS = 0.015
_RETRY_SECONDS = 0.01


class SqliteDatabase:
    """A SQLite file with the tables of one namespace. Safe to use from several threads, and after a fork.

    It runs in WAL mode with synchronous=NORMAL: a transaction survives the end of any process, and a loss of power can
    take the last ones away (never tear one apart).

    Args:
        url: `sqlite:///relative/path` or `sqlite:////absolute/path`. The directory is made if it is not there.
        clock: replaces this host's clock.

    Raises:
        InvalidSettings: the URL names no file.
        StoreUnavailable: the file could not be opened, or newer code has written it.
    """

    def __init__(self, url: str, *, namespace: str, rules: Rules, clock: Callable[[], float] | None) -> None:
        self._path = _path_of(url)
        self._tables = make_tables(namespace)
        self._rules = rules
        self._clock = clock or time.time
        self._seed = ""
        self._file: tuple[int, int] | None = None
        self._turns = turns_of_file(self._path)
        self._engine: Engine | None = None
        self._closed = False
        self._start_afresh()
        _databases.add(self)
        self.read(lambda tx: None)

    def time(self) -> float:
        """The store's clock: Unix seconds."""
        return self._clock()

    def close(self) -> None:
        """Close every connection. Later calls raise StoreUnavailable."""
        with self._gate:
            self._closed = True
        self._dispose()

    def read(self, step: Callable[[Tx], T]) -> T:
        """See `Database.read`."""
        with self._entered(), self._begun("BEGIN") as tx:
            return step(tx)

    def write(self, step: Callable[[Tx], T], *_: Lock, patience_seconds: float = BUSY_SECONDS) -> T:
        """See `Database.write`. No other writer runs beside it: it waits for them."""
        # Threads of one process queue for their turn: SQLite itself would let them sleep and poll.
        with self._entered(), self._turns.taken(patience_seconds) as free:
            if not free:
                raise StoreUnavailable(
                    f"{self._path}: other threads kept it busy for {patience_seconds:g} s; try again"
                )
            with self._begun("BEGIN IMMEDIATE") as tx:
                return step(tx)

    def wait(self, seconds: float) -> None:
        """See `Database.wait`."""
        time.sleep(min(seconds, POLL_SECONDS))

    def server(self) -> str:
        """See `Database.server`."""
        return self.read(lambda tx: f"SQLite {tx.value(select(func.sqlite_version()))}")

    def warnings(self) -> list[str]:
        """See `Database.warnings`."""
        mode = self.read(lambda tx: str(tx.value(text("PRAGMA journal_mode"))))
        if mode.lower() == "wal":
            return []
        return [
            f"SQLite's journal mode is {mode}, not WAL: readers and writers wait for each other; is it a local disk?"
        ]

    # ---- connections

    @contextmanager
    def _begun(self, begin: str) -> Iterator[Tx]:
        try:
            with self._current().connect() as connection:
                connection = connection.execution_options(knell_begin=begin)
                with connection.begin():
                    yield Tx(connection, self._tables, self._rules, self._clock(), self._epoch())
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            raise _unavailable(self._path, error) from error

    def _current(self) -> Engine:
        # A stat costs a microsecond, and tells of a file that was deleted or replaced while it was open.
        if self._engine is None or _identity(self._path) != self._file:
            with self._opening:
                if self._engine is None or _identity(self._path) != self._file:
                    self._open()
        assert self._engine is not None
        return self._engine

    def _open(self) -> None:
        self._dispose()
        _make_file(self._path)
        engine = _engine(self._path)
        try:
            self._seed = _prepare(engine, self._tables, self._path)
        except BaseException:
            engine.dispose()
            raise
        self._file = _identity(self._path)
        self._engine = engine

    def _epoch(self) -> str:
        # A backup that was put in the place of the file is another inode: what came after it is lost.
        return f"{self._seed}.{self._file[1] if self._file else 0:x}"

    def _dispose(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    # ---- forks: SQLite must not carry an open file into a child process

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with self._gate:
            self._gate.wait_for(lambda: self._forks == 0, timeout=BUSY_SECONDS)
            if self._closed:
                raise StoreUnavailable(f"{self._path}: this store object was closed; open a new one")
            self._running += 1
        try:
            yield
        finally:
            with self._gate:
                self._running -= 1
                self._gate.notify_all()

    def _start_afresh(self) -> None:
        self._gate = threading.Condition()
        self._opening = threading.Lock()
        self._running = 0
        self._forks = 0

    def before_fork(self) -> None:
        """Wait for the transactions that run, let none begin, and close every connection."""
        with self._gate:
            self._forks += 1
            self._gate.wait_for(lambda: self._running == 0, timeout=2 * BUSY_SECONDS)
            idle = self._running == 0
        if idle:
            self._dispose()

    def after_fork_in_parent(self) -> None:
        """Let transactions begin again."""
        with self._gate:
            self._forks -= 1
            self._gate.notify_all()

    def after_fork_in_child(self) -> None:
        """Begin anew: none of the parent's threads and locks live here."""
        if self._engine is not None:
            # A transaction outlasted the wait. To close its connection here would harm the parent's.
            _abandoned.append(self._engine)
            self._engine = None
        self._start_afresh()


_databases: weakref.WeakSet[SqliteDatabase] = weakref.WeakSet()
_abandoned: list[Engine] = []


def _each(step: Callable[[SqliteDatabase], None]) -> Callable[[], None]:
    def run() -> None:
        for database in list(_databases):
            step(database)

    return run


os.register_at_fork(
    before=_each(SqliteDatabase.before_fork),
    after_in_parent=_each(SqliteDatabase.after_fork_in_parent),
    after_in_child=_each(SqliteDatabase.after_fork_in_child),
)


def _path_of(url: str) -> Path:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidSettings(f"the store's URL {url!r} cannot be read; use sqlite:///path") from None
    if parsed.get_backend_name() != "sqlite":
        raise InvalidSettings(f"the SQL store has URL scheme {parsed.drivername!r}; use sqlite:///path")
    if not parsed.database or parsed.database == ":memory:" or parsed.host:
        raise InvalidSettings(f"the store's URL {url!r} names no file; use sqlite:///path, several processes share it")
    # A daemon changes its directory; the file stays the one that was meant at the start.
    return Path(parsed.database).absolute()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


# Closing a file takes every lock that SQLite has on it in this process: nobody may open it before it is closed.
_making = threading.Lock()


def _make_file(path: Path) -> None:
    """Make the file, and its folder, for their owner alone: people's identifiers are in it. What is there stays so.

    SQLite makes the files beside it (-wal, -shm) with the same permissions.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _making, suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))


def _engine(path: Path) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        pool_size=4,
        max_overflow=100,
        pool_timeout=BUSY_SECONDS,
    )

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        # Python's sqlite3 then begins no transaction by itself; `begun` says which kind.
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("knell_begin", "BEGIN IMMEDIATE"))

    return engine


def _prepare(engine: Engine, tables: Tables, path: Path) -> str:
    """Make the file and the tables if they are not there. Returns the random part of the epoch."""
    deadline = time.monotonic() + 2 * BUSY_SECONDS
    while True:
        try:
            _switch_to_wal(engine)
            with engine.connect() as connection, connection.begin():
                return _make_schema(connection, tables, path)
        except (OperationalError, sqlite3.OperationalError) as error:
            # Processes that start together meet here, and SQLite does not always wait for a change of mode.
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise
        time.sleep(_RETRY_SECONDS)


def _switch_to_wal(engine: Engine) -> None:
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.close()
    finally:
        connection.close()


def _make_schema(connection: Connection, tables: Tables, path: Path) -> str:
    there = set(inspect(connection).get_table_names())
    if tables.meta.name not in there:
        tables.metadata.create_all(connection)
        values = {"schema": str(SCHEMA_VERSION), "epoch": secrets.token_hex(8)}
        connection.execute(insert(tables.meta), [{"name": name, "value": value} for name, value in values.items()])
        counters: Iterable[str] = ("head", "trimmed", "log_bytes")
        connection.execute(insert(tables.counters), [{"name": name, "value": 0} for name in counters])
    found = {row.name: row.value for row in connection.execute(select(tables.meta.c.name, tables.meta.c.value))}
    if int(found["schema"]) > SCHEMA_VERSION:
        raise StoreUnavailable(
            f"{path} has schema version {found['schema']}, and this Knell knows version {SCHEMA_VERSION}; "
            "a newer Knell has written it: upgrade this one"
        )
    if not there.issuperset(tables.metadata.tables):
        tables.metadata.create_all(connection)  # those that an older Knell did not have
    return str(found["epoch"])


def _unavailable(path: Path, error: Exception) -> StoreUnavailable:
    cause = getattr(error, "orig", None) or error
    hint = ""
    if "locked" in str(cause):
        hint = f" (another process kept it locked for {BUSY_SECONDS:g} s; try again)"
    elif "not a database" in str(cause) or "malformed" in str(cause):
        hint = " (move the file away, and Knell makes a new one)"
    return StoreUnavailable(f"{path}: {cause}{hint}")
