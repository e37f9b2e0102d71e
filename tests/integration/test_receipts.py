"""What comes back to the notifier: one bad message never stops the receipts of everybody else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection

from knell import Settings, topology
from knell.keys import NOTICE_TYPE, SigningKey, TrustList, trust_entry
from knell.notices import Cause, Notice, NoticeBatch, Receipt
from knell.publisher import connect, queue_depth
from knell.receipts import ReceiptsConsumer
from knell.revocations import Scope, make_revocation
from knell.settings import Rules
from knell.store import Store, open_store

ISS = "https://auth.example"


class Desk:
    """A store with an open revocation, a broker, and the consumer of receipts between them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        with connect(settings) as connection:
            topology.declare(connection, ["shop"], settings=settings)
        self.store: Store = open_store(settings.store_url, namespace=settings.namespace, rules=settings.rules)
        self.store.add_service("shop")
        self.key = SigningKey.generate()
        trust = TrustList.parse(json.dumps({"keys": [trust_entry(self.key, issuers=[ISS], causes=[Cause.REVOKED])]}))
        self.connection: Connection = connect(settings)
        self.channel: Any = self.connection.channel()
        self.revocation = make_revocation("session", {"sid": "s1"}, iss=ISS, now=time.time(), rules=Rules())
        self.notice = Notice.of_revocation(self.revocation)
        batch = NoticeBatch(
            id=self.notice.batch_id, entries=[self.notice], issued_at=time.time(), expires_at=time.time() + 600
        )
        self.jws = self.key.sign(batch.as_payload(signer=ISS, audience=settings.audience), typ=NOTICE_TYPE)
        self.store.revoke(self.revocation, batch_id=self.notice.batch_id, jws=self.jws)
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

    def state(self) -> str:
        """What the shop has said of the revocation."""
        status = self.store.status(self.revocation.id)
        assert status is not None
        return status["shop"].state

    def close(self) -> None:
        self.consumer.stop()
        self.connection.release()
        self.store.close()


@pytest.fixture(params=["embedded", "servers"])
def desk(request: pytest.FixtureRequest, tmp_path: Path, settings: Callable[..., Settings]) -> Iterator[Desk]:
    changes: dict[str, Any] = {}
    if request.param == "servers":
        rabbitmq, redis_url = request.getfixturevalue("rabbitmq_server"), request.getfixturevalue("redis_url")
        changes = {"broker_url": rabbitmq.vhost(), "broker_api_url": rabbitmq.api_url, "store_url": redis_url}
    desk = Desk(settings(**changes))
    yield desk
    desk.close()


def until(holds: Callable[[], bool], *, seconds: float = 10.0) -> bool:
    """Wait until it holds; False if it did not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


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
    assert until(lambda: desk.state() == "done")
    assert len(desk.store.parked()) == 1


def test_what_a_service_parks_keeps_its_error_in_one_line(desk: Desk) -> None:
    """A parked entry has its notice, its error and how often it was tried, and no line break for a log to trip on."""
    desk.park({"0": "first\nsecond"}, attempts=3)
    desk.consumer.start()
    assert until(lambda: bool(desk.store.parked()))
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
    assert until(lambda: desk.state() == "done")
    for queue in (topology.DEAD, topology.RECEIPTS):
        assert until(lambda queue=queue: queue_depth(desk.settings, queue) == 0)  # type: ignore[misc]
    desk.consumer.stop()
    assert desk.store.parked() == []
