"""Connections to PostgreSQL: to a server that takes writes, bounded in time, and one that waits for news."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
from psycopg import sql
from psycopg.abc import PQGen
from sqlalchemy import Engine, create_engine

from knell.postgresql_url import PostgresUrl
from knell.stores.sql_database import BUSY_SECONDS

# The least that libpq takes.
CONNECT_SECONDS = 2
# Another host, or another attempt, begins only this soon after the first one did.
AGAIN_WITHIN_SECONDS = 0.5
# How long a wait for news may last: between two, the feed is read. So a wait that news cannot reach (behind a PgBouncer
# in transaction mode) sees a change within this, and a server that has lost data is noticed.
NEWS_SECONDS = 1.0
# Where there is nothing to wait at: another thread has the connection, or it could not be opened.
_PAUSE_SECONDS = 0.05
_FIXED = {
    "connect_timeout": CONNECT_SECONDS,
    "client_encoding": "utf8",
    # What is sent and not acknowledged, and an idle peer that is silent: both end the connection.
    "tcp_user_timeout": int(BUSY_SECONDS * 1000),
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
}
_DEFAULTS = {"application_name": "knell", "gssencmode": "disable", "target_session_attrs": "read-write"}

T = TypeVar("T")


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed when the server has not answered by `deadline` (of `time.monotonic`)."""

    deadline = float("inf")

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """See psycopg: it runs `gen` whenever the socket is ready, and every 0.1 s."""
        return super().wait(self._until_deadline(gen), *args, **kwargs)

    def _until_deadline(self, gen: PQGen[T]) -> Generator[Any, Any, T]:
        # The server cannot keep this time by itself while it is frozen, or its host is gone.
        try:
            asked = next(gen)
            while True:
                ready = yield asked
                if not ready and time.monotonic() > self.deadline:
                    self.pgconn.finish()
                    raise psycopg.OperationalError("the server did not answer in time")
                asked = gen.send(ready)
        except StopIteration as end:
            found: T = end.value
            return found


class Connector:
    """Opens connections to the first of the hosts that takes writes, beginning with the one that did so last.

    `more` are further parameters of libpq.
    """

    def __init__(self, url: PostgresUrl, **more: str) -> None:
        self._url = url
        self._more = more
        self._first = 0

    def open(self, *, autocommit: bool = False) -> BoundedConnection:
        """Connect. Each host has CONNECT_SECONDS; one that uses them up is tried last the next time.

        Raises:
            psycopg.OperationalError: no host could be reached, or none of them takes writes.
        """
        began, first, hosts = time.monotonic(), self._first, self._url.hosts
        errors = []
        for n in range(len(hosts)):
            at = (first + n) % len(hosts)
            try:
                connection = self._open(*hosts[at], autocommit=autocommit)
            except psycopg.OperationalError as error:
                errors.append(" ".join(str(error).split()))
                self._first = (at + 1) % len(hosts)
                if time.monotonic() - began > AGAIN_WITHIN_SECONDS:
                    break
            else:
                self._first = at
                return connection
        raise psycopg.OperationalError("; ".join(errors))

    def _open(self, host: str, port: int, *, autocommit: bool) -> BoundedConnection:
        # No prepared statements: they outlive a transaction, which a PgBouncer in transaction mode does not allow.
        connection = BoundedConnection.connect(
            **_DEFAULTS | self._url.options | _FIXED | self._more, host=host, port=port,
            autocommit=autocommit, prepare_threshold=None,
        )  # fmt: skip
        connection.deadline = time.monotonic() + BUSY_SECONDS
        return connection

    def engine(self) -> Engine:
        """A pool over this connector; nothing is contacted yet."""
        return create_engine(
            "postgresql+psycopg://",
            creator=self.open,
            isolation_level="READ COMMITTED",
            pool_size=self._url.pool_size,
            max_overflow=0,
            # Nobody waits here: `Turns` lets no more pass than there are connections.
            pool_timeout=0,
            pool_use_lifo=True,
            # An error's text and a log show no parameters: people's identifiers are in them.
            hide_parameters=True,
            use_native_hstore=False,
        )


class News:
    """Waits until somebody announces a change, on a connection of its own that is opened when it is first needed."""

    def __init__(self, connector: Connector, channel: str) -> None:
        self._connector = connector
        self._channel = channel
        self._lock = threading.Lock()
        self._connection: BoundedConnection | None = None

    def wait(self, seconds: float) -> None:
        """Return on news, and at the latest after `seconds` or NEWS_SECONDS. It may return for no reason."""
        if not self._lock.acquire(blocking=False):
            time.sleep(min(seconds, _PAUSE_SECONDS))
            return
        try:
            self._listen(min(seconds, NEWS_SECONDS))
        except psycopg.Error:
            # Whoever reads next says what is wrong with the server.
            self._drop()
            time.sleep(min(seconds, _PAUSE_SECONDS))
        finally:
            self._lock.release()

    def _listen(self, seconds: float) -> None:
        if self._connection is None:
            # What was announced before is for the caller to find: it looks again after each wait.
            self._connection = self._connector.open(autocommit=True)
            self._connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
            self._connection.deadline = float("inf")
            return
        for _ in self._connection.notifies(timeout=seconds, stop_after=1):
            pass

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """Give the connection back. A wait in another thread ends."""
        self._drop()
