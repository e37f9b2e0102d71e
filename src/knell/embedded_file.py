"""The file behind the embedded broker: exchanges, bindings, queues and messages in one SQLite database.

Several processes of one machine share it. A message that was fetched is leased to whoever fetched it and deleted when
it is acked; a lease ends with the process that holds it. Routing copies are made in one transaction.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amqp.exceptions import ChannelError, PreconditionFailed

from knell.embedded_routing import Payload, dead_letter, delete_queue, find_exchange, publish, queue_arguments

# How long a writer waits for another process's transaction; each takes a few milliseconds.
BUSY_SECONDS = 10.0
NO_ROUTE = 312

_SCHEMA = """
CREATE TABLE IF NOT EXISTS exchange (
    name TEXT PRIMARY KEY, type TEXT NOT NULL, arguments TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS queue (
    name TEXT PRIMARY KEY, arguments TEXT NOT NULL, owner TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS binding (
    exchange TEXT NOT NULL, routing_key TEXT NOT NULL, queue TEXT NOT NULL,
    PRIMARY KEY (exchange, routing_key, queue)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS message (
    id INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, visible_at REAL NOT NULL, expires_at REAL,
    owner TEXT, redelivered INTEGER NOT NULL DEFAULT 0, payload TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS message_ready ON message (queue, visible_at, id) WHERE owner IS NULL;
CREATE INDEX IF NOT EXISTS message_leased ON message (owner) WHERE owner IS NOT NULL;
CREATE INDEX IF NOT EXISTS message_expiring ON message (expires_at) WHERE expires_at IS NOT NULL AND owner IS NULL;
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that was leased to whoever fetched it."""

    id: int
    queue: str
    redelivered: bool
    payload: Payload


class Owner:
    """The holder of leases: a process, told from a later one with the same pid, and one of its channels."""

    def __init__(self) -> None:
        pid = os.getpid()
        self.token = f"{pid}.{_started(pid)}.{secrets.token_hex(8)}"
        _live.add(self.token)
        self._finalizer = weakref.finalize(self, _live.discard, self.token)

    def end(self) -> None:
        """From now on its leases are nobody's."""
        self._finalizer()


class BrokerFile:
    """One process's view of the file. Safe to use from several threads, and in a child after a fork.

    Args:
        path: the database; its folder is made if it is missing.
        clock: Unix seconds; decides what is visible and what has expired.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._pid = 0
        # SQLite forbids closing in a child what its parent opened; what a fork left behind is kept alive here.
        self._inherited: list[sqlite3.Connection] = []

    def close(self) -> None:
        """Close the file. Using it again opens it again."""
        with self._lock:
            if self._database is not None and self._pid == os.getpid():
                self._database.close()
                self._database = None

    # ---- what is declared

    def declare_exchange(self, name: str, kind: str, arguments: Mapping[str, Any]) -> None:
        """Make an exchange; PreconditionFailed if it exists with another type or arguments."""
        wanted = (kind, _packed(arguments))
        with self._writing() as database:
            found = database.execute("SELECT type, arguments FROM exchange WHERE name = ?", (name,)).fetchone()
            if found is None:
                database.execute("INSERT INTO exchange (name, type, arguments) VALUES (?, ?, ?)", (name, *wanted))
            elif found != wanted:
                raise _differs("exchange", name, found, wanted)

    def declare_queue(self, name: str, arguments: Mapping[str, Any], *, owner: str | None = None) -> None:
        """Make a queue; PreconditionFailed if it exists with other arguments. It goes when its owner ends."""
        wanted = _packed(arguments)
        with self._writing() as database:
            found = database.execute("SELECT arguments FROM queue WHERE name = ?", (name,)).fetchone()
            if found is None:
                row = (name, wanted, owner)
                database.execute("INSERT INTO queue (name, arguments, owner) VALUES (?, ?, ?)", row)
            elif found[0] != wanted:
                raise _differs("queue", name, found[0], wanted)

    def bind(self, queue: str, exchange: str, routing_key: str) -> None:
        """Bind a queue; NotFound if either side does not exist."""
        with self._writing() as database:
            find_exchange(database, exchange)
            queue_arguments(database, queue)
            row = (exchange, routing_key, queue)
            database.execute("INSERT OR IGNORE INTO binding (exchange, routing_key, queue) VALUES (?, ?, ?)", row)

    def unbind(self, queue: str, exchange: str, routing_key: str) -> None:
        """Take a binding away; no effect if there is none."""
        with self._writing() as database:
            row = (exchange, routing_key, queue)
            database.execute("DELETE FROM binding WHERE exchange = ? AND routing_key = ? AND queue = ?", row)

    def delete_exchange(self, name: str) -> None:
        """Delete an exchange with its bindings."""
        with self._writing() as database:
            database.execute("DELETE FROM binding WHERE exchange = ?", (name,))
            database.execute("DELETE FROM exchange WHERE name = ?", (name,))

    def delete_queue(self, name: str, *, if_empty: bool = False) -> int:
        """Delete a queue with its bindings and messages. Returns how many messages there were."""
        with self._writing() as database:
            count: int = database.execute("SELECT count(*) FROM message WHERE queue = ?", (name,)).fetchone()[0]
            if not (if_empty and count):
                delete_queue(database, name)
            return count

    def exchanges(self) -> list[str]:
        """The names of the exchanges."""
        return [name for (name,) in self._rows("SELECT name FROM exchange ORDER BY name")]

    def bindings(self) -> list[tuple[str, str, str]]:
        """(exchange, routing key, queue) of every binding."""
        return [tuple(row) for row in self._rows("SELECT exchange, routing_key, queue FROM binding ORDER BY 1, 2, 3")]

    # ---- messages

    def publish(self, payload: Payload, exchange: str, routing_key: str, *, mandatory: bool = False) -> None:
        """Put a copy on each queue that it is routed to, all or none.

        Raises:
            NotFound: the exchange does not exist.
            ChannelError: code 312, mandatory was asked for and no queue takes it.
        """
        with self._writing() as database:
            if not publish(database, payload, exchange, routing_key, now=self._clock()) and mandatory:
                raise ChannelError(
                    f"NO_ROUTE - {exchange!r} with key {routing_key!r}", (50, 60), "Basic.return", NO_ROUTE
                )

    def fetch(self, queues: Sequence[str], owner: str, *, limit: int) -> list[Delivery]:
        """Lease up to `limit` visible messages, those that became visible first. A poll that finds none only reads."""
        now = self._clock()
        names = list(dict.fromkeys(queues))
        ready = (
            f"SELECT id FROM message WHERE owner IS NULL AND queue IN ({', '.join('?' * len(names))})"  # noqa: S608
            " AND visible_at <= ? AND (expires_at IS NULL OR expires_at > ?) ORDER BY visible_at, id LIMIT ?"
        )
        if not self._rows(ready, (*names, now, now, 1)):
            return []
        with self._writing() as database:
            leased = database.execute(
                f"UPDATE message SET owner = ? WHERE id IN ({ready})"  # noqa: S608
                " RETURNING visible_at, id, queue, redelivered, payload",
                (owner, *names, now, now, limit),
            ).fetchall()
        return [Delivery(row[1], row[2], bool(row[3]), json.loads(row[4])) for row in sorted(leased)]

    def ack(self, ids: Iterable[int], owner: str) -> None:
        """Delete messages that this owner holds. One that was handed on meanwhile stays."""
        with self._writing() as database:
            database.executemany("DELETE FROM message WHERE id = ? AND owner = ?", [(id_, owner) for id_ in ids])

    def release(self, ids: Iterable[int], owner: str) -> None:
        """Put messages that this owner holds back to where they were in their queues."""
        with self._writing() as database:
            rows = [(id_, owner) for id_ in ids]
            database.executemany(f"{_RELEASE} WHERE id = ? AND owner = ?", rows)

    def reject(self, ids: Iterable[int], owner: str) -> None:
        """Drop messages that this owner holds; they go to their queue's dead-letter exchange if it has one."""
        with self._writing() as database:
            for id_ in ids:
                if database.execute("SELECT 1 FROM message WHERE id = ? AND owner = ?", (id_, owner)).fetchone():
                    dead_letter(database, id_, "rejected", now=self._clock())

    def ready(self, queue: str) -> int | None:
        """How many messages could be fetched now; None if there is no such queue."""
        if not self._rows("SELECT 1 FROM queue WHERE name = ?", (queue,)):
            return None
        now = self._clock()
        count: int = self._rows(
            "SELECT count(*) FROM message WHERE owner IS NULL AND queue = ? AND visible_at <= ?"
            " AND (expires_at IS NULL OR expires_at > ?)",
            (queue, now, now),
        )[0][0]
        return count

    def purge(self, queue: str) -> int:
        """Delete the messages of a queue that nobody holds. Returns how many."""
        with self._writing() as database:
            return database.execute("DELETE FROM message WHERE owner IS NULL AND queue = ?", (queue,)).rowcount

    # ---- keeping house

    def end_owner(self, owner: str) -> None:
        """Release all that an owner holds, and delete the queues that lived as long as it."""
        with self._writing() as database:
            _end_owner(database, owner)

    def maintain(self) -> None:
        """Release what processes that are gone held, and dead-letter what has expired."""
        now = self._clock()
        holders = self._rows(
            "SELECT DISTINCT owner FROM message WHERE owner IS NOT NULL"
            " UNION SELECT owner FROM queue WHERE owner IS NOT NULL"
        )
        gone = [owner for (owner,) in holders if not _lives(owner)]
        expired = self._rows(f"{_EXPIRED} LIMIT 1", (now,))
        if not gone and not expired:
            return
        with self._writing() as database:
            for owner in gone:
                _end_owner(database, owner)
            for (id_,) in database.execute(f"{_EXPIRED} LIMIT 1000", (now,)).fetchall():
                dead_letter(database, id_, "expired", now=now)

    # ---- the database

    def _open(self) -> sqlite3.Connection:
        if self._database is not None and self._pid == os.getpid():
            return self._database
        if self._database is not None:
            self._inherited.append(self._database)
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            _use_wal(database)
            # A commit survives the process at once, and the machine after the next checkpoint.
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute("COMMIT")
        except sqlite3.Error:
            database.close()
            raise
        self._database, self._pid = database, os.getpid()
        return database

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._open().execute(query, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            database = self._open()
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")


_RELEASE = "UPDATE message SET owner = NULL, redelivered = 1"
_EXPIRED = "SELECT id FROM message WHERE expires_at <= ? AND owner IS NULL"
_live: set[str] = set()


def _end_owner(database: sqlite3.Connection, owner: str) -> None:
    database.execute(f"{_RELEASE} WHERE owner = ?", (owner,))
    for (name,) in database.execute("SELECT name FROM queue WHERE owner = ?", (owner,)).fetchall():
        delete_queue(database, name)


def _packed(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, sort_keys=True)


def _differs(what: str, name: str, found: object, wanted: object) -> PreconditionFailed:
    text = f"PRECONDITION_FAILED - {what} {name!r} exists as {found}, not as {wanted}; delete it first"
    return PreconditionFailed(text, (50, 10), "Declare", 406)


def _use_wal(database: sqlite3.Connection) -> None:
    # Changing the mode does not wait for other processes that are changing it, whatever the busy time-out.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _lives(token: str) -> bool:
    pid, started, _ = token.split(".")
    if int(pid) == os.getpid() and started == _started(os.getpid()):
        return token in _live
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; "0" where /proc does not say, which is then the same for all."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "0"
    # The program's name comes second, in brackets, and may itself contain blanks and brackets.
    state, *fields = text.rpartition(")")[2].split()
    return "gone" if state == "Z" else fields[18]
