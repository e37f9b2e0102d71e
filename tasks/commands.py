"""What issuers asked for while the store was away."""

from __future__ import annotations

from knell import messages
from tasks import app
from tasks.process import broker_keeps_it, notifier


@app.task(name=messages.TRACK)
def track(jws: str) -> int:
    """Track the tokens of a signed command. Returns how many are tracked now."""
    with broker_keeps_it():
        return notifier().track(jws)


@app.task(name=messages.REVOKE)
def revoke(jws: str) -> bool:
    """Record the revocation of a signed command. Returns False if it was recorded before."""
    with broker_keeps_it():
        return notifier().revoke(jws)
