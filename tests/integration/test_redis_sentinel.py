"""The Redis store where a replica takes the primary's place: what is found again, and what is still there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from knell.errors import StoreUnavailable
from knell.follower import Follower
from knell.notices import batch_id_of_revocation
from knell.revocations import make_revocation
from knell.settings import Rules
from knell.stores.redis import RedisStore
from knell.stores.redis_link import script
from knell.tokens import TokenRef
from tests.contract.making import noted
from tests.deployment import until
from tests.redis_servers import Sentinels, ask, replicate
from tests.servers import RedisServer, start_redis

pytestmark = pytest.mark.redis

ISS = "https://issuer.example"
# Sentinels are asked, then two attempts to connect and to read, and what a busy machine adds.
BOUND_SECONDS = 5.0


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    """Sentinels of the test's own, whose primary it may kill."""
    made = Sentinels(tmp_path)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    """Sentinels for the tests that leave everything as it was."""
    made = Sentinels(tmp_path_factory.mktemp("sentinels"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary and its replica."""
    directory = tmp_path_factory.mktemp("pair")
    primary = start_redis(directory / "primary")
    replica = replicate(directory / "replica", primary)
    yield primary, replica
    replica.kill()
    primary.kill()


def open_at(url: str, namespace: str = "knell") -> RedisStore:
    return RedisStore(url, namespace=namespace, rules=Rules())


def revoke(store: RedisStore, sid: str) -> bool:
    """Revoke a session under an id of its own; whether that was new."""
    made = make_revocation("session", {"sid": sid}, iss=ISS, now=time.time(), rules=store.rules, id=f"r-{sid}")
    return store.revoke(made, batch_id=batch_id_of_revocation(made.id), jws="a.b.c", audit=noted(made)).created


def revoked(store: RedisStore) -> set[str]:
    return {change.revocation.value for change in store.snapshot(limit=100_000)}


def ids(follower: Follower) -> set[str]:
    return {revocation.id for revocation in follower.denylist}


def answers(store: RedisStore) -> bool:
    try:
        revoke(store, "after")
    except StoreUnavailable:
        return False
    return True


class Writer:
    """Revokes one session after another, in a thread, and knows which were acknowledged."""

    def __init__(self, store: RedisStore) -> None:
        self.acknowledged: list[str] = []
        self.slowest_seconds = 0.0
        self._store = store
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()

    def _write(self) -> None:
        n = 0
        while not self._ends.is_set():
            began = time.monotonic()
            try:
                revoke(self._store, f"s{n}")
                self.acknowledged.append(f"s{n}")
            except StoreUnavailable:
                self._ends.wait(0.05)
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)
            n += 1


# ---- sentinels


def test_a_failover_is_followed_and_loses_nothing_that_replicas_had(sentinels: Sentinels) -> None:
    """The primary is killed in the middle of writes: its replica is found, and has all that was acknowledged."""
    safe, plain = open_at(f"{sentinels.url}&min_replicas=1&wait_ms=400"), open_at(sentinels.url)
    follower = Follower(open_at(sentinels.url), wait_seconds=1.0)
    follower.start()
    assert follower.wait_ready(20)
    writer = Writer(safe)
    try:
        until(lambda: len(writer.acknowledged) > 100, what="a hundred writes")
        sentinels.primary.kill()
        until(partial(answers, plain), what="a write at the new primary")
        writer.stop()
        assert sentinels.named() == sentinels.replica.port
        assert set(writer.acknowledged) <= revoked(plain)
        assert writer.slowest_seconds < BOUND_SECONDS
        until(lambda: "r-after" in ids(follower) and follower.resyncs > 0, what="a follower at the new primary")
        assert follower.alarms == 0
        assert {f"r-{sid}" for sid in writer.acknowledged} <= ids(follower)
    finally:
        writer.stop()
        follower.close()
        safe.close()
        plain.close()


def test_a_primary_that_sentinels_have_given_up_is_left(sentinels: Sentinels) -> None:
    """One that was cut off, and takes itself for the primary still, is not read for longer than a second."""
    store = open_at(sentinels.url)
    revoke(store, "before")
    cursor = store.head()
    with ask(sentinels.replica) as new:
        until(lambda: new.info("replication")["master_repl_offset"] > 0)
        new.replicaof("NO", "ONE")
    for port in sentinels.ports:
        sentinels.point(port, sentinels.replica)
    direct = open_at(sentinels.replica.url)
    revoke(direct, "after")
    until(lambda: store.head().position == 2, what="a head that is read from the new primary")
    assert store.head().epoch != cursor.epoch
    assert revoked(store) == {"before", "after"}
    for each in (store, direct):
        each.close()


def test_sentinels_that_do_not_answer_are_passed_over(lasting: Sentinels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen sentinel costs a call a part of its time; without any, the primary that is known is used on."""
    lasting.suspend_sentinel(0)
    store = open_at(lasting.url)
    began = time.monotonic()
    assert revoke(store, "s1")
    assert time.monotonic() - began < BOUND_SECONDS
    for n in (1, 2):
        lasting.suspend_sentinel(n)
    assert revoke(store, "s2")
    assert store.head().position == 2
    fresh = open_at(lasting.url)
    with pytest.raises(StoreUnavailable, match="do not say where the primary is"):
        fresh.head()
    for n in range(3):
        lasting.resume_sentinel(n)
    # One that a sentinel names, and that is no primary, is not written to, nor read.
    monkeypatch.setattr(fresh._link._servers, "_ask", lambda: ("127.0.0.1", lasting.replica.port))
    with pytest.raises(StoreUnavailable, match="it is a b'replica'"):
        fresh.time()
    for each in (store, fresh):
        each.close()


def test_what_sentinels_refuse_is_told_without_secrets(lasting: Sentinels) -> None:
    """A wrong password, and a name that no sentinel knows, are StoreUnavailable and say which it is."""
    for url, text in (
        (lasting.url.replace("s%25t", "wr0ng"), "AuthenticationError"),
        (lasting.url.replace("mymaster", "other"), "knows a primary called 'other'"),
    ):
        store = open_at(url)
        with pytest.raises(StoreUnavailable, match=text) as caught:
            store.time()
        assert "wr0ng" not in str(caught.value)
        store.close()


# ---- replicas that must have what is acknowledged


def test_what_too_few_replicas_have_is_not_acknowledged(pair: tuple[RedisServer, RedisServer]) -> None:
    """It is written and said not to be safe; the same call again is acknowledged once a replica has it."""
    primary, replica = pair
    store = open_at(f"{primary.url}?min_replicas=1&wait_ms=100", namespace=f"t{uuid4().hex}")
    ref = TokenRef(iss=ISS, jti="t1", exp=time.time() + 600, sid="living")
    assert revoke(store, "s0")
    replica.suspend()
    try:
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
                revoke(store, "s1")
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
            store.track([ref])
        # What only reads waits for nobody.
        assert store.head().position == 2
        assert store.session(ISS, "living") is not None
    finally:
        replica.resume()
    until(partial(_acknowledged, store, "s1"), what="an acknowledgement")
    assert not revoke(store, "s1")
    assert store.track([ref])[0].must_arm == ()
    store.close()


def _acknowledged(store: RedisStore, sid: str) -> bool:
    try:
        revoke(store, sid)
    except StoreUnavailable:
        return False
    return True


def test_a_call_that_is_sent_again_waits_for_replicas_as_well(pair: tuple[RedisServer, RedisServer]) -> None:
    """A call whose answer was lost is answered from what it kept, and is not taken for safe because of that."""
    primary, replica = pair
    store = open_at(f"{primary.url}?min_replicas=1&wait_ms=100", namespace=f"t{uuid4().hex}")
    store.time()
    replica.suspend()
    try:
        command = script("add_service", store._feed, "", "shop")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas"):
                store._link.run(command)
    finally:
        replica.resume()
    store.close()


def test_an_operator_is_told_about_replicas(pair: tuple[RedisServer, RedisServer]) -> None:
    """Replicas that nobody waits for, and too few of them, are warnings; enough of them are none."""
    primary, _ = pair
    for options, text in (("", "min_replicas=1"), ("?min_replicas=1", None), ("?min_replicas=2", "nothing can be")):
        store = open_at(f"{primary.url}{options}")
        warnings = store.warnings()
        assert (text is None and warnings == []) or (text is not None and text in warnings[0])
        store.close()
