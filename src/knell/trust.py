"""Whose signature counts, for a process that runs while that changes."""

from __future__ import annotations

from typing import Any, Protocol

from knell.keys import TrustedKey, TrustList, trust_list
from knell.notices import Cause
from knell.reread import Reread
from knell.settings import Settings


class Trust(Protocol):
    """What checks signed messages: a TrustList, or the file that one is in."""

    def verify(self, jws: str, *, typ: str, audience: str) -> tuple[dict[str, Any], TrustedKey]:
        """See TrustList.verify."""

    def may_tell(self, kid: str, iss: str, cause: Cause) -> bool:
        """See TrustList.may_tell."""


class TrustFile:
    """The trust list that KNELL_TRUST names, read again whenever its file has changed. Thread-safe, fork-safe.

    A change that cannot be read is logged, and the list that was read before it stays.

    Raises:
        InvalidSettings: at the first use, if it cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self._file = Reread(settings.trust, lambda: trust_list(settings), name="trust_list")

    @property
    def current(self) -> TrustList:
        """The list as it is now."""
        return self._file.current

    def verify(self, jws: str, *, typ: str, audience: str) -> tuple[dict[str, Any], TrustedKey]:
        """See TrustList.verify."""
        return self.current.verify(jws, typ=typ, audience=audience)

    def may_tell(self, kid: str, iss: str, cause: Cause) -> bool:
        """See TrustList.may_tell."""
        return self.current.may_tell(kid, iss, cause)
