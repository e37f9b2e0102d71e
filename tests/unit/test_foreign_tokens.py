"""Tokens that Knell did not mint: tracked, verified and revoked like its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from knell import InvalidClaims, Issuer, Rules, SessionRevoked, Settings, TokenInvalid, TokenRevoked, Verifier
from knell.publisher import connect
from knell.store import Store, open_store
from knell.topology import declare
from tests.deployment import until
from tests.unit.tokens_for_tests import RFC_7515_KEY, RFC_7519, RFC_9068, mint, pem

NOW = 1639520000.0
# Before the exp of RFC 7519's examples, so that nobody refuses them for their age.
THEN = 1_300_819_000.0
# RFC 7519, section 6.1: an unsecured JWT. Its claims are those of section 3.1.
UNSECURED = f"eyJhbGciOiJub25lIn0.{RFC_7519.split('.')[1]}."
# RFC 7519, appendix A.1: the same claims, encrypted.
ENCRYPTED = (
    "eyJhbGciOiJSU0ExXzUiLCJlbmMiOiJBMTI4Q0JDLUhTMjU2In0"
    ".QR1Owv2ug2WyPBnbQrRARTeEk9kDO2w8qDcjiHnSJflSdv1iNqhWXaKH4MqAkQtM"
    "oNfABIPJaZm0HaA415sv3aeuBWnD8J-Ui7Ah6cWafs3ZwwFKDFUUsWHSK-IPKxLG"
    "TkND09XyjORj_CHAgOPJ-Sd8ONQRnJvWn_hXV1BNMHzUjPyYwEsRhDhzjAD26ima"
    "sOTsgruobpYGoQcXUwFDn7moXPRfDE8-NoQX7N7ZYMmpUDkR-Cx9obNGwJQ3nM52"
    "YCitxoQVPzjbl7WBuB7AohdBoZOdZ24WlN1lVIeh8v1K4krB8xgKvRU8kgFrEn_a"
    "1rZgN5TiysnmzTROF869lQ"
    ".AxY8DCtDaGlsbGljb3RoZQ"
    ".MKOle7UQrG6nSxTLX6Mqwt0orbHvAKeWnDYvpIAeZ72deHxz3roJDXQyhxx0wKaM"
    "HDjUEOKIwrtkHthpqEanSBNYHZgmNOV7sln1Eu9g3J8"
    ".fiK51VwhsxJ-siBMR-YFiA"
)
# RFC 7519, appendix A.2: the same claims, signed and then encrypted.
NESTED = (
    "eyJhbGciOiJSU0ExXzUiLCJlbmMiOiJBMTI4Q0JDLUhTMjU2IiwiY3R5IjoiSldUIn0"
    ".g_hEwksO1Ax8Qn7HoN-BVeBoa8FXe0kpyk_XdcSmxvcM5_P296JXXtoHISr_DD_M"
    "qewaQSH4dZOQHoUgKLeFly-9RI11TG-_Ge1bZFazBPwKC5lJ6OLANLMd0QSL4fYE"
    "b9ERe-epKYE3xb2jfY1AltHqBO-PM6j23Guj2yDKnFv6WO72tteVzm_2n17SBFvh"
    "DuR9a2nHTE67pe0XGBUS_TK7ecA-iVq5COeVdJR4U4VZGGlxRGPLRHvolVLEHx6D"
    "YyLpw30Ay9R6d68YCLi9FYTq3hIXPK_-dmPlOUlKvPr1GgJzRoeC9G5qCvdcHWsq"
    "JGTO_z3Wfo5zsqwkxruxwA"
    ".UmVkbW9uZCBXQSA5ODA1Mg"
    ".VwHERHPvCNcHHpTjkoigx3_ExK0Qc71RMEParpatm0X_qpg-w8kozSjfNIPPXiTB"
    "BLXR65CIPkFqz4l1Ae9w_uowKiwyi9acgVztAi-pSL8GQSXnaamh9kX1mdh3M_TT"
    "-FZGQFQsFhu0Z72gJKGdfGE-OE7hS1zuBD5oEUfk0Dmb0VzWEzpxxiSSBbBAzP10"
    "l56pPfAtrjEYw-7ygeMkwBl6Z_mLS6w6xUgKlvW6ULmkV-uLC4FUiyKECK4e3WZY"
    "Kw1bpgIqGYsw2v_grHjszJZ-_I5uM-9RA8ycX9KqPRp9gc6pXmoU_-27ATs9XCvr"
    "ZXUtK2902AUzqpeEUJYjWWxSNsS-r1TJ1I-FMJ4XyAiGrfmo9hQPcNBYxPz3GQb2"
    "8Y5CLSQfNgKSGt0A4isp1hBUXBHAndgtcslt7ZoQJaKe_nNJgNliWtWpJ_ebuOpE"
    "l8jdhehdccnRMIwAmU1n7SPkmhIl1HlSOpvcvDfhUN5wuqU955vOBvfkBOh5A11U"
    "zBuo2WlgZ6hYi9-e3w29bR0C2-pp3jbqxEDw3iWaf2dc5b-LnR0FEYXvI_tYk5rd"
    "_J9N0mg0tQ6RbpxNEMNoA9QWk5lgdPvbh9BaO195abQ"
    ".AVO9iT5AV4CzvDJCdhSFlQ"
)


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
    keys = {"joe": (RFC_7515_KEY, "HS256")}
    with (
        Issuer("https://auth.example", settings=deployed, store=store, foreign_keys=keys, clock=lambda: THEN) as issuer,
        pytest.raises(InvalidClaims, match="no 'jti'"),
    ):
        issuer.track(RFC_7519)
    assert store.due(before=2.0**39) == []


@pytest.mark.parametrize("token", [UNSECURED, ENCRYPTED, NESTED], ids=["unsecured", "encrypted", "nested"])
@pytest.mark.parametrize(
    ("key", "algorithm"), [(RFC_7515_KEY, "HS256"), (pem("RS256"), "RS256")], ids=["HS256", "RS256"]
)
def test_what_is_not_signed_is_neither_verified_nor_tracked(
    deployed: Settings, store: Store, token: str, key: str | bytes, algorithm: str
) -> None:
    """RFC 7519's other examples carry the claims of the signed one: no key makes them acceptable."""
    with (
        Issuer(
            "https://auth.example",
            settings=deployed,
            store=store,
            foreign_keys={"joe": (key, algorithm)},
            clock=lambda: THEN,
        ) as issuer,
        Verifier(
            keys=key,
            algorithms=[algorithm],
            issuer="joe",
            audience=None,
            settings=deployed,
            store=store,
            clock=lambda: THEN,
            require=("exp",),
        ) as verifier,
    ):
        if algorithm == "HS256":
            assert verifier.verify(RFC_7519)["iss"] == "joe"
        with pytest.raises(TokenInvalid) as refusal:
            verifier.verify(token)
        with pytest.raises(InvalidClaims, match=r"not a JWT|signature does not verify") as rejection:
            issuer.track(token)
    for error in (refusal.value, rejection.value):
        assert token not in str(error)
    assert store.due(before=2.0**39) == []
