"""Issue, refresh, expire, revoke and kill -9 on the embedded default: the notifier and two services as processes."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from knell import Issuer, SessionEnded, TokenRevoked, Verifier
from knell.connection import connect, queue_depth
from knell.keys import SigningKey
from knell.settings import Settings
from knell.topology import DEAD, service_queue
from tests.deployment import Deployment, until

ISS = "https://auth.example"
SERVICES = ("shop", "partner")
KEY = SigningKey.generate()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Nothing is named, and nothing is declared beforehand: the processes make all that they need."""
    directory = tmp_path_factory.mktemp("embedded")
    deployment = Deployment(directory, Settings(home=directory / "knell", sweep_interval_seconds=1.0))
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


def claims(sid: str, sub: str = "u") -> dict[str, str]:
    return {"sub": sub, "sid": sid, "aud": "api"}


def told_once(deployment: Deployment, event: str, *, service: str | None = None, **wanted: str) -> list[dict[str, Any]]:
    """Wait until each service (or one) was told, and see that none was told twice."""
    services = SERVICES if service is None else (service,)
    for name in services:
        deployment.wait_for_records(1, seconds=60, event=event, service=name, **wanted)
    found = [each for each in deployment.records(event=event, **wanted) if each["service"] in services]
    assert Counter(each["service"] for each in found) == Counter(services)
    return found


def test_a_refreshed_session_ends_once_with_its_last_token(deployment: Deployment, issuer: Issuer) -> None:
    """Each token's end and the session's reach each service once, none early, and no refresh comes after it."""
    sid = f"s-{uuid4()}"
    first = issuer.issue(claims(sid), ttl_seconds=1.5)
    second = issuer.refresh(first.token, ttl_seconds=3)
    for issued in (first, second):
        assert all(each["time"] >= issued.ref.exp for each in told_once(deployment, "token", jti=issued.ref.jti))
    assert {each["jti"] for each in told_once(deployment, "session", sid=sid)} == {second.ref.jti}
    with pytest.raises(SessionEnded):
        issuer.refresh(second.token, ttl_seconds=60)


@pytest.mark.parametrize("scope", ["token", "session", "subject"])
def test_a_revocation_is_told_once_refused_and_followed(deployment: Deployment, issuer: Issuer, scope: str) -> None:
    """In each scope: done by both services, refused by a verifier, and another session left alone."""
    sid, sub = f"s-{uuid4()}", f"u-{uuid4()}"
    issued = issuer.issue(claims(sid, sub), ttl_seconds=600)
    other = issuer.issue(claims(f"s-{uuid4()}", f"u-{uuid4()}"), ttl_seconds=600)
    match = {"token": {"jti": issued.ref.jti}, "session": {"sid": sid}, "subject": {"sub": sub}}[scope]
    revoked = issuer.revoke(scope, match, reason="logout", wait_for=SERVICES, timeout_seconds=30)
    assert {name: each.state for name, each in revoked.services.items()} == dict.fromkeys(SERVICES, "done")
    told_once(deployment, "session", id=f"r-{revoked.id}.0")
    with Verifier(
        keys=KEY.verifying_key, algorithms=["EdDSA"], issuer=ISS, audience="api", settings=deployment.settings
    ) as verifier:
        assert verifier.wait_ready(20)
        with pytest.raises(TokenRevoked) as refused:
            verifier.verify(issued.token)
        assert refused.value.revocation_id == revoked.id
        verifier.verify(other.token)
    assert deployment.records(jti=other.ref.jti) == []


def test_a_service_that_was_killed_lacks_nothing_and_repeats_nothing(deployment: Deployment, issuer: Issuer) -> None:
    """kill -9 of a service: what ended before is not run again, what ends meanwhile is told when it is back."""
    before = issuer.revoke("session", {"sid": f"s-{uuid4()}"}, wait_for=SERVICES, timeout_seconds=30)
    deployment.stop_one("partner", signal.SIGKILL)
    sid = f"s-{uuid4()}"
    try:
        expiring = issuer.issue(claims(f"s-{uuid4()}"), ttl_seconds=1)
        revoked = issuer.revoke("session", {"sid": sid}, wait_for=["shop"], timeout_seconds=30)
        assert (revoked.services["shop"].state, revoked.services["partner"].state) == ("done", "waiting")
        told_once(deployment, "token", service="shop", jti=expiring.ref.jti)
        assert deployment.records(service="partner", sid=sid) == []
    finally:
        deployment.start_service("partner")
    told_once(deployment, "token", jti=expiring.ref.jti)
    told_once(deployment, "session", sid=sid)
    told_once(deployment, "session", id=f"r-{before.id}.0")
    until(lambda: (deployment.store.status(revoked.id) or {})["partner"].state == "done", what="its receipt")


def test_a_notifier_that_was_killed_in_the_middle_loses_nothing(deployment: Deployment, issuer: Issuer) -> None:
    """kill -9 of the notifier while tokens expire every few milliseconds: each end reaches each service once."""
    issued = [issuer.issue(claims(f"s-{uuid4()}"), ttl_seconds=1.5 + n / 15) for n in range(60)]
    jtis = {each.ref.jti for each in issued}

    def ended() -> int:
        return sum(each["jti"] in jtis for each in deployment.records(service="shop", event="token"))

    until(lambda: ended() >= 5, what="the first of them are told")
    deployment.stop_one("notifier", signal.SIGKILL)
    # If it had claimed some and not yet sent them, these come up in the notice log 30 s later.
    assert ended() < len(issued), "it was killed too late to be in the middle"
    # While nobody tells: it is recorded, and the broker has it.
    sid = f"s-{uuid4()}"
    revoked = issuer.revoke("session", {"sid": sid})
    deployment.start_notifier()
    for each in issued:
        found = told_once(deployment, "token", jti=each.ref.jti)
        assert all(record["time"] >= each.ref.exp for record in found)
        told_once(deployment, "session", jti=each.ref.jti)
    told_once(deployment, "session", sid=sid)
    until(
        lambda: {each.state for each in (deployment.store.status(revoked.id) or {}).values()} == {"done"},
        what="its receipts",
    )


def test_nothing_is_left_behind(deployment: Deployment, issuer: Issuer) -> None:
    """After a last revocation every queue runs empty, and nothing was parked."""
    issuer.revoke("session", {"sid": f"s-{uuid4()}"}, wait_for=SERVICES, timeout_seconds=30)
    queues = (*map(service_queue, SERVICES), "knell.receipts", "knell.commands", DEAD)
    with connect(deployment.settings) as connection:
        until(lambda: not any(queue_depth(connection, queue) for queue in queues), what=f"all of {queues} are empty")
    assert deployment.store.parked() == []
