"""Rotation with no gap while everything runs: keys at a URL, processes that verify, a notifier and services."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from knell import AVAILABLE, Issuer, JwksUrl, KeyFile, Settings, TokenRefused, Verifier
from knell.keyfiles import new_key
from knell.keys import ANY_ISSUER, SigningKey
from knell.notices import Cause
from knell.rotation import revoke, rotate
from knell.store import Store, open_store
from tests.deployment import Deployment, until
from tests.jwks_server import JwksServer

ISS = "https://auth.example"
SERVICES = ("shop", "partner")
# A verifier fetches keys when 0.7 of this have passed; a new key is published for longer before it signs.
LIFESPAN_SECONDS = 0.5
LEAD_SECONDS = 3.0


# ---- token-signing keys


def _check_tokens(verifier: Verifier, pipe: Connection) -> None:
    """A process of a service: check what arrives, and answer with the kid, or why it was refused."""
    while (token := pipe.recv()) is not None:
        try:
            pipe.send(("accepted", verifier._decoder.decode(token)[1].kid, bool(verifier.verify(token))))
        except TokenRefused as error:
            pipe.send(("refused", repr(error), False))
    verifier.close()


def test_token_keys_rotate_with_no_gap(tmp_path: Path) -> None:
    """Two issuers and forked verifiers in the middle of traffic: no token is refused, and every one changes over."""
    private = tmp_path / "signing.json"
    new_key(private, None, issuers=[], causes=[])
    settings = Settings(home=tmp_path / "knell")
    forking = multiprocessing.get_context("fork")
    with JwksServer(KeyFile(private).jwks) as server:
        # Made before the fork, and used before it as well: as a server that preloads its application.
        source = JwksUrl(server.url, lifespan_seconds=LIFESPAN_SECONDS, max_age_seconds=600.0)
        # AVAILABLE: this is about keys, and the denylist of a verifier that is closed before the fork grows old.
        verifier = Verifier(source, algorithms=["EdDSA"], issuer=ISS, audience="a", settings=settings, policy=AVAILABLE)
        issuers = [Issuer(ISS, KeyFile(private), settings=settings) for _ in range(2)]
        first = issuers[0].issue({"sid": "s", "aud": "a"}, ttl_seconds=600)
        assert verifier.wait_ready(20)
        assert verifier.verify(first.token)
        verifier.close()
        pipes = [forking.Pipe() for _ in range(2)]
        workers = [forking.Process(target=_check_tokens, args=(verifier, theirs)) for _, theirs in pipes]
        for worker in workers:
            worker.start()

        def told(token: str) -> list[tuple[str, str, bool]]:
            for mine, _ in pipes:
                mine.send(token)
            return [mine.recv() for mine, _ in pipes]

        try:
            made = rotate(private, None, rules=settings.rules, now=time.time(), after_seconds=LEAD_SECONDS)
            kids: Counter[str] = Counter()

            def traffic() -> bool:
                issued = [issuer.issue({"sid": "s2", "aud": "a"}, ttl_seconds=600) for issuer in issuers]
                issued += [issuers[1].refresh(first.token, ttl_seconds=600), first]
                for each in issued:
                    assert told(each.token) == [("accepted", each.ref.kid, True)] * 2
                kids.update(each.ref.kid for each in issued[:3])
                return kids[made.new.kid] >= 30

            until(traffic, seconds=60, what=lambda: f"tokens of the new key ({kids})")
            assert kids.keys() == {made.old.kid, made.new.kid}
            assert kids[made.old.kid] > 0

            # The old key was stolen after all: it leaves the set, and with it every token that it has signed.
            revoke(None, private, made.old.kid, reason="stolen", now=time.time())
            until(lambda: {each[0] for each in told(first.token)} == {"refused"}, what="the old key's token is refused")
            assert {each[0] for each in told(issuers[0].issue({"aud": "a"}, ttl_seconds=600).token)} == {"accepted"}
        finally:
            for mine, _ in pipes:
                mine.send(None)
            for worker in workers:
                worker.join(20)
                if worker.is_alive():
                    worker.kill()
            for issuer in issuers:
                issuer.close()
        assert [worker.exitcode for worker in workers] == [0, 0]


# ---- notice-signing keys


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("rotation")
    notice_key, trust = directory / "notice-key.pem", directory / "trust.json"
    new_key(notice_key, trust, issuers=[ANY_ISSUER], causes=list(Cause))
    settings = Settings(home=directory / "knell", notice_key=notice_key, trust=trust, sweep_interval_seconds=1.0)
    deployment = Deployment(directory, settings)
    try:
        deployment.start_notifier()
        for name in SERVICES:
            deployment.start_service(name)
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture
def store(deployment: Deployment) -> Iterator[Store]:
    settings = deployment.settings
    store = open_store(settings.store_url, namespace=settings.namespace, rules=settings.rules)
    yield store
    store.close()


def test_notice_keys_rotate_with_no_gap(deployment: Deployment, store: Store) -> None:
    """While tokens end and sessions are revoked the key changes: every end is told once, nothing is parked, and a
    notice that the old key signed is taken after the change as well.
    """
    settings = deployment.settings
    assert settings.notice_key is not None
    ends: list[str] = []
    revoked: list[str] = []
    over = threading.Event()
    # Its tokens are HS256, so that its revocations are signed with the notice key.
    issuer = Issuer(ISS, SigningKey.load("s" * 32, algorithm="HS256"), settings=settings)

    def traffic() -> None:
        n = 0
        while not over.wait(0.1):
            n += 1
            ends.append(issuer.issue({"sid": f"e{n}", "aud": "a"}, ttl_seconds=1.0).ref.jti)
            issuer.issue({"sid": f"r{n}", "aud": "a"}, ttl_seconds=600)
            revoked.append(issuer.revoke("session", {"sid": f"r{n}"}).id)

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        until(lambda: len(deployment.records(event="token")) >= 4, what="the first ends are told")
        deployment.stop_one("partner")  # what it is sent now is signed by the old key, and read after the change
        away_from = len(revoked)
        made = rotate(settings.notice_key, settings.trust, rules=settings.rules, now=time.time(), after_seconds=1.0)
        until(lambda: issuer._revoker.signing_key.kid == made.new.kid, what="the new key signs")
        signed_by_old, after = len(revoked), len(ends)
        until(lambda: len(ends) >= after + 15, what="traffic goes on")
    finally:
        over.set()
        thread.join()
        issuer.close()
    assert signed_by_old > away_from
    deployment.start_service("partner")
    told = until(lambda: _all_told(deployment, ends, revoked), seconds=60, what="every end was told")
    for service in SERVICES:
        assert set(told[service].values()) == {1}
    assert store.parked() == []
    for name in ("notifier", *SERVICES):
        assert "refused" not in deployment.log_of(name).read_text()


def _all_told(deployment: Deployment, ends: list[str], revoked: list[str]) -> dict[str, Counter[str]] | None:
    told = {
        service: Counter(each["jti"] for each in deployment.records(event="token", service=service, cause="expired"))
        + Counter(each["id"] for each in deployment.records(event="session", service=service, cause="revoked"))
        for service in SERVICES
    }
    wanted = {*ends, *(f"r-{each}.0" for each in revoked)}
    return told if all(wanted <= found.keys() for found in told.values()) else None
