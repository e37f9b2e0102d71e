"""The stores against each other: the same calls, at the same times, are answered alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from knell.settings import Rules
from knell.store import Claim, Store, open_store
from knell.tokens import TokenRef
from tests.contract.making import BOTH, ISS, TOKEN, Clock, record, revocation
from tests.schemas import Schemas

SIDS = {"s1": "alice", "s2": None, None: "alice"}  # and whose they are
# Tokens and revocations by few names, so that they meet; in each second there are often several.
JTIS = st.sampled_from(["a", "b", "c", "d", "e"])
REVOCATIONS = st.sampled_from(["r1", "r2"])

tokens = st.builds(
    dict,
    jti=JTIS,
    sid=st.sampled_from(list(SIDS)),
    ends_in=st.sampled_from([4.5, 20.0, 60.25]),
    iat=st.sampled_from([None, 0.0, 1.25]),
    auth_time=st.sampled_from([None, None, 3.0, 2.9]),
    session_ends_in=st.sampled_from([None, None, 8.5, 30.0]),
)


class Alike(RuleBasedStateMachine):
    """Every rule makes the same call on each store, and the answers are the same."""

    urls: tuple[str, ...] = ()
    ready: Callable[[str], object] = staticmethod(lambda namespace: None)

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.stores: list[Store] = []
        self.sids: dict[str, str | None] = {}

    @initialize(grace=st.sampled_from([0.0, 0.0, 7.5]))
    def open(self, grace: float) -> None:
        fresh = f"a{uuid4().hex}"
        self.ready(fresh)
        self.stores = [
            open_store(
                url.replace("store.db", f"{fresh}.db"),
                namespace=fresh,
                rules=Rules(session_grace_seconds=grace, max_session_seconds=60.0, max_token_seconds=90.0),
                clock=self.clock,
            )
            for url in self.urls
        ]
        self._same(lambda store: store.add_service("shop"))

    def _same(self, call: Callable[[Store], Any]) -> Any:
        first, *others = (call(store) for store in self.stores)
        for other in others:
            assert other == first
        return first

    @rule(
        made=st.lists(tokens, min_size=1, max_size=3, unique_by=lambda one: one["jti"]),
        continuing=st.booleans(),
        predecessor=st.none() | JTIS,
        arm=st.booleans(),
    )
    def track(self, made: list[dict[str, Any]], continuing: bool, predecessor: str | None, arm: bool) -> None:
        now = self.clock.now

        def ago(seconds: float | None) -> float | None:
            return None if seconds is None else now - seconds

        refs = []
        for one in made:
            # A token that leaves its session does so alone: whether others of its call are judged by a session that it
            # has ended by that is not promised.
            sid = one["sid"] if len(made) == 1 else self.sids.get(one["jti"], one["sid"])
            refs.append(
                TokenRef(
                    iss=ISS,
                    jti=one["jti"],
                    exp=now + one["ends_in"],
                    iat=ago(one["iat"]),
                    sid=sid,
                    sub=SIDS[sid],
                    auth_time=ago(one["auth_time"]),
                    session_exp=now + one["session_ends_in"] if sid and one["session_ends_in"] else None,
                )
            )
        answers = self._same(lambda store: store.track(refs, continuing=continuing, predecessor=predecessor))
        self.sids |= {one.ref.jti: one.ref.sid for one in answers if one.denied is None and not one.session_ended}
        if arm:
            self._same(lambda store: store.armed([second for answer in answers for second in answer.must_arm]))

    @rule(jti=JTIS, by=REVOCATIONS)
    def detach(self, jti: str, by: str) -> None:
        self._same(lambda store: store.detach(ISS, jti, revocation_id=by + jti))

    @rule(jti=JTIS, by=REVOCATIONS)
    def attach(self, jti: str, by: str) -> None:
        self._same(lambda store: store.attach(ISS, jti, revocation_id=by + jti))

    @rule(
        what=st.sampled_from([("token", "a"), ("token", "b"), ("session", "s2"), ("subject", "alice")]),
        by=REVOCATIONS,
        alone=st.booleans(),
        age=st.sampled_from([0.0, 0.5, 2.0, 100.0]),
    )
    def revoke(self, what: tuple[str, str], by: str, alone: bool, age: float) -> None:
        scope, value = what
        more: dict[str, Any] = {"ends": TOKEN if alone else BOTH}
        if scope == "token":
            more["exp"] = self.clock.now + 5
        if scope == "subject":
            more["issued_before"] = self.clock.now - age
        made = revocation(scope, value, now=self.clock.now, rules=self.stores[0].rules, id=by + value, **more)

        def call(store: Store) -> object:
            recorded = record(store, made)
            return recorded.cursor.position, recorded.created, recorded.services

        self._same(call)

    @rule(seconds=st.sampled_from([0.25, 1.0, 4.5, 15.0, 70.0]), prunes=st.booleans())
    def pass_time(self, seconds: float, prunes: bool) -> None:
        self.clock.advance(seconds)
        for second in self._same(lambda store: store.due(before=self.clock.now)):
            self._same(lambda store, second=second: _told(store.claim(second, services=["shop"])))
        if prunes:
            self._same(lambda store: store.prune())

    @invariant()
    def the_same_is_known(self) -> None:
        if self.stores:
            self._same(lambda store: [store.session(ISS, sid) for sid in ("s1", "s2")])
            self._same(lambda store: store.due(before=self.clock.now + 1000))
            self._same(lambda store: [store.revocation(f"{by}{of}") for by in ("r1", "r2") for of in ("a", "alice")])

    def teardown(self) -> None:
        for store in self.stores:
            store.close()


def _told(claim: Claim | None) -> object:
    """A claim without what may differ.

    That is the order of its entries, and so which of a session's last tokens ends it; and the iat of a session whose
    session_exp came with a later token.
    """
    if claim is None:
        return None
    refs = {entry.n: entry.ref if entry.ref.jti else entry.ref.replace(iat=None) for entry in claim.entries}
    return (
        sorted((repr(refs[entry.n]), repr(entry.started)) for entry in claim.entries),
        sorted(str(entry.ref.sid) for entry in claim.entries if "session" in entry.ends),
        {entry.ref.jti for entry in claim.entries if entry.n in claim.closed},
        sorted(claim.rearm),
        claim.more,
        bool(claim.batch_id),
    )


@pytest.mark.redis
@pytest.mark.timeout(600)
def test_the_stores_answer_alike(redis_url: str, tmp_path: Path) -> None:
    """Whatever is called in whatever order: SQLite and Redis give the same answers."""
    machine = type("Both", (Alike,), {"urls": (f"sqlite:///{tmp_path / 'store.db'}", redis_url)})
    _run(machine, max_examples=40)


@pytest.mark.postgresql
@pytest.mark.timeout(600)
def test_the_sql_stores_answer_alike(schemas: Schemas, tmp_path: Path) -> None:
    """Whatever is called in whatever order: SQLite and PostgreSQL give the same answers."""
    urls = (f"sqlite:///{tmp_path / 'store.db'}", schemas.url)
    machine = type("Both", (Alike,), {"urls": urls, "ready": staticmethod(schemas.lend_next())})
    _run(machine, max_examples=4)


def _run(machine: type[Alike], *, max_examples: int) -> None:
    how = settings(
        max_examples=max_examples, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(machine, settings=how)
