"""The private keys of one signer, in a file that is read again when it changes: how keys rotate while processes run."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knell.errors import InvalidInput, InvalidSettings
from knell.keys import SigningKey, is_revoked, make_embedded_keys
from knell.keysource import KeySource
from knell.reread import Reread
from knell.settings import Settings
from knell.tokens import check_time


@dataclass(frozen=True, slots=True)
class DatedKey:
    """A private key, and its time. The members of its JWK are those of OpenID Federation 1.0, section 8.7.

    Attributes:
        key: the key.
        nbf: from when on it signs, Unix seconds. Its public half is published before that.
        exp: from when on nothing that it signed counts any more, and it is not published; None while that is not known.
        revoked: it signs nothing, and is not published.
    """

    key: SigningKey
    nbf: float = 0.0
    exp: float | None = None
    revoked: bool = False

    def lives(self, now: float) -> bool:
        """Whether what it has signed counts."""
        return not self.revoked and (self.exp is None or now < self.exp)


class SigningKeys:
    """All keys of a signer, as one reading of its file has found them."""

    def __init__(self, keys: Iterable[DatedKey], *, name: str) -> None:
        self._name = name
        self.keys: Sequence[DatedKey] = sorted(keys, key=lambda each: each.nbf)

    @classmethod
    def parse(cls, text: str | bytes, *, algorithm: str, name: str, kid: str | None = None) -> SigningKeys:
        """Read a JWK Set of private keys, or one private key in PEM.

        Args:
            algorithm, kid: of a PEM, which does not say them. In a set each key has its own.
            name: what an error calls it.

        Raises:
            InvalidSettings: it is neither. The text shows no key.
        """
        if text.lstrip()[:1] not in ("{", b"{"):
            return cls([DatedKey(SigningKey.load(text, algorithm=algorithm, kid=kid))], name=name)
        try:
            found = [_dated(jwk) for jwk in json.loads(text)["keys"]]
        except InvalidSettings as error:
            raise InvalidSettings(f"{name}: {error}") from None
        except InvalidInput as error:
            raise InvalidSettings(f"{name} has a key that cannot be used: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InvalidSettings(f'{name} is no JWK Set of private keys; it must be {{"keys": [...]}}') from None
        for kid, count in Counter(each.key.kid for each in found).items():
            if count > 1:
                raise InvalidSettings(f"{name} has key {kid!r} twice")
        return cls(found, name=name)

    def active(self, now: float) -> SigningKey:
        """The key to sign with: of those whose time has come, the newest. InvalidSettings if there is none."""
        living = [each for each in self.keys if each.lives(now)]
        if not living:
            raise InvalidSettings(f"no key of {self._name} may sign: each is revoked or past its exp; add one to it")
        begun = [each for each in living if each.nbf <= now]
        # Before the time of them all, by a clock that is behind, the first of them is as good.
        return (begun[-1] if begun else living[0]).key

    def published(self, now: float) -> dict[str, SigningKey]:
        """By kid, the keys whose signatures count."""
        return {each.key.kid: each.key for each in self.keys if each.lives(now)}

    def ever(self) -> dict[str, SigningKey]:
        """By kid, all keys that were not revoked, those past their time as well."""
        return {each.key.kid: each.key for each in self.keys if not each.revoked}


class KeyFile(KeySource):
    """A file of private keys, read again whenever it has changed. Thread-safe, fork-safe.

    The file is a JWK Set (RFC 7517, section 5) of private keys that also have `nbf` and `exp`, as `knell keys rotate`
    writes it; or one private key in PEM. Every process that has the file signs with the same key: of those whose nbf
    has come, the newest. A change that cannot be read is logged, and the keys that were read before it stay.

    An Issuer signs with it (`key=`), a Verifier checks with it (`keys=`), and `jwks` is what to serve to others.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        algorithm: str = "EdDSA",
        kid: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Name the file; it is read when it is first used.

        Args:
            path: the file.
            algorithm, kid: of a file in PEM: EdDSA, ES256 or RS256, and the key's name (default its thumbprint).
            clock: Unix time, in seconds.
        """
        self.path = Path(path)
        self._algorithm = algorithm
        self._kid = kid
        self._clock = clock
        self._file = Reread(self.path, self._read, name="key_file")
        self._published: Mapping[str, SigningKey] = {}
        self.history: KeySource = _History(self)
        """The same keys and those past their exp, for `Issuer.refresh`: it may follow a token that ended long ago."""

    @property
    def active(self) -> SigningKey:
        """The key to sign with now. InvalidSettings if the file never could be read, or none of its keys may sign."""
        return self.current.active(self._clock())

    @property
    def current(self) -> SigningKeys:
        """What the file says now. InvalidSettings if it never could be read."""
        return self._file.current

    def jwks(self) -> dict[str, Any]:
        """The public JWK Set to serve: the key that signs, those that will, and those whose tokens may still live."""
        return {"keys": [key.public_jwk() for key in self.keys().values()]}

    def keys(self) -> Mapping[str, SigningKey]:
        """See KeySource.keys."""
        found = self.current.published(self._clock())
        if found != self._published:
            self._published = found
        return self._published

    def check(self) -> None:
        """See KeySource.check."""
        _ = self.active

    def _read(self) -> SigningKeys:
        try:
            text = self.path.read_bytes()
        except OSError as error:
            raise InvalidSettings(f"the key file {self.path} cannot be read: {error.strerror}") from None
        return SigningKeys.parse(text, algorithm=self._algorithm, name=str(self.path), kid=self._kid)

    def __repr__(self) -> str:
        return f"KeyFile({str(self.path)!r})"


class _History(KeySource):
    def __init__(self, file: KeyFile) -> None:
        self._file = file
        self._keys: Mapping[str, SigningKey] = {}

    def keys(self) -> Mapping[str, SigningKey]:
        found = self._file.current.ever()
        if found != self._keys:
            self._keys = found
        return self._keys


def notice_keys(settings: Settings) -> KeyFile | None:
    """The file that KNELL_NOTICE_KEY names; None if it names none. On the embedded default, made when missing.

    Raises:
        InvalidSettings: it cannot be read; the text names the variable.
    """
    if settings.notice_key is None:
        return None
    make_embedded_keys(settings)
    file = KeyFile(settings.notice_key)
    try:
        _ = file.active  # what is wrong with it is to be said now, and not with the first notice
    except InvalidSettings as error:
        raise InvalidSettings(f"KNELL_NOTICE_KEY: {error}") from None
    return file


def _dated(jwk: Mapping[str, Any]) -> DatedKey:
    return DatedKey(
        SigningKey.from_jwk(jwk),
        nbf=check_time("nbf", jwk.get("nbf") or 0),
        exp=None if jwk.get("exp") is None else check_time("exp", jwk["exp"]),
        revoked=is_revoked(jwk),
    )
