"""Sessions in a SQLite file: for one machine."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from knell import Notice, TokenRef
from services.sessions import TOMBSTONE_SECONDS, kept_out, names_in, names_of, written

PAGE = 1000
BUSY_SECONDS = 5.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, token TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS names (name TEXT, id TEXT, PRIMARY KEY (name, id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tombstones (
    name TEXT, notice_id TEXT, notice TEXT NOT NULL, until REAL NOT NULL, PRIMARY KEY (name, notice_id)
) WITHOUT ROWID;
"""


class SqliteSessions:
    """See `services.sessions.Sessions`.

    Args:
        path: the file; made when missing, and its folder too, for this account alone: a session's id opens it.
        clock: Unix seconds; for tests.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(path)
        self._clock = clock
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.touch(mode=0o600)  # SQLite's own files beside it get its mode
        with self._writing() as db:
            for statement in SCHEMA.split(";"):
                db.execute(statement)

    def open(self, token: TokenRef) -> str | None:
        """A new session's id; None if a tombstone says that the token's session has ended."""
        session_id, names = secrets.token_urlsafe(32), names_of(token)
        with self._writing() as db:
            for name in names:
                tombstones = db.execute("SELECT notice FROM tombstones WHERE name = ?", (name,))
                if kept_out(token, (notice for (notice,) in tombstones)):
                    return None
            db.execute("INSERT INTO sessions VALUES (?, ?)", (session_id, json.dumps(token.as_json())))
            db.executemany("INSERT INTO names VALUES (?, ?)", [(name, session_id) for name in names])
        return session_id

    def get(self, session_id: str) -> TokenRef | None:
        """The token that a session hangs on."""
        with self._reading() as db:
            return _token(db, session_id)

    def remove(self, session_id: str) -> TokenRef | None:
        """Remove one session."""
        with self._writing() as db:
            return _removed(db, session_id)

    def end(self, notice: Notice) -> list[TokenRef]:
        """Remove what the notice ends, and leave a tombstone."""
        now, ended = self._clock(), []
        with self._writing() as db:
            db.execute("DELETE FROM tombstones WHERE until <= ?", (now,))
            for name in names_in(notice):
                tombstone = (name, notice.id, written(notice), now + TOMBSTONE_SECONDS)
                db.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?, ?)", tombstone)
                for (session_id,) in db.execute("SELECT id FROM names WHERE name = ?", (name,)).fetchall():
                    token = _token(db, session_id)
                    if token is not None and notice.matches(token):
                        _removed(db, session_id)
                        ended.append(token)
        return ended

    def all(self) -> Iterator[tuple[str, TokenRef]]:
        """Every session."""
        after = ""
        while True:
            with self._reading() as db:
                page = db.execute("SELECT * FROM sessions WHERE id > ? ORDER BY id LIMIT ?", (after, PAGE)).fetchall()
            for session_id, token in page:
                yield session_id, TokenRef.from_claims(json.loads(token))
            if len(page) < PAGE:
                return
            after = page[-1][0]

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        # A connection for each call needs no care about threads and forks, and costs a tenth of a millisecond.
        with closing(sqlite3.connect(self._path, timeout=BUSY_SECONDS, isolation_level=None)) as db:
            yield db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._reading() as db:
            db.execute("BEGIN IMMEDIATE")
            with db:  # commits, or rolls back on an error
                yield db


def _token(db: sqlite3.Connection, session_id: str) -> TokenRef | None:
    found = db.execute("SELECT token FROM sessions WHERE id = ?", (session_id,)).fetchone()
    return None if found is None else TokenRef.from_claims(json.loads(found[0]))


def _removed(db: sqlite3.Connection, session_id: str) -> TokenRef | None:
    token = _token(db, session_id)
    if token is not None:
        db.execute("DELETE FROM sessions WHERE id = ?", (session_id,))
        db.executemany("DELETE FROM names WHERE name = ? AND id = ?", [(name, session_id) for name in names_of(token)])
    return token
