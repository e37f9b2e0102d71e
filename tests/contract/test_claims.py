"""claim: out of an expiry second into the notice log, in one step."""

from __future__ import annotations

import pytest

from knell.denylist import Denylist
from knell.errors import NotDue
from knell.notices import partition_of_batch
from knell.settings import Rules
from knell.store import Store
from tests.contract.conftest import MakeStore
from tests.contract.making import (
    BEGAN,
    BOTH,
    ISS,
    SESSION,
    Clock,
    claim_all,
    claim_one,
    entries,
    open_again,
    revocation,
    token,
    told,
)

BASE = int(BEGAN)


def test_a_second_is_not_claimed_before_its_time(store: Store, clock: Clock) -> None:
    """Before the second, by the store's clock, the claim is refused and says how long it is to wait."""
    store.track([token(ends_in=60)])
    clock.now = BEGAN + 59.75
    with pytest.raises(NotDue) as refused:
        store.claim(BASE + 60, services=["shop"])
    assert refused.value.second == BASE + 60
    assert refused.value.wait_seconds == pytest.approx(0.25)
    assert store.due(before=BEGAN + 60) == [BASE + 60]
    clock.now = BEGAN + 60
    assert len(claim_one(store, BASE + 60).entries) == 1


def test_a_token_with_a_fraction_is_not_claimed_before_its_end(store: Store, clock: Clock) -> None:
    """A token whose exp lies inside a second is claimed at the end of it."""
    store.track([token(ends_in=60.5)])
    clock.now = BEGAN + 60.6
    with pytest.raises(NotDue):
        store.claim(BASE + 61, services=["shop"])


def test_a_second_without_members_is_none(store: Store, clock: Clock) -> None:
    """There is nothing to claim in a second that never had a member, or has none left."""
    store.track([token()])
    clock.reach(BEGAN + 60)
    assert store.claim(BASE + 59, services=["shop"]) is None
    assert store.claim(BASE + 60, services=["shop"]) is not None
    assert store.claim(BASE + 60, services=["shop"]) is None
    assert store.due(before=BEGAN + 1000) == []


def test_a_claim_is_an_open_record_of_the_notice_log(store: Store, clock: Clock) -> None:
    """What was claimed is in the log under the same id, unsettled, waiting for every service, all entries open."""
    refs = [token("t1", sid="s1"), token("t2", sub="alice")]
    store.track(refs)
    clock.reach(BEGAN + 60.5)
    claim = claim_one(store, BASE + 60, services=["partner", "shop"])
    assert partition_of_batch(claim.batch_id) is not None
    assert [entry.n for entry in claim.entries] == [0, 1]
    found = open_again(store, claim.batch_id)[claim.batch_id]
    assert found.kind == "expiry"
    assert found.entries == claim.entries
    assert found.created_at == BEGAN + 60.5
    assert (found.settled, found.jws, found.since) == (False, None, None)
    assert set(found.waiting) == {"partner", "shop"}
    assert all(waiting.todo is None and waiting.hold_until == 0 for waiting in found.waiting.values())


def test_without_services_the_members_are_taken_out_and_nothing_is_recorded(store: Store, clock: Clock) -> None:
    """Nobody is there to be told: the second empties, the log stays empty."""
    store.track([token("t1", sid="s1")])
    clock.reach(BEGAN + 60)
    claim = store.claim(BASE + 60, services=[])
    assert claim is not None
    assert claim.batch_id == ""
    assert store.due(before=BEGAN + 1000) == []
    assert store.session(token().iss, "s1") is None
    clock.advance(100_000)
    assert store.open_notices() == []


def test_services_that_were_removed_meanwhile_are_not_waited_for(store: Store, clock: Clock) -> None:
    """A claim names the services that there were when it asked; those that have gone since are told nothing."""
    store.add_service("shop")
    store.add_service("partner")
    store.track([token("t1"), token("t2", ends_in=61)])
    clock.reach(BEGAN + 61)
    store.remove_service("shop")
    both = claim_one(store, BASE + 60, services=["shop", "partner"])
    claim_one(store, BASE + 61, services=["shop"])
    clock.advance(100)
    assert [(notice.batch_id, set(notice.waiting)) for notice in store.open_notices()] == [(both.batch_id, {"partner"})]


def test_a_record_with_much_text_is_whole(store: Store, clock: Clock) -> None:
    """500 tokens of 500 issuers and clients, with more than 64 KiB of distinct text, are told and settled as any."""
    store.track(
        [token(f"t{n}", iss=f"https://{n:03}.example/{'x' * 90}", client_id=f"{n:03}{'y' * 90}") for n in range(500)]
    )
    clock.reach(BEGAN + 60)
    claim = claim_one(store, BASE + 60)
    assert len({(entry.ref.iss, entry.ref.client_id) for entry in claim.entries}) == 500
    store.settle(claim.batch_id, dead=range(250))
    assert open_again(store, claim.batch_id)[claim.batch_id].entries == claim.entries[250:]


def test_a_large_second_is_claimed_in_pages(store: Store, clock: Clock) -> None:
    """Each claim takes at most `limit`, says whether there is more, and each member is in one claim."""
    store.track([token(f"t{n}", sid=f"s{n}") for n in range(1203)])
    clock.reach(BEGAN + 60)
    claims = claim_all(store, BASE + 60)
    assert [len(claim.entries) for claim in claims] == [500, 500, 203]
    assert [claim.more for claim in claims] == [True, True, False]
    assert len({claim.batch_id for claim in claims}) == 3
    assert all([entry.n for entry in claim.entries] == list(range(len(claim.entries))) for claim in claims)
    assert len(told(claims)) == 1203


def test_a_page_that_is_exactly_full_has_no_more(store: Store, clock: Clock) -> None:
    """The claim that takes the last member says so."""
    store.track([token(f"t{n}") for n in range(10)])
    clock.reach(BEGAN + 60)
    claim = store.claim(BASE + 60, services=["shop"], limit=10)
    assert claim is not None
    assert not claim.more
    assert store.due(before=BEGAN + 1000) == []


def test_a_session_whose_tokens_are_in_two_pages_ends_once(store: Store, clock: Clock) -> None:
    """The last page that has a live token of a session ends it, and no other does."""
    store.track([token(f"t{n}", sid="s1") for n in range(9)])
    clock.reach(BEGAN + 60)
    claims = claim_all(store, BASE + 60, limit=4)
    assert [entry.ends for entry in entries(claims)].count(BOTH) == 1
    assert any(entry.ends == BOTH for entry in claims[-1].entries)


def test_session_entries_count_as_members(make_store: MakeStore, clock: Clock) -> None:
    """Session entries are paged with the tokens of their second, and the second is due until all are gone."""
    store = make_store(rules=Rules(session_grace_seconds=10))
    store.track([token(f"t{n}", sid=f"s{n}") for n in range(5)])
    store.track([token(f"u{n}", ends_in=70) for n in range(4)])
    clock.reach(BEGAN + 70)
    claims = claim_all(store, BASE + 70, limit=4)
    assert all(len(claim.entries) <= 4 for claim in claims)
    found = told(claims)
    assert len([jti for jti, _ in found if jti == ""]) == 5
    assert len(found) == 9
    assert store.due(before=BEGAN + 1000) == [BASE + 60]


def test_many_session_entries_may_move_at_once(make_store: MakeStore, clock: Clock) -> None:
    """A page of session entries that all move makes no record, and one rearm for each new second."""
    store = make_store(rules=Rules(session_grace_seconds=10))
    store.track([token(f"t{n}", sid=f"s{n}", ends_in=60) for n in range(20)])
    store.track([token(f"u{n}", sid=f"s{n}", ends_in=90 + n % 2) for n in range(20)], continuing=True)
    clock.reach(BEGAN + 70)
    claim = claim_one(store, BASE + 70)
    assert claim.batch_id == ""
    assert sorted(claim.rearm) == [BASE + 100, BASE + 101]
    assert BASE + 70 not in store.due(before=BEGAN + 1000)


def test_a_claimed_second_may_be_used_again(store: Store, clock: Clock) -> None:
    """A token that is tracked late, under a second that was emptied, asks for a timer and is claimed as well."""
    store.track([token("t1")])
    clock.reach(BEGAN + 60)
    claim_one(store, BASE + 60)
    [answer] = store.track([token("t2")])
    assert answer.must_arm == (BASE + 60,)
    assert told([claim_one(store, BASE + 60)]) == {("t2", None): frozenset({"token"})}


def test_started_is_told_where_it_is_known(store: Store, clock: Clock) -> None:
    """An entry carries the start of its session, or of a token without one what the token tells."""
    store.track([token("t1", sid="s1", iat=BEGAN + 1), token("t2", sid="s1", iat=BEGAN + 2), token("t3", iat=None)])
    clock.reach(BEGAN + 60)
    started = {entry.ref.jti: entry.started for entry in claim_one(store, BASE + 60).entries}
    assert started == {"t1": BEGAN + 1, "t2": BEGAN + 1, "t3": None}


def test_started_is_told_of_a_session_that_another_token_closed(store: Store, clock: Clock) -> None:
    """A token that was detached before the last one of its session still has its session's start."""
    store.track([token("t1", sid="s1", ends_in=90), token("t2", sid="s1", iat=BEGAN + 5)])
    store.detach(ISS, "t2", revocation_id="r2")
    assert store.detach(ISS, "t1", revocation_id="r1").ends_session
    clock.reach(BEGAN + 60)
    assert claim_one(store, BASE + 60).entries[0].started == BEGAN


def test_what_a_detach_has_closed_is_named(store: Store, clock: Clock) -> None:
    """A claim says which entries end their session because a detach closed it: their revocation may be on its way."""
    store.track([token("t1", sid="s1"), token("t2", sid="s2"), token("t3", sid="s2"), token("t4", sid="s4")])
    assert store.detach(ISS, "t1", revocation_id="r1").ends_session
    assert not store.detach(ISS, "t2", revocation_id="r2").ends_session
    store.detach(ISS, "t4", revocation_id="r4")
    store.attach(ISS, "t4", revocation_id="r4")
    clock.reach(BEGAN + 60)
    claim = claim_one(store, BASE + 60)
    assert {entry.ref.jti for entry in claim.entries if entry.n in claim.closed} == {"t1"}
    assert told([claim])["t1", "s1"] == BOTH


def test_a_life_that_was_opened_again_is_not_named_as_closed(store: Store, clock: Clock) -> None:
    """The token that closed an earlier life of its session ends only itself."""
    store.track([token("t1", sid="s1")])
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t2", sid="s1", ends_in=90)])
    clock.reach(BEGAN + 60)
    assert claim_one(store, BASE + 60).closed == frozenset()


@pytest.mark.parametrize("session_comes_later", [False, True])
def test_a_whole_second_auth_time_is_decided_by_iat(store: Store, clock: Clock, session_comes_later: bool) -> None:
    """A session that began in the cut-off's second, but after it, is not told by that revocation: its end is."""
    first = token("t1", sid="s1", sub="alice", iat=BEGAN + 0.9, auth_time=BEGAN, session_exp=BEGAN + 90)
    if session_comes_later:
        store.track([first.replace(jti="t0", exp=BEGAN + 50, session_exp=None)])
        first = first.replace(iat=BEGAN + 30)
    store.track([first])
    denylist = Denylist()
    denylist.add(revocation("subject", "alice", now=BEGAN + 1, issued_before=BEGAN + 0.5))
    clock.reach(BEGAN + 90)
    [entry] = claim_one(store, BASE + 90).entries
    assert (entry.ends, entry.started, entry.ref.iat) == (SESSION, BEGAN, BEGAN + 0.9)
    assert denylist.find(entry.ref, started=entry.started) is None
