"""Revocations of every scope: what `track` refuses, and what is counted; and what an undo takes back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from knell.notices import Receipt, batch_id_of_revocation, batch_id_of_undo
from knell.revocations import NEVER, InitiatingEntity, Revocation
from knell.settings import Rules
from knell.store import AuditEntry, Counted, Recorded, ServiceStatus, Store, about
from knell.tokens import TokenRef
from tests.contract.conftest import MakeStore
from tests.contract.making import BEGAN, ISS, Clock, noted, record, revocation, token

OTHER = "https://other.example"
CLAIMS = {"tenant": "acme", "admin": True}
# A token that a revocation of each scope names, and the revocation's value.
NAMED: list[tuple[str, Any]] = [
    ("token", "t1"),
    ("session", "s1"),
    ("subject", "alice"),
    ("client", "web"),
    ("key", "k1"),
    ("claims", CLAIMS),
    ("issuer", ISS),
]


def full(jti: str = "t1", **more: Any) -> TokenRef:
    """A token with everything that a scope may name."""
    known = {"sid": "s1", "sub": "alice", "client_id": "web", "kid": "k1", "claims": dict(CLAIMS)}
    return token(jti, **known | more)


def undo(store: Store, made: Revocation, **more: Any) -> Recorded | None:
    """Take a revocation back."""
    entry = AuditEntry(at=BEGAN, action="undone", actor="bob", revocation_id=made.id, what=about(made), **more)
    return store.undo(made.id, batch_id=batch_id_of_undo(made.id), jws="u.n.do", audit=entry)


def every(store: Store, made: Revocation) -> Counted | None:
    """The count of a revocation, to its end."""
    return store.count(made, enough=10**9, within_seconds=60)


@pytest.mark.parametrize(("scope", "value"), NAMED)
def test_each_scope_refuses_what_it_names_and_nothing_else(store: Store, scope: str, value: Any) -> None:
    """A token is refused by the revocation that names it; what is named otherwise, or of another issuer, is not."""
    made = revocation(scope, value)
    assert record(store, made).created
    [refused, other, elsewhere] = store.track(
        [
            full(),
            full("t2", sid="s2", sub="bob", client_id="app", kid="k2", claims={"tenant": "acme", "admin": 1}),
            full(iss=OTHER),
        ]
    )
    assert refused.denied == made
    assert (other.denied is None) is (scope != "issuer")
    assert elsewhere.denied is None
    assert store.revocation(made.id) == made


@pytest.mark.parametrize(("scope", "value"), [named for named in NAMED if named[0] not in ("token", "session", "key")])
def test_a_cut_off_spares_what_began_later(store: Store, scope: str, value: Any) -> None:
    """The cut-off is compared with the start of the session: a refresh does not escape, a new login does."""
    store.track([full("t0", iat=BEGAN - 10)])
    record(store, revocation(scope, value, issued_before=BEGAN - 5))
    [refreshed, login] = store.track([full("t1", iat=BEGAN), full("t2", sid="s2", auth_time=BEGAN - 4)])
    assert refreshed.denied is not None
    assert login.denied is None


def test_a_key_leaves_only_when_somebody_undoes_it(make_store: MakeStore, clock: Clock) -> None:
    """A key is refused for ever: no token lives so long, and its thief signs new ones."""
    store = make_store()
    made = revocation("key", "k1")
    assert made.expires_at == NEVER
    record(store, made)
    clock.advance(50 * 365 * 86_400)
    assert store.prune().revocations == 0
    assert store.track([full(ends_in=60 * 365 * 86_400)])[0].denied == made
    assert undo(store, made) is not None
    assert store.track([full(ends_in=60 * 365 * 86_400)])[0].denied is None


def test_the_claims_at_hand_are_looked_at_and_not_kept(store: Store) -> None:
    """A caller that has the whole claims set gives it for the look-up; what is not tracked of it is nowhere."""
    record(store, revocation("claims", {"tenant": "acme", "aud": "shop"}))
    store.add_service("shop")
    bare = [token("t1"), token("t2"), token("t3")]
    sets = [{"tenant": "acme", "aud": ["web", "shop"]}, {"tenant": "acme", "aud": "web"}, {"tenant": "initech"}]
    found = store.track(bare, claims=sets)
    assert [each.denied is not None for each in found] == [True, False, False]
    assert [each.denied is not None for each in store.track(bare)] == [False, False, False]


def test_a_long_list_and_half_a_character_are_looked_through(store: Store) -> None:
    """The last of many groups refuses like the first; text that is none has no revocation, and stops nobody's token."""
    record(store, revocation("claims", {"group": "admins"}))
    record(store, revocation("claims", {"group": "g1", "tenant": "acme"}))
    groups = [f"x{n}" for n in range(300)]
    sets = [
        {"group": [*groups, "admins"]},
        {"group": [*groups, "g1"], "tenant": "acme"},
        {"group": [*groups, "\ud800"], "tenant": "\udfff"},
        {"group": ["\ud800", "admins"]},
    ]
    found = store.track([token(f"t{n}") for n in range(4)], claims=sets)
    assert [each.denied is not None for each in found] == [True, True, False, True]


def test_tracked_claims_come_back_with_the_token(store: Store, clock: Clock) -> None:
    """What is kept of a token is what its notice is made of: its tracked claims too, as they were."""
    store.add_service("shop")
    kept = full(claims={"tenant": "acme", "roles": ["admin", "user"], "level": 3, "beta": False})
    store.track([kept, token("t2")])
    clock.reach(kept.second)
    claim = store.claim(kept.second, services=["shop"])
    assert claim is not None
    assert {entry.ref for entry in claim.entries} == {kept, token("t2")}
    assert {entry.ref.jti: entry.ref.claims for entry in claim.entries} == {"t1": kept.claims, "t2": None}


def test_names_of_claims_are_learned_as_they_come_and_go(make_store: MakeStore, clock: Clock) -> None:
    """A store object that was opened before a set of names was first used looks for it at once; and it forgets."""
    early, late = make_store(), make_store()
    assert early.track([full()])[0].denied is None
    made = [revocation("claims", {f"claim{n}": "x"}) for n in range(20)]
    for one in made:
        record(late, one)
    marked = [full(f"t{n}", claims={f"claim{n}": "x"}) for n in range(20)]
    assert [each.denied for each in early.track(marked)] == made
    for one in made:
        undo(late, one)
    assert not any(each.denied for each in early.track(marked))
    again = revocation("claims", {"claim7": "x"})
    record(late, again)
    assert early.track([full(claims={"claim7": "x"})])[0].denied == again
    clock.reach(again.expires_at + 1)
    assert late.prune().revocations == 1
    assert early.track([full(claims={"claim7": "x"}, ends_in=again.expires_at + 99)])[0].denied is None


# ---- undo


@pytest.mark.parametrize(("scope", "value"), NAMED)
def test_an_undo_takes_back_what_was_refused(store: Store, scope: str, value: Any) -> None:
    """It leaves the denylist and says so in the feed, for verifiers; what it refused is accepted again."""
    head = store.head()
    made = revocation(scope, value)
    record(store, made)
    undone = undo(store, made)
    assert undone is not None
    assert undone.created
    assert [(one.kind, one.revocation, one.position) for one in store.changes(head)] == [
        ("revoked", made, head.position + 1),
        ("undone", made, undone.cursor.position),
    ]
    assert store.head() == undone.cursor
    assert store.snapshot() == []
    assert store.revocation(made.id) is None
    assert store.undone(made.id)
    assert store.track([full()])[0].denied is None


def test_undoing_one_of_several_reveals_another(store: Store) -> None:
    """Entries are kept per revocation: the weaker one of a key refuses on when the stronger one is taken back."""
    weak, strong = revocation("client", "web", issued_before=BEGAN - 5), revocation("client", "web")
    for one in (weak, strong):
        record(store, one)
    assert store.track([full(iat=BEGAN - 9)])[0].denied == strong
    undo(store, strong)
    assert store.track([full(iat=BEGAN - 9)])[0].denied == weak
    assert store.track([full("t2", sid="s2", iat=BEGAN)])[0].denied is None


def test_who_has_not_applied_it_is_spared(store: Store, clock: Clock) -> None:
    """The record is closed: nobody is sent it any more. Who had applied it keeps that, the others are undone."""
    for name in ("done", "parked", "waiting", "retrying"):
        store.add_service(name)
    made = revocation("subject", "alice")
    record(store, made)
    batch_id = batch_id_of_revocation(made.id)
    store.receive(
        [
            ("done", Receipt(batch_id=batch_id, at=BEGAN, done=(0,))),
            ("parked", Receipt(batch_id=batch_id, at=BEGAN, parked=(0,))),
            ("retrying", Receipt(batch_id=batch_id, at=BEGAN, retrying=(0,), until=BEGAN + 5)),
        ]
    )
    store.add_service("late")
    clock.advance(1)
    undone = undo(store, made)
    assert undone is not None
    assert undone.untold == ("retrying", "waiting")
    assert undone.services == ("done", "late", "parked", "retrying", "waiting")
    status = store.status(made.id)
    assert status is not None
    assert {name: each.state for name, each in status.items()} == {
        "done": "done",
        "parked": "parked",
        "retrying": "undone",
        "waiting": "undone",
    }
    assert status["waiting"] == ServiceStatus("undone", BEGAN + 1)
    clock.advance(31)
    assert {each.name: each.missed_since for each in store.services() if each.missed_since is not None} == {
        "retrying": BEGAN,
        "waiting": BEGAN,
    }
    [notice, *missed] = sorted(store.open_notices(), key=lambda each: each.kind, reverse=True)
    assert [each.kind for each in missed] == ["missed", "missed"]
    assert (notice.batch_id, notice.kind, notice.jws) == (batch_id_of_undo(made.id), "revocation", "u.n.do")
    assert sorted(notice.waiting) == ["done", "late", "parked", "retrying", "waiting"]
    # A receipt that comes late changes nothing.
    store.receive([("waiting", Receipt(batch_id=batch_id, at=BEGAN, done=(0,)))])
    assert (store.status(made.id) or {})["waiting"].state == "undone"


def test_undoing_again_changes_nothing(store: Store) -> None:
    """The second undo answers as the first one did; what is unknown, or has expired, cannot be undone."""
    store.add_service("shop")
    made = revocation("subject", "alice")
    record(store, made)
    first = undo(store, made)
    again = undo(store, made)
    assert first is not None
    assert again == replace(first, created=False, untold=())
    assert store.head() == first.cursor
    assert undo(store, revocation("subject", "carol")) is None
    assert not store.undone("unknown")


def test_an_id_that_was_undone_is_used_up(store: Store) -> None:
    """Recording it once more is refused by name: the caller would think that it is in force."""
    made = revocation("subject", "alice", id="incident-7")
    assert not record(store, made).undone
    assert not record(store, made).undone
    undo(store, made)
    again = record(store, made)
    assert (again.created, again.undone) == (False, True)
    assert store.revocation(made.id) is None


# ---- counting


@pytest.mark.parametrize(("scope", "value"), NAMED)
def test_what_a_revocation_would_end_is_counted(make_store: MakeStore, clock: Clock, scope: str, value: Any) -> None:
    """Live tokens that it names, and their sessions; not what has ended, began later, or is named otherwise."""
    store = make_store(rules=Rules(tracked_claims=("tenant", "admin")))
    mine = [full("t1"), full("t2")]
    others = [
        full("t3", iss=OTHER),
        full("t4", sid="s4", sub="bob", client_id="app", kid="k2", claims={"tenant": "acme", "admin": False}),
        full("t5", sid="s5", auth_time=BEGAN + 10, kid="k3"),
        full("t6", sid="s6", ends_in=1),
        full("t7", sid="s7"),
    ]
    store.track([*mine, *others])
    store.detach(ISS, "t7", revocation_id="r")
    clock.advance(2)
    counted = every(store, revocation(scope, value, now=BEGAN + 2))
    expected = {"token": (1, 1), "issuer": (3, 2)}.get(scope, (2, 1))
    assert counted == Counted(*expected)


def test_a_count_stops_when_it_is_enough(store: Store) -> None:
    """Found more than enough sessions, or no time left: it has looked at some of them only, and says so."""
    store.track([full(f"t{n}", sid=f"s{n}") for n in range(1500)])
    made = revocation("issuer", ISS)
    assert every(store, made) == Counted(1500, 1500)
    for limits in ({"enough": 10, "within_seconds": 60.0}, {"enough": 10**9, "within_seconds": 0.0}):
        some = store.count(made, **limits)  # type: ignore[arg-type]
        assert some is not None
        assert not some.complete
        assert some.sessions < 1500


def test_a_token_without_a_session_counts_as_one(store: Store) -> None:
    """Where tokens have no sid a wide revocation ends no less: it is not to pass for one that ends nothing."""
    store.track([full("t1"), full("t2"), full("t3", sid=None), full("t4", sid=None)])
    made = revocation("client", "web")
    assert every(store, made) == Counted(4, 3)
    some = store.count(made, enough=2, within_seconds=60)
    assert some is not None
    assert some.sessions > 2


def test_what_is_not_tracked_cannot_be_counted(store: Store) -> None:
    """By a claim that the store does not keep nobody knows; by those of every token one does."""
    store.track([full(), full("t2", sub="bob")])
    assert every(store, revocation("claims", {"tenant": "acme"})) is None
    assert every(store, revocation("claims", {"sub": "alice", "client_id": "web"})) == Counted(1, 1)


# ---- the audit log


def test_every_revocation_and_undo_is_in_the_audit_log(store: Store, clock: Clock) -> None:
    """Who, what, why, when and how many, the latest first; recording the same again adds nothing."""
    made = revocation("client", "web", reason="leaked secret", initiating_entity="policy")
    entry = AuditEntry.of_revocation(made, actor="alice", counts={"tokens": 7, "sessions": 3})
    for _ in range(2):
        store.revoke(made, batch_id=batch_id_of_revocation(made.id), jws="a.b.c", audit=entry)
    assert store.audit() == [entry]
    assert (entry.actor, entry.reason, entry.initiating_entity) == ("alice", "leaked secret", InitiatingEntity.POLICY)
    assert entry.what == {"scope": "client", "iss": ISS, "match": {"client_id": "web"}, "issued_before": BEGAN}
    for _ in range(2):
        undo(store, made, reason="a mistake")
    later = AuditEntry(at=BEGAN + 3, action="replayed", actor="bob", what={"services": ["shop"]})
    store.note(later)
    [replayed, undone, first] = store.audit()
    assert (replayed, first) == (later, entry)
    assert (undone.action, undone.actor, undone.reason, undone.revocation_id) == ("undone", "bob", "a mistake", made.id)
    store.note(replace(later, counts={"entries": 12}))
    assert store.audit(limit=1) == [replace(later, counts={"entries": 12})]


def test_the_audit_log_is_read_in_pages(store: Store) -> None:
    """Each page goes on where the one before it ended, among entries of the same moment too."""
    entries = [AuditEntry(id=f"a{n:02}", at=BEGAN + n // 4, action="replayed") for n in range(13)]
    for entry in entries:
        store.note(entry)
    read: list[AuditEntry] = []
    while page := store.audit(before=(read[-1].at, read[-1].id) if read else None, limit=3):
        read += page
    assert read == entries[::-1]


def test_the_audit_log_is_kept_for_its_time(make_store: MakeStore, clock: Clock) -> None:
    """It has a retention of its own, longer than that of notices."""
    store = make_store(rules=Rules(audit_seconds=100.0))
    old, new = AuditEntry(at=BEGAN, action="replayed"), AuditEntry(at=BEGAN + 50, action="replayed")
    for entry in (old, new):
        store.note(entry)
    clock.advance(100)
    assert store.prune().audit == 1
    assert store.audit() == [new]
    assert noted(revocation("token", "t1")).at == BEGAN


def test_a_session_s_own_end_says_what_it_may_be_revoked_by(make_store: MakeStore, clock: Clock) -> None:
    """Its client, key and claims are on its due entry: what a revocation of these has told is not told again."""
    store = make_store(rules=Rules(session_grace_seconds=30.0))
    store.add_service("shop")
    first = full()
    store.track([first, token("t2", sid="s2")])
    clock.reach(first.second + 30)
    claim = store.claim(first.second + 30, services=["shop"])
    assert claim is not None
    ends = {entry.ref.sid: entry.ref for entry in claim.entries}
    assert ends["s1"] == first.replace(jti="", exp=first.exp + 30)
    assert ends["s2"] == token("", sid="s2", ends_in=90)
