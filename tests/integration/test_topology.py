"""The topology on a real RabbitMQ: what is declared, where messages go, and what must not happen to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import amqp
import pytest
from kombu import Connection
from kombu.transport.native_delayed_delivery import calculate_routing_key, level_name

from knell import topology
from knell.connection import connect, queue_depth
from knell.errors import BrokerUnavailable, InvalidSettings
from knell.messages import Message
from knell.publisher import Publisher
from knell.settings import Rules, Settings
from tests.servers import RabbitServer

pytestmark = pytest.mark.rabbitmq

SERVICES = ("billing", "eu-billing", "shop")
DEADLINE_SECONDS = 30.0


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_SECONDS:g} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def deployment(broker_url: str, rabbitmq_server: RabbitServer) -> Settings:
    """Settings of a broker that has the whole topology, its policy included."""
    made = Settings(broker_url=broker_url, broker_api_url=rabbitmq_server.api_url)
    with connect(made) as connection:
        topology.declare(connection, SERVICES, settings=made)
    assert topology.apply_policies(made.broker_api_url, topology.vhost_of(made)) is None
    return made


@pytest.fixture
def connection(deployment: Settings) -> Iterator[Connection]:
    """An open connection, to a broker whose service queues and dead letters are empty."""
    with connect(deployment) as opened:
        channel: Any = opened.channel()
        for queue in (topology.DEAD, topology.EXPIRY, *map(topology.service_queue, SERVICES)):
            channel.queue_purge(queue)
        yield opened


@pytest.fixture
def publisher(deployment: Settings) -> Iterator[Publisher]:
    """A publisher to that broker."""
    made = Publisher(deployment)
    yield made
    made.close()


def retry(service: str, *, eta: float | None = None) -> Message:
    return Message(exchange=topology.RETRY, routing_key=topology.retry_key(service), body=b"[]", eta=eta)


def waiting(connection: Connection, *services: str) -> list[int | None]:
    return [queue_depth(connection, topology.service_queue(name)) for name in services or SERVICES]


def take(connection: Connection, queue: str, *, no_ack: bool = True) -> Any:
    channel: Any = connection.default_channel
    found: list[Any] = []

    def fetched() -> bool:
        message = channel.basic_get(queue, no_ack=no_ack)
        found.extend([message] if message is not None else [])
        return bool(found)

    eventually(fetched, f"a message in {queue}")
    return found[0]


def test_declaring_twice_is_declaring_once(deployment: Settings, connection: Connection) -> None:
    """The topology can be applied again, over itself."""
    topology.declare(connection, SERVICES, settings=deployment)
    assert topology.missing(connection, SERVICES, settings=deployment) == []


def test_doctor_finds_nothing_wrong(deployment: Settings) -> None:
    """After declare and apply_policies every finding is good."""
    findings = topology.check(deployment, SERVICES)
    assert [finding.what for finding in findings if not finding.ok] == []
    assert len(findings) >= 4


def test_doctor_says_what_is_missing(rabbitmq_server: RabbitServer) -> None:
    """On an empty virtual host each exchange, queue, binding and the policy is a finding that says what to do."""
    empty = Settings(broker_url=rabbitmq_server.vhost(), broker_api_url=rabbitmq_server.api_url)
    bad = [finding for finding in topology.check(empty, ["shop"]) if not finding.ok]
    text = "\n".join(finding.what for finding in bad)
    assert "queue knell.service.shop" in text
    assert "exchange celery_delayed_0 to 27 (28 of 28)" in text
    assert "no policy" in text
    assert all(finding.todo for finding in bad)


def test_doctor_says_which_binding_is_missing(rabbitmq_server: RabbitServer) -> None:
    """A queue that is there and is no longer bound is a finding too."""
    made = Settings(broker_url=rabbitmq_server.vhost(), broker_api_url=rabbitmq_server.api_url)
    with connect(made) as opened:
        topology.declare(opened, ["shop"], settings=made)
        channel: Any = opened.channel()
        channel.queue_unbind(topology.service_queue("shop"), topology.NOTICES, "")
    text = "\n".join(finding.what for finding in topology.check(made, ["shop"]) if not finding.ok)
    assert "binding knell.notices -> knell.service.shop" in text


def test_doctor_on_a_broker_that_is_away() -> None:
    """A broker that does not answer is a finding, not an exception."""
    (finding,) = topology.check(Settings(broker_url="amqp://guest:secret@127.0.0.1:1//"), [])
    assert not finding.ok
    assert "secret" not in finding.what


def test_without_an_api_the_command_is_returned() -> None:
    """Without a management API, apply_policies returns the command for a person to run."""
    command = topology.apply_policies(None, "/")
    assert command is not None
    assert command.startswith("rabbitmqctl set_policy -p /")
    assert "knell.dead" in command


def test_the_command_does_the_same(rabbitmq_server: RabbitServer) -> None:
    """The command that is returned without an API sets a policy that the check accepts."""
    import shlex

    made = Settings(broker_url=rabbitmq_server.vhost(), broker_api_url=rabbitmq_server.api_url)
    with connect(made) as opened:
        topology.declare(opened, [], settings=made)
    rabbitmq_server.ctl(*shlex.split(topology.policy_command(topology.vhost_of(made)))[1:])
    assert [finding.what for finding in topology.check(made) if not finding.ok] == []


def test_other_arguments_are_an_error_that_says_so(deployment: Settings, connection: Connection) -> None:
    """Declaring a service's queue with another retention fails with what to do, and changes nothing."""
    other = Settings(broker_url=deployment.broker_url, rules=Rules(retention_seconds=60))
    with pytest.raises(InvalidSettings, match="apply the topology again"):
        topology.declare(connection, SERVICES, settings=other)


def test_a_notice_reaches_every_service_once(connection: Connection, publisher: Publisher) -> None:
    """The fanout puts one copy on each service's queue."""
    publisher.send([Message(exchange=topology.NOTICES, routing_key="", body=b"[]")]).result(10)
    eventually(lambda: waiting(connection) == [1, 1, 1], "one copy each")


def test_a_notice_that_nobody_takes_is_kept(rabbitmq_server: RabbitServer) -> None:
    """With no service registered, a notice lands in knell.dead by the alternate exchange."""
    made = Settings(broker_url=rabbitmq_server.vhost())
    sender = Publisher(made)
    with connect(made) as opened:
        topology.declare(opened, [], settings=made)
        sender.send([Message(exchange=topology.NOTICES, routing_key="", body=b"[]")]).result(10)
        eventually(lambda: queue_depth(opened, topology.DEAD) == 1, "the notice in knell.dead")
    sender.close()


def test_a_delayed_retry_reaches_its_own_service_only(connection: Connection, publisher: Publisher) -> None:
    """The ladder's suffix match does not leak: neither to a service with a similar name, nor to the fanout."""
    publisher.send([retry("billing"), retry("billing", eta=time.time() + 1.5)]).result(10)
    eventually(lambda: waiting(connection, "billing") == [2], "both in billing")
    assert waiting(connection) == [2, 0, 0]


def test_a_delayed_timer_reaches_the_timers_queue(connection: Connection, publisher: Publisher) -> None:
    """A timer with an eta comes off the ladder into knell.expiry, once."""
    body = uuid4().hex
    eta = time.time() + 1.2
    timer = Message(
        exchange=topology.EXPIRY, routing_key=topology.EXPIRY, body=body.encode(), eta=eta, headers={"eta": "x"}
    )
    publisher.send([timer]).result(10)
    message = take(connection, topology.EXPIRY)
    assert (message.body, message.headers["eta"]) == (body, "x")
    assert time.time() > eta - 1.0
    assert waiting(connection) == [0, 0, 0]
    assert queue_depth(connection, topology.EXPIRY) == 0


@pytest.mark.parametrize("entry", ["start level", "top"])
def test_start_level_and_top_deliver_the_same(connection: Connection, entry: str) -> None:
    """Entering the ladder where the delay starts gives what Celery's way in at the top gives."""
    channel: Any = connection.channel()
    exchange = level_name(1 if entry == "start level" else 27)
    body = uuid4().hex
    key = calculate_routing_key(3, topology.retry_key("shop"))
    channel.basic_publish(amqp.Message(body), exchange, key)
    message = take(connection, topology.service_queue("shop"))
    assert message.body == body
    # Three seconds: it grew too old in the queue that holds for two, and then in the one that holds for one.
    assert [(death["queue"], death["reason"], death["count"]) for death in message.headers["x-death"]] == [
        (level_name(0), "expired", 1),
        (level_name(1), "expired", 1),
    ]
    assert waiting(connection) == [0, 0, 0]


def test_what_matches_nothing_blocks_nobody(connection: Connection, publisher: Publisher) -> None:
    """40 delayed messages for a service that does not exist land in knell.dead, and others of that level get by."""
    lost = [retry("nobody", eta=time.time() + 1.5) for _ in range(40)]
    publisher.send(lost).result(10)
    publisher.send([retry("shop", eta=time.time() + 1.5) for _ in range(10)]).result(10)
    eventually(lambda: waiting(connection, "shop") == [10], "ten retries past forty lost ones")
    eventually(lambda: queue_depth(connection, topology.DEAD) == 40, "forty lost ones in knell.dead")


def test_rejected_messages_keep_where_they_came_from(connection: Connection, publisher: Publisher) -> None:
    """A reject goes to knell.dead with an x-death whose first entry names the service's queue."""
    publisher.send([retry("shop")]).result(10)
    eventually(lambda: waiting(connection, "shop") == [1], "the retry")
    channel: Any = connection.channel()
    message = channel.basic_get(topology.service_queue("shop"))
    channel.basic_reject(message.delivery_tag, requeue=False)
    death = take(connection, topology.DEAD).headers["x-death"][0]
    assert (death["queue"], death["reason"]) == (topology.service_queue("shop"), "rejected")
    assert death["exchange"] == topology.RETRY


def test_lost_connections_bury_nothing(connection: Connection, deployment: Settings, publisher: Publisher) -> None:
    """A message survives more lost connections than RabbitMQ 4's default delivery limit."""
    publisher.send([retry("shop")]).result(10)
    for _ in range(25):
        with connect(deployment) as other:
            take(other, topology.service_queue("shop"), no_ack=False)
    eventually(lambda: waiting(connection, "shop") == [1], "the message, back in its queue")
    assert queue_depth(connection, topology.DEAD) == 0


def test_no_number_of_lost_connections_buries_a_message(deployment: Settings, rabbitmq_server: RabbitServer) -> None:
    """Trap 12: what is not said is 20 on RabbitMQ 4, without a word. Every queue says, and the broker has heard it."""
    found = {
        queue["name"]: queue["arguments"].get("x-delivery-limit", 20)
        for queue in rabbitmq_server.api("GET", f"/api/queues/{topology.vhost_of(deployment)}")
        if queue["name"].startswith("knell.")
    }
    own = (topology.EXPIRY, topology.RECEIPTS, topology.COMMANDS, topology.SWEEP, topology.DEAD)
    assert set(found) == {*own, *map(topology.service_queue, SERVICES)}
    assert {name: limit for name, limit in found.items() if limit < 1_000_000} == {}


def test_a_removed_service_leaves_nothing(rabbitmq_server: RabbitServer) -> None:
    """Removing a service deletes its queue and every binding of it, and a late retry for it ends in knell.dead."""
    made = Settings(broker_url=rabbitmq_server.vhost(), broker_api_url=rabbitmq_server.api_url)
    sender = Publisher(made)
    with connect(made) as opened:
        topology.declare(opened, ["shop"], settings=made)
        topology.apply_policies(made.broker_api_url, topology.vhost_of(made))
        sender.send([retry("shop", eta=time.time() + 1.5)]).result(10)
        assert topology.remove_service(opened, "shop") == 0
        assert topology.remove_service(opened, "shop") == 0
        eventually(lambda: queue_depth(opened, topology.DEAD) == 1, "the late retry in knell.dead")
    assert queue_depth(made, topology.service_queue("shop")) is None
    sender.close()


def test_a_service_can_do_its_own_work_only(rabbitmq_server: RabbitServer) -> None:
    """With `permissions`, an account reads its queue and writes its retries and receipts, and nobody else's."""
    deployment = Settings(broker_url=rabbitmq_server.vhost(), broker_api_url=rabbitmq_server.api_url)
    with connect(deployment) as opened:
        topology.declare(opened, SERVICES, settings=deployment)
    allowed = topology.permissions("shop")
    url = rabbitmq_server.add_user(
        deployment.broker_url,
        "shop",
        "secret",
        {"configure": allowed.configure, "write": allowed.write, "read": allowed.read},
    )
    vhost = topology.vhost_of(deployment)
    for exchange, (write, read) in allowed.topics.items():
        topics = {"exchange": exchange, "write": write, "read": read}
        rabbitmq_server.api("PUT", f"/api/topic-permissions/{vhost}/shop", topics)
    account = Settings(broker_url=url)
    sender = Publisher(account)
    receipt = Message(exchange=topology.RECEIPTS, routing_key=topology.receipt_key("shop"), body=b"{}")
    sender.send([retry("shop"), retry("shop", eta=time.time() + 2), receipt]).result(10)
    forbidden = [
        retry("billing"),
        retry("billing", eta=time.time() + 60),
        Message(exchange=topology.RECEIPTS, routing_key=topology.receipt_key("billing"), body=b"{}"),
        Message(exchange=topology.NOTICES, routing_key="", body=b"[]"),
        Message(exchange=topology.EXPIRY, routing_key=topology.EXPIRY, body=b"[]"),
    ]
    for message in forbidden:
        with pytest.raises(BrokerUnavailable, match="ACCESS_REFUSED"):
            sender.send([message]).result(10)
    sender.close()
    with connect(account) as opened:
        mine: Any = opened.channel()
        assert mine.basic_get(topology.service_queue("shop"), no_ack=True) is not None
        with pytest.raises(amqp.exceptions.AccessRefused):
            mine.basic_get(topology.service_queue("billing"))


def test_celery_sees_quorum_queues() -> None:
    """The queues that Celery is given agree with the declared ones, and Celery takes them for quorum queues."""
    from celery import Celery
    from celery.utils.quorum_queues import detect_quorum_queues

    names = [topology.EXPIRY, topology.SWEEP, topology.COMMANDS, topology.service_queue("shop")]
    app = Celery("check", set_as_current=False)
    app.conf.task_queues = [topology.kombu_queue(name) for name in names]
    assert detect_quorum_queues(app, "amqp")[0]
    queue = topology.kombu_queue(topology.service_queue("shop"))
    assert (queue.exchange.name, queue.exchange.type, queue.routing_key) == (topology.RETRY, "topic", "retry.shop")
