"""track, armed and due: tokens under their expiry seconds, and who has to arm a timer."""

from __future__ import annotations

import pytest

from knell.revocations import Revocation
from knell.settings import Rules
from knell.store import ARM_LEASE_SECONDS, IMMEDIATE_SECONDS, Store
from tests.contract.conftest import MakeStore
from tests.contract.making import BEGAN, BOTH, TOKEN, Clock, claim_all, claim_one, record, revocation, token, told

FAR = BEGAN + 10_000


def test_track_puts_a_token_under_its_expiry_second_and_asks_for_a_timer(store: Store) -> None:
    """A token's second is in must_arm, and is due."""
    ref = token(ends_in=60)
    [answer] = store.track([ref])
    assert answer.ref == ref
    assert answer.must_arm == (int(BEGAN) + 60,)
    assert answer.denied is None
    assert not answer.session_ended
    assert store.due(before=FAR) == [int(BEGAN) + 60]


def test_answers_are_in_the_order_of_the_tokens(store: Store) -> None:
    """Each token gets its own answer, in the order that they were given in."""
    refs = [token(f"t{n}", ends_in=60 + n % 7, sid=f"s{n % 3}") for n in range(50)]
    assert [answer.ref for answer in store.track(refs)] == refs


def test_tracking_nothing_is_nothing(store: Store) -> None:
    """No tokens, no answers, nothing due."""
    assert store.track([]) == []
    assert store.due(before=FAR) == []


@pytest.mark.parametrize(("ends_in", "second"), [(10.0, 10), (10.000001, 11), (10.5, 11), (10.999, 11)])
def test_a_fraction_of_a_second_is_due_at_the_next_whole_one(
    store: Store, clock: Clock, ends_in: float, second: int
) -> None:
    """The expiry second is ceil(exp), and exp keeps its fraction."""
    store.track([token(ends_in=ends_in)])
    assert store.due(before=FAR) == [int(BEGAN) + second]
    clock.reach(BEGAN + second)
    assert claim_one(store, int(BEGAN) + second).entries[0].ref.exp == BEGAN + ends_in


def test_each_second_is_asked_for_once_in_a_call(store: Store) -> None:
    """Tokens of one second are one timer: its second is in one answer's must_arm."""
    answers = store.track([token(f"t{n}", ends_in=60 + n % 2) for n in range(10)])
    assert sorted(s for answer in answers for s in answer.must_arm) == [int(BEGAN) + 60, int(BEGAN) + 61]


def test_a_leased_second_is_not_asked_for_again(store: Store, clock: Clock) -> None:
    """A second that was handed to a publisher is asked for again only when the lease has run out."""
    store.track([token("t1")])
    clock.advance(ARM_LEASE_SECONDS - 0.1)
    assert store.track([token("t2")])[0].must_arm == ()
    clock.advance(0.2)
    assert store.track([token("t3")])[0].must_arm == (int(BEGAN) + 60,)
    assert store.track([token("t4")])[0].must_arm == ()


def test_a_confirmed_second_is_not_asked_for_again(store: Store, clock: Clock) -> None:
    """Once the timer is confirmed, no later token asks for one."""
    store.track([token("t1")])
    store.armed([int(BEGAN) + 60])
    clock.advance(ARM_LEASE_SECONDS * 5)
    assert store.track([token("t2")])[0].must_arm == ()


def test_a_second_that_is_due_at_once_is_always_asked_for(store: Store, clock: Clock) -> None:
    """Within IMMEDIATE_SECONDS of its time a second is in must_arm, armed or not."""
    store.track([token("t1")])
    store.armed([int(BEGAN) + 60])
    clock.reach(BEGAN + 60 - IMMEDIATE_SECONDS)
    assert store.track([token("t2")])[0].must_arm == (int(BEGAN) + 60,)
    clock.advance(5)
    assert store.track([token("t3")])[0].must_arm == (int(BEGAN) + 60,)


def test_arming_a_second_without_members_is_ignored(store: Store) -> None:
    """A confirmation for an empty second neither makes it due nor arms it for later."""
    store.armed([int(BEGAN) + 60])
    store.armed([])
    assert store.due(before=FAR) == []
    assert store.track([token()])[0].must_arm == (int(BEGAN) + 60,)


def test_the_claim_that_empties_a_second_forgets_its_timer(store: Store, clock: Clock) -> None:
    """A token that is tracked under a second that was emptied needs a timer again."""
    store.track([token("t1")])
    store.armed([int(BEGAN) + 60])
    clock.reach(BEGAN + 60)
    claim_one(store, int(BEGAN) + 60)
    clock.now = BEGAN
    assert store.track([token("t2")])[0].must_arm == (int(BEGAN) + 60,)


def test_due_lists_the_oldest_seconds_first(store: Store) -> None:
    """due answers in order, up to and including `before`, at most `limit`."""
    store.track([token(f"t{n}", ends_in=n) for n in (30, 10, 20, 40)])
    base = int(BEGAN)
    assert store.due(before=BEGAN + 30) == [base + 10, base + 20, base + 30]
    assert store.due(before=BEGAN + 29.9) == [base + 10, base + 20]
    assert store.due(before=BEGAN + 40, limit=2) == [base + 10, base + 20]
    assert store.due(before=BEGAN + 9) == []


def test_tracking_again_moves_a_token(store: Store, clock: Clock) -> None:
    """A jti is in one second only: the last one that it was tracked under."""
    store.track([token("t1", ends_in=60), token("t2", ends_in=61)])
    assert store.track([token("t1", ends_in=90)])[0].must_arm == (int(BEGAN) + 90,)
    assert store.due(before=FAR) == [int(BEGAN) + 61, int(BEGAN) + 90]
    clock.reach(BEGAN + 90)
    assert store.claim(int(BEGAN) + 60, services=["shop"]) is None
    assert claim_one(store, int(BEGAN) + 90).entries[0].ref == token("t1", ends_in=90)


def test_tracking_the_same_again_changes_nothing(store: Store, clock: Clock) -> None:
    """An exact repetition leaves one token, in one second, of one session."""
    for _ in range(3):
        store.track([token("t1", sid="s1"), token("t1", sid="s1")])
    clock.reach(BEGAN + 60)
    assert len(told(claim_all(store, int(BEGAN) + 60))) == 1


def test_tracking_again_does_not_count_twice_in_the_session(store: Store, clock: Clock) -> None:
    """A token that is tracked twice is one live token of its session, whose end ends the session."""
    store.track([token("t1", sid="s1")])
    store.track([token("t1", sid="s1", ends_in=70)])
    clock.reach(BEGAN + 70)
    assert claim_one(store, int(BEGAN) + 70).entries[0].ends == {"token", "session"}
    assert store.session(token().iss, "s1") is None


def test_a_token_is_named_by_issuer_and_jti(store: Store, clock: Clock) -> None:
    """The same jti of two issuers is two tokens, and the same sid two sessions."""
    refs = [token("t1", iss="https://a", sid="s"), token("t1", iss="https://b", sid="s")]
    store.track(refs)
    assert store.detach("https://a", "t1", revocation_id="r1").ref == refs[0]
    clock.reach(BEGAN + 60)
    claim = claim_one(store, int(BEGAN) + 60)
    assert sorted(entry.ref.iss for entry in claim.entries) == ["https://a", "https://b"]


def test_a_denied_token_is_not_tracked(store: Store) -> None:
    """A revoked jti is answered with its revocation, and leaves no trace."""
    made = revocation("token", "t1", reason="stolen")
    record(store, made)
    [answer] = store.track([token("t1", sid="s1")])
    assert answer.denied == made
    assert answer.must_arm == ()
    assert store.due(before=FAR) == []
    assert store.session(token().iss, "s1") is None


def test_a_denied_token_leaves_its_second_to_the_others(store: Store) -> None:
    """Of two tokens of one second, one denied: the other still gets the timer."""
    record(store, revocation("token", "t1"))
    denied, alive = store.track([token("t1"), token("t2")])
    assert denied.denied is not None
    assert denied.must_arm == ()
    assert alive.must_arm == (int(BEGAN) + 60,)


def test_a_denied_token_leaves_no_trace_in_the_session_of_a_living_one(store: Store, clock: Clock) -> None:
    """Of two tokens of one session in one call, the dead one tells neither its start nor its session_exp."""
    record(store, revocation("token", "t1"))
    dead, alive = store.track(
        [token("t1", sid="s1", iat=BEGAN - 100, session_exp=BEGAN + 400), token("t2", sid="s1", iat=BEGAN)]
    )
    assert (dead.denied is None, alive.denied is None) == (False, True)
    assert store.session(token().iss, "s1") == alive.started == BEGAN
    assert store.due(before=FAR) == [int(BEGAN) + 60]
    clock.reach(BEGAN + 60)
    assert claim_one(store, int(BEGAN) + 60).entries[0].ends == BOTH


def test_a_denied_token_leaves_no_due_entry_under_grace(make_store: MakeStore) -> None:
    """The session that a living token opens beside a dead one ends by the living one's exp, and has its timer."""
    store = make_store(rules=Rules(session_grace_seconds=30))
    record(store, revocation("token", "t1"))
    dead, alive = store.track([token("t1", sid="s1", ends_in=60), token("t2", sid="s1", ends_in=70)])
    assert (dead.must_arm, sorted(alive.must_arm)) == ((), [int(BEGAN) + 70, int(BEGAN) + 100])
    assert store.due(before=FAR) == [int(BEGAN) + 70, int(BEGAN) + 100]


def test_a_dead_start_is_none_for_those_that_follow(store: Store) -> None:
    """A token without auth_time is judged by the start of a living one of its call, not by that of a dead one."""
    record(store, revocation("subject", "alice", now=BEGAN + 5, issued_before=BEGAN + 5))
    old = token("t1", sid="s1", sub="alice", iat=BEGAN)
    young = token("t2", sid="s1", sub="alice", iat=BEGAN + 6)
    late = token("t3", sid="s1", sub="alice", iat=BEGAN + 1)
    answers = store.track([old, young, late])
    assert [answer.denied is None for answer in answers] == [False, True, True]
    assert [answer.started for answer in answers[1:]] == [BEGAN + 6, BEGAN + 6]


@pytest.mark.parametrize("reopen", [False, True])
def test_a_revoked_predecessor_carries_no_session_on(store: Store, clock: Clock, reopen: bool) -> None:
    """A token that was stolen and revoked is not refreshed: the answer is its revocation, and nothing is recorded."""
    store.track([token("t1", sid="s1"), token("t2", sid="s1")])
    made = revocation("token", "t1", exp=BEGAN + 60, reason="stolen", ends=TOKEN)
    record(store, made)
    record(store, revocation("token", "t1", exp=BEGAN + 60, iss="https://other.example"))

    def refresh(jti: str, predecessor: str, **more: object) -> object:
        [answer] = store.track(
            [token(jti, sid="s1", ends_in=90, **more)], continuing=True, reopen=reopen, predecessor=predecessor
        )
        return answer.denied, answer.session_ended

    assert refresh("t3", "t1") == (made, False)
    assert refresh("t3", "t1", session_exp=BEGAN + 95) == (made, False)
    assert store.due(before=FAR) == [int(BEGAN) + 60]
    assert refresh("t4", "t2") == (None, False)
    clock.reach(BEGAN + 70)
    assert refresh("t5", "t1") == (None, False)


def test_a_predecessor_of_a_revoked_key_carries_no_session_on(store: Store) -> None:
    """What a stolen key has signed is not refreshed into a token of another key; of another issuer's key it is."""
    store.track([token("t1", sid="s1", kid="old")])
    made = revocation("key", "old", reason="stolen")
    record(store, made)
    record(store, revocation("key", "new", iss="https://other.example"))

    def refresh(kid: str | None) -> object:
        [answer] = store.track(
            [token("t2", sid="s1", kid="new")], continuing=True, predecessor="t1", predecessor_kid=kid
        )
        return answer.denied

    assert refresh("old") == made
    assert refresh("new") is None
    assert refresh(None) is None


def test_a_revoked_predecessor_goes_before_an_ended_session(store: Store) -> None:
    """Who carries on a session that ended with the token's revocation is told of the revocation."""
    store.track([token("t1", sid="s1")])
    made = revocation("token", "t1", exp=BEGAN + 60, ends=BOTH)
    assert store.detach(token().iss, "t1", revocation_id=made.id).ends_session
    record(store, made)
    [answer] = store.track([token("t2", sid="s1")], continuing=True, predecessor="t1")
    assert (answer.denied, answer.session_ended) == (made, False)
    [answer] = store.track([token("t2", sid="s1")], continuing=True, predecessor="another")
    assert (answer.denied, answer.session_ended) == (None, True)


@pytest.mark.parametrize(("scope", "value"), [("token", "t1"), ("session", "s1"), ("client", "web")])
def test_what_was_tracked_before_stays_when_it_is_denied(store: Store, clock: Clock, scope: str, value: str) -> None:
    """After an undo its end is still to be told: only the claim can say whether it has died of a revocation."""
    store.add_service("shop")
    first = token("t1", sid="s1", client_id="web")
    store.track([first])
    made = revocation(scope, value)
    record(store, made)
    assert store.track([first.replace(exp=BEGAN + 90)])[0].denied == made
    assert store.due(before=FAR) == [first.second]
    clock.reach(BEGAN + 60)
    claim = store.claim(first.second, services=["shop"])
    assert claim is not None
    assert [(entry.ref, entry.ends) for entry in claim.entries] == [(first, BOTH)]


@pytest.mark.parametrize(("scope", "value"), [("token", "t1"), ("session", "s1"), ("subject", "alice")])
def test_each_scope_denies(store: Store, scope: str, value: str) -> None:
    """Token, session and subject revocations each refuse what they name and nothing else."""
    record(store, revocation(scope, value))
    refused, other, foreign = store.track(
        [
            token("t1", sid="s1", sub="alice"),
            token("t2", sid="s2", sub="bob"),
            token("t1", sid="s1", sub="alice", iss="https://other.example"),
        ]
    )
    assert refused.denied is not None
    assert other.denied is None
    assert foreign.denied is None


def test_a_cut_off_spares_what_began_later(store: Store) -> None:
    """A subject's cut-off refuses a session that began at it, and not one that began after it."""
    record(store, revocation("subject", "alice", now=BEGAN + 5, issued_before=BEGAN + 5))
    equal = token("t1", sub="alice", iat=BEGAN + 5)
    later = token("t2", sub="alice", iat=BEGAN + 5.001)
    assert [answer.denied is None for answer in store.track([equal, later])] == [False, True]


def test_a_cut_off_is_compared_with_the_start_that_the_store_knows(store: Store) -> None:
    """A refreshed token with a late iat and no auth_time does not escape its session's start."""
    store.track([token("t1", sid="s1", sub="alice", iat=BEGAN)])
    record(store, revocation("subject", "alice", now=BEGAN + 5.5, issued_before=BEGAN + 5.5))
    refreshed = token("t2", sid="s1", sub="alice", iat=BEGAN + 10)
    assert store.track([refreshed], continuing=True)[0].denied is not None


def test_of_several_revocations_one_that_refuses_is_found(store: Store) -> None:
    """A revocation whose cut-off spares a token does not hide another that refuses it."""
    record(store, revocation("subject", "alice", issued_before=BEGAN - 100))
    strict = revocation("subject", "alice", issued_before=BEGAN + 1)
    record(store, strict)
    record(store, revocation("subject", "alice", issued_before=BEGAN - 50))
    assert store.track([token("t1", sub="alice")])[0].denied == strict


def test_of_many_revocations_one_is_read(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subject that is revoked over and over costs a look-up no more than one that was revoked once."""
    for n in range(250):
        record(store, revocation("subject", "alice", issued_before=BEGAN - n))
    read: list[object] = []
    from_json = Revocation.from_json
    monkeypatch.setattr(Revocation, "from_json", lambda found: (read.append(found), from_json(found))[1])
    assert store.track([token("t1", sub="alice", iat=BEGAN + 1)])[0].denied is None
    assert store.track([token("t2", sub="alice", iat=BEGAN)])[0].denied is not None
    assert len(read) == 2
    clock.advance(40 * 86_400)
    assert store.prune().revocations == 250
    assert store.track([token("t3", sub="alice", iat=BEGAN, ends_in=41 * 86_400)])[0].denied is None


def test_the_strongest_that_lives_is_found(store: Store, clock: Clock) -> None:
    """A stronger revocation that has expired, pruned or not, reveals the next."""
    short, long = Rules(max_session_seconds=60, max_token_seconds=60), Rules()
    for n in range(150):
        record(store, revocation("subject", "alice", issued_before=BEGAN - n / 1000, rules=short))
    weak = revocation("subject", "alice", issued_before=BEGAN - 10, rules=long)
    record(store, weak)
    clock.advance(1000)
    for jti in ("before", "after"):
        young, old = store.track(
            [token(f"{jti}1", sub="alice", ends_in=2000), token(f"{jti}2", sub="alice", ends_in=2000, iat=BEGAN - 10)]
        )
        assert (young.denied, old.denied) == (None, weak)
        assert store.prune().revocations == (150 if jti == "before" else 0)


def test_what_tells_of_the_sessions_end_is_the_stronger(store: Store, clock: Clock) -> None:
    """Of two revocations of a token the one that told its session's end counts, though the other lives longer."""
    both = revocation("token", "t1", exp=BEGAN + 10, ends=BOTH)
    record(store, both)
    record(store, revocation("token", "t1", exp=BEGAN + 100, ends=TOKEN))
    assert store.track([token("t1")])[0].denied == both
    clock.advance(60)
    found = store.track([token("t1", ends_in=90)])[0].denied
    assert found is not None
    assert found.ends == TOKEN


def test_started_is_auth_time_or_the_first_iat(store: Store) -> None:
    """The start of a session is its first token's auth_time, else that token's iat."""
    first, later = store.track([token("t1", sid="s1", iat=BEGAN + 1), token("t2", sid="s1", iat=BEGAN + 9)])
    assert (first.started, later.started) == (BEGAN + 1, BEGAN + 1)
    assert store.track([token("t3", sid="s2", auth_time=BEGAN - 7.25)])[0].started == BEGAN - 7.25
    assert store.track([token("t4")])[0].started == BEGAN
    assert store.track([token("t5", iat=None)])[0].started is None


@pytest.mark.parametrize(
    "name",
    ["ü–日本語–🔑", "a:b:{c}:[d]", "{", "}{", "%s $1 \\ ' \" ; --", " ", "x" * 256, "é" * 128, "*", "a|b,c/d?e#f"],
)
def test_unusual_identifiers_come_back_as_they_went_in(store: Store, clock: Clock, name: str) -> None:
    """Any text that is a valid identifier works as iss, jti, sid, sub, client_id, kid and revocation id."""
    ref = token(name, iss=name, sid=name, sub=name, client_id=name, kid=name)
    [answer] = store.track([ref])
    assert answer.denied is None
    assert store.session(name, name) == BEGAN
    id = name[:100]  # an id is shorter than other identifiers: 200 bytes
    assert store.detach(name, name, revocation_id=id).ref == ref
    store.attach(name, name, revocation_id=id)
    made = revocation("subject", name, iss=name, id=id, issued_before=BEGAN - 1)
    record(store, made)
    assert store.revocation(id) == made
    clock.reach(BEGAN + 60)
    [entry] = claim_one(store, int(BEGAN) + 60).entries
    assert entry.ref == ref
    assert entry.ends == {"token", "session"}


def test_a_timer_of_the_session_is_asked_for_again(store: Store, clock: Clock) -> None:
    """As long as nobody has confirmed the timer of its session's own end, each of its tokens asks for it."""
    store.track([token("t1", sid="s1", session_exp=BEGAN + 500)])
    clock.advance(ARM_LEASE_SECONDS)
    [answer] = store.track([token("t2", sid="s1", ends_in=70)])
    assert sorted(answer.must_arm) == [int(BEGAN) + 70, int(BEGAN) + 500]


def test_every_field_of_a_token_is_kept(store: Store, clock: Clock) -> None:
    """A claim gives back the whole TokenRef, fractions included."""
    ref = token(
        ends_in=59.123456,
        iat=BEGAN + 0.25,
        sid="s1",
        sub="alice",
        client_id="web",
        kid="k1",
        auth_time=BEGAN - 0.001,
        session_exp=BEGAN + 5000.5,
    )
    bare = token("bare", iat=None)
    store.track([ref, bare])
    clock.reach(BEGAN + 60)
    assert {entry.ref for entry in claim_one(store, int(BEGAN) + 60).entries} == {ref, bare}


def test_thousands_of_tokens_in_one_call(store: Store, clock: Clock) -> None:
    """One call takes thousands of tokens, and every one of them is told once."""
    refs = [token(f"t{n}", ends_in=60 + n % 3, sid=f"s{n}") for n in range(3000)]
    assert len(store.track(refs)) == 3000
    clock.reach(BEGAN + 62)
    found = told(claim for s in (60, 61, 62) for claim in claim_all(store, int(BEGAN) + s))
    assert found == {(ref.jti, ref.sid): frozenset({"token", "session"}) for ref in refs}


def test_a_token_without_a_session_ends_alone(store: Store, clock: Clock) -> None:
    """Without sid there is no session to end."""
    store.track([token("t1")])
    clock.reach(BEGAN + 60)
    assert claim_one(store, int(BEGAN) + 60).entries[0].ends == TOKEN


def test_namespaces_keep_environments_apart(make_store: MakeStore, clock: Clock) -> None:
    """What one namespace tracks, revokes or registers, another does not see."""
    one, two = make_store(namespace="a-one"), make_store(namespace="a-two")
    one.track([token("t1", sid="s1")])
    one.add_service("shop")
    record(one, revocation("token", "t2"))
    assert two.due(before=FAR) == []
    assert two.session(token().iss, "s1") is None
    assert two.services() == []
    assert two.head().position == 0
    assert two.track([token("t2")])[0].denied is None
