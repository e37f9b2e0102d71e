"""The broker killed, and the broker back with nothing: under a deployment that goes on, on a RabbitMQ of its own."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from knell import Issued, Issuer
from knell.connection import connect, queue_depth
from knell.issuer import Revoked
from knell.keys import SigningKey
from knell.notices import batch_id_of_revocation
from tests.commandline import Knell
from tests.deployment import Deployment, on_servers, until
from tests.servers import RabbitServer, start_rabbitmq

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

ISS = "https://auth.example"
KEY = SigningKey.generate()
SERVICES = ("shop", "gateway")
WORKERS = ("notifier", *SERVICES)
# A worker that lost its broker tries again after 2, 4, 6, ... seconds.
BACK_SECONDS = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the broker is, its data under `mnesia`."""
    return tmp_path_factory.mktemp("broker-loss-rabbitmq")


@pytest.fixture(scope="module")
def broker(folder: Path) -> Iterator[RabbitServer]:
    server = start_rabbitmq(folder)
    yield server
    server.kill()
    server.stop()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, broker: RabbitServer, redis_url: str) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("broker-loss")
    settings = on_servers(directory, broker, broker.vhost(), redis_url, sweep_interval_seconds=2.0)
    deployment = Deployment(directory, settings)
    deployment.prepare(SERVICES)
    try:
        # One message at a time, so that what else comes for a service that is frozen stays in its queue.
        options = ("--pool=solo", "--prefetch-multiplier=1")
        with ThreadPoolExecutor(len(WORKERS)) as pool:
            starting = [pool.submit(deployment.start_notifier)]
            starting += [pool.submit(deployment.start_service, name, options=options) for name in SERVICES]
            for started in starting:
                started.result()
        until(lambda: "Task knell.sweep" in deployment.log_of("notifier").read_text(), what="beat and its sweep work")
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture
def issuer(deployment: Deployment) -> Iterator[Issuer]:
    with Issuer(ISS, KEY, settings=deployment.settings) as issuer:
        yield issuer


class Ends:
    """What has to be told, once to each service: tokens by jti and revoked sessions by sid."""

    def __init__(self, deployment: Deployment, issuer: Issuer) -> None:
        self._deployment = deployment
        self._issuer = issuer
        self.issued: list[Issued] = []
        self.revoked: list[Revoked] = []

    def issue(self, *ttls_seconds: float) -> None:
        """Tokens that live for so long."""
        for ttl_seconds in ttls_seconds:
            self.issued.append(self._issuer.issue({"sub": "u", "sid": str(uuid4())}, ttl_seconds=ttl_seconds))

    def revoke(self) -> Revoked:
        """End a session."""
        self.revoked.append(self._issuer.revoke("session", {"sid": str(uuid4())}))
        return self.revoked[-1]

    def wait(self) -> None:
        """Wait until every service has been told of each, has answered, and was told once."""
        for each in self.issued:
            found = self._deployment.wait_for_records(
                len(SERVICES), seconds=BACK_SECONDS, event="session", jti=each.ref.jti
            )
            assert all(record["time"] >= each.ref.exp for record in found)
        until(self._answered, seconds=BACK_SECONDS, what="every service has answered for every revocation")
        for event, name, value in self._expected():
            told = [record["service"] for record in self._deployment.records(event=event, **{name: value})]
            assert Counter(told) == Counter(SERVICES), (event, name, value)

    def _answered(self) -> bool:
        store = self._deployment.store
        waiting = [
            each.id
            for each in self.revoked
            if {name: status.state for name, status in (store.status(each.id) or {}).items()}
            != dict.fromkeys(SERVICES, "done")
        ]
        # The sweep looks at what nobody has receipted after half a minute; here, each time it comes.
        store.resend_at([batch_id_of_revocation(revocation_id) for revocation_id in waiting], 0)
        return not waiting

    def _expected(self) -> Iterator[tuple[str, str, str]]:
        for each in self.issued:
            yield from ((event, "jti", each.ref.jti) for event in ("token", "session"))
        for revoked in self.revoked:
            yield "session", "sid", str(revoked.revocation.value)


@pytest.fixture
def ends(deployment: Deployment, issuer: Issuer) -> Iterator[Ends]:
    """Ends to come, under processes that have to be the same ones when the test is over."""
    before = {name: deployment.pid(name) for name in WORKERS}
    yield Ends(deployment, issuer)
    assert {name: deployment.pid(name) for name in WORKERS if deployment.running(name)} == before


@contextmanager
def frozen(deployment: Deployment, name: str) -> Iterator[None]:
    """A process that does nothing, for as long as it lasts: what it is sent stays with the broker."""
    os.killpg(deployment.pid(name), signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(deployment.pid(name), signal.SIGCONT)


def in_the_ladder(deployment: Deployment) -> int:
    with connect(deployment.settings) as connection:
        return sum(queue_depth(connection, f"celery_delayed_{level}") or 0 for level in range(28))


@pytest.mark.timeout(180)
def test_a_broker_that_is_killed_costs_no_notice(deployment: Deployment, broker: RabbitServer, ends: Ends) -> None:
    """kill -9 with timers in the ladder and notices in a queue: all of it is told, once, by the same processes."""
    with frozen(deployment, "gateway"):
        ends.issue(5, 14)
        until(lambda: in_the_ladder(deployment) >= 2, what="the timers wait in the ladder")
        assert [ends.revoke().published for _ in range(3)] == [True] * 3
        # RabbitMQ writes its list of quorum queues to disk a moment after a declaration.
        broker.ctl("eval", "mnesia:sync_log(), [dets:sync(T) || T <- dets:all()], ok.")
        broker.kill()
        assert not ends.revoke().published
        ends.issue(1)
    broker.start()
    ends.wait()


@pytest.mark.timeout(180)
def test_a_broker_that_comes_back_empty_costs_no_notice(
    deployment: Deployment, broker: RabbitServer, folder: Path, ends: Ends
) -> None:
    """Timers, queues and the notices in them are gone: the workers wait for the topology, and tell all of it once."""
    sizes = {name: deployment.log_of(name).stat().st_size for name in WORKERS}
    vhost = deployment.settings.broker_url.rpartition("/")[2]

    def heard(name: str, text: str) -> bool:
        return text in deployment.log_of(name).read_bytes()[sizes[name] :].decode(errors="replace")

    def wait_to_hear(text: str) -> None:
        for name in ("notifier", "shop"):
            until(lambda name=name: heard(name, text), seconds=BACK_SECONDS, what=f"{text!r} of {name}")

    with frozen(deployment, "gateway"):
        ends.issue(5, 14)
        until(lambda: in_the_ladder(deployment) >= 2, what="the timers wait in the ladder")
        assert [ends.revoke().published for _ in range(3)] == [True] * 3
        broker.kill()
        shutil.rmtree(folder / "mnesia")
        ends.issue(1)
        broker.start()
        wait_to_hear(f"vhost {vhost} not found")
        broker.api("PUT", f"/api/vhosts/{vhost}")
        broker.api("PUT", f"/api/permissions/{vhost}/guest", {"configure": ".*", "write": ".*", "read": ".*"})
        wait_to_hear("queue_is_missing")
        assert not ends.revoke().published
        Knell(deployment.settings)("topology", "apply")
    ends.wait()


@pytest.mark.timeout(180)
def test_a_worker_whose_account_is_gone_waits_for_it(
    deployment: Deployment, broker: RabbitServer, tmp_path: Path
) -> None:
    """A broker that lost its data has lost its accounts too: a worker goes on when somebody has made its own again."""

    def make_account() -> str:
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        return broker.add_user(deployment.settings.broker_url, "clerk", "secret", everything)

    beside = Deployment(tmp_path, replace(deployment.settings, broker_url=make_account()))

    def log() -> str:
        text = beside.log_of("shop").read_text()
        assert beside.running("shop"), f"it has exited:\n{text[-1500:]}"
        return text

    try:
        beside.start_service("shop")
        broker.api("DELETE", "/api/users/clerk")
        broker.ctl("close_all_user_connections", "clerk", "its account is gone")
        until(lambda: "Login was refused" in log(), seconds=BACK_SECONDS, what="the worker is refused")
        make_account()
        until(lambda: log().count("Connected to amqp://clerk") == 2, seconds=BACK_SECONDS, what="it is connected again")
    finally:
        beside.stop()
