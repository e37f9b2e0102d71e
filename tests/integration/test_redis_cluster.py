"""The Redis store on a cluster of three nodes: slots that move, nodes that die."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from knell.errors import StoreUnavailable
from knell.follower import Follower
from knell.settings import Rules
from knell.stores.redis import RedisStore
from knell.stores.redis_cluster import slot_of
from knell.tokens import TokenRef
from tests.deployment import until
from tests.integration.test_redis_sentinel import BOUND_SECONDS, ISS, Writer, answers, ids, revoke, revoked
from tests.integration.test_redis_store import live
from tests.redis_servers import Cluster, ask
from tests.servers import RedisServer

pytestmark = pytest.mark.redis


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes for all tests of this module that leave them as they were."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.stop()


@pytest.fixture
def open_on(cluster: Cluster) -> Iterator[Callable[..., RedisStore]]:
    """Opens stores on the cluster and closes them after the test."""
    opened: list[RedisStore] = []

    def open_one(**more: Any) -> RedisStore:
        given: dict[str, Any] = {"namespace": f"t{uuid4().hex[:8]}", "rules": Rules()}
        opened.append(RedisStore(cluster.url, **given | more))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


class Move:
    """Moves a slot from its node to the next one, step by step, as `redis-cli --cluster reshard` does."""

    def __init__(self, cluster: Cluster, slot: int) -> None:
        self.slot = slot
        self._nodes = cluster.nodes
        self.source = cluster.node(slot)
        self.target = next(node for node in cluster.nodes if node is not self.source)
        self._source_id, self._target_id = cluster.id_of(self.source), cluster.id_of(self.target)

    def begin(self) -> None:
        self._set(self.target, "IMPORTING", self._source_id)
        self._set(self.source, "MIGRATING", self._target_id)

    def move_keys(self, count: int) -> int:
        """Move up to so many keys; returns how many there were."""
        with ask(self.source) as client:
            keys: Any = client.execute_command("CLUSTER", "GETKEYSINSLOT", self.slot, count)
            if keys:
                client.execute_command("MIGRATE", "127.0.0.1", self.target.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def end(self) -> None:
        for node in (self.target, self.source, *self._nodes):
            self._set(node, "NODE", self._target_id)

    def keys_at(self, node: RedisServer) -> int:
        with ask(node) as client:
            return int(client.execute_command("CLUSTER", "COUNTKEYSINSLOT", self.slot))

    def _set(self, node: RedisServer, *words: str) -> None:
        with ask(node) as client:
            client.execute_command("CLUSTER", "SETSLOT", self.slot, *words)


# ---- slots


def test_a_key_has_the_slot_that_the_server_says(cluster: Cluster) -> None:
    """The tags of the store, a key under each, and odd braces, lie where Redis says."""
    keys = ["{knell:feed}", "{knell:feed}:0:t:17", "{knell:15}:x:3", "plain", "{}a", "a{b}c{d}", "{open"]
    with ask(cluster.nodes[0]) as client:
        assert [slot_of(key) for key in keys] == [client.execute_command("CLUSTER", "KEYSLOT", key) for key in keys]


@pytest.mark.parametrize("partitions", [1, 3, 16])
def test_a_whole_life(open_on: Callable[..., RedisStore], partitions: int) -> None:
    """Everything from track to prune, over one slot, over about one on each node, and over several on each."""
    moment = [1_900_000_000.0]
    live(open_on(partitions=partitions, clock=lambda: moment[0]), moment, partitions=partitions)


def test_a_slot_is_moved_while_revocations_are_made(cluster: Cluster, open_on: Callable[..., RedisStore]) -> None:
    """Nothing runs on half of a slot, nothing that was acknowledged is lost, and followers read anew without alarm."""
    namespace = f"t{uuid4().hex[:8]}"
    store, other = open_on(namespace=namespace), open_on(namespace=namespace)
    follower = Follower(open_on(namespace=namespace), wait_seconds=1.0)
    follower.start()
    store.track([TokenRef(iss=ISS, jti=f"t{n}", exp=time.time() + 600 + n, sid=f"k{n}") for n in range(200)])
    epoch = store.head().epoch
    writer = Writer(other)
    try:
        until(lambda: len(writer.acknowledged) > 100, what="a hundred writes")
        move = Move(cluster, slot_of(store._feed))
        move.begin()
        moved = move.move_keys(20)
        assert moved == 20
        # A key that is still where it was may be read; scripts are refused whole.
        for call in (partial(revoke, store, "now"), partial(store.session, ISS, "k1"), partial(store.due, before=0)):
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="moving a slot"):
                call()
            assert time.monotonic() - began < BOUND_SECONDS
        assert move.keys_at(move.target) == moved
        while move.move_keys(100):
            pass
        move.end()
        until(partial(answers, store), what="a write at the new node")
        writer.stop()
        assert move.keys_at(move.source) == 0
        assert store.head().epoch.split(".")[0] == epoch.split(".")[0]
        assert store.head().epoch != epoch
        assert {*writer.acknowledged, "after"} <= revoked(store)
        assert store.session(ISS, "k199") is not None
        until(lambda: "r-after" in ids(follower) and follower.resyncs > 0, what="a follower at the new node")
        assert follower.alarms == 0
        assert {f"r-{sid}" for sid in writer.acknowledged} <= ids(follower)
    finally:
        writer.stop()
        follower.close()


def test_a_slot_that_has_moved_is_found(cluster: Cluster, open_on: Callable[..., RedisStore]) -> None:
    """A store that knows the old place follows MOVED within the call, for a partition and for the feed."""
    store = open_on(partitions=3)
    refs = [TokenRef(iss=ISS, jti=f"t{n}", exp=time.time() + 600, sid=f"s{n}") for n in range(30)]
    store.track(refs)
    for tag in (store._feed, store._tag(1)):
        move = Move(cluster, slot_of(tag))
        move.begin()
        while move.move_keys(100):
            pass
        move.end()
        assert revoke(store, f"of {tag}")
        assert [answer.must_arm for answer in store.track(refs)] == [()] * 30
    assert store.head().position == 2


def test_an_operator_is_told_of_each_node(cluster: Cluster, open_on: Callable[..., RedisStore]) -> None:
    """What is wrong with one node names it, and nothing is said of nodes that are not used."""
    store = open_on(partitions=16)
    assert store.warnings() == []
    node = cluster.node(slot_of(store._tag(1)))
    with ask(node) as client:
        client.config_set("appendonly", "no")
        [warning] = store.warnings()
        client.config_set("appendonly", "yes")
    assert warning.startswith(f"127.0.0.1:{node.port}: appendonly is off")


def test_a_url_of_one_server_is_told_what_it_is(cluster: Cluster) -> None:
    """A cluster's node behind redis:// is a warning, or an error that says what to write."""
    feed = cluster.node(slot_of("{knell:feed}"))
    for node in cluster.nodes:
        store = RedisStore(node.url, namespace="knell", rules=Rules())
        assert any("redis+cluster://" in warning for warning in store.warnings())
        if node is not feed:
            with pytest.raises(StoreUnavailable, match=r"redis\+cluster://"):
                store.head()
        store.close()


# ---- nodes


def test_a_node_that_dies_is_replaced_by_its_replica(tmp_path: Path) -> None:
    """The feed's node is killed in the middle of writes: its replica takes over, with all that was acknowledged."""
    cluster = Cluster(tmp_path / "cluster")
    try:
        node = cluster.node(slot_of("{knell:feed}"))
        seed = next(each for each in cluster.nodes if each is not node)
        cluster.add_replica(tmp_path / "replica", node)
        # Only the feed's node has a replica, and one partition needs no other node.
        hosts = f"127.0.0.1:{node.port},127.0.0.1:{seed.port}"
        safe = RedisStore(f"redis+cluster://{hosts}?min_replicas=1&wait_ms=400", namespace="knell", rules=Rules())
        plain = RedisStore(f"redis+cluster://{hosts}", namespace="knell", rules=Rules())
        epoch = plain.head().epoch
        writer = Writer(safe)
        try:
            until(lambda: len(writer.acknowledged) > 100, what="a hundred writes")
            node.kill()
            until(partial(answers, plain), what="a write at the new primary")
        finally:
            writer.stop()
        assert set(writer.acknowledged) <= revoked(plain)
        assert writer.slowest_seconds < BOUND_SECONDS
        assert plain.head().epoch.split(".")[0] == epoch.split(".")[0]
        assert plain.head().epoch != epoch
        for store in (safe, plain):
            store.close()
    finally:
        cluster.stop()


def test_a_frozen_node_is_an_error_within_bounds(cluster: Cluster, open_on: Callable[..., RedisStore]) -> None:
    """What needs a node that does not answer fails in time; what needs another works."""
    store = open_on(partitions=16)
    assert revoke(store, "s1")
    assert store.due(before=time.time()) == []
    feed = cluster.node(slot_of(store._feed))
    [frozen, *_] = [node for node in cluster.nodes if node is not feed]
    frozen.suspend()
    try:
        assert revoke(store, "s2")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.due(before=time.time())
        assert time.monotonic() - began < BOUND_SECONDS
    finally:
        frozen.resume()
    until(partial(_works, store), what="a call to every node")


def _works(store: RedisStore) -> bool:
    try:
        return store.due(before=time.time()) == []
    except StoreUnavailable:
        return False
