"""What a service's account on RabbitMQ could do in the name of others, if whoever holds it wanted to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import amqp
import pytest
from kombu.transport.native_delayed_delivery import MAX_LEVEL, level_name

from knell import Settings, TokenRef, commands, messages, replay, topology
from knell.keys import NOTICE_TYPE, SigningKey, TrustList, trust_entry
from knell.notices import Cause, Notice, NoticeBatch, Receipt
from knell.publisher import Publisher, connect
from knell.receipts import ReceiptsConsumer
from knell.revocations import make_revocation
from knell.settings import Rules
from knell.store import open_store
from tests.contract.making import noted
from tests.deployment import until
from tests.servers import RabbitServer

pytestmark = pytest.mark.rabbitmq

ISS = "https://auth.example"


@pytest.fixture
def admin(rabbitmq_server: RabbitServer, settings: Callable[..., Settings]) -> Settings:
    """A deployment with two services, and the rights of an administrator."""
    made = settings(broker_url=rabbitmq_server.vhost(), broker_api_url=rabbitmq_server.api_url)
    with connect(made) as connection:
        topology.declare(connection, ["shop", "thief"], settings=made)
    topology.apply_policies(made.broker_api_url, topology.vhost_of(made))
    return made


@pytest.fixture
def thief(rabbitmq_server: RabbitServer, admin: Settings) -> Iterator[Any]:
    """A channel of the account of the service `thief`."""
    allowed, name = topology.permissions("thief"), f"thief-{uuid4().hex[:8]}"
    rights = {"configure": allowed.configure, "write": allowed.write, "read": allowed.read}
    url = rabbitmq_server.add_user(admin.broker_url, name, "secret", rights)
    for exchange, (write, read) in allowed.topics.items():
        held = {"exchange": exchange, "write": write, "read": read}
        rabbitmq_server.api("PUT", f"/api/topic-permissions/{topology.vhost_of(admin)}/{name}", held)
    with connect(Settings(broker_url=url)) as connection:
        yield connection.channel()


@pytest.mark.parametrize("what", ["exchange_delete", "queue_declare"])
def test_it_cannot_take_the_exchange_of_events_from_the_others(admin: Settings, thief: Any, what: str) -> None:
    """Every worker sends to it: without it, the workers of all services lose their connection, again and again."""
    with pytest.raises(amqp.exceptions.AccessRefused):
        getattr(thief, what)(topology.EVENTS)
    with connect(admin) as connection:
        channel: Any = connection.channel()
        channel.exchange_declare(topology.EVENTS, "topic", passive=True)


def test_it_cannot_stop_the_receipts_of_the_others(admin: Settings, thief: Any) -> None:
    """A message whose properties cannot be decoded is kept to be looked at; what is behind it is applied."""
    store = open_store(admin.store_url, namespace=admin.namespace, rules=admin.rules)
    store.add_service("shop")
    revocation = make_revocation("session", {"sid": "s"}, iss=ISS, now=time.time(), rules=Rules())
    store.revoke(revocation, batch_id=Notice.of_revocation(revocation).batch_id, jws="x", audit=noted(revocation))
    thief.basic_publish(amqp.Message(b"{}", content_type=b"\xff\xfe"), topology.RECEIPTS, "receipt.thief")
    consumer = ReceiptsConsumer(admin, store, TrustList([]))
    consumer.start()
    publisher = Publisher(admin)
    answer = Receipt(batch_id=Notice.of_revocation(revocation).batch_id, at=time.time(), done=[0])
    publisher.send([messages.receipt("shop", answer)]).result(20)
    try:
        until(lambda: (store.status(revocation.id) or {})["shop"].state == "done", what="the shop's receipt")
        [parked] = store.parked()
        assert "cannot be decoded" in parked.error
    finally:
        consumer.stop()
        publisher.close()
        store.close()


def test_a_command_that_was_refused_is_kept_and_can_be_replayed(admin: Settings) -> None:
    """An issuer was told that it is queued: once the notifier trusts its key, it is sent again, whole."""
    key = SigningKey.generate()
    store = open_store(admin.store_url, namespace=admin.namespace, rules=admin.rules)
    ref = TokenRef(iss=ISS, jti="j", exp=time.time() + 600)
    jws = commands.sign_track([ref], key=key, signer=ISS, audience=admin.audience, now=time.time())
    publisher = Publisher(admin)
    publisher.send([messages.track_command(jws, shown="1 token")]).result(20)
    consumer = ReceiptsConsumer(admin, store, TrustList([]))
    consumer.start()
    try:
        with connect(admin) as connection:
            channel: Any = connection.channel()
            command = until(lambda: channel.basic_get(topology.COMMANDS), what="the command")
            channel.basic_reject(command.delivery_tag, requeue=False)
        [parked] = until(store.parked, what="it is kept")
        assert (parked.queue, parked.jws, parked.body) == (topology.COMMANDS, jws, None)
        plan = replay.plan([parked], services=[], now=store.time())
        assert replay.send(plan.replays, store=store, publisher=publisher) == 1
        assert store.parked() == []
        with connect(admin) as connection:
            again = until(lambda: connection.channel().basic_get(topology.COMMANDS), what="the command")  # type: ignore[attr-defined]
        assert (json.loads(again.body)[0], again.headers["task"]) == ([jws], messages.TRACK)
    finally:
        consumer.stop()
        publisher.close()
        store.close()


def test_it_cannot_bury_a_notice_in_anothers_name(admin: Settings, thief: Any) -> None:
    """A message that never was in a queue, and whose own headers say that it died in the shop's, closes nothing.

    It gets past every queue: with a delay of nothing, the ladder hands it through, and once the thief's own queue is
    gone the alternate exchange takes it to knell.dead.
    """
    key = SigningKey.generate()
    store = open_store(admin.store_url, namespace=admin.namespace, rules=admin.rules)
    store.add_service("shop")
    revocation = make_revocation("session", {"sid": "s"}, iss=ISS, now=time.time(), rules=Rules())
    notice = Notice.of_revocation(revocation)
    batch = NoticeBatch(id=notice.batch_id, entries=(notice,), issued_at=time.time(), expires_at=time.time() + 600)
    jws = key.sign(batch.as_payload(signer=ISS, audience=admin.audience), typ=NOTICE_TYPE)
    store.revoke(revocation, batch_id=notice.batch_id, jws=jws, audit=noted(revocation))
    with connect(admin) as connection:
        topology.remove_service(connection, "thief")
    died = {"queue": topology.service_queue("shop"), "reason": "rejected", "count": 1}
    forged = thief.prepare_message(
        json.dumps([[jws, None, 0], {}, {}]).encode(),
        content_type="application/json",
        content_encoding="utf-8",
        headers={"x-death": [died]},
    )
    thief.basic_publish(forged, level_name(MAX_LEVEL), "0." * (MAX_LEVEL + 1) + topology.retry_key("thief"))
    trust = TrustList.parse(json.dumps({"keys": [trust_entry(key, issuers=[ISS], causes=[Cause.REVOKED])]}))
    consumer = ReceiptsConsumer(admin, store, trust)
    consumer.start()
    try:
        [parked] = until(store.parked, what="the forged message is kept, to be looked at")
        assert (parked.service, parked.queue, parked.error) == ("", "", "unroutable")
        status = store.status(revocation.id)
        assert status is not None
        assert status["shop"].state == "waiting"
    finally:
        consumer.stop()
        store.close()
