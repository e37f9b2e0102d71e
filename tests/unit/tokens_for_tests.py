"""Keys of every kind, and tokens made with a JWT library that is not Knell's."""

from __future__ import annotations

import base64
import functools
import warnings
from typing import Any

from joserfc import jwt as jose
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

from knell.settings import Settings
from knell.verifier import Verifier
from tests.unit.memory_feed import ISS, MemoryFeed

AUD = "shop"
NOW = 1_700_000_000.0
# RFC 9068, section 3: the claims of the example; it lives for 245 days.
RFC_9068: dict[str, Any] = {
    "iss": "https://authorization-server.example.com/",
    "sub": "5ba552d67",
    "aud": "https://rs.example.com/",
    "exp": 1639528912,
    "iat": 1618354090,
    "jti": "dbe39bf3a3ba4238a513f51d6e1691c4",
    "client_id": "s6BhdRkqt3",
    "scope": "openid profile reademail",
}
# RFC 7519, section 3.1: the whole token, and the key of RFC 7515, appendix A.1, that verifies it.
RFC_7519 = (
    "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9"
    ".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
    ".dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
)
RFC_7515_KEY = base64.urlsafe_b64decode(
    "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow=="
)
SECRET = "a secret of more than 64 bytes, which is enough for HS256, HS384 and HS512 too"


@functools.cache
def key(algorithm: str) -> Any:
    """A joserfc key for an algorithm, one per run."""
    if algorithm.startswith("HS"):
        return OctKey.import_key(SECRET)
    if algorithm[:2] in ("RS", "PS"):
        return RSAKey.generate_key(2048)
    if algorithm.startswith("ES"):
        return ECKey.generate_key("P-256")
    return OKPKey.generate_key("Ed25519")


def pem(algorithm: str, *, private: bool = False) -> str:
    """That key as PEM."""
    return str(key(algorithm).as_pem(private=private).decode())


def claims(**changes: Any) -> dict[str, Any]:
    """An ordinary claims set, with changes; a claim that is changed to `...` is left out."""
    found: dict[str, Any] = {"iss": ISS, "aud": AUD, "sub": "alice", "jti": "j1", "sid": "s1"}
    found |= {"iat": int(NOW) - 10, "exp": int(NOW) + 600} | changes
    return {name: value for name, value in found.items() if value is not ...}


def mint(payload: dict[str, Any] | None = None, *, algorithm: str = "EdDSA", **header: Any) -> str:
    """Sign a claims set with joserfc."""
    protected = {"alg": algorithm, "typ": "JWT"} | header
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="EdDSA is deprecated via RFC 9864")
        return jose.encode(protected, claims() if payload is None else payload, key(algorithm), algorithms=[algorithm])


def verifier(feed: MemoryFeed | None = None, **changes: Any) -> Verifier:
    """A verifier of those tokens, whose clock stands at NOW."""
    given: dict[str, Any] = {
        "keys": pem("EdDSA"),
        "algorithms": ["EdDSA"],
        "issuer": ISS,
        "audience": AUD,
        "settings": Settings(),
        "store": feed if feed is not None else MemoryFeed(clock=lambda: NOW),
        "clock": lambda: NOW,
    }
    return Verifier(**given | changes)
