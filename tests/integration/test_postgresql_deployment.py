"""A deployment on RabbitMQ and PostgreSQL, as processes, each with the role of its part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import pytest

from knell import Issuer, TokenRevoked, Verifier
from knell.keys import SigningKey
from knell.settings import Settings
from tests.deployment import Deployment, on_servers, until
from tests.schemas import Schemas, granted, role_url
from tests.servers import PostgresServer, RabbitServer

pytestmark = [pytest.mark.rabbitmq, pytest.mark.postgresql]

ISS = "https://auth.example"
KEY = SigningKey.generate()


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory,
    rabbitmq_server: RabbitServer,
    broker_url: str,
    postgresql_server: PostgresServer,
    schemas: Schemas,
) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("deployment")
    settings = on_servers(directory, rabbitmq_server, broker_url, schemas.url, sweep_interval_seconds=2.0)
    schemas.lend(settings.namespace)
    with granted(postgresql_server, settings.namespace):
        urls = {role: role_url(postgresql_server, settings.namespace, role) for role in ("notifier", "service")}
        settings = replace(settings, store_url=urls["notifier"], dedupe_url=urls["service"])
        deployment = Deployment(directory, settings)
        try:
            deployment.prepare(["shop"])
            deployment.start_notifier()
            # It has no other right on the store than for its dedupe records.
            deployment.start_service("shop", KNELL_STORE_URL=urls["service"])
            yield deployment
        finally:
            deployment.stop()
    schemas.take_back(settings.namespace)


def as_role(deployment: Deployment, server: PostgresServer, role: str) -> Settings:
    url = role_url(server, deployment.settings.namespace, role)
    return replace(deployment.settings, store_url=url, dedupe_url=url)


def test_ends_are_told_and_revocations_refused(deployment: Deployment, postgresql_server: PostgresServer) -> None:
    """A token that runs out and one that is revoked: the service is told of both, the verifier refuses the second."""
    claims = {"sub": "u", "aud": "api"}
    with (
        Issuer(ISS, KEY, settings=as_role(deployment, postgresql_server, "issuer")) as issuer,
        Verifier(
            keys=KEY.verifying_key,
            algorithms=["EdDSA"],
            issuer=ISS,
            audience="api",
            settings=as_role(deployment, postgresql_server, "verifier"),
        ) as verifier,
    ):
        assert verifier.wait_ready(10)
        short = issuer.issue({**claims, "sid": f"s-{uuid4()}"}, ttl_seconds=2)
        long = issuer.issue({**claims, "sid": f"s-{uuid4()}"}, ttl_seconds=600)
        assert verifier.verify(long.token)["sub"] == "u"
        revoked = issuer.revoke("session", {"sid": long.ref.sid}, wait_for=["shop"])
        assert revoked.services["shop"].state == "done"

        def refused() -> bool:
            try:
                verifier.verify(long.token)
            except TokenRevoked:
                return True
            return False

        until(refused, what="the verifier refuses it")
        [told] = deployment.wait_for_records(1, event="session", jti=short.ref.jti)
        assert told["cause"] == "expired"
        assert told["time"] >= short.ref.exp
        [ended] = deployment.records(event="session", sid=long.ref.sid)
        assert ended["cause"] == "revoked"
    until(lambda: not deployment.store.due(before=short.ref.exp + 1), what="nothing is due any more")
