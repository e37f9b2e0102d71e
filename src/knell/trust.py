"""Whose signature counts, for a process that runs while that changes."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import structlog

from knell.errors import InvalidSettings
from knell.keys import TrustedKey, TrustList, trust_list
from knell.notices import Cause
from knell.settings import Settings

log = structlog.get_logger(__name__)


class Trust(Protocol):
    """What checks signed messages: a TrustList, or the file that one is in."""

    def verify(self, jws: str, *, typ: str, audience: str) -> tuple[dict[str, Any], TrustedKey]:
        """See TrustList.verify."""

    def may_tell(self, kid: str, iss: str, cause: Cause) -> bool:
        """See TrustList.may_tell."""


class TrustFile:
    """The trust list that KNELL_TRUST names, read again whenever its file has changed. Thread-safe.

    A change that cannot be read is logged, and the list that was read before it stays: a file that is broken for a
    moment must not make every message look forged.

    Raises:
        InvalidSettings: at the first use, if it cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._list: TrustList | None = None
        self._stamp: tuple[int, int] | None = None

    @property
    def current(self) -> TrustList:
        """The list as it is now."""
        with self._lock:
            stamp = self._read_stamp()
            if self._list is None or stamp != self._stamp:
                try:
                    self._list = trust_list(self._settings)
                except InvalidSettings as error:
                    if self._list is None:
                        raise
                    log.error("trust_list_not_read", error=str(error), using="the one read before")
                self._stamp = stamp
            return self._list

    def verify(self, jws: str, *, typ: str, audience: str) -> tuple[dict[str, Any], TrustedKey]:
        """See TrustList.verify."""
        return self.current.verify(jws, typ=typ, audience=audience)

    def may_tell(self, kid: str, iss: str, cause: Cause) -> bool:
        """See TrustList.may_tell."""
        return self.current.may_tell(kid, iss, cause)

    def _read_stamp(self) -> tuple[int, int] | None:
        path = self._settings.trust
        try:
            found = path.stat() if path is not None else None
        except FileNotFoundError:
            return None
        return None if found is None else (found.st_ino, found.st_mtime_ns)
