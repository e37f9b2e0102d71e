"""Celery settings that every Knell worker shares. The root celeryconfig.py imports them all.

Celery's own defaults undo at-least-once delivery: read the reasons before changing one.
"""

from __future__ import annotations

from typing import Any

# JSON and nothing else: unpickling runs whatever the sender wrote.
task_serializer = "json"
result_serializer = "json"
event_serializer = "json"
accept_content = ["json"]

# Acknowledge when the work is done, not when it is received.
task_acks_late = True
# A killed child process gives its message back.
task_reject_on_worker_lost = True
# An unforeseen exception sends the message to knell.dead; by default it is acknowledged and gone.
task_acks_on_failure = False
# A hard time limit gives the message back; by default it is acknowledged and gone.
task_acks_on_timeout = False
# The broker redelivers what a lost connection held; the run that goes on beside the new one has to stop.
worker_cancel_long_running_tasks_on_connection_loss = True
# All services share one task id: a shared result backend would let one service's success hide another's task.
task_ignore_result = True
result_backend = None
# Nor the error of a task that ignores its result.
task_store_errors_even_if_ignored = False

# How long the handlers of one message may run. What was running then counts as failed, the rest comes again.
task_soft_time_limit: float | None = 400.0
# For a handler that does not let itself be interrupted: its process is ended, and the message given back.
task_time_limit: float | None = 440.0
# Four messages for each process. RabbitMQ counts its consumer_timeout (30 minutes) from the delivery, and makes the
# worker exit: the last of them has waited for three time limits when its own begins, and all four end before that.
worker_prefetch_multiplier = 4

# Its exclusive control queue makes a worker exit when it reconnects past a half-open connection.
worker_enable_remote_control = False
# Flower's rows are made of these.
worker_send_task_events = True
# The sender knows one id for all services: its event would leave a row that never ends.
task_send_sent_event = False

# Finds a frozen broker in 20 s; by default it takes minutes.
broker_heartbeat = 10
# For each server of the URL; a frozen one takes the connection and says nothing.
broker_connection_timeout = 4.0
# A broker that is away, at the start too, is waited for.
broker_connection_retry = True
broker_connection_retry_on_startup = True
# None: try for ever. A worker that gives up needs somebody to start it again.
broker_connection_max_retries = None
# Without confirms a publish to a dying broker is lost without an error; without time-outs it may block for ever.
# The time-outs are longer than two heartbeats, so that a quiet connection is not taken for a dead one.
broker_transport_options: dict[str, Any] = {"confirm_publish": True, "read_timeout": 25, "write_timeout": 25}

# No task has a rate limit; without this the worker keeps books about them.
worker_disable_rate_limits = True
# Quorum queues know no global prefetch.
worker_detect_quorum_queues = True
# Queues are declared by the topology, beforehand; a mistyped name has to be an error.
task_create_missing_queues = False
# Looks at each message before Celery does: one malformed body kills Celery's own consumer.
worker_consumer = "knell.worker:Consumer"

# Touches the file that KNELL_HEALTH_FILE names, for health checks: with remote control off there is no ping.
imports = ["knell.health"]

# An eta means the same wherever a worker runs.
timezone = "UTC"
enable_utc = True

# structlog writes the log (see knell.logs).
worker_hijack_root_logger = False
# A print of a handler stays a print.
worker_redirect_stdouts = False
