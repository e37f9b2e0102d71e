"""The store away, a service away for longer than notices are kept: on servers of this module's own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Literal
from uuid import uuid4

import pytest

from knell import Issuer, TokenRevoked, Unavailable, Verifier
from knell.keys import SigningKey
from knell.settings import Rules
from tests.deployment import Deployment, on_servers, until
from tests.servers import RabbitServer, RedisServer, start_redis

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

ISS = "https://auth.example"
KEY = SigningKey.generate()
# A call of an issuer asks the store for the time and then does its work, each with one more try.
STORE_TRIES = 4
# The breaker spares the broker a second one; after a pause of a second it may be asked again.
BROKER_TRIES = 2


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = start_redis(
        tmp_path_factory.mktemp("redis-down"), extra=["--appendonly", "yes", "--appendfsync", "always"]
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, rabbitmq_server: RabbitServer, redis: RedisServer
) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("bad-times")
    settings = on_servers(
        directory,
        rabbitmq_server,
        rabbitmq_server.vhost(),
        redis.url,
        sweep_interval_seconds=1.0,
        rules=Rules(retention_seconds=20.0),
    )
    deployment = Deployment(directory, settings)
    deployment.prepare(["shop", "gateway"])
    try:
        deployment.start_notifier()
        deployment.start_service("shop")
        deployment.start_service("gateway")
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture
def issuer(deployment: Deployment) -> Iterator[Issuer]:
    with Issuer(ISS, KEY, settings=deployment.settings) as issuer:
        yield issuer


def test_with_the_store_away_commands_wait_on_the_broker(
    deployment: Deployment, issuer: Issuer, redis: RedisServer
) -> None:
    """issue and revoke say "queued"; all of it is carried out when the store is back."""
    before = issuer.issue({"sub": "u", "sid": f"s-{uuid4()}"}, ttl_seconds=300)
    with Verifier(
        keys=KEY.verifying_key, algorithms=["EdDSA"], issuer=ISS, audience=None, settings=deployment.settings
    ) as verifier:
        assert verifier.wait_ready(10)
        redis.kill()
        try:
            issued = issuer.issue({"sub": "u", "sid": f"s-{uuid4()}"}, ttl_seconds=4)
            revoked = issuer.revoke("token", {"jti": before.ref.jti}, reason="stolen")
            assert (issued.recorded, revoked.recorded) == ("queued", "queued")
        finally:
            redis.start()
        until(lambda: deployment.store.revocation(revoked.id), what="the revocation is recorded")

        def refused() -> bool:
            try:
                verifier.verify(before.token)
            except TokenRevoked as error:
                return error.revocation_id == revoked.id
            return False

        until(refused, what="the verifier refuses it")
    for service in ("shop", "gateway"):
        deployment.wait_for_records(1, service=service, event="token", jti=issued.ref.jti)
        found = deployment.wait_for_records(1, service=service, event="session", sid=before.ref.sid)
        assert [record["cause"] for record in found] == ["revoked"]
        assert len(deployment.records(service=service, event="token", jti=issued.ref.jti)) == 1


class Door:
    """A port where every connection is closed at once.

    Attributes:
        port: on 127.0.0.1.
        knocks: how many connections there were.
    """

    def __init__(self) -> None:
        self.knocks = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._refuse, name="door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _refuse(self) -> None:
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                return  # it was shut
            self.knocks += 1
            visitor.close()


@pytest.mark.parametrize("policy", ["raise", "allow"])
def test_with_both_away_the_policy_decides(deployment: Deployment, policy: Literal["raise", "allow"]) -> None:
    """Neither store nor broker: raise, or allow and say that it is recorded nowhere, after a try or two of each."""
    with closing(Door()) as store, closing(Door()) as broker:
        away = replace(
            deployment.settings,
            broker_url=f"amqp://guest:guest@127.0.0.1:{broker.port}/x",
            store_url=f"redis://127.0.0.1:{store.port}/0",
        )
        with Issuer(ISS, KEY, settings=away, when_unavailable=policy) as issuer:
            if policy == "raise":
                with pytest.raises(Unavailable, match="neither"):
                    issuer.issue({"sub": "u"}, ttl_seconds=60)
            else:
                assert issuer.issue({"sub": "u"}, ttl_seconds=60).recorded == "nowhere"
            assert 1 <= store.knocks <= STORE_TRIES
            assert 1 <= broker.knocks <= BROKER_TRIES
            with pytest.raises(Unavailable, match="nothing was revoked"):
                issuer.revoke("subject", {"sub": "u"})
        assert store.knocks <= 2 * STORE_TRIES
        assert broker.knocks <= 2 * BROKER_TRIES


def test_a_service_away_for_longer_than_the_retention_is_told_so(deployment: Deployment, issuer: Issuer) -> None:
    """What it lacked is gone; on its return it is told since when, and from then on it is told everything."""
    deployment.stop_one("gateway")
    sid = f"s-{uuid4()}"
    revoked = issuer.revoke("session", {"sid": sid}, wait_for=["shop"])
    assert revoked.services["gateway"].state == "waiting"
    until(
        lambda: next(each for each in deployment.store.services() if each.name == "gateway").missed_since,
        seconds=60,
        what="the gateway has missed something",
    )
    deployment.start_service("gateway")
    (missed,) = deployment.wait_for_records(1, service="gateway", event="missed")
    assert missed["since"] <= revoked.revocation.made_at
    assert deployment.records(service="shop", event="missed") == []
    later = issuer.revoke("session", {"sid": f"s-{uuid4()}"}, wait_for=["gateway"], timeout_seconds=30)
    assert later.services["gateway"].state == "done"
    until(
        lambda: next(each for each in deployment.store.services() if each.name == "gateway").missed_since is None,
        what="its missed record is closed",
    )
