"""The pull-based backstop of every push, started by Celery beat."""

from __future__ import annotations

from knell import messages
from tasks import app
from tasks.process import broker_keeps_it, notifier


@app.task(name=messages.SWEEP)
def sweep() -> str:
    """Arm what falls due soon, tell what is overdue, send again what is open, prune. Returns what it did."""
    with broker_keeps_it():
        swept = notifier().sweep()
    return f"{swept.told} told, {swept.armed} armed, {swept.resent} sent again"
