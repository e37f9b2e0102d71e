"""What comes back to the notifier: one bad message never stops the receipts of everybody else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection

from knell import Issuer, Settings, messages, topology
from knell.keys import NOTICE_TYPE, SigningKey, TrustList, trust_entry
from knell.messages import Message
from knell.notices import Cause, Notice, NoticeBatch, Receipt
from knell.publisher import connect, queue_depth
from knell.receipts import ReceiptsConsumer
from knell.revocations import Scope, make_revocation
from knell.settings import Rules
from knell.store import Store, open_store
from tests.contract.making import noted
from tests.deployment import Deployment, make_keys, on_servers, until
from tests.servers import RabbitServer

ISS = "https://auth.example"


class Desk:
    """A store with an open revocation, a broker, and the consumer of receipts between them."""

    def __init__(self, settings: Settings, services: Sequence[str] = ("shop",)) -> None:
        self.settings = settings
        with connect(settings) as connection:
            topology.declare(connection, services, settings=settings)
        self.store: Store = open_store(settings.store_url, namespace=settings.namespace, rules=settings.rules)
        for service in services:
            self.store.add_service(service)
        self.key = SigningKey.generate()
        trust = TrustList.parse(json.dumps({"keys": [trust_entry(self.key, issuers=[ISS], causes=[Cause.REVOKED])]}))
        self.connection: Connection = connect(settings)
        self.channel: Any = self.connection.channel()
        self.revocation = make_revocation("session", {"sid": "s1"}, iss=ISS, now=time.time(), rules=Rules())
        self.notice = Notice.of_revocation(self.revocation)
        self.batch = NoticeBatch(
            id=self.notice.batch_id, entries=[self.notice], issued_at=time.time(), expires_at=time.time() + 600
        )
        self.jws = self.key.sign(self.batch.as_payload(signer=ISS, audience=settings.audience), typ=NOTICE_TYPE)
        self.store.revoke(
            self.revocation,
            batch_id=self.notice.batch_id,
            jws=self.jws,
            audit=noted(self.revocation),
        )
        self.consumer = ReceiptsConsumer(settings, self.store, trust)

    def put(self, exchange: str, key: str, body: bytes, **headers: Any) -> None:
        """Publish raw bytes, as a service's account could."""
        made = self.channel.prepare_message(
            body, content_type="application/json", content_encoding="utf-8", headers=headers
        )
        self.channel.basic_publish(made, exchange, key)

    def park(self, errors: dict[str, Any], attempts: Any = 1) -> None:
        """What a service sends to park entries."""
        body = {"v": 1, "jws": self.jws, "errors": errors, "attempts": attempts}
        self.put(topology.RECEIPTS, "parked.shop", json.dumps(body).encode())

    def receipt(self) -> None:
        """The shop is done with the revocation."""
        answer = Receipt(batch_id=self.notice.batch_id, at=time.time(), done=[0])
        self.put(topology.RECEIPTS, "receipt.shop", json.dumps(answer.as_json()).encode())

    def send(self, message: Message) -> None:
        """Publish what Knell itself publishes."""
        self.put(message.exchange, message.routing_key, message.body, **message.headers)

    def state(self, service: str = "shop") -> str:
        """What a service has said of the revocation, or was said for it."""
        status = self.store.status(self.revocation.id)
        assert status is not None
        return status[service].state

    def open_for(self) -> set[str]:
        """The services that the notice log would send the revocation to again."""
        self.store.resend_at([self.notice.batch_id], 0)
        return {name for found in self.store.open_notices() for name in found.waiting}

    def close(self) -> None:
        self.consumer.stop()
        self.connection.release()
        self.store.close()


@pytest.fixture(params=["embedded", "servers"])
def place(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What settings say of where broker and store are."""
    if request.param == "embedded":
        return {}
    rabbitmq, redis_url = request.getfixturevalue("rabbitmq_server"), request.getfixturevalue("redis_url")
    return {"broker_url": rabbitmq.vhost(), "broker_api_url": rabbitmq.api_url, "store_url": redis_url}


MakeDesk = Callable[..., Desk]


@pytest.fixture
def make_desk(place: dict[str, Any], settings: Callable[..., Settings]) -> Iterator[MakeDesk]:
    """Makes a desk of these services, under these rules."""
    with ExitStack() as stack:

        def make(*services: str, rules: Rules | None = None) -> Desk:
            return stack.enter_context(closing(Desk(settings(**place, rules=rules or Rules()), services)))

        yield make


@pytest.fixture
def desk(make_desk: MakeDesk) -> Desk:
    return make_desk("shop")


def _compressed(desk: Desk) -> None:
    desk.put(topology.RECEIPTS, "receipt.shop", b"not compressed at all", compression="application/x-gzip")


def _strange_compression(desk: Desk) -> None:
    desk.put(topology.DEAD, "", b"{}", compression="no-such-thing")


def _endless_number(desk: Desk) -> None:
    desk.park({"9" * 5000: "an entry number of 5,000 digits"})


def _half_a_character(desk: Desk) -> None:
    desk.park({"0": "half of a pair: \ud800"})


def _many_attempts(desk: Desk) -> None:
    desk.park({"0": "x"}, attempts=10**30)


@pytest.mark.parametrize(
    "poison", [_compressed, _strange_compression, _endless_number, _half_a_character, _many_attempts]
)
def test_a_bad_message_is_parked_and_the_receipt_behind_it_counts(desk: Desk, poison: Callable[[Desk], None]) -> None:
    """Whatever a service or the broker puts there is kept to be looked at, and what comes with it is applied."""
    poison(desk)
    desk.receipt()
    desk.consumer.start()
    until(lambda: desk.state() == "done", what="the shop's receipt counts")
    assert len(desk.store.parked()) == 1


def test_what_a_service_parks_keeps_its_error_in_one_line(desk: Desk) -> None:
    """A parked entry has its notice, its error and how often it was tried, and no line break for a log to trip on."""
    desk.park({"0": "first\nsecond"}, attempts=3)
    desk.consumer.start()
    until(lambda: bool(desk.store.parked()), what="it is parked")
    [parked] = desk.store.parked()
    assert (parked.id, parked.attempts, parked.jws) == (f"shop/{desk.notice.id}", 3, desk.jws)
    assert parked.error == "first second"
    assert (parked.service, desk.notice.cause, desk.notice.scope) == ("shop", Cause.REVOKED, Scope.SESSION)


def test_a_notice_that_no_service_has_a_queue_for_is_not_parked(desk: Desk) -> None:
    """With nobody bound to the fanout a notice comes back as undeliverable; there is nothing in that to look at."""
    with connect(desk.settings) as connection:
        topology.remove_service(connection, "shop")
    desk.put(topology.NOTICES, "", json.dumps([[desk.jws], {}, {}]).encode())
    desk.receipt()
    desk.consumer.start()
    until(lambda: desk.state() == "done", what="the shop's receipt counts")
    for queue in (topology.DEAD, topology.RECEIPTS):
        until(lambda queue=queue: queue_depth(desk.settings, queue) == 0, what=f"{queue} is empty")
    desk.consumer.stop()
    assert desk.store.parked() == []


def test_a_notice_that_is_rejected_is_parked_and_closed_for_that_service_alone(make_desk: MakeDesk) -> None:
    """What a worker refuses for good lands in knell.dead: it is kept with its notice, and nobody sends it again."""
    desk = make_desk("shop", "gateway")
    desk.send(messages.notice(desk.jws, shown="revoked 1 session"))
    taken = until(lambda: desk.channel.basic_get(topology.service_queue("shop")), what="the shop's copy")
    desk.channel.basic_reject(taken.delivery_tag, requeue=False)
    desk.consumer.start()
    until(lambda: desk.state("shop") == "parked", what="the shop's part is closed")
    assert desk.state("gateway") == "waiting"
    [parked] = desk.store.parked()
    assert (parked.service, parked.queue) == ("shop", topology.service_queue("shop"))
    assert (parked.notice_id, parked.jws, parked.error) == (desk.notice.id, desk.jws, "rejected")
    assert desk.open_for() == {"gateway"}


def test_a_notice_that_grew_too_old_in_its_queue_was_missed(make_desk: MakeDesk) -> None:
    """A death by time-to-live: the service has to look at everything since the notice was made; nothing is parked."""
    desk = make_desk("shop", "gateway", rules=Rules(retention_seconds=0.5))
    desk.send(messages.notice_to("shop", desk.jws, shown="revoked 1 session"))
    desk.consumer.start()

    def missed_since() -> dict[str, float | None]:
        return {each.name: each.missed_since for each in desk.store.services()}

    until(lambda: missed_since()["shop"], what="the shop has missed something")
    assert missed_since() == {"shop": pytest.approx(desk.batch.issued_at, abs=0.01), "gateway": None}
    assert desk.store.parked() == []


@pytest.mark.rabbitmq
@pytest.mark.redis
def test_a_worker_with_another_trust_list_parks_a_notice_for_itself_alone(
    tmp_path: Path, rabbitmq_server: RabbitServer, redis_url: str
) -> None:
    """A valid notice whose key is not on one service's list: that service runs no handler, and the others are told."""
    settings = on_servers(tmp_path, rabbitmq_server, rabbitmq_server.vhost(), redis_url)
    (tmp_path / "others").mkdir()
    _, others = make_keys(tmp_path / "others")
    deployment = Deployment(tmp_path, settings)
    deployment.prepare(["shop", "gateway"])
    try:
        deployment.start_notifier(beat=False)
        deployment.start_service("shop", KNELL_TRUST=str(others))
        deployment.start_service("gateway")
        with Issuer(ISS, SigningKey.generate(), settings=settings) as issuer:
            revoked = issuer.revoke("session", {"sid": "s1"}, wait_for=["shop", "gateway"], timeout_seconds=30)
        assert {name: each.state for name, each in revoked.services.items()} == {"shop": "parked", "gateway": "done"}
        [parked] = deployment.store.parked()
        assert (parked.service, parked.notice_id) == ("shop", f"r-{revoked.id}.0")
        assert {record["service"] for record in deployment.records(sid="s1")} == {"gateway"}
        deployment.store.resend_at([f"r-{revoked.id}"], 0)
        assert deployment.store.open_notices() == []
    finally:
        deployment.stop()
