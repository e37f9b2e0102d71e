"""What both stores say of a place in the change feed: whether it can be read on from there."""

from __future__ import annotations

from collections.abc import Sequence

from knell.errors import CursorLost
from knell.store import Change, Cursor

# The random part of an epoch while nobody could write to the store yet.
NO_EPOCH = "none"


def changes_after(cursor: Cursor, head: Cursor, entries: Sequence[Change], *, limit: int) -> list[Change]:
    """At most `limit` of the changes that follow a cursor.

    Args:
        head: the feed's, or the last of `entries`. Its epoch, as the cursor's, is "<what names the data>.<what names
            the server or the file>".
        entries: the feed's changes from the cursor's own position on, in order, as far as it has them.

    Raises:
        CursorLost: see `Feed.changes`.
    """
    present = {one.position: one.revocation.id for one in entries[:1]} | {head.position: head.revocation_id}
    at_cursor, known = present.get(cursor.position), cursor.revocation_id
    data, its_data = head.epoch.partition(".")[0], cursor.epoch.partition(".")[0]
    emptied = data != its_data and its_data != NO_EPOCH
    # After a loss the head may have come as far again: only the change itself tells.
    replaced = known is not None and at_cursor is not None and at_cursor != known
    if head.position < cursor.position or emptied or replaced:
        raise CursorLost(_text(cursor, head, "data was lost"), went_back=True)
    if head.epoch != cursor.epoch:
        raise CursorLost(_text(cursor, head, "the server was restarted, or another took its place"), went_back=False)
    found = [one for one in entries if one.position > cursor.position][:limit]
    unproven = known is not None and at_cursor is None
    if unproven or (head.position > cursor.position and (not found or found[0].position != cursor.position + 1)):
        raise CursorLost(_text(cursor, head, "the feed was trimmed"), went_back=False)
    return found


def _text(cursor: Cursor, head: Cursor, why: str) -> str:
    return (
        f"the feed is at position {head.position} of epoch {head.epoch}, the cursor at {cursor.position} "
        f"of {cursor.epoch}: {why}; take a snapshot"
    )
