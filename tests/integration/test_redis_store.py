"""What only the Redis store promises: bounded errors, epochs, compact values, one slot a script."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from structlog.testing import capture_logs

from knell.errors import CursorLost, InvalidSettings, StoreUnavailable
from knell.notices import Receipt, batch_id_of_revocation, partition_of_batch
from knell.revocations import make_revocation
from knell.settings import Rules
from knell.store import Claim, Parked
from knell.stores.redis import RedisStore
from knell.tokens import TokenRef
from tests.contract.making import noted
from tests.proxy import Proxy
from tests.servers import RedisServer, free_port, start_redis

pytestmark = pytest.mark.redis

ISS = "https://issuer.example"
# Two attempts to connect and to read, half a second each, and what a busy machine adds.
BOUND_SECONDS = 3.5


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, which it may stop, freeze and empty."""
    one = start_redis(tmp_path)
    yield one
    one.stop()


@pytest.fixture
def open_on() -> Iterator[Callable[..., RedisStore]]:
    """Opens stores by URL and closes them after the test."""
    opened: list[RedisStore] = []

    def open_one(url: str, *, namespace: str = "knell", rules: Rules | None = None, **more: Any) -> RedisStore:
        opened.append(RedisStore(url, namespace=namespace, rules=rules or Rules(), **more))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(redis_url: str, open_on: Callable[..., RedisStore]) -> RedisStore:
    return open_on(redis_url, namespace=f"t{uuid4().hex}")


@pytest.fixture
def own(server: RedisServer, open_on: Callable[..., RedisStore]) -> RedisStore:
    """A store on a server of the test's own."""
    return open_on(server.url)


def make_token(n: int, *, source: random.Random | None = None, exp: float | None = None, **more: Any) -> TokenRef:
    """A token with every field, as an issuer makes them."""
    source = source or random.Random(n)
    now = int(time.time())
    fields: dict[str, Any] = {
        "iss": ISS,
        "jti": _uuid(source),
        "exp": exp if exp is not None else float(now + 60 + source.randrange(900)),
        "iat": float(now),
        "sid": _uuid(source),
        "sub": str(UUID(int=n // 2 + 2**100)),
        "client_id": f"client-{n % 5}",
        "kid": "key-1",
        "auth_time": now - source.randrange(3_600_000) / 1000,
        "session_exp": float(now + 3600 + source.randrange(28_800)),
    }
    return TokenRef(**(fields | more))


def _uuid(source: random.Random) -> str:
    return str(UUID(int=source.getrandbits(128), version=4))


def revoke(store: RedisStore, value: str, *, scope: str = "session", **more: Any) -> None:
    claim = {"token": "jti", "session": "sid", "subject": "sub"}[scope]
    made = make_revocation(scope, {claim: value}, iss=ISS, now=store.time(), rules=store.rules, **more)
    store.revoke(made, batch_id=batch_id_of_revocation(made.id), jws="a.b.c", audit=noted(made))


def wait_for(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def lost(store: RedisStore, cursor: Any) -> CursorLost:
    with pytest.raises(CursorLost) as caught:
        store.changes(cursor)
    return caught.value


# ---- the feed's epoch


def test_a_restart_is_another_epoch_but_no_loss(server: RedisServer, own: RedisStore) -> None:
    """After a clean restart a cursor is lost, and nothing went back."""
    revoke(own, "s1")
    cursor = own.head()
    server.stop()
    server.start()
    assert not lost(own, cursor).went_back
    assert own.head().position == 1
    assert [change.revocation.value for change in own.snapshot()] == ["s1"]


def test_an_emptied_store_went_back(server: RedisServer, own: RedisStore) -> None:
    """FLUSHALL is noticed as lost data, even when new revocations have brought the head as far again."""
    revoke(own, "s1")
    cursor = own.head()
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
    assert lost(own, cursor).went_back
    revoke(own, "s2")
    assert lost(own, cursor).went_back
    assert own.changes(own.head()) == []


def test_a_restored_older_state_went_back(server: RedisServer, own: RedisStore) -> None:
    """A head behind the cursor is lost data."""
    revoke(own, "s1")
    ahead = own.head()
    with redis.Redis.from_url(server.url) as client:
        client.hset("{knell:feed}:m", "pos", 0)
    assert lost(own, ahead).went_back


def test_changes_that_a_crash_took_are_noticed_though_there_are_as_many_new_ones(
    tmp_path: Path, open_on: Callable[..., RedisStore]
) -> None:
    """What was not on the disk is lost; the change at the cursor tells, however far the head has come since."""
    server = start_redis(tmp_path, extra=["--appendonly", "no"])
    try:
        store = open_on(server.url)
        revoke(store, "kept")
        with redis.Redis.from_url(server.url) as client:
            client.save()
        kept = store.head()
        revoke(store, "lost")
        cursor = store.head()
        server.kill()
        server.start()
        for value in ("new1", "new2"):
            revoke(store, value)
        assert store.head().position == cursor.position + 1
        assert not lost(store, kept).went_back
        assert lost(store, cursor).went_back
    finally:
        server.kill()


def test_a_waiting_reader_notices_an_emptied_store(server: RedisServer, own: RedisStore) -> None:
    """A reader that waits for changes finds out within about a second that the store was emptied."""
    revoke(own, "s1")
    cursor = own.head()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own.changes, cursor, wait_seconds=30)
        with redis.Redis.from_url(server.url) as client:
            wait_for(lambda: client.info("clients")["blocked_clients"] == 1)
            client.flushall()
        with pytest.raises(CursorLost):
            waiting.result(15)


def test_a_change_wakes_a_waiting_reader(store: RedisStore) -> None:
    """A reader that waits gets a revocation long before its wait is over."""
    cursor = store.head()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.changes, cursor, wait_seconds=60)
        revoke(store, "s1")
        assert [change.revocation.value for change in waiting.result(20)] == ["s1"]


def test_an_empty_wait_is_an_empty_list(store: RedisStore) -> None:
    """Nothing new within the wait is an empty list."""
    assert store.changes(store.head(), wait_seconds=0.2) == []


# ---- errors


def test_a_frozen_server_is_an_error_within_bounds(server: RedisServer, own: RedisStore) -> None:
    """Every call on a frozen server ends in StoreUnavailable within a bounded time, and works again afterwards."""
    token = make_token(1)
    own.track([token])
    cursor = own.head()
    calls: list[Callable[[], object]] = [
        lambda: own.track([token]),
        own.head,
        lambda: own.changes(cursor, wait_seconds=30),
        lambda: revoke(own, "s1"),
        own.ping,
    ]
    server.suspend()
    try:
        for call in calls:
            began = time.monotonic()
            with pytest.raises(StoreUnavailable):
                call()
            assert time.monotonic() - began < BOUND_SECONDS
    finally:
        server.resume()
    wait_for(lambda: _answers(own.ping))


def _answers(call: Callable[[], object]) -> bool:
    try:
        call()
    except StoreUnavailable:
        return False
    return True


def test_a_gone_server_is_an_error_that_names_it(server: RedisServer, open_on: Callable[..., RedisStore]) -> None:
    """The error says host and port, and never the password."""
    server.stop()
    store = open_on(server.url.replace("redis://", "redis://user:s3cret@"))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"127.0.0.1:{server.port}") as caught:
        store.track([make_token(1)])
    assert time.monotonic() - began < BOUND_SECONDS
    assert "s3cret" not in str(caught.value)


def test_a_wrong_password_is_an_error_without_it(redis_server: RedisServer, open_on: Callable[..., RedisStore]) -> None:
    """A refused login is StoreUnavailable, and its text has no password."""
    store = open_on(f"redis://nobody:s3cret@127.0.0.1:{redis_server.port}/0")
    with pytest.raises(StoreUnavailable) as caught:
        store.ping()
    assert "s3cret" not in str(caught.value)


def test_a_failover_that_keeps_connections_open_is_followed(
    server: RedisServer, own: RedisStore, tmp_path: Path, open_on: Callable[..., RedisStore]
) -> None:
    """Where open connections lead to what has become a replica, the store opens new ones, which lead to the primary."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("repl-diskless-sync-delay", 0)
    other = start_redis(tmp_path / "other", extra=["--replicaof", "127.0.0.1", str(server.port)])
    proxy = Proxy(server.port)
    try:
        store = open_on(f"redis://127.0.0.1:{proxy.port}/0")
        store.track([make_token(1)])
        with redis.Redis.from_url(server.url) as old, redis.Redis.from_url(other.url) as new:
            wait_for(lambda: new.info("replication")["master_link_status"] == "up")
            new.replicaof("NO", "ONE")
            old.replicaof("127.0.0.1", other.port)
        proxy._target = other.port
        assert store.track([make_token(2)])[0].must_arm
        revoke(store, "s1")
        assert [change.revocation.value for change in open_on(other.url).snapshot()] == ["s1"]
    finally:
        proxy.close()
        other.kill()


def test_every_idle_connection_survives_a_restart(server: RedisServer, own: RedisStore) -> None:
    """Connections that died with the server are replaced without an error, however many there were."""
    gate = threading.Barrier(4)

    def ask(_: int) -> float:
        gate.wait(20)
        return own.time()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    server.stop()
    server.start()
    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(ask, range(4)))) == 4


def test_a_server_that_keeps_no_scripts_is_unavailable(own: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a balancer what loads scripts may not be what runs them: that is an error, not a call for ever."""
    loads: list[int] = []

    def elsewhere(commands: object) -> None:
        loads.append(1)
        assert len(loads) < 100

    monkeypatch.setattr(own._link, "_load", elsewhere)
    own._link.run(("SCRIPT", "FLUSH"))
    with pytest.raises(StoreUnavailable, match="keeps no scripts"):
        own.services()
    with pytest.raises(StoreUnavailable, match="keeps no scripts"):
        own.track([TokenRef(iss=ISS, jti="t1", exp=time.time() + 60)])


def test_lost_scripts_are_loaded_again(server: RedisServer, own: RedisStore) -> None:
    """SCRIPT FLUSH costs a round trip and no error."""
    token = make_token(1)
    own.track([token])
    with redis.Redis.from_url(server.url) as client:
        client.script_flush()
    revoke(own, token.jti, scope="token")
    with redis.Redis.from_url(server.url) as client:
        client.script_flush()
    assert own.track([token])[0].denied is not None


def test_a_full_server_is_unavailable(server: RedisServer, own: RedisStore) -> None:
    """Out of memory under noeviction is StoreUnavailable; what only reads still works."""
    revoke(own, "s1")
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 1)
    with pytest.raises(StoreUnavailable, match="OutOfMemory"):
        own.track([make_token(1)])
    assert own.head().position == 1


def test_a_replica_is_read_and_not_written(
    server: RedisServer, own: RedisStore, tmp_path: Path, open_on: Callable[..., RedisStore]
) -> None:
    """On a read-only replica the feed can be read, and a write is StoreUnavailable."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("repl-diskless-sync-delay", 0)
    empty = start_redis(tmp_path / "replica", extra=["--replicaof", "127.0.0.1", str(server.port)])
    try:
        replica = open_on(empty.url)
        with redis.Redis.from_url(empty.url) as client:
            wait_for(lambda: client.info("replication")["master_link_status"] == "up")
        assert replica.head().position == 0
        revoke(own, "s1")
        wait_for(lambda: replica.head().position == 1)
        assert replica.head() == own.head()
        assert [change.revocation.value for change in replica.snapshot()] == ["s1"]
        with pytest.raises(StoreUnavailable, match="ReadOnly"):
            replica.track([make_token(1)])
    finally:
        empty.kill()


@pytest.mark.parametrize("url", ["redis://localhost:nonsense/0", "redis://localhost:6379/0?socket_timeout=soon"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    """A URL that redis-py cannot read is InvalidSettings."""
    with pytest.raises(InvalidSettings):
        RedisStore(url, namespace="knell", rules=Rules())


def test_a_unix_socket_works(tmp_path: Path, open_on: Callable[..., RedisStore]) -> None:
    """A server is reached over its socket, and named by the socket's path when it is gone."""
    path = Path(f"/tmp/knell-{uuid4().hex[:12]}.sock")  # a socket's path must be short
    server = start_redis(tmp_path, extra=["--unixsocket", str(path)])
    store = open_on(f"unix://{path}")
    try:
        assert store.ping().startswith(("Redis ", "Valkey "))
    finally:
        server.stop()
    with pytest.raises(StoreUnavailable, match=path.name):
        store.ping()


def test_what_an_operator_should_change_is_told(server: RedisServer, own: RedisStore) -> None:
    """A well-kept server gives no warnings; without AOF, or with eviction, it gives one each."""
    assert own.warnings() == []
    with redis.Redis.from_url(server.url) as client:
        client.config_set("appendonly", "no")
        client.config_set("maxmemory-policy", "allkeys-lru")
    appendonly, policy = own.warnings()
    assert "appendonly" in appendonly
    assert "allkeys-lru" in policy


def test_a_store_survives_a_fork(store: RedisStore) -> None:
    """A child uses connections of its own; the parent's stay usable."""
    store.track([make_token(1)])
    child = os.fork()
    if child == 0:
        try:
            store.track([make_token(n) for n in range(50)])
            os._exit(0)
        except BaseException:  # the child must end here, whatever happens
            os._exit(1)
    for n in range(50):
        store.track([make_token(n)])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- size and slots


def test_tokens_are_kept_compact(server: RedisServer, own: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of about 60 tokens keep their compact encoding, at less than 250 bytes a token."""
    count = 20_000
    # As full as 16,384 hashes are with a million tokens.
    monkeypatch.setattr("knell.stores.redis_tokens.BUCKETS", 328)
    source = random.Random(1)
    # The first call brings the scripts.
    own.track([make_token(n, source=source) for n in range(2000)])
    with redis.Redis.from_url(server.url) as client:
        before = client.info("memory")["used_memory"]
        for start in range(2000, count, 2000):
            own.track([make_token(n, source=source) for n in range(start, start + 2000)])
        used = client.info("memory")["used_memory"] - before
        for kind in ("t", "s", "x"):
            keys = list(client.scan_iter(match=f"{{knell:feed}}:0:{kind}:*", count=1000))
            assert {client.object("encoding", key) for key in keys} == {b"listpack"}
    assert used / (count - 2000) < 250


def test_a_store_keeps_its_number_of_buckets(
    redis_url: str, open_on: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version with another default still finds what an earlier one wrote."""
    namespace = f"t{uuid4().hex}"
    token = make_token(1)
    open_on(redis_url, namespace=namespace).track([token])
    monkeypatch.setattr("knell.stores.redis_tokens.BUCKETS", 99)
    assert open_on(redis_url, namespace=namespace).detach(ISS, token.jti, revocation_id="r").ref == token


def test_another_number_of_partitions_is_refused(redis_url: str, open_on: Callable[..., RedisStore]) -> None:
    """A process with another KNELL_PARTITIONS than the store's would miss tokens: it is told so."""
    namespace = f"t{uuid4().hex}"
    open_on(redis_url, namespace=namespace, partitions=2).track([make_token(n) for n in range(20)])
    with pytest.raises(InvalidSettings, match="KNELL_PARTITIONS=2"):
        open_on(redis_url, namespace=namespace, partitions=1).track([make_token(n) for n in range(20)])


def test_a_whole_life_over_four_partitions(tmp_path: Path) -> None:
    """Track, detach, revoke, claim, receipts, services, parked, dedupe and prune, each script in one slot, no scan."""
    # By default the cluster's port is 10,000 above the other, which may be no port.
    cluster = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    server = start_redis(tmp_path, extra=[*cluster, "--databases", "1"])
    moment = [1_900_000_000.0]
    store = RedisStore(server.url, namespace="knell", rules=Rules(), partitions=4, clock=lambda: moment[0])
    try:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        wait_for(lambda: _answers(store.head))
        live(store, moment, partitions=4)
        with redis.Redis.from_url(server.url) as client:
            used = set(client.info("commandstats"))
        assert "cmdstat_evalsha" in used
        assert any("redis+cluster://" in warning for warning in store.warnings())
        # Each looks at every key of the server, whosever it is.
        assert not {"cmdstat_keys", "cmdstat_scan", "cmdstat_flushdb", "cmdstat_flushall"} & used
    finally:
        store.close()
        server.stop()


def live(store: RedisStore, moment: list[float], *, partitions: int) -> None:
    """Everything once, from track to prune; the store's clock is `moment`."""
    second = int(moment[0]) + 60
    refs = [TokenRef(iss=ISS, jti=f"t{n}", exp=float(second), iat=moment[0], sid=f"s{n}", kid="k") for n in range(1200)]
    assert store.add_service("shop")
    answers = store.track(refs)
    assert [at for answer in answers for at in answer.must_arm] == [second]
    store.armed([second])
    assert store.track(refs[:100])[0].must_arm == ()
    assert store.due(before=second) == [second]
    assert store.detach(ISS, "t7", revocation_id="r7").ends_session
    store.attach(ISS, "t7", revocation_id="r7")
    assert store.session(ISS, "s7") == moment[0]
    revoke(store, "s3", id="r3")
    assert store.track([refs[3]])[0].denied is not None
    moment[0] = second + 0.5
    told, batches = [], []
    while (claim := store.claim(second, services=["shop"])) is not None:
        told += [entry.ref.jti for entry in claim.entries]
        batches.append(claim.batch_id)
        if not claim.more:
            break
    assert sorted(told) == sorted(ref.jti for ref in refs)
    assert {partition_of_batch(batch) for batch in batches} == set(range(partitions))
    assert store.due(before=second) == []
    store.settle(batches[0], dead=[0, 1])
    moment[0] += 40
    found = store.open_notices()
    assert {notice.batch_id for notice in found} == {*batches, batch_id_of_revocation("r3")}
    store.resend_at(batches, 0)
    store.receive([("shop", Receipt(batch_id=one, at=moment[0], done=range(500))) for one in batches[1:]])
    store.receive([("shop", Receipt(batch_id=batch_id_of_revocation("r3"), at=moment[0], done=[0]))])
    assert [notice.batch_id for notice in store.open_notices()] == batches[:1]
    status = store.status("r3")
    assert status is not None
    assert status["shop"].state == "done"
    store.park([Parked(id="shop/x.0", service="shop", queue="q", error="e", at=moment[0], jws="a.b.c")])
    assert store.unpark([one.id for one in store.parked()]) == 1
    assert store.begin("shop", batches[0], holder="me", lease_seconds=5).granted
    assert store.lease("sweep", holder="me", seconds=5)
    moment[0] += Rules().retention_seconds + 5
    assert store.prune().missed == {"shop": second + 0.5}
    assert store.remove_service("shop")
    assert store.open_notices() == []


# ---- answers that are lost on their way


def lose_first_answers(store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the answers to whatever was not sent before are lost on their way, as by a time-out."""
    run, sent = store._link._pipeline, set()

    def run_twice(commands: Any) -> list[Any]:
        answers = run(commands)
        if tuple(commands) not in sent:
            sent.add(tuple(commands))
            raise redis.TimeoutError("lost on its way")
        return answers

    monkeypatch.setattr(store._link, "_pipeline", run_twice)


def _fill(store: RedisStore, moment: list[float]) -> None:
    """Something of everything; the store's clock then stands where half of it is due."""
    store.add_service("shop")
    revoke(store, "s1", id="r1")
    began = moment[0]

    def tracked(n: int, ends_in: float, **more: Any) -> TokenRef:
        return make_token(n, exp=began + ends_in, **({"iat": began, "auth_time": began, "session_exp": None} | more))

    store.track([tracked(n, 60 + n % 2) for n in range(20)] + [tracked(20, 30, session_exp=began + 61)])
    store.track([tracked(21, 31, sid=tracked(20, 30).sid, session_exp=began + 90)])
    store.park([Parked(id=f"shop/x.{n}", service="shop", queue="q", error="e", at=moment[0]) for n in range(3)])
    store.begin("shop", "e0-x", holder="me", lease_seconds=30)
    moment[0] += 61
    store.claim(int(moment[0]) - 1, services=["shop"])
    store.mark_missed("shop", moment[0])


def _claimed(claim: Claim | None) -> object:
    assert claim is not None
    return bool(claim.batch_id), claim.entries, claim.rearm, claim.more, claim.closed


CALLS: dict[str, Callable[[RedisStore], object]] = {
    "revoke": lambda store: _revoked(store, "new"),
    "revoke again": lambda store: _revoked(store, "r1"),
    "track": lambda store: (
        store.track([make_token(99, exp=store.time() + 60, iat=None, session_exp=store.time() + 90)])[0].must_arm
    ),
    "track denied": lambda store: (
        store.track([make_token(99, exp=store.time() + 60, sid="s1", session_exp=store.time() + 90)])[0].denied,
        store.session(ISS, "s1"),
        store.due(before=store.time() + 1000),
    ),
    "claim": lambda store: _claimed(store.claim(int(store.time()), services=["shop"], limit=6)),
    "claim for nobody": lambda store: _claimed(store.claim(int(store.time()), services=[], limit=6)),
    "open_notices": lambda store: [(notice.kind, notice.attempts) for notice in store.open_notices()],
    "mark_missed": lambda store: (store.mark_missed("shop", 5.0), store.services(), store.open_notices() != [])[1:],
    "add_service": lambda store: store.add_service("new"),
    "add_service again": lambda store: store.add_service("shop"),
    "remove_service": lambda store: store.remove_service("shop"),
    "begin": lambda store: store.begin("shop", "e0-x", holder="another", lease_seconds=5),
    "mark": lambda store: store.mark("shop", "e0-x", holder="me", done=1, lease_seconds=5),
    "mark and give back": lambda store: store.mark("shop", "e0-x", holder="me", done=1, lease_seconds=0),
    "lease": lambda store: store.lease("sweep", holder="me", seconds=5),
    "unpark": lambda store: store.unpark(["shop/x.0", "shop/x.1"]),
}


def _revoked(store: RedisStore, id: str) -> object:
    made = make_revocation("session", {"sid": "s9"}, iss=ISS, now=store.time(), rules=store.rules, id=id)
    recorded = store.revoke(made, batch_id=batch_id_of_revocation(id), jws="a.b.c", audit=noted(made))
    return recorded.created, recorded.services, recorded.cursor.position


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_that_is_sent_again_is_answered_as_the_first_time(
    redis_url: str, open_on: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch, call: Callable[..., object]
) -> None:
    """When answers are lost on their way, the second run recognises what the first has done."""
    moment = [0.0]
    answers = []
    for unlucky in (False, True):
        moment[0] = 1_900_000_000.0
        store = open_on(redis_url, namespace=f"t{uuid4().hex}", clock=lambda: moment[0])
        _fill(store, moment)
        if unlucky:
            lose_first_answers(store, monkeypatch)
        answers.append(call(store))
    assert answers[0] == answers[1]


def test_a_prune_that_is_sent_again_counts_what_the_first_removed(
    redis_url: str, open_on: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that was removed is in the answer, though a second run finds it gone."""
    moment = [1_900_000_000.0]
    store = open_on(redis_url, namespace=f"t{uuid4().hex}", clock=lambda: moment[0])
    _fill(store, moment)
    moment[0] += Rules().max_session_seconds + Rules().retention_seconds + 2 * 86_400
    lose_first_answers(store, monkeypatch)
    pruned = store.prune()
    assert (pruned.revocations, pruned.notices, pruned.dedupe, pruned.parked) == (1, 2, 1, 3)
    assert set(pruned.missed) == {"shop"}


def test_a_store_that_nobody_prunes_does_not_grow(redis_url: str, open_on: Callable[..., RedisStore]) -> None:
    """A service's own dedupe store has no notifier: its old records go while it begins new batches."""
    moment = [1_900_000_000.0]
    store = open_on(redis_url, namespace=f"t{uuid4().hex}", clock=lambda: moment[0])
    for n in range(10):
        store.begin("shop", f"e0-{n}", holder="me", lease_seconds=5)
    store.begin("partner", "e0-0", holder="me", lease_seconds=5)
    moment[0] += Rules().retention_seconds + 2 * 86_400
    for n in range(10, 14):
        store.begin("shop", f"e0-{n}", holder="me", lease_seconds=5)
    # What is left to the notifier: nothing of the shop's, and the partner's, which has begun nothing since.
    assert store.prune().dedupe == 1


def test_what_keeps_answers_goes_by_itself(server: RedisServer, own: RedisStore) -> None:
    """An answer is kept for seconds, and nothing else has a time to live."""
    own.add_service("shop")
    own.track([make_token(1)])
    revoke(own, "s1")
    with redis.Redis.from_url(server.url) as client:
        timed = {key: client.ttl(key) for key in client.scan_iter() if client.ttl(key) != -1}
    assert len(timed) == 2
    assert all(b":a:" in key and 0 < seconds <= 5 for key, seconds in timed.items())


# ---- what is there in numbers, or cannot be read


def test_thousands_of_revocations_of_one_subject_hold_nobody_up(server: RedisServer, own: RedisStore) -> None:
    """Neither a look-up nor their removal makes a script that blocks the server."""
    moment = own.time()
    store = RedisStore(server.url, namespace="many", rules=Rules(), clock=lambda: moment)
    with redis.Redis.from_url(server.url) as client:
        for _ in range(3000):
            revoke(store, "alice", scope="subject")
        client.config_set("slowlog-log-slower-than", 0)
        client.slowlog_reset()
        assert store.track([make_token(1, sub="alice", iat=None, auth_time=None)])[0].denied is not None
        moment += 40 * 86_400
        assert store.prune().revocations == 1000
        slowest = max(entry["duration"] for entry in client.slowlog_get(100))
    store.close()
    assert slowest < 300_000  # microseconds; a list that is rewritten for each entry takes seconds


def test_a_record_that_cannot_be_read_is_left_out(
    redis_url: str, open_on: Callable[..., RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One broken record keeps no other from being sent; it is logged once."""
    moment, namespace = [1_900_000_000.0], f"t{uuid4().hex}"
    store = open_on(redis_url, namespace=namespace, clock=lambda: moment[0])
    second = int(moment[0]) + 60
    store.track([make_token(n, exp=float(second + n), session_exp=None) for n in range(2)])
    moment[0] = second + 1.0
    claims = [store.claim(second + n, services=["shop"]) for n in range(2)]
    broken, whole = (claim.batch_id for claim in claims if claim is not None)
    with redis.Redis.from_url(redis_url) as client:
        client.hset(f"{{{namespace}:feed}}:0:n:{broken}", "b", b"\0\0\0\5broken")
    with capture_logs() as logs:
        for _ in range(2):
            moment[0] += 3600
            assert [notice.batch_id for notice in store.open_notices()] == [whole]
    assert [(one["event"], one["log_level"], one["batch_id"]) for one in logs] == [
        ("notice_unreadable", "error", broken)
    ]
