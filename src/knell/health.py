"""A sign of life: a file that is touched while a worker, or beat, is connected to the broker.

Celery imports this module in every Knell worker (`imports` in knell.celery_defaults). With KNELL_HEALTH_FILE set, a
worker touches that file with each of its heartbeats, every 2 s: they stop while there is no connection, and when its
loop is stuck. beat touches it when the broker has confirmed what it sent. A health check looks at the file's age:

    find /run/knell/alive -mmin -0.5 | grep -q .
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celery.signals import after_task_publish, beat_init, heartbeat_sent

from knell.settings import Settings


def report(path: Path) -> None:
    """Touch `path` from now on, for as long as this process is a connected worker, or beat."""

    def touch(**_: Any) -> None:
        path.touch()

    def is_beat(**_: Any) -> None:
        after_task_publish.connect(touch, weak=False, dispatch_uid="knell.health")

    heartbeat_sent.connect(touch, weak=False, dispatch_uid="knell.health")
    beat_init.connect(is_beat, weak=False, dispatch_uid="knell.health")


_file = Settings.from_environ().health_file
if _file is not None:
    report(_file)
