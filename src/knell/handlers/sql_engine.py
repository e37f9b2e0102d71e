"""The database that a service's sessions are in: bounded in time, and safe after a fork."""

from __future__ import annotations

import os
import time
import weakref
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, NullPool, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from knell.errors import InvalidSettings
from knell.postgresql_url import read_postgresql_url

# How long a writer waits for the others, a caller for a connection, and a transaction for its server.
BUSY_SECONDS = 5.0
# A statement that takes longer is ended by PostgreSQL itself.
STATEMENT_MILLISECONDS = 5000


def open_engine(url: str) -> Engine:
    """An engine for `sqlite:///path` or `postgresql://...`; InvalidSettings for any other URL."""
    if url.startswith(("postgresql:", "postgresql+psycopg:")):
        return _postgresql(url.replace("+psycopg", "", 1))
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError):
        backend = ""
    if backend != "sqlite":
        raise InvalidSettings("the URL of the sessions is neither sqlite:///path nor postgresql://...")
    return _sqlite(parsed)


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:" or url.host:
        raise InvalidSettings("the URL of the sessions names no file; use sqlite:///path, several processes share it")
    # A daemon changes its directory; the file stays the one that was meant at the start.
    path = Path(url.database).absolute()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A session's id opens the session. SQLite's own files beside it get its mode.
    path.touch(mode=0o600)
    # A connection for each call needs no care about threads and forks, and costs a tenth of a millisecond.
    engine = create_engine(
        URL.create("sqlite", database=str(path)), poolclass=NullPool, connect_args={"timeout": BUSY_SECONDS}
    )

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        # Python's sqlite3 then begins no transaction by itself; `begun` says which kind.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("knell_begin", "BEGIN IMMEDIATE"))

    return engine


def _postgresql(url: str) -> Engine:
    read = read_postgresql_url("the URL of the sessions", url)
    from knell.stores.postgresql_link import Connector  # loads psycopg

    limits = f"-c statement_timeout={STATEMENT_MILLISECONDS} -c lock_timeout={int(BUSY_SECONDS * 1000)}"
    engine = create_engine(
        "postgresql+psycopg://",
        # Several hosts fail over, as the store's.
        creator=Connector(read, options=limits).open,
        pool_size=read.pool_size,
        max_overflow=16,
        pool_timeout=BUSY_SECONDS,
        pool_pre_ping=True,
        hide_parameters=True,
        use_native_hstore=False,
    )

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.connection.dbapi_connection.deadline = time.monotonic() + BUSY_SECONDS  # type: ignore[union-attr]

    _engines.add(engine)
    return engine


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _begin_anew_in_child() -> None:
    # The connections are the parent's: a child that used or closed one would disturb it.
    for engine in list(_engines):
        engine.dispose(close=False)


os.register_at_fork(after_in_child=_begin_anew_in_child)
