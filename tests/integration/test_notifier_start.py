"""A notifier that cannot work does not start: it says what is wrong, and takes no message that it could only lose."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from knell import Settings
from tests.deployment import ROOT, Deployment, environ_of, make_keys, on_servers
from tests.servers import RabbitServer


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"KNELL_NOTICE_KEY": ""}, "KNELL_NOTICE_KEY"),
        ({"KNELL_NOTICE_KEY": "no-such-file.pem"}, "no-such-file.pem"),
        ({"KNELL_TRUST": ""}, "KNELL_TRUST"),
        ({"KNELL_TRUST": "no-such-file.json"}, "no-such-file.json"),
        ({"KNELL_STORE_URL": "mysql://h/knell"}, "KNELL_STORE_URL"),
    ],
    ids=["no key", "a missing key", "no trust list", "a missing trust list", "an unknown store"],
)
def test_a_wrong_setting_ends_the_worker_and_is_named(tmp_path: Path, changes: dict[str, str], named: str) -> None:
    """It exits with an error before it looks for the broker, which does not exist here."""
    notice_key, trust = make_keys(tmp_path)
    settings = replace(
        Settings(home=tmp_path), broker_url="amqp://127.0.0.1:1//", notice_key=notice_key, trust=trust
    )  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KNELL_")}
    worker = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-n", "notifier@test"],
        cwd=ROOT, env=environ | environ_of(settings) | changes, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert worker.returncode != 0
    said = worker.stdout + worker.stderr
    assert named in said
    assert " ready." not in said


@pytest.fixture
def deployment(tmp_path: Path, rabbitmq_server: RabbitServer, broker_url: str, redis_url: str) -> Iterator[Deployment]:
    """A notifier with beat in it."""
    deployment = Deployment(tmp_path, on_servers(tmp_path, rabbitmq_server, broker_url, redis_url))
    try:
        deployment.prepare([])
        deployment.start_notifier()
        yield deployment
    finally:
        deployment.stop()


@pytest.mark.rabbitmq
@pytest.mark.redis
def test_a_worker_whose_beat_has_ended_ends_too(deployment: Deployment) -> None:
    """With -B: when the child that beat runs in has gone, so does the worker, with an error, to be started again."""
    [beat] = children(deployment.pid("notifier"))
    os.kill(beat, signal.SIGKILL)
    assert deployment.exit_code("notifier") == 1
    assert "beat_has_ended" in deployment.log_of("notifier").read_text()


@pytest.mark.rabbitmq
@pytest.mark.redis
def test_a_worker_that_is_stopped_with_its_beat_has_not_failed(deployment: Deployment) -> None:
    """A supervisor's SIGTERM goes to both, and beat is the quicker one: that is no error."""
    os.killpg(deployment.pid("notifier"), signal.SIGTERM)
    assert deployment.exit_code("notifier") == 0
    assert "beat_has_ended" not in deployment.log_of("notifier").read_text()


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    asked = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in asked.stdout.split()]
