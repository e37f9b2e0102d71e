"""Issuer, notifier, store and broker at once, each of which may fail at any step: every end is told, once and in time.

One level above test_state_machine: the calls are made by the real Issuer and the real Notifier. What is not real is the
broker, and the service at its end: they do with each message what the test draws.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, Phase, seed
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from knell import Issuer, SessionEnded, SessionRevoked, Settings, messages
from knell.arming import Armer
from knell.errors import BrokerUnavailable, InvalidClaims, StoreUnavailable, Unavailable
from knell.keys import ANY_ISSUER, NOTICE_TYPE, SigningKey, TrustList, trust_entry
from knell.messages import Message
from knell.notices import Cause, Notice, NoticeBatch, Receipt
from knell.notifier import Notifier, Swept
from knell.revocations import Revocation, Scope
from knell.settings import Rules
from knell.store import Claim, Claimed, Detached, Store, Tracked, open_store
from knell.tokens import TokenRef
from tests.contract.making import ISS, Clock
from tests.schemas import Schemas

T = TypeVar("T")
MakeStore = Callable[[Rules, Clock], Store]
SHOP = "shop"
FAR = 2.0**40
KEY = SigningKey.generate()
TRUST = TrustList.parse(json.dumps({"keys": [trust_entry(KEY, issuers=[ANY_ISSUER], causes=list(Cause))]}))
# No wide revocation names s1 (alice has no session of that name), so its lives are counted exactly.
SIDS = st.sampled_from(["s1", "s1", "s2", None])
LIFETIMES = st.sampled_from([4.5, 20.0, 60.25])
SESSION_LIFETIMES = st.sampled_from([None, None, 8.5, 30.0])
SCOPES = st.sampled_from(["token", "token", "token", "session", "subject"])
# Which one of many a rule is about: the last one is 1.
PICKS = st.sampled_from([1, 1, 2, 3, 4])


# ---- what goes wrong


class Died(BaseException):
    """The process was killed: nothing that it had still to do is done."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the store in a call: at which of the call's steps, before or after that step was done.

    dies: the process is killed there. away: the store answers nothing from there on. hiccup: it does not answer once.
    """

    kind: str
    step: int
    after: bool


# What the broker does with messages: it has them and says so, has them and does not say so, or neither.
KEPT, UNHEARD, LOST = "kept", "unheard", "lost"


@dataclass(frozen=True)
class How:
    """How a call goes.

    Attributes:
        later: how many seconds after the call before it.
        well: whether timers fire meanwhile, and the service handles what it is sent.
        fault, fate: what the store and the broker do.
    """

    later: float = 0.0
    well: bool = False
    fault: Fault | None = None
    fate: str = KEPT

    @property
    def healthy(self) -> bool:
        return self.fault is None and self.fate == KEPT


FAULTS = st.builds(
    Fault,
    kind=st.sampled_from(["dies", "dies", "away", "hiccup"]),
    step=st.sampled_from([1, 2, 2, 3, 3, 4, 5, 6, 8]),
    after=st.booleans(),
)
HOW = st.builds(
    How,
    later=st.sampled_from([0.0, 0.0, 1.0, 4.25, 15.0, 45.0]),
    well=st.sampled_from([False, True, True]),
    fault=st.one_of(st.none(), st.none(), FAULTS),
    fate=st.sampled_from([KEPT] * 6 + [UNHEARD, LOST]),
)


class Broker:
    """A publisher, the broker behind it, and what waits there."""

    def __init__(self, read: Callable[[str], object]) -> None:
        self.fate = KEPT
        self.broken = False
        self.timers: list[int] = []
        self.notices: list[tuple[str, list[int] | None]] = []
        self.commands: list[tuple[str, str]] = []
        self._read = read

    def send(self, sent: Sequence[Message]) -> Future[None]:
        """What Publisher.send promises."""
        future: Future[None] = Future()
        if self.fate != LOST:
            for message in sent:
                self._take(message)
        self.broken = self.fate != KEPT
        if self.broken:
            future.set_exception(BrokerUnavailable(self.fate))
        else:
            future.set_result(None)
        return future

    def _take(self, message: Message) -> None:
        task, arguments = message.headers["task"], json.loads(message.body)[0]
        if task == messages.EXPIRE:
            self.timers.append(arguments[0])
        elif task == messages.TERMINATE:
            self._read(arguments[0])
            self.notices.append((arguments[0], arguments[1]))
        else:
            self.commands.append((task, arguments[0]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class InPlace(Armer):
    """Publishes timers at once, and not in a thread of its own, so that a failing example fails again."""

    def arm(self, seconds: Any) -> None:
        if page := sorted(set(seconds)):
            self._publish(page)


class Shaky:
    """A store that fails where it is told to, and lets the model see what it does."""

    def __init__(self, store: Store, model: Model) -> None:
        self._store = store
        self._model = model
        self.plan(None)

    def plan(self, fault: Fault | None) -> None:
        """What goes wrong from now on."""
        self.failed = False
        self._steps = 0
        self._fault = fault
        self._down: type[BaseException] | None = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def step(*args: Any, **options: Any) -> Any:
            self._steps += 1
            self._fail(after=False)
            result = self._model.watch(name, found, *args, **options)
            self._fail(after=True)
            return result

        return step

    def _fail(self, *, after: bool) -> None:
        if self._down is not None:
            raise self._down("still")
        fault = self._fault
        if fault is not None and (fault.step, fault.after) == (self._steps, after):
            self.failed = True
            error = Died if fault.kind == "dies" else StoreUnavailable
            self._down = None if fault.kind == "hiccup" else error
            raise error(str(fault))


# ---- what should be


class Model:
    """What is true: which tokens are tracked, which lives sessions had, what was revoked, what ended, what was told."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.tokens: dict[str, TokenRef] = {}
        self.seen: set[str] = set()
        self.sid_of: dict[str, str | None] = {}
        # The revocations that somebody asked for; others are made for tokens of dead sessions.
        self.asked: dict[str, tuple[str, dict[str, str], float | None]] = {}
        self.revoked: dict[str, Revocation] = {}
        # Each entry that was claimed, with what revocations had told of it by then.
        self.ended: dict[tuple[str, int], tuple[Claimed, frozenset[str]]] = {}
        self.told: dict[tuple[str, int], Notice] = {}
        self.opened: Counter[str] = Counter()
        # Lives that were opened while a detach whose revocation was never made had closed the one before: a service
        # sees the two as one.
        self.merged: Counter[str] = Counter()
        self.closed_by: dict[str, str] = {}
        # By the id of a token's revocation, what its detach answered.
        self.detached: dict[str, Detached] = {}

    def watch(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Make a call of the store, and learn from its answer."""
        if name == "track":
            were = {ref.sid: self._is_open(ref.sid) for ref in args[0] if ref.sid is not None}
            answers: list[Tracked] = call(*args, **options)
            self._opened({sid for sid, was in were.items() if not was and self._is_open(sid)})
            for answer in answers:
                self._tracked(answer, options.get("predecessor"))
            return answers
        if name == "detach":
            open_before = [sid for sid in self.opened if self._is_open(sid)]
            detached = call(*args, **options)
            closed = [sid for sid in open_before if not self._is_open(sid)]
            self.closed_by |= dict.fromkeys(closed, options["revocation_id"])
            self.detached[options["revocation_id"]] = detached
            return detached
        result = call(*args, **options)
        if name == "revoke" and result.created:
            self._revoked(args[0])
        elif name == "claim" and result is not None:
            self._claimed(result)
        return result

    def _is_open(self, sid: str) -> bool:
        return self.store.session(ISS, sid) is not None

    def _opened(self, sids: set[str]) -> None:
        for sid in sids:
            self.opened[sid] += 1
            self.merged[sid] += self.closed_by.pop(sid, None) is not None

    def _tracked(self, answer: Tracked, predecessor: str | None) -> None:
        ref = answer.ref
        self.seen.add(ref.jti)
        refusing = [made for made in self.revoked.values() if made.refuses(ref, started=answer.started)]
        refusing += [made for made in self.revoked.values() if made.scope is Scope.TOKEN and made.value == predecessor]
        if answer.denied is not None:
            assert answer.denied in refusing
        elif not answer.session_ended:
            assert all(made.expires_at <= self.clock.now for made in refusing), "a dead token was tracked"
            self.tokens[ref.jti] = ref
            self.sid_of[ref.jti] = ref.sid

    def _revoked(self, revocation: Revocation) -> None:
        if revocation.scope is Scope.TOKEN and revocation.id in self.asked:
            ends_session = self.detached[revocation.id].ends_session
            assert ("session" in revocation.ends) == ends_session, "tells too much, or too little"
        self.revoked[revocation.id] = revocation
        self.closed_by = {sid: by for sid, by in self.closed_by.items() if by != revocation.id}

    def _claimed(self, claim: Claim) -> None:
        for entry in claim.entries:
            assert entry.ref.exp <= self.clock.now, "claimed early"
            if entry.ref.jti:
                assert self.tokens.pop(entry.ref.jti, None) == entry.ref, "claimed, and not tracked"
            if "session" in entry.ends and entry.ref.sid is not None:
                self.closed_by.pop(entry.ref.sid, None)
            self.ended[claim.batch_id, entry.n] = entry, self.told_by_revocations(entry)

    def told_by_revocations(self, entry: Claimed) -> frozenset[str]:
        """What of an entry revocations have told by now."""
        refusing = (made for made in self.revoked.values() if made.refuses(entry.ref, started=entry.started))
        return frozenset(end for made in refusing for end in made.ends)

    def outlived(self, jti: str) -> bool:
        """Whether a token was revoked, and the denylist has forgotten it: nobody can have it any more."""
        named = (made for made in self.revoked.values() if made.scope is Scope.TOKEN and made.value == jti)
        return any(made.expires_at <= self.clock.now for made in named)

    def check(self, notice: Notice) -> None:
        """A notice is being sent: is it time, and is it true?"""
        assert notice.at <= self.clock.now, "told early"
        if notice.cause is Cause.REVOKED:
            assert notice.revocation_id in self.revoked, "told before it was recorded"
            return
        entry, before = self.ended[notice.batch_id, notice.n]
        assert (notice.jti or "", notice.sid) == (entry.ref.jti, entry.ref.sid)
        assert notice.ends <= entry.ends - before, "told what a revocation had told"
        assert entry.ends - notice.ends <= self.told_by_revocations(entry), "left out what nobody had told"

    def session_ends(self) -> Counter[str]:
        """How often services were told of each session's end, without wide revocations: those name all its lives."""
        by_time = [told.sid for told in self.told.values() if told.cause is Cause.EXPIRED and "session" in told.ends]
        tokens = [made for made in self.revoked.values() if made.scope is Scope.TOKEN and "session" in made.ends]
        return Counter(sid for sid in (*by_time, *(self.sid_of.get(made.value) for made in tokens)) if sid is not None)


# ---- what happens


class Machine(RuleBasedStateMachine):
    """The rules: what issuers and the notifier are asked for, what becomes of messages, and the time in between."""

    make_store: MakeStore

    @initialize(
        grace=st.sampled_from([0.0, 0.0, 7.5]),
        ahead=st.sampled_from([0.0, 0.0, 3.0, -3.0]),
        lifetime=LIFETIMES,
        session_lifetime=SESSION_LIFETIMES,
    )
    def open(self, grace: float, ahead: float, lifetime: float, session_lifetime: float | None) -> None:
        self.clock = Clock()
        # The clocks of the issuer and of the notifier, which are not the store's.
        self.local = lambda: self.clock() + ahead
        self.settings = Settings(home=Path("nowhere"), rules=Rules(session_grace_seconds=grace))
        self.store = type(self).make_store(self.settings.rules, self.clock)
        self.store.add_service(SHOP)
        self.model = Model(self.store, self.clock)
        self.shaky: Any = Shaky(self.store, self.model)
        self.broker: Any = Broker(lambda jws: [self.model.check(notice) for notice in self._read(jws)])
        self.receipts: list[Receipt] = []
        self.issued: list[TokenRef] = []
        # The jtis and revocation ids that somebody was told are recorded, or will be.
        self.promised: set[str] = set()
        # Seconds whose timer was lost, by the broker or by a crash: the sweep has to arm them.
        self.excused: set[int] = set()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("knell.issuer.Armer", InPlace)
        self.patch.setattr("knell.notifier.Armer", InPlace)
        self.patch.setattr("knell.notifier.connect", lambda settings: self.broker)
        self.patch.setattr("knell.notifier.queue_depth", lambda connection, queue: len(connection.notices))
        self._start()
        self.log_in("s1", lifetime, session_lifetime, foreign=False, how=How())

    def _start(self) -> None:
        """New processes, with nothing of what the old ones knew."""
        given: dict[str, Any] = {"settings": self.settings, "store": self.shaky, "publisher": self.broker}
        self.issuer = Issuer(ISS, KEY, notice_key=KEY, clock=self.local, **given)
        self.notifier = Notifier(key=KEY, trust=TRUST, clock=self.local, sleep=self.clock.advance, **given)

    def _wait(self, how: How) -> None:
        """The time before a call."""
        self.clock.advance(how.later)
        if how.well:
            for second in sorted(second for second in self.broker.timers if second <= self.clock.now):
                self.broker.timers.remove(second)
                self._do(lambda second=second: self.notifier.expire(second), How())
            self._deliver(100, twice=False, receipts=True)

    def _do(self, call: Callable[[], T], how: How) -> T | None:
        """Make a call of a process, which may fail. Returns what it answered; None if it did not."""
        self.shaky.plan(how.fault)
        self.broker.fate = how.fate
        try:
            return call()
        except Unavailable:
            assert not how.healthy
            return None
        except Died:
            self._start()
            return None
        finally:
            if self.shaky.failed or how.fate != KEPT:
                self._excuse()
            self.shaky.plan(None)
            self.broker.fate = KEPT

    def _excuse(self) -> None:
        self.excused |= set(self.store.due(before=FAR)) - set(self.broker.timers)

    def _read(self, jws: str) -> Sequence[Notice]:
        """The notices of a message, as a service reads them."""
        payload, _ = TRUST.verify(jws, typ=NOTICE_TYPE, audience=self.settings.audience)
        return NoticeBatch.from_payload(payload).entries

    @staticmethod
    def _pick(some: Sequence[T], pick: int) -> T:
        return some[-min(pick, len(some))]

    # ---- the issuer

    @rule(sid=SIDS, lifetime=LIFETIMES, session_lifetime=SESSION_LIFETIMES, foreign=st.booleans(), how=HOW)
    def log_in(self, sid: str | None, lifetime: float, session_lifetime: float | None, foreign: bool, how: How) -> None:
        self._wait(how)
        now = self.clock.now
        claims: dict[str, Any] = {"jti": f"t{len(self.issued)}"}
        if sid is not None:
            claims |= {"sid": sid} if sid == "s1" else {"sid": sid, "sub": "alice"}
            if session_lifetime is not None:
                claims["session_exp"] = now + session_lifetime
        ref = TokenRef(iss=ISS, exp=now + lifetime, iat=now, auth_time=None if foreign else now, **claims)
        if foreign:
            self._track_foreign(ref, how)
        else:
            self._track(ref, lambda: self.issuer.issue(claims, ttl_seconds=lifetime), how)

    @precondition(lambda self: self.issued)
    @rule(pick=PICKS, lifetime=LIFETIMES, how=HOW)
    def track_again(self, pick: int, lifetime: float, how: How) -> None:
        self._wait(how)
        ref = self._pick(self.issued, pick).replace(exp=self.clock.now + lifetime)
        if not self.model.outlived(ref.jti):
            self._track_foreign(ref, how)

    @precondition(lambda self: any(ref.sid for ref in self.issued))
    @rule(pick=PICKS, lifetime=LIFETIMES, reopen=st.booleans(), how=HOW)
    def refresh(self, pick: int, lifetime: float, reopen: bool, how: How) -> None:
        self._wait(how)
        old = self._pick([ref for ref in self.issued if ref.sid], pick)
        ref = old.replace(jti=f"t{len(self.issued)}", iat=self.clock.now, exp=self.clock.now + lifetime)
        refreshed: dict[str, Any] = {"ttl_seconds": lifetime, "claims": {"jti": ref.jti}, "reopen": reopen}
        ended = self.store.session(ISS, str(old.sid)) is None and not reopen
        try:
            answer = self._track(ref, lambda: self.issuer.refresh(old.as_json(), **refreshed), how)
        except SessionEnded:
            assert ended
        else:
            assert not (ended and answer is not None and answer.recorded == "store"), "an ended session was carried on"

    def _track_foreign(self, ref: TokenRef, how: How) -> None:
        try:
            self._track(ref, lambda: self.issuer.track(ref), how, refusals=())
        except SessionRevoked:
            # Somebody has it, and verifiers know no more than it tells: some revocation must refuse it by that.
            assert any(made.refuses(ref) for made in self.model.revoked.values())

    def _track(
        self,
        ref: TokenRef,
        call: Callable[[], T],
        how: How,
        refusals: tuple[type[Exception], ...] = (SessionRevoked, InvalidClaims),
    ) -> T | None:
        try:
            answer: Any = self._do(call, how)
        except refusals:  # of a revoked session, which the model looks at; or of one whose session_exp has passed
            return None
        if ref.jti not in {each.jti for each in self.issued}:
            self.issued.append(ref)
        if answer is not None:
            assert answer.recorded == "queued" or ref.jti in self.model.tokens
            self.promised.add(ref.jti)
        return answer

    @precondition(lambda self: self.issued)
    @rule(scope=SCOPES, pick=PICKS, since=st.sampled_from([None, None, 10.0]), how=HOW)
    def revoke(self, scope: str, pick: int, since: float | None, how: How) -> None:
        jti = self._pick(self.issued, pick).jti
        match = {"token": {"jti": jti}, "session": {"sid": "s2"}, "subject": {"sub": "alice"}}[scope]
        cut_off = self.clock.now - since if since is not None and scope == "subject" else None
        self.model.asked[f"r{len(self.model.asked)}"] = scope, match, cut_off
        self.revoke_again(1, how)

    @precondition(lambda self: self.model.asked)
    @rule(pick=PICKS, how=HOW)
    def revoke_again(self, pick: int, how: How) -> None:
        self._wait(how)
        key = self._pick(list(self.model.asked), pick)
        scope, match, cut_off = self.model.asked[key]
        call = functools.partial(self.issuer.revoke, scope, match, issued_before=cut_off, idempotency_key=key)
        answer = self._do(call, how)
        if answer is not None:
            assert answer.recorded == "queued" or key in self.model.revoked
            self.promised.add(key)

    # ---- the notifier

    @precondition(lambda self: self.broker.timers)
    @rule(pick=PICKS, twice=st.booleans(), how=HOW)
    def fire(self, pick: int, twice: bool, how: How) -> None:
        """One of the next timers comes, in its time or early. Its message goes when the notifier is done with it."""
        self.clock.advance(how.later)
        second = self._pick(sorted(self.broker.timers, reverse=True), pick)
        self.broker.timers.remove(second)
        told = self._do(lambda: self.notifier.expire(second), how)
        if told is None or twice:
            self.broker.timers.append(second)

    @precondition(lambda self: self.broker.commands)
    @rule(twice=st.booleans(), how=HOW)
    def carry_out(self, twice: bool, how: How) -> None:
        """The oldest command comes. Its message goes when the notifier is done with it."""
        self._wait(how)
        task, jws = self.broker.commands[0]
        done = self._do(lambda: (self.notifier.track if task == messages.TRACK else self.notifier.revoke)(jws), how)
        if done is not None and not twice:
            del self.broker.commands[0]

    @rule(how=HOW)
    def sweep(self, how: How) -> None:
        self.clock.advance(how.later)
        swept: Swept | None = self._do(lambda: self.notifier.sweep(), how)
        if how.healthy and swept is not None and swept != Swept():
            soon = self.store.due(before=self.clock.now + 2 * self.settings.sweep_interval_seconds)
            assert set(soon) <= set(self.broker.timers), "what falls due soon was not armed"

    # ---- the broker, and the service

    @precondition(lambda self: self.broker.timers or self.broker.notices)
    @rule(what=st.sampled_from(["timers", "notices"]))
    def lose(self, what: str) -> None:
        getattr(self.broker, what).clear()
        self._excuse()

    @precondition(lambda self: self.broker.notices)
    @rule(count=st.sampled_from([1, 100]), twice=st.booleans(), receipts=st.booleans())
    def deliver(self, count: int, twice: bool, receipts: bool) -> None:
        self._deliver(count, twice=twice, receipts=receipts)

    def _deliver(self, count: int, *, twice: bool, receipts: bool) -> None:
        """The service handles what waits for it, the oldest first. Its receipts may come later, or never."""
        batch = self.broker.notices[:count]
        if not twice:
            del self.broker.notices[:count]
        for jws, todo in batch:
            handled = [notice for notice in self._read(jws) if todo is None or notice.n in todo]
            assert todo is None or len(handled) == len(todo), "asked for entries that the notice does not have"
            for notice in handled:
                self.model.told.setdefault((notice.batch_id, notice.n), notice)
            done = [notice.n for notice in handled]
            self.receipts.append(Receipt(batch_id=handled[0].batch_id, at=self.clock.now, done=done))
        if receipts:
            self.store.receive([(SHOP, receipt) for receipt in self.receipts])
            self.receipts.clear()

    # ---- what must hold

    @invariant()
    def every_second_has_a_timer_or_has_lost_it(self) -> None:
        if hasattr(self, "store"):
            due, armed = set(self.store.due(before=FAR)), set(self.broker.timers)
            assert {math.ceil(ref.exp) for ref in self.model.tokens.values()} <= due, "a token is under no second"
            self.excused &= due - armed
            assert due - armed <= self.excused, "a second has no timer"

    @invariant()
    def no_life_is_ended_twice(self) -> None:
        if hasattr(self, "store"):
            for sid, count in self.model.session_ends().items():
                assert count <= self.model.opened[sid], f"{sid}: {count} ends in {self.model.opened[sid]} lives"

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self._repair()
            self._everything_was_told()
        finally:
            self.patch.undo()
            self.store.close()

    def _repair(self) -> None:
        """Everything works again, and nothing new happens."""
        for _ in range(40):
            while self.broker.commands:
                self.carry_out(twice=False, how=How())
            self._deliver(1000, twice=False, receipts=True)
            self.clock.advance(3700)
            swept = self._do(self.notifier.sweep, How())
            left = self.store.due(before=FAR) or self.broker.notices or self.broker.commands
            if not left and swept is not None and not (swept.told or swept.resent):
                return
        raise AssertionError("it does not come to rest")

    def _everything_was_told(self) -> None:
        model = self.model
        assert not model.tokens, "tracked, and never ended"
        assert self.promised <= model.seen | set(model.revoked), "promised, and not done"
        assert {f"r-{id}" for id in model.revoked} <= {batch_id for batch_id, _ in model.told}, "revoked, and not told"
        for name, (entry, _) in model.ended.items():
            ends = model.told[name].ends if name in model.told else frozenset()
            assert entry.ends <= ends | model.told_by_revocations(entry), "ended, and not told"
        self.no_life_is_ended_twice()
        assert [sid for sid in model.opened if self.store.session(ISS, sid) is not None] == []
        assert model.opened["s1"] - model.merged["s1"] <= model.session_ends()["s1"], "a life was not ended"
        self.clock.advance(3700)
        assert self.store.open_notices() == []


@pytest.fixture
def sqlite(tmp_path: Path) -> MakeStore:
    """Opens a new store: a copy of an empty file, which is there sooner than new tables."""
    empty = tmp_path / "empty.db"
    open_store(f"sqlite:///{empty}").close()

    def make(rules: Rules, clock: Clock) -> Store:
        file = shutil.copyfile(empty, tmp_path / f"{uuid4().hex}.db")
        return open_store(f"sqlite:///{file}", rules=rules, clock=clock)

    return make


def redis(url: str, partitions: int) -> MakeStore:
    """Opens a new store: a namespace of its own."""

    def make(rules: Rules, clock: Clock) -> Store:
        return open_store(url, namespace=f"w{uuid4().hex}", rules=rules, partitions=partitions, clock=clock)

    return make


def postgresql(schemas: Schemas) -> MakeStore:
    """Opens a new store: in a schema that the one before it has had."""
    ready = schemas.lend_next()

    def make(rules: Rules, clock: Clock) -> Store:
        namespace = f"w{uuid4().hex}"
        ready(namespace)
        return open_store(schemas.url, namespace=namespace, rules=rules, clock=clock)

    return make


def run(make_store: MakeStore, examples: int, *, start: int) -> None:
    """Run so many examples, the same ones each time, that begin at a number."""
    machine = seed(start)(type("Everything", (Machine,), {"make_store": staticmethod(make_store)}))
    how = profile(
        max_examples=examples,
        stateful_step_count=30,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=how)


@pytest.mark.timeout(600)  # what it takes to make a failing example small
def test_every_end_is_told_once_and_in_time_whatever_fails_on_sqlite(sqlite: MakeStore) -> None:
    """However calls, crashes and losses interleave: nothing early, nothing twice, nothing left out."""
    run(sqlite, 8, start=0)


@pytest.mark.redis
@pytest.mark.timeout(600)
@pytest.mark.parametrize("partitions", [1, 3])
def test_every_end_is_told_once_and_in_time_whatever_fails_on_redis(redis_url: str, partitions: int) -> None:
    """The same, in one slot of a Redis Cluster and in three."""
    run(redis(redis_url, partitions), 25, start=partitions)


@pytest.mark.postgresql
@pytest.mark.timeout(600)
def test_every_end_is_told_once_and_in_time_whatever_fails_on_postgresql(schemas: Schemas) -> None:
    """The same, where a commit is a round trip to a server."""
    run(postgresql(schemas), 4, start=2)
