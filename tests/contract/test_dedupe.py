"""begin and mark: one lease and one record for each (service, batch)."""

from __future__ import annotations

import threading

from knell.settings import Rules
from knell.store import Begun, Store
from tests.contract.conftest import MakeStore
from tests.contract.making import Clock

DAY = 86_400.0


def test_the_first_to_begin_is_granted(store: Store) -> None:
    """Nothing is known of a new batch, and whoever asks first may run it."""
    assert store.begin("shop", "e0-1", holder="a", lease_seconds=30) == Begun(granted=True, done=0, parked=0)


def test_a_live_lease_keeps_others_out(store: Store, clock: Clock) -> None:
    """Another holder is refused until the lease has run out; the same one is not."""
    store.begin("shop", "e0-1", holder="a", lease_seconds=30)
    clock.advance(29)
    assert not store.begin("shop", "e0-1", holder="b", lease_seconds=30).granted
    assert store.begin("shop", "e0-1", holder="a", lease_seconds=30).granted
    clock.advance(29)
    assert not store.begin("shop", "e0-1", holder="b", lease_seconds=30).granted
    clock.advance(2)
    assert store.begin("shop", "e0-1", holder="b", lease_seconds=30).granted
    assert not store.begin("shop", "e0-1", holder="a", lease_seconds=30).granted


def test_leases_are_per_service_and_batch(store: Store) -> None:
    """Another service, or another batch, is not kept out."""
    store.begin("shop", "e0-1", holder="a", lease_seconds=30)
    assert store.begin("partner", "e0-1", holder="b", lease_seconds=30).granted
    assert store.begin("shop", "e0-2", holder="b", lease_seconds=30).granted


def test_marks_add_up(store: Store) -> None:
    """done and parked are OR-ed to what is stored, and unparked bits are taken out of parked."""
    store.begin("shop", "e0-1", holder="a", lease_seconds=30)
    assert store.mark("shop", "e0-1", holder="a", done=0b001, lease_seconds=30)
    assert store.mark("shop", "e0-1", holder="a", done=0b100, parked=0b11000, lease_seconds=30)
    assert store.begin("shop", "e0-1", holder="a", lease_seconds=30) == Begun(True, 0b101, 0b11000)
    assert store.mark("shop", "e0-1", holder="a", done=0b1000, unparked=0b1000, lease_seconds=30)
    assert store.begin("shop", "e0-1", holder="b", lease_seconds=30) == Begun(False, 0b1101, 0b10000)


def test_bitmaps_of_500_entries(store: Store) -> None:
    """The marks of the largest batch survive."""
    done, parked = (1 << 500) - 2, 1 | 1 << 499
    store.mark("shop", "e0-1", holder="a", done=done, parked=parked, lease_seconds=0)
    store.mark("shop", "e0-1", holder="a", done=1, unparked=1 << 499, lease_seconds=0)
    begun = store.begin("shop", "e0-1", holder="a", lease_seconds=30)
    assert (begun.done, begun.parked) == ((1 << 500) - 1, 1)


def test_mark_renews_the_lease(store: Store, clock: Clock) -> None:
    """A holder that keeps marking keeps others out."""
    store.begin("shop", "e0-1", holder="a", lease_seconds=10)
    for n in range(5):
        clock.advance(8)
        assert store.mark("shop", "e0-1", holder="a", done=1 << n, lease_seconds=10)
        assert not store.begin("shop", "e0-1", holder="b", lease_seconds=10).granted


def test_a_lease_of_0_gives_it_back(store: Store) -> None:
    """The next one may begin at once, and sees the marks."""
    store.begin("shop", "e0-1", holder="a", lease_seconds=30)
    assert store.mark("shop", "e0-1", holder="a", done=1, lease_seconds=0)
    assert store.begin("shop", "e0-1", holder="b", lease_seconds=30) == Begun(True, 1, 0)


def test_a_lease_that_was_never_given_back_was_abandoned(store: Store, clock: Clock) -> None:
    """Whoever takes it over learns which process died over the batch before it; whoever begins again does not."""
    store.begin("shop", "e0-1", holder="a", lease_seconds=10)
    assert store.begin("shop", "e0-1", holder="b", lease_seconds=10).abandoned is None
    clock.advance(11)
    assert store.begin("shop", "e0-1", holder="a", lease_seconds=10).abandoned is None
    clock.advance(11)
    assert store.begin("shop", "e0-1", holder="b", lease_seconds=10) == Begun(True, 0, 0, abandoned="a")
    assert store.mark("shop", "e0-1", holder="b", done=1, lease_seconds=0)
    clock.advance(11)
    assert store.begin("shop", "e0-1", holder="c", lease_seconds=10) == Begun(True, 1, 0)


def test_a_lease_that_was_given_back_has_run_out_by_any_clock(store: Store, clock: Clock) -> None:
    """A clock that steps back does not bring it to life again."""
    store.begin("shop", "e0-1", holder="a", lease_seconds=30)
    store.mark("shop", "e0-1", holder="a", done=1, lease_seconds=0)
    clock.advance(-60)
    assert store.begin("shop", "e0-1", holder="b", lease_seconds=30).granted


def test_marks_are_stored_although_the_lease_was_lost(store: Store, clock: Clock) -> None:
    """The answer is False then, and the other holder's lease is not touched."""
    store.begin("shop", "e0-1", holder="a", lease_seconds=10)
    clock.advance(11)
    assert store.begin("shop", "e0-1", holder="b", lease_seconds=10).granted
    assert not store.mark("shop", "e0-1", holder="a", done=0b10, lease_seconds=10)
    assert not store.mark("shop", "e0-1", holder="a", done=0b100, lease_seconds=0)
    assert store.begin("shop", "e0-1", holder="b", lease_seconds=10) == Begun(True, 0b110, 0)
    assert not store.begin("shop", "e0-1", holder="c", lease_seconds=10).granted


def test_records_live_for_the_retention_and_a_day(make_store: MakeStore, clock: Clock) -> None:
    """A record that was marked is known for the retention plus a day, and then pruned."""
    store = make_store(rules=Rules(retention_seconds=3600))
    store.begin("shop", "e0-1", holder="a", lease_seconds=30)
    store.mark("shop", "e0-1", holder="a", done=1, lease_seconds=0)
    clock.advance(3600 + DAY - 10)
    store.prune()
    assert store.begin("shop", "e0-1", holder="a", lease_seconds=0.001).done == 1
    clock.advance(2 * (3600 + DAY))
    store.prune()
    assert store.begin("shop", "e0-1", holder="a", lease_seconds=30).done == 0


def test_one_of_many_is_granted(make_store: MakeStore) -> None:
    """Of several processes that begin at the same time, one runs."""
    stores = [make_store() for _ in range(4)]
    granted, gate = [], threading.Barrier(4)

    def begin(n: int) -> None:
        gate.wait(20)
        if stores[n].begin("shop", "e0-1", holder=str(n), lease_seconds=30).granted:
            granted.append(n)

    threads = [threading.Thread(target=begin, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(granted) == 1
