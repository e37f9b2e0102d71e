"""Any order of tracking, revoking, claiming and crashing: every end is told, none early, no life ended twice."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from knell.notices import Receipt, batch_id_of_revocation, batch_id_of_undo, partition_of_batch
from knell.revocations import Revocation, Scope
from knell.settings import Rules
from knell.store import AuditEntry, Claimed, Cursor, OpenNotice, open_store
from knell.tokens import TokenRef
from tests.contract.making import ISS, SESSION, Clock, noted, revocation

# Which of the tokens so far a rule is about, the latest being 1; 0 makes a new one.
ANY = st.sampled_from([0, 0, 1, 2, 3, 4])
KNOWN = st.sampled_from([1, 1, 2, 3, 4])
# No wide revocation names s1 (alice has no session of that name), so its lives are counted exactly.
SIDS = ["s1", "s1", "s2", None]
LIFETIMES = [4.5, 20.0, 60.25]
SHOP = "shop"
FAR = 2.0**40
# Where the caller of a claim dies: after the claim, after settle, after telling; or not at all.
CLAIMED, SETTLED, TOLD, ALL_WELL = range(4)
crashes = st.sampled_from([CLAIMED, SETTLED, TOLD, ALL_WELL, ALL_WELL, ALL_WELL])


class Callers(RuleBasedStateMachine):
    """One issuer, one notifier and one service, each of which may die between any two of its steps.

    The model: which tokens are alive, which lives of each session were opened, and what the service was told.
    """

    url = ""
    ready: Callable[[str], object] = staticmethod(lambda namespace: None)

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.jtis: list[str] = []
        self.tokens: dict[str, TokenRef] = {}
        self.recorded: dict[str, Revocation] = {}
        self.undone: list[Revocation] = []
        self.changes = 0
        self.unfinished: dict[str, str] = {}
        self.told: dict[tuple[str, int], tuple[Claimed, frozenset[str]]] = {}
        self.opened: Counter[str] = Counter()
        # Lives that were opened while a detach whose revocation was never made had closed the one before: the service
        # sees the two as one.
        self.merged: Counter[str] = Counter()
        self.closed_by: dict[str, str] = {}
        # Which life of its session a token counts for, and which tokens do not count because they are being revoked.
        self.life: dict[str, int] = {}
        self.detached: dict[str, str] = {}

    @initialize(grace=st.sampled_from([0.0, 0.0, 0.0, 7.5]))
    def open(self, grace: float) -> None:
        rules = Rules(session_grace_seconds=grace)
        # A database of its own for each run: a SQLite file with the tables of hundreds of runs would be slow to open.
        fresh = f"m{uuid4().hex}"
        url = self.url.replace("store.db", f"{fresh}.db")
        self.ready(fresh)
        self.store = open_store(url, namespace=fresh, rules=rules, clock=self.clock)
        self.store.add_service(SHOP)

    def _pick(self, pick: int) -> str:
        if pick == 0 or not self.jtis:
            self.jtis.append(f"t{len(self.jtis)}")
        return self.jtis[-max(1, min(pick, len(self.jtis)))]

    # ---- the issuer

    @rule(
        pick=ANY,
        sid=st.sampled_from(SIDS),
        lifetime=st.sampled_from(LIFETIMES),
        session_lifetime=st.sampled_from([None, None, 8.5, 30.0]),
        continuing=st.booleans(),
        arm=st.booleans(),
    )
    def track(
        self,
        pick: int,
        sid: str | None,
        lifetime: float,
        session_lifetime: float | None,
        continuing: bool,
        arm: bool,
    ) -> None:
        now, jti = self.clock.now, self._pick(pick)
        before = self.tokens.get(jti)
        if before is not None:
            sid = before.sid
        session_exp = None if session_lifetime is None or sid is None else now + session_lifetime
        sub = None if sid == "s1" else "alice"
        ref = TokenRef(iss=ISS, jti=jti, exp=now + lifetime, iat=now, sid=sid, sub=sub, session_exp=session_exp)
        was_open = sid is not None and self.store.session(ISS, sid) is not None
        [answer] = self.store.track([ref], continuing=continuing)
        refusing = [made for made in self.recorded.values() if made.refuses(ref, started=answer.started)]
        assert (answer.denied is not None) == bool(refusing)
        assert answer.session_ended == (continuing and sid is not None and not was_open and not refusing)
        if answer.session_ended:
            return
        if answer.denied is not None:
            assert answer.denied in refusing
            return  # what was tracked of it before stays: its claim finds it dead, or, after an undo, alive
        self.tokens[jti] = ref
        if sid is not None and not was_open and self.store.session(ISS, sid) is not None:
            self.opened[sid] += 1
            self.merged[sid] += self.closed_by.pop(sid, None) is not None
        if sid is not None and jti not in self.detached:
            self.life[jti] = self.opened[sid]
        if arm:
            self.store.armed(answer.must_arm)

    @rule(
        what=st.sampled_from(["token", "token", "token", "again", "take back", "session", "subject", "undo"]),
        pick=KNOWN,
        dies=st.booleans(),
    )
    def revoke(self, what: str, pick: int, dies: bool) -> None:
        if what == "token":
            self._revoke_token(self._pick(pick), f"r{uuid4().hex}", dies)
        elif what in ("session", "subject"):
            self._record(revocation(what, "s2" if what == "session" else "alice", now=self.clock.now))
        elif what == "undo":
            self._undo(pick)
        elif self.unfinished:
            revocation_id = list(self.unfinished)[-min(pick, len(self.unfinished))]
            if what == "again":
                self._revoke_token(self.unfinished[revocation_id], revocation_id, dies)
            else:
                self._take_back(revocation_id)

    def _undo(self, pick: int) -> None:
        wide = [made for made in self.recorded.values() if made.scope is not Scope.TOKEN]
        if not wide:
            return
        made = wide[-min(pick, len(wide))]
        audit = AuditEntry(at=self.clock.now, action="undone")
        undone = self.store.undo(made.id, batch_id=batch_id_of_undo(made.id), jws="x", audit=audit)
        assert undone is not None
        self.changes += 1
        assert undone.cursor.position == self.changes
        del self.recorded[made.id]
        self.undone.append(made)
        # What ended meanwhile was left to the revocation to tell.
        assert bool(undone.untold) <= (self.store.services()[0].missed_since is not None)

    def _take_back(self, revocation_id: str) -> None:
        jti = self.unfinished.pop(revocation_id)
        self.store.attach(ISS, jti, revocation_id=revocation_id)
        self.closed_by = {sid: by for sid, by in self.closed_by.items() if by != revocation_id}
        if self.detached.get(jti) == revocation_id:
            del self.detached[jti]
            sid = self.tokens[jti].sid if jti in self.tokens else None
            is_open = sid is not None and self.store.session(ISS, sid) is not None
            # Whether a token comes back into a later life depends on whether it had closed its own.
            if sid is None or not is_open or self.life.get(jti) != self.opened[sid]:
                self.life.pop(jti, None)

    def _revoke_token(self, jti: str, revocation_id: str, dies: bool) -> None:
        found = self.store.detach(ISS, jti, revocation_id=revocation_id)
        self.unfinished[revocation_id] = jti
        if found.ref is not None:
            self.detached.setdefault(jti, revocation_id)
        sid = found.ref.sid if found.ref is not None and found.ends_session else None
        if sid is not None and self.store.session(ISS, sid) is None:
            self.closed_by.setdefault(sid, revocation_id)
        if not dies:
            ends = frozenset({"token"} | (SESSION if found.ends_session else set()))
            self._record(revocation("token", jti, now=self.clock.now, id=revocation_id, ends=ends))
            del self.unfinished[revocation_id]
            self.closed_by = {sid: by for sid, by in self.closed_by.items() if by != revocation_id}
            if found.ends_session and found.ref is not None:
                self.told[revocation_id, 0] = (Claimed(0, found.ref, ends, None), ends)

    def _record(self, made: Revocation) -> None:
        recorded = self.store.revoke(made, batch_id=batch_id_of_revocation(made.id), jws="x", audit=noted(made))
        assert recorded.created
        self.recorded[made.id] = made
        self.changes += 1
        assert recorded.cursor.position == self.changes

    # ---- the notifier

    @rule(
        seconds=st.sampled_from([1.0, 4.25, 15.0, 15.0, 45.0]),
        sweeps=st.sampled_from([True, True, False]),
        dies=crashes,
        limit=st.sampled_from([500, 1, 2]),
    )
    def pass_time(self, seconds: float, sweeps: bool, dies: int, limit: int) -> None:
        self.clock.advance(seconds)
        if sweeps:
            for notice in self.store.open_notices():
                self._send_again(notice, dies)
            self._sweep(dies, limit)

    def _sweep(self, dies: int, limit: int) -> None:
        for second in self.store.due(before=self.clock.now):
            claim = self.store.claim(second, services=[SHOP], limit=limit)
            assert claim is not None
            self._claimed(claim.entries)
            if claim.batch_id and dies > CLAIMED:
                self._finish(claim.batch_id, claim.entries, settled=False, dies=dies)

    def _send_again(self, notice: OpenNotice, dies: int) -> None:
        if notice.kind != "expiry":
            if dies > TOLD:
                self.store.receive([(SHOP, Receipt(batch_id=notice.batch_id, at=0, done=[0]))])
        elif dies > CLAIMED:
            self._finish(notice.batch_id, notice.entries, settled=notice.settled, dies=dies)

    def _claimed(self, entries: tuple[Claimed, ...]) -> None:
        for entry in entries:
            assert entry.ref.exp <= self.clock.now, "told early"
            if entry.ref.jti:
                assert self.tokens.get(entry.ref.jti, entry.ref) == entry.ref
                self._gone(entry.ref.jti)
            if "session" in entry.ends and entry.ref.sid is not None:
                self.closed_by.pop(entry.ref.sid, None)
                if entry.ref.jti:
                    assert not self._live(entry.ref.sid), "a session was ended before its last token"

    def _gone(self, jti: str) -> None:
        self.tokens.pop(jti, None)
        self.life.pop(jti, None)
        self.detached.pop(jti, None)

    def _live(self, sid: str) -> list[str]:
        """The tokens that a session's present life still has."""
        present = (jti for jti, life in self.life.items() if life == self.opened[sid])
        return [jti for jti in present if self.tokens[jti].sid == sid and jti not in self.detached]

    def _finish(self, batch_id: str, entries: tuple[Claimed, ...], *, settled: bool, dies: int) -> None:
        """settle, tell, receipt: what follows a claim, here or in a later sweep."""
        assert partition_of_batch(batch_id) is not None
        denylist = {}
        for change in self.store.changes(Cursor(self.store.head().epoch, 0)):
            if change.kind == "revoked":
                denylist[change.revocation.id] = change.revocation
            else:
                del denylist[change.revocation.id]
        ends = {entry.n: entry.ends - _ended_by(denylist.values(), entry) for entry in entries}
        if not settled:
            self.store.settle(batch_id, dead=[n for n, left in ends.items() if not left])
        if dies > SETTLED:
            for entry in entries:
                if ends[entry.n]:
                    self.told.setdefault((batch_id, entry.n), (entry, ends[entry.n]))
        if dies > TOLD:
            self.store.receive([(SHOP, Receipt(batch_id=batch_id, at=0, done=list(ends)))])

    # ---- what must hold

    @invariant()
    def every_live_token_is_due(self) -> None:
        if hasattr(self, "store"):
            expected = {math.ceil(ref.exp) for ref in self.tokens.values()}
            assert expected <= set(self.store.due(before=FAR))

    @invariant()
    def no_life_is_ended_twice(self) -> None:
        for sid, count in self._session_ends().items():
            assert count <= self.opened[sid], f"{sid} was ended {count} times in {self.opened[sid]} lives"

    def _session_ends(self) -> Counter[str]:
        told = self.told.values()
        return Counter(entry.ref.sid for entry, ends in told if "session" in ends and entry.ref.sid is not None)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self._drain()
            assert not self.tokens, "tracked, and never told"
            ends = self._session_ends()
            for sid in self.opened:
                # What a wide revocation ended is not counted life by life: it names all of them.
                if not self._widely_revoked(sid):
                    assert self.opened[sid] - self.merged[sid] <= ends[sid] <= self.opened[sid]
                assert self.store.session(ISS, sid) is None
            assert self.store.due(before=FAR) == []
        finally:
            self.store.close()

    def _drain(self) -> None:
        for _ in range(1000):
            self.clock.advance(3700)
            notices = self.store.open_notices()
            for notice in notices:
                self._send_again(notice, ALL_WELL)
            if not notices and not self.store.due(before=FAR):
                return
            self._sweep(ALL_WELL, 3)
        raise AssertionError("the store does not become empty")

    def _widely_revoked(self, sid: str) -> bool:
        every = (*self.recorded.values(), *self.undone)
        return sid != "s1" and any(made.value in (sid, "alice") for made in every)


def _ended_by(denylist: Iterable[Revocation], entry: Claimed) -> frozenset[str]:
    refusing = (made for made in denylist if made.refuses(entry.ref, started=entry.started))
    return frozenset(end for made in refusing for end in made.ends)


@pytest.fixture
def machine_url(kind: str, request: pytest.FixtureRequest) -> Iterator[str]:
    if kind == "redis":
        yield str(request.getfixturevalue("redis_url"))
        return
    if kind == "postgresql":
        yield str(request.getfixturevalue("schemas").url)
        return
    with tempfile.TemporaryDirectory() as directory:
        yield f"sqlite:///{Path(directory) / 'store.db'}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kind",
    ["sqlite", *(pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in ("redis", "postgresql"))],
    indirect=True,
)
def test_every_end_is_told_whatever_dies(machine_url: str, kind: str, request: pytest.FixtureRequest) -> None:
    """However calls and crashes interleave: all that ends is told, nothing early, no session twice in one life."""
    machine = type("Callers", (Callers,), {"url": machine_url})
    if kind == "postgresql":
        machine.ready = staticmethod(request.getfixturevalue("schemas").lend_next())  # type: ignore[attr-defined]
    profile = settings(
        max_examples={"sqlite": 120, "redis": 200, "postgresql": 6}[kind],
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=profile)
