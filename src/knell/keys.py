"""Signing keys, and the trust list that says which key may speak for which issuer."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import get_default_algorithms

from knell.errors import InvalidSettings, MessageRefused
from knell.notices import Cause
from knell.settings import Settings
from knell.tokens import check_identifier, check_time

# What the `typ` of every signed message of Knell begins with. They are signed with an issuer's key too, and are no
# access tokens (RFC 8725, section 3.11).
OWN_TYPES = "knell-"
NOTICE_TYPE = "knell-notice+jwt"
COMMAND_TYPE = "knell-command+jwt"
# The notifier's own name as a signer; it is not an issuer of tokens.
NOTIFIER = "knell-notifier"
ANY_ISSUER = "*"
SYMMETRIC = frozenset({"HS256", "HS384", "HS512"})
ALGORITHMS = frozenset({"HS256", "RS256", "ES256", "EdDSA"})
_NEW: Mapping[str, Callable[[], Any]] = {
    "EdDSA": Ed25519PrivateKey.generate,
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "RS256": lambda: rsa.generate_private_key(public_exponent=65537, key_size=3072),
}
# What PyJWT and cryptography raise for a key that cannot be read, or is of another kind.
KEY_ERRORS = (ValueError, TypeError, AttributeError, UnsupportedAlgorithm, jwt.PyJWTError)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key that signs, with the algorithm that it signs with and the `kid` that names it.

    Attributes:
        algorithm: HS256, RS256, ES256 or EdDSA.
        key: what PyJWT signs with: a private key object, or the secret's bytes.
        kid: the `kid` header (RFC 7515, section 4.1.4).
    """

    algorithm: str
    key: Any
    kid: str

    def __repr__(self) -> str:
        return f"SigningKey(algorithm={self.algorithm!r}, kid={self.kid!r})"

    @property
    def symmetric(self) -> bool:
        """True for HS256: whoever can verify can also sign."""
        return self.algorithm in SYMMETRIC

    @property
    def active(self) -> SigningKey:
        """Itself: a signer whose key never changes. See `Signer`."""
        return self

    @property
    def verifying_key(self) -> Any:
        """What a signature of it is checked with: the public key, or the secret."""
        return self.key if self.symmetric else self.key.public_key()

    def sign(self, payload: Mapping[str, Any], *, typ: str) -> str:
        """A compact JWS (RFC 7515, section 7.1) over a JSON payload."""
        return jwt.encode(dict(payload), self.key, algorithm=self.algorithm, headers={"kid": self.kid, "typ": typ})

    def public_jwk(self) -> dict[str, Any]:
        """The public half as a JWK (RFC 7517). InvalidSettings for a symmetric key, which has none."""
        if self.symmetric:
            raise InvalidSettings(f"{self.algorithm} has no public key; use RS256, ES256 or EdDSA")
        jwk = _as_jwk(self.algorithm, self.verifying_key)
        return jwk | {"kid": self.kid, "alg": self.algorithm, "use": "sig"}

    def private_jwk(self) -> dict[str, Any]:
        """The whole key as a JWK. InvalidSettings for a symmetric key."""
        public = self.public_jwk()
        return _as_jwk(self.algorithm, self.key) | {name: public[name] for name in ("kid", "alg", "use")}

    @classmethod
    def from_jwk(cls, jwk: Mapping[str, Any]) -> SigningKey:
        """Read a private JWK (RFC 7517) with `kid` and `alg`: RS256, ES256 or EdDSA.

        Raises:
            InvalidSettings: it is none. The text shows nothing of it but the kid.
        """
        kid = check_identifier("kid", jwk.get("kid"))
        algorithm = jwk.get("alg")
        if algorithm not in sorted(ALGORITHMS - SYMMETRIC):
            raise InvalidSettings(f"key {kid!r} has alg {algorithm!r}; a key of a set is RS256, ES256 or EdDSA")
        if "d" not in jwk:
            raise InvalidSettings(f"key {kid!r} is a public key; here its private half is needed")
        try:
            private = get_default_algorithms()[algorithm].prepare_key(jwt.PyJWK(dict(jwk), algorithm=algorithm).key)
            _check_length(algorithm, private)
        except (KeyError, *KEY_ERRORS):
            raise InvalidSettings(f"key {kid!r} is no private JWK for {algorithm}") from None
        return cls(algorithm, private, kid)

    @classmethod
    def load(cls, key: str | bytes, *, algorithm: str, kid: str | None = None) -> SigningKey:
        """Read a PEM private key, or for HS256 a secret of at least 32 bytes (RFC 7518, section 3.2).

        Args:
            key: PEM text, or the secret.
            algorithm: HS256, RS256, ES256 or EdDSA; never guessed.
            kid: default the key's thumbprint (RFC 7638), and for HS256 a hash of the secret's hash.

        Raises:
            InvalidSettings: the key cannot be read, or does not fit the algorithm.
        """
        if algorithm not in ALGORITHMS:
            raise InvalidSettings(f"algorithm is {algorithm!r}; use one of {', '.join(sorted(ALGORITHMS))}")
        raw = key.encode() if isinstance(key, str) else key
        if algorithm in SYMMETRIC:
            if len(raw) < 32:
                raise InvalidSettings(f"the {algorithm} secret has {len(raw)} bytes; it needs 32 or more")
            if raw.lstrip().startswith(b"-----BEGIN"):
                raise InvalidSettings(f"a PEM key was given for {algorithm}; name the algorithm of that key")
            return cls(algorithm, raw, kid or name_of_secret(raw))
        try:
            private = serialization.load_pem_private_key(raw, password=None)
            prepared = get_default_algorithms()[algorithm].prepare_key(private)
            _check_length(algorithm, prepared)
            jwk = _as_jwk(algorithm, prepared.public_key())
        except KEY_ERRORS as error:
            raise InvalidSettings(f"the key is no PEM private key for {algorithm}: {error}") from None
        return cls(algorithm, prepared, kid or thumbprint(jwk))

    @classmethod
    def generate(cls, algorithm: str = "EdDSA") -> SigningKey:
        """A new key: Ed25519 for EdDSA (RFC 8037), P-256 for ES256, 3072 bits for RS256. Its kid is its thumbprint."""
        if algorithm not in _NEW:
            raise InvalidSettings(f"algorithm is {algorithm!r}; a new key is {', '.join(sorted(_NEW))}")
        while True:
            private = _NEW[algorithm]()
            kid = thumbprint(_as_jwk(algorithm, private.public_key()))
            if not kid.startswith("-"):  # a command line would take it for an option
                return cls(algorithm, private, kid)

    def pem(self) -> bytes:
        """The private key as PEM (PKCS 8)."""
        private: bytes = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return private


class Signer(Protocol):
    """What signs: a SigningKey, or a `knell.KeyFile`, whose key changes."""

    @property
    def active(self) -> SigningKey:
        """The key to sign with now."""


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A key whose signature counts, and for what.

    Attributes:
        kid, algorithm: what the message's header has to say.
        key: the public key.
        issuers: the token issuers that it may speak for; "*" is any.
        causes: what it may tell: expired, revoked, undone, missed.
        exp: when a signature of it counts no longer, Unix seconds; None while it is in use.
        revoked: nothing that it has signed counts.
    """

    kid: str
    algorithm: str
    key: Any
    issuers: frozenset[str]
    causes: frozenset[Cause]
    exp: float | None = None
    revoked: bool = False

    def may_tell(self, iss: str, cause: Cause) -> bool:
        """Whether this key may say that something of `iss` ended for that cause. `missed` is of no issuer."""
        return self._tells(cause) and (cause is Cause.MISSED or self.may_track(iss))

    def _tells(self, cause: Cause) -> bool:
        # Who may revoke may take it back: an undo that services refuse would leave them and the verifiers at odds.
        return cause in self.causes or (cause is Cause.UNDONE and Cause.REVOKED in self.causes)

    def may_track(self, iss: str) -> bool:
        """Whether this key may speak for `iss` at all."""
        return ANY_ISSUER in self.issuers or iss in self.issuers


class TrustList:
    """The keys that a service, and the notifier for commands, acts on. Asymmetric keys only."""

    def __init__(self, keys: Iterable[TrustedKey], *, clock: Callable[[], float] = time.time) -> None:
        self._keys = {key.kid: key for key in keys}
        self._clock = clock

    def __iter__(self) -> Iterator[TrustedKey]:
        """Every key that is listed, those that count no longer as well."""
        return iter(self._keys.values())

    def may_tell(self, kid: str, iss: str, cause: Cause) -> bool:
        """Whether the key with that kid may say that something of `iss` ended for that cause."""
        trusted = self._keys.get(kid)
        return trusted is not None and self._why_not(trusted) is None and trusted.may_tell(iss, cause)

    def _why_not(self, key: TrustedKey) -> str | None:
        if key.revoked:
            return "which was revoked"
        if key.exp is not None and (ago := self._clock() - key.exp) >= 0:
            return f"whose signatures count no longer since {ago:.0f} s (exp)"
        return None

    @classmethod
    def load(cls, path: Path, *, clock: Callable[[], float] = time.time) -> TrustList:
        """Read a JWK Set (RFC 7517, section 5) whose keys also have `iss` and `causes`.

        A key may have `exp` (Unix seconds) and `revoked` (true, or an object that says when and why), as in OpenID
        Federation 1.0, section 8.7. Other members are ignored.

        Raises:
            InvalidSettings: it cannot be read; the text says what is wrong with which key.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InvalidSettings(f"the trust list {path} is no text in UTF-8; it must be a JWK Set") from None
        except OSError as error:
            raise InvalidSettings(
                f"the trust list {path} cannot be read ({error.strerror}); KNELL_TRUST names it, `knell keys` makes one"
            ) from None
        return cls.parse(text, name=str(path), clock=clock)

    @classmethod
    def parse(cls, text: str, *, name: str = "the trust list", clock: Callable[[], float] = time.time) -> TrustList:
        """The same from the text itself."""
        try:
            entries = json.loads(text)["keys"]
        except (ValueError, KeyError, TypeError):
            entries = None
        if not isinstance(entries, list):
            raise InvalidSettings(f'{name} is no JWK Set; it must be {{"keys": [...]}}')
        keys = [_trusted(entry, name=name) for entry in entries]
        for kid, count in Counter(key.kid for key in keys).items():
            if count > 1:
                raise InvalidSettings(f"{name} has key {kid!r} twice; keep the one that says what it may tell")
        return cls(keys, clock=clock)

    def verify(self, jws: str, *, typ: str, audience: str) -> tuple[dict[str, Any], TrustedKey]:
        """Check a compact JWS: kid, algorithm, typ, signature and audience, in that order.

        Returns:
            Its payload, and the key that signed it.

        Raises:
            MessageRefused: it is not signed by a trusted key, or not meant for here. Nothing of it is to be believed.
        """
        try:
            header = jwt.get_unverified_header(jws)
        except jwt.InvalidTokenError as error:
            raise MessageRefused(f"not a JWS: {error}") from None
        except UnicodeEncodeError:  # JSON can write half of a character, which no text can be
            raise MessageRefused("not a JWS: it is no text in UTF-8") from None
        trusted = self._keys.get(header.get("kid", ""))
        if trusted is None:
            raise MessageRefused(f"signed by kid {str(header.get('kid'))[:64]!r}, which the trust list does not have")
        if (why := self._why_not(trusted)) is not None:
            raise MessageRefused(f"signed by kid {trusted.kid[:64]!r}, {why}")
        if header.get("alg") != trusted.algorithm or header.get("typ") != typ or "crit" in header:
            raise MessageRefused(f"the header must say alg {trusted.algorithm}, typ {typ}, and nothing critical")
        try:
            payload = jwt.decode(
                jws,
                trusted.key,
                algorithms=[trusted.algorithm],
                audience=audience,
                options={"require": ["aud", "iat"], "verify_iat": False, "verify_exp": False, "verify_nbf": False},
            )
        except jwt.PyJWTError as error:
            raise MessageRefused(f"the signature or audience is wrong: {error}") from None
        return payload, trusted


def trust_entry(key: SigningKey, *, issuers: Iterable[str], causes: Iterable[Cause]) -> dict[str, Any]:
    """One key of a trust list's JWK Set."""
    return key.public_jwk() | {"iss": sorted(issuers), "causes": sorted(cause.value for cause in causes)}


def notice_key(settings: Settings) -> SigningKey | None:
    """The key that KNELL_NOTICE_KEY signs with now; None if it names none. On the embedded default, made when missing.

    A process that goes on takes `knell.keyset.notice_keys`, which sees the key change.
    """
    from knell.keyset import notice_keys

    file = notice_keys(settings)
    return None if file is None else file.active


def trust_list(settings: Settings) -> TrustList:
    """The trust list that KNELL_TRUST names. On the embedded default, made when missing."""
    if settings.trust is None:
        raise InvalidSettings("KNELL_TRUST is not set; it names the file that says whose notices count")
    make_embedded_keys(settings)
    return TrustList.load(settings.trust)


def make_embedded_keys(settings: Settings) -> None:
    """On the embedded default, where no other files are named: one key for everything, and a trust list that has it.

    Raises:
        InvalidSettings: they cannot be written.
    """
    if not settings.embedded or not settings.own_keys:
        return
    try:
        _make_keys(settings)
    except OSError as error:
        raise InvalidSettings(f"no keys could be made in KNELL_HOME, {settings.home}: {error.strerror}") from None


def _make_keys(settings: Settings) -> None:
    from knell.keyset import SigningKeys

    assert settings.trust is not None
    assert settings.notice_key is not None
    if settings.trust.exists() and settings.notice_key.exists():
        return
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    mine = settings.notice_key.with_suffix(f".{uuid4().hex}")
    # O_EXCL: a file or link that somebody else has put there is never written into.
    with os.fdopen(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(SigningKey.generate().pem())
    try:
        os.link(mine, settings.notice_key)  # whoever links first has made the key; link never overwrites
    except FileExistsError:
        pass
    finally:
        mine.unlink()
    found = SigningKeys.parse(settings.notice_key.read_bytes(), algorithm="EdDSA", name=str(settings.notice_key))
    entries = [trust_entry(key, issuers=[ANY_ISSUER], causes=list(Cause)) for key in found.ever().values()]
    half = settings.trust.with_suffix(f".{uuid4().hex}")
    try:
        with half.open("x") as trusted:
            trusted.write(json.dumps({"keys": entries}, indent=2))
        half.replace(settings.trust)
    finally:
        half.unlink(missing_ok=True)


def thumbprint(jwk: Mapping[str, Any]) -> str:
    """The JWK thumbprint (RFC 7638) in base64url, SHA-256."""
    members = {"OKP": ("crv", "kty", "x"), "EC": ("crv", "kty", "x", "y"), "RSA": ("e", "kty", "n")}[jwk["kty"]]
    text = json.dumps({name: jwk[name] for name in members}, separators=(",", ":"), sort_keys=True)
    return _base64url(hashlib.sha256(text.encode()).digest())


def name_of_secret(secret: bytes) -> str:
    """The kid of a secret that has none: nothing of it, and not its hash either, can be told from that."""
    return _base64url(hashlib.sha256(b"knell-kid" + hashlib.sha256(secret).digest()).digest())[:16]


def _trusted(entry: Mapping[str, Any], *, name: str) -> TrustedKey:
    try:
        kid = check_identifier("kid", entry["kid"])
        algorithm = entry["alg"]
        if algorithm not in ALGORITHMS - SYMMETRIC:
            raise InvalidSettings(f"{name}: key {kid!r} has alg {algorithm!r}; a trusted key is RS256, ES256 or EdDSA")
        if "d" in entry:
            raise InvalidSettings(f"{name}: key {kid!r} is a private key; list its public half")
        return TrustedKey(
            kid=kid,
            algorithm=algorithm,
            key=public_key(entry, algorithm),
            issuers=frozenset(check_identifier("iss", iss) for iss in _list(entry["iss"])),
            causes=frozenset(Cause(cause) for cause in _list(entry["causes"])),
            exp=None if entry.get("exp") is None else check_time("exp", entry["exp"]),
            revoked=is_revoked(entry),
        )
    except InvalidSettings:
        raise
    except (KeyError, *KEY_ERRORS) as error:
        raise InvalidSettings(f"{name} has a key that cannot be used: {error!r}") from None


def public_key(jwk: Mapping[str, Any], algorithm: str) -> Any:
    """The key of a public JWK, fit for that algorithm: its type, its curve, its length. One of KEY_ERRORS otherwise."""
    # Reading it does not look at the curve: an ES256 signature would only fail, or surprise, when it is checked.
    public = get_default_algorithms()[algorithm].prepare_key(jwt.PyJWK(dict(jwk), algorithm=algorithm).key)
    _check_length(algorithm, public)
    return public


def is_revoked(jwk: Mapping[str, Any]) -> bool:
    """Whether a key is marked as revoked: by whatever is there but "no". A slip of the pen must not make it count."""
    return jwk.get("revoked") is not None and jwk["revoked"] is not False


def _check_length(algorithm: str, key: Any) -> None:
    """RFC 7518, section 3.3: 2048 bits or more for RSA. ValueError for a shorter one."""
    if problem := get_default_algorithms()[algorithm].check_key_length(key):
        raise ValueError(problem)


def _list(found: object) -> list[Any]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"{found!r} is no list with something in it")
    return found


def _as_jwk(algorithm: str, public: Any) -> dict[str, Any]:
    jwk: dict[str, Any] = get_default_algorithms()[algorithm].to_jwk(public, as_dict=True)
    return {name: value for name, value in jwk.items() if name != "key_ops"}


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
