"""The store away, a service away for longer than notices are kept: on servers of this module's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
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
# A request path may wait for the store's time-out and then for the broker's, and a little for this machine.
BOUND_SECONDS = 10.0


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
    """issue and revoke return within their bound and say "queued"; all of it is carried out when the store is back."""
    before = issuer.issue({"sub": "u", "sid": f"s-{uuid4()}"}, ttl_seconds=300)
    with Verifier(
        keys=KEY.verifying_key, algorithms=["EdDSA"], issuer=ISS, audience=None, settings=deployment.settings
    ) as verifier:
        assert verifier.wait_ready(10)
        redis.kill()
        try:
            started = time.monotonic()
            issued = issuer.issue({"sub": "u", "sid": f"s-{uuid4()}"}, ttl_seconds=4)
            revoked = issuer.revoke("token", {"jti": before.ref.jti}, reason="stolen")
            assert time.monotonic() - started < 2 * BOUND_SECONDS
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


def test_with_both_away_the_policy_decides(
    deployment: Deployment, rabbitmq_server: RabbitServer, redis: RedisServer
) -> None:
    """Neither store nor broker: raise, or allow and say that it is recorded nowhere; never hang."""
    away = replace(
        deployment.settings, broker_url="amqp://guest:guest@127.0.0.1:1/x", store_url="redis://127.0.0.1:1/0"
    )
    for policy in ("raise", "allow"):
        with Issuer(ISS, KEY, settings=away, when_unavailable=policy) as issuer:  # type: ignore[arg-type]
            started = time.monotonic()
            if policy == "raise":
                with pytest.raises(Unavailable, match="neither"):
                    issuer.issue({"sub": "u"}, ttl_seconds=60)
            else:
                assert issuer.issue({"sub": "u"}, ttl_seconds=60).recorded == "nowhere"
            with pytest.raises(Unavailable, match="nothing was revoked"):
                issuer.revoke("subject", {"sub": "u"})
            assert time.monotonic() - started < 2 * BOUND_SECONDS


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
