"""The keys that a verifier checks signatures with, and which of them a token's header may choose."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from jwt.algorithms import get_default_algorithms

from knell.errors import InvalidSettings, TokenInvalid
from knell.keys import KEY_ERRORS, SYMMETRIC, SigningKey

# RFC 7518 names none "none"; PyJWT also knows ES521, which is no registered name.
_KNOWN = {name: found for name, found in get_default_algorithms().items() if name not in ("none", "ES521")}


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key and the algorithms that a signature by it may have.

    Attributes:
        key: a public key object, or the secret's bytes.
        algorithms: names of JWS algorithms (RFC 7518, section 3.1). The token only ever chooses among these.
    """

    # Of HMAC it is the secret itself.
    key: Any = field(repr=False)
    algorithms: tuple[str, ...]


class KeyRing:
    """The keys of one verifier, by `kid` where they have one."""

    def __init__(self, keys: object, algorithms: Collection[str]) -> None:
        """Read the keys.

        Args:
            keys: PEM text of a public or private key; a secret of 32 bytes or more for HS256 (48 for HS384, 64 for
                HS512); a public key object; a `jwt.PyJWK`; a `knell.keys.SigningKey`; or a mapping of `kid` to these.
            algorithms: what is accepted, for example ["EdDSA"]. Either HMAC algorithms or public-key ones, not both.

        Raises:
            InvalidSettings: says what was found and what to do. It never shows a key.
        """
        self._algorithms = _check_algorithms(algorithms)
        if isinstance(keys, SigningKey):
            keys = {keys.kid: keys}
        if isinstance(keys, Mapping):
            if not keys:
                raise InvalidSettings("keys is an empty mapping; it must map each kid to its key")
            self._by_kid: dict[str, VerifyingKey] | None = {}
            for kid, key in keys.items():
                if not isinstance(kid, str) or not kid:
                    raise InvalidSettings(f"keys has a kid {kid!r}; a kid is a string with something in it")
                self._by_kid[kid] = self._read(key, f"key {kid!r}")
            self._only = next(iter(self._by_kid.values())) if len(self._by_kid) == 1 else None
        else:
            self._by_kid = None
            self._only = self._read(keys, "the key")

    def choose(self, header: Mapping[str, Any]) -> VerifyingKey:
        """The key for a token by its header, whose `kid` decides, and never its `alg`.

        With a single key and no kids known, any kid will do; a header without kid gets the only key, if it is one.

        Raises:
            TokenInvalid: there is no such key.
        """
        kid = header.get("kid")
        if self._by_kid is not None and kid is not None:
            found = self._by_kid.get(kid) if isinstance(kid, str) else None
            if found is None:
                raise TokenInvalid("the token's kid is not one that this verifier has a key for")
            return found
        if self._only is None:
            raise TokenInvalid("the token's header has no kid, and this verifier has several keys")
        return self._only

    def _read(self, key: object, called: str) -> VerifyingKey:
        if isinstance(key, jwt.PyJWK):
            return self._fit(key.key, called, only=key.algorithm_name)
        if isinstance(key, SigningKey):
            return self._fit(key.verifying_key, called, only=key.algorithm)
        if isinstance(key, str | bytes):
            raw = key.encode() if isinstance(key, str) else key
            is_pem = raw.lstrip().startswith(b"-----BEGIN")
            if self._algorithms[0] not in SYMMETRIC:
                return self._fit(_public_key(raw, called), called)
            if is_pem:
                raise InvalidSettings(
                    f"{called} is a PEM key, but algorithms is {list(self._algorithms)}: whoever has that public key "
                    "could sign; name the algorithm that the key is for, such as EdDSA"
                )
            return self._fit(raw, called)
        return self._fit(key, called)

    def _fit(self, key: Any, called: str, *, only: str | None = None) -> VerifyingKey:
        allowed = [name for name in self._algorithms if only is None or name == only]
        reasons: list[str] = []
        fitting: list[str] = []
        for name in allowed:
            try:
                public = _public_half(_KNOWN[name].prepare_key(key))
                problem = _KNOWN[name].check_key_length(public)
            except KEY_ERRORS as error:
                problem = str(error)
            if problem:
                reasons.append(f"{name}: {problem}")
            else:
                fitting.append(name)
                key = public
        if not fitting:
            why = "; ".join(reasons) or f"it is for {only}"
            raise InvalidSettings(f"{called} fits none of the algorithms {list(self._algorithms)} ({why})")
        return VerifyingKey(key, tuple(fitting))


def _check_algorithms(algorithms: Collection[str]) -> tuple[str, ...]:
    if isinstance(algorithms, str) or not algorithms:
        raise InvalidSettings(f'algorithms is {algorithms!r}; give a list, for example ["EdDSA"]')
    for name in algorithms:
        if name not in _KNOWN:
            raise InvalidSettings(f"algorithm {name!r} is not accepted; use some of {', '.join(sorted(_KNOWN))}")
    if 0 < len(SYMMETRIC & set(algorithms)) < len(set(algorithms)):
        raise InvalidSettings(
            f"algorithms {list(algorithms)} mixes HMAC with public-key algorithms, so that a public key could pass for "
            "a secret; use one kind"
        )
    return tuple(dict.fromkeys(algorithms))


def _public_key(raw: bytes, called: str) -> Any:
    try:
        if b"PRIVATE KEY-----" in raw:
            return serialization.load_pem_private_key(raw, password=None).public_key()
        return serialization.load_pem_public_key(raw)
    except KEY_ERRORS:
        raise InvalidSettings(f"{called} is no PEM public or private key without a passphrase") from None


def _public_half(key: Any) -> Any:
    return key.public_key() if hasattr(key, "public_key") else key
