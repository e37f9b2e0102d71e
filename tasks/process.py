"""What one notifier process has: its Notifier, and the consumer of receipts beside its tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import structlog
from celery.exceptions import Reject
from celery.signals import setup_logging, worker_ready, worker_shutdown

from knell import logs, topology
from knell.errors import MessageRefused, Unavailable
from knell.notifier import Notifier
from knell.publisher import connect
from knell.receipts import ReceiptsConsumer
from knell.worker import before_first_message, ends_with_its_beat
from tasks import app

# A message that cannot be handled now goes back to its queue after this pause, so that a store outage is no hot loop.
PAUSE_SECONDS = 1.0

log = structlog.get_logger()


@cache
def notifier() -> Notifier:
    """This process's Notifier, made when first asked for."""
    return Notifier()


@cache
def _receipts() -> ReceiptsConsumer:
    own = notifier()
    return ReceiptsConsumer(own.settings, own.store, own.trust)


@contextmanager
def broker_keeps_it() -> Iterator[None]:
    """A store or broker that is away puts the message back on its queue; one that is refused goes to knell.dead."""
    try:
        yield
    except Unavailable as error:
        log.warning("task_put_back", error=str(error))
        time.sleep(PAUSE_SECONDS)
        raise Reject(str(error), requeue=True) from error
    except MessageRefused as error:
        log.error("message_refused", reason=str(error))
        raise Reject(str(error), requeue=False) from error


setup_logging.connect(logs.configure_worker, dispatch_uid="knell.logs")


def _prepare() -> None:
    settings = notifier().settings
    if settings.embedded:
        with connect(settings) as connection:
            topology.declare(connection, [service.name for service in notifier().store.services()], settings=settings)


before_first_message(app, _prepare)
ends_with_its_beat(app)


@worker_ready.connect
def _start(**_: Any) -> None:
    # Not before: with -B the worker forks beat as it starts, and a thread could hold a lock at that moment.
    _receipts().start()


@worker_shutdown.connect
def _stop(**_: Any) -> None:
    if _receipts.cache_info().currsize:
        _receipts().stop()
    if notifier.cache_info().currsize:
        notifier().close()
