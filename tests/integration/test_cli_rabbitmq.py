"""The `knell` command against a real RabbitMQ with management, and a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection
from kombu.message import Message

from knell import topology
from knell.connection import connect, queue_depth
from knell.keys import NOTICE_TYPE, trust_list
from knell.notices import NoticeBatch, batch_id_of_revocation
from knell.settings import Settings
from knell.store import Store, open_store
from tests.commandline import ISS, Knell, park
from tests.deployment import make_keys, until
from tests.servers import RabbitServer

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]


@pytest.fixture
def place(settings: Callable[..., Settings], rabbitmq_server: RabbitServer, redis_url: str, tmp_path: Path) -> Settings:
    """Settings with an empty virtual host, an empty namespace, and keys."""
    private, trust = make_keys(tmp_path)
    return settings(
        broker_url=rabbitmq_server.vhost(),
        broker_api_url=rabbitmq_server.api_url,
        store_url=redis_url,
        notice_key=private,
        trust=trust,
    )


@pytest.fixture
def knell(place: Settings) -> Knell:
    """The command, with the KNELL_* variables of `place`."""
    return Knell(place)


@pytest.fixture
def store(place: Settings) -> Iterator[Store]:
    opened = open_store(place.store_url, namespace=place.namespace, rules=place.rules)
    yield opened
    opened.close()


def wrong(document: Any) -> list[str]:
    """What a doctor found wrong."""
    return [each["what"] for each in document["checks"] if not each["ok"]]


def take(settings: Settings, service: str) -> Message | None:
    """The next message of a service's queue, acknowledged; None if there is none."""
    with connect(settings) as connection, connection.SimpleQueue(_queue(connection, service)) as waiting:
        try:
            message: Message = waiting.get(block=True, timeout=20)
        except waiting.Empty:
            return None
        message.ack()
        return message


def _queue(connection: Connection, service: str) -> Any:
    return topology.kombu_queue(topology.service_queue(service))(connection.default_channel)


@contextmanager
def reader(settings: Settings, queue: str) -> Iterator[None]:
    """Somebody who reads a queue, for as long as it lasts."""
    with connect(settings) as connection:
        _consume(connection, queue)
        yield


def _consume(connection: Any, queue: str) -> None:
    connection.channel().basic_consume(queue)


def test_doctor_finds_what_apply_then_makes(knell: Knell, place: Settings, rabbitmq_server: RabbitServer) -> None:
    """An empty broker has everything to do; apply does it; a policy that is taken away is noticed and put back."""
    found = wrong(knell("doctor", exit_code=1))
    assert any("queue knell.expiry is missing" in each for each in found)
    dry = knell("topology", "apply", "--dry-run")
    assert "queue knell.expiry" in dry["missing"]
    knell("services", "add", "shop")
    assert knell("topology", "apply")["policies"] == "set"
    assert knell("topology", "apply", "--dry-run")["missing"] == []
    idle = "notifier: 0 waiting in knell.receipts, and nobody reads them"
    unread = "service shop: 0 waiting in knell.service.shop, and nobody reads them"
    assert until(lambda: wrong(knell("doctor", exit_code=1)) == [idle, unread], what="all is well but for readers")
    with reader(place, topology.service_queue("shop")):
        assert until(lambda: wrong(knell("doctor", exit_code=1)) == [idle], what="the notifier alone is missed")
        with reader(place, topology.RECEIPTS):
            assert until(lambda: knell("doctor")["ok"], what="all is well")
    vhost = topology.vhost_of(place)
    rabbitmq_server.api("DELETE", f"/api/policies/{vhost}/{topology.UNROUTED_POLICY}")
    policy = "broker: no policy catches what the delay ladder cannot deliver"
    until(lambda: policy in wrong(knell("doctor", exit_code=1)), what="the missing policy is noticed")
    knell("topology", "apply")
    until(lambda: policy not in wrong(knell("doctor", exit_code=1)), what="the policy is back")


def test_a_management_api_that_is_none_is_told(knell: Knell) -> None:
    """A URL that cannot be one, or that something else answers at, is a row of doctor's, and one line of apply's."""
    with _page() as url:
        for given, said, exit_code in ((url, "no JSON", 3), ("ftp://u:hunter2@h", "must be http:// or https://", 2)):
            found = wrong(knell("doctor", exit_code=1, KNELL_BROKER_API_URL=given))
            assert any(said in each for each in found)
            result = knell.run("topology", "apply", KNELL_BROKER_API_URL=given)
            assert result.exit_code == exit_code
            assert said in result.stderr
            assert result.stderr.count("\n") == 1
            assert "hunter2" not in result.output


@contextmanager
def _page() -> Iterator[str]:
    """The URL of a web server that has a page for everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield f"http://u:hunter2@127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_apply_without_the_management_api_prints_the_command(knell: Knell, place: Settings) -> None:
    """Without the management API everything else is declared, and the command for the policy is told with exit 1."""
    result = knell.run("topology", "apply", KNELL_BROKER_API_URL="")
    assert result.exit_code == 1
    assert topology.policy_command(topology.vhost_of(place)) in result.stderr
    assert queue_depth(place, topology.EXPIRY) == 0
    without = knell("topology", "apply", "--without-policies", KNELL_BROKER_API_URL="")
    assert without["policies"] == "not set"
    assert without["command"].startswith("rabbitmqctl set_policy")


def test_services_come_and_go_with_their_queues(knell: Knell, place: Settings, store: Store) -> None:
    """Adding declares the queue and says what the account needs; removing with --delete-queue takes it away."""
    result = knell.run("services", "add", "shop")
    assert result.exit_code == 0, result.output
    assert "rabbitmqctl set_permissions -p" in result.stdout
    assert queue_depth(place, topology.service_queue("shop")) == 0
    assert knell("services", "list")["services"][0]["waiting"] == 0
    knell("services", "remove", "shop", "--yes")
    assert queue_depth(place, topology.service_queue("shop")) == 0
    knell("services", "add", "shop")
    knell("services", "remove", "shop", "--yes", "--delete-queue")
    assert queue_depth(place, topology.service_queue("shop")) is None
    assert store.services() == []


def test_what_services_add_prints_is_what_rabbitmqctl_takes(
    knell: Knell, rabbitmq_server: RabbitServer, place: Settings
) -> None:
    """An account that was given the printed permissions reads its own queue, and nobody else's."""
    for name in ("shop", "partner"):
        asked = knell("services", "add", name)["permissions"]
    rights = {each: asked[each] for each in ("configure", "write", "read")}
    url = rabbitmq_server.add_user(place.broker_url, "partner", "secret", rights)
    with Connection(url) as connection:
        _consume(connection, topology.service_queue("partner"))
        with pytest.raises(connection.channel_errors, match="ACCESS_REFUSED"):
            _consume(connection, topology.service_queue("shop"))


def test_revoke_is_recorded_and_sent(knell: Knell, place: Settings, store: Store) -> None:
    """A revocation is in the store, and its signed notice in the queue of every service."""
    knell("services", "add", "shop")
    knell("services", "add", "partner")
    revoked = knell("revoke", "subject", "alice", "--iss", ISS, "--reason", "left")
    assert (revoked["recorded"], revoked["published"]) == ("store", True)
    assert store.revocation(revoked["id"]) is not None
    for service in ("shop", "partner"):
        message = take(place, service)
        assert message is not None
        assert message.headers["task"] == "knell.terminate"
        payload, _ = trust_list(place).verify(message.payload[0][0], typ=NOTICE_TYPE, audience=place.audience)
        batch = NoticeBatch.from_payload(payload)
        assert batch.id == batch_id_of_revocation(revoked["id"])
        assert [(each.sub, each.reason) for each in batch.entries] == [("alice", "left")]
    assert set(knell("status", revoked["id"], exit_code=1)["services"]) == {"shop", "partner"}


def test_revoke_is_recorded_while_the_broker_is_away(knell: Knell, store: Store) -> None:
    """Without the broker a revocation stands, and the sweep sends it; what needs the broker exits with 3."""
    knell("services", "add", "shop")
    away = "amqp://127.0.0.1:1//"
    revoked = knell("revoke", "session", "s1", "--iss", ISS, KNELL_BROKER_URL=away)
    assert (revoked["recorded"], revoked["published"]) == ("store", False)
    assert store.revocation(revoked["id"]) is not None
    assert knell.run("services", "add", "shop", KNELL_BROKER_URL=away).exit_code == 3
    listed = knell("services", "list", KNELL_BROKER_URL=away)
    assert listed["services"][0]["waiting"] is None


def test_revoke_is_queued_while_the_store_is_away(knell: Knell, place: Settings) -> None:
    """Without the store the broker keeps a signed command."""
    knell("services", "add", "shop")
    revoked = knell("revoke", "session", "s1", "--iss", ISS, KNELL_STORE_URL="redis://127.0.0.1:1/0")
    assert revoked["recorded"] == "queued"
    assert queue_depth(place, topology.COMMANDS) == 1


def test_a_parked_entry_is_listed_and_replayed_to_its_service_alone(
    knell: Knell, place: Settings, store: Store
) -> None:
    """A replay reaches the one service, says which entries it is about, and takes them off the list."""
    knell("services", "add", "shop")
    knell("services", "add", "partner")
    jws = park(place, store, 3)
    assert [each["id"] for each in knell("parked", "list")["parked"]] == ["shop/e0-b.3"]
    assert knell("parked", "replay", "shop/e0-b.3")["replayed"] == 1
    message = take(place, "shop")
    assert message is not None
    assert message.payload[0] == [jws, [3], 0, True]
    assert queue_depth(place, topology.service_queue("partner")) == 0
    assert store.parked() == []


def test_a_replay_that_reaches_no_queue_stays_parked(
    knell: Knell, place: Settings, store: Store, rabbitmq_server: RabbitServer
) -> None:
    """What the broker did not confirm is still parked, with exit code 3."""
    knell("services", "add", "shop")
    park(place, store, 0)
    rabbitmq_server.api("DELETE", f"/api/queues/{topology.vhost_of(place)}/{topology.service_queue('shop')}")
    result = knell.run("parked", "replay", "shop/e0-b.0")
    assert result.exit_code == 3, result.output
    assert "0 entries were replayed" in result.stderr
    assert len(store.parked()) == 1
