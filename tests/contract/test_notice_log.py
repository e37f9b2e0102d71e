"""The notice log: settled, handed out with backoff, and closed by receipts."""

from __future__ import annotations

import pytest

from knell.notices import Receipt
from knell.store import FIRST_RESEND_SECONDS, LONGEST_RESEND_SECONDS, RETRY_MARGIN_SECONDS, Store
from tests.contract.making import BEGAN, Clock, claim_one, done, open_again, record, revocation, token

BASE = int(BEGAN)


@pytest.fixture
def batch_id(store: Store, clock: Clock) -> str:
    """An expiry record of five entries that waits for shop and partner, claimed at BEGAN + 60."""
    store.add_service("shop")
    store.add_service("partner")
    store.track([token(f"t{n}") for n in range(5)])
    clock.reach(BEGAN + 60)
    return claim_one(store, BASE + 60, services=["shop", "partner"]).batch_id


def test_settle_drops_the_dead_and_keeps_the_numbers(store: Store, batch_id: str) -> None:
    """What a revocation told goes out of the record; the others keep their numbers."""
    store.settle(batch_id, dead=[0, 3])
    notice = open_again(store, batch_id)[batch_id]
    assert notice.settled
    assert [entry.n for entry in notice.entries] == [1, 2, 4]
    assert all(waiting.todo is None for waiting in notice.waiting.values())


def test_settle_of_none_marks_the_record_settled(store: Store, batch_id: str) -> None:
    """With nobody dead the record is settled and whole."""
    store.settle(batch_id, dead=[])
    notice = open_again(store, batch_id)[batch_id]
    assert notice.settled
    assert len(notice.entries) == 5


def test_settle_of_all_removes_the_record(store: Store, batch_id: str) -> None:
    """A record with nothing left to tell is gone."""
    store.settle(batch_id, dead=[0, 1, 2, 3, 4])
    assert open_again(store, batch_id) == {}


def test_settling_again_is_without_effect(store: Store, batch_id: str) -> None:
    """The first settle counts."""
    store.settle(batch_id, dead=[0])
    store.settle(batch_id, dead=[1, 2])
    assert [entry.n for entry in open_again(store, batch_id)[batch_id].entries] == [1, 2, 3, 4]


def test_settling_what_is_unknown_is_ignored(store: Store) -> None:
    """A record that has gone is nothing to settle."""
    store.settle("e0-unknown", dead=[0])


def test_a_record_comes_up_after_the_first_wait_and_then_backs_off(store: Store, batch_id: str, clock: Clock) -> None:
    """30 s after it was recorded, 30 s later, then 60, and so on to one hour; attempts counts the hand-outs."""
    wait = FIRST_RESEND_SECONDS
    clock.advance(wait - 0.5)
    assert store.open_notices() == []
    clock.advance(0.5)
    for attempt in range(1, 12):
        [notice] = store.open_notices()
        assert (notice.batch_id, notice.attempts) == (batch_id, attempt)
        assert store.open_notices() == []
        clock.advance(wait - 0.5)
        assert store.open_notices() == []
        clock.advance(0.5)
        wait = min(wait * 2, LONGEST_RESEND_SECONDS)


def test_a_revocation_comes_up_after_the_first_wait(store: Store, clock: Clock) -> None:
    """A revocation that nobody receipted is sent again, as it was signed."""
    store.add_service("shop")
    made = revocation("session", "s1")
    record(store, made, jws="signed")
    clock.advance(FIRST_RESEND_SECONDS - 1)
    assert store.open_notices() == []
    clock.advance(1)
    [notice] = store.open_notices()
    assert (notice.kind, notice.jws, notice.attempts) == ("revocation", "signed", 1)


def test_the_oldest_come_first_and_at_most_limit(store: Store, clock: Clock) -> None:
    """Records are handed out in the order that they were recorded in; the others stay for the next call."""
    store.add_service("shop")
    made = []
    for n in range(6):
        made.append(revocation("session", f"s{n}", id=f"id{9 - n}"))
        record(store, made[-1])
        clock.advance(1)
    clock.advance(FIRST_RESEND_SECONDS)
    found = [*store.open_notices(limit=4), *store.open_notices(limit=4)]
    assert [notice.batch_id for notice in found] == [f"r-{one.id}" for one in made]


def test_resend_at_decides_when(store: Store, batch_id: str, clock: Clock) -> None:
    """A record comes up at the time that it was given; 0 is at once; unknown ids are ignored."""
    store.resend_at([batch_id, "e0-unknown", "r-unknown"], clock.now + 5)
    store.resend_at([], 0)
    assert store.open_notices() == []
    clock.advance(5)
    assert [notice.batch_id for notice in store.open_notices()] == [batch_id]
    store.resend_at([batch_id], 0)
    assert [notice.batch_id for notice in store.open_notices()] == [batch_id]
    store.resend_at([batch_id], clock.now + 10_000)
    clock.advance(9_000)
    assert store.open_notices() == []


def test_what_is_asked_for_at_once_is_said_to_be_unsent(store: Store, batch_id: str, clock: Clock) -> None:
    """Only that once: the next time it comes up by itself. One that somebody missed may wait behind others."""
    clock.advance(FIRST_RESEND_SECONDS)
    assert [notice.unsent for notice in store.open_notices()] == [False]
    store.resend_at([batch_id], 0)
    assert [notice.unsent for notice in store.open_notices()] == [True]
    clock.advance(LONGEST_RESEND_SECONDS)
    assert [notice.unsent for notice in store.open_notices()] == [False]
    store.mark_missed("shop", BEGAN)
    assert [(notice.kind, notice.unsent) for notice in store.open_notices()] == [("missed", False)]


def test_done_closes_entries_for_that_service_alone(store: Store, batch_id: str) -> None:
    """What one service has done stays open for the other."""
    done(store, "shop", batch_id, 0, 2)
    waiting = open_again(store, batch_id)[batch_id].waiting
    assert waiting["shop"].todo == (1, 3, 4)
    assert waiting["partner"].todo is None


def test_parked_closes_as_well(store: Store, batch_id: str) -> None:
    """A service that gave up is not told again."""
    store.receive([("shop", Receipt(batch_id=batch_id, at=BEGAN, done=[0, 1], parked=[2, 3, 4]))])
    assert set(open_again(store, batch_id)[batch_id].waiting) == {"partner"}


def test_a_record_that_nobody_waits_for_is_gone(store: Store, batch_id: str, clock: Clock) -> None:
    """The last receipt removes an expiry record."""
    done(store, "shop", batch_id, 0, 1, 2, 3, 4)
    assert set(open_again(store, batch_id)[batch_id].waiting) == {"partner"}
    done(store, "partner", batch_id, 0, 1)
    done(store, "partner", batch_id, 2, 3, 4)
    assert open_again(store, batch_id) == {}
    clock.advance(100_000)
    assert store.open_notices() == []


def test_receipts_before_and_after_settle_add_up(store: Store, batch_id: str) -> None:
    """A service that has done all that settle left is not waited for."""
    done(store, "shop", batch_id, 0, 1, 2)
    store.settle(batch_id, dead=[3, 4])
    waiting = open_again(store, batch_id)[batch_id].waiting
    assert set(waiting) == {"partner"}
    done(store, "partner", batch_id, 0, 1, 2)
    assert open_again(store, batch_id) == {}


def test_retrying_holds_the_sweep_back(store: Store, batch_id: str) -> None:
    """An entry that is retried stays open, and is held until its retry is due plus a margin."""
    until = BEGAN + 500.0
    store.receive([("shop", Receipt(batch_id=batch_id, at=BEGAN, done=[0, 1, 2], retrying=[3, 4], until=until))])
    waiting = open_again(store, batch_id)[batch_id].waiting
    assert waiting["shop"].todo == (3, 4)
    assert waiting["shop"].hold_until == until + RETRY_MARGIN_SECONDS
    assert (waiting["partner"].todo, waiting["partner"].hold_until) == (None, 0)


def test_retrying_everything_leaves_everything_open(store: Store, batch_id: str) -> None:
    """A receipt with nothing but retries closes nothing."""
    store.receive([("shop", Receipt(batch_id=batch_id, at=BEGAN, retrying=range(5), until=BEGAN + 90))])
    waiting = open_again(store, batch_id)[batch_id].waiting["shop"]
    assert waiting.todo in (None, (0, 1, 2, 3, 4))
    assert waiting.hold_until == BEGAN + 90 + RETRY_MARGIN_SECONDS


def test_a_closed_entry_stays_closed(store: Store, batch_id: str) -> None:
    """A late "retrying" does not open what is done, and a second "done" changes nothing."""
    done(store, "shop", batch_id, 0, 1, 2, 3)
    store.receive([("shop", Receipt(batch_id=batch_id, at=BEGAN, retrying=[0, 1], until=BEGAN + 900))])
    done(store, "shop", batch_id, 0)
    assert open_again(store, batch_id)[batch_id].waiting["shop"].todo == (4,)


def test_done_after_parked_is_done(store: Store) -> None:
    """A replayed revocation is in the end done; a late "parked" does not take that back."""
    store.add_service("shop")
    made = revocation("session", "s1")
    record(store, made)
    batch_id = f"r-{made.id}"
    for receipt, state in (
        (Receipt(batch_id=batch_id, at=BEGAN, parked=[0]), "parked"),
        (Receipt(batch_id=batch_id, at=BEGAN, done=[0]), "done"),
        (Receipt(batch_id=batch_id, at=BEGAN, retrying=[0], until=BEGAN + 9), "done"),
    ):
        store.receive([("shop", receipt)])
        found = store.status(made.id)
        assert found is not None
        assert found["shop"].state == state


def test_unknown_receipts_are_ignored(store: Store, batch_id: str) -> None:
    """A receipt from a stranger, for an unknown record or for unknown entries, changes nothing."""
    store.receive([])
    store.receive(
        [
            ("stranger", Receipt(batch_id=batch_id, at=BEGAN, done=range(5))),
            ("shop", Receipt(batch_id="e0-unknown", at=BEGAN, done=[0])),
            ("shop", Receipt(batch_id="r-unknown", at=BEGAN, done=[0])),
            ("shop", Receipt(batch_id="m-unknown", at=BEGAN, retrying=[0], until=BEGAN)),
            ("shop", Receipt(batch_id=batch_id, at=BEGAN, done=[77, 499], parked=[5])),
        ]
    )
    waiting = open_again(store, batch_id)[batch_id].waiting
    assert set(waiting) == {"shop", "partner"}
    assert waiting["shop"].todo is None
    assert store.status("unknown") is None


def test_many_receipts_in_one_call(store: Store, clock: Clock) -> None:
    """One call applies receipts of several services for several records, several for the same one included."""
    store.add_service("shop")
    store.add_service("partner")
    made = [revocation("session", f"s{n}") for n in range(40)]
    for one in made:
        record(store, one)
    store.track([token(f"t{n}") for n in range(3)])
    clock.reach(BEGAN + 60)
    batch_id = claim_one(store, BASE + 60, services=["shop", "partner"]).batch_id
    receipts = [(name, Receipt(batch_id=f"r-{one.id}", at=BEGAN, done=[0])) for one in made for name in ("shop",)]
    receipts += [("partner", Receipt(batch_id=batch_id, at=BEGAN, done=[n])) for n in range(3)]
    store.receive(receipts)
    for one in made:
        found = store.status(one.id)
        assert found is not None
        assert (found["shop"].state, found["partner"].state) == ("done", "waiting")
    assert set(open_again(store, batch_id)[batch_id].waiting) == {"shop"}


def test_a_full_record_of_500_entries_keeps_its_marks(store: Store, clock: Clock) -> None:
    """The largest record works to its last entry."""
    store.track([token(f"t{n}", sid=f"s{n}") for n in range(500)])
    clock.reach(BEGAN + 60)
    claim = claim_one(store, BASE + 60)
    store.settle(claim.batch_id, dead=range(0, 500, 2))
    done(store, "shop", claim.batch_id, *range(1, 499, 2))
    notice = open_again(store, claim.batch_id)[claim.batch_id]
    assert notice.waiting["shop"].todo == (499,)
    assert [entry.n for entry in notice.entries] == list(range(1, 500, 2))
    assert {entry.n: entry for entry in notice.entries}.items() <= {entry.n: entry for entry in claim.entries}.items()
    done(store, "shop", claim.batch_id, 499)
    assert open_again(store, claim.batch_id) == {}
