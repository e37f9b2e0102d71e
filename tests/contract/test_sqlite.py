"""What is SQLite's own: one file, several processes, and everything that may happen to a file."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from knell.errors import CursorLost, InvalidSettings, StoreUnavailable
from knell.settings import Rules
from knell.store import Parked, Store
from knell.stores.sql import SqlStore
from tests.contract.making import BEGAN, Clock, claim_one, record, revocation, token


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "not" / "there yet" / "store.db"


@pytest.fixture
def open_file(path: Path, open_at: Callable[..., Store]) -> Callable[[], Store]:
    return lambda: open_at(f"sqlite:///{path}", namespace="knell")


def _remove(path: Path) -> None:
    for file in path.parent.glob(path.name + "*"):
        file.unlink()


def test_the_directory_is_made(open_file: Callable[[], Store], path: Path) -> None:
    """A store needs nothing but a path."""
    open_file()
    assert path.exists()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///", "mysql://host/name"])
def test_a_url_without_a_file_is_refused(url: str) -> None:
    """Several processes share the store, so it has to be a file of SQLite's."""
    with pytest.raises(InvalidSettings):
        SqlStore(url, namespace="knell", rules=Rules())


def test_the_clock_is_this_hosts(path: Path) -> None:
    """Without a clock of its own the store tells the host's time."""
    store = SqlStore(f"sqlite:///{path}", namespace="knell", rules=Rules())
    assert abs(store.time() - time.time()) < 60
    store.close()


def test_what_is_no_database_is_unavailable(open_file: Callable[[], Store], path: Path) -> None:
    """A file that SQLite cannot read is said so, with what to do."""
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(StoreUnavailable, match="not a database"):
        open_file()


def test_a_newer_schema_is_refused(open_file: Callable[[], Store], path: Path) -> None:
    """Code that is older than the file says so, and leaves it alone."""
    open_file().close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE knell_meta SET value = '99' WHERE name = 'schema'")
    connection.close()
    with pytest.raises(StoreUnavailable, match="version 99"):
        open_file()


def test_a_file_of_an_older_knell_gets_what_it_lacks(open_file: Callable[[], Store], path: Path) -> None:
    """Tables that came later are made beside the old ones, which stay as they are."""
    store = open_file()
    record(store, revocation("token", "t1"))
    store.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TABLE knell_audit")
    store = open_file()
    record(store, revocation("token", "t2"))
    assert [change.position for change in store.snapshot()] == [1, 2]
    assert len(store.audit()) == 1


def test_a_closed_store_cannot_be_used(open_file: Callable[[], Store]) -> None:
    """After close every method says that the store was closed."""
    store = open_file()
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.head()


def test_a_locked_file_is_unavailable_within_a_bound(open_file: Callable[[], Store], path: Path) -> None:
    """While another process holds the file, writers give up after about 2 s, and readers read on."""
    store = open_file()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="locked"):
        store.track([token()])
    assert time.monotonic() - began < 10
    assert store.due(before=BEGAN + 1000) == []
    other.close()
    assert store.track([token()])[0].must_arm


def test_a_recreated_file_has_a_new_epoch(open_file: Callable[[], Store], path: Path) -> None:
    """A store object whose file was deleted goes on with a new one, and readers learn that data was lost."""
    store, reader = open_file(), open_file()
    record(store, revocation("token", "t1"))
    head = reader.head()
    _remove(path)
    record(store, revocation("token", "t2"))
    with pytest.raises(CursorLost) as lost:
        reader.changes(head)
    assert lost.value.went_back
    assert reader.head().epoch != head.epoch
    assert [change.revocation.value for change in reader.snapshot()] == ["t2"]


def test_a_restored_backup_is_another_epoch(open_file: Callable[[], Store], path: Path) -> None:
    """A copy that was put in the place of the file makes readers take a snapshot."""
    store = open_file()
    record(store, revocation("token", "t1"))
    store.close()
    backup = path.with_name("backup")
    shutil.copy(path, backup)
    store = open_file()
    record(store, revocation("token", "t2"))
    head = store.head()
    store.close()
    _remove(path)
    backup.rename(path)
    with pytest.raises(CursorLost) as lost:
        open_file().changes(head)
    assert lost.value.went_back


def _in_child(url: str, name: str, gate: multiprocessing.synchronize.Barrier) -> None:
    gate.wait(30)
    store = SqlStore(url, namespace="knell", rules=Rules(), clock=lambda: BEGAN)
    for n in range(10):
        record(store, revocation("token", f"{name}-{n}"))
    store.close()


def test_processes_that_start_together_make_one_store(path: Path, open_file: Callable[[], Store]) -> None:
    """Four processes open a file that is not there; it is made once, and no write is lost."""
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(4)
    children = [context.Process(target=_in_child, args=(f"sqlite:///{path}", f"p{n}", gate)) for n in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    store = open_file()
    assert [change.position for change in store.snapshot()] == list(range(1, 41))


def test_a_store_works_on_both_sides_of_a_fork(open_file: Callable[[], Store]) -> None:
    """A child process uses the store object that its parent opened, and so does the parent, at the same time."""
    store = open_file()
    record(store, revocation("token", "before"))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for n in range(20):
                record(store, revocation("token", f"child-{n}"))
            code = 0
        finally:
            os._exit(code)
    for n in range(20):
        record(store, revocation("token", f"parent-{n}"))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert [change.position for change in store.snapshot()] == list(range(1, 42))


def test_a_backup_that_was_copied_over_the_file_is_noticed(open_file: Callable[[], Store], path: Path) -> None:
    """It keeps its inode, and new revocations have brought the head as far again: the change at the cursor tells."""
    store = open_file()
    record(store, revocation("token", "t1"))
    store.close()
    backup = path.with_name("backup")
    shutil.copy(path, backup)
    store = open_file()
    record(store, revocation("token", "lost"))
    cursor = store.head()
    store.close()
    path.write_bytes(backup.read_bytes())
    store = open_file()
    for value in ("new1", "new2"):
        record(store, revocation("token", value))
    assert store.head().epoch == cursor.epoch
    with pytest.raises(CursorLost) as lost:
        store.changes(cursor)
    assert lost.value.went_back


def test_the_files_are_their_owners_alone(open_file: Callable[[], Store], path: Path) -> None:
    """Folder and files are made for nobody else, whatever the umask; what is there stays as it is."""
    before = os.umask(0)
    try:
        store = open_file()
        record(store, revocation("token", "t1"))
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == dict.fromkeys(
        ("store.db", "store.db-wal", "store.db-shm"), 0o600
    )
    store.close()
    path.chmod(0o640)
    path.parent.chmod(0o750)
    open_file()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o640, 0o750)


def test_a_parked_batch_takes_the_room_of_one_jws(open_file: Callable[[], Store], path: Path) -> None:
    """500 entries that were parked with one JWS of 100 KB take little more than that, and give it back."""
    store = open_file()
    store.park(
        [Parked(id=f"{n}", service="shop", queue="q", error="no", at=BEGAN, jws="j" * 100_000) for n in range(500)]
    )
    with closing(sqlite3.connect(path)) as connection:
        [(size,)] = connection.execute("PRAGMA page_count").fetchall()
        assert size * 4096 < 1_000_000
        store.unpark([f"{n}" for n in range(500)])
        assert connection.execute("SELECT count(*) FROM knell_parked_jws").fetchall() == [(0,)]


def test_a_record_that_cannot_be_read_is_left_out(open_file: Callable[[], Store], path: Path, clock: Clock) -> None:
    """One broken record keeps no other from being sent; it is logged once."""
    store = open_file()
    store.track([token("t1"), token("t2", ends_in=61)])
    clock.reach(BEGAN + 61)
    broken, whole = (claim_one(store, int(BEGAN) + at).batch_id for at in (60, 61))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE knell_notices SET entries = 'broken' WHERE batch_id = ?", (broken,))
    with capture_logs() as logs:
        for _ in range(2):
            clock.advance(3600)
            assert [notice.batch_id for notice in store.open_notices()] == [whole]
    assert [(one["event"], one["log_level"], one["batch_id"]) for one in logs] == [
        ("notice_unreadable", "error", broken)
    ]
