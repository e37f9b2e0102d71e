"""What docker-compose.yml relies on: broker accounts with the least rights, and a sign of life that tells the truth."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from amqp.exceptions import AccessRefused
from kombu import Connection

from knell import topology
from knell.connection import connect
from knell.settings import Settings
from tests.deployment import ROOT, Deployment, environ_of, make_keys, until
from tests.servers import RabbitServer, start_rabbitmq

pytestmark = [pytest.mark.rabbitmq]


# ---- accounts


@pytest.fixture
def accounts(rabbitmq_server: RabbitServer, settings: Callable[..., Settings], tmp_path: Path) -> dict[str, str]:
    """The accounts that deploy/accounts.py makes: the AMQP URL of each service."""
    made = settings(broker_url=rabbitmq_server.vhost(), broker_api_url=rabbitmq_server.api_url)
    with connect(made) as connection:
        topology.declare(connection, ["shop", "partner"], settings=made)
    passwords = {"SHOP_BROKER_PASSWORD": "shop-secret", "PARTNER_BROKER_PASSWORD": "partner-secret"}
    command = [sys.executable, "deploy/accounts.py", "shop", "partner"]
    for _ in range(2):  # again, as each start of a deployment does
        done = subprocess.run(
            command, cwd=ROOT, env=environ_of(made) | passwords, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert "secret" not in done.stdout
    url = urlsplit(made.broker_url)
    return {name: f"amqp://{name}:{name}-secret@{url.hostname}:{url.port}{url.path}" for name in ("shop", "partner")}


def test_an_account_reads_its_own_queue_only(accounts: dict[str, str]) -> None:
    """The shop can consume what is the shop's, and nothing that is the partner's or the notifier's."""
    with Connection(accounts["shop"]) as connection:
        channel: Any = connection.channel()
        channel.basic_get(topology.service_queue("shop"))
        for queue in (topology.service_queue("partner"), topology.RECEIPTS, topology.COMMANDS, topology.EXPIRY):
            refused: Any = connection.channel()
            with pytest.raises(AccessRefused):
                refused.basic_get(queue)


def test_an_account_speaks_for_itself_only(accounts: dict[str, str]) -> None:
    """The shop cannot tell a notice, command anything, or answer for the partner."""
    forbidden = [
        (topology.NOTICES, ""),
        (topology.COMMANDS, topology.COMMANDS),
        (topology.RECEIPTS, topology.receipt_key("partner")),
        (topology.RETRY, topology.retry_key("partner")),
    ]
    allowed = [(topology.RECEIPTS, topology.receipt_key("shop")), (topology.RETRY, topology.retry_key("shop"))]
    options = {"confirm_publish": True}
    with Connection(accounts["shop"], transport_options=options) as connection:
        for exchange, key in allowed:
            connection.Producer().publish({}, exchange=exchange, routing_key=key)
    for exchange, key in forbidden:
        with Connection(accounts["shop"], transport_options=options) as connection, pytest.raises(AccessRefused):
            connection.Producer().publish({}, exchange=exchange, routing_key=key)


def test_a_missing_password_is_named(rabbitmq_server: RabbitServer, settings: Callable[..., Settings]) -> None:
    """Nothing is made before every password is there."""
    made = settings(broker_url=rabbitmq_server.vhost(), broker_api_url=rabbitmq_server.api_url)
    command = [sys.executable, "deploy/accounts.py", "gateway"]
    done = subprocess.run(command, cwd=ROOT, env=environ_of(made), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "GATEWAY_BROKER_PASSWORD is not set" in done.stderr
    assert "gateway" not in [user["name"] for user in rabbitmq_server.api("GET", "/api/users")]


# ---- the sign of life


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[RabbitServer]:
    """A RabbitMQ that may be killed."""
    server = start_rabbitmq(tmp_path / "rabbitmq")
    yield server
    server.stop()


def test_the_health_file_tells_whether_a_worker_is_connected(
    own_broker: RabbitServer, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """It is touched every 2 s while the worker is connected, grows old without a broker, and is touched again."""
    notice_key, trust = make_keys(tmp_path)
    made = settings(
        broker_url=own_broker.vhost(),
        broker_api_url=own_broker.api_url,
        store_url=f"sqlite:///{tmp_path / 'store.db'}",
        notice_key=notice_key,
        trust=trust,
        health_file=tmp_path / "alive",
    )
    alive = tmp_path / "alive"

    def age() -> float:
        return time.time() - alive.stat().st_mtime

    deployment = Deployment(tmp_path, made)
    try:
        deployment.prepare(["shop"])
        deployment.start_notifier(beat=False)
        first = until(lambda: alive.exists() and alive.stat().st_mtime, what="the file is touched")
        until(lambda: alive.stat().st_mtime > first, seconds=15, what="it is touched again")
        own_broker.kill()
        until(lambda: age() > 8, seconds=40, what="it grows old without a broker")
        own_broker.start()
        until(lambda: age() < 3, seconds=60, what="it is touched again with the broker back")
    finally:
        deployment.stop()


def test_beat_touches_the_health_file(
    rabbitmq_server: RabbitServer, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """beat's file is touched with each message that the broker has confirmed."""
    alive = tmp_path / "alive"
    made = settings(broker_url=rabbitmq_server.vhost(), sweep_interval_seconds=0.2, health_file=alive)
    with connect(made) as connection:
        topology.declare(connection, [], settings=made)
    beat = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tasks", "beat", "--pidfile="],
        cwd=ROOT,
        env=environ_of(made),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        first = until(lambda: alive.exists() and alive.stat().st_mtime, seconds=60, what="the file is touched")
        until(lambda: alive.stat().st_mtime > first, what="it is touched again")
    finally:
        beat.terminate()
        beat.wait(20)
