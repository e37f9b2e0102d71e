"""Signing keys and the trust list: nobody forges."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import get_default_algorithms

from knell.errors import InvalidInput, InvalidSettings, MessageRefused
from knell.keyfiles import public_entry
from knell.keys import (
    ANY_ISSUER,
    COMMAND_TYPE,
    NOTICE_TYPE,
    SigningKey,
    TrustedKey,
    TrustList,
    make_embedded_keys,
    notice_key,
    thumbprint,
    trust_entry,
    trust_list,
)
from knell.notices import Cause
from knell.settings import Settings
from tests.unit.strategies import json_values

ISS = "https://auth.example"
AUDIENCE = "knell:test"
KEY = SigningKey.generate()
PAYLOAD = {"iss": ISS, "aud": AUDIENCE, "iat": 1_000_000.0, "v": 1}


def pem(key: Any) -> bytes:
    """A private key as PEM."""
    text: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return text


RSA_PEM = pem(rsa.generate_private_key(public_exponent=65537, key_size=2048))
EC_PEM = pem(ec.generate_private_key(ec.SECP256R1()))
P384_PEM = pem(ec.generate_private_key(ec.SECP384R1()))
PEMS = {"RS256": RSA_PEM, "ES256": EC_PEM, "EdDSA": KEY.pem()}


def trust(*entries: dict[str, Any]) -> TrustList:
    """A trust list, by default of KEY for everything of ISS."""
    keys = list(entries) or [trust_entry(KEY, issuers=[ISS], causes=list(Cause))]
    return TrustList.parse(json.dumps({"keys": keys}))


@pytest.mark.parametrize("algorithm", PEMS)
def test_a_signature_is_verified_by_the_trust_list(algorithm: str) -> None:
    """Each asymmetric algorithm signs a message that a trust list of its public half accepts."""
    key = SigningKey.load(PEMS[algorithm], algorithm=algorithm)
    trusting = trust(trust_entry(key, issuers=[ISS], causes=[Cause.REVOKED]))
    payload, signer = trusting.verify(key.sign(PAYLOAD, typ=NOTICE_TYPE), typ=NOTICE_TYPE, audience=AUDIENCE)
    assert payload == PAYLOAD
    assert signer.kid == key.kid


@pytest.mark.parametrize(
    ("key", "algorithm", "said"),
    [
        (b"x" * 31, "HS256", "31 bytes; it needs 32 or more"),
        (KEY.pem(), "HS256", "a PEM key was given for HS256"),
        (KEY.pem(), "RS256", "no PEM private key for RS256"),
        (RSA_PEM, "EdDSA", "no PEM private key for EdDSA"),
        (RSA_PEM, "ES256", "no PEM private key for ES256"),
        (P384_PEM, "ES256", "no PEM private key for ES256"),
        (b"not a key", "EdDSA", "no PEM private key for EdDSA"),
        (b"", "RS256", "no PEM private key"),
        (KEY.pem(), "none", "algorithm is 'none'"),
        (KEY.pem(), "HS512", "use one of"),
    ],
)
def test_keys_that_cannot_be_used(key: bytes, algorithm: str, said: str) -> None:
    """A key that does not fit the named algorithm is refused; the algorithm is never guessed."""
    with pytest.raises(InvalidSettings) as caught:
        SigningKey.load(key, algorithm=algorithm)
    assert said in str(caught.value)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP256K1()], ids=lambda curve: curve.name)
def test_a_key_on_another_curve_is_not_trusted(curve: ec.EllipticCurve) -> None:
    """ES256 is P-256: another curve is refused when the list is read, and by the command that would add it."""
    public = ec.generate_private_key(curve).public_key()
    jwk = get_default_algorithms()["ES256"].to_jwk(public, as_dict=True)
    with pytest.raises(InvalidSettings, match="cannot be used"):
        trust({**jwk, "kid": "k", "alg": "ES256", "iss": [ISS], "causes": ["revoked"]})
    text = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(InvalidInput, match="ES256"):
        public_entry(text, algorithm="ES256", kid=None, issuers=[ISS], causes=[Cause.REVOKED])


def test_a_public_key_is_no_signing_key() -> None:
    """A PEM without the private half is refused."""
    public = KEY.verifying_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(InvalidSettings):
        SigningKey.load(public, algorithm="EdDSA")


def test_a_short_rsa_key_is_refused() -> None:
    """An RSA key below 2048 bits (RFC 7518, section 3.3) signs nothing."""
    short = pem(rsa.generate_private_key(public_exponent=65537, key_size=1024))
    with pytest.raises(InvalidSettings, match="2048"):
        SigningKey.load(short, algorithm="RS256")


def test_a_key_shows_no_secret() -> None:
    """Neither repr nor the JWK of a key has its private half."""
    secret = SigningKey.load(b"s" * 32, algorithm="HS256")
    assert "ssss" not in repr(secret)
    assert set(KEY.public_jwk()) == {"kty", "crv", "x", "kid", "alg", "use"}
    with pytest.raises(InvalidSettings, match="no public key"):
        secret.public_jwk()


def test_the_kid_is_the_thumbprint() -> None:
    """Without a kid of its own a key is named by RFC 7638; the example of RFC 8037, appendix A.3."""
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
    assert thumbprint(jwk) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    assert SigningKey.load(KEY.pem(), algorithm="EdDSA").kid == KEY.kid
    assert SigningKey.load(KEY.pem(), algorithm="EdDSA", kid="mine").kid == "mine"


# ---- what the trust list refuses


def forged() -> dict[str, str]:
    """Messages that must not count, by what is wrong with them."""
    good = KEY.sign(PAYLOAD, typ=NOTICE_TYPE)
    header, payload, signature = good.split(".")
    other = SigningKey.generate()
    public = KEY.verifying_key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    headers = {"kid": KEY.kid, "typ": NOTICE_TYPE}
    return {
        "another key": other.sign(PAYLOAD, typ=NOTICE_TYPE),
        "another key under this kid": SigningKey("EdDSA", other.key, KEY.kid).sign(PAYLOAD, typ=NOTICE_TYPE),
        "another typ": KEY.sign(PAYLOAD, typ=COMMAND_TYPE),
        "a token's typ": KEY.sign(PAYLOAD, typ="JWT"),
        "another audience": KEY.sign(PAYLOAD | {"aud": "knell:other"}, typ=NOTICE_TYPE),
        "no audience": KEY.sign({"iat": 1}, typ=NOTICE_TYPE),
        "no iat": KEY.sign({"aud": AUDIENCE}, typ=NOTICE_TYPE),
        "alg none": jwt.encode(PAYLOAD, "", algorithm="none", headers=headers),
        "HMAC with the public key": jwt.encode(PAYLOAD, public, algorithm="HS256", headers=headers),
        "no kid": jwt.encode(PAYLOAD, KEY.key, algorithm="EdDSA", headers={"typ": NOTICE_TYPE}),
        "crit": jwt.encode(PAYLOAD, KEY.key, algorithm="EdDSA", headers=headers | {"crit": ["b64"], "b64": True}),
        "another payload": f"{header}.{jwt.encode({'v': 2}, 'x' * 32).split('.')[1]}.{signature}",
        "no signature": f"{header}.{payload}.",
        "two parts": f"{header}.{payload}",
        "not ASCII": "é.é.é",
        "empty": "",
    }


@pytest.mark.filterwarnings("ignore:The HMAC key")
@pytest.mark.parametrize("wrong", forged())
def test_forgeries_are_refused(wrong: str) -> None:
    """A message that is not signed by a trusted key, for here, as this type, is refused."""
    with pytest.raises(MessageRefused):
        trust().verify(forged()[wrong], typ=NOTICE_TYPE, audience=AUDIENCE)


@given(st.text() | st.binary() | json_values)
def test_only_message_refused_comes_out(message: Any) -> None:
    """Whatever arrives in place of a JWS, MessageRefused is the answer."""
    with pytest.raises(MessageRefused):
        trust().verify(message, typ=NOTICE_TYPE, audience=AUDIENCE)


@given(st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk"]), json_values))
def test_only_message_refused_comes_out_of_odd_headers(header: dict[str, Any]) -> None:
    """Whatever the header of a message holds, MessageRefused is the answer to a signature that is none."""
    made = jwt.utils.base64url_encode(json.dumps(header).encode()).decode()
    with pytest.raises(MessageRefused):
        trust().verify(f"{made}.e30.c2ln", typ=NOTICE_TYPE, audience=AUDIENCE)


@given(json_values)
def test_a_signed_payload_of_any_shape(value: Any) -> None:
    """Even a trusted key's payload is a JSON object for this audience, or refused."""
    jws = jwt.api_jws.encode(
        json.dumps(value).encode(), KEY.key, algorithm="EdDSA", headers={"kid": KEY.kid, "typ": NOTICE_TYPE}
    )
    with pytest.raises(MessageRefused):
        trust().verify(jws, typ=NOTICE_TYPE, audience=AUDIENCE)


# ---- what a key may say


def test_a_key_speaks_for_its_issuers_and_causes_only() -> None:
    """The trust list says which signer may speak for which iss, and why."""
    _, narrow = trust(trust_entry(KEY, issuers=[ISS], causes=[Cause.REVOKED])).verify(
        KEY.sign(PAYLOAD, typ=NOTICE_TYPE), typ=NOTICE_TYPE, audience=AUDIENCE
    )
    assert narrow.may_tell(ISS, Cause.REVOKED)
    assert not narrow.may_tell(ISS, Cause.EXPIRED)
    assert not narrow.may_tell("", Cause.MISSED)
    assert not narrow.may_tell("https://other.example", Cause.REVOKED)
    assert not narrow.may_track("https://other.example")


def test_a_key_for_any_issuer() -> None:
    """The notifier's key speaks for every issuer; "missed" is of none."""
    _, wide = trust(trust_entry(KEY, issuers=[ANY_ISSUER], causes=list(Cause))).verify(
        KEY.sign(PAYLOAD, typ=NOTICE_TYPE), typ=NOTICE_TYPE, audience=AUDIENCE
    )
    assert wide.may_tell("https://other.example", Cause.EXPIRED)
    assert wide.may_tell("", Cause.MISSED)


def test_who_may_revoke_may_undo_and_nobody_else() -> None:
    """An undo that services refuse would leave them and the verifiers at odds; to revoke takes more than to undo."""
    _, revokes = believed(trust_entry(KEY, issuers=[ISS], causes=[Cause.REVOKED]))
    assert revokes.may_tell(ISS, Cause.UNDONE)
    assert not revokes.may_tell("https://other.example", Cause.UNDONE)
    _, expires = believed(trust_entry(KEY, issuers=[ISS], causes=[Cause.EXPIRED]))
    assert not expires.may_tell(ISS, Cause.UNDONE)
    _, undoes = believed(trust_entry(KEY, issuers=[ISS], causes=[Cause.UNDONE]))
    assert not undoes.may_tell(ISS, Cause.REVOKED)


@pytest.mark.parametrize(
    "listed", ["https://auth.example/", "https://auth.exampl", "HTTPS://AUTH.EXAMPLE", "https://*.example", "**", ".*"]
)
def test_an_issuer_is_meant_to_the_letter(listed: str) -> None:
    """Nothing that is like an iss, and no pattern, is that iss; "*" alone is any."""
    _, key = believed(trust_entry(KEY, issuers=[listed], causes=list(Cause)))
    assert not key.may_tell(ISS, Cause.REVOKED)
    assert key.may_tell(listed, Cause.REVOKED)


def believed(*entries: dict[str, Any], clock: Callable[[], float] = time.time) -> tuple[dict[str, Any], TrustedKey]:
    """What a trust list says of a message that KEY has signed."""
    trusting = TrustList.parse(json.dumps({"keys": list(entries)}), clock=clock)
    return trusting.verify(KEY.sign(PAYLOAD, typ=NOTICE_TYPE), typ=NOTICE_TYPE, audience=AUDIENCE)


def test_a_retired_key_counts_until_its_time() -> None:
    """Up to its exp what it has signed counts, whenever that was; after it neither its messages nor its name do."""
    entry = trust_entry(KEY, issuers=[ISS], causes=list(Cause)) | {"exp": 1000.5}
    assert believed(entry, clock=lambda: 1000.4)
    with pytest.raises(MessageRefused, match="count no longer since 0 s"):
        believed(entry, clock=lambda: 1000.5)
    trusting = TrustList.parse(json.dumps({"keys": [entry]}), clock=lambda: 1000.5)
    assert not trusting.may_tell(KEY.kid, ISS, Cause.REVOKED)


@pytest.mark.parametrize("mark", [True, {"revoked_at": 5, "reason": "stolen"}, "yes", 1, 0, "", {}])
def test_a_revoked_key_counts_for_nothing(mark: Any) -> None:
    """Whatever `revoked` says, unless it says no."""
    entry = trust_entry(KEY, issuers=[ISS], causes=list(Cause)) | {"revoked": mark}
    with pytest.raises(MessageRefused, match="was revoked"):
        believed(entry)
    assert not TrustList.parse(json.dumps({"keys": [entry]})).may_tell(KEY.kid, ISS, Cause.REVOKED)


@pytest.mark.parametrize(
    "member", [{"revoked": False}, {"revoked": None}, {"exp": None}, {"x5u": "http://x"}, {"?": 1}]
)
def test_other_members_of_an_entry_change_nothing(member: dict[str, Any]) -> None:
    """What is unknown is ignored, and what says no is no."""
    assert believed(trust_entry(KEY, issuers=[ISS], causes=list(Cause)) | member)


ENTRY = trust_entry(KEY, issuers=[ISS], causes=list(Cause))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JWK Set"),
        ("[]", "no JWK Set"),
        ("{}", "no JWK Set"),
        ('{"keys": 5}', "JWK Set"),
        ('{"keys": ["x"]}', "cannot be used"),
        (json.dumps({"keys": [{**ENTRY, "alg": "HS256"}]}), "alg 'HS256'"),
        (json.dumps({"keys": [{**ENTRY, "alg": ["EdDSA"]}]}), "cannot be used"),
        (json.dumps({"keys": [{**ENTRY, "d": "AA"}]}), "private key"),
        (json.dumps({"keys": [{**ENTRY, "iss": []}]}), "cannot be used"),
        (json.dumps({"keys": [{**ENTRY, "iss": ISS}]}), "cannot be used"),
        (json.dumps({"keys": [{**ENTRY, "causes": ["bored"]}]}), "cannot be used"),
        (json.dumps({"keys": [{**ENTRY, "x": "AA"}]}), "cannot be used"),
        (json.dumps({"keys": [{**ENTRY, "exp": "tomorrow"}]}), "cannot be used"),
        (json.dumps({"keys": [{**ENTRY, "exp": 1e14}]}), "cannot be used"),
        (json.dumps({"keys": [{"kty": "oct", "k": "AAAA", "kid": "k", "alg": "EdDSA", "iss": ["*"]}]}), "be used"),
        (json.dumps({"keys": [{"kty": "oct", "k": "AAAA", "kid": "k", "alg": "HS256", "iss": ["*"]}]}), "alg 'HS256'"),
        (json.dumps({"keys": [{name: ENTRY[name] for name in ENTRY if name != "kid"}]}), "cannot be used"),
        (json.dumps({"keys": [ENTRY, ENTRY]}), "twice"),
    ],
)
def test_trust_lists_that_cannot_be_used(text: str, said: str) -> None:
    """A trust list with anything wrong in it is refused whole, with what is wrong."""
    with pytest.raises(InvalidSettings) as caught:
        TrustList.parse(text)
    assert said in str(caught.value)


@given(json_values | st.dictionaries(st.just("keys"), st.lists(json_values)))
def test_only_invalid_settings_comes_out_of_a_trust_list(found: Any) -> None:
    """Whatever a trust list's file holds, the answer is a list or InvalidSettings."""
    try:
        TrustList.parse(json.dumps(found))
    except InvalidSettings:
        return
    assert found == {"keys": []}


# ---- files


def test_the_embedded_default_makes_its_own_keys(tmp_path: Path) -> None:
    """Without any setting, one key is made, readable by its owner only, and the trust list has it."""
    settings = Settings(home=tmp_path / "home")
    key = notice_key(settings)
    assert key is not None
    trust_list(settings).verify(key.sign(PAYLOAD, typ=NOTICE_TYPE), typ=NOTICE_TYPE, audience=AUDIENCE)
    assert settings.notice_key is not None
    assert stat.S_IMODE(settings.notice_key.stat().st_mode) == 0o600
    make_embedded_keys(settings)
    again = notice_key(settings)
    assert again is not None
    assert again.kid == key.kid
    assert sorted(path.name for path in settings.home.iterdir()) == ["notice-key.pem", "trust.json"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A key or trust list that is not there is an error that names the variable."""
    settings = Settings(
        broker_url="amqp://broker/knell",
        store_url="redis://store",
        notice_key=tmp_path / "no.pem",
        trust=tmp_path / "no.json",
    )
    with pytest.raises(InvalidSettings, match="KNELL_NOTICE_KEY"):
        notice_key(settings)
    with pytest.raises(InvalidSettings, match="KNELL_TRUST"):
        trust_list(settings)


def test_a_server_deployment_makes_no_keys(tmp_path: Path) -> None:
    """On a real broker keys are given, never made: no key is None, no trust list an error."""
    settings = Settings(home=tmp_path, broker_url="amqp://broker/knell", store_url="redis://store")
    assert notice_key(settings) is None
    with pytest.raises(InvalidSettings, match="KNELL_TRUST is not set"):
        trust_list(settings)
    assert list(tmp_path.iterdir()) == []


def test_a_trust_list_that_is_not_text(tmp_path: Path) -> None:
    """A file of bytes that are no UTF-8 is refused like any other that is no JWK Set."""
    path = tmp_path / "trust.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidSettings):
        TrustList.load(path)
