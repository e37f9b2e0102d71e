"""The publisher against a real RabbitMQ that is well, frozen, killed, out of disk, or not there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from knell import Issuer, topology
from knell.connection import connect, queue_depth
from knell.errors import BrokerUnavailable, InvalidInput
from knell.keys import SigningKey
from knell.messages import Message
from knell.publisher import Publisher
from knell.settings import LONGEST_TIMER_SECONDS, Settings
from knell.store import Store, open_store
from tests.servers import RabbitServer, free_port, start_rabbitmq

pytestmark = pytest.mark.rabbitmq

DEADLINE_SECONDS = 30.0
# The publisher's own time-out in these tests, and what a future may take: twice that, connecting, and a busy machine.
CONFIRM_SECONDS = 1.5
BOUND_SECONDS = 10.0
# How long a revocation waits for its notice to be confirmed, in these tests.
REVOKE_SECONDS = 4.0


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_SECONDS:g} s"
        time.sleep(0.02)


def to_shop(body: bytes = b"[]", *, eta: float | None = None) -> Message:
    return Message(exchange=topology.RETRY, routing_key=topology.retry_key("shop"), body=body, eta=eta)


def depth(settings: Settings) -> int | None:
    return queue_depth(settings, topology.service_queue("shop"))


def declare(settings: Settings) -> None:
    with connect(settings) as connection:
        topology.declare(connection, ["shop"], settings=settings)
        channel: Any = connection.channel()
        channel.queue_purge(topology.service_queue("shop"))


def _store(settings: Settings) -> Store:
    return open_store(settings.store_url, namespace=settings.namespace, rules=settings.rules)


def send_until_taken(publisher: Publisher) -> None:
    """Send until the broker takes one: the breaker lets an attempt through every second or two."""

    def taken() -> bool:
        return publisher.send([to_shop()]).exception(BOUND_SECONDS) is None

    eventually(taken, "a confirmed message")


@pytest.fixture
def deployment(broker_url: str) -> Settings:
    """Settings of a healthy broker where the shop's queue is empty."""
    made = Settings(broker_url=broker_url)
    declare(made)
    return made


@pytest.fixture
def publisher(deployment: Settings) -> Iterator[Publisher]:
    """A publisher to it."""
    made = Publisher(deployment, confirm_timeout_seconds=CONFIRM_SECONDS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ that tests may freeze and kill."""
    server = start_rabbitmq(tmp_path_factory.mktemp("fragile"))
    yield server
    server.kill()
    server.stop()


@pytest.fixture
def fragile_settings(fragile: RabbitServer) -> Settings:
    """Settings of it, with the topology declared and the shop's queue empty."""
    made = Settings(broker_url=fragile.url)
    declare(made)
    # RabbitMQ writes its list of quorum queues to disk a moment after a declaration; a kill before that loses the new
    # queue with all that was confirmed in it.
    fragile.ctl("eval", "mnesia:sync_log(), [dets:sync(T) || T <- dets:all()], ok.")
    return made


@pytest.fixture
def fragile_publisher(fragile_settings: Settings) -> Iterator[Publisher]:
    """A publisher to it that has a connection already."""
    made = Publisher(fragile_settings, confirm_timeout_seconds=CONFIRM_SECONDS)
    made.send([to_shop()]).result(BOUND_SECONDS)
    yield made
    made.close(1)


def test_a_confirmed_message_is_in_the_queue(publisher: Publisher, deployment: Settings) -> None:
    """When the future is done the broker has the message, persistent and with its properties."""
    sent = Message(
        exchange=topology.RETRY,
        routing_key=topology.retry_key("shop"),
        body=b'{"a":1}',
        headers={"task": "knell.terminate", "x": None},
        correlation_id="c-1",
    )
    publisher.send([sent]).result(BOUND_SECONDS)
    with connect(deployment) as connection:
        channel: Any = connection.channel()
        found = channel.basic_get(topology.service_queue("shop"), no_ack=True)
    assert found.body == '{"a":1}'
    assert found.properties["delivery_mode"] == 2
    assert found.properties["content_type"] == "application/json"
    assert found.properties["content_encoding"] == "utf-8"
    assert found.properties["correlation_id"] == "c-1"
    assert found.properties["message_id"]
    assert found.headers["task"] == "knell.terminate"


def test_a_thousand_messages_wait_for_their_confirms_once(publisher: Publisher, deployment: Settings) -> None:
    """1,000 messages in one call, and 1,000 in calls of one, are all confirmed and all there."""
    publisher.send([to_shop() for _ in range(1000)]).result(BOUND_SECONDS)
    futures = [publisher.send([to_shop()]) for _ in range(1000)]
    done, _ = wait(futures, BOUND_SECONDS)
    assert len(done) == 1000
    assert [future.exception() for future in done if future.exception()] == []
    eventually(lambda: depth(deployment) == 2000, "2,000 messages in the queue")
    assert publisher.waiting == 0


def test_nothing_to_send_is_sent(publisher: Publisher) -> None:
    """No messages: the future is done at once, and no connection is made."""
    assert publisher.send([]).done()


def test_an_unroutable_message_fails_and_spares_the_others(publisher: Publisher, deployment: Settings) -> None:
    """A key that no queue is bound to is an error; other calls in the same batch arrive."""
    lost = Message(exchange=topology.RETRY, routing_key=topology.retry_key("nobody"), body=b"[]")
    futures = [publisher.send([message]) for message in (to_shop(), lost, to_shop())]
    with pytest.raises(BrokerUnavailable, match=r"retry\.nobody"):
        futures[1].result(BOUND_SECONDS)
    futures[0].result(BOUND_SECONDS)
    futures[2].result(BOUND_SECONDS)
    eventually(lambda: depth(deployment) == 2, "the two others in the queue")
    assert not publisher.broken


def test_one_unroutable_message_fails_its_whole_call(publisher: Publisher) -> None:
    """A call whose messages were not all taken fails."""
    lost = Message(exchange=topology.RETRY, routing_key=topology.retry_key("nobody"), body=b"[]")
    with pytest.raises(BrokerUnavailable):
        publisher.send([to_shop(), lost]).result(BOUND_SECONDS)


def test_a_missing_exchange_fails_and_spares_the_others(publisher: Publisher, deployment: Settings) -> None:
    """A message to an exchange that does not exist fails alone, although the broker closes the channel over it."""
    lost = Message(exchange="knell.nowhere", routing_key="x", body=b"[]")
    futures = [publisher.send([message]) for message in (to_shop(), lost, to_shop())]
    with pytest.raises(BrokerUnavailable, match=r"knell\.nowhere"):
        futures[1].result(BOUND_SECONDS)
    futures[0].result(BOUND_SECONDS)
    futures[2].result(BOUND_SECONDS)
    assert (depth(deployment) or 0) >= 2
    assert not publisher.broken


def test_a_nack_fails(publisher: Publisher, deployment: Settings) -> None:
    """A full queue that refuses makes the future fail, and nothing is sent a second time."""
    with connect(deployment) as connection:
        channel: Any = connection.channel()
        arguments = {"x-overflow": "reject-publish", "x-max-length": 1}
        channel.queue_declare("full", durable=True, auto_delete=False, arguments=arguments)
        futures = [publisher.send([Message(exchange="", routing_key="full", body=b"[]")]) for _ in range(5)]
        errors = [future.exception(BOUND_SECONDS) for future in futures]
        assert sum(error is None for error in errors) == queue_depth(connection, "full")
    assert any("nack" in str(error) for error in errors)


def test_an_eta_waits_in_the_broker(publisher: Publisher, deployment: Settings) -> None:
    """A message with an eta is not there before its second, and is there after it."""
    eta = time.time() + 2.2
    publisher.send([to_shop(eta=eta), to_shop(eta=time.time() + 0.9), to_shop(eta=0)]).result(BOUND_SECONDS)
    eventually(lambda: (depth(deployment) or 0) >= 2, "what is due within a second is there at once")
    eventually(lambda: depth(deployment) == 3, "the delayed one")
    assert time.time() > eta - 1.01


def test_an_eta_beyond_the_ladder_is_a_clear_error(publisher: Publisher) -> None:
    """An eta that the ladder cannot hold fails with what to do, and the publisher stays well."""
    with pytest.raises(InvalidInput, match="268435455"):
        publisher.send([to_shop(eta=time.time() + LONGEST_TIMER_SECONDS + 10)]).result(BOUND_SECONDS)
    with pytest.raises(InvalidInput, match="routing key"):
        publisher.send([Message(exchange="", routing_key="x" * 256, body=b"[]")]).result(BOUND_SECONDS)
    assert not publisher.broken


def test_after_a_fork_the_child_has_a_publisher_of_its_own(publisher: Publisher, deployment: Settings) -> None:
    """Parent and child publish side by side over one inherited object."""
    publisher.send([to_shop()]).result(BOUND_SECONDS)
    pid = os.fork()
    if pid == 0:
        try:
            publisher.send([to_shop() for _ in range(10)]).result(BOUND_SECONDS)
            os._exit(0)
        finally:
            os._exit(1)
    publisher.send([to_shop() for _ in range(10)]).result(BOUND_SECONDS)
    assert os.waitpid(pid, 0)[1] == 0
    publisher.send([to_shop()]).result(BOUND_SECONDS)
    eventually(lambda: depth(deployment) == 22, "the messages of both")


def test_close_publishes_what_waits(deployment: Settings) -> None:
    """What was sent before close is confirmed; what is sent after it fails."""
    made = Publisher(deployment)
    futures = [made.send([to_shop()]) for _ in range(100)]
    made.close()
    assert [future.exception(0) for future in futures] == [None] * 100
    with pytest.raises(BrokerUnavailable, match="closed"):
        made.send([to_shop()]).result(0)


def test_no_broker_fails_fast_then_at_once() -> None:
    """A refused connection fails the future; until the next attempt every send fails without one."""
    made = Publisher(Settings(broker_url=f"amqp://guest:secret@127.0.0.1:{free_port()}//"))
    first = made.send([to_shop()])
    with pytest.raises(BrokerUnavailable) as failure:
        first.result(BOUND_SECONDS)
    assert "secret" not in str(failure.value)
    assert made.broken
    second = made.send([to_shop()])
    assert second.done()
    with pytest.raises(BrokerUnavailable, match="next attempt"):
        second.result()
    made.close()


def test_a_list_of_servers_fails_over(broker_url: str, deployment: Settings) -> None:
    """With the first server of the list away, the second one is used."""
    gone = f"amqp://guest:guest@127.0.0.1:{free_port()}//"
    made = Publisher(Settings(broker_url=f"{gone};{broker_url}"))
    made.send([to_shop()]).result(BOUND_SECONDS)
    made.close()


def test_a_full_publisher_fails_at_once(fragile: RabbitServer, fragile_settings: Settings) -> None:
    """Beyond the capacity, send fails without blocking; a frozen broker fails what waits within the bound."""
    made = Publisher(fragile_settings, capacity=10, confirm_timeout_seconds=CONFIRM_SECONDS)
    made.send([to_shop()]).result(BOUND_SECONDS)
    fragile.suspend()
    try:
        futures = [made.send([to_shop()]) for _ in range(11)]
        assert futures[10].done()
        with pytest.raises(BrokerUnavailable, match="holds 10"):
            futures[10].result()
        assert all(isinstance(future.exception(BOUND_SECONDS), BrokerUnavailable) for future in futures)
        assert made.waiting == 0
    finally:
        fragile.resume()
    made.close()


def test_a_frozen_broker_blocks_nobody(fragile: RabbitServer, fragile_publisher: Publisher) -> None:
    """A SIGSTOPped broker: the future fails within a bound, and after it goes on the next ones are confirmed."""
    fragile.suspend()
    try:
        assert isinstance(fragile_publisher.send([to_shop()]).exception(BOUND_SECONDS), BrokerUnavailable)
        eventually(lambda: not fragile_publisher.send([to_shop()]).done(), "another attempt, on a new connection")
        eventually(lambda: fragile_publisher.waiting == 0, "its failure")
    finally:
        fragile.resume()
    send_until_taken(fragile_publisher)
    assert not fragile_publisher.broken


def test_a_login_never_waits_for_a_frozen_broker(
    fragile: RabbitServer, settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five logins together take less than one revocation, which does wait a while; both are recorded for the sweep."""
    monkeypatch.setattr("knell.revoking.BROKER_SECONDS", REVOKE_SECONDS)
    here = settings(broker_url=fragile.url)
    declare(here)
    key = SigningKey.generate()
    with Issuer("https://auth.example", key, settings=here) as issuer, closing(_store(here)) as store:
        issuer.issue({"sub": "u"}, ttl_seconds=60)
        fragile.suspend()
        try:
            began = time.monotonic()
            issued = [issuer.issue({"sub": "u", "sid": f"s-{n}"}, ttl_seconds=100 + 10 * n) for n in range(5)]
            logged_in = time.monotonic()
            revoked = issuer.revoke("session", {"sid": "s-0"})
            told = time.monotonic()
        finally:
            fragile.resume()
        assert logged_in - began < told - logged_in
        assert {each.recorded for each in issued} == {"store"}
        assert (revoked.recorded, revoked.published) == ("store", False)
        assert {each.ref.second for each in issued} <= set(store.due(before=time.time() + 1000))
        assert store.revocation(revoked.id) is not None


@pytest.mark.parametrize(
    ("limit", "alarming", "usual"),
    [("set_disk_free_limit", "999999GB", "50MB"), ("set_vm_memory_high_watermark", "0.000001", "0.4")],
)
def test_an_alarm_blocks_nobody(
    fragile: RabbitServer, fragile_publisher: Publisher, limit: str, alarming: str, usual: str
) -> None:
    """A broker that reads no publishes for a disk or memory alarm fails the future within the bound, and recovers."""
    fragile.ctl(limit, alarming)
    try:
        assert isinstance(fragile_publisher.send([to_shop()]).exception(BOUND_SECONDS), BrokerUnavailable)
    finally:
        fragile.ctl(limit, usual)
    send_until_taken(fragile_publisher)


def test_a_killed_broker_keeps_what_it_confirmed(
    fragile: RabbitServer, fragile_publisher: Publisher, fragile_settings: Settings
) -> None:
    """kill -9 in the middle of publishing, restart on the same data: every confirmed message is there."""
    futures: list[Future[None]] = []
    for _ in range(400):
        futures.append(fragile_publisher.send([to_shop()]))
    wait(futures[:100], BOUND_SECONDS)
    futures += [fragile_publisher.send([to_shop()]) for _ in range(2000)]
    fragile.kill()
    done, open_ = wait(futures, 2 * BOUND_SECONDS)
    assert not open_
    confirmed = 1 + sum(future.exception() is None for future in done)
    fragile.start()
    eventually(lambda: (depth(fragile_settings) or 0) >= confirmed, f"{confirmed} confirmed messages")
    send_until_taken(fragile_publisher)


def test_an_idle_connection_that_was_lost_is_no_failure(
    rabbitmq_server: RabbitServer, publisher: Publisher, deployment: Settings
) -> None:
    """When the broker has closed an idle connection, the next message goes over a new one and nobody notices."""
    publisher.send([to_shop()]).result(BOUND_SECONDS)
    rabbitmq_server.ctl("close_all_connections", "-p", topology.vhost_of(deployment), "a test")
    publisher.send([to_shop()]).result(BOUND_SECONDS)
    assert not publisher.broken


def test_queue_depth_of_no_queue(deployment: Settings) -> None:
    """A queue that does not exist has no depth, and a broker that is away is an error."""
    assert queue_depth(deployment, "knell.service.nobody") is None
    with pytest.raises(BrokerUnavailable):
        queue_depth(Settings(broker_url=f"amqp://guest:guest@127.0.0.1:{free_port()}//"), "x")


def test_on_the_embedded_broker(tmp_path: Path) -> None:
    """The same publisher on the embedded broker: confirmed, delayed, unroutable."""
    made = Settings(home=tmp_path / "knell")
    with connect(made) as connection:
        topology.declare(connection, ["shop"], settings=made)
        assert [finding.what for finding in topology.check(made, ["shop"]) if not finding.ok] == []
        assert topology.missing(connection, ["shop", "other"], settings=made) == ["queue knell.service.other"]
    sender = Publisher(made)
    sender.send([to_shop(), to_shop(eta=time.time() + 0.5)]).result(BOUND_SECONDS)
    assert depth(made) == 1
    eventually(lambda: depth(made) == 2, "the delayed one")
    for lost in (
        Message(exchange=topology.RETRY, routing_key="retry.nobody", body=b"[]"),
        Message(exchange="knell.nowhere", routing_key="x", body=b"[]"),
    ):
        with pytest.raises(BrokerUnavailable):
            sender.send([lost]).result(BOUND_SECONDS)
    sender.close()
    with connect(made) as connection:
        topology.remove_service(connection, "shop")
    assert depth(made) is None
