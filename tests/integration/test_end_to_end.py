"""Issue, refresh, expire, revoke, on real RabbitMQ and Redis, with the notifier and three services as processes."""

from __future__ import annotations

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest

from knell import Issued, Issuer, Scope, SessionEnded, SessionRevoked, TokenExpired, TokenRef, TokenRevoked, Verifier
from knell.keys import SigningKey
from knell.publisher import connect, queue_depth
from knell.topology import service_queue
from tests.deployment import Deployment, on_servers, until
from tests.servers import RabbitServer

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

ISS = "https://auth.example"
SERVICES = ("shop", "gateway", "partner")
KEY = SigningKey.generate()


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, rabbitmq_server: RabbitServer, broker_url: str, redis_url: str
) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("deployment")
    settings = on_servers(directory, rabbitmq_server, broker_url, redis_url, sweep_interval_seconds=2.0)
    deployment = Deployment(directory, settings)
    deployment.prepare(SERVICES)
    try:
        deployment.start_notifier()
        for name in SERVICES:
            deployment.start_service(name)
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture
def issuer(deployment: Deployment) -> Iterator[Issuer]:
    with Issuer(ISS, KEY, settings=deployment.settings) as issuer:
        yield issuer


@pytest.fixture
def verifier(deployment: Deployment) -> Iterator[Verifier]:
    key = KEY.verifying_key
    with Verifier(keys=key, algorithms=["EdDSA"], issuer=ISS, audience="api", settings=deployment.settings) as verifier:
        assert verifier.wait_ready(10)
        yield verifier


def claims(sub: str, sid: str) -> dict[str, str]:
    return {"sub": sub, "sid": sid, "aud": "api"}


def test_expiry_is_told_to_every_service_once_and_never_early(deployment: Deployment, issuer: Issuer) -> None:
    """Each token's end reaches each service's handlers once, not before its exp by the store's clock."""
    issued = [issuer.issue(claims("u", f"s-{uuid4()}"), ttl_seconds=1.5 + n / 10) for n in range(30)]
    for each in issued:
        for event in ("token", "session"):
            deployment.wait_for_records(len(SERVICES), event=event, jti=each.ref.jti)
    for each in issued:
        for event in ("token", "session"):
            found = deployment.records(event=event, jti=each.ref.jti)
            assert Counter(record["service"] for record in found) == Counter(SERVICES)
            assert all(record["cause"] == "expired" and record["time"] >= each.ref.exp for record in found)


def test_a_refreshed_session_ends_with_its_last_token(deployment: Deployment, issuer: Issuer) -> None:
    """The first token's end is no session end; the last one's is, and a refresh after it is refused."""
    sid = f"s-{uuid4()}"
    first = issuer.issue(claims("u", sid), ttl_seconds=1)
    second = issuer.refresh(first.token, ttl_seconds=4)
    assert second.ref.auth_time == first.ref.auth_time
    deployment.wait_for_records(len(SERVICES), event="token", jti=first.ref.jti)
    ends = deployment.wait_for_records(len(SERVICES), event="session", sid=sid)
    assert {record["jti"] for record in ends} == {second.ref.jti}
    with pytest.raises(SessionEnded):
        issuer.refresh(second.token, ttl_seconds=60)


@pytest.mark.parametrize("scope", list(Scope))
def test_a_revocation_is_refused_and_told(deployment: Deployment, issuer: Issuer, scope: Scope) -> None:
    """What is revoked is refused by a verifier in another process's place, and every service is told once."""
    iss, key, sub, sid = f"https://{uuid4()}.example", SigningKey.generate(), f"u-{uuid4()}", f"s-{uuid4()}"
    more = {"client_id": "web", "tenant": "acme", "roles": ["user", "admin"]}
    own = Issuer(iss, key, notice_key=issuer._revoker.key, settings=deployment.settings)
    keys = {each.kid: each.verifying_key for each in (key, KEY)}
    verifier = Verifier(
        keys=keys, algorithms=["EdDSA"], issuer=[iss, ISS], audience="api", settings=deployment.settings
    )
    with own, verifier:
        issued = own.issue(claims(sub, sid) | more, ttl_seconds=600)
        other = issuer.issue(claims(f"u-{uuid4()}", f"s-{uuid4()}") | more, ttl_seconds=600)
        assert verifier.wait_ready(10)
        assert verifier.verify(issued.token)["sub"] == sub
        match = {
            Scope.TOKEN: {"jti": issued.ref.jti},
            Scope.SESSION: {"sid": sid},
            Scope.SUBJECT: {"sub": sub},
            Scope.CLIENT: {"client_id": "web"},
            Scope.KEY: {"kid": key.kid},
            Scope.CLAIMS: {"tenant": "acme", "roles": "admin"},
            Scope.ISSUER: {"iss": iss},
        }[scope]
        _revoke_and_undo(deployment, own, verifier, scope, match, issued, other)


def _revoke_and_undo(
    deployment: Deployment,
    issuer: Issuer,
    verifier: Verifier,
    scope: Scope,
    match: dict[str, str],
    issued: Issued,
    other: Issued,
) -> None:
    confirm = "roles=admin,tenant=acme" if scope is Scope.CLAIMS else None
    revoked = issuer.revoke(
        scope, match, reason="lost phone", initiating_entity="user", confirm=confirm, wait_for=SERVICES
    )
    assert (revoked.recorded, revoked.published, revoked.created) == ("store", True, True)
    assert {name: each.state for name, each in revoked.services.items()} == dict.fromkeys(SERVICES, "done")

    def refusal() -> TokenRevoked | None:
        try:
            verifier.verify(issued.token)
        except TokenRevoked as refused:
            return refused
        return None

    refused = until(refusal, what="the verifier refuses")
    assert (refused.revocation_id, refused.reason) == (revoked.id, "lost phone")
    verifier.verify(other.token)
    told = [r for r in deployment.records(event="session") if r["id"].startswith(f"r-{revoked.id}")]
    assert Counter(record["service"] for record in told) == Counter(SERVICES)
    with pytest.raises(SessionRevoked):
        issuer.track(issued.token)
    undone = issuer.undo(revoked.id)
    assert (undone.created, undone.published, undone.untold) == (True, True, ())
    until(lambda: refusal() is None, what="the verifier accepts again")
    assert issuer.track(issued.token).recorded == "store"


def test_a_revoked_token_is_not_told_again_at_its_expiry(deployment: Deployment, issuer: Issuer) -> None:
    """One end for each life of a session: what a revocation has told, the expiry does not tell."""
    sid, marker = f"s-{uuid4()}", f"s-{uuid4()}"
    issued = issuer.issue(claims("u", sid), ttl_seconds=2)
    issuer.revoke("session", {"sid": sid}, wait_for=SERVICES)
    issuer.issue(claims("u", marker), ttl_seconds=max(0.5, issued.ref.exp + 1 - time.time()))
    deployment.wait_for_records(len(SERVICES), event="session", sid=marker)
    assert deployment.records(event="token", jti=issued.ref.jti) == []
    assert len(deployment.records(event="session", sid=sid)) == len(SERVICES)


def test_one_failing_service_is_retried_alone_and_then_parked(deployment: Deployment, issuer: Issuer) -> None:
    """The others are told once, whatever one service does (trap 1: a retry must not reach the fanout)."""
    sid = f"s-{uuid4()}"
    issuer.issue(claims("trouble", sid), ttl_seconds=600)
    deployment.trouble.touch()
    try:
        revoked = issuer.revoke("subject", {"sub": "trouble"}, wait_for=["partner"], timeout_seconds=30)
    finally:
        deployment.trouble.unlink()
    assert {name: each.state for name, each in revoked.services.items()} == {
        "shop": "done",
        "gateway": "done",
        "partner": "parked",
    }
    told = [r["service"] for r in deployment.records(event="session") if r["id"].startswith(f"r-{revoked.id}")]
    assert Counter(told) == {"shop": 1, "gateway": 1, "partner": 3}
    parked = until(
        lambda: [each for each in deployment.store.parked(service="partner") if revoked.id in each.id],
        what="it is listed as parked",
    )
    assert "session store of this service is away" in parked[0].error


def test_a_service_that_was_killed_is_told_when_it_is_back(deployment: Deployment, issuer: Issuer) -> None:
    """Nothing is lost while a service is down, and nobody else waits for it."""
    deployment.stop_one("gateway", signal.SIGKILL)
    try:
        expiring = issuer.issue(claims("u", f"s-{uuid4()}"), ttl_seconds=1)
        sid = f"s-{uuid4()}"
        revoked = issuer.revoke("session", {"sid": sid}, wait_for=["shop", "partner"])
        assert revoked.services["gateway"].state == "waiting"
        assert revoked.services["shop"].state == revoked.services["partner"].state == "done"
        deployment.wait_for_records(2, event="token", jti=expiring.ref.jti)
        assert deployment.records(service="gateway", sid=sid) == []
    finally:
        deployment.start_service("gateway")
    deployment.wait_for_records(1, service="gateway", event="session", sid=sid)
    deployment.wait_for_records(1, service="gateway", event="token", jti=expiring.ref.jti)
    for service in SERVICES:
        assert len(deployment.records(service=service, event="session", sid=sid)) == 1


def test_timers_wait_in_the_broker_and_survive_the_notifier(
    deployment: Deployment, issuer: Issuer, rabbitmq_server: RabbitServer
) -> None:
    """A timer is a message in the delay ladder, held by no worker; a notifier that was killed finds it when back."""
    issued = issuer.issue(claims("u", f"s-{uuid4()}"), ttl_seconds=20)
    until(lambda: _delayed(deployment) >= 1, what="a message waits in the ladder")
    until(lambda: _unacknowledged(rabbitmq_server, deployment, "knell.expiry") == 0, what="no worker holds a timer")
    assert _delayed(deployment) >= 1
    deployment.stop_one("notifier", signal.SIGKILL)
    deployment.start_notifier(beat=False)
    found = deployment.wait_for_records(len(SERVICES), event="token", jti=issued.ref.jti)
    assert all(record["time"] >= issued.ref.exp for record in found)
    deployment.stop_one("notifier")
    deployment.start_notifier()


class Sweep(NamedTuple):
    """One sweep, as the notifier's log has it: when it was received and when it was over (Unix seconds)."""

    began: float
    ended: float
    told: int


def sweeps(deployment: Deployment) -> list[Sweep]:
    """Those that are over, in order, but for any that found another one at work."""
    began: dict[str, float] = {}
    found: list[Sweep] = []
    for line in deployment.log_of("notifier").read_text().split("\n")[:-1]:
        if "Task knell.sweep[" not in line:
            continue
        entry = json.loads(line)
        at = datetime.fromisoformat(entry["timestamp"]).timestamp()
        if received := re.match(r"Task knell\.sweep\[(\S+)\] received", entry["event"]):
            began[received[1]] = at
        elif over := re.match(r"Task knell\.sweep\[(\S+)\] succeeded in .*: '(\d+) told", entry["event"]):
            found.append(Sweep(began[over[1]], at, int(over[2])))
    alone = [later for earlier, later in pairwise(found) if earlier.ended <= later.began]
    return found[:1] + alone


def claimed_at(record: dict[str, Any]) -> float:
    """When an end was taken out of its second: a record's id is `e<partition>-<UUIDv7>.<n>`."""
    return UUID(record["id"].partition("-")[2].partition(".")[0]).int / 2**80 / 1000


def test_with_every_timer_gone_the_next_sweep_tells(deployment: Deployment) -> None:
    """The pull-based backstop: whatever the broker has lost, the first sweep after its end tells of a token."""
    with Issuer(ISS, KEY, settings=deployment.settings) as issuer:  # its end waits for the timers' confirms
        refs = [issuer.issue(claims("u", f"s-{uuid4()}"), ttl_seconds=5 + n / 4).ref for n in range(4)]
    with connect(deployment.settings) as connection, connection.channel() as channel:
        for level in range(28):
            channel.queue_purge(f"celery_delayed_{level}")
        channel.queue_purge("knell.expiry")
    # Right behind a sweep, and over before the next: no sweep can arm a timer for it.
    before = len(sweeps(deployment))
    until(lambda: len(sweeps(deployment)) > before, what="a sweep is over")
    now = deployment.store.time()
    untimed = TokenRef(iss=ISS, jti=str(uuid4()), exp=now + 0.2, iat=now, sub="u", sid=f"s-{uuid4()}")
    deployment.store.track([untimed])
    for ref in (untimed, *refs):
        told = deployment.wait_for_records(len(SERVICES), event="token", jti=ref.jti)
        sweep = until(
            lambda ref=ref: next((each for each in sweeps(deployment) if each.began >= ref.second), None),
            what="a sweep after its end is over",
        )
        assert all(ref.exp <= record["time"] for record in told)
        assert {claimed_at(record) <= sweep.ended for record in told} == {True}


def test_a_notice_that_the_broker_lost_is_sent_again(deployment: Deployment, issuer: Issuer) -> None:
    """A broker's confirm is not delivery: without a receipt the notice log sends again, to who has not answered."""
    deployment.stop_one("shop", signal.SIGKILL)
    try:
        sid = f"s-{uuid4()}"
        revoked = issuer.revoke("session", {"sid": sid}, wait_for=["gateway", "partner"])
        with connect(deployment.settings) as connection, connection.channel() as channel:
            channel.queue_purge(service_queue("shop"))
    finally:
        deployment.start_service("shop")
    assert deployment.records(service="shop", sid=sid) == []
    deployment.store.resend_at([f"r-{revoked.id}"], 0)
    deployment.wait_for_records(1, service="shop", event="session", sid=sid)
    until(lambda: (deployment.store.status(revoked.id) or {})["shop"].state == "done", what="shop is done")
    assert len(deployment.records(event="session", sid=sid)) == len(SERVICES)


def test_expired_tokens_are_refused_without_asking_anyone(issuer: Issuer, verifier: Verifier) -> None:
    """The expiry check is made on every request."""
    issued = issuer.issue(claims("u", f"s-{uuid4()}"), ttl_seconds=0.3)

    def refused() -> bool:
        try:
            verifier.verify(issued.token)
        except TokenExpired:
            return True
        return False

    until(refused, what="the verifier refuses")
    assert time.time() >= issued.ref.exp


def test_at_rest_every_queue_is_empty(deployment: Deployment, issuer: Issuer) -> None:
    """When all has been told nothing waits anywhere, and nothing was dead-lettered unseen."""
    known = {each.id for each in deployment.store.parked()}
    expiring = issuer.issue(claims("u", f"s-{uuid4()}"), ttl_seconds=1)
    revoked = issuer.revoke("session", {"sid": f"s-{uuid4()}"}, wait_for=SERVICES)
    assert {name: each.state for name, each in revoked.services.items()} == dict.fromkeys(SERVICES, "done")
    deployment.wait_for_records(len(SERVICES), event="session", jti=expiring.ref.jti)
    for queue in (*map(service_queue, SERVICES), "knell.expiry", "knell.receipts", "knell.commands", "knell.dead"):
        until(lambda queue=queue: queue_depth(deployment.settings, queue) == 0, what=f"{queue} is empty")
    assert {each.id for each in deployment.store.parked()} == known


def _delayed(deployment: Deployment) -> int:
    return sum(queue_depth(deployment.settings, f"celery_delayed_{level}") or 0 for level in range(28))


def _unacknowledged(server: RabbitServer, deployment: Deployment, queue: str) -> int:
    vhost = deployment.settings.broker_url.rpartition("/")[2]
    return int(server.api("GET", f"/api/queues/{vhost}/{queue}").get("messages_unacknowledged", 0))
