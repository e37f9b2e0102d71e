"""Sessions that outlive their tokens, on real RabbitMQ and Redis, with the notifier and a service as processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from knell import InvalidClaims, Issuer, SessionEnded
from knell.keys import SigningKey
from knell.settings import Rules
from knell.tokens import TokenRef
from tests.deployment import Deployment, on_servers
from tests.servers import RabbitServer

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

ISS = "https://auth.example"
KEY = SigningKey.generate()
# Long enough to refresh a token that has run out, on a machine that is busy.
GRACE_SECONDS = 5.0


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, rabbitmq_server: RabbitServer, broker_url: str, redis_url: str
) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("deployment")
    rules = Rules(session_grace_seconds=GRACE_SECONDS)
    deployment = Deployment(directory, on_servers(directory, rabbitmq_server, broker_url, redis_url, rules=rules))
    deployment.prepare(["shop"])
    try:
        deployment.start_notifier(beat=False)  # no sweep: it would make up for a timer that was never armed
        deployment.start_service("shop")
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture
def issuer(deployment: Deployment) -> Iterator[Issuer]:
    with Issuer(ISS, KEY, settings=deployment.settings) as issuer:
        yield issuer


class Life:
    """A session whose token runs out, is refreshed after that, and runs out again."""

    def __init__(self, deployment: Deployment, issuer: Issuer, **claims: Any) -> None:
        self._deployment = deployment
        self._issuer = issuer
        self.sid = f"s-{uuid4()}"
        first = issuer.issue({"sub": "u", "sid": self.sid} | claims, ttl_seconds=1)
        self._wait_for_end(first.ref)
        second = issuer.refresh(first.token, ttl_seconds=1.5)
        self._wait_for_end(second.ref)
        self.last = second
        self.tokens = (first.ref, second.ref)

    def _wait_for_end(self, token: TokenRef) -> None:
        self._deployment.wait_for_records(1, event="token", jti=token.jti)

    def check(self, end: float) -> None:
        """The session was told of once, at its end and by itself; and its tokens were told of as tokens alone."""
        [told] = self._deployment.wait_for_records(1, event="session", sid=self.sid)
        self._settle()
        everything = self._deployment.records(sid=self.sid)
        assert [(r["event"], r["scope"], r["jti"]) for r in everything] == [
            ("token", "token", self.tokens[0].jti),
            ("token", "token", self.tokens[1].jti),
            ("session", "session", None),
        ]
        assert {record["cause"] for record in everything} == {"expired"}
        assert told["at"] == pytest.approx(end, rel=0, abs=0.001)
        assert told["time"] >= end
        assert all(r["time"] >= token.exp for r, token in zip(everything, self.tokens, strict=False))

    def _settle(self) -> None:
        """Wait until what was due by now was told: a token that ends later was told after it."""
        later = self._issuer.issue({"sub": "u", "sid": f"s-{uuid4()}"}, ttl_seconds=1.5)
        self._wait_for_end(later.ref)


def test_a_session_with_session_exp_ends_at_it(deployment: Deployment, issuer: Issuer) -> None:
    """Its tokens run out before it and are refreshed; the session is told of once, at its session_exp."""
    session_exp = round(time.time() + 9, 3)
    life = Life(deployment, issuer, session_exp=session_exp)
    assert deployment.store.session(ISS, life.sid) is not None
    life.check(session_exp)
    with pytest.raises(InvalidClaims, match="session_exp"):
        issuer.refresh(life.last.token, ttl_seconds=60)


def test_a_session_under_grace_ends_after_its_last_token(deployment: Deployment, issuer: Issuer) -> None:
    """Refreshed within the grace, it lives on past the end that its first token gave it, and is told of once."""
    life = Life(deployment, issuer)
    assert deployment.store.session(ISS, life.sid) is not None
    life.check(life.last.ref.exp + GRACE_SECONDS)
    with pytest.raises(SessionEnded):
        issuer.refresh(life.last.token, ttl_seconds=60)
