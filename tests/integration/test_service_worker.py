"""Real workers on a real RabbitMQ: what one service's trouble, a poisoned message and a kill -9 do, and do not do."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import amqp
import pytest
from amqp import serialization
from amqp.exceptions import AccessRefused
from celery import Celery
from celery.events.receiver import EventReceiver
from kombu import Connection, Producer
from kombu.transport.native_delayed_delivery import MAX_LEVEL, level_name

from knell import Notice, Settings, messages, topology
from knell.keys import NOTICE_TYPE, NOTIFIER, SigningKey
from knell.messages import TERMINATE, Message
from knell.notices import Cause, NoticeBatch, new_batch_id
from knell.publisher import Publisher, connect, queue_depth
from knell.revocations import Scope
from tests.deployment import ROOT, environ_of, make_keys, until
from tests.servers import RabbitServer

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

SERVICES = ("shop", "partner")


class Site:
    """Two services on a broker of the module's own, and the other ends of their queues."""

    def __init__(self, directory: Path, broker_url: str, store_url: str, api_url: str | None) -> None:
        notice_key, trust = make_keys(directory)
        self.directory = directory
        self.settings = Settings(
            namespace=f"w{uuid4().hex[:8]}",
            home=directory,
            broker_url=broker_url,
            store_url=store_url,
            notice_key=notice_key,
            trust=trust,
        )
        self.key = SigningKey.load(notice_key.read_bytes(), algorithm="EdDSA")
        with connect(self.settings) as connection:
            topology.declare(connection, SERVICES, settings=self.settings)
        if api_url:
            topology.apply_policies(api_url, broker_url.rpartition("/")[2])
        self.publisher = Publisher(self.settings)
        self._workers: dict[str, subprocess.Popen[bytes]] = {}

    # ---- workers

    def start(self, name: str, *, broker_url: str | None = None, ready: bool = True) -> subprocess.Popen[bytes]:
        log = self.log(name).open("ab")
        after = self.log(name).stat().st_size
        environ = {name: value for name, value in os.environ.items() if not name.startswith("KNELL_")}
        environ |= environ_of(self.settings) | {"CLERK_NAME": name, "CLERK_RECORD": str(self.directory / "record")}
        if broker_url is not None:
            environ["KNELL_BROKER_URL"] = broker_url
        node = f"{name}@{self.settings.namespace}-{len(self._workers)}"
        arguments = ["-A", "tests.apps.clerk", "worker", "--concurrency=1", "-l", "info", "-n", node]
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", *arguments],
            cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        self._workers[name] = worker

        def is_ready() -> bool:
            assert worker.poll() is None, self.log(name).read_text()[-3000:]
            return b" ready." in self.log(name).read_bytes()[after:]

        if ready:
            until(is_ready, seconds=60, what=f"{name} is ready")
        return worker

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        worker = self._workers.pop(name)
        try:
            if number is signal.SIGKILL:
                os.killpg(worker.pid, number)
            else:
                worker.send_signal(number)
        except ProcessLookupError:
            pass
        worker.wait(30)

    def stop(self) -> None:
        for name in list(self._workers):
            self.kill(name, signal.SIGTERM)
        self.publisher.close()

    def running(self, name: str) -> int | None:
        """The process id of a worker that still runs."""
        return self._workers[name].pid if self._workers[name].poll() is None else None

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    # ---- messages

    def jws(self, orders: Sequence[str]) -> tuple[str, str]:
        """A signed batch whose entries have these subjects; with its id."""
        now, batch_id = time.time(), new_batch_id("e")
        entries = [
            Notice(batch_id=batch_id, n=n, cause=Cause.EXPIRED, ends=frozenset({"session"}), scope=Scope.SESSION,
                   at=now, iss="https://auth.example", sid=f"s{n}", sub=sub)
            for n, sub in enumerate(orders)
        ]  # fmt: skip
        batch = NoticeBatch(id=batch_id, entries=entries, issued_at=now, expires_at=now + 600)
        return self.key.sign(batch.as_payload(signer=NOTIFIER, audience=self.settings.audience), typ=NOTICE_TYPE), (
            batch_id
        )

    def tell(self, *orders: str) -> str:
        """Publish a notice to every service; returns the batch's id."""
        jws, batch_id = self.jws(orders)
        self.send(messages.notice(jws, shown="expired sessions"))
        return batch_id

    def send(self, *out: Message) -> None:
        self.publisher.send(out).result(20)

    def calls(self, batch_id: str, service: str) -> list[int]:
        """The entry numbers that a service's handler was called with, in order."""
        return [line["n"] for line in self._lines(batch_id, service)]

    def child(self, batch_id: str, service: str) -> int:
        """The process that last ran the handler."""
        pid: int = self._lines(batch_id, service)[-1]["pid"]
        return pid

    def _lines(self, batch_id: str, service: str) -> list[dict[str, Any]]:
        record = self.directory / "record"
        lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        return [line for line in lines if line["service"] == service and line["id"].startswith(f"{batch_id}.")]

    def take(self, queue: str) -> list[Any]:
        """Take every message out of a queue."""
        found = []
        with Connection(self.settings.broker_url) as connection:
            # Not through kombu's own Message, which would decompress what claims to be compressed.
            channel: Any = connection.channel()
            while (message := channel.basic_get(queue, no_ack=True)) is not None:
                found.append(message)
        return found


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, rabbitmq_server: RabbitServer, broker_url: str, redis_url: str
) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"), broker_url, redis_url, rabbitmq_server.api_url)
    for name in SERVICES:
        site.start(name)
    yield site
    site.stop()


class Answers:
    """What services put on knell.receipts, gathered as it comes."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.found: list[tuple[str, dict[str, Any]]] = []

    def of(self, service: str, batch_id: str) -> list[dict[str, Any]]:
        for message in self._site.take(topology.RECEIPTS):
            self.found.append((message.delivery_info["routing_key"], json.loads(message.body)))
        return [body for key, body in self.found if key == f"receipt.{service}" and body["batch_id"] == batch_id]

    def parked(self, service: str) -> list[dict[str, Any]]:
        return [body for key, body in self.found if key == f"parked.{service}"]


def test_a_failure_is_retried_by_its_service_alone_and_parked_after_the_last_try(site: Site) -> None:
    """Three tries of the one entry, one run of every other, and the second service sees nothing of it."""
    answers = Answers(site)
    batch_id = site.tell("ok", "fail@shop", "ok")
    until(
        lambda: any(receipt["parked"] for receipt in answers.of("shop", batch_id)),
        seconds=40,
        what="shop has parked its entry",
    )
    until(lambda: answers.of("partner", batch_id), what="partner's receipt")
    assert Counter(site.calls(batch_id, "shop")) == {0: 1, 1: 3, 2: 1}
    assert site.calls(batch_id, "partner") == [0, 1, 2]
    first, second, last = answers.of("shop", batch_id)
    assert (first["done"], first["retrying"]) == ([0, 2], [1])
    assert (second["done"], second["retrying"]) == ([], [1])
    assert (last["done"], last["parked"]) == ([], [1])
    assert [receipt["done"] for receipt in answers.of("partner", batch_id)] == [[0, 1, 2]]
    assert answers.parked("partner") == []
    [parked] = answers.parked("shop")
    assert parked["errors"] == {"1": "ConnectionError: the session store of this service is away"}


def _task(body: bytes, *, content_type: str = "application/json", encoding: str = "utf-8", **headers: Any) -> Any:
    named = {"task": TERMINATE, "id": str(uuid4()), **headers}
    return body, {name: value for name, value in named.items() if value is not ...}, content_type, encoding


GOOD = b'[["x", null, 0], {}, {}]'
POISON = [
    _task(b'{"a":1}'),
    _task(b"[]"),
    _task(b"[" * 10_000 + b"]" * 10_000),
    _task(b"[[NaN],{},{}]"),
    _task(b"not json"),
    _task(b"\xff\xfe"),
    _task(b'[["' + b"x" * (5 * 1024 * 1024) + b'"],{},{}]'),
    _task(b'[["x"],{},{"callbacks":[{"task":"knell.terminate","args":["x"],"options":{"queue":"knell.dead"}}]}]'),
    _task(b'[["x"],{},{"chain":[{"task":"knell.terminate","args":["x"]}]}]'),
    _task(GOOD, task="celery.chord_unlock"),
    _task(GOOD, task="knell.expire"),
    _task(GOOD, task=...),
    _task(GOOD, id=...),
    _task(GOOD, eta="tomorrow"),
    _task(GOOD, timelimit=[1]),
    _task(GOOD, compression="application/x-gzip"),
    _task(gzip.compress(GOOD), compression="application/x-gzip"),
    _task(b"\x80\x04N.", content_type="application/x-python-serialize", encoding="binary"),
    _task(b"[[],{},{}]"),  # passes the gate, and has too few arguments
    _task(GOOD),  # passes the gate, and is signed by nobody
]


def test_poisoned_messages_are_parked_and_the_workers_stay(site: Site) -> None:
    """Each goes to knell.dead once for every service; a good notice between them is handled; no worker restarts."""
    site.take(topology.DEAD)
    before = [site.running(name) for name in SERVICES]
    batch_ids = []
    with connect(site.settings) as connection:
        producer = Producer(connection)
        for number, (body, headers, content_type, encoding) in enumerate(POISON):
            producer.publish(
                body, exchange=topology.NOTICES, headers=headers, serializer=None,
                content_type=content_type, content_encoding=encoding,
            )  # fmt: skip
            if number % 7 == 0:
                batch_ids.append(site.tell("ok"))
    for batch_id in batch_ids:
        for name in SERVICES:
            until(lambda: site.calls(batch_id, name) == [0], what=f"{name} handles a good notice")  # noqa: B023
    dead = len(POISON) * len(SERVICES)
    found: list[tuple[str, bytes]] = []

    def all_dead() -> bool:
        for message in site.take(topology.DEAD):
            body = message.body.encode() if isinstance(message.body, str) else message.body
            found.append((message.headers["x-death"][0]["queue"], body[:40]))
        return len(found) >= dead

    until(all_dead, what=lambda: f"{dead} dead messages (there are {len(found)}: {sorted(found)})")
    assert [site.running(name) for name in SERVICES] == before
    expected = Counter((topology.service_queue(name), body[:40]) for name in SERVICES for body, *_ in POISON)
    assert Counter(found) == expected


class _Raw:
    """Bytes of an AMQP field value, as no client library would write them."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw


@pytest.fixture
def raw_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let py-amqp write `_Raw` values as they are."""
    write_item = serialization._write_item

    def write(value: Any, write: Callable[[bytes], object], bits: Any) -> None:
        if isinstance(value, _Raw):
            write(value.raw)
        else:
            write_item(value, write, bits)

    monkeypatch.setattr(serialization, "_write_item", write)


@pytest.mark.parametrize(
    "properties",
    [
        {"content_type": b"\xff\xfe"},
        {"application_headers": {"x": _Raw(b"T" + b"\xff" * 8)}},
    ],
    ids=["no text", "no time"],
)
@pytest.mark.usefixtures("raw_values")
def test_properties_that_cannot_be_decoded_stop_no_worker(site: Site, properties: dict[str, Any]) -> None:
    """py-amqp would take the message for a lost connection, and read it again, and again: it is refused instead."""
    site.take(topology.DEAD)
    before = [site.running(name) for name in SERVICES]
    with connect(site.settings) as connection:
        channel: Any = connection.channel()
        channel.basic_publish(amqp.Message(b"{}", **properties), topology.NOTICES, "")
    batch_id = site.tell("ok")
    for name in SERVICES:
        until(lambda: site.calls(batch_id, name) == [0], what=f"{name} handles the notice behind it")  # noqa: B023
    until(lambda: queue_depth(site.settings, topology.DEAD) == len(SERVICES), what="both have refused it")
    assert [site.running(name) for name in SERVICES] == before


class Receiver(EventReceiver):
    """Celery's reader of events, which says when it has begun."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun = threading.Event()

    def on_consume_ready(self, *args: Any, **kwargs: Any) -> None:
        self.begun.set()


class Events:
    """Celery's task events as Flower sees them."""

    def __init__(self, url: str) -> None:
        self.found: list[dict[str, Any]] = []
        app = Celery("events", broker=url, set_as_current=False)
        self._connection = app.connection_for_read()
        self._receiver = Receiver(self._connection, handlers={"*": self.found.append}, app=app)
        self._thread = threading.Thread(target=lambda: list(self._receiver.consume(limit=None)))
        self._thread.start()
        assert self._receiver.begun.wait(20)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.found if event["type"] == kind]

    def close(self) -> None:
        self._receiver.should_stop = True
        self._thread.join(10)
        self._connection.release()


@pytest.fixture
def events(site: Site) -> Iterator[Events]:
    events = Events(site.settings.broker_url)
    yield events
    events.close()


def test_each_services_run_has_an_id_of_its_own_in_task_events(site: Site, events: Events) -> None:
    """One message, two rows, one root; and no event has a token in it."""
    jws, _ = site.jws(["ok"])
    message = messages.notice(jws, shown="expired 1 session")
    site.send(message)

    def finished() -> list[dict[str, Any]] | None:
        received = {event["uuid"]: event for event in events.of("task-received")}
        done = [event for event in events.of("task-succeeded") if event["uuid"] in received]
        return list(received.values()) if len(done) == 2 else None

    received = until(finished, what="two finished rows")
    assert len({event["uuid"] for event in received}) == 2
    assert message.correlation_id not in {event["uuid"] for event in received}
    assert {event["root_id"] for event in received} == {message.correlation_id}
    assert {event["args"] for event in received} == {"expired 1 session"}
    assert "eyJ" not in json.dumps(events.found)
    assert "eyJ" not in site.log("shop").read_text()


def test_a_killed_worker_repeats_nothing_whose_mark_was_stored(site: Site) -> None:
    """kill -9 in the middle of a batch: after the restart every entry was handled, and at most one of them twice."""
    batch_id = site.tell(*["slow@shop"] * 8)
    until(lambda: len(site.calls(batch_id, "shop")) >= 4, what="half of the batch")
    site.kill("shop")
    before = site.calls(batch_id, "shop")
    site.start("shop")
    until(lambda: set(site.calls(batch_id, "shop")) == set(range(8)), seconds=60, what="the rest of the batch")
    answers = Answers(site)
    until(lambda: any(7 in receipt["done"] for receipt in answers.of("shop", batch_id)), what="the receipt")
    repeated = [n for n, count in Counter(site.calls(batch_id, "shop")).items() if count > 1]
    # The last call may have returned in the 100 ms before the kill.
    assert repeated in ([], [before[-1]])
    assert site.calls(batch_id, "partner") == list(range(8))


def test_a_lost_child_process_gives_its_message_back(site: Site) -> None:
    """kill -9 of the process that runs the handler: the worker stays, and the batch is finished without a restart."""
    worker = site.running("shop")
    batch_id = site.tell(*["slow@shop"] * 4)
    until(lambda: len(site.calls(batch_id, "shop")) >= 2, what="half of the batch")
    os.kill(site.child(batch_id, "shop"), signal.SIGKILL)
    until(lambda: set(site.calls(batch_id, "shop")) == set(range(4)), seconds=60, what="the rest of the batch")
    assert site.running("shop") == worker


def test_sigterm_lets_the_batch_finish(site: Site) -> None:
    """A worker that is told to stop answers for the batch in hand first."""
    batch_id = site.tell(*["slow@partner"] * 6)
    until(lambda: site.calls(batch_id, "partner"), what="the first call")
    site.kill("partner", signal.SIGTERM)
    assert site.calls(batch_id, "partner") == list(range(6))
    answers = Answers(site)
    until(lambda: [r["done"] for r in answers.of("partner", batch_id)] == [list(range(6))], what="its receipt")
    site.start("partner")


def test_a_service_that_is_not_registered_says_what_to_do(site: Site) -> None:
    """Without its queue the worker exits, and its log names the command."""
    worker = site.start("stranger", ready=False)
    assert worker.wait(60) != 0
    assert "knell services add stranger" in site.log("stranger").read_text()


@pytest.fixture(scope="module")
def account_of_shop(site: Site, rabbitmq_server: RabbitServer) -> str:
    """The broker's URL for an account that has the permissions of `shop`, as the topology names them."""
    granted = topology.permissions("shop")
    rights = {"configure": granted.configure, "write": granted.write, "read": granted.read}
    url = rabbitmq_server.add_user(site.settings.broker_url, "shop", "secret", rights)
    vhost = url.rpartition("/")[2]
    for exchange, (write, read) in granted.topics.items():
        grant = {"exchange": exchange, "write": write, "read": read}
        rabbitmq_server.api("PUT", f"/api/topic-permissions/{vhost}/shop", grant)
    return url


@pytest.mark.parametrize("header", ["CC", "BCC"])
@pytest.mark.parametrize("delayed", [False, True], ids=["at once", "delayed"])
def test_a_key_in_a_header_does_not_reach_another_service(
    site: Site, account_of_shop: str, header: str, delayed: bool
) -> None:
    """A broker that looks at the first key only delivers it; the other service's worker refuses it unread."""
    site.take(topology.DEAD)
    jws, batch_id = site.jws(["ok"])
    made = messages.notice_to("shop", jws, shown="a copy")
    delay = "0." * (MAX_LEVEL + 1) if delayed else ""
    forged = amqp.Message(
        made.body,
        content_type="application/json",
        content_encoding="utf-8",
        application_headers={**made.headers, header: [delay + topology.retry_key("partner")]},
    )
    with Connection(account_of_shop) as connection:
        channel: Any = connection.channel()
        exchange = level_name(MAX_LEVEL) if delayed else topology.RETRY
        try:
            channel.basic_publish_confirm(forged, exchange, delay + topology.retry_key("shop"))
        except AccessRefused:
            return  # a newer broker looks at every key
    [dead] = until(lambda: site.take(topology.DEAD), what="partner refuses it")
    assert dead.headers["x-death"][0]["queue"] == topology.service_queue("partner")
    until(lambda: site.calls(batch_id, "shop") == [0], what="shop handles its own")
    assert site.calls(batch_id, "partner") == []


def test_an_account_that_may_only_what_a_service_needs_is_enough(site: Site, account_of_shop: str) -> None:
    """With the permissions that the topology names, a worker starts, handles, retries through the ladder and parks."""
    site.kill("shop", signal.SIGTERM)
    site.start("shop", broker_url=account_of_shop)
    batch_id = site.tell("ok", "fail@shop")
    answers = Answers(site)
    until(lambda: any(receipt["parked"] for receipt in answers.of("shop", batch_id)), seconds=40, what="the parking")
    assert Counter(site.calls(batch_id, "shop")) == {0: 1, 1: 3}
    site.kill("shop", signal.SIGTERM)
    site.start("shop")
