"""Passwords of accounts: a folder with a file for each, and what RabbitMQ keeps of one."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from knell.errors import InvalidInput

# 256 random bits: nobody guesses one, however fast the broker's hash is.
PASSWORD_BYTES = 32
MOST_BYTES = 1024
SALT_BYTES = 4
HASHING = "rabbit_password_hashing_sha256"
_HASHES = {HASHING: hashlib.sha256, "rabbit_password_hashing_sha512": hashlib.sha512}


class Passwords:
    """A folder in which each account's password is the content of the file of its name, for its owner alone.

    Args:
        folder: made when it is missing, with mode 0700.

    Every method raises InvalidInput for a file that cannot be used: one that others may read, for example.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file_of(self, account: str) -> Path:
        """Where an account's password is."""
        return self._folder / account

    def find(self, account: str) -> str | None:
        """The password that was given or made for an account; None if there is no file."""
        return _read(self.file_of(account))

    def make(self, account: str) -> str:
        """A new password, written before anybody uses it."""
        return self._write(self.file_of(account))

    def begin(self, account: str) -> str:
        """A new password beside the old one, for the time until the broker has it; again after a crash, the same."""
        return _read(self._next(account)) or self._write(self._next(account))

    def begun(self, account: str) -> str | None:
        """What `begin` has made and `finish` not taken; None if nothing."""
        return _read(self._next(account))

    def finish(self, account: str) -> None:
        """Put the new password in the place of the old one."""
        self._next(account).replace(self.file_of(account))

    def _next(self, account: str) -> Path:
        return self._folder / f"{account}.new"

    def _write(self, path: Path) -> str:
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # O_EXCL: never through a link, and of two that make it at the same time one fails.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(f"{password}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InvalidInput(f"{path} cannot be written: {error.strerror}") from None
        return password


def _read(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IRWXO:
                raise InvalidInput(f"everybody on this host can use {path}, which holds a password: chmod o= {path}")
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    try:
        password = text.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} holds no text, so no password") from None
    if not password or len(text) > MOST_BYTES or not password.isprintable():
        raise InvalidInput(f"{path} holds no password: one line of at most {MOST_BYTES} bytes is one")
    return password


def hashed(password: str) -> str:
    """A password as RabbitMQ keeps it: the broker is sent this, so that no log and no proxy sees the password."""
    salt = secrets.token_bytes(SALT_BYTES)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def is_password(password: str, kept: str, algorithm: str) -> bool | None:
    """Whether a password is the one that RabbitMQ keeps the hash of; None if that cannot be told."""
    digest = _HASHES.get(algorithm)
    if digest is None:
        return None
    try:
        known = base64.b64decode(kept, validate=True)
    except (binascii.Error, ValueError):
        return None
    salt = known[:SALT_BYTES]
    return hmac.compare_digest(known, salt + digest(salt + password.encode()).digest())
