"""What the workers' settings have to keep between them."""

from __future__ import annotations

from knell import celery_defaults

# RabbitMQ's default (consumer_timeout), counted from the delivery of a message.
CONSUMER_TIMEOUT_SECONDS = 30 * 60


def test_every_prefetched_message_is_answered_before_the_brokers_time_out() -> None:
    """The last one prefetched waits for all before it, each of which may take as long as the hard limit."""
    assert celery_defaults.task_time_limit is not None
    assert celery_defaults.task_soft_time_limit is not None
    assert celery_defaults.worker_prefetch_multiplier * celery_defaults.task_time_limit < CONSUMER_TIMEOUT_SECONDS
    assert celery_defaults.task_soft_time_limit < celery_defaults.task_time_limit
