"""Several threads and processes at once: each member in one claim, positions in order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from knell.notices import Receipt
from knell.store import Claim, Store
from tests.contract.conftest import MakeStore
from tests.contract.making import (
    BEGAN,
    BOTH,
    ISS,
    Clock,
    claim_all,
    done,
    entries,
    open_again,
    record,
    revocation,
    token,
    told,
)

BASE = int(BEGAN)


def together(*tasks: Callable[[], object]) -> list[object]:
    """Run tasks at the same time, each in its thread; their results, in order."""
    gate = threading.Barrier(len(tasks))

    def run(task: Callable[[], object]) -> object:
        gate.wait(20)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result(60) for future in [pool.submit(run, task) for task in tasks]]


def test_several_claimers_share_a_second(make_store: MakeStore, clock: Clock) -> None:
    """Each member of a second is in exactly one claim, whoever claims; the sessions are ended once."""
    stores = [make_store() for _ in range(3)]
    stores[0].track([token(f"t{n}", sid=f"s{n % 100}") for n in range(600)])
    clock.reach(BEGAN + 60)

    def claimer(store: Store) -> Callable[[], list[Claim]]:
        return lambda: claim_all(store, BASE + 60, limit=20)

    claims: list[Claim] = [c for found in together(*map(claimer, stores)) for c in found]  # type: ignore[attr-defined]
    assert len(told(claims)) == 600
    assert [entry.ends for entry in entries(claims)].count(BOTH) == 100
    assert len({claim.batch_id for claim in claims}) == len(claims)
    assert stores[0].due(before=BEGAN + 1000) == []


def test_tracking_while_claiming_loses_no_token(make_store: MakeStore, clock: Clock) -> None:
    """A token that is tracked into a second that is being emptied is claimed then or is still due."""
    tracker, claimer = make_store(), make_store()
    clock.reach(BEGAN + 60)
    finished = threading.Event()

    def track() -> None:
        for n in range(60):
            [answer] = tracker.track([token(f"t{n}")])
            assert answer.must_arm == (BASE + 60,)
        finished.set()

    def claim() -> list[Claim]:
        found = []
        while not finished.is_set():
            found += claim_all(claimer, BASE + 60, limit=3)
        return found

    _, claims = together(track, claim)
    assert isinstance(claims, list)
    claims += claim_all(claimer, BASE + 60)
    assert len(told(claims)) == 60


def test_revocations_of_several_processes_are_visible_in_order(make_store: MakeStore) -> None:
    """Positions have no gaps, and a reader that follows the feed meanwhile never skips one."""
    writers = [make_store() for _ in range(3)]
    reader = make_store()
    cursor = reader.head()

    def write(n: int) -> Callable[[], list[int]]:
        def run() -> list[int]:
            made = [revocation("token", f"t{n}-{i}") for i in range(25)]
            return [record(writers[n], one).cursor.position for one in made]

        return run

    def read() -> list[int]:
        seen: list[int] = []
        at = cursor
        while len(seen) < 75:
            for change in reader.changes(at, wait_seconds=20, limit=7):
                assert change.position == at.position + 1
                at = at.after(change)
                seen.append(at.position)
        return seen

    *written, seen = together(write(0), write(1), write(2), read)
    positions = [position for found in written for position in found]  # type: ignore[attr-defined]
    assert sorted(positions) == seen == list(range(1, 76))


def test_the_same_revocation_at_the_same_time_is_one(make_store: MakeStore) -> None:
    """Of several callers with one idempotency key one creates it, and all get its cursor."""
    stores = [make_store() for _ in range(4)]
    made = revocation("subject", "alice", id="one-key")
    found = together(*[lambda store=store: record(store, made) for store in stores])
    assert sorted(one.created for one in found) == [False, False, False, True]  # type: ignore[attr-defined]
    assert {one.cursor.position for one in found} == {1}  # type: ignore[attr-defined]


def test_a_record_is_handed_out_to_one_caller(make_store: MakeStore, clock: Clock) -> None:
    """Sweeps that run at the same time never get the same record."""
    stores = [make_store() for _ in range(3)]
    stores[0].add_service("shop")
    for n in range(60):
        record(stores[0], revocation("session", f"s{n}"))
    clock.advance(60)

    def sweeper(store: Store) -> Callable[[], list[str]]:
        def run() -> list[str]:
            found: list[str] = []
            while page := store.open_notices(limit=7):
                found += [notice.batch_id for notice in page]
            return found

        return run

    handed = [batch_id for found in together(*map(sweeper, stores)) for batch_id in found]  # type: ignore[attr-defined]
    assert len(handed) == len(set(handed)) == 60


def test_receipts_of_several_services_at_the_same_time_add_up(make_store: MakeStore, clock: Clock) -> None:
    """No receipt undoes another's, and the last one removes the record."""
    names = ["a", "b", "c"]
    stores = [make_store() for _ in names]
    stores[0].track([token(f"t{n}") for n in range(30)])
    clock.reach(BEGAN + 60)
    [claim] = claim_all(stores[0], BASE + 60, services=names)

    def receipts(store: Store, name: str, numbers: range) -> Callable[[], None]:
        def run() -> None:
            for n in numbers:
                store.receive([(name, Receipt(batch_id=claim.batch_id, at=BEGAN, done=[n]))])

        return run

    together(*[receipts(store, name, range(29)) for store, name in zip(stores, names, strict=True)])
    waiting = open_again(stores[0], claim.batch_id)[claim.batch_id].waiting
    assert {name: one.todo for name, one in waiting.items()} == dict.fromkeys(names, (29,))
    together(*[lambda s=s, n=n: done(s, n, claim.batch_id, 29) for s, n in zip(stores, names, strict=True)])
    assert open_again(stores[0], claim.batch_id) == {}


def test_detaches_of_two_tokens_end_their_session_once(make_store: MakeStore) -> None:
    """Of two revocations of a session's last two tokens, at the same time, exactly one ends the session."""
    one, two = make_store(), make_store()
    for n in range(15):
        one.track([token(f"a{n}", sid=f"s{n}"), token(f"b{n}", sid=f"s{n}")])
        found = together(
            lambda n=n: one.detach(ISS, f"a{n}", revocation_id=f"ra{n}"),
            lambda n=n: two.detach(ISS, f"b{n}", revocation_id=f"rb{n}"),
        )
        assert sorted(detached.ends_session for detached in found) == [False, True]  # type: ignore[attr-defined]


def test_a_track_and_a_revocation_at_the_same_time_do_not_miss_each_other(make_store: MakeStore) -> None:
    """A token tracked while its session is revoked is denied, or is in the store for the revocation to be found by."""
    one, two = make_store(), make_store()
    for n in range(15):
        made = revocation("session", f"s{n}")
        ref = token(f"t{n}", sid=f"s{n}", ends_in=60 + n)
        tracked, _ = together(lambda ref=ref: one.track([ref])[0], lambda made=made: record(two, made))
        tracked_at_all = BASE + 60 + n in one.due(before=BEGAN + 1000)
        assert tracked_at_all == (tracked.denied is None)  # type: ignore[attr-defined]
        assert one.revocation(made.id) == made
