"""Parked entries, named leases, prune, and what an operator sees."""

from __future__ import annotations

import pytest

from knell.settings import Rules
from knell.store import Parked, Store
from tests.contract.conftest import MakeStore
from tests.contract.making import BEGAN, Clock, claim_one, done, open_again, record, revocation, token

BASE = int(BEGAN)


def parked(id: str, service: str = "shop", **more: object) -> Parked:
    return Parked(**({"id": id, "service": service, "queue": "q", "error": "no", "at": BEGAN} | more))  # type: ignore[arg-type]


# ---- parked entries


def test_parked_entries_come_back_whole(store: Store) -> None:
    """A notice's entry and a message that is no notice are kept with all that is known of them."""
    notice = parked("shop/e0-1.3", attempts=7, notice_id="e0-1.3", jws="a.b.c", error="ünklar: {x}", at=BEGAN + 0.5)
    message = parked("zz", service="", queue="knell.dead", body=bytes(range(256)) * 256)
    store.park([notice, message])
    assert store.parked() == [notice, message]


def test_an_error_is_kept_whatever_it_says(store: Store) -> None:
    """Others wrote it; a NUL, which PostgreSQL has not, may have become another character."""
    store.park([parked("p1", error="a\0b\u2028'"), parked("p2")])
    first, second = store.parked()
    assert first.error.replace("\0", "\ufffd") == "a\ufffdb\u2028'"
    assert second.error == "no"


def test_parked_entries_are_paged_by_id(store: Store) -> None:
    """Pages are in the order of the ids, of one service or of all."""
    store.park([parked(f"shop/{n:03}") for n in reversed(range(25))])
    store.park([parked("partner/1", "partner"), parked("", "")][:1])
    assert [one.id for one in store.parked(limit=3)] == ["partner/1", "shop/000", "shop/001"]
    page = store.parked(service="shop", limit=10)
    found = list(page)
    while page:
        page = store.parked(service="shop", after=page[-1].id, limit=10)
        found += page
    assert [one.id for one in found] == [f"shop/{n:03}" for n in range(25)]
    assert [one.id for one in store.parked(service="partner")] == ["partner/1"]
    assert store.parked(service="nobody") == []


def test_an_id_that_is_parked_again_is_replaced(store: Store) -> None:
    """The last word counts, within one call as well."""
    store.park([parked("a", error="first"), parked("a", error="second")])
    store.park([parked("a", error="third", service="partner")])
    assert [(one.error, one.service) for one in store.parked()] == [("third", "partner")]
    assert store.parked(service="shop") == []
    store.park([])


def test_unpark_says_how_many_there_were(store: Store) -> None:
    """Removing parked entries counts those that existed."""
    store.park([parked("a"), parked("b"), parked("c")])
    assert store.unpark(["a", "c", "zz"]) == 2
    assert store.unpark(["a"]) == 0
    assert store.unpark([]) == 0
    assert [one.id for one in store.parked()] == ["b"]


def test_entries_of_one_batch_share_their_jws(store: Store, clock: Clock) -> None:
    """However entries come and go, each that is left has its whole JWS."""
    store.park([parked(f"one/{n}", jws="j" * 1000, at=BEGAN + n) for n in range(4)])
    store.park([parked("two/0", jws="k" * 1000), parked("one/0", jws="k" * 1000, at=BEGAN)])
    store.unpark(["one/1", "two/0"])
    assert [(one.id, one.jws) for one in store.parked()] == [
        ("one/0", "k" * 1000),
        ("one/2", "j" * 1000),
        ("one/3", "j" * 1000),
    ]
    clock.reach(BEGAN + 2.5 + Rules().retention_seconds)
    assert store.prune().parked == 2
    assert [(one.id, one.jws) for one in store.parked()] == [("one/3", "j" * 1000)]


# ---- leases


def test_a_lease_has_one_holder(store: Store, clock: Clock) -> None:
    """It is taken, renewed, lost when it runs out, and given back with 0 seconds."""
    assert store.lease("sweep", holder="a", seconds=10)
    assert not store.lease("sweep", holder="b", seconds=10)
    assert store.lease("other", holder="b", seconds=10)
    clock.advance(9)
    assert store.lease("sweep", holder="a", seconds=10)
    clock.advance(9)
    assert not store.lease("sweep", holder="b", seconds=10)
    clock.advance(2)
    assert store.lease("sweep", holder="b", seconds=10)
    assert not store.lease("sweep", holder="a", seconds=10)
    store.lease("sweep", holder="b", seconds=0)
    assert store.lease("sweep", holder="a", seconds=10)


def test_only_the_holder_gives_a_lease_back(store: Store) -> None:
    """Another's 0 seconds leave it where it is."""
    store.lease("sweep", holder="a", seconds=10)
    store.lease("sweep", holder="b", seconds=0)
    assert not store.lease("sweep", holder="c", seconds=10)


# ---- prune


def test_prune_of_nothing_removes_nothing(store: Store) -> None:
    """An empty store, and one in which all is young, has nothing to prune."""
    store.add_service("shop")
    record(store, revocation("session", "s1"))
    store.park([parked("a")])
    found = store.prune()
    assert (found.revocations, found.changes, found.notices, found.dedupe, found.parked) == (0, 0, 0, 0, 0)
    assert dict(found.missed) == {}


def test_open_records_past_the_retention_are_missed(store: Store, clock: Clock) -> None:
    """A service that stayed away loses the records and is marked as having missed some, since the oldest of them."""
    store.add_service("shop")
    store.add_service("partner")
    store.track([token("t1"), token("t2", ends_in=70)])
    clock.reach(BEGAN + 60)
    first = claim_one(store, BASE + 60, services=["shop", "partner"]).batch_id
    clock.reach(BEGAN + 70)
    second = claim_one(store, BASE + 70, services=["shop", "partner"]).batch_id
    done(store, "partner", first)
    done(store, "partner", second)
    clock.advance(Rules().retention_seconds + 5)
    found = store.prune()
    assert found.notices == 2
    assert dict(found.missed) == {"shop": BEGAN + 60}
    assert {one.name: one.missed_since for one in store.services()} == {"shop": BEGAN + 60, "partner": None}
    store.resend_at([first, second], 0)
    assert [(notice.kind, notice.since) for notice in store.open_notices()] == [("missed", BEGAN + 60)]


def test_a_missed_record_is_not_forgotten(store: Store, clock: Clock) -> None:
    """However long a service stays away, it is told on its return since when it missed."""
    store.add_service("shop")
    store.mark_missed("shop", BEGAN)
    for _ in range(4):
        clock.advance(Rules().retention_seconds)
        store.prune()
    assert store.services()[0].missed_since == BEGAN
    assert any(notice.kind == "missed" for notice in store.open_notices())


def test_parked_entries_leave_after_the_retention(store: Store, clock: Clock) -> None:
    """Parked entries are kept for the retention."""
    store.park([parked("old"), parked("young", at=BEGAN + 100)])
    clock.advance(Rules().retention_seconds + 50)
    assert store.prune().parked == 1
    assert [one.id for one in store.parked()] == ["young"]


def test_beyond_the_size_limit_the_oldest_expiries_go(make_store: MakeStore, clock: Clock) -> None:
    """The open log shrinks to its limit, oldest expiries first; revocations stay, and who lacked something is told."""
    store = make_store(rules=Rules(log_max_bytes=40_000))
    store.add_service("shop")
    made = revocation("session", "s1")
    record(store, made)
    batches = []
    for n in range(40):
        store.track([token(f"t{n}-{i}", ends_in=60 + n, sub="x" * 100) for i in range(10)])
        clock.reach(BEGAN + 60 + n)
        batches.append(claim_one(store, BASE + 60 + n).batch_id)
    removed = 0
    while count := (pruned := store.prune()).notices:
        removed += count
        assert dict(pruned.missed) == {"shop": BEGAN + 60}
    assert 0 < removed < 40
    left = open_again(store, *batches, f"r-{made.id}")
    assert set(left) == {*batches[removed:], f"r-{made.id}"}
    assert store.services()[0].missed_since == BEGAN + 60


def test_closed_records_do_not_count_against_the_limit(make_store: MakeStore, clock: Clock) -> None:
    """What was receipted or settled away makes room."""
    store = make_store(rules=Rules(log_max_bytes=20_000))
    store.add_service("shop")
    for n in range(60):
        store.track([token(f"t{n}-{i}", ends_in=60 + n, sub="x" * 100) for i in range(10)])
        clock.reach(BEGAN + 60 + n)
        claim = claim_one(store, BASE + 60 + n)
        if n % 2:
            store.settle(claim.batch_id, dead=range(10))
        else:
            done(store, "shop", claim.batch_id, *range(10))
        made = revocation("session", f"s{n}")
        record(store, made, jws="j" * 1000)
        done(store, "shop", f"r-{made.id}")
    assert store.prune().notices == 0
    assert store.services()[0].missed_since is None


def test_prune_takes_a_bounded_amount(store: Store, clock: Clock) -> None:
    """A large backlog is worked off over several calls, and all of it is."""
    store.park([parked(f"p{n:05}") for n in range(2500)])
    clock.advance(Rules().retention_seconds + 1)
    counts = []
    while count := store.prune().parked:
        counts.append(count)
    assert sum(counts) == 2500
    assert max(counts) <= 2000
    assert store.parked() == []


# ---- what an operator sees


@pytest.mark.usefixtures("clock")
def test_ping_names_the_server(store: Store, kind: str) -> None:
    """The server and its version are one short text; warnings are sentences."""
    name, version = store.ping().split(" ", 1)
    assert name.lower() == ("redis" if kind == "cluster" else kind)
    assert version[0].isdigit()
    assert all(isinstance(warning, str) and warning for warning in store.warnings())
