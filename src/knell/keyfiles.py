"""Key files as the command line writes them: a private key that is never overwritten, and the trust list beside it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from cryptography.hazmat.primitives import serialization
from jwt.algorithms import get_default_algorithms

from knell.errors import InvalidInput
from knell.keys import (
    ALGORITHMS,
    KEY_ERRORS,
    SYMMETRIC,
    SigningKey,
    TrustList,
    is_revoked,
    public_key,
    thumbprint,
    trust_entry,
)
from knell.keyset import DatedKey, SigningKeys
from knell.notices import Cause

PRIVATE_MODE = 0o600
TRUST_MODE = 0o644


def new_key(
    private: Path,
    trust: Path | None,
    *,
    issuers: Collection[str],
    causes: Collection[Cause],
    algorithm: str = "EdDSA",
    if_missing: bool = False,
    now: float | None = None,
) -> tuple[SigningKey, bool]:
    """Make a key, and add its public half to a trust list.

    Args:
        private: where it goes, with mode 0600: as a JWK Set if the name ends with ".json", else as PEM. A file that is
            there is never overwritten.
        trust: the trust list; made if it is missing. None: nobody is told of the key.
        issuers: the token issuers that the key may speak for; "*" is any.
        causes: what it may tell.
        algorithm: EdDSA, ES256 or RS256.
        if_missing: a file that is there is no error: its keys are made sure to be in the trust list.
        now: Unix seconds; default this machine's clock.

    Returns:
        The key that signs now, and whether it was made now.

    Raises:
        InvalidInput: a file cannot be read or written, or the private key is there already; nothing was changed.
    """
    now = time.time() if now is None else now
    with _reported(private):
        exists = private.exists()
        if exists and not if_missing:
            raise InvalidInput(f"{private} exists, and a private key is never overwritten; choose another path")
        if exists:
            found = SigningKeys.parse(private.read_bytes(), algorithm=algorithm, name=str(private))
        else:
            found = SigningKeys([DatedKey(SigningKey.generate(algorithm), nbf=now)], name=str(private))
            made = found.keys[0].key
            as_set = private.suffix == ".json"
            _write_new(private, _private_set([private_entry(made, now)]).encode() if as_set else made.pem())
    try:
        for key in found.ever().values() if trust is not None else ():
            assert trust is not None
            trust_key(trust, trust_entry(key, issuers=issuers, causes=causes), renew=not exists)
    except InvalidInput:
        if not exists:
            private.unlink()
        raise
    return found.active(now), not exists


def trust_key(trust: Path, entry: Mapping[str, Any], *, renew: bool = True) -> None:
    """Add a key to a trust list, or replace the one with the same kid; the file is complete at every moment.

    Args:
        trust: the list's file; made if it is missing.
        entry: as `trust_entry` and `public_entry` make it.
        renew: False for a key that may have been retired or revoked, and stays so.

    Raises:
        InvalidInput: the list cannot be read or written, the key cannot be trusted, or it was revoked; nothing was
            changed.
    """

    with locked(trust):
        keys = read_trusted(trust)
        before: Mapping[str, Any] = next((each for each in keys if each["kid"] == entry["kid"]), {})
        if renew and is_revoked(before):
            raise InvalidInput(f"key {entry['kid']} was revoked: it cannot be trusted again; use a new one")
        kept = {} if renew else {name: before[name] for name in ("exp", "revoked") if name in before}
        others = [each for each in keys if each["kid"] != entry["kid"]]
        write_keys((trust, [*others, {**entry, **kept}]), None)


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


def private_entry(key: SigningKey, nbf: float) -> dict[str, Any]:
    """One key of a file of private keys; see `knell.keyset.KeyFile`."""
    return key.private_jwk() | {"nbf": round(nbf, 3)}


def read_private(private: Path, algorithm: str = "EdDSA") -> tuple[SigningKeys, list[dict[str, Any]]]:
    """The keys of a file of private keys, and its entries; of one in PEM, the entry that stands for it."""
    text = private.read_text()
    found = SigningKeys.parse(text, algorithm=algorithm, name=str(private))
    if text.lstrip().startswith("{"):
        return found, json.loads(text)["keys"]
    return found, [private_entry(each.key, each.nbf) for each in found.keys]


def read_trusted(trust: Path) -> list[dict[str, Any]]:
    """The entries of a trust list; none of one that is missing. InvalidSettings if it cannot be used."""
    return list(_trusted(trust)["keys"])


def write_keys(
    trust: tuple[Path, Sequence[Mapping[str, Any]]] | None, private: tuple[Path, Sequence[Mapping[str, Any]]] | None
) -> None:
    """Write the entries of a trust list and of a file of private keys, in this order; or neither.

    Each file is complete at every moment, and keeps its mode and its owner. Nothing is written that could not be read.

    Raises:
        OSError, InvalidSettings: nothing was changed.
    """
    texts: list[tuple[Path, str, int]] = []
    if trust is not None:
        path, entries = trust
        texts.append((path, json.dumps(_trusted(path) | {"keys": list(entries)}, indent=2) + "\n", TRUST_MODE))
        TrustList.parse(texts[-1][1], name=str(path))
    if private is not None:
        path, entries = private
        texts.append((path, _private_set(entries), PRIVATE_MODE))
        SigningKeys.parse(texts[-1][1], algorithm="EdDSA", name=str(path))
    before = [(path, path.read_text() if path.exists() else None) for path, _, _ in texts]
    written = 0
    try:
        for path, text, mode in texts:
            _replace(path, text, new_mode=mode)
            written += 1
    except OSError:
        for (path, old), (_, _, mode) in zip(before[:written], texts, strict=False):
            if old is not None:
                _replace(path, old, new_mode=mode)
        raise


@contextmanager
def locked(*paths: Path | None) -> Iterator[None]:
    """Keep others from changing these files: of two changes at the same time one would be lost.

    What the system says against one of them becomes InvalidInput.
    """
    found = [path for path in paths if path is not None]
    with _reported(found[0]), ExitStack() as stack:
        for path in found:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Always in the same order, and a folder once: whoever locks it twice waits for himself.
        for folder in sorted({path.parent.resolve() for path in found}):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _trusted(trust: Path) -> dict[str, Any]:
    text = trust.read_text() if trust.exists() else '{"keys": []}'
    TrustList.parse(text, name=str(trust))
    found: dict[str, Any] = json.loads(text)
    return found


def _private_set(entries: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps({"keys": list(entries)}, indent=2) + "\n"


def _replace(path: Path, text: str, *, new_mode: int) -> None:
    half = path.with_name(f".{path.name}.{uuid4().hex}")
    before = path.stat() if path.exists() else None
    try:
        # For the owner alone from the first moment: what is written may be a private key.
        with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_MODE), "w") as file:
            if before is not None and (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fchmod(file.fileno(), new_mode if before is None else before.st_mode & 0o777)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def _write_new(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # O_EXCL: of two that make it at the same time, one fails. The mode holds from the first moment.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_MODE), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn what the system says of a file into InvalidInput."""
    try:
        yield
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is no text") from None
    except FileExistsError:
        raise InvalidInput(f"{path} was made by somebody else at this moment; it is not overwritten") from None
    except OSError as error:
        raise InvalidInput(f"{error.filename or path} cannot be used: {error.strerror}") from None
