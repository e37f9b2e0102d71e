"""Services: registered, removed, and told that they missed something."""

from __future__ import annotations

from knell.notices import Receipt, partition_of_batch
from knell.store import FIRST_RESEND_SECONDS, Store
from tests.contract.making import BEGAN, Clock, claim_one, done, open_again, record, revocation, token

BASE = int(BEGAN)


def test_services_are_listed_by_name(store: Store, clock: Clock) -> None:
    """Each service has a name and since when it is registered."""
    assert store.services() == []
    assert store.add_service("shop")
    clock.advance(1.5)
    assert store.add_service("partner")
    found = store.services()
    assert [(one.name, one.added_at, one.missed_since) for one in found] == [
        ("partner", BEGAN + 1.5, None),
        ("shop", BEGAN, None),
    ]


def test_adding_again_changes_nothing(store: Store, clock: Clock) -> None:
    """A service that is registered stays as it is."""
    assert store.add_service("shop")
    clock.advance(10)
    assert not store.add_service("shop")
    assert [one.added_at for one in store.services()] == [BEGAN]


def test_removing_what_is_not_there_is_false(store: Store) -> None:
    """Removal says whether there was something to remove."""
    assert not store.remove_service("shop")
    store.add_service("shop")
    assert store.remove_service("shop")
    assert not store.remove_service("shop")
    assert store.services() == []


def test_a_new_service_starts_at_now(store: Store) -> None:
    """It is told what is revoked from now on and nothing of before."""
    store.add_service("shop")
    before, after = revocation("session", "s1"), revocation("session", "s2")
    record(store, before)
    store.add_service("partner")
    assert set(record(store, after).services) == {"shop", "partner"}
    assert set(store.status(before.id) or {}) == {"shop"}
    assert set(store.status(after.id) or {}) == {"shop", "partner"}


def test_removing_a_service_closes_its_part(store: Store, clock: Clock) -> None:
    """No record waits for it any more, and one that waited for it alone is not sent again."""
    store.add_service("shop")
    store.add_service("partner")
    store.track([token("t1"), token("t2", ends_in=61)])
    clock.reach(BEGAN + 61)
    both = claim_one(store, BASE + 60, services=["shop", "partner"]).batch_id
    alone = claim_one(store, BASE + 61, services=["shop"]).batch_id
    made = revocation("session", "s1")
    record(store, made)
    store.mark_missed("shop", BEGAN)
    assert store.remove_service("shop")
    found = open_again(store, both, alone, f"r-{made.id}")
    assert set(found[both].waiting) == {"partner"}
    assert set(found[f"r-{made.id}"].waiting) == {"partner"}
    assert alone not in found
    status = store.status(made.id)
    assert status is not None
    assert status["partner"].state == "waiting"
    assert "shop" not in status or status["shop"].state not in ("waiting", "retrying")
    clock.advance(10_000)
    assert all("shop" not in notice.waiting for notice in store.open_notices())


def test_a_receipt_of_a_removed_service_is_ignored(store: Store, clock: Clock) -> None:
    """It does not close what other services wait for."""
    store.add_service("shop")
    store.add_service("partner")
    store.track([token("t1")])
    clock.reach(BEGAN + 60)
    batch_id = claim_one(store, BASE + 60, services=["shop", "partner"]).batch_id
    store.remove_service("shop")
    done(store, "shop", batch_id)
    assert set(open_again(store, batch_id)[batch_id].waiting) == {"partner"}


def test_a_service_that_comes_back_under_its_name_starts_anew(store: Store, clock: Clock) -> None:
    """What waited for the service before it was removed does not wait for the one that is added later."""
    store.add_service("shop")
    made = revocation("session", "s1")
    record(store, made)
    store.mark_missed("shop", BEGAN)
    store.remove_service("shop")
    store.add_service("shop")
    assert store.services()[0].missed_since is None
    clock.advance(10_000)
    assert store.open_notices() == []


def test_missed_comes_up_at_once(store: Store, clock: Clock) -> None:
    """A service that missed notices has an open record that says since when, handed out at once, then with backoff."""
    store.add_service("shop")
    store.mark_missed("shop", BEGAN - 100.5)
    assert store.services()[0].missed_since == BEGAN - 100.5
    [notice] = store.open_notices()
    assert (notice.kind, notice.since, notice.jws, notice.entries) == ("missed", BEGAN - 100.5, None, ())
    assert set(notice.waiting) == {"shop"}
    assert partition_of_batch(notice.batch_id) is None
    assert store.open_notices() == []
    clock.advance(FIRST_RESEND_SECONDS)
    assert [again.kind for again in store.open_notices()] == ["missed"]


def test_missed_is_one_record_that_begins_at_the_earliest(store: Store) -> None:
    """Marking again lets the open record begin earlier, never later."""
    store.add_service("shop")
    store.add_service("partner")
    for since in (BEGAN - 50, BEGAN - 80, BEGAN - 60):
        store.mark_missed("shop", since)
    store.mark_missed("partner", BEGAN - 1)
    assert {one.name: one.missed_since for one in store.services()} == {"shop": BEGAN - 80, "partner": BEGAN - 1}
    found = store.open_notices()
    assert sorted((next(iter(notice.waiting)), notice.since) for notice in found) == [
        ("partner", BEGAN - 1),
        ("shop", BEGAN - 80),
    ]


def test_a_receipt_closes_missed(store: Store, clock: Clock) -> None:
    """Once the service has handled it, it has missed nothing; the next time is a new record."""
    store.add_service("shop")
    store.mark_missed("shop", BEGAN - 5)
    [notice] = store.open_notices()
    done(store, "shop", notice.batch_id)
    assert store.services()[0].missed_since is None
    clock.advance(10_000)
    assert store.open_notices() == []
    store.mark_missed("shop", BEGAN + 9_000)
    [again] = store.open_notices()
    assert again.since == BEGAN + 9_000
    assert again.batch_id != notice.batch_id


def test_missed_may_be_retried(store: Store) -> None:
    """A service that could not handle it yet holds it."""
    store.add_service("shop")
    store.mark_missed("shop", BEGAN - 5)
    [notice] = store.open_notices()
    store.receive([("shop", Receipt(batch_id=notice.batch_id, at=BEGAN, retrying=[0], until=BEGAN + 60))])
    assert open_again(store, notice.batch_id)[notice.batch_id].waiting["shop"].hold_until == BEGAN + 120


def test_what_was_missed_after_the_record_was_sent_is_not_lost(store: Store, clock: Clock) -> None:
    """A receipt for a "missed" that was sent before more was dropped does not close the service's open record."""
    store.add_service("shop")
    store.mark_missed("shop", BEGAN - 5)
    [sent] = store.open_notices()
    clock.advance(1)
    store.mark_missed("shop", BEGAN - 90)
    done(store, "shop", sent.batch_id)
    assert store.services()[0].missed_since == BEGAN - 90


def test_a_mark_that_is_renewed_keeps_its_turn(store: Store, clock: Clock) -> None:
    """A service that stays away, and misses more and more, is told with backoff and not at each mark."""
    store.add_service("shop")
    handed_out = []
    for n in range(8):
        store.mark_missed("shop", BEGAN - n)
        handed_out += [(n, notice.since, notice.attempts) for notice in store.open_notices()]
        clock.advance(FIRST_RESEND_SECONDS / 3)
    assert handed_out == [(0, BEGAN, 1), (3, BEGAN - 3, 2)]


def test_a_service_that_is_not_registered_has_missed_nothing(store: Store) -> None:
    """A mark for it is ignored, whether it was removed or never was there."""
    store.add_service("removed")
    store.remove_service("removed")
    for name in ("never", "removed"):
        store.mark_missed(name, BEGAN)
    assert store.open_notices() == []
    store.add_service("never")
    assert store.services()[0].missed_since is None
