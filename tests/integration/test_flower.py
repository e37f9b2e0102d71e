"""What an operator sees in Flower: each service's run a row of its own, readable, with no token in it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from knell import Issuer
from knell.keys import SigningKey
from tests.deployment import ROOT, Deployment, on_servers, until
from tests.servers import RabbitServer, free_port

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

ISS = "https://auth.example"
USER, PASSWORD = "operator", uuid4().hex


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, rabbitmq_server: RabbitServer, broker_url: str, redis_url: str
) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("flower")
    settings = on_servers(directory, rabbitmq_server, broker_url, redis_url)
    deployment = Deployment(directory, settings)
    deployment.prepare(["shop", "gateway"])
    try:
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture(scope="module")
def flower(deployment: Deployment) -> Iterator[str]:
    """Flower's address, started the way docker-compose.yml starts it."""
    port = free_port()
    log = (deployment.directory / "flower.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tasks", "flower", f"--port={port}", "--address=127.0.0.1"],
        cwd=ROOT,
        env={**deployment.inherited, "FLOWER_BASIC_AUTH": f"{USER}:{PASSWORD}"},
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _status(f"{url}/healthcheck") == 200, seconds=60, what="Flower answers")
        deployment.start_notifier()
        deployment.start_service("shop")
        deployment.start_service("gateway")
        yield url
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def test_each_services_run_is_a_row_of_its_own_with_no_token_in_it(deployment: Deployment, flower: str) -> None:
    """A notice that two services handle is two rows, readable, and neither Flower's API nor its pages have a token."""
    with Issuer(ISS, SigningKey.generate(), settings=deployment.settings) as issuer:
        issued = issuer.issue({"sub": "alice@example.com", "sid": f"s-{uuid4()}"}, ttl_seconds=600)
        issuer.revoke("subject", {"sub": "alice@example.com"}, wait_for=["shop", "gateway"], timeout_seconds=20)

    def rows() -> dict[str, Any] | None:
        found = {uuid: task for uuid, task in _get(f"{flower}/api/tasks").items() if task["name"] == "knell.terminate"}
        return found if len(found) >= 2 and all(task["state"] == "SUCCESS" for task in found.values()) else None

    found = until(rows, what="two finished rows in Flower")
    assert len(found) == 2
    assert {task["worker"].partition("@")[0] for task in found.values()} == {"shop", "gateway"}
    assert {task["args"] for task in found.values()} == {"revoked 1 subject (admin)"}
    pages = [_read(f"{flower}/tasks"), *(_read(f"{flower}/task/{uuid}") for uuid in found)]
    everything = json.dumps(_get(f"{flower}/api/tasks")) + "".join(pages)
    assert issued.token not in everything
    assert "eyJ" not in everything
    assert "alice" not in everything


def test_flower_shows_nothing_without_the_password(flower: str) -> None:
    """Pages and API ask for the operator's password."""
    for page in ("/", "/tasks", "/api/tasks"):
        assert _status(flower + page, auth=False) == 401


def _status(url: str, *, auth: bool = True) -> int | None:
    try:
        with urllib.request.urlopen(_request(url, auth=auth), timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _read(url: str) -> str:
    with urllib.request.urlopen(_request(url), timeout=10) as answer:
        return answer.read().decode()


def _get(url: str) -> Any:
    return json.loads(_read(url))


def _request(url: str, *, auth: bool = True) -> urllib.request.Request:
    request = urllib.request.Request(url)
    if auth:
        token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    return request
