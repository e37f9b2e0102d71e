"""What docker-compose.yml relies on: servers that keep what they have, and a sign of life that tells the truth."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from knell import topology
from knell.connection import connect
from knell.settings import Settings
from tests.deployment import ROOT, Deployment, environ_of, make_keys, until
from tests.servers import RABBITMQ_BIN, Process, RabbitServer, find_program, free_port, start_rabbitmq
from tests.unit.test_compose import SERVICES

pytestmark = [pytest.mark.rabbitmq]


# ---- the servers


class ComposedRedis:
    """Redis as docker-compose.yml starts and asks it, with a folder and a port of its own."""

    def __init__(self, directory: Path) -> None:
        find_program("redis-server")
        self.conf = directory / "redis.conf"
        self.password = uuid4().hex
        self._port = free_port()
        (directory / "data").mkdir()
        self._environ = {"PATH": os.environ["PATH"], "REDIS_PASSWORD": self.password}
        places = {
            "$$": "$",
            "/tmp/redis.conf": str(self.conf),
            '"dir /data"': f'"dir {directory / "data"}" "port {self._port}" "bind 127.0.0.1"',
        }
        *shell, script = SERVICES["redis"]["command"]
        for place, here in places.items():
            assert place in script
            script = script.replace(place, here)
        self.script = script
        self.process = Process([*shell, script], directory=directory, environ=self._environ)

    def health(self, **environ: str) -> int:
        """The exit status of its health check."""
        kind, words = SERVICES["redis"]["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        script = words.replace("$$", "$").replace("redis-cli ", f"redis-cli -p {self._port} ")
        return subprocess.run(
            ["sh", "-c", script], env=self._environ | environ, capture_output=True, timeout=60
        ).returncode

    def client(self, password: str | None) -> redis.Redis:
        """A client that logs in like this."""
        return redis.Redis(port=self._port, password=password, decode_responses=True)


@pytest.mark.redis
def test_the_redis_of_a_deployment_keeps_what_it_has_and_tells_nobody(tmp_path: Path) -> None:
    """It asks for the password, shows it to no other user, evicts nothing, and has its data after a kill -9."""
    server = ComposedRedis(tmp_path)
    assert server.health() != 0
    try:
        server.process.run(lambda: server.health() == 0)
        assert server.health(REDIS_PASSWORD="wrong") != 0
        with server.client(None) as nobody, pytest.raises(redis.AuthenticationError):
            nobody.ping()
        with server.client(server.password) as client:
            for name, value in (("appendonly", "yes"), ("appendfsync", "everysec"), ("save", ""),
                                ("maxmemory-policy", "noeviction")):  # fmt: skip
                assert client.config_get(name) == {name: value}
            client.set("denied", "for good")
        # What a process list would show.
        assert "REDIS_PASSWORD" not in server.script.partition("exec ")[2]
        assert stat.S_IMODE(server.conf.stat().st_mode) == 0o600
        server.process.signal(signal.SIGKILL)
        assert server.health() != 0
        server.process.run(lambda: server.health() == 0)
        with server.client(server.password) as client:
            assert client.get("denied") == "for good"
    finally:
        server.process.stop()


def rabbitmq_health(server: RabbitServer) -> int:
    """The exit status of RabbitMQ's health check in docker-compose.yml."""
    kind, program, *words = SERVICES["rabbitmq"]["healthcheck"]["test"]
    assert kind == "CMD"
    command = [str(find_program(program, also=[RABBITMQ_BIN])), *words]
    return subprocess.run(command, env=server._environ, capture_output=True, timeout=60).returncode


# ---- the sign of life


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[RabbitServer]:
    """A RabbitMQ that may be killed."""
    server = start_rabbitmq(tmp_path / "rabbitmq")
    yield server
    server.kill()
    server.stop()


def test_the_health_file_tells_whether_a_worker_is_connected(
    own_broker: RabbitServer, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """It is touched every 2 s while the worker is connected, grows old without a broker, and is touched again.

    The health check of the broker itself says the same.
    """
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
        assert rabbitmq_health(own_broker) == 0
        own_broker.kill()
        assert rabbitmq_health(own_broker) != 0
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
