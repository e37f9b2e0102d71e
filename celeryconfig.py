"""The notifier's Celery settings; what every Knell worker shares is in knell.celery_defaults, each with its why."""

from __future__ import annotations

from typing import Any

from knell import embedded, topology
from knell.celery_defaults import *  # noqa: F403
from knell.settings import Settings

_settings = Settings.from_environ()
if _settings.embedded:
    embedded.register()

# Where the tasks come from; `knell+sqlite` is the embedded broker.
broker_url = _settings.broker_url

# Each kind of work has a queue of its own: a long sweep never delays a timer.
task_queues = [topology.kombu_queue(name) for name in (topology.EXPIRY, topology.COMMANDS, topology.SWEEP)]
# Celery falls back to a default queue when told none; let it be one that exists.
task_default_queue = topology.EXPIRY
# A delayed send that names no queue would be re-keyed to the default one.
task_routes = {
    "knell.expire": {"queue": topology.EXPIRY},
    "knell.track": {"queue": topology.COMMANDS},
    "knell.revoke": {"queue": topology.COMMANDS},
    "knell.sweep": {"queue": topology.SWEEP},
}

# Threads share one denylist and one publisher; the work waits for the store and the broker, not for a core.
worker_pool = "threads"
# Enough to overlap those waits on two cores.
worker_concurrency = 4
# A timer comes off the delay ladder up to 1 s early and waits in the worker: room for 32 of them each thread.
worker_prefetch_multiplier = 32

# A thread cannot be interrupted; every call of a task has the time-outs of the store and the broker.
task_time_limit = None
task_soft_time_limit = None

# The pull-based backstop. Its message expires within the interval, so that a stopped notifier finds one, not hundreds.
# To a queue alone Celery would send it through the default exchange, and who may write there may write to every queue.
beat_schedule: dict[str, Any] = {
    "knell.sweep": {
        "task": "knell.sweep",
        "schedule": _settings.sweep_interval_seconds,
        "options": {
            "queue": topology.SWEEP,
            "exchange": topology.SWEEP,
            "routing_key": topology.SWEEP,
            "expires": _settings.sweep_interval_seconds,
        },
    }
}
# One entry on a fixed interval: there is nothing to remember between starts, so no schedule file.
beat_scheduler = "celery.beat:Scheduler"
