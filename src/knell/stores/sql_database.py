"""What the steps of the SQL store run in: a transaction, and who it shares the database with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, Row, func, select, update
from sqlalchemy.sql import Executable

from knell.settings import Rules
from knell.stores.sql_schema import Tables, lock_key

# How long a caller waits for the others before the store counts as unavailable.
BUSY_SECONDS = 2.0
# How many values one IN (...) takes: far below SQLite's limit of variables, and few distinct statements to compile.
CHUNK = 500

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lock:
    """What a transaction holds from its first moment to its end, where writers run side by side.

    On SQLite they run one after another, and these are nothing. On PostgreSQL they come before the locks of rows, which
    the steps take in this order: tokens, sessions, seconds (each by key), counters.
    """

    name: str
    shared: bool = False


# Tracks look at the denylist side by side; a revocation waits for those that have looked, and the next ones see it.
DENYLIST_READ = Lock("denylist", shared=True)
DENYLIST = Lock("denylist")
# New records join the notice log side by side; who changes what is there, or for whom new ones are, is alone with it.
LOG_ADD = Lock("log", shared=True)
LOG = Lock("log")
# Parked entries share the text of their batch.
PARKED = Lock("parked")


@dataclass(frozen=True, slots=True)
class Tx:
    """One open transaction.

    Attributes:
        now: the store's clock, read when the transaction had its locks.
        epoch: names this database and what happened to it; see `Cursor`.
    """

    connection: Connection
    tables: Tables
    rules: Rules
    now: float
    epoch: str

    def run(self, statement: Executable, rows: Sequence[dict[str, Any]] | None = None) -> int:
        """Run a statement; with `rows`, once for each (none: not at all). Returns how many rows it changed."""
        if rows is None:
            return int(self.connection.execute(statement).rowcount)
        return int(self.connection.execute(statement, rows).rowcount) if rows else 0

    def rows(self, statement: Executable) -> Sequence[Row[Any]]:
        """All rows of a query."""
        return self.connection.execute(statement).all()

    def row(self, statement: Executable) -> Row[Any] | None:
        """The first row of a query, or None."""
        return self.connection.execute(statement).first()

    def value(self, statement: Executable) -> Any:
        """The first column of the first row of a query, or None."""
        return self.connection.execute(statement).scalar()

    def counter(self, name: str) -> int:
        """The value of a counter."""
        counters = self.tables.counters
        return int(self.value(select(counters.c.value).where(counters.c.name == name)))

    def add(self, name: str, amount: int) -> int:
        """Add to a counter and return the new value. Its row stays locked until the transaction has ended."""
        counters = self.tables.counters
        self.run(update(counters).where(counters.c.name == name).values(value=counters.c.value + amount))
        return self.counter(name)

    @property
    def side_by_side(self) -> bool:
        """True where other writers run at the same time."""
        return self.connection.dialect.name == "postgresql"

    def hold(self, name: str) -> None:
        """Take a lock of this name, to the end of the transaction, after waiting for its holder."""
        if self.side_by_side:
            self.run(select(func.pg_advisory_xact_lock(lock_key(self.tables.namespace, name))))

    def announce(self) -> None:
        """Wake up those who wait for changes, once this transaction is committed."""
        if self.side_by_side:
            self.run(select(func.pg_notify(self.tables.channel, "")))


def chunks(values: Collection[Any]) -> Iterator[list[Any]]:
    """Lists of at most CHUNK of the values."""
    left = iter(values)
    while chunk := list(islice(left, CHUNK)):
        yield chunk


class Database(Protocol):
    """A database with the tables of one namespace. Threads share it, and it works on both sides of a fork.

    Every method may raise StoreUnavailable.
    """

    def time(self) -> float:
        """The store's clock: Unix seconds."""

    def read(self, step: Callable[[Tx], T]) -> T:
        """Run a step that changes nothing; it sees one state of the database."""

    def write(self, step: Callable[[Tx], T], *locks: Lock, patience_seconds: float = BUSY_SECONDS) -> T:
        """Run a step in a transaction, and commit. It may be run several times, of which only the last one counts."""

    def wait(self, seconds: float) -> None:
        """Wait until there may be a change, at most so long. The caller has looked before, and looks after it."""

    def server(self) -> str:
        """Its name and version."""

    def warnings(self) -> list[str]:
        """What an operator should change about it."""

    def close(self) -> None:
        """Close every connection. Later calls raise StoreUnavailable."""
