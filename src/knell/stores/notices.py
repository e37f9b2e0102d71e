"""What both stores do with open records of the notice log."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from knell.store import OpenNotice

log = structlog.get_logger()


def read_notices(attempts: Mapping[str, int], read: Callable[[str], OpenNotice]) -> list[OpenNotice]:
    """Read records that were handed out; one that cannot be read is left out, and keeps no other from being sent.

    Args:
        attempts: how often each was handed out, by its batch id. The first time, one that cannot be read is logged.
        read: reads the record of a batch id.
    """
    found = []
    for batch_id, attempt in attempts.items():
        try:
            found.append(read(batch_id))
        except Exception as error:
            if attempt == 1:
                log.error("notice_unreadable", batch_id=batch_id, error=repr(error))
    return found
