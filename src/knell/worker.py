"""The consumer and the request of every Knell worker: Celery's own, behind a gate.

The gate is `knell.wire.refusal`. What it refuses goes to knell.dead without any part of Celery having acted on it,
and the worker goes on with the next message.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar
from uuid import NAMESPACE_OID, UUID, uuid5

import structlog
from amqp.exceptions import AccessRefused, NotAllowed, NotFound
from celery import Celery, bootsteps
from celery.app.control import Control
from celery.events.event import event_exchange
from celery.exceptions import InvalidTaskError, WorkerShutdown
from celery.utils.log import get_logger
from celery.worker import consumer, request, state
from celery.worker.consumer import events, heart, tasks
from kombu.message import Message

from knell import topology
from knell.connection import leave_compressed
from knell.errors import InvalidSettings, Unavailable
from knell.redaction import without_tokens
from knell.wire import refusal

# Where `allow` keeps its mapping in an app's configuration.
ALLOWED = "knell_allowed_tasks"
MAX_SHOWN = 200
MISSING_QUEUE_SECONDS = 2.0
# How often a worker that was started with -B looks whether its beat is alive.
BEAT_SECONDS = 1.0
# Its types say that nobody sets it.
worker_state: Any = state
_UNPRINTABLE = re.compile(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]+")
# kombu's message methods log to a standard library logger.
_kombu_log = get_logger(__name__)
log = structlog.get_logger(__name__)


def allow(app: Celery, queues: Mapping[str, Collection[str]]) -> None:
    """Say which tasks may come through which queue of an app, and put the gate in front of it.

    Args:
        queues: queue name to task names. What comes through another queue, or names another task, is refused.
    """
    app.conf.update({ALLOWED: {queue: frozenset(names) for queue, names in queues.items()}})
    app.conf.worker_consumer = "knell.worker:Consumer"
    app.Task.Request = "knell.worker:Request"


def before_first_message(app: Celery, prepare: Callable[[], None]) -> None:
    """Have a worker of this app call `prepare` as it starts; it exits if that finds what every task would fail on.

    A receiver of Celery's signals cannot do that: its errors are logged, and the worker goes on.

    Args:
        prepare: raises InvalidSettings or Unavailable for what has to be put right before the worker can work.
    """

    class Prepare(bootsteps.StartStopStep):
        """Runs before the worker consumes."""

        name = "knell.prepare"

        def start(self, worker: Any) -> None:
            try:
                prepare()
            except (InvalidSettings, Unavailable) as error:
                log.critical("worker_cannot_start", error=str(error))
                raise WorkerShutdown(1) from None

    app.steps["worker"].add(Prepare)


def ends_with_its_beat(app: Celery) -> None:
    """Have a worker of this app that was started with -B end when its beat has ended, with exit status 1.

    Celery's goes on without it: nothing is swept from then on, and nobody is told. Whoever looks after the process
    starts both anew.
    """

    class WatchBeat(bootsteps.StartStopStep):
        """Looks at the child that beat runs in."""

        name = "knell.watch_beat"
        requires = ("celery.worker.components:Beat",)

        def start(self, worker: Any) -> None:
            self._ending = threading.Event()
            if worker.beat is not None:
                threading.Thread(target=self._watch, args=(worker.beat,), name="knell-watch-beat", daemon=True).start()

        def stop(self, worker: Any) -> None:
            self._ending.set()

        def _watch(self, beat: Any) -> None:
            while beat.is_alive():
                if self._ending.wait(BEAT_SECONDS):
                    return
            # A signal to both, as a supervisor sends it, ends beat first: that is no failure.
            if not self._ending.wait(BEAT_SECONDS) and state.should_stop is None and state.should_terminate is None:
                log.critical("beat_has_ended", todo="see the log above it; the worker ends, to be started again")
                worker_state.should_stop = 1  # the consumer looks at it with every turn of its loop

    app.steps["worker"].add(WatchBeat)


def for_flower(app: Celery) -> None:
    """Let Flower show an app's events on an account that may do nothing but read them. For the process's only app.

    It would wake and inspect workers, which do not listen, and for that declare what its account may not; and it would
    declare the exchange of events, which the topology has. Refused either, it shows nothing at all.
    """
    app.control_cls = "knell.worker:NoRemoteControl"
    event_exchange.no_declare = True


def _allowed(app: Celery) -> Mapping[str, Collection[str]]:
    found: Mapping[str, Collection[str]] = app.conf[ALLOWED]
    return found


class NoRemoteControl(Control):
    """Celery's remote control with nobody at the other end; see `for_flower`."""

    def broadcast(self, *args: Any, **kwargs: Any) -> None:
        """Ask nobody, and hear nothing."""


class Events(events.Events):
    """Celery's step that sends what Flower shows, without declaring the exchange each time.

    A service's account may not declare anything; Celery would then keep every event in memory, for ever.
    """

    def start(self, c: Any) -> None:
        name = c.app.conf.event_exchange
        if not _declared(c.connection, name):
            log.warning("no_task_events", error=f"there is no exchange {name}, and no right to declare it")
            self.send_events = False
        event_exchange.no_declare = True
        super().start(c)


class Heart(heart.Heart):
    """Celery's step that sends worker heartbeats to Flower, after our own Events."""

    requires = (Events,)


class Tasks(tasks.Tasks):
    """Celery's step that consumes, without the step that it asks for first: workers do not talk to each other.

    Its queues have to exist. When one is missing as the worker starts, the worker exits and says what to do; when one
    is missing after a lost connection (the broker came back empty), the worker waits for it.
    """

    requires = (Events,)

    def start(self, c: Any) -> None:
        queues = list(c.app.amqp.queues.consume_from)
        while missing := [queue for queue in queues if not _exists(c.connection, queue)]:
            error = "; ".join(_how_to_make(queue) for queue in missing)
            if c.restart_count == 0:
                log.critical("worker_cannot_start", error=error)
                raise WorkerShutdown(1)
            log.error("queue_is_missing", error=error)
            state.maybe_shutdown()
            time.sleep(MISSING_QUEUE_SECONDS)
        leave_compressed(c.connection.default_channel)
        super().start(c)


class Consumer(consumer.Consumer):
    """Celery's consumer, with every message looked at before it is dispatched.

    Attributes:
        refused: how many messages it has refused since it was started.
    """

    class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc, valid-type]
        """Without the steps that declare things, or listen to other workers: the topology is there beforehand."""

        default_steps: ClassVar[list[str]] = [
            "celery.worker.consumer.connection:Connection",
            "knell.worker:Events",
            "knell.worker:Heart",
            "knell.worker:Tasks",
            "celery.worker.consumer.consumer:Evloop",
            "celery.worker.consumer.agent:Agent",
        ]

    refused = 0
    # Celery sets these; its types do not say so.
    task_consumer: Any
    connection_errors: tuple[type[Exception], ...]
    first_connection_attempt: bool

    def ensure_connected(self, conn: Any) -> Any:
        """Celery's; but an account or a virtual host that is refused after it was accepted is waited for.

        Somebody will make it anew. Celery exits over the one, and asks for the other again and again, without a pause.
        """
        while True:
            try:
                return super().ensure_connected(conn)
            except (AccessRefused, NotAllowed) as error:
                if self.first_connection_attempt:
                    raise
                log.error("broker_refuses_this_account", error=str(error))
                state.maybe_shutdown()
                time.sleep(MISSING_QUEUE_SECONDS)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Message], Any]:
        """Celery's handler of incoming messages, behind the gate."""
        dispatch = super().create_task_handler(*args, **kwargs)

        def on_message(message: Message) -> None:
            queue = self.queue_of(message)
            reason = self._refusal(message, queue)
            if reason is not None:
                self.refuse(message, reason)
                return
            message.delivery_info["queue"] = queue
            dispatch(message)

        return on_message

    def _refusal(self, message: Message, queue: str) -> str | None:
        delivery = message.delivery_info or {}
        if not topology.belongs(
            queue, exchange=delivery.get("exchange") or "", routing_key=delivery.get("routing_key") or ""
        ):
            return "the message was sent under the key of another queue"
        properties = {
            **(message.properties or {}),
            "content_type": message.content_type,
            "content_encoding": message.content_encoding,
        }
        return refusal(message.headers, properties, message.body or b"", allowed=_allowed(self.app).get(queue, ()))

    def queue_of(self, message: Message) -> str:
        """The queue that a message was read from; "" if that cannot be told."""
        queues: dict[str, str] = self.task_consumer._active_tags
        tag = (message.delivery_info or {}).get("consumer_tag")
        if tag is None and len(queues) == 1:
            return next(iter(queues))
        return next((queue for queue, active in queues.items() if active == tag), "")

    def refuse(self, message: Message, reason: str) -> None:
        """Reject a message for good, so that the broker moves it to knell.dead."""
        self.refused += 1
        log.warning("message_refused", reason=reason, queue=self.queue_of(message), refused_so_far=self.refused)
        if not message.acknowledged:
            message.reject_log_error(_kombu_log, self.connection_errors)

    # Celery's own ways to get rid of a message write its body to the log, or acknowledge it. None should be reached
    # past the gate.

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """A body that kombu cannot decode."""
        self.refuse(message, f"the body cannot be decoded: {type(exc).__name__}")

    def on_unknown_message(self, body: Any, message: Message) -> None:
        """A message that is no task."""
        self.refuse(message, "the message names no task")

    def on_unknown_task(self, body: Any, message: Message, exc: Exception) -> None:
        """A task that is allowed here and that the app does not have."""
        self.refuse(message, "the task is not registered in this worker")

    def on_invalid_task(self, body: Any, message: Message, exc: Exception) -> None:
        """A message that no request can be made of."""
        self.refuse(message, f"the message is no task: {type(exc).__name__}")


class Request(request.Request):
    """A request with an id of its own for each service, and without its arguments in the log.

    A notice is one message, so all services get it under one task id, which Flower would show as one row. The id here
    is made of that id, the queue and the exchange; `root_id` keeps the first one. The log and Flower show what the
    sender put into `argsrepr`; never the arguments, which are signed notices.
    """

    # Celery sets these; its types do not say so.
    _request_dict: dict[str, Any]
    _root_id: str | None
    _parent_id: str | None

    def __init__(self, message: Message, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(message, *args, **kwargs)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            # Celery's consumer survives this one, and dies of all others.
            raise InvalidTaskError(type(error).__name__) from None
        self._argsrepr = self._request_dict["argsrepr"] = shown(self._request_dict.get("argsrepr")) or "(not shown)"
        self._kwargsrepr = self._request_dict["kwargsrepr"] = "{}"
        delivery = message.delivery_info or {}
        if topology.service_of_queue(delivery.get("queue", "")) is not None:
            self._own_id(delivery["queue"], delivery.get("exchange") or "")

    def _own_id(self, queue: str, exchange: str) -> None:
        first = self.id
        self._root_id = self._request_dict["root_id"] = self._root_id or first
        self._parent_id = self._parent_id or first
        self.id = self._request_dict["id"] = str(uuid5(_as_uuid(first), f"{queue} {exchange}"))


def shown(text: object) -> str:
    """Text of a sender, fit for one line of a log: no control characters, no token, at most 200 long. Else ""."""
    return without_tokens(_UNPRINTABLE.sub(" ", text))[:MAX_SHOWN].strip() if isinstance(text, str) else ""


def _exists(connection: Any, queue: str) -> bool:
    try:
        with connection.channel() as channel:
            channel.queue_declare(queue=queue, passive=True)
    except NotFound:
        return False
    return True


def _declared(connection: Any, exchange: str) -> bool:
    """Whether an exchange for events is there, now."""
    try:
        with connection.channel() as channel:
            channel.exchange_declare(exchange=exchange, type=event_exchange.type, passive=True)
    except NotFound:
        try:
            with connection.channel() as channel:
                channel.exchange_declare(exchange=exchange, type=event_exchange.type, durable=True, auto_delete=False)
        except AccessRefused:
            return False
    return True


def _how_to_make(queue: str) -> str:
    service = topology.service_of_queue(queue)
    first = "" if service is None else f"`knell services add {service}`, or where it is registered "
    return f"the broker has no queue {queue}; run {first}`knell topology apply`"


def _as_uuid(task_id: str) -> UUID:
    try:
        return UUID(task_id)
    except ValueError:
        return uuid5(NAMESPACE_OID, task_id)
