"""Tokens that Knell did not mint: tracked, verified and revoked like its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from knell import InvalidClaims, Issuer, Rules, SessionRevoked, Settings, TokenRevoked, Verifier
from knell.publisher import connect
from knell.store import Store, open_store
from knell.topology import declare
from tests.deployment import until
from tests.unit.tokens_for_tests import RFC_7515_KEY, RFC_7519, RFC_9068, mint, pem

NOW = 1639520000.0


def now() -> float:
    return NOW


@pytest.fixture
def deployed(settings: Callable[..., Settings]) -> Settings:
    made = settings(rules=Rules(max_token_seconds=300 * 86_400.0))
    with connect(made) as connection:
        declare(connection, ["shop"], settings=made)
    return made


@pytest.fixture
def store(deployed: Settings) -> Iterator[Store]:
    store = open_store(deployed.store_url, namespace=deployed.namespace, rules=deployed.rules, clock=now)
    store.add_service("shop")
    yield store
    store.close()


def refused(verifier: Verifier, token: str) -> TokenRevoked | None:
    try:
        verifier.verify(token)
    except TokenRevoked as error:
        return error
    return None


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
@pytest.mark.parametrize("scope", ["token", "subject"])
def test_a_token_of_another_library_is_tracked_verified_and_revoked(
    deployed: Settings, store: Store, algorithm: str, scope: str
) -> None:
    """The claims of RFC 9068's example, signed by joserfc in each algorithm, go through all of it."""
    token = mint(RFC_9068, algorithm=algorithm, typ="at+jwt", kid="RjEwOwOA")
    keys = {RFC_9068["iss"]: (pem(algorithm), algorithm)}
    with (
        Issuer("https://auth.example", settings=deployed, store=store, foreign_keys=keys, clock=now) as issuer,
        Verifier(
            keys=pem(algorithm),
            algorithms=[algorithm],
            issuer=RFC_9068["iss"],
            audience=RFC_9068["aud"],
            settings=deployed,
            store=store,
            clock=now,
        ) as verifier,
    ):
        tracked = issuer.track(token)
        assert (tracked.ref.client_id, tracked.ref.kid) == ("s6BhdRkqt3", "RjEwOwOA")
        assert store.due(before=RFC_9068["exp"]) == [RFC_9068["exp"]]
        assert verifier.verify(token) == RFC_9068
        match = {"token": {"jti": RFC_9068["jti"]}, "subject": {"sub": RFC_9068["sub"]}}[scope]
        revoked = issuer.revoke(scope, match, iss=RFC_9068["iss"], reason="leaked")
        found = until(lambda: refused(verifier, token), what="the verifier refuses")
        assert (found.revocation_id, found.reason) == (revoked.id, "leaked")
        with pytest.raises(SessionRevoked):
            issuer.track(token)


def test_the_example_of_rfc_7519_has_no_name(deployed: Settings, store: Store) -> None:
    """A token without a jti cannot be tracked, and the error says so."""
    then = 1_300_819_000.0
    keys = {"joe": (RFC_7515_KEY, "HS256")}
    with (
        Issuer("https://auth.example", settings=deployed, store=store, foreign_keys=keys, clock=lambda: then) as issuer,
        pytest.raises(InvalidClaims, match="no 'jti'"),
    ):
        issuer.track(RFC_7519)
    assert store.due(before=2.0**39) == []
