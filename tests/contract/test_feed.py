"""revoke and the change feed: recorded once, visible in order, without gaps."""

from __future__ import annotations

import threading
import time

import pytest

from knell.errors import CursorLost
from knell.notices import Receipt, batch_id_of_revocation
from knell.settings import Rules
from knell.store import Cursor, ServiceStatus, Store
from tests.contract.conftest import MakeStore
from tests.contract.making import BEGAN, Clock, done, open_again, record, revocation, set_everywhere, token


def test_an_empty_feed_is_at_position_0(store: Store) -> None:
    """Before the first change there is nothing to read, and the head is 0 in some epoch."""
    head = store.head()
    assert head.position == 0
    assert head.epoch
    assert store.changes(head) == []
    assert store.snapshot() == []


def test_time_is_the_clock(store: Store, clock: Clock) -> None:
    """The store tells its clock."""
    assert store.time() == BEGAN
    clock.advance(1.5)
    assert store.time() == BEGAN + 1.5


def test_revoke_is_in_denylist_feed_and_log(store: Store) -> None:
    """One revocation is one denylist entry, one change, and one record that waits for the registered services."""
    store.add_service("shop")
    store.add_service("partner")
    made = revocation("subject", "alice", reason="left", initiating_entity="policy", issued_before=BEGAN - 0.5)
    recorded = record(store, made, jws="the.signed.notice")
    assert recorded.created
    assert set(recorded.services) == {"shop", "partner"}
    assert recorded.cursor == store.head() == Cursor(store.head().epoch, 1, made.id)
    [change] = store.changes(Cursor(recorded.cursor.epoch, 0))
    assert (change.position, change.kind, change.revocation) == (1, "revoked", made)
    assert store.snapshot() == [change]
    assert store.revocation(made.id) == made
    batch_id = batch_id_of_revocation(made.id)
    notice = open_again(store, batch_id)[batch_id]
    assert (notice.kind, notice.jws, notice.created_at) == ("revocation", "the.signed.notice", BEGAN)
    assert (notice.entries, notice.since) == ((), None)
    assert set(notice.waiting) == {"shop", "partner"}


def test_recording_the_same_id_twice_is_one_revocation(store: Store, clock: Clock) -> None:
    """The first one counts: the second gets its cursor and services, and changes nothing."""
    store.add_service("shop")
    first = revocation("subject", "alice", id="key-1")
    recorded = record(store, first, jws="first")
    clock.advance(1)
    store.add_service("partner")
    again = record(store, revocation("subject", "bob", id="key-1", reason="other"), jws="second")
    assert not again.created
    assert again.cursor == recorded.cursor
    assert tuple(again.services) == ("shop",)
    assert store.revocation("key-1") == first
    assert [change.revocation for change in store.changes(Cursor(recorded.cursor.epoch, 0))] == [first]
    assert open_again(store, "r-key-1")["r-key-1"].jws == "first"


def test_a_repetition_names_the_services_that_the_first_was_for(store: Store) -> None:
    """The second answer is as the first, whatever the services have done meanwhile."""
    store.add_service("shop")
    made = revocation("session", "s1")
    assert record(store, made).services == ("shop",)
    done(store, "shop", batch_id_of_revocation(made.id))
    assert record(store, made).services == ("shop",)


def test_every_field_of_a_revocation_is_kept(store: Store) -> None:
    """A revocation comes back from denylist, feed and snapshot as it went in."""
    made = revocation("token", "t1", exp=BEGAN + 60.5, reason="ä" * 100, ends=frozenset({"token"}))
    record(store, made)
    assert store.revocation(made.id) == made
    assert store.snapshot()[0].revocation == made


def test_an_unknown_revocation_is_none(store: Store) -> None:
    """Neither a revocation nor a status is made up."""
    assert store.revocation("nothing") is None
    assert store.status("nothing") is None


def test_changes_are_read_on_from_a_cursor_in_pages(store: Store) -> None:
    """Positions count up by one; each page goes on where the last one ended."""
    made = [revocation("token", f"t{n}") for n in range(25)]
    cursor = store.head()
    for one in made:
        record(store, one)
    found = []
    while page := store.changes(cursor, limit=10):
        found += page
        cursor = cursor.after(page[-1])
    assert [change.position for change in found] == list(range(1, 26))
    assert [change.revocation for change in found] == made
    assert cursor == store.head()


def test_snapshot_is_read_in_pages(store: Store) -> None:
    """A snapshot is every live revocation, in the order of positions, from any position on."""
    made = [revocation("token", f"t{n}") for n in range(25)]
    for one in made:
        record(store, one)
    found = store.snapshot(limit=10)
    assert len(found) == 10
    while page := store.snapshot(after=found[-1].position, limit=10):
        found += page
    assert [change.revocation for change in found] == made
    assert [change.position for change in found] == list(range(1, 26))


def test_changes_waits_for_none_in_vain(store: Store) -> None:
    """With nothing newer the answer is an empty list, after about wait_seconds and not for ever."""
    began = time.monotonic()
    assert store.changes(store.head(), wait_seconds=0.15) == []
    assert 0.1 < time.monotonic() - began < 20


def test_changes_wakes_up_for_a_change(make_store: MakeStore) -> None:
    """A reader that waits has a change of another process long before its time is up."""
    reader, writer = make_store(), make_store()
    cursor = reader.head()
    began, found = time.monotonic(), []
    waiting = threading.Thread(target=lambda: found.extend(reader.changes(cursor, wait_seconds=20)))
    waiting.start()
    made = revocation("token", "t1")
    record(writer, made)
    waiting.join(20)
    assert [change.revocation for change in found] == [made]
    assert time.monotonic() - began < 10


def test_another_epoch_is_lost(store: Store) -> None:
    """A cursor of another epoch cannot be read on from; neither can one that is ahead of the head."""
    record(store, revocation("token", "t1"))
    head = store.head()
    with pytest.raises(CursorLost):
        store.changes(Cursor("another", head.position))
    with pytest.raises(CursorLost) as ahead:
        store.changes(Cursor(head.epoch, head.position + 1))
    assert ahead.value.went_back


def test_a_cursor_whose_change_is_another_one_went_back(store: Store) -> None:
    """A feed that lost changes and has as many new ones by now is found out by the change at the cursor."""
    made = [revocation("token", f"t{n}") for n in range(3)]
    for one in made:
        record(store, one)
    cursor = Cursor(store.head().epoch, 0).after(store.changes(Cursor(store.head().epoch, 0), limit=1)[0])
    assert cursor.revocation_id == made[0].id
    assert [change.revocation for change in store.changes(cursor)] == made[1:]
    for position in (2, 3):
        with pytest.raises(CursorLost) as lost:
            store.changes(Cursor(cursor.epoch, position, made[0].id))
        assert lost.value.went_back


def test_a_cursor_is_judged_by_its_change_in_another_epoch_too(store: Store) -> None:
    """When the server is another one, the change at the cursor tells whether its data is the same."""
    record(store, revocation("token", "t1"))
    head = store.head()
    another_server = head.epoch.partition(".")[0] + ".another"
    with pytest.raises(CursorLost) as restarted:
        store.changes(Cursor(another_server, 1, head.revocation_id))
    assert not restarted.value.went_back
    with pytest.raises(CursorLost) as replaced:
        store.changes(Cursor(another_server, 1, "lost"))
    assert replaced.value.went_back


def test_the_epoch_is_the_same_for_every_process(make_store: MakeStore) -> None:
    """Two stores on the same data agree on epoch and head."""
    one, two = make_store(), make_store()
    record(one, revocation("token", "t1"))
    assert one.head() == two.head()


def test_a_trimmed_feed_loses_old_cursors_only(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond FEED_LENGTH the oldest changes go: a cursor before them is lost, without having gone back."""
    set_everywhere(monkeypatch, "FEED_LENGTH", 5)
    start = store.head()
    for n in range(12):
        record(store, revocation("token", f"t{n}"))
    assert store.prune().changes == 7
    with pytest.raises(CursorLost) as lost:
        store.changes(start)
    assert not lost.value.went_back
    with pytest.raises(CursorLost):
        store.changes(Cursor(start.epoch, 6))
    assert [change.position for change in store.changes(Cursor(start.epoch, 7))] == [8, 9, 10, 11, 12]
    with pytest.raises(CursorLost) as unproven:
        store.changes(Cursor(start.epoch, 7, "trimmed, so that nobody can compare it"))
    assert not unproven.value.went_back
    assert len(store.snapshot()) == 12
    assert store.head().position == 12


def test_an_expired_revocation_leaves_the_denylist(store: Store, clock: Clock) -> None:
    """Past expires_at an entry is pruned; the head stays where it is, and so does the status."""
    store.add_service("shop")
    short, long = revocation("token", "t1", exp=BEGAN + 50), revocation("token", "t2", exp=BEGAN + 500)
    record(store, short)
    record(store, long)
    clock.reach(BEGAN + 50 + Rules().leeway_seconds - 1)
    assert store.prune().revocations == 0
    assert store.revocation(short.id) == short
    clock.advance(2)
    assert store.prune().revocations == 1
    assert store.revocation(short.id) is None
    assert [change.revocation for change in store.snapshot()] == [long]
    assert store.head().position == 2
    assert store.status(short.id) is not None
    again = record(store, short)
    assert not again.created
    assert again.cursor.position == 1


def test_status_follows_each_service(store: Store, clock: Clock) -> None:
    """A service is waiting, then retrying, parked or done, each since when it said so by the store's clock."""
    for name in ("a", "b", "c", "d"):
        store.add_service(name)
    made = revocation("session", "s1")
    record(store, made)
    batch_id = batch_id_of_revocation(made.id)
    assert store.status(made.id) == dict.fromkeys("abcd", ServiceStatus("waiting", None))
    clock.advance(2.5)
    store.receive(
        [
            ("b", Receipt(batch_id=batch_id, at=1.0, retrying=[0], until=BEGAN + 100)),
            ("c", Receipt(batch_id=batch_id, at=1.0, parked=[0])),
            ("d", Receipt(batch_id=batch_id, at=1.0, done=[0])),
        ]
    )
    at = BEGAN + 2.5
    assert store.status(made.id) == {
        "a": ServiceStatus("waiting", None),
        "b": ServiceStatus("retrying", at),
        "c": ServiceStatus("parked", at),
        "d": ServiceStatus("done", at),
    }
    clock.advance(1)
    done(store, "b", batch_id)
    done(store, "c", batch_id)
    found = store.status(made.id)
    assert found is not None
    assert [found[name].state for name in "abcd"] == ["waiting", "done", "done", "done"]
    assert found["b"].at == at + 1


def test_status_outlives_the_last_receipt_and_ends_with_the_retention(store: Store, clock: Clock) -> None:
    """A revocation that everyone applied can be looked up until the retention is over."""
    store.add_service("shop")
    made = revocation("session", "s1")
    record(store, made)
    done(store, "shop", batch_id_of_revocation(made.id))
    clock.advance(Rules().retention_seconds - 10)
    assert store.open_notices() == []
    store.prune()
    found = store.status(made.id)
    assert found is not None
    assert found["shop"].state == "done"
    clock.advance(20)
    assert store.prune().notices == 1
    assert store.status(made.id) is None


def test_a_revocation_without_services_has_a_status(store: Store, clock: Clock) -> None:
    """With nobody to tell, its status is known and empty, and nothing is open."""
    made = revocation("session", "s1")
    assert tuple(record(store, made).services) == ()
    assert store.status(made.id) == {}
    clock.advance(3600)
    assert store.open_notices() == []


def test_an_entry_past_its_time_is_read_until_it_is_pruned(store: Store, clock: Clock) -> None:
    """A notifier that starts after an outage still learns what was told before it; nothing is refused by it."""
    record(store, revocation("token", "t1", exp=BEGAN + 50, id="short"))
    clock.reach(BEGAN + 600)
    assert [change.revocation.value for change in store.snapshot()] == ["t1"]
    assert store.revocation("short") is None
    assert store.track([token("t1", ends_in=900)])[0].denied is None
    store.prune()
    assert store.snapshot() == []
