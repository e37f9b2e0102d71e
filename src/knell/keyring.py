"""The keys that a verifier checks signatures with, and which of them a token's header may choose."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt
import structlog
from cryptography.hazmat.primitives import serialization
from jwt.algorithms import get_default_algorithms

from knell.errors import InvalidSettings, TokenInvalid
from knell.keys import KEY_ERRORS, SYMMETRIC, SigningKey, name_of_secret, public_key, thumbprint
from knell.keysource import KeySource

log = structlog.get_logger(__name__)

# RFC 7518 names none "none"; PyJWT also knows ES521, which is no registered name.
_KNOWN = {name: found for name, found in get_default_algorithms().items() if name not in ("none", "ES521")}


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key and the algorithms that a signature by it may have.

    Attributes:
        key: a public key object, or the secret's bytes.
        algorithms: names of JWS algorithms (RFC 7518, section 3.1). The token only ever chooses among these.
        kid: its name. Where it was given without one, its thumbprint (RFC 7638), or of a secret a hash of its hash.
        named: False where it was given without a name.
    """

    # Of HMAC it is the secret itself.
    key: Any = field(repr=False)
    algorithms: tuple[str, ...]
    kid: str
    named: bool = True

    def kid_in(self, header: Mapping[str, Any]) -> Any:
        """The kid of a token with that header, which this key has verified.

        What the header says counts only for a key that was given without a name.
        """
        said = header.get("kid")
        return self.kid if self.named or said is None else said


class KeyRing:
    """The keys of one verifier, by `kid` where they have one."""

    def __init__(self, keys: object, algorithms: Collection[str]) -> None:
        """Read the keys.

        Args:
            keys: PEM text of a public or private key; a secret of 32 bytes or more for HS256 (48 for HS384, 64 for
                HS512); a public key object; a `jwt.PyJWK`; a `knell.keys.SigningKey`; a mapping of `kid` to these; or
                a KeySource, whose keys change.
            algorithms: what is accepted, for example ["EdDSA"]. Either HMAC algorithms or public-key ones, not both.

        Raises:
            InvalidSettings: says what was found and what to do. It never shows a key.
        """
        self._algorithms = _check_algorithms(algorithms)
        self.source: KeySource | None = None
        if isinstance(keys, KeySource):
            if self._algorithms[0] in SYMMETRIC:
                raise _confused(repr(keys), self._algorithms)
            keys.check()
            self.source = keys
            self._keys: _Keys | None = None
        else:
            self._keys = _fixed(keys, self._algorithms)

    @property
    def only_kid(self) -> str | None:
        """The name of the only key, where there is one that never changes; else None."""
        only = None if self._keys is None or self.source is not None else self._keys.only
        return None if only is None else only.kid

    def choose(self, header: Mapping[str, Any]) -> VerifyingKey:
        """The key for a token by its header, whose `kid` decides, and never its `alg`.

        With a single key that was given without a name, any kid will do; a header without kid gets the only key, if it
        is one.

        Raises:
            TokenInvalid: there is no such key.
            KeysUnavailable: there are no keys now, or whether there is such a key is not known yet.
        """
        kid = header.get("kid")
        found = self._now().find(kid)
        if found is None and self.source is not None and isinstance(kid, str):
            self.source.look_again()
            found = self._now().find(kid)
        if found is not None:
            return found
        if kid is None:
            raise TokenInvalid("the token's header has no kid, and this verifier has several keys")
        raise TokenInvalid("the token's kid is not one that this verifier has a key for")

    def _now(self) -> _Keys:
        if self.source is None:
            assert self._keys is not None
            return self._keys
        given, mine = self.source.keys(), self._keys
        if mine is None or mine.of is not given:
            mine = self._keys = _changing(given, self._algorithms)
        return mine


@dataclass(frozen=True, slots=True)
class _Keys:
    by_kid: Mapping[str, VerifyingKey]
    # The key of a header without kid; and whatever its kid, if that one was given without a name.
    only: VerifyingKey | None
    of: Mapping[str, Any] | None = None

    def find(self, kid: object) -> VerifyingKey | None:
        if kid is None or (self.only is not None and not self.only.named):
            return self.only
        return self.by_kid.get(kid) if isinstance(kid, str) else None


def _fixed(keys: object, algorithms: Sequence[str]) -> _Keys:
    if isinstance(keys, SigningKey):
        keys = {keys.kid: keys}
    elif isinstance(keys, jwt.PyJWK) and keys.key_id is not None:
        keys = {keys.key_id: keys}
    if not isinstance(keys, Mapping):
        return _Keys({}, _read(keys, "the key", algorithms, kid=None))
    if not keys:
        raise InvalidSettings("keys is an empty mapping; it must map each kid to its key")
    by_kid = {}
    for kid, key in keys.items():
        if not isinstance(kid, str) or not kid:
            raise InvalidSettings(f"keys has a kid {kid!r}; a kid is a string with something in it")
        by_kid[kid] = _read(key, f"key {kid!r}", algorithms, kid=kid)
    return _Keys(by_kid, _only(by_kid))


def _changing(keys: Mapping[str, Any], algorithms: Sequence[str]) -> _Keys:
    by_kid, left = {}, []
    for kid, key in keys.items():
        try:
            by_kid[kid] = _read(key, f"key {kid!r}", algorithms, kid=kid)
        except InvalidSettings:
            left.append(kid)  # others may use it, with another algorithm
    if not by_kid:
        log.warning("no_key_fits", algorithms=list(algorithms), kids=left)
    return _Keys(by_kid, _only(by_kid), of=keys)


def _only(by_kid: Mapping[str, VerifyingKey]) -> VerifyingKey | None:
    return next(iter(by_kid.values())) if len(by_kid) == 1 else None


def _read(key: object, called: str, algorithms: Sequence[str], *, kid: str | None) -> VerifyingKey:
    if isinstance(key, jwt.PyJWK):
        return _fit(key.key, called, algorithms, kid, only=key.algorithm_name)
    if isinstance(key, SigningKey):
        return _fit(key.verifying_key, called, algorithms, kid, only=key.algorithm)
    if isinstance(key, str | bytes):
        raw = key.encode() if isinstance(key, str) else key
        if algorithms[0] not in SYMMETRIC:
            return _fit(_public_key(raw, called), called, algorithms, kid)
        if raw.lstrip().startswith(b"-----BEGIN"):
            raise _confused(called, algorithms)
        return _fit(raw, called, algorithms, kid)
    return _fit(key, called, algorithms, kid)


def _fit(key: Any, called: str, algorithms: Sequence[str], kid: str | None, *, only: object = None) -> VerifyingKey:
    reasons: list[str] = []
    fitting: list[str] = []
    # A public JWK, as a key source has it, is read for each algorithm: by itself it may fit several, or none.
    only = key.get("alg") if isinstance(key, Mapping) else only
    for name in algorithms:
        if only is not None and name != only:
            continue
        try:
            read = public_key(key, name) if isinstance(key, Mapping) else _KNOWN[name].prepare_key(key)
            public = _public_half(read)
            problem = _KNOWN[name].check_key_length(public)
        except KEY_ERRORS as error:
            problem = str(error)
        if problem:
            reasons.append(f"{name}: {problem}")
        else:
            fitting.append(name)
            found = public
    if not fitting:
        why = "; ".join(reasons) or f"it is for {only}"
        raise InvalidSettings(f"{called} fits none of the algorithms {list(algorithms)} ({why})")
    return VerifyingKey(found, tuple(fitting), kid or _name(found, fitting[0]), named=kid is not None)


def _name(key: Any, algorithm: str) -> str:
    if algorithm in SYMMETRIC:
        return name_of_secret(key)
    return thumbprint(_KNOWN[algorithm].to_jwk(key, as_dict=True))


def _confused(called: str, algorithms: Sequence[str]) -> InvalidSettings:
    return InvalidSettings(
        f"{called} is of public keys, but algorithms is {list(algorithms)}: whoever has a public key could sign; name "
        "the algorithm that the key is for, such as EdDSA"
    )


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
