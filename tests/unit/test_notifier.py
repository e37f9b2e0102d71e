"""The notifier's logic, on SQLite, a clock that the test moves, and the embedded broker."""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from knell import Issuer, Settings, commands
from knell.embedded import ETA_HEADER
from knell.errors import BrokerUnavailable, MessageRefused, StoreUnavailable
from knell.keys import NOTICE_TYPE, SigningKey, TrustList, notice_key, trust_entry, trust_list
from knell.messages import Message
from knell.notices import Cause, Notice, NoticeBatch, Receipt
from knell.notifier import PATIENCE_SECONDS, Notifier, Swept
from knell.publisher import Publisher, connect
from knell.revocations import Revocation, make_revocation
from knell.settings import Rules
from knell.store import FIRST_RESEND_SECONDS, RETRY_MARGIN_SECONDS, Parked, Store, open_store
from knell.tokens import TokenRef
from knell.topology import EXPIRY, NOTICES, RETRY, declare, service_queue
from tests.contract.making import BEGAN, BOTH, ISS, SESSION, TOKEN, Clock, noted, token

BASE = int(BEGAN)


class World:
    """A notifier with one service, whose messages the test reads instead of a worker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.clock = Clock()
        with connect(settings) as connection:
            declare(connection, ["shop"], settings=settings)
        self.store: Store = open_store(
            settings.store_url, namespace=settings.namespace, rules=settings.rules, clock=self.clock
        )
        self.store.add_service("shop")
        self.notifier = Notifier(
            settings,
            store=self.store,
            publisher=Publisher(settings, clock=self.clock),
            clock=self.clock,
            sleep=self.clock.advance,
        )
        self.trust = trust_list(settings)

    def track(self, *refs: TokenRef) -> None:
        self.store.track(refs)

    def revoke(self, scope: str, match: dict[str, str], **more: Any) -> Revocation:
        revocation = make_revocation(scope, match, iss=ISS, now=self.clock(), rules=Rules(), **more)
        if scope == "token":
            self.store.detach(ISS, match["jti"], revocation_id=revocation.id)
        notice = Notice.of_revocation(revocation)
        self.store.revoke(revocation, batch_id=notice.batch_id, jws=self.sign(notice), audit=noted(revocation))
        return revocation

    def revoke_alone(self, jti: str) -> None:
        """Revoke a session's last token so that its session's end is left to the token's expiry.

        Somebody who was about to revoke it has detached it, and was killed; the second revocation cannot end the
        session, which hangs on the first one.
        """
        self.store.detach(ISS, jti, revocation_id="killed")
        self.revoke("token", {"jti": jti}, ends=TOKEN)

    def sign(self, notice: Notice, key: SigningKey | None = None) -> str:
        batch = NoticeBatch(id=notice.batch_id, entries=(notice,), issued_at=BEGAN, expires_at=BEGAN + 10_000)
        key = key or notice_key(self.settings)
        assert key is not None
        return key.sign(batch.as_payload(signer=ISS, audience=self.settings.audience), typ=NOTICE_TYPE)

    def told(self) -> list[Notice]:
        """Take what waits in the shop's queue, and read it as the shop would."""
        return [notice for jws, todo in self.sent() for notice in self.read(jws) if todo is None or notice.n in todo]

    def sent(self) -> list[tuple[str, list[int] | None]]:
        return [(arguments[0], arguments[1]) for arguments, _ in self._take(service_queue("shop"))]

    def timers(self) -> dict[int, float | None]:
        """Take the timers that the broker has: the eta of each second."""
        assert self.notifier._armer.flush(10)
        taken = [(arguments[0], eta) for arguments, eta in self._take(EXPIRY)]
        assert len(dict(taken)) == len(taken), "a second has two timers"
        return dict(taken)

    def _take(self, queue: str) -> list[tuple[list[Any], float | None]]:
        with closing(sqlite3.connect(self.settings.home / "broker.db")) as database, database:
            rows = database.execute("SELECT payload FROM message WHERE queue = ?", (queue,)).fetchall()
            database.execute("DELETE FROM message WHERE queue = ?", (queue,))
        payloads = [json.loads(payload) for (payload,) in rows]
        return [(_arguments(payload), payload["headers"].get(ETA_HEADER)) for payload in payloads]

    def read(self, jws: str) -> tuple[Notice, ...]:
        payload, _ = self.trust.verify(jws, typ=NOTICE_TYPE, audience=self.settings.audience)
        return tuple(NoticeBatch.from_payload(payload).entries)

    def receipt(self, notices: list[Notice]) -> None:
        for notice in notices:
            self.store.receive([("shop", Receipt(batch_id=notice.batch_id, at=self.clock(), done=[notice.n]))])


def _arguments(payload: dict[str, Any]) -> list[Any]:
    body = payload["body"]
    if payload.get("properties", {}).get("body_encoding") == "base64":
        body = base64.b64decode(body).decode()
    arguments: list[Any] = (json.loads(body) if isinstance(body, str) else body)[0]
    return arguments


@contextmanager
def without_confirms(publisher: Publisher, exchange: str) -> Iterator[None]:
    """While it lasts, what is sent to an exchange arrives nowhere, and the broker confirms none of it."""
    send = publisher.send

    def lose(sent: Sequence[Message]) -> Future[None]:
        if all(message.exchange != exchange for message in sent):
            return send(sent)
        future: Future[None] = Future()
        future.set_exception(BrokerUnavailable("no confirm"))
        return future

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publisher, "send", lose)
        patch.setattr(type(publisher), "broken", True)
        yield


@pytest.fixture
def world(settings: Callable[..., Settings]) -> Iterator[World]:
    world = World(settings())
    yield world
    world.notifier.close()


@pytest.fixture
def world_with_grace(settings: Callable[..., Settings]) -> Iterator[World]:
    """Sessions live on for 30 s after their last token."""
    world = World(settings(rules=Rules(session_grace_seconds=30)))
    yield world
    world.notifier.close()


def test_a_second_is_told_in_pages_of_500(world: World) -> None:
    """1,200 tokens of one second are three messages, and each token is in exactly one."""
    world.track(*(token(f"t{n}", ends_in=60) for n in range(1200)))
    world.clock.advance(60)
    assert world.notifier.expire(int(BEGAN) + 60) == 1200
    pages = [world.read(jws) for jws, _ in world.sent()]
    assert sorted(len(page) for page in pages) == [200, 500, 500]
    assert {notice.jti for page in pages for notice in page} == {f"t{n}" for n in range(1200)}


def test_a_timer_that_is_a_little_early_waits(world: World) -> None:
    """Up to 2 s early, the run waits for the store's clock; nothing is told before it."""
    world.track(token("t1", ends_in=60))
    world.clock.advance(58.5)
    assert world.notifier.expire(int(BEGAN) + 60) == 1
    assert world.clock() >= BEGAN + 60
    assert [notice.at for notice in world.told()] == [BEGAN + 60]


def test_a_timer_that_is_much_too_early_is_armed_again(world: World) -> None:
    """More than 2 s early, it goes back to the broker, for the time that it was meant for."""
    world.track(token("t1", ends_in=60))
    world.clock.advance(60 - PATIENCE_SECONDS - 0.1)
    early = world.clock()
    assert world.notifier.expire(BASE + 60) == 0
    assert world.clock() == early, "it waited in place"
    assert world.told() == []
    assert world.store.due(before=BEGAN + 100) == [BASE + 60]
    assert world.timers() == {BASE + 60: BASE + 60}


def test_a_session_that_lives_on_is_armed_for_its_new_end(world_with_grace: World) -> None:
    """When a session's own entry fires early, because its tokens were refreshed, its new end gets a timer."""
    world = world_with_grace
    world.track(token("t1", sid="s1", ends_in=10), token("t2", sid="s1", ends_in=50))
    world.clock.advance(40)
    assert world.notifier.expire(BASE + 40) == 0
    assert world.timers() == {BASE + 80: BASE + 80}
    world.clock.advance(40)
    assert world.notifier.expire(BASE + 80) == 1
    assert [(notice.sid, notice.ends, notice.at) for notice in world.told()] == [("s1", SESSION, BEGAN + 80)]


@pytest.mark.parametrize(
    ("scope", "match"), [("token", {"jti": "t1"}), ("session", {"sid": "s1"}), ("subject", {"sub": "u1"})]
)
def test_what_a_revocation_has_told_the_expiry_does_not_tell(world: World, scope: str, match: dict[str, str]) -> None:
    """A dead token is dropped from its page, its neighbours are told."""
    world.track(token("t1", sid="s1", sub="u1"), token("t2", sid="s2", sub="u2"))
    world.revoke(scope, match)
    world.clock.advance(60)
    world.notifier.expire(int(BEGAN) + 60)
    assert [notice.jti for notice in world.told()] == ["t2"]
    assert world.store.due(before=2.0**39) == []


def test_what_a_revocation_has_told_is_not_told_again_after_an_outage(world: World) -> None:
    """A token whose end is claimed late, when its denylist entry has served its time, is still known to be dead."""
    world.track(token("t0", ends_in=10), token("t1", sid="s1"), token("t2", sid="s2"))
    world.revoke("token", {"jti": "t1"}, exp=BEGAN + 60)
    world.clock.advance(10)
    world.notifier.expire(int(BEGAN) + 10)  # reads the feed
    world.clock.advance(15 * 60)
    world.notifier.sweep()
    told = [notice.jti for notice in world.told() if notice.cause is Cause.EXPIRED]
    assert told == ["t0", "t2"]


@pytest.mark.parametrize(
    ("wider", "ends"),
    [
        (None, [SESSION]),
        (("session", {"sid": "s1"}, {}), []),
        (("subject", {"sub": "u1"}, {}), []),
        (("subject", {"sub": "u1"}, {"issued_before": BEGAN - 1}), [SESSION]),
    ],
    ids=["none", "session", "subject", "a subject's cut-off that spares it"],
)
def test_of_a_token_that_was_revoked_alone_the_session_s_end_is_told_unless_a_wider_revocation_did(
    world: World, wider: tuple[str, dict[str, str], dict[str, Any]] | None, ends: list[frozenset[str]]
) -> None:
    """An entry that ends a token and its session loses what was told, by whichever revocation, and keeps the rest."""
    world.track(token("t1", sid="s1", sub="u1"))
    world.revoke_alone("t1")
    if wider is not None:
        scope, match, more = wider
        world.revoke(scope, match, **more)
    world.clock.advance(60)
    world.notifier.expire(BASE + 60)
    assert [notice.ends for notice in world.told()] == ends


def test_what_a_page_did_not_tell_its_re_send_does_not_tell(world: World) -> None:
    """A page that is sent again says of each entry what it said at first: what a revocation had told stays left out."""
    world.track(token("t1", sid="s1"), token("t2", sid="s2"))
    world.revoke_alone("t1")
    world.clock.advance(60)
    world.notifier.expire(BASE + 60)
    first = {notice.jti: notice.ends for notice in world.told()}
    assert first == {"t1": SESSION, "t2": BOTH}
    world.clock.advance(FIRST_RESEND_SECONDS + 1)
    world.notifier.sweep()
    assert {notice.jti: notice.ends for notice in world.told() if notice.cause is Cause.EXPIRED} == first


def test_the_start_of_a_session_is_that_of_its_first_token(world: World) -> None:
    """A notice says when the session began, and a cut-off is compared with that: a refresh does not escape it."""
    first, refreshed = token("t1", sid="s1", sub="u1", ends_in=30), token("t2", sid="s1", sub="u1", ends_in=60)
    world.track(first)
    world.clock.advance(20)
    world.track(refreshed.replace(iat=BEGAN + 20), token("t3", sid="s3", sub="u1", ends_in=60).replace(iat=BEGAN + 20))
    world.clock.advance(10)
    world.notifier.expire(BASE + 30)
    world.track(token("t4", sid="s1", ends_in=50).replace(iat=BEGAN + 30))
    world.clock.advance(20)
    world.notifier.expire(BASE + 50)
    assert [(notice.jti, notice.started) for notice in world.told()] == [("t1", BEGAN), ("t4", BEGAN)]
    world.revoke("subject", {"sub": "u1"}, issued_before=BEGAN + 10)
    world.clock.advance(10)
    world.notifier.expire(BASE + 60)
    assert [(notice.jti, notice.started) for notice in world.told()] == [("t3", BEGAN + 20)]


def test_a_wider_cut_off_is_compared_with_the_session_s_start_as_well(world: World) -> None:
    """A token was revoked alone; its session falls under a cut-off by its start, though not by this token's iat."""
    world.track(token("t1", sid="s1", sub="u1", ends_in=30))
    world.track(token("t2", sid="s1", sub="u1", ends_in=60).replace(iat=BEGAN + 20))
    world.clock.advance(30)
    world.notifier.expire(BASE + 30)
    world.revoke_alone("t2")
    world.sent()
    world.revoke("subject", {"sub": "u1"}, issued_before=BEGAN + 10)
    world.clock.advance(30)
    assert world.notifier.expire(BASE + 60) == 0
    assert world.sent() == []


def test_the_feed_is_read_after_each_claim(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is revoked while a long second is being told is not told by the pages that are claimed afterwards."""
    claim, claims = world.store.claim, []

    def revoked_before_the_second(*args: Any, **options: Any) -> Any:
        claims.append(args)
        if len(claims) == 2:
            world.revoke("subject", {"sub": "u1"})
        return claim(*args, **options)

    monkeypatch.setattr(world.store, "claim", revoked_before_the_second)
    world.track(*(token(f"t{n}", sub="u1", ends_in=10) for n in range(600)))
    world.clock.advance(10)
    assert world.notifier.expire(BASE + 10) == 500
    assert len(claims) == 2
    assert world.store.due(before=2.0**39) == []


def test_a_page_of_dead_tokens_leaves_nothing_behind(world: World) -> None:
    """A page with nothing to tell sends nothing, and its record goes."""
    world.track(token("t1", sid="s1"))
    world.revoke("session", {"sid": "s1"})
    world.clock.advance(60)
    assert world.notifier.expire(int(BEGAN) + 60) == 0
    assert world.sent() == []


def test_a_crash_between_claim_and_send_is_made_up_by_the_sweep(world: World) -> None:
    """A claimed page that nobody sent is told by a later sweep, less what was revoked before the claim."""
    world.track(token("t1", sid="s1"), token("t2", sid="s2"))
    world.revoke("session", {"sid": "s1"})
    world.clock.advance(60)
    assert world.store.claim(int(BEGAN) + 60, services=["shop"]) is not None
    world.clock.advance(FIRST_RESEND_SECONDS + 1)
    world.sent()
    world.notifier.sweep()
    told = [notice for notice in world.told() if notice.cause is Cause.EXPIRED]
    assert [notice.jti for notice in told] == ["t2"]


def test_the_sweep_tells_what_is_overdue(world: World) -> None:
    """With no timer at all, the sweep is enough."""
    world.track(token("t1", ends_in=10), token("t2", ends_in=20))
    world.clock.advance(15)
    assert world.notifier.sweep().told == 1
    assert [notice.jti for notice in world.told()] == ["t1"]


def test_the_sweep_arms_every_second_that_falls_due_within_two_intervals(world: World) -> None:
    """Whatever the store believes: a second may be marked as armed and have lost its timer all the same."""
    interval = int(world.settings.sweep_interval_seconds)
    for ends_in in (1, 2, interval, 2 * interval, 2 * interval + 1, 2 * interval + 2):
        world.track(token(f"t{ends_in}", ends_in=ends_in))
        world.store.armed([BASE + ends_in])
    world.clock.advance(1)
    assert world.notifier.sweep() == Swept(told=1, armed=4)
    soon = [BASE + 2, BASE + interval, BASE + 2 * interval, BASE + 2 * interval + 1]
    assert world.timers() == {second: None if second == BASE + 2 else second for second in soon}


def test_a_page_that_the_broker_did_not_confirm_is_sent_by_the_next_sweep(world: World) -> None:
    """It does not wait for its first re-send; and a re-send that is not confirmed does not wait for the second."""
    world.track(token("t1", ends_in=10))
    world.clock.advance(10)
    with without_confirms(world.notifier.publisher, NOTICES):
        assert world.notifier.expire(BASE + 10) == 1
    with without_confirms(world.notifier.publisher, RETRY):
        assert world.notifier.sweep().resent == 0
    assert world.told() == []
    assert world.notifier.sweep().resent == 1
    assert [notice.jti for notice in world.told()] == ["t1"]
    assert world.notifier.sweep().resent == 0


def test_a_revocation_that_the_broker_did_not_confirm_is_sent_by_the_next_sweep(world: World) -> None:
    """The issuer asks for it; where the store does not hear that any more, the first re-send comes in its time."""
    publisher, key = world.notifier.publisher, notice_key(world.settings)
    issuer = Issuer(
        ISS, notice_key=key, settings=world.settings, store=world.store, publisher=publisher, clock=world.clock
    )
    with without_confirms(publisher, NOTICES):
        revoked = issuer.revoke("session", {"sid": "s1"})
        assert (revoked.recorded, revoked.published) == ("store", False)
        assert world.told() == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(world.store, "resend_at", _away)
            unheard = issuer.revoke("session", {"sid": "s2"})
        assert (unheard.recorded, unheard.published) == ("store", False)
    assert world.notifier.sweep().resent == 1
    assert [notice.revocation_id for notice in world.told()] == [revoked.id]
    world.clock.advance(FIRST_RESEND_SECONDS)
    world.notifier.sweep()
    assert unheard.id in [notice.revocation_id for notice in world.told()]
    issuer.close()


def _away(*_: Any, **__: Any) -> Any:
    raise StoreUnavailable("away")


def test_a_service_that_is_retrying_is_left_alone_until_its_retry_is_overdue(world: World) -> None:
    """Its queue is empty, because the message waits elsewhere; a minute after the retry was due, it is sent again."""
    world.track(token("t1", ends_in=10))
    world.clock.advance(10)
    world.notifier.expire(BASE + 10)
    [told] = world.told()
    until = BEGAN + 1000
    retrying = Receipt(batch_id=told.batch_id, at=world.clock(), retrying=[told.n], until=until)
    world.store.receive([("shop", retrying)])
    while world.clock() < until + RETRY_MARGIN_SECONDS:
        assert world.notifier.sweep().resent == 0
        world.clock.advance(30)
    world.clock.advance(3600)
    assert world.notifier.sweep().resent == 1
    assert [notice.id for notice in world.told()] == [told.id]


def test_the_sweep_sends_again_only_to_an_empty_queue(world: World) -> None:
    """A service whose queue still has messages is slow, not without them."""
    world.track(token("t1", ends_in=10))
    world.clock.advance(10)
    world.notifier.expire(int(BEGAN) + 10)
    world.clock.advance(FIRST_RESEND_SECONDS + 1)
    assert world.notifier.sweep().resent == 0
    first = world.told()
    world.clock.advance(10 * FIRST_RESEND_SECONDS)
    assert world.notifier.sweep().resent == 1
    assert [notice.id for notice in world.told()] == [notice.id for notice in first]


def test_what_was_never_published_does_not_wait_for_an_empty_queue(world: World) -> None:
    """The next sweep puts it behind what a slow service still has to do; once, for its queue has it from then on."""
    world.track(token("t1", ends_in=10), token("t2", ends_in=11))
    world.clock.advance(11)
    world.notifier.expire(BASE + 10)
    with without_confirms(world.notifier.publisher, NOTICES):
        world.notifier.expire(BASE + 11)
    assert world.notifier.sweep().resent == 1
    world.clock.advance(3600)
    assert world.notifier.sweep().resent == 0
    assert [notice.jti for notice in world.told()] == ["t1", "t2"]


def test_what_was_receipted_is_not_sent_again(world: World) -> None:
    """Only the entries that are still open are sent again."""
    world.track(token("t1", ends_in=10), token("t2", ends_in=10))
    world.clock.advance(10)
    world.notifier.expire(int(BEGAN) + 10)
    done, left = world.told()
    world.receipt([done])
    world.clock.advance(FIRST_RESEND_SECONDS + 1)
    world.notifier.sweep()
    assert [notice.id for notice in world.told()] == [left.id]
    world.receipt([left])
    world.clock.advance(3600)
    assert world.notifier.sweep().resent == 0


def test_a_queue_that_lost_everything_gets_everything_again(world: World) -> None:
    """One sweep sends all that is open to an empty queue: what it has sent itself does not count as waiting there."""
    world.track(*(token(f"t{n}", ends_in=10 + n) for n in range(20)))
    world.clock.advance(30)
    world.notifier.sweep()
    assert len(world.sent()) == 20
    world.clock.advance(FIRST_RESEND_SECONDS + 1)
    assert world.notifier.sweep().resent == 20
    assert len(world.sent()) == 20


def test_a_revocation_is_sent_again_as_it_was_signed(world: World) -> None:
    """Every re-send of a revocation is the same bytes."""
    revocation = make_revocation("session", {"sid": "s1"}, iss=ISS, now=world.clock(), rules=Rules())
    notice = Notice.of_revocation(revocation)
    jws = world.sign(notice)
    world.store.revoke(revocation, batch_id=notice.batch_id, jws=jws, audit=noted(revocation))
    world.clock.advance(FIRST_RESEND_SECONDS + 1)
    world.notifier.sweep()
    assert world.sent() == [(jws, None)]


def test_a_service_that_lost_notices_is_told_since_when(world: World) -> None:
    """What outlived the retention is gone, and the service that lacked it is told so."""
    world.track(token("t1", ends_in=10))
    world.clock.advance(10)
    world.notifier.expire(int(BEGAN) + 10)
    world.sent()
    world.clock.advance(Rules().retention_seconds + 1)
    world.notifier.sweep()
    world.sent()
    world.clock.advance(3600)
    world.notifier.sweep()
    (missed,) = world.told()
    assert (missed.cause, missed.ends) == (Cause.MISSED, frozenset())
    assert missed.at <= BEGAN + 10
    world.receipt([missed])
    assert world.store.services()[0].missed_since is None


def test_two_sweeps_at_once_are_one(world: World) -> None:
    """A sweep that meets another one's lease does nothing."""
    world.track(token("t1", ends_in=10))
    world.clock.advance(15)
    assert world.store.lease("sweep", holder="another", seconds=60)
    assert world.notifier.sweep().told == 0
    assert world.store.lease("sweep", holder="another", seconds=0)
    assert world.notifier.sweep().told == 1


def test_a_long_sweep_keeps_out_the_next_one_of_its_own_process(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep that has not ended when the next one starts is the only one, in whichever thread it runs."""
    due, second = world.store.due, []

    def slow(**options: Any) -> list[int]:
        if not second:
            second.append(Swept(told=-1))
            second[0] = world.notifier.sweep()
        return due(**options)

    world.track(token("t1", ends_in=10))
    world.clock.advance(15)
    monkeypatch.setattr(world.store, "due", slow)
    assert world.notifier.sweep().told == 1
    assert second == [Swept()]


def test_an_outage_of_the_broker_does_not_postpone_what_is_to_be_sent_again(world: World) -> None:
    """While the broker is away nothing counts as sent again: the first sweep after it is back sends what is open."""
    nowhere = replace(world.settings, broker_url="amqp://127.0.0.1:1/")
    cut_off = Notifier(nowhere, store=world.store, clock=world.clock)
    world.track(token("t1", ends_in=10))
    world.clock.advance(10)
    assert cut_off.expire(int(BEGAN) + 10) == 1
    for _ in range(8):
        world.clock.advance(600)
        assert cut_off.sweep().resent == 0
    cut_off.publisher.close()
    world.clock.advance(10)
    assert world.notifier.sweep().resent == 1
    assert [notice.jti for notice in world.told()] == ["t1"]


def test_one_sweep_removes_all_that_has_outlived_its_time(world: World) -> None:
    """However much comes, it goes as fast: the store removes a bounded amount a call, and the sweep calls again."""
    parked = [Parked(id=f"shop/x-{n:05}", service="shop", queue="q", error="x", at=world.clock()) for n in range(2500)]
    world.store.park(parked)
    world.clock.advance(Rules().retention_seconds + 1)
    assert world.notifier.sweep().pruned.parked == 2500
    assert world.store.parked() == []


def test_a_service_that_is_registered_during_a_long_second_is_told_the_rest(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is claimed after a service was added waits for it too."""
    claim = world.store.claim

    def then_another(*args: Any, **options: Any) -> Any:
        found = claim(*args, **options)
        world.store.add_service("late")
        return found

    monkeypatch.setattr(world.store, "claim", then_another)
    world.track(*(token(f"t{n}", ends_in=10) for n in range(600)))
    world.clock.advance(10)
    world.notifier.expire(int(BEGAN) + 10)
    world.clock.advance(FIRST_RESEND_SECONDS + 1)
    assert [sorted(notice.waiting) for notice in world.store.open_notices()] == [["shop"], ["late", "shop"]]


def command_key(world: World, *, issuers: list[str], causes: list[Cause]) -> SigningKey:
    key = SigningKey.generate()
    entry = trust_entry(key, issuers=issuers, causes=causes)
    trust = TrustList.parse(json.dumps({"keys": [entry]}))
    world.notifier = Notifier(
        world.settings, store=world.store, publisher=world.notifier.publisher, trust=trust, clock=world.clock
    )
    return key


def sign_track(world: World, key: SigningKey, *refs: TokenRef, **changes: Any) -> str:
    options = {"signer": ISS, "audience": world.settings.audience, "now": world.clock()} | changes
    return commands.sign_track(refs, key=key, **options)


def test_a_command_to_track_is_carried_out_once(world: World) -> None:
    """A copy of a command that was carried out changes nothing, even when its tokens have ended."""
    key = command_key(world, issuers=[ISS], causes=[Cause.REVOKED])
    jws = sign_track(world, key, token("t1", ends_in=10), token("t2", ends_in=10))
    assert world.notifier.track(jws) == 2
    assert world.timers() == {BASE + 10: BASE + 10}
    world.clock.advance(10)
    assert world.notifier.expire(int(BEGAN) + 10) == 2
    assert world.notifier.track(jws) == 0
    assert world.store.due(before=2.0**39) == []


def test_a_command_to_revoke_picks_the_notice_that_fits(world: World) -> None:
    """Whether a revoked token ends its session is known when the store is back: the right notice goes out."""
    key = command_key(world, issuers=[ISS], causes=[Cause.REVOKED])
    world.track(token("t1", sid="s1"))
    revocation = make_revocation(
        "token", {"jti": "t1"}, iss=ISS, now=world.clock(), rules=Rules(), ends=frozenset({"token"})
    )
    both = replace(revocation, ends=frozenset({"token", "session"}))
    signed = {"token": world.sign(Notice.of_revocation(revocation), key)}
    signed["session token"] = world.sign(Notice.of_revocation(both), key)
    jws = commands.sign_revoke(
        revocation,
        signed,
        key=key,
        signer=ISS,
        audience=world.settings.audience,
        now=world.clock(),
    )
    assert world.notifier.revoke(jws)
    assert world.sent() == [(signed["session token"], None)]
    assert world.store.snapshot()[0].revocation.ends == {"token", "session"}
    assert not world.notifier.revoke(jws)
    assert world.sent() == []


def test_a_command_to_revoke_a_client_leaves_its_actor_in_the_audit_log(world: World) -> None:
    """What was queued while the store was away is recorded as if it had not been, with who asked for it."""
    key = command_key(world, issuers=[ISS], causes=[Cause.REVOKED])
    jws = _asked(world, key, make_revocation("client", {"client_id": "web"}, iss=ISS, now=BEGAN, rules=Rules()))
    assert world.notifier.revoke(jws)
    [entry] = world.store.audit()
    assert (entry.action, entry.actor, entry.what["match"]) == ("revoked", "alice", {"client_id": "web"})


def test_a_command_cannot_revoke_the_key_that_the_notifier_signs_with(world: World) -> None:
    """It would lock out the notifier itself; any other key may be revoked, and for ever."""
    key = command_key(world, issuers=[ISS], causes=[Cause.REVOKED])
    own = make_revocation("key", {"kid": world.notifier._key.active.kid}, iss=ISS, now=BEGAN, rules=Rules())
    with pytest.raises(MessageRefused, match="let it have another first"):
        world.notifier.revoke(_asked(world, key, own))
    assert world.store.snapshot() == []
    assert world.notifier.revoke(
        _asked(world, key, make_revocation("key", {"kid": "stolen"}, iss=ISS, now=BEGAN, rules=Rules()))
    )


def _asked(world: World, key: SigningKey, revocation: Revocation) -> str:
    notices = {"session token": world.sign(Notice.of_revocation(revocation), key)}
    audience, now = world.settings.audience, world.clock()
    return commands.sign_revoke(revocation, notices, key=key, signer=ISS, audience=audience, now=now, actor="alice")


def test_a_revocation_whose_notifier_was_killed_before_it_sent_is_sent_by_the_next_sweep(world: World) -> None:
    """The command comes again and finds it recorded; its notice does not wait for the first re-send."""
    key = command_key(world, issuers=[ISS], causes=[Cause.REVOKED])
    revocation = make_revocation("session", {"sid": "s1"}, iss=ISS, now=world.clock(), rules=Rules())
    notice = Notice.of_revocation(revocation)
    signed = world.sign(notice, key)
    jws = commands.sign_revoke(
        revocation,
        {"session token": signed},
        key=key,
        signer=ISS,
        audience=world.settings.audience,
        now=world.clock(),
    )
    world.store.revoke(revocation, batch_id=notice.batch_id, jws=signed, audit=noted(revocation))
    assert not world.notifier.revoke(jws)
    assert world.notifier.sweep().resent == 1
    assert world.sent() == [(signed, None)]


def test_a_refreshed_token_of_a_dead_session_is_revoked_by_name_whatever_the_first_revocation_is_called(
    world: World,
) -> None:
    """The revocation that is made for it can be read by everybody, with the longest name on the other one."""
    key = command_key(world, issuers=[ISS], causes=[Cause.REVOKED])
    world.track(token("t1", sid="s1", sub="u1"))
    world.clock.advance(10)
    revocation = make_revocation("subject", {"sub": "u1"}, iss=ISS, now=world.clock(), rules=Rules(), id="é" * 100)
    notice = Notice.of_revocation(revocation)
    world.store.revoke(revocation, batch_id=notice.batch_id, jws=world.sign(notice), audit=noted(revocation))
    refreshed = token("t2", sid="s1", sub="u1").replace(iat=BEGAN + 20)
    world.clock.advance(10)
    assert world.notifier.track(sign_track(world, key, refreshed)) == 0
    assert [change.revocation.match for change in world.store.snapshot()] == [{"sub": "u1"}, {"jti": "t2"}]


def test_commands_are_carried_out_for_whom_they_may_speak(world: World) -> None:
    """Another's tokens, another deployment's command, an old one, and a forged one are refused, and change nothing."""
    key = command_key(world, issuers=[ISS], causes=[Cause.REVOKED])
    theirs = token("t1").replace(iss="https://other.example")
    refused = {
        "may not speak for": sign_track(world, key, theirs),
        "audience": sign_track(world, key, token("t1"), audience="knell:other"),
        "older than the retention": sign_track(world, key, token("t1"), now=BEGAN - 8 * 86_400),
        "trust list does not have": sign_track(world, SigningKey.generate(), token("t1")),
    }
    for said, jws in refused.items():
        with pytest.raises(MessageRefused, match=said):
            world.notifier.track(jws)
    with pytest.raises(MessageRefused, match="revoke command"):
        world.notifier.revoke(sign_track(world, key, token("t1")))
    assert world.store.due(before=2.0**39) == []
