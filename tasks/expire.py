"""The timer of an expiry second."""

from __future__ import annotations

from knell import messages
from tasks import app
from tasks.process import broker_keeps_it, notifier


@app.task(name=messages.EXPIRE)
def expire(second: int) -> int:
    """Tell every service whose tokens expired at `second` (Unix seconds). Returns how many ends were told."""
    with broker_keeps_it():
        return notifier().expire(second)
