"""The denylist against a plain list."""

from __future__ import annotations

import threading
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from knell.denylist import Denylist
from knell.revocations import Revocation, Scope
from knell.tokens import TokenRef
from tests.unit.memory_feed import ISS, revocation

_values = st.sampled_from(["a", "b"])
_times = st.sampled_from([900.0, 1000.0, 1000.25, 1000.75, 1001.0])
_names = st.sampled_from(["tenant", "role", "level"])
_claims: st.SearchStrategy[Any] = st.sampled_from(["a", "b", 0, 1, False, True])
_tokens = st.builds(
    TokenRef,
    iss=st.sampled_from([ISS, "https://other.example"]),
    jti=_values,
    exp=st.just(5000.0),
    iat=st.none() | _times,
    auth_time=st.none() | _times,
    sid=st.none() | _values,
    sub=st.none() | _values,
    client_id=st.none() | _values,
    kid=st.none() | _values,
    claims=st.none() | st.dictionaries(_names, _claims | st.lists(_claims, max_size=3), max_size=3),
)


class AgainstAList(RuleBasedStateMachine):
    """Whatever is added, removed and pruned, the denylist refuses what a list that is searched in full refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.denylist = Denylist()
        self.model: list[Revocation] = []

    @rule(value=_values, exp=st.sampled_from([2000.0, 3000.0]), ends=st.sampled_from([{"token"}, {"token", "session"}]))
    def add_token(self, value: str, exp: float, ends: set[str]) -> None:
        self._add(revocation("token", value, exp=exp, ends=frozenset(ends)))

    @rule(value=_values, made_at=_times)
    def add_session(self, value: str, made_at: float) -> None:
        self._add(revocation("session", value, now=made_at))

    @rule(value=_values, cut_off=_times)
    def add_subject(self, value: str, cut_off: float) -> None:
        self._add(revocation("subject", value, now=1001.0, issued_before=cut_off))

    @rule(scope=st.sampled_from(["client", "issuer"]), value=_values, cut_off=_times)
    def add_wide(self, scope: str, value: str, cut_off: float) -> None:
        self._add(revocation(scope, ISS if scope == "issuer" else value, now=1001.0, issued_before=cut_off))

    @rule(value=_values)
    def add_key(self, value: str) -> None:
        self._add(revocation("key", value))

    @rule(match=st.dictionaries(_names | st.sampled_from(["sub", "sid"]), _claims, min_size=1, max_size=3), at=_times)
    def add_claims(self, match: dict[str, Any], at: float) -> None:
        self._add(revocation("claims", match, now=1001.0, issued_before=at))

    def _add(self, one: Revocation) -> None:
        assert self.denylist.add(one)
        self.model.append(one)

    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        if self.model:
            assert not self.denylist.add(data.draw(st.sampled_from(self.model)))

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.model:
            one = data.draw(st.sampled_from(self.model))
            self.model.remove(one)
            assert self.denylist.remove(one.id) is one
        assert self.denylist.remove("unknown") is None

    @rule(data=st.data(), limit=st.sampled_from([1, 2, 100]))
    def prune(self, data: st.DataObject, limit: int) -> None:
        now = data.draw(st.sampled_from([0.0] + [one.expires_at for one in self.model]))
        due = sorted((one for one in self.model if one.expires_at <= now), key=lambda one: (one.expires_at, one.id))
        self.model = [one for one in self.model if one not in due[:limit]]
        assert self.denylist.prune(now, limit=limit) == len(due[:limit])

    @rule(token=_tokens, started=st.none() | _times)
    def find(self, token: TokenRef, started: float | None) -> None:
        found = self.denylist.find(token, started=started)
        refusing = [one for one in self.model if one.refuses(token, started=started)]
        assert found in refusing if refusing else found is None
        if found is not None and found.scope is Scope.TOKEN:
            assert found.ends == frozenset().union(*(one.ends for one in refusing if one.scope is Scope.TOKEN))

    @invariant()
    def same_size(self) -> None:
        assert len(self.denylist) == len(self.model)
        assert {one.id for one in self.denylist} == {one.id for one in self.model}


TestAgainstAList: Any = AgainstAList.TestCase
TestAgainstAList.settings = hypothesis_settings(max_examples=80, stateful_step_count=50, deadline=None)


def _token(**more: Any) -> TokenRef:
    return TokenRef.from_claims({"iss": ISS, "jti": "j", "exp": 5000.0, "iat": 1000.0} | more)


def test_undoing_one_reveals_another() -> None:
    """When one of two revocations of a session is taken back, the other one still refuses it."""
    denylist = Denylist()
    one, other = revocation("session", "s"), revocation("session", "s")
    denylist.add(one)
    denylist.add(other)
    first = denylist.find(_token(sid="s"))
    assert first is not None
    denylist.remove(first.id)
    assert denylist.find(_token(sid="s")) is (other if first is one else one)


def test_claims_at_hand_count_whether_they_are_tracked_or_not() -> None:
    """A verifier judges by the whole claims set, a store by what it keeps; true is not 1."""
    denylist = Denylist()
    revoked = revocation("claims", {"tenant": "acme", "admin": True, "aud": "shop"})
    denylist.add(revoked)
    token = _token(sub="alice")
    whole = {"tenant": "acme", "admin": True, "aud": ["shop", "web"]}
    assert denylist.find(token, claims=whole) is revoked
    assert denylist.find(token, claims=whole | {"admin": 1}) is None
    assert denylist.find(token, claims=whole | {"aud": "web"}) is None
    assert denylist.find(token) is None
    assert denylist.find(token.replace(claims=whole)) is revoked


def test_a_thousand_sets_of_names_cost_a_token_nothing() -> None:
    """A token is compared with the matches that are kept under one of its claims alone, however many there are."""
    denylist = Denylist()
    for n in range(1000):
        denylist.add(revocation("claims", {f"claim{n}": "x", "tenant": "acme"}))
    index = denylist._claim_index
    assert len(list(index.candidates(ISS, {"tenant": "acme", "sub": "alice", "claim7": "x"}))) <= 2
    assert denylist.find(_token(), claims={"tenant": "acme", "claim7": "x"}) is not None
    for one in list(denylist):
        denylist.remove(one.id)
    assert not index._issuers
    assert not index._anchors


def test_what_tells_of_a_sessions_end_goes_before_what_lives_longer() -> None:
    """Of two revocations of a token the one that also told its session's end is found, and the other one after it."""
    denylist = Denylist()
    both = revocation("token", "j", exp=2000.0, ends=frozenset({"token", "session"}))
    alone = revocation("token", "j", exp=3000.0, ends=frozenset({"token"}))
    for one in (both, alone):
        denylist.add(one)
    assert denylist.find(_token()) is both
    denylist.remove(both.id)
    assert denylist.find(_token()) is alone


def test_many_of_one_key_cost_no_more() -> None:
    """A look-up asks one revocation of a key, however many there are of it."""
    denylist = Denylist()
    for cut_off in range(1, 2001):
        denylist.add(revocation("subject", "alice", now=5000.0, issued_before=float(cut_off)))
    asked: list[Revocation] = []

    class Counted(Revocation):
        def refuses(self, token: TokenRef, *, started: float | None = None) -> bool:
            asked.append(self)
            return Revocation.refuses(self, token, started=started)

    last = revocation("subject", "alice", now=5000.0, issued_before=2001.0)
    denylist.add(Counted(**{name: getattr(last, name) for name in Revocation.__dataclass_fields__}))
    assert denylist.find(_token(sub="alice", iat=1999.5)) is not None
    assert denylist.find(_token(sub="alice", iat=2500.0)) is None
    assert len(asked) == 2


def test_removed_entries_do_not_stay_in_the_timetable() -> None:
    """Revocations that are made and taken back over and over leave nothing behind that grows."""
    denylist = Denylist()
    for _ in range(10_000):
        one = revocation("token", "t")
        denylist.add(one)
        denylist.remove(one.id)
    assert len(denylist) == 0
    assert len(denylist._timetable) < 3000


def test_a_reader_beside_a_writer_never_misses_a_key_that_stays_revoked() -> None:
    """While revocations of a session come and go, a reader finds one at every moment, if there always is one."""
    denylist = Denylist()
    denylist.add(revocation("session", "s"))
    token, missed, stop = _token(sid="s"), [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            if denylist.find(token) is None:
                missed.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(5000):
        one = revocation("session", "s", now=2000.0)
        denylist.add(one)
        denylist.remove(one.id)
    stop.set()
    reader.join()
    assert not missed
