"""The notifier: `celery -A tasks worker`."""

from __future__ import annotations

from celery import Celery

from knell import messages, topology
from knell.worker import allow, for_flower

app = Celery("knell")
app.config_from_object("celeryconfig")
# A task runs only from its own queue, whatever a message's header says.
allow(
    app,
    {
        topology.EXPIRY: [messages.EXPIRE],
        topology.COMMANDS: [messages.TRACK, messages.REVOKE],
        topology.SWEEP: [messages.SWEEP],
    },
)

for_flower(app)

from tasks import commands, expire, process, sweep  # noqa: E402 - they register themselves on the app

__all__ = ["app", "commands", "expire", "process", "sweep"]
