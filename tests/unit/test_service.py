"""A service's promises, without a worker: what runs, what is remembered, and what it answers on the broker."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import uuid4

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from hypothesis import given
from hypothesis import strategies as st
from kombu import Connection, Queue

from knell import BatchFailed, GiveUp, InvalidInput, InvalidSettings, Notice, Service, Settings, topology
from knell.answers import MAX_ERROR_LENGTH, Patience, describe, one_line
from knell.embedded import ETA_HEADER
from knell.errors import BrokerUnavailable, MessageRefused
from knell.keys import ANY_ISSUER, NOTICE_TYPE, NOTIFIER, SigningKey, notice_key, trust_entry
from knell.notices import Cause, NoticeBatch, batch_id_of_revocation, new_batch_id
from knell.publisher import connect
from knell.revocations import InitiatingEntity, Scope
from knell.store import Store, open_store
from tests.contract.making import BEGAN, Clock
from tests.deployment import until
from tests.servers import free_port

ISS = "https://auth.example"
TOKEN, SESSION, BOTH = frozenset({"token"}), frozenset({"session"}), frozenset({"token", "session"})


def entry(n: int, ends: frozenset[str] = BOTH, **changes: Any) -> Notice:
    fields: dict[str, Any] = {"cause": Cause.EXPIRED, "scope": Scope.TOKEN, "at": time.time(), "iss": ISS}
    return Notice(batch_id="", n=n, ends=ends, jti=f"j{n}", sid=f"s{n}", **fields | changes)


class Desk:
    """Where a test's service works: its settings, a key that it trusts, and the other ends of its queues."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        key = notice_key(settings)
        assert key is not None
        self.key = key
        self.store: Store = open_store(settings.store_url, namespace=settings.namespace, rules=settings.rules)
        with connect(settings) as connection:
            topology.declare(connection, ["shop", "partner"], settings=settings)

    def service(self, **options: Any) -> Service:
        return Service("shop", settings=self.settings, **options)

    def signed(self, *entries: Notice, batch_id: str | None = None, **changes: Any) -> str:
        now = time.time()
        batch = NoticeBatch(
            id=batch_id or new_batch_id("e"),
            entries=entries,
            issued_at=now,
            expires_at=changes.pop("expires_at", now + 3600),
        )
        payload = batch.as_payload(signer=NOTIFIER, audience=self.settings.audience) | changes
        return self.key.sign(payload, typ=NOTICE_TYPE)

    def sent(self, queue: str) -> list[Any]:
        """Every message that lies in a queue, those that wait for their time as well. They are taken out."""
        late: dict[str, Any] = {"clock": lambda: time.time() + 3600}
        found = []
        with Connection(self.settings.broker_url, transport_options=late) as connection:
            bound = Queue(queue, channel=connection.channel())
            while (message := bound.get()) is not None:
                message.ack()
                found.append(message)
        return found

    def retries(self, service: str = "shop") -> list[Any]:
        """The arguments and the ETA of each message to a service."""
        return [
            (json.loads(message.body)[0], message.headers.get(ETA_HEADER))
            for message in self.sent(topology.service_queue(service))
        ]

    def receipts(self) -> list[dict[str, Any]]:
        """What was sent to knell.receipts: receipts and parked entries."""
        return [json.loads(message.body) for message in self.sent(topology.RECEIPTS)]


@pytest.fixture
def desk(settings: Callable[..., Settings]) -> Iterator[Desk]:
    desk = Desk(settings())
    yield desk
    desk.store.close()


@pytest.fixture
def shop(desk: Desk) -> Iterator[Service]:
    service = desk.service(max_attempts=3)
    yield service
    service.close()


def test_each_entry_is_told_to_the_handlers_of_its_ends(desk: Desk, shop: Service) -> None:
    """Token end comes before session end, entry by entry, and one receipt says that all is done."""
    calls: list[tuple[str, int]] = []
    shop.on_token_end(lambda notice: calls.append(("token", notice.n)))
    shop.on_session_end(lambda notice: calls.append(("session", notice.n)))
    shop.handle(desk.signed(entry(0), entry(1, TOKEN), entry(4, SESSION)))
    assert calls == [("token", 0), ("session", 0), ("token", 1), ("session", 4)]
    [receipt] = desk.receipts()
    assert (receipt["done"], receipt["parked"], receipt["retrying"]) == ([0, 1, 4], [], [])
    assert desk.retries() == []


def test_a_copy_runs_nothing_and_is_receipted_again(desk: Desk, shop: Service) -> None:
    """A handler whose done mark was stored is not called again, by whatever process the copy is read."""
    calls: list[int] = []
    jws = desk.signed(entry(0), entry(1))
    shop.on_session_end(lambda notice: calls.append(notice.n))
    shop.handle(jws)
    other = desk.service()
    other.on_session_end(lambda notice: calls.append(notice.n))
    other.handle(jws)
    other.close()
    assert calls == [0, 1]
    assert [receipt["done"] for receipt in desk.receipts()] == [[0, 1], [0, 1]]


def test_what_has_no_handler_counts_as_handled(desk: Desk, shop: Service) -> None:
    """A service that does not care for an event does not hold its notices open."""
    shop.handle(desk.signed(entry(0)))
    assert desk.receipts()[0]["done"] == [0]


def test_only_the_failed_entries_come_again_and_only_to_this_service(desk: Desk, shop: Service) -> None:
    """One message, with the signed bytes as they came, the numbers that failed, and a time at least 1 s away."""

    @shop.on_session_end
    def end(notice: Notice) -> None:
        if notice.n in (1, 3):
            raise ConnectionError("away")

    jws = desk.signed(*(entry(n) for n in range(4)))
    before = time.time()
    receipt = shop.handle(jws)
    assert receipt is not None
    assert (list(receipt.done), list(receipt.retrying)) == ([0, 2], [1, 3])
    assert receipt.until is not None
    assert receipt.until >= before + 1
    [(arguments, eta)] = desk.retries("shop")
    assert arguments == [jws, [1, 3], 1]
    assert eta is not None
    assert desk.retries("partner") == []


def test_a_retry_runs_what_it_names_and_nothing_else(desk: Desk, shop: Service) -> None:
    """Entries that are done are not part of a retry, and its receipt speaks of its own entries."""
    calls: list[int] = []
    shop.on_session_end(lambda notice: calls.append(notice.n))
    receipt = shop.handle(desk.signed(entry(0), entry(1), entry(2)), [1], 1)
    assert calls == [1]
    assert receipt is not None
    assert list(receipt.done) == [1]


def test_after_the_last_attempt_an_entry_is_parked_and_a_copy_leaves_it(desk: Desk, shop: Service) -> None:
    """It is tried max_attempts times in all; its error is kept in one line, with no token in it."""
    calls: list[int] = []
    jws = desk.signed(entry(0))

    @shop.on_session_end
    def end(notice: Notice) -> None:
        calls.append(notice.n)
        raise ValueError(f"cannot\nread {jws}")

    shop.handle(jws)
    assert len(desk.retries()) == 1
    shop.handle(jws, [0], 2)
    assert desk.retries() == []
    parked = next(found for found in desk.receipts() if "errors" in found)
    assert parked["attempts"] == 3
    assert parked["jws"] == jws
    assert parked["errors"]["0"] == "ValueError: cannot read [token]"
    shop.handle(jws)
    assert calls == [0, 0]
    assert desk.receipts()[0]["parked"] == [0]


def test_a_replay_runs_what_was_parked(desk: Desk, shop: Service) -> None:
    """With replay, a parked entry is tried again, and counts as done when it succeeds."""
    calls: list[int] = []

    @shop.on_session_end
    def end(notice: Notice) -> None:
        calls.append(notice.n)
        if len(calls) == 1:
            raise GiveUp("not here")

    jws = desk.signed(entry(0))
    first = shop.handle(jws)
    assert first is not None
    assert list(first.parked) == [0]
    second = shop.handle(jws, [0], 0, True)
    assert second is not None
    assert (list(second.done), list(second.parked)) == ([0], [])
    shop.handle(jws)
    assert calls == [0, 0]


def test_give_up_parks_at_once_and_the_others_are_tried_again(desk: Desk, shop: Service) -> None:
    """Each entry has a fate of its own."""

    @shop.on_session_end
    def end(notice: Notice) -> None:
        raise GiveUp("never") if notice.n == 0 else OSError("later")

    receipt = shop.handle(desk.signed(entry(0), entry(1)))
    assert receipt is not None
    assert (list(receipt.parked), list(receipt.retrying)) == ([0], [1])


def test_a_batch_handler_gets_all_that_apply_and_names_what_failed(desk: Desk, shop: Service) -> None:
    """BatchFailed fails what it names; a session whose token's handler failed is not ended before the retry."""
    given_to: dict[str, list[int]] = {}

    @shop.on_token_end(batch=True)
    def tokens(notices: Sequence[Notice]) -> None:
        given_to["token"] = [notice.n for notice in notices]
        raise BatchFailed({notices[1].id: OSError("away"), "another.9": OSError("?")})

    @shop.on_session_end(batch=True)
    async def sessions(notices: Sequence[Notice]) -> None:
        given_to["session"] = [notice.n for notice in notices]

    receipt = shop.handle(desk.signed(entry(0), entry(1), entry(2, SESSION), entry(3, TOKEN)))
    assert given_to == {"token": [0, 1, 3], "session": [0, 2]}
    assert receipt is not None
    assert (list(receipt.done), list(receipt.retrying)) == ([0, 2, 3], [1])


def test_any_other_error_of_a_batch_handler_fails_all_that_it_was_given(desk: Desk, shop: Service) -> None:
    """Entries that it was not given are not touched by it."""

    @shop.on_token_end(batch=True)
    def tokens(notices: Sequence[Notice]) -> None:
        raise OSError("away")

    receipt = shop.handle(desk.signed(entry(0, TOKEN), entry(1, SESSION)))
    assert receipt is not None
    assert (list(receipt.done), list(receipt.retrying)) == ([1], [0])


def test_a_handler_that_lets_a_cancellation_escape_has_failed(desk: Desk, shop: Service) -> None:
    """Whatever was cancelled was the handler's own: its entry counts as tried, and does not come again for ever."""

    @shop.on_session_end
    async def end(notice: Notice) -> None:
        if notice.n == 1:
            raise asyncio.CancelledError

    receipt = shop.handle(desk.signed(*(entry(n) for n in range(3))))
    assert receipt is not None
    assert (list(receipt.done), list(receipt.retrying)) == ([0, 2], [1])
    assert [(arguments[1], arguments[2]) for arguments, _ in desk.retries()] == [([1], 1)]


def test_async_handlers_run_side_by_side_on_one_loop(desk: Desk, shop: Service) -> None:
    """32 at a time, for a batch and for the next one, on the same event loop."""
    loops, running, most = set(), 0, 0
    everybody = asyncio.Event()

    @shop.on_session_end
    async def end(notice: Notice) -> None:
        nonlocal running, most
        loops.add(id(asyncio.get_running_loop()))
        running += 1
        most = max(most, running)
        if running == 32:
            everybody.set()
        await asyncio.wait_for(everybody.wait(), 20)
        running -= 1

    receipt = shop.handle(desk.signed(*(entry(n) for n in range(100))))
    assert receipt is not None
    assert len(receipt.done) == 100
    shop.handle(desk.signed(entry(0)))
    assert most == 32
    assert len(loops) == 1


def test_a_copy_that_meets_a_live_lease_is_put_back(desk: Desk, shop: Service) -> None:
    """It does not run, is not counted as an attempt, and comes again in a few seconds."""
    jws = desk.signed(entry(0), entry(1), batch_id="e0-busy")
    shop.on_session_end(lambda notice: pytest.fail("ran under another's lease"))
    desk.store.begin("shop", "e0-busy", holder="another", lease_seconds=30)
    assert shop.handle(jws, [1], 2) is None
    [(arguments, eta)] = desk.retries()
    assert arguments == [jws, [1], 2]
    assert eta is not None
    assert desk.receipts() == []


def test_with_the_dedupe_store_down_nothing_runs_and_the_message_is_put_back(
    desk: Desk, settings: Callable[..., Settings]
) -> None:
    """Without knowing what is done, no handler is called."""
    lost = f"redis://127.0.0.1:{free_port()}/0"
    shop = Service(
        "shop", settings=settings(namespace=desk.settings.namespace, home=desk.settings.home, dedupe_url=lost)
    )
    shop.on_session_end(lambda notice: pytest.fail("ran without dedupe"))
    jws = desk.signed(entry(0))
    assert shop.handle(jws) is None
    shop.close()
    assert [arguments for arguments, _ in desk.retries()] == [[jws, [0], 0]]


def test_with_the_broker_down_the_message_is_given_back_and_nothing_is_repeated(
    desk: Desk, settings: Callable[..., Settings]
) -> None:
    """What ran is marked before the broker is asked; the redelivered message runs nothing again."""
    calls: list[int] = []
    home = desk.settings
    cut_off = Service(
        "shop",
        settings=settings(
            namespace=home.namespace,
            home=home.home,
            store_url=home.store_url,
            trust=home.trust,
            broker_url=f"amqp://guest:guest@127.0.0.1:{free_port()}//",
        ),
    )
    cut_off.on_session_end(lambda notice: calls.append(notice.n))
    jws = desk.signed(entry(0))
    with pytest.raises(BrokerUnavailable):
        cut_off.handle(jws)
    cut_off.close()
    back = desk.service()
    back.on_session_end(lambda notice: calls.append(notice.n))
    receipt = back.handle(jws)
    back.close()
    assert calls == [0]
    assert receipt is not None
    assert list(receipt.done) == [0]


def test_dedupe_each_stores_before_the_next_call(desk: Desk) -> None:
    """When the second handler is called, the first one's mark is in the store."""
    service = desk.service(dedupe="each")
    stored: list[int] = []

    @service.on_session_end
    async def end(notice: Notice) -> None:
        stored.append(desk.store.begin("shop", notice.batch_id, holder="onlooker", lease_seconds=1).done)

    service.handle(desk.signed(entry(0), entry(1), entry(2)))
    service.close()
    assert stored == [0b000, 0b001, 0b011]


def test_marks_are_stored_while_a_handler_still_runs(desk: Desk, shop: Service) -> None:
    """What returned is in the store long before the batch ends."""

    @shop.on_session_end
    def end(notice: Notice) -> None:
        if notice.n == 2:
            until(
                lambda: desk.store.begin("shop", notice.batch_id, holder="onlooker", lease_seconds=1).done == 0b011,
                what="both marks in the store",
            )

    receipt = shop.handle(desk.signed(entry(0), entry(1), entry(2)))
    assert receipt is not None
    assert list(receipt.done) == [0, 1, 2]


class Watched:
    """The store of a service's dedupe, whose clock goes on by 0.9 s each time that a lease of 1 s is renewed.

    Attributes:
        clock: by which leases run out.
        renewed, refused: how often a lease was renewed, and how often that came too late.
    """

    def __init__(self, desk: Desk) -> None:
        self.clock = Clock()
        self.renewed = self.refused = 0
        self._store = open_store(desk.settings.store_url, namespace=desk.settings.namespace, clock=self.clock)

    def mark(self, service: str, batch_id: str, *, lease_seconds: float, **marks: Any) -> bool:
        held = self._store.mark(service, batch_id, lease_seconds=lease_seconds, **marks)
        if lease_seconds:
            self.renewed += held
            self.refused += not held
            self.clock.advance(0.9)
        return held

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def rival(self, batch_id: str) -> bool:
        """Whether another process would get to work on the batch now; if so it does."""
        return bool(self._store.begin("shop", batch_id, holder="rival", lease_seconds=1000).granted)


@pytest.fixture
def watched(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched(desk)
    monkeypatch.setattr("knell.resources.open_store", lambda *_, **__: watched)
    return watched


def test_the_lease_is_renewed_while_one_handler_runs(desk: Desk, watched: Watched) -> None:
    """However long a handler takes, no other process is let at its batch, though nothing was marked meanwhile."""
    service = desk.service(lease_seconds=1)
    jws = desk.signed(entry(0), batch_id="e0-long")
    rivals: list[bool] = []

    @service.on_session_end
    def end(notice: Notice) -> None:
        until(lambda: watched.renewed >= 3, what="the lease was renewed three times")
        rivals.append(watched.rival("e0-long"))

    receipt = service.handle(jws)
    service.close()
    assert receipt is not None
    assert (rivals, list(receipt.done)) == ([False], [0])
    assert watched.clock() >= BEGAN + 2.7, "without the renewals it had run out long before"


@pytest.mark.parametrize("kind", ["plain", "async", "batch"])
def test_a_run_that_lost_its_lease_calls_nothing_more(desk: Desk, watched: Watched, kind: str) -> None:
    """What it has not come to goes back, not counted as tried; what it did is receipted, and marked."""
    service = desk.service(lease_seconds=1, dedupe="each" if kind == "async" else "batch")
    calls: list[tuple[str, int]] = []

    def lose(event: str, n: int) -> None:
        calls.append((event, n))
        watched.clock.advance(2)
        assert watched.rival("e0-lost")
        # The second refusal comes after the run was told of the first.
        until(lambda: watched.refused >= 2, what="the service was told that its lease is lost")

    if kind == "batch":
        service.on_token_end(batch=True)(lambda notices: lose("token", notices[0].n))
        service.on_session_end(batch=True)(lambda notices: calls.append(("session", notices[0].n)))
    elif kind == "async":

        @service.on_session_end
        async def end(notice: Notice) -> None:
            lose("session", notice.n)
    else:
        service.on_session_end(lambda notice: lose("session", notice.n))
    jws = desk.signed(entry(0), entry(1), entry(2, TOKEN), batch_id="e0-lost")
    receipt = service.handle(jws, None, 1)
    assert receipt is not None
    assert calls == [("token" if kind == "batch" else "session", 0)]
    done = [2] if kind == "batch" else [0]
    left = sorted({0, 1, 2} - set(done))
    assert (list(receipt.done), list(receipt.retrying)) == (done, left)
    assert [arguments for arguments, _ in desk.retries()] == [[jws, left, 1]]
    assert watched.begin("shop", "e0-lost", holder="rival", lease_seconds=1).done == 1 << done[0]
    service.close()


def test_each_retry_waits_as_long_as_the_service_was_told_to(desk: Desk) -> None:
    """The wait doubles from first_retry_seconds up to longest_retry_seconds, by the service's own clock and jitter."""
    clock = Clock(math.floor(time.time()))
    service = desk.service(first_retry_seconds=4.0, longest_retry_seconds=10.0, clock=clock, jitter=lambda: 0.5)

    @service.on_session_end
    def end(notice: Notice) -> None:
        raise OSError("away")

    jws = desk.signed(entry(0))
    for attempt in range(3):
        service.handle(jws, [0], attempt)
    service.close()
    assert sorted(eta - clock() for _, eta in desk.retries()) == [2, 4, 5]


def test_a_time_limit_fails_what_was_running_and_what_had_not_run(desk: Desk, shop: Service) -> None:
    """What had returned stays done."""

    @shop.on_session_end
    def end(notice: Notice) -> None:
        if notice.n == 1:
            raise SoftTimeLimitExceeded

    receipt = shop.handle(desk.signed(entry(0), entry(1), entry(2)))
    assert receipt is not None
    assert (list(receipt.done), list(receipt.retrying)) == ([0], [1, 2])


def test_an_undone_revocation_calls_nobody_and_stops_its_waiting_notice(desk: Desk, shop: Service) -> None:
    """A copy or retry of the revocation that comes later counts as done."""
    shop.on_session_end(lambda notice: pytest.fail("ended a session for an undone revocation"))
    made = {"scope": Scope.SUBJECT, "sub": "alice", "revocation_id": "r1"}
    shop.handle(desk.signed(entry(0, cause=Cause.UNDONE, **made)))
    later = shop.handle(
        desk.signed(entry(0, cause=Cause.REVOKED, **made), batch_id=batch_id_of_revocation("r1")), [0], 1
    )
    assert later is not None
    assert list(later.done) == [0]


def test_missed_notices_are_told_with_since_when(desk: Desk, shop: Service) -> None:
    """on_missed gets the time from which on notices were dropped."""
    told: list[float] = []

    @shop.on_missed
    async def missed(since: float) -> None:
        told.append(since)

    shop.handle(desk.signed(entry(0, frozenset(), cause=Cause.MISSED, at=1234.0, iss=""), batch_id=new_batch_id("m")))
    assert told == [1234.0]


def test_a_second_handler_for_an_event_is_an_error() -> None:
    """The text names both, so that one can be removed."""
    shop = Service("shop", settings=Settings())

    @shop.on_token_end
    def first(notice: Notice) -> None: ...

    with pytest.raises(InvalidInput, match="first"):

        @shop.on_token_end(batch=True)
        def second(notices: Sequence[Notice]) -> None: ...

    assert callable(first)


@pytest.mark.parametrize(
    "options",
    [
        {"max_attempts": 0},
        {"first_retry_seconds": 0},
        {"longest_retry_seconds": 0.5},
        {"dedupe": "x"},
        {"lease_seconds": 0},
    ],
)
def test_options_that_cannot_be_used_are_refused(options: dict[str, Any]) -> None:
    """A wrong option is found when the service is made."""
    with pytest.raises(InvalidSettings):
        Service("shop", settings=Settings(), **options)


def test_what_is_not_a_trusted_notice_is_refused_and_runs_nothing(desk: Desk, shop: Service) -> None:
    """Forged, expired, meant for others, of another kind, or asking for entries that are not there."""
    shop.on_session_end(lambda notice: pytest.fail("ran a refused notice"))
    good = desk.signed(entry(0))
    forger = SigningKey.generate()
    refused: list[tuple[Any, ...]] = [
        ("nonsense",),
        (7,),
        (good[:-4] + "AAAA",),
        (forger.sign({"aud": desk.settings.audience, "iat": 1}, typ=NOTICE_TYPE),),
        (desk.signed(entry(0), expires_at=time.time() - 1),),
        (desk.signed(entry(0), aud="knell:another"),),
        (desk.signed(entry(0), v=2),),
        (desk.signed(entry(0), entries=[]),),
        (good, [5]),
        (good, []),
        (good, ["0"]),
        (good, [0], -1),
        (good, [0], 0, "yes"),
    ]
    for arguments in refused:
        with pytest.raises(MessageRefused):
            shop.handle(*arguments)
    assert desk.receipts() == []


def test_a_key_may_only_say_what_it_is_trusted_with(desk: Desk, shop: Service) -> None:
    """An issuer's own key cannot end another issuer's sessions, and a changed trust list counts without a restart."""
    shop.on_session_end(lambda notice: None)
    jws = desk.signed(entry(0, cause=Cause.REVOKED))
    assert shop.handle(jws) is not None
    assert desk.settings.trust is not None
    for issuers, causes in ((["https://other.example"], list(Cause)), ([ANY_ISSUER], [Cause.EXPIRED])):
        narrowed = json.dumps({"keys": [trust_entry(desk.key, issuers=issuers, causes=causes)]})
        desk.settings.trust.write_text(narrowed)
        with pytest.raises(MessageRefused, match="may not say"):
            shop.handle(desk.signed(entry(0, cause=Cause.REVOKED)))


def test_two_threads_can_work_for_one_service(desk: Desk, shop: Service) -> None:
    """A worker with a pool of threads shares the service; each batch is answered once."""
    calls: list[str] = []

    @shop.on_session_end
    async def end(notice: Notice) -> None:
        calls.append(notice.id)

    threads = [threading.Thread(target=shop.handle, args=(desk.signed(entry(0), entry(1)),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(calls) == len(set(calls)) == 8
    assert len(desk.receipts()) == 4


@given(st.integers(1, 2_000_000), st.floats(0, 1, exclude_max=True), st.floats(0.1, 10), st.floats(10, 1000))
def test_the_wait_is_never_below_a_second_nor_above_the_longest(
    attempt: int, drawn: float, first: float, longest: float
) -> None:
    """Whatever the attempt and the jitter."""
    patience = Patience(max_attempts=8, first_seconds=first, longest_seconds=longest, jitter=lambda: drawn)
    assert 1.0 <= patience.delay_seconds(attempt) <= longest


@given(st.text(max_size=2000))
def test_an_error_is_one_short_line(text: str) -> None:
    """Whatever a handler raises."""
    line = one_line(ValueError(text))
    assert len(line) <= MAX_ERROR_LENGTH
    assert len(line.splitlines()) == 1
    line.encode()


def test_what_flower_shows_names_no_person() -> None:
    """Counts, causes and scopes."""
    admin = {"cause": Cause.REVOKED, "scope": Scope.SUBJECT, "initiating_entity": InitiatingEntity.ADMIN}
    assert describe([entry(0, sub="alice", **admin)]) == "revoked 1 subject (admin)"
    assert describe([entry(0), entry(1)]) == "expired 2 tokens"


def test_the_app_knows_one_queue_and_one_task(settings: Callable[..., Settings]) -> None:
    """No default queue, nothing acked early, remote control off, and it is nobody's current app."""
    from celery import current_app

    app = Service("shop", settings=settings(namespace=f"n{uuid4().hex[:8]}")).celery_app()
    assert list(app.amqp.queues) == ["knell.service.shop"]
    assert [name for name in app.tasks if not name.startswith("celery.")] == ["knell.terminate"]
    assert app.conf.task_acks_late
    assert not app.conf.worker_enable_remote_control
    assert app.conf.worker_pool == "solo"
    assert "knell.terminate" not in current_app.tasks
