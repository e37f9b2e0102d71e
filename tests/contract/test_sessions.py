"""Sessions: when a life opens, what carries it on, and what ends it, once."""

from __future__ import annotations

import pytest

from knell.settings import Rules
from knell.store import Store
from tests.contract.conftest import MakeStore
from tests.contract.making import BEGAN, BOTH, ISS, SESSION, TOKEN, Clock, claim_one, record, revocation, token, told

BASE = int(BEGAN)
GRACE = Rules(session_grace_seconds=30.0)


def test_the_first_token_opens_a_life(store: Store) -> None:
    """A session is open from its first token on, and nothing else is."""
    assert store.session(ISS, "s1") is None
    store.track([token("t1", sid="s1", auth_time=BEGAN - 3.5)])
    assert store.session(ISS, "s1") == BEGAN - 3.5
    assert store.session(ISS, "s2") is None
    assert store.session("https://other.example", "s1") is None


def test_a_session_that_told_no_time_is_open(store: Store) -> None:
    """With neither auth_time nor iat a session is older than anything, and it is open."""
    store.track([token("t1", sid="s1", iat=None)])
    assert store.session(ISS, "s1") == 0.0
    assert not store.track([token("t2", sid="s1", iat=None)], continuing=True)[0].session_ended


def test_continuing_needs_an_open_life(store: Store) -> None:
    """A token that would carry on a session without an open life is refused and not recorded."""
    [answer] = store.track([token("t1", sid="s1")], continuing=True)
    assert answer.session_ended
    assert answer.must_arm == ()
    assert store.due(before=BEGAN + 1000) == []
    assert store.session(ISS, "s1") is None


def test_continuing_carries_on_an_open_life(store: Store, clock: Clock) -> None:
    """The session then ends with its last token, and keeps its start."""
    store.track([token("t1", sid="s1", ends_in=60)])
    [answer] = store.track([token("t2", sid="s1", ends_in=90, iat=BEGAN + 50)], continuing=True)
    assert not answer.session_ended
    assert answer.started == BEGAN
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): TOKEN}
    assert store.session(ISS, "s1") == BEGAN
    clock.reach(BEGAN + 90)
    assert told([claim_one(store, BASE + 90)]) == {("t2", "s1"): BOTH}
    assert store.session(ISS, "s1") is None


def test_reopen_opens_a_new_life(store: Store, clock: Clock) -> None:
    """With reopen a refresh of an ended session starts a new life, with a new start."""
    store.track([token("t1", sid="s1")])
    clock.reach(BEGAN + 60)
    claim_one(store, BASE + 60)
    late = token("t2", sid="s1", ends_in=120, iat=BEGAN + 61)
    assert store.track([late], continuing=True)[0].session_ended
    [answer] = store.track([late], continuing=True, reopen=True)
    assert not answer.session_ended
    assert answer.started == BEGAN + 61
    assert store.session(ISS, "s1") == BEGAN + 61
    clock.reach(BEGAN + 120)
    assert told([claim_one(store, BASE + 120)]) == {("t2", "s1"): BOTH}


def test_two_tokens_of_a_session_in_one_second_end_it_once(store: Store, clock: Clock) -> None:
    """When the last tokens of a session expire together, one entry of them ends the session."""
    store.track([token(f"t{n}", sid="s1") for n in range(5)])
    clock.reach(BEGAN + 60)
    ends = [entry.ends for entry in claim_one(store, BASE + 60).entries]
    assert sorted(ends, key=len) == [TOKEN] * 4 + [BOTH]


def test_session_exp_ends_a_session_in_an_entry_of_its_own(store: Store, clock: Clock) -> None:
    """With session_exp the tokens end alone, and the session ends at ceil(session_exp)."""
    ref = token("t1", sid="s1", sub="alice", client_id="web", ends_in=60, session_exp=BEGAN + 99.5)
    [answer] = store.track([ref])
    assert sorted(answer.must_arm) == [BASE + 60, BASE + 100]
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): TOKEN}
    assert store.session(ISS, "s1") == BEGAN
    clock.reach(BEGAN + 100)
    [entry] = claim_one(store, BASE + 100).entries
    assert entry.ends == SESSION
    assert (entry.ref.iss, entry.ref.jti, entry.ref.sid, entry.ref.sub) == (ISS, "", "s1", "alice")
    assert entry.ref.exp == BEGAN + 99.5
    assert entry.started == BEGAN
    assert store.session(ISS, "s1") is None


def test_a_token_that_outlives_its_session_ends_alone(store: Store, clock: Clock) -> None:
    """After a session's end by session_exp, the token that is left ends without it."""
    store.track([token("t1", sid="s1", ends_in=60, session_exp=BEGAN + 30)])
    clock.reach(BEGAN + 30)
    assert told([claim_one(store, BASE + 30)]) == {("", "s1"): SESSION}
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): TOKEN}


def test_a_token_of_an_old_life_does_not_end_a_new_one(store: Store, clock: Clock) -> None:
    """A token that outlived its life, and expires during the next, leaves the next alone."""
    store.track([token("t1", sid="s1", ends_in=60, session_exp=BEGAN + 30)])
    clock.reach(BEGAN + 30)
    claim_one(store, BASE + 30)
    store.track([token("t2", sid="s1", ends_in=90, iat=BEGAN + 31)])
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): TOKEN}
    assert store.session(ISS, "s1") == BEGAN + 31
    clock.reach(BEGAN + 90)
    assert told([claim_one(store, BASE + 90)]) == {("t2", "s1"): BOTH}


def test_grace_ends_a_session_after_its_last_token(make_store: MakeStore, clock: Clock) -> None:
    """Under a grace the session ends at ceil(last exp + grace)."""
    store = make_store(rules=GRACE)
    [answer] = store.track([token("t1", sid="s1", ends_in=60.25)])
    assert sorted(answer.must_arm) == [BASE + 61, BASE + 91]
    clock.reach(BEGAN + 61)
    assert told([claim_one(store, BASE + 61)]) == {("t1", "s1"): TOKEN}
    clock.reach(BEGAN + 91)
    [entry] = claim_one(store, BASE + 91).entries
    assert (entry.ends, entry.ref.jti, entry.ref.exp) == (SESSION, "", BEGAN + 90.25)


def test_a_refresh_during_the_grace_continues_the_session(make_store: MakeStore, clock: Clock) -> None:
    """Between the last token's exp and the end of the grace the life is open."""
    store = make_store(rules=GRACE)
    store.track([token("t1", sid="s1", ends_in=60)])
    clock.reach(BEGAN + 80)
    claim_one(store, BASE + 60)
    [answer] = store.track([token("t2", sid="s1", ends_in=140, iat=BEGAN + 80)], continuing=True)
    assert not answer.session_ended
    assert answer.started == BEGAN


def test_a_later_token_does_not_move_the_due_entry_and_the_claim_does(make_store: MakeStore, clock: Clock) -> None:
    """A session's entry stays where it is until it comes due, and is then moved to the new end, making no entry."""
    store = make_store(rules=GRACE)
    store.track([token("t1", sid="s1", ends_in=60)])
    store.armed([BASE + 60, BASE + 90])
    [answer] = store.track([token("t2", sid="s1", ends_in=100)], continuing=True)
    assert answer.must_arm == (BASE + 100,)
    assert store.due(before=BEGAN + 1000) == [BASE + 60, BASE + 90, BASE + 100]
    clock.reach(BEGAN + 90)
    claim = claim_one(store, BASE + 90)
    assert (claim.batch_id, claim.entries, claim.rearm) == ("", (), (BASE + 130,))
    assert store.due(before=BEGAN + 1000) == [BASE + 60, BASE + 100, BASE + 130]
    assert store.session(ISS, "s1") == BEGAN
    clock.reach(BEGAN + 130)
    assert told([claim_one(store, BASE + 130)]) == {("", "s1"): SESSION}


def test_a_moved_entry_does_not_ask_for_a_timer_that_is_confirmed(make_store: MakeStore, clock: Clock) -> None:
    """A session entry that moves to a second with a confirmed timer is not in rearm."""
    store = make_store(rules=GRACE)
    store.track([token("t1", sid="s1", ends_in=60)])
    store.track([token("t2", sid="s1", ends_in=100), token("t3", ends_in=130)])
    store.armed([BASE + 130])
    clock.reach(BEGAN + 90)
    assert claim_one(store, BASE + 90).rearm == ()


def test_session_exp_moved_by_a_later_token(store: Store, clock: Clock) -> None:
    """A later session_exp counts when the entry comes due."""
    store.track([token("t1", sid="s1", ends_in=60, session_exp=BEGAN + 100)])
    store.track([token("t2", sid="s1", ends_in=70, session_exp=BEGAN + 200)], continuing=True)
    clock.reach(BEGAN + 100)
    assert claim_one(store, BASE + 100).rearm == (BASE + 200,)
    clock.reach(BEGAN + 200)
    assert told([claim_one(store, BASE + 200)]) == {("", "s1"): SESSION}


def test_session_exp_goes_before_grace(make_store: MakeStore, clock: Clock) -> None:
    """With a session_exp the grace plays no part."""
    store = make_store(rules=GRACE)
    store.track([token("t1", sid="s1", ends_in=60, session_exp=BEGAN + 75)])
    clock.reach(BEGAN + 75)
    assert told([claim_one(store, BASE + 75)]) == {("", "s1"): SESSION}


def test_one_claim_may_end_a_token_and_its_session_in_two_entries(store: Store, clock: Clock) -> None:
    """A session_exp in its token's second makes one entry each, the session ended once."""
    store.track([token("t1", sid="s1", ends_in=60, session_exp=BEGAN + 60)])
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): TOKEN, ("", "s1"): SESSION}


@pytest.mark.parametrize("more", [{}, {"session_exp": BEGAN + 500}])
def test_a_denied_token_opens_no_life(store: Store, more: dict[str, float]) -> None:
    """A refused token leaves neither a session nor a session's due entry."""
    record(store, revocation("session", "s1"))
    assert store.track([token("t1", sid="s1", **more)])[0].denied is not None
    assert store.session(ISS, "s1") is None
    assert store.due(before=BEGAN + 10_000) == []


def test_a_denied_token_leaves_the_session_as_it_was(store: Store, clock: Clock) -> None:
    """A refused second token does not keep the session alive beyond its first."""
    store.track([token("t1", sid="s1", ends_in=60)])
    record(store, revocation("token", "t2"))
    assert store.track([token("t2", sid="s1", ends_in=90)], continuing=True)[0].denied is not None
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): BOTH}


def test_a_denied_token_keeps_the_end_that_nobody_else_tells(store: Store, clock: Clock) -> None:
    """A revocation of the token alone, found when it is tracked again, does not swallow the end of its session."""
    store.track([token("t1", sid="s1")])
    record(store, revocation("token", "t1", ends=TOKEN))
    assert store.track([token("t1", sid="s1", ends_in=90)])[0].denied is not None
    assert store.session(ISS, "s1") == BEGAN
    assert store.due(before=BEGAN + 1000) == [BASE + 60]
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): BOTH}


def test_a_denied_token_keeps_the_end_that_an_unfinished_revocation_left_it(store: Store, clock: Clock) -> None:
    """A detach that closed the life, and died, left the end to the token's entry; a second revocation tells it not."""
    store.track([token("t1", sid="s1")])
    assert store.detach(ISS, "t1", revocation_id="died").ends_session
    assert not store.detach(ISS, "t1", revocation_id="r2").ends_session
    record(store, revocation("token", "t1", id="r2", ends=TOKEN))
    assert store.track([token("t1", sid="s1")])[0].denied is not None
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): BOTH}


# ---- detach and attach


def test_detaching_an_unknown_token_finds_nothing(store: Store) -> None:
    """A token that is not tracked has no ref and ends no session; attach has no effect."""
    found = store.detach(ISS, "t1", revocation_id="r1")
    assert (found.ref, found.ends_session) == (None, False)
    store.attach(ISS, "t1", revocation_id="r1")


def test_detaching_a_token_without_a_session_ends_none(store: Store) -> None:
    """Without sid there is no session that could end."""
    store.track([token("t1")])
    found = store.detach(ISS, "t1", revocation_id="r1")
    assert (found.ref, found.ends_session) == (token("t1"), False)


def test_detaching_the_only_live_token_closes_the_life(store: Store, clock: Clock) -> None:
    """The life is closed at once, and the token's own entry ends the session, should the revocation not be made."""
    store.track([token("t1", sid="s1")])
    assert store.detach(ISS, "t1", revocation_id="r1").ends_session
    assert store.session(ISS, "s1") is None
    assert store.track([token("t2", sid="s1", ends_in=90)], continuing=True)[0].session_ended
    assert store.due(before=BEGAN + 1000) == [BASE + 60]
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): BOTH}


def test_detaching_one_of_two_live_tokens_leaves_the_session_open(store: Store, clock: Clock) -> None:
    """The session then ends with the token that is left, whichever comes due first."""
    store.track([token("t1", sid="s1", ends_in=90), token("t2", sid="s1", ends_in=60)])
    assert not store.detach(ISS, "t1", revocation_id="r1").ends_session
    assert store.session(ISS, "s1") == BEGAN
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t2", "s1"): BOTH}
    clock.reach(BEGAN + 90)
    assert told([claim_one(store, BASE + 90)]) == {("t1", "s1"): TOKEN}


def test_a_detached_token_that_comes_due_first_does_not_end_the_session(store: Store, clock: Clock) -> None:
    """It stopped counting when it was detached, and is not counted out a second time."""
    store.track([token("t1", sid="s1", ends_in=60), token("t2", sid="s1", ends_in=90)])
    store.detach(ISS, "t1", revocation_id="r1")
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): TOKEN}
    assert store.session(ISS, "s1") == BEGAN
    clock.reach(BEGAN + 90)
    assert told([claim_one(store, BASE + 90)]) == {("t2", "s1"): BOTH}


@pytest.mark.parametrize("with_grace", [True, False])
def test_detaching_leaves_a_session_with_an_end_of_its_own_open(
    make_store: MakeStore, clock: Clock, with_grace: bool
) -> None:
    """With session_exp or a grace the only live token does not end the session."""
    store = make_store(rules=GRACE if with_grace else Rules())
    more = {} if with_grace else {"session_exp": BEGAN + 90}
    store.track([token("t1", sid="s1", **more)])
    assert not store.detach(ISS, "t1", revocation_id="r1").ends_session
    assert store.session(ISS, "s1") == BEGAN
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): TOKEN}
    clock.reach(BEGAN + 90)
    assert told([claim_one(store, BASE + 90)]) == {("", "s1"): SESSION}


def test_detaching_again_gives_the_same_answer(store: Store) -> None:
    """The same revocation_id gets the same answer, another one is told that it ends nothing."""
    store.track([token("t1", sid="s1"), token("t2", sid="s2"), token("t3", sid="s2")])
    for _ in range(2):
        assert store.detach(ISS, "t1", revocation_id="r1").ends_session
        assert not store.detach(ISS, "t2", revocation_id="r2").ends_session
    other = store.detach(ISS, "t1", revocation_id="r3")
    assert (other.ref, other.ends_session) == (token("t1", sid="s1"), False)
    assert store.detach(ISS, "t1", revocation_id="r1").ends_session


def test_a_new_token_opens_a_new_life_after_a_detach(store: Store, clock: Clock) -> None:
    """The token that closed the old life then ends only itself."""
    store.track([token("t1", sid="s1", ends_in=60)])
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t2", sid="s1", ends_in=90, iat=BEGAN + 5)])
    assert store.session(ISS, "s1") == BEGAN + 5
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): TOKEN}
    assert store.session(ISS, "s1") == BEGAN + 5
    clock.reach(BEGAN + 90)
    assert told([claim_one(store, BASE + 90)]) == {("t2", "s1"): BOTH}


def test_a_life_that_was_opened_again_and_ended_is_not_ended_again(store: Store, clock: Clock) -> None:
    """The token that closed the first life comes due after the second has ended, and ends only itself."""
    store.track([token("t1", sid="s1", ends_in=90)])
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t2", sid="s1", ends_in=60)])
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t2", "s1"): BOTH}
    clock.reach(BEGAN + 90)
    assert told([claim_one(store, BASE + 90)]) == {("t1", "s1"): TOKEN}


def test_two_closings_of_two_lives_keep_apart(store: Store, clock: Clock) -> None:
    """Each detach closes its own life; the token of the life that was opened again ends only itself."""
    store.track([token("t1", sid="s1", ends_in=60)])
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t2", sid="s1", ends_in=90)])
    assert store.detach(ISS, "t2", revocation_id="r2").ends_session
    clock.reach(BEGAN + 90)
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): TOKEN}
    assert told([claim_one(store, BASE + 90)]) == {("t2", "s1"): BOTH}


def test_a_detached_token_is_not_made_live_by_tracking_it_again(store: Store, clock: Clock) -> None:
    """It moves, and stays detached: its own entry still ends the session whose life was closed."""
    store.track([token("t1", sid="s1", ends_in=60)])
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t1", sid="s1", ends_in=70)])
    assert store.due(before=BEGAN + 1000) == [BASE + 70]
    assert store.detach(ISS, "t1", revocation_id="r1").ends_session
    clock.reach(BEGAN + 70)
    assert told([claim_one(store, BASE + 70)]) == {("t1", "s1"): BOTH}


def test_a_detached_token_that_is_tracked_again_leaves_its_session_closed(store: Store) -> None:
    """Whoever tracks it again, before the revocation is recorded, does not open the session that it ends."""
    store.track([token("t1", sid="s1")])
    store.detach(ISS, "t1", revocation_id="r1")
    assert not store.track([token("t1", sid="s1")])[0].session_ended
    assert store.session(ISS, "s1") is None
    assert store.track([token("t2", sid="s1")], continuing=True)[0].session_ended


def test_a_detached_token_that_is_tracked_again_does_not_count(store: Store, clock: Clock) -> None:
    """The session ends with the token that is left."""
    store.track([token("t1", sid="s1", ends_in=90), token("t2", sid="s1", ends_in=60)])
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t1", sid="s1", ends_in=95)])
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t2", "s1"): BOTH}
    clock.reach(BEGAN + 95)
    assert told([claim_one(store, BASE + 95)]) == {("t1", "s1"): TOKEN}


def test_a_detached_token_keeps_its_session(store: Store, clock: Clock) -> None:
    """Tracked again with another sid it neither joins that session nor ends it; its own end is told."""
    store.track([token("t1", sid="s1"), token("t2", sid="s2", ends_in=300)])
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t1", sid="s2", ends_in=61)])
    clock.reach(BEGAN + 61)
    assert told([claim_one(store, BASE + 61)]) == {("t1", "s1"): BOTH}
    clock.reach(BEGAN + 300)
    assert told([claim_one(store, BASE + 300)]) == {("t2", "s2"): BOTH}


def test_attach_takes_detach_back(store: Store, clock: Clock) -> None:
    """The life is open again, and the token ends it as if nothing had been."""
    store.track([token("t1", sid="s1")])
    store.detach(ISS, "t1", revocation_id="r1")
    store.attach(ISS, "t1", revocation_id="r1")
    assert store.session(ISS, "s1") == BEGAN
    assert not store.track([token("t2", sid="s1", ends_in=50)], continuing=True)[0].session_ended
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 50)]) == {("t2", "s1"): TOKEN}
    assert told([claim_one(store, BASE + 60)]) == {("t1", "s1"): BOTH}


def test_attach_of_one_of_two_makes_it_count_again(store: Store, clock: Clock) -> None:
    """After attach the session lives as long as that token does."""
    store.track([token("t1", sid="s1", ends_in=90), token("t2", sid="s1", ends_in=60)])
    store.detach(ISS, "t1", revocation_id="r1")
    store.attach(ISS, "t1", revocation_id="r1")
    clock.reach(BEGAN + 60)
    assert told([claim_one(store, BASE + 60)]) == {("t2", "s1"): TOKEN}
    clock.reach(BEGAN + 90)
    assert told([claim_one(store, BASE + 90)]) == {("t1", "s1"): BOTH}


def test_attach_under_another_revocation_has_no_effect(store: Store) -> None:
    """Only the revocation that detached a token can take it back, once."""
    store.track([token("t1", sid="s1")])
    store.detach(ISS, "t1", revocation_id="r1")
    store.attach(ISS, "t1", revocation_id="r2")
    assert store.session(ISS, "s1") is None
    store.attach(ISS, "t1", revocation_id="r1")
    store.attach(ISS, "t1", revocation_id="r1")
    assert store.detach(ISS, "t1", revocation_id="r3").ends_session


def test_attach_after_the_claim_has_no_effect(store: Store, clock: Clock) -> None:
    """A token that was claimed meanwhile does not come back, and neither does its session."""
    store.track([token("t1", sid="s1")])
    store.detach(ISS, "t1", revocation_id="r1")
    clock.reach(BEGAN + 60)
    claim_one(store, BASE + 60)
    store.attach(ISS, "t1", revocation_id="r1")
    assert store.session(ISS, "s1") is None
    assert store.due(before=BEGAN + 1000) == []


def test_attach_into_a_life_that_was_opened_meanwhile(store: Store, clock: Clock) -> None:
    """The token that comes back is a live token of the new life, which ends once."""
    store.track([token("t1", sid="s1", ends_in=90)])
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t2", sid="s1", ends_in=60)])
    store.attach(ISS, "t1", revocation_id="r1")
    clock.reach(BEGAN + 60)
    first = told([claim_one(store, BASE + 60)])
    clock.reach(BEGAN + 90)
    second = told([claim_one(store, BASE + 90)])
    assert [ends for ends in (first | second).values() if "session" in ends] == [BOTH]


def test_attach_leaves_a_life_alone_that_the_token_was_never_of(store: Store, clock: Clock) -> None:
    """A token that outlived its life, and whose detach closed none, does not join the life that came after."""
    store.track([token("t1", sid="s1", ends_in=60, session_exp=BEGAN + 30)])
    clock.reach(BEGAN + 30)
    claim_one(store, BASE + 30)
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t2", sid="s1", ends_in=40, iat=BEGAN + 31)])
    store.attach(ISS, "t1", revocation_id="r1")
    clock.reach(BEGAN + 40)
    assert told([claim_one(store, BASE + 40)]) == {("t2", "s1"): BOTH}
    clock.reach(BEGAN + 60)
    [entry] = claim_one(store, BASE + 60).entries
    assert (entry.ends, entry.started) == (TOKEN, BEGAN)


def test_attach_of_a_token_that_was_moved_carries_its_session_on(make_store: MakeStore, clock: Clock) -> None:
    """Under a grace the session does not end before the token that came back to it."""
    store = make_store(rules=GRACE)
    store.track([token("t1", sid="s1", ends_in=60)])
    store.detach(ISS, "t1", revocation_id="r1")
    store.track([token("t1", sid="s1", ends_in=100)])
    store.attach(ISS, "t1", revocation_id="r1")
    clock.reach(BEGAN + 90)
    assert claim_one(store, BASE + 90).rearm == (BASE + 130,)
    clock.reach(BEGAN + 130)
    assert told([claim_one(store, BASE + 100)]) == {("t1", "s1"): TOKEN}
    assert told([claim_one(store, BASE + 130)]) == {("", "s1"): SESSION}
