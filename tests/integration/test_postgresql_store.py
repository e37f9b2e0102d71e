"""What is PostgreSQL's own: writers side by side, servers that go away or change places, and time limits."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any
from uuid import uuid4

import pytest

from knell.errors import CursorLost, StoreUnavailable
from knell.notices import batch_id_of_revocation
from knell.settings import Rules
from knell.stores import migrate, postgresql_link, sql_feed, sql_house, sql_postgresql, sql_tokens
from knell.stores.sql import SqlStore
from knell.stores.sql_database import DENYLIST, DENYLIST_READ, LOG_ADD, Lock, Tx
from knell.stores.sql_ledger import Ledger, read_ref
from tests.contract.making import BEGAN, ISS, Clock, noted, record, revocation, token
from tests.deployment import until
from tests.proxy import Proxy
from tests.schemas import Schemas
from tests.servers import PostgresServer, free_port, start_postgresql

pytestmark = pytest.mark.postgresql
RULES = Rules()
# Nobody is held up for so long by what works.
PATIENCE_SECONDS = 20.0


@pytest.fixture
def namespace(schemas: Schemas) -> Iterator[str]:
    """A schema of the test's own on the shared server."""
    name = f"t{uuid4().hex[:12]}"
    schemas.lend(name)
    yield name
    schemas.take_back(name)


@pytest.fixture
def open_on(namespace: str) -> Iterator[Callable[..., SqlStore]]:
    """Opens stores in that schema, with a clock that stands still, and closes them after the test."""
    opened = []

    def open_one(url: str, **options: Any) -> SqlStore:
        opened.append(SqlStore(url, **{"namespace": namespace, "rules": RULES, "clock": Clock()} | options))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(schemas: Schemas, open_on: Callable[..., SqlStore]) -> SqlStore:
    return open_on(schemas.url)


@pytest.fixture
def own() -> Iterator[PostgresServer]:
    """A server of the test's own, to be killed, with a schema "knell"."""
    server = start_postgresql(extra=["-c", "wal_level=replica"])
    migrate.upgrade(server.url, namespace="knell")
    yield server
    server.remove()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


class Paused:
    """A transaction that has done its step, in a thread, and waits before its commit."""

    def __init__(self, pool: ThreadPoolExecutor, store: SqlStore, step: Callable[[Tx], Any], *locks: Lock) -> None:
        self._go_on, done = threading.Event(), threading.Event()

        def paused(tx: Tx) -> Any:
            found = step(tx)
            done.set()
            self._go_on.wait(PATIENCE_SECONDS)
            return found

        self._future = pool.submit(store._database.write, paused, *locks)
        assert done.wait(PATIENCE_SECONDS)

    def commit(self) -> Any:
        self._go_on.set()
        return self._future.result(PATIENCE_SECONDS)


def revoking(value: str) -> Callable[[Tx], Any]:
    made = revocation("session", value)
    batch_id = batch_id_of_revocation(made.id)
    return lambda tx: sql_feed.revoke(tx, made, batch_id=batch_id, jws="a.b.c", audit=noted(made))


def tracking(jti: str, sid: str) -> Callable[[Tx], Any]:
    return lambda tx: sql_tokens.track(tx, [token(jti, sid=sid)], must_continue=False, predecessor=(), claims=None)


def waits(server: PostgresServer, count: int = 1) -> None:
    """Wait until so many backends wait for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    until(lambda: server.sql(query)[0][0] >= count, what=f"{count} waiting for a lock")


# ---- side by side


def test_positions_become_visible_in_order(
    store: SqlStore, pool: ThreadPoolExecutor, postgresql_server: PostgresServer
) -> None:
    """Of two interleaved revocations the second waits for the first's commit: no reader sees 2 before 1, or a gap."""
    start = store.head()
    first = Paused(pool, store, revoking("s1"), LOG_ADD, DENYLIST)
    second = pool.submit(record, store, revocation("session", "s2"))
    waits(postgresql_server)
    assert store.changes(start) == []
    assert first.commit().cursor.position == 1
    assert second.result(PATIENCE_SECONDS).cursor.position == 2
    assert [(one.position, one.revocation.value) for one in store.changes(start)] == [(1, "s1"), (2, "s2")]


def test_a_revocation_that_is_rolled_back_leaves_no_gap(store: SqlStore) -> None:
    """Positions are given out by what is committed."""

    def fails(tx: Tx) -> None:
        revoking("s1")(tx)
        raise KeyError

    with pytest.raises(KeyError):
        store._database.write(fails, LOG_ADD, DENYLIST)
    assert record(store, revocation("session", "s2")).cursor.position == 1


def test_a_track_waits_for_a_revocation_under_way(
    store: SqlStore, pool: ThreadPoolExecutor, postgresql_server: PostgresServer
) -> None:
    """The second of the two sees the first: the token is denied."""
    revoke = Paused(pool, store, revoking("s1"), LOG_ADD, DENYLIST)
    track = pool.submit(store.track, [token(sid="s1")])
    waits(postgresql_server)
    revoke.commit()
    [answer] = track.result(PATIENCE_SECONDS)
    assert answer.denied is not None


def test_a_revocation_waits_for_a_track_under_way(
    store: SqlStore, pool: ThreadPoolExecutor, postgresql_server: PostgresServer
) -> None:
    """The other way round: what was tracked is in the store before the revocation is."""
    track = Paused(pool, store, tracking("t1", "s1"), DENYLIST_READ)
    revoke = pool.submit(record, store, revocation("session", "s1"))
    waits(postgresql_server)
    assert store.head().position == 0
    assert track.commit()[0].denied is None
    assert revoke.result(PATIENCE_SECONDS).created
    assert store.session(ISS, "s1") is not None


def test_tracks_of_other_sessions_do_not_wait(store: SqlStore, pool: ThreadPoolExecutor) -> None:
    """Logins into the same second go on while one of them has not committed."""
    store.track([token("t0", sid="s0")])
    slow = Paused(pool, store, tracking("t1", "s1"), DENYLIST_READ)
    assert store.track([token("t2", sid="s2")])[0].denied is None
    store.armed([int(BEGAN) + 60])
    assert store.session(ISS, "s1") is None
    slow.commit()
    assert store.session(ISS, "s1") is not None


def test_tracks_of_one_session_count_both(store: SqlStore, pool: ThreadPoolExecutor) -> None:
    """Two first tokens of a session at once: one makes its record, the other runs again, and joins it."""
    first = Paused(pool, store, tracking("t1", "s1"), DENYLIST_READ)
    second = pool.submit(store.track, [token("t2", sid="s1")])
    first.commit()
    second.result(PATIENCE_SECONDS)
    assert not store.detach(ISS, "t1", revocation_id="r1").ends_session
    assert store.detach(ISS, "t2", revocation_id="r2").ends_session


def test_a_lease_has_one_holder(store: SqlStore, pool: ThreadPoolExecutor) -> None:
    """Of two copies that ask for a batch at once, which nobody has had, one is granted."""
    first = Paused(pool, store, lambda tx: sql_house.begin(tx, "shop", "b1", holder="one", lease_seconds=30.0))
    second = pool.submit(store.begin, "shop", "b1", holder="two", lease_seconds=30.0)
    assert first.commit().granted
    assert not second.result(PATIENCE_SECONDS).granted


def test_claimers_share_a_second_side_by_side(store: SqlStore, pool: ThreadPoolExecutor) -> None:
    """A claim takes what another one under way does not have, without waiting for it."""
    clock = store._database._clock  # type: ignore[attr-defined]
    store.track([token(f"t{n}", sid=f"s{n}") for n in range(6)])
    clock.reach(BEGAN + 60)
    second = int(BEGAN) + 60
    slow = Paused(pool, store, lambda tx: Ledger(tx).load_second(second, 3), LOG_ADD)
    quick = store.claim(second, services=["shop"], limit=3)
    assert quick is not None
    assert len(quick.entries) == 3
    assert quick.more
    tokens, _ = slow.commit()
    taken = {entry.ref.jti for entry in quick.entries} | {read_ref(row.ref).jti for row in tokens}
    assert len(taken) == 6


def test_a_service_that_is_removed_is_waited_for_by_nobody(
    store: SqlStore, pool: ThreadPoolExecutor, postgresql_server: PostgresServer
) -> None:
    """A revocation that has read the list of services is there before the removal looks at the log."""
    store.add_service("shop")
    revoke = Paused(pool, store, revoking("s1"), LOG_ADD, DENYLIST)
    remove = pool.submit(store.remove_service, "shop")
    waits(postgresql_server)
    revoke.commit()
    assert remove.result(PATIENCE_SECONDS)
    store._database._clock.advance(3600)  # type: ignore[attr-defined]
    assert store.open_notices() == []


def test_a_deadlock_is_run_again(store: SqlStore, pool: ThreadPoolExecutor) -> None:
    """Two steps that take the same rows in opposite orders both get done."""
    both, runs = threading.Barrier(2), []

    def step(*names: str) -> Callable[[Tx], None]:
        def run(tx: Tx) -> None:
            tx.add(names[0], 1)
            runs.append(names)
            if len(runs) <= 2:
                both.wait(PATIENCE_SECONDS)
            tx.add(names[1], 1)

        return run

    tasks = [pool.submit(store._database.write, step(*names)) for names in (("head", "trimmed"), ("trimmed", "head"))]
    for task in tasks:
        task.result(PATIENCE_SECONDS)
    assert len(runs) == 3
    assert store._database.read(lambda tx: (tx.counter("head"), tx.counter("trimmed"))) == (2, 2)


@pytest.mark.parametrize("state", ["40001", "40P01", "23505"])
def test_what_two_could_not_do_at_once_is_run_again_within_bounds(store: SqlStore, state: str) -> None:
    """Nothing of the first run is left; and what never succeeds is an error in the end."""
    runs = []

    def fails(times: int) -> Callable[[Tx], None]:
        def run(tx: Tx) -> None:
            tx.add("head", 1)
            runs.append(times)
            if len(runs) <= times:
                tx.connection.exec_driver_sql(f"DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$")

        return run

    store._database.write(fails(3))
    assert len(runs) == 4
    assert store._database.read(lambda tx: tx.counter("head")) == 1
    with pytest.raises(StoreUnavailable):
        store._database.write(fails(10**9), patience_seconds=0.2)


# ---- bounds


def test_a_pool_that_is_used_up_is_an_error_that_says_so(
    schemas: Schemas, open_on: Callable[..., SqlStore], pool: ThreadPoolExecutor
) -> None:
    """No more connections than pool_size are opened; who gets none is told how many there are."""
    store = open_on(f"{schemas.url}?pool_size=1")
    busy = Paused(pool, store, revoking("s1"), LOG_ADD, DENYLIST)
    with pytest.raises(StoreUnavailable, match="all 1 connections of this process were busy"):
        store.head()
    busy.commit()
    assert store.head().position == 1


def test_a_lock_that_is_kept_too_long_is_an_error(store: SqlStore, pool: ThreadPoolExecutor) -> None:
    """A caller gives up, and its turn is not taken later."""
    busy = Paused(pool, store, revoking("s1"), LOG_ADD, DENYLIST)
    with pytest.raises(StoreUnavailable, match=r"try again|did not answer"):
        store.track([token(sid="s1")])
    busy.commit()
    assert store.session(ISS, "s1") is None


def test_a_client_that_stops_in_the_middle_holds_nobody_up_for_long(
    store: SqlStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends its transaction; it learns that what it asked for was not done."""
    store.head()
    monkeypatch.setattr(sql_postgresql, "IDLE_SECONDS", 0.3)
    sql_postgresql._beginning.cache_clear()
    stopped = Paused(pool, store, revoking("s1"), LOG_ADD, DENYLIST)
    monkeypatch.undo()
    sql_postgresql._beginning.cache_clear()
    assert record(store, revocation("session", "s2")).cursor.position == 1
    with pytest.raises(StoreUnavailable):
        stopped.commit()


def test_a_frozen_server_is_an_error_within_bounds(
    postgresql_server: PostgresServer, schemas: Schemas, open_on: Callable[..., SqlStore]
) -> None:
    """Nothing comes back on a connection that stays open: a call ends all the same, and the next one works."""
    with closing(Proxy(postgresql_server.port)) as proxy:
        store = open_on(schemas.url.replace(f":{postgresql_server.port}/", f":{proxy.port}/"))
        record(store, revocation("token", "t1"))
        proxy.freeze()
        with pytest.raises(StoreUnavailable, match="did not answer in time"):
            store.head()
        until(lambda: _position(store) == 1, what="a new connection")


def _position(store: SqlStore) -> int | None:
    try:
        return store.head().position
    except StoreUnavailable:
        return None


def test_no_error_shows_the_password(postgresql_server: PostgresServer, open_on: Callable[..., SqlStore]) -> None:
    """Not the error, nor what it was caused by; the host is named."""
    gone = f"postgresql://admin:hunter2@127.0.0.1:{free_port()}/postgres"
    for url, said in (
        (postgresql_server.url_of("admin", "hunter2"), "password authentication failed"),
        (postgresql_server.url_of("nobody", "hunter2"), "password authentication failed"),
        (postgresql_server.url_of("admin", "hunter2").replace("/postgres", "/none"), "failed"),
        (gone, "refused"),
    ):
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1") as error:
            open_on(url).head()
        assert said in str(error.value)
        assert "hunter2" not in "".join(traceback.format_exception(error.value))


def test_no_error_shows_what_was_asked_for(store: SqlStore) -> None:
    """A statement's parameters are people's identifiers."""

    private = uuid4().hex

    def fails(tx: Tx) -> None:
        tx.connection.exec_driver_sql("SELECT %(x)s::text, 1 / 0", {"x": private})

    with pytest.raises(StoreUnavailable, match="division by zero") as error:
        store._database.write(fails)
    assert private not in "".join(traceback.format_exception(error.value))


# ---- news


def test_a_change_wakes_a_waiting_reader(
    store: SqlStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is announced: the reader does not come upon it by looking again and again."""
    monkeypatch.setattr(postgresql_link, "NEWS_SECONDS", 600.0)
    looked = []
    changes = sql_feed.changes
    monkeypatch.setattr(sql_feed, "changes", lambda *args, **more: looked.append(1) or changes(*args, **more))
    cursor = store.head()
    for n in range(3):
        waiting = pool.submit(store.changes, cursor, wait_seconds=600.0)
        until(lambda n=n: len(looked) >= (2 if n == 0 else 1), what="the reader has found nothing")
        made = revocation("token", f"t{n}")
        record(store, made)
        [change] = waiting.result(PATIENCE_SECONDS)
        assert change.revocation == made
        cursor = cursor.after(change)
        looked.clear()


def test_without_news_the_reader_looks_every_so_often(
    store: SqlStore, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind what keeps announcements back, a change is seen all the same; an empty wait is an empty list."""
    monkeypatch.setattr(postgresql_link, "NEWS_SECONDS", 0.1)
    monkeypatch.setattr(Tx, "announce", lambda self: None)
    cursor = store.head()
    assert store.changes(cursor, wait_seconds=0.2) == []
    waiting = pool.submit(store.changes, cursor, wait_seconds=600.0)
    record(store, revocation("token", "t1"))
    assert len(waiting.result(PATIENCE_SECONDS)) == 1


def test_a_reader_of_another_namespace_is_not_woken(
    store: SqlStore, schemas: Schemas, open_on: Callable[..., SqlStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each namespace has a channel of its own."""
    other = f"t{uuid4().hex[:12]}"
    schemas.lend(other)
    monkeypatch.setattr(postgresql_link, "NEWS_SECONDS", 0.3)
    reader = open_on(schemas.url, namespace=other)
    reader._database.wait(1.0)  # it listens from now on
    record(store, revocation("token", "t1"))
    began = time.monotonic()
    reader._database.wait(1.0)
    assert time.monotonic() - began >= 0.3
    reader.close()
    schemas.take_back(other)


# ---- processes and servers


def test_a_store_works_on_both_sides_of_a_fork(store: SqlStore) -> None:
    """A child uses the object that its parent opened, over connections of its own, and so does the parent."""
    record(store, revocation("token", "before"))
    store.changes(store.head(), wait_seconds=0.01)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for n in range(5):
                record(store, revocation("token", f"child-{n}"))
            code = 0
        finally:
            os._exit(code)
    for n in range(5):
        record(store, revocation("token", f"parent-{n}"))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert [change.position for change in store.snapshot()] == list(range(1, 12))


def test_a_closed_store_cannot_be_used(store: SqlStore) -> None:
    """After close every method says that the store was closed."""
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.head()


def test_a_killed_server_has_everything_when_it_is_back(own: PostgresServer) -> None:
    """The same store object goes on, and readers read on: nothing that was committed is lost."""
    with closing(SqlStore(own.url, namespace="knell", rules=RULES)) as store:
        start = store.head()
        record(store, revocation("token", "t1"))
        own.kill()
        with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1"):
            store.head()
        own.start()
        record(store, revocation("token", "t2"))
        assert [change.revocation.value for change in store.changes(start)] == ["t1", "t2"]


def test_a_standby_takes_over(own: PostgresServer) -> None:
    """A URL with both servers: writes go to the one that takes them, and readers learn that some may be lost."""
    standby = start_postgresql(copy_of=own)
    try:
        url = own.url.replace(f"127.0.0.1:{own.port}", f"127.0.0.1:{standby.port},127.0.0.1:{own.port}")
        with closing(SqlStore(url, namespace="knell", rules=RULES)) as store:
            made = revocation("token", "t1")
            cursor = record(store, made).cursor
            replayed = "SELECT count(*) FROM knell.denylist"
            until(lambda: standby.sql(replayed) == [(1,)], what="the standby has it")
            own.kill()
            with pytest.raises(StoreUnavailable):
                store.head()
            standby.promote()
            with pytest.raises(CursorLost) as lost:
                store.changes(cursor)
            assert not lost.value.went_back
            assert [change.revocation for change in store.snapshot()] == [made]
            assert record(store, revocation("token", "t2")).cursor.position == 2
    finally:
        standby.remove()


def test_tables_out_of_a_dump_are_another_epoch(
    store: SqlStore, namespace: str, postgresql_server: PostgresServer
) -> None:
    """On the same server, with the same content: what came after the dump is lost."""
    cursor = record(store, revocation("token", "t1")).cursor
    postgresql_server.sql(
        f"ALTER TABLE {namespace}.meta RENAME TO old_meta",
        f"CREATE TABLE {namespace}.meta AS SELECT * FROM {namespace}.old_meta",
    )
    with pytest.raises(CursorLost):
        store.changes(cursor)
    postgresql_server.sql(f"DROP TABLE {namespace}.meta", f"ALTER TABLE {namespace}.old_meta RENAME TO meta")
    assert store.changes(cursor) == []


def test_the_clock_is_the_server_s(
    schemas: Schemas, open_on: Callable[..., SqlStore], postgresql_server: PostgresServer
) -> None:
    """Without a clock of its own the store tells what the server says, when the locks are there."""
    store = open_on(schemas.url, clock=None)
    [(before,)] = postgresql_server.sql("SELECT extract(epoch FROM clock_timestamp())::float8")
    told = store.time()
    [(after,)] = postgresql_server.sql("SELECT extract(epoch FROM clock_timestamp())::float8")
    assert before <= told <= after


def test_what_an_operator_should_change_is_told(store: SqlStore) -> None:
    """Tests run without fsync; a deployment should not."""
    assert store.ping().startswith("PostgreSQL ")
    [warning] = store.warnings()
    assert warning.startswith("fsync is off")


def test_many_threads_share_a_small_pool(schemas: Schemas, open_on: Callable[..., SqlStore]) -> None:
    """More callers than connections: each gets its turn, and every token is there."""
    store = open_on(f"{schemas.url}?pool_size=2&application_name=knell-crowd")
    with ThreadPoolExecutor(8) as crowd:
        tasks: list[Future[Any]] = [
            crowd.submit(store.track, [token(f"t{n}", sid=f"s{n % 5}", ends_in=60 + n % 3)]) for n in range(80)
        ]
        for task in tasks:
            task.result(PATIENCE_SECONDS)
    count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'knell-crowd'"
    assert store._database.read(lambda tx: tx.connection.exec_driver_sql(count).scalar()) == 2
    assert (
        store._database.read(
            lambda tx: tx.connection.exec_driver_sql(f"SELECT sum(live) FROM {tx.tables.namespace}.sessions").scalar()
        )
        == 80
    )
