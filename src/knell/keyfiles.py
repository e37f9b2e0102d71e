"""Key files as the command line writes them: a private key that is never overwritten, and the trust list beside it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from cryptography.hazmat.primitives import serialization
from jwt.algorithms import get_default_algorithms

from knell.errors import InvalidInput
from knell.keys import ALGORITHMS, KEY_ERRORS, SYMMETRIC, SigningKey, TrustList, public_key, thumbprint, trust_entry
from knell.notices import Cause

PRIVATE_MODE = 0o600
TRUST_MODE = 0o644


def new_key(
    private: Path, trust: Path, *, issuers: Collection[str], causes: Collection[Cause], if_missing: bool = False
) -> tuple[SigningKey, bool]:
    """Make an EdDSA key, and add its public half to a trust list.

    Args:
        private: where the PEM goes, with mode 0600. A file that is there is never overwritten.
        trust: the trust list; made if it is missing.
        issuers: the token issuers that the key may speak for; "*" is any.
        causes: what it may tell.
        if_missing: a private key that is there is no error: it is taken, and made sure to be in the trust list.

    Returns:
        The key, and whether it was made now.

    Raises:
        InvalidInput: a file cannot be read or written, or the private key is there already; nothing was changed.
    """
    with _reported(private):
        exists = private.exists()
        if exists and not if_missing:
            raise InvalidInput(f"{private} exists, and a private key is never overwritten; choose another path")
        key = SigningKey.load(private.read_bytes(), algorithm="EdDSA") if exists else SigningKey.generate()
        if not exists:
            _write_new(private, key.pem())
    try:
        trust_key(trust, trust_entry(key, issuers=issuers, causes=causes))
    except InvalidInput:
        if not exists:
            private.unlink()
        raise
    return key, not exists


def trust_key(trust: Path, entry: Mapping[str, Any]) -> None:
    """Add a key to a trust list, or replace the one with the same kid; the file is complete at every moment.

    Raises:
        InvalidInput: the list cannot be read or written, or the key cannot be trusted; nothing was changed.
    """

    def add(keys: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [*(each for each in keys if each.get("kid") != entry["kid"]), entry]

    _change(trust, add)


def public_entry(
    text: str, *, algorithm: str | None, kid: str | None, issuers: Collection[str], causes: Collection[Cause]
) -> dict[str, Any]:
    """A trust list's entry for somebody else's public key.

    Args:
        text: the public key in PEM, or as a JWK (RFC 7517).
        algorithm: RS256, ES256 or EdDSA. Default the JWK's `alg`; a PEM does not say it.
        kid: default the JWK's `kid`, else the thumbprint (RFC 7638).

    Raises:
        InvalidInput: it is no such key.
    """
    named = _jwk(text) if text.lstrip().startswith("{") else {}
    algorithm = algorithm or named.get("alg")
    if algorithm is None:
        raise InvalidInput("the key does not say which algorithm it signs with; pass --algorithm EdDSA, ES256 or RS256")
    if algorithm not in ALGORITHMS - SYMMETRIC:
        raise InvalidInput(f"algorithm is {algorithm!r}; a trusted key is EdDSA, ES256 or RS256")
    try:
        if not named:
            public = serialization.load_pem_public_key(text.encode())
            named = get_default_algorithms()[algorithm].to_jwk(public, as_dict=True)
        bare = {name: value for name, value in named.items() if name not in ("key_ops", "kid", "alg", "use")}
        public_key(bare, algorithm)
        kid = kid or named.get("kid") or thumbprint(bare)
    except (KeyError, *KEY_ERRORS) as error:
        raise InvalidInput(f"not a public key for {algorithm}, in PEM or as a JWK: {error}") from None
    return bare | {
        "kid": kid,
        "alg": algorithm,
        "use": "sig",
        "iss": sorted(issuers),
        "causes": sorted(cause.value for cause in causes),
    }


def _jwk(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"the key looks like a JWK, and is no JSON: {error}") from None
    return found


def _change(trust: Path, change: Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]]) -> None:
    with _reported(trust):
        trust.parent.mkdir(parents=True, exist_ok=True)
        with _locked(trust.parent):
            text = trust.read_text() if trust.exists() else '{"keys": []}'
            TrustList.parse(text, name=str(trust))
            document = json.loads(text)
            document["keys"] = list(change(document["keys"]))
            changed = json.dumps(document, indent=2) + "\n"
            TrustList.parse(changed, name=str(trust))
            _replace(trust, changed)


def _write_new(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # O_EXCL: of two that make it at the same time, one fails. The mode holds from the first moment.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_MODE), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    half = path.with_name(f".{path.name}.{uuid4().hex}")
    mode = path.stat().st_mode & 0o777 if path.exists() else TRUST_MODE
    try:
        with half.open("x") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # Two changes at the same time would lose one of them.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is no text") from None
    except FileExistsError:
        raise InvalidInput(f"{path} was made by somebody else at this moment; it is not overwritten") from None
    except OSError as error:
        raise InvalidInput(f"{error.filename or path} cannot be used: {error.strerror}") from None
