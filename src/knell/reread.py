"""A file that changes under a process that runs: read again when it has changed, and kept when the change is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from knell.errors import InvalidSettings

log = structlog.get_logger(__name__)

T = TypeVar("T")
Stamp = tuple[int, int, int, int]


class Reread(Generic[T]):
    """What a file says, as it is now. Each use costs one look at the file's times, and no lock.

    A change that cannot be read is logged once, and what was read before it stays: a file that is broken for a moment
    must not make every signature look forged.

    Args:
        path: the file. None: it is read once.
        read: reads it; InvalidSettings if it cannot.
        name: what the log calls it, for example "trust_list".
    """

    def __init__(self, path: Path | None, read: Callable[[], T], *, name: str) -> None:
        self._path = path
        self._read = read
        self._name = name
        # Both together, so that no thread sees what was read with another one's stamp.
        self._found: tuple[Stamp | None, T] | None = None

    @property
    def current(self) -> T:
        """What the file says now. InvalidSettings if it never could be read."""
        # The stamp is taken first: a change while it is read makes the next use read it again.
        found, stamp = self._found, self._stamp()
        if found is not None and found[0] == stamp:
            return found[1]
        try:
            read = self._read()
        except InvalidSettings as error:
            if found is None:
                raise
            log.error(f"{self._name}_not_read", error=str(error), using="what was read before")
            read = found[1]
        self._found = (stamp, read)
        return read

    def _stamp(self) -> Stamp | None:
        try:
            found = self._path.stat() if self._path is not None else None
        except OSError:
            return None
        # The ctime as well: a file may come back readable with every other number as it was.
        return None if found is None else (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
