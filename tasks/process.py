"""What one notifier process has: its Notifier, and the consumer of receipts beside its tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import structlog
from celery.exceptions import Reject
from celery.signals import setup_logging, worker_init, worker_ready, worker_shutdown

from knell import logs, topology
from knell.errors import MessageRefused, Unavailable
from knell.keys import trust_list
from knell.notifier import Notifier
from knell.publisher import connect
from knell.receipts import ReceiptsConsumer

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
    return ReceiptsConsumer(own.settings, own.store, trust_list(own.settings))


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


@worker_init.connect
def _prepare(**_: Any) -> None:
    settings = notifier().settings
    if settings.embedded:
        with connect(settings) as connection:
            topology.declare(connection, [service.name for service in notifier().store.services()], settings=settings)


@worker_ready.connect
def _start(**_: Any) -> None:
    _receipts().start()


@worker_shutdown.connect
def _stop(**_: Any) -> None:
    if _receipts.cache_info().currsize:
        _receipts().stop()
    if notifier.cache_info().currsize:
        notifier().close()
