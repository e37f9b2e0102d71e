"""PostgreSQL under the SQL store: transactions that run side by side, and are run again where they met."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from sqlalchemy import BigInteger, Connection, Select, Text, bindparam, func, literal_column, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from knell.errors import StoreUnavailable
from knell.postgresql_url import PostgresUrl, read_postgresql_url
from knell.settings import Rules
from knell.stores.postgresql_link import AGAIN_WITHIN_SECONDS, Connector, News
from knell.stores.sql_database import BUSY_SECONDS, Lock, T, Tx
from knell.stores.sql_schema import REVISION, SCHEMA_VERSION, Tables, lock_key, make_tables
from knell.turns import Turns

OLDEST_VERSION = 15
# Two transactions met: a serialization failure, a deadlock, or both made the same row. The other one is there now.
_MET = ("40001", "40P01", "23505")
# What came of a server that was a primary when the connection was opened.
_READ_ONLY = "25006"
UPGRADE = "run `knell store upgrade`"
_HINTS = {
    "42P01": f" ({UPGRADE})",
    "42703": f" ({UPGRADE})",
    "3F000": f" ({UPGRADE})",
    "42501": " (docs/deploy.md has the rights that each role needs)",
    "55P03": " (another transaction kept it locked; try again)",
    "57014": " (it took too long; try again)",
}
# What a client that has stopped in the middle (or its host has) keeps locked, comes free after this.
IDLE_SECONDS = 5.0
_TIME_LIMITS = ("lock_timeout", "statement_timeout")
# A second client on a loaded server does not come in lockstep.
_PAUSE_MILLISECONDS = 10


class PostgresDatabase:
    """A schema of a PostgreSQL database. See `Database`.

    - Writers run side by side, at READ COMMITTED, each holding the rows that it decides by; what two of them cannot do
      at once is run again until BUSY_SECONDS are over. Readers see one state (REPEATABLE READ).
    - The clock is the server's, read when a transaction has its locks.
    - A call ends within about BUSY_SECONDS, whatever the server does; up to CONNECT_SECONDS later if that time was
      spent on waiting for a connection of the pool.
    - Everything that a transaction sets is its own, and nothing is prepared: PgBouncer may run in transaction mode.

    Nothing is contacted here.

    Raises:
        InvalidSettings: the URL cannot be used.
    """

    def __init__(self, url: str, *, namespace: str, rules: Rules, clock: Callable[[], float] | None) -> None:
        self._url = read_postgresql_url("KNELL_STORE_URL", url)
        self._tables = make_tables(namespace, schema=True)
        self._rules = rules
        self._clock = clock
        self._closed = False
        # A connection belongs to the process that opened it. Those of the parents are kept here, and left alone.
        self._processes: dict[int, _Process] = {}

    def time(self) -> float:
        """See `Database.time`."""
        return self._clock() if self._clock is not None else self.read(lambda tx: tx.now)

    def read(self, step: Callable[[Tx], T]) -> T:
        """See `Database.read`."""
        return self._run(step, (), BUSY_SECONDS, reading=True)

    def write(self, step: Callable[[Tx], T], *locks: Lock, patience_seconds: float = BUSY_SECONDS) -> T:
        """See `Database.write`."""
        return self._run(step, locks, patience_seconds, reading=False)

    def wait(self, seconds: float) -> None:
        """See `Database.wait`."""
        self._here().news.wait(seconds)

    def server(self) -> str:
        """See `Database.server`."""
        return self.read(lambda tx: f"PostgreSQL {_setting(tx, 'server_version').split()[0]}")

    def warnings(self) -> list[str]:
        """See `Database.warnings`."""
        return self.read(_warnings)

    def close(self) -> None:
        """See `Database.close`."""
        self._closed = True
        process = self._processes.pop(os.getpid(), None)
        if process is not None:
            process.news.close()
            process.engine.dispose()

    def _here(self) -> _Process:
        if self._closed:
            raise StoreUnavailable(f"{self._url.where}: this store object was closed; open a new one")
        found = self._processes.get(os.getpid())
        return found or self._processes.setdefault(os.getpid(), _Process(self._url, self._tables.channel))

    # ---- transactions

    def _run(self, step: Callable[[Tx], T], locks: tuple[Lock, ...], patience: float, *, reading: bool) -> T:
        here, began, reconnected = self._here(), time.monotonic(), False
        while True:
            try:
                return self._attempt(here, step, locks, began + patience, patience, reading=reading)
            except DBAPIError as error:
                spent = time.monotonic() - began
                if _lost(error) and not reconnected and spent < AGAIN_WITHIN_SECONDS:
                    # After a restart or a failover every idle connection is dead, or leads to what is now a standby.
                    reconnected = True
                    here.engine.dispose()
                elif _sqlstate(error) not in _MET or spent > 0.8 * patience:
                    raise self._unavailable(error) from error
            except SQLAlchemyError as error:
                raise self._unavailable(error) from error
            time.sleep(secrets.randbelow(_PAUSE_MILLISECONDS) / 1000)

    def _attempt(
        self,
        here: _Process,
        step: Callable[[Tx], T],
        locks: tuple[Lock, ...],
        deadline: float,
        patience: float,
        *,
        reading: bool,
    ) -> T:
        with (
            here.turns.taken(deadline - time.monotonic()) as free,
            self._connected(here, free, reading=reading) as connection,
        ):
            connection.connection.dbapi_connection.deadline = deadline  # type: ignore[union-attr]
            transaction = connection.begin()
            tx = self._begin(connection, locks, patience)
            if not here.fits:
                self._check(tx)
                here.fits = True
            result = step(tx)
            try:
                transaction.commit()
            except DBAPIError as error:
                if reading:
                    raise
                # It must not be run again: it may have been done.
                raise StoreUnavailable(
                    f"{self._url.where}: the connection was lost at the commit; what was asked may be done, or not"
                ) from error
            return result

    def _connected(self, here: _Process, free: bool, *, reading: bool) -> Connection:
        if not free:
            raise StoreUnavailable(
                f"{self._url.where}: all {self._url.pool_size} connections of this process were busy for "
                f"{BUSY_SECONDS:g} s; try again, or give the URL a larger pool_size"
            )
        return (here.reader if reading else here.engine).connect()

    def _begin(self, connection: Connection, locks: tuple[Lock, ...], patience: float) -> Tx:
        namespace = self._tables.namespace
        keys: dict[str, Any] = {f"lock{n}": lock_key(namespace, lock.name) for n, lock in enumerate(locks)}
        keys["milliseconds"] = str(int(patience * 1000))
        found = connection.execute(_beginning(self._tables, locks), keys).first()
        if found is None:
            raise StoreUnavailable(f"{self._url.where}: schema {namespace!r} has no epoch; {UPGRADE}")
        now = self._clock() if self._clock is not None else float(found.now)
        # Another server, one that was promoted or restored, or tables that came out of a dump: the last three tell.
        epoch = f"{found.seed}.{found.system:x}-{found.timeline}-{found.made:x}"
        return Tx(connection, self._tables, self._rules, now, epoch)

    def _check(self, tx: Tx) -> None:
        tables, where = self._tables, f"{self._url.where}: schema {self._tables.namespace!r}"
        needed = tx.value(select(tables.meta.c.value).where(tables.meta.c.name == "schema"))
        if int(needed) > SCHEMA_VERSION:
            raise StoreUnavailable(
                f"{where} has version {needed}, and this Knell knows version {SCHEMA_VERSION}; "
                "`knell store upgrade --contract` of a newer one has run: upgrade this one"
            )
        found = tx.value(select(tables.revision.c.version_num))
        if found is None or int(found) < int(REVISION):
            raise StoreUnavailable(f"{where} is at revision {found}, and this Knell needs {REVISION}; {UPGRADE}")

    def _unavailable(self, error: SQLAlchemyError) -> StoreUnavailable:
        cause = getattr(error, "orig", None) or error
        # The server's own line, without the detail that shows values; or what libpq says of a connection.
        said = getattr(getattr(cause, "diag", None), "message_primary", None) or " ".join(str(cause).split())
        return StoreUnavailable(f"{self._url.where}: {said}{_HINTS.get(_sqlstate(error), '')}")


class _Process:
    """What one process has open."""

    def __init__(self, url: PostgresUrl, channel: str) -> None:
        connector = Connector(url)
        self.engine = connector.engine()
        self.reader = self.engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self.turns = Turns(url.pool_size)
        self.news = News(connector, channel)
        # Whether the schema was found to be one that this code works on.
        self.fits = False


@lru_cache(maxsize=64)
def _beginning(tables: Tables, locks: tuple[Lock, ...]) -> Select[Any]:
    """The first statement of every transaction: one round trip for its time limits, locks, clock and epoch."""
    idle = str(int(IDLE_SECONDS * 1000))
    taken = [
        (func.pg_advisory_xact_lock_shared if lock.shared else func.pg_advisory_xact_lock)(
            bindparam(f"lock{n}", type_=BigInteger())
        )
        for n, lock in enumerate(locks)
    ]
    return select(
        func.set_config("idle_in_transaction_session_timeout", idle, True),
        *(func.set_config(name, bindparam("milliseconds", type_=Text()), True) for name in _TIME_LIMITS),
        *taken,
        literal_column("extract(epoch FROM clock_timestamp())::float8").label("now"),
        literal_column("(SELECT system_identifier FROM pg_control_system())").label("system"),
        literal_column("left(pg_walfile_name(pg_current_wal_lsn()), 8)").label("timeline"),
        literal_column("tableoid::int8").label("made"),
        tables.meta.c.value.label("seed"),
    ).where(tables.meta.c.name == "epoch")


def _sqlstate(error: SQLAlchemyError) -> str:
    return getattr(getattr(error, "orig", None), "sqlstate", None) or ""


def _lost(error: DBAPIError) -> bool:
    return error.connection_invalidated or _sqlstate(error) == _READ_ONLY


def _setting(tx: Tx, name: str) -> str:
    return str(tx.value(select(func.current_setting(name))))


def _warnings(tx: Tx) -> list[str]:
    found = []
    if int(_setting(tx, "server_version_num")) < OLDEST_VERSION * 10_000:
        found.append(f"PostgreSQL {_setting(tx, 'server_version')} is too old: use {OLDEST_VERSION} or later")
    for name in ("fsync", "full_page_writes", "synchronous_commit"):
        if _setting(tx, name) == "off":
            found.append(f"{name} is off: a crash of the server may lose revocations; set '{name} = on'")
    remote = "inet_server_addr() IS NOT NULL AND NOT inet_server_addr() <<= ANY ('{127.0.0.0/8,::1}'::inet[])"
    plain = "NOT (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid())"
    if tx.value(select(literal_column(f"{remote} AND {plain}"))):
        found.append("the connection is not encrypted; add sslmode=verify-full and sslrootcert to the URL")
    return found
