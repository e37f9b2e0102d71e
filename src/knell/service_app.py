"""The Celery app of a service's worker: one task, one queue, and what has to be right before the first message."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import structlog
from celery import Celery, signals
from celery.app.task import Task
from celery.exceptions import Reject, SoftTimeLimitExceeded

from knell import logs, topology
from knell.errors import MessageRefused, Unavailable
from knell.messages import TERMINATE
from knell.notices import Receipt
from knell.settings import Settings
from knell.store import open_store
from knell.worker import allow, before_first_message

if TYPE_CHECKING:
    from knell.service import Service

# The pause before a message is given back because the broker does not confirm: it may be redelivered at once.
GIVE_BACK_SECONDS = 1.0

log = structlog.get_logger(__name__)


def make_app(service: Service) -> Celery:
    """The app of `celery -A services.shop worker`.

    It consumes the service's queue and no other, and declares nothing, except on the embedded default: there it
    registers the service and declares the topology by itself when it starts.
    """
    settings = service.settings
    if settings.embedded:
        from knell import embedded

        embedded.register()
    queue = topology.service_queue(service.name)
    app = Celery(f"knell-service-{service.name}", set_as_current=False)
    app.config_from_object("knell.celery_defaults")
    app.conf.update(
        broker_url=settings.broker_url,
        task_queues=[topology.kombu_queue(queue, rules=settings.rules)],
        # Without it Celery would make a queue named "celery".
        task_default_queue=queue,
    )
    if settings.embedded:
        # One process: enough to try Knell, and nothing of SQLite is carried through a fork.
        app.conf.worker_pool = "solo"
    allow(app, {queue: [TERMINATE]})
    before_first_message(app, lambda: _prepare(service, app))
    signals.setup_logging.connect(logs.configure_worker, dispatch_uid="knell.logs")

    @app.task(name=TERMINATE, bind=True, shared=False)
    def terminate(
        self: Task[Any, Any], jws: str, todo: Sequence[int] | None = None, attempt: int = 0, replay: bool = False
    ) -> str:
        """Handle one message of notices. Returns what became of its entries, in a few words."""
        try:
            receipt = service.handle(jws, todo, attempt, replay, root_id=self.request.root_id or self.request.id)
        except MessageRefused as error:
            log.warning("notice_refused", service=service.name, reason=str(error))
            raise Reject(str(error), requeue=False) from None
        except (Unavailable, SoftTimeLimitExceeded) as error:
            log.warning("notice_given_back", service=service.name, reason=str(error))
            time.sleep(GIVE_BACK_SECONDS)
            raise Reject(str(error), requeue=True) from None
        return summary(receipt)

    return app


def summary(receipt: Receipt | None) -> str:
    """A receipt in a few words, for Flower: "3 done, 1 retrying"."""
    if receipt is None:
        return "put back"
    counts = (("done", receipt.done), ("parked", receipt.parked), ("retrying", receipt.retrying))
    return ", ".join(f"{len(numbers)} {name}" for name, numbers in counts if numbers)


def _prepare(service: Service, app: Celery) -> None:
    _ = service.resources.trust  # without one, every message would fail
    if service.settings.embedded:
        register_embedded(service.name, service.settings, app)


def register_embedded(name: str, settings: Settings, app: Celery) -> None:
    """On the embedded default: register the service and declare the topology."""
    store = open_store(
        settings.store_url, namespace=settings.namespace, rules=settings.rules, partitions=settings.partitions
    )
    try:
        store.add_service(name)
        services = [each.name for each in store.services()]
    finally:
        store.close()
    with app.connection_for_write() as connection:
        topology.declare(connection, services, settings=settings)
