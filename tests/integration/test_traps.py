"""The traps of Celery, kombu and RabbitMQ that the design names, one test each where no other test file has it.

Timers here have no sweep behind them: what is not told by push is not told.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from kombu import Exchange, Producer, Queue
from kombu.transport.native_delayed_delivery import calculate_routing_key, level_name

from knell import Issuer, Notice, Service, TokenRef, messages, topology
from knell.confirms import address
from knell.connection import connect, queue_depth
from knell.keys import NOTICE_TYPE, NOTIFIER, SigningKey, notice_key
from knell.messages import TERMINATE
from knell.notices import Cause, NoticeBatch, new_batch_id
from knell.publisher import Publisher
from knell.revocations import Scope
from knell.service_app import register_embedded
from knell.settings import Rules, Settings
from knell.topology.plan import queues
from tests.deployment import ROOT, Deployment, on_servers, until
from tests.proxy import Proxy
from tests.servers import RabbitServer

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

ISS = "https://auth.example"
KEY = SigningKey.generate()
SERVICES = ("shop", "choir")
PREFORK = ("--pool=prefork", "--concurrency=2")
# RabbitMQ's default consumer_timeout: a message that is unacknowledged for longer closes the channel.
CONSUMER_TIMEOUT_SECONDS = 1800


@pytest.fixture(scope="module")
def proxy(rabbitmq_server: RabbitServer) -> Iterator[Proxy]:
    """What stands between the broker and the notifier and the shop."""
    proxy = Proxy(rabbitmq_server.port)
    yield proxy
    proxy.close()


class Cable(Proxy):
    """A proxy whose connections can be cut: both ends hear of it at once, and may connect again."""

    def cut(self) -> int:
        """Cut every connection of now. Returns how many ends heard of it."""
        heard = 0
        for end in [end for flow in self._flows for end in flow._ends]:
            with suppress(OSError):  # it has ended before
                end.shutdown(socket.SHUT_RDWR)
                heard += 1
        return heard


@pytest.fixture(scope="module")
def cable(rabbitmq_server: RabbitServer) -> Iterator[Cable]:
    """What stands between the broker and the choir."""
    cable = Cable(rabbitmq_server.port)
    yield cable
    cable.close()


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory,
    rabbitmq_server: RabbitServer,
    broker_url: str,
    redis_url: str,
    proxy: Proxy,
    cable: Cable,
) -> Iterator[Deployment]:
    """A notifier without a sweep, a service of one process, and one whose worker forks two children."""
    directory = tmp_path_factory.mktemp("traps")
    settings = on_servers(directory, rabbitmq_server, broker_url, redis_url)
    deployment = Deployment(directory, settings)
    deployment.prepare(SERVICES)
    through = {"KNELL_BROKER_URL": broker_url.replace(str(rabbitmq_server.port), str(proxy.port))}
    try:
        deployment.start_notifier(beat=False, **through)
        deployment.start_service("shop", **through)
        start_choir(deployment, cable)
        yield deployment
    finally:
        deployment.stop()


@pytest.fixture
def issuer(deployment: Deployment) -> Iterator[Issuer]:
    with Issuer(ISS, KEY, settings=deployment.settings) as issuer:
        yield issuer


def start_choir(deployment: Deployment, cable: Cable, **environ: str) -> None:
    through = {"KNELL_BROKER_URL": deployment.settings.broker_url.replace(_port(deployment), str(cable.port))}
    deployment.start_service("choir", app="choir", options=PREFORK, **through, **environ)


def _port(deployment: Deployment) -> str:
    return str(urlsplit(deployment.settings.broker_url).port)


def in_the_ladder(deployment: Deployment) -> int:
    """How many messages wait in the delay ladder."""
    with connect(deployment.settings) as connection:
        return sum(queue_depth(connection, f"celery_delayed_{level}") or 0 for level in range(28))


def empty_the_ladder(deployment: Deployment) -> None:
    with connect(deployment.settings) as connection:
        channel: Any = connection.channel()
        for level in range(28):
            channel.queue_purge(f"celery_delayed_{level}")


def plain_send(deployment: Deployment, *timers: tuple[int, int]) -> None:
    """What an issuer that knows Celery and not Knell does: send_task for (second, eta), in a process of its own."""
    code = (
        "import json, sys\n"
        "from datetime import UTC, datetime\n"
        "from tasks import app\n"
        "for second, eta in json.loads(sys.argv[1]):\n"
        '    app.send_task("knell.expire", args=[second], eta=datetime.fromtimestamp(eta, UTC))\n'
    )
    command = [sys.executable, "-c", code, json.dumps(timers)]
    subprocess.run(command, cwd=ROOT, env=deployment.inherited, check=True, timeout=60)


def test_trap_1_and_3_a_timer_that_plain_celery_sends_waits_in_the_ladder_and_is_told(deployment: Deployment) -> None:
    """Traps 1 and 3: send_task("knell.expire", eta=...) without a queue is keyed to the timers', held by the broker."""
    now = deployment.store.time()
    token = TokenRef(iss=ISS, jti=str(uuid4()), exp=now + 10, iat=now, sub="u", sid=str(uuid4()))
    # Behind the issuer's back, so that nobody else sends the timer.
    deployment.store.track([token])
    plain_send(deployment, (token.second, token.second), (token.second + 5000, token.second + 5000))
    until(lambda: in_the_ladder(deployment) == 1, what="the far timer alone is in the ladder")
    for service in ("shop", "choir"):
        deployment.wait_for_records(1, service=service, event="session", sid=token.sid)
    (told,) = deployment.records(service="shop", event="session", sid=token.sid)
    assert told["time"] >= token.exp
    assert in_the_ladder(deployment) == 1
    assert queue_depth(deployment.settings, topology.EXPIRY) == 0
    empty_the_ladder(deployment)


def test_trap_3_nothing_in_the_ladder_has_an_expiry_of_its_own(deployment: Deployment, issuer: Issuer) -> None:
    """Trap 3: `expires`, or a time-to-live of its own, would release a delayed message early."""
    eta = time.time() + 5000
    issuer.issue({"sub": "u", "sid": str(uuid4())}, ttl_seconds=5000)
    with closing(Publisher(deployment.settings)) as publisher:
        publisher.send([messages.notice_to("shop", "not a notice", shown="a retry", eta=eta)]).result(10)
    level = level_name((5000).bit_length() - 1)
    with connect(deployment.settings) as connection:
        channel: Any = connection.channel()
        found = [until(lambda: channel.basic_get(level, no_ack=True), what=f"a message in {level}") for _ in range(2)]
    assert {message.headers["task"] for message in found} == {"knell.expire", TERMINATE}
    for message in found:
        assert message.headers["eta"]
        assert message.headers["expires"] is None
        assert "expiration" not in message.properties


def test_trap_2_a_queue_that_celery_is_given_keeps_its_exchange() -> None:
    """Trap 2: kombu's Queue drops its exchange when it has bindings; ours go to Celery with one exchange and key."""
    for name in (topology.EXPIRY, topology.COMMANDS, topology.SWEEP, topology.service_queue("shop")):
        queue = topology.kombu_queue(name)
        assert queue.exchange.name, name
        assert not queue.bindings
    # On a direct exchange delayed delivery falls back to holding the task in the worker.
    for delayed in (topology.EXPIRY, topology.service_queue("shop")):
        assert topology.kombu_queue(delayed).exchange.type == "topic"


@pytest.mark.parametrize("delay", [1, 2, 3, 100, 5000, 2**27])
def test_trap_5_a_delay_enters_the_ladder_where_it_starts(delay: int) -> None:
    """Trap 5: entering at the top, as Celery does, is ten times slower, and delivers the same (see test_topology)."""
    where = address(messages.expire(1, eta=1_000_000.9 + delay), now=1_000_000.0)
    # kombu's own numbering: the level whose queue holds a message for the largest power of two in the delay.
    assert where.exchange == level_name(delay.bit_length() - 1)
    assert where.routing_key == calculate_routing_key(delay, topology.EXPIRY)


def test_trap_6_no_queue_refuses_what_the_others_have_taken() -> None:
    """Trap 6: one full queue that rejects publishes makes the broker nack a notice that every other service has."""
    for plan in queues(["shop", "partner"], Rules()):
        assert not {"x-overflow", "x-max-length", "x-max-length-bytes"} & set(plan.arguments), plan.name


MISPLACED = [
    (topology.EXPIRY, "knell.sweep", []),
    (topology.EXPIRY, "knell.revoke", ["x"]),
    (topology.EXPIRY, TERMINATE, ["x", None, 0]),
    (topology.COMMANDS, "knell.expire", [1]),
    (topology.SWEEP, "knell.expire", [1]),
    (topology.SWEEP, "celery.chord_unlock", []),
]


def test_trap_8_a_task_in_another_queue_is_not_run_and_no_callback_is(deployment: Deployment) -> None:
    """Trap 8: Celery runs what a header names, and what a body asks to be run after it; the notifier parks both."""
    before = deployment.pid("notifier")
    known = {each.id for each in deployment.store.parked(service="")}
    spy = Queue(f"spy-{uuid4()}", Exchange(f"spy-{uuid4()}", type="topic", durable=True), routing_key="spy")
    options = {"exchange": spy.exchange.name, "routing_key": "spy"}
    asked = {"task": "knell.expire", "args": [1], "kwargs": {}, "options": options}
    with connect(deployment.settings) as connection:
        spy(connection.channel()).declare()
        producer = Producer(connection)

        def put(queue: str, task: str, body: bytes, content_type: str = "application/json") -> None:
            producer.publish(
                body, exchange=queue, routing_key=queue, headers={"task": task, "id": str(uuid4())},
                content_type=content_type, content_encoding="utf-8", serializer=None,
            )  # fmt: skip

        for queue, task, arguments in MISPLACED:
            put(queue, task, json.dumps([arguments, {}, {}]).encode())
        for when in ("callbacks", "errbacks", "chain"):
            put(topology.EXPIRY, "knell.expire", json.dumps([[1], {}, {when: [asked]}]).encode())
        put(topology.EXPIRY, "knell.expire", b"\x80\x04K\x01.", "application/x-python-serialize")
        expected = Counter([*(queue for queue, _, _ in MISPLACED), *[topology.EXPIRY] * 4])

        def parked() -> Counter[str]:
            return Counter(each.queue for each in deployment.store.parked(service="") if each.id not in known)

        until(lambda: parked() == expected, what=f"{expected} are parked")
        assert queue_depth(connection, spy.name) == 0
        spy(connection.channel()).delete()
    assert deployment.running("notifier")
    assert deployment.pid("notifier") == before


@pytest.mark.timeout(240)
def test_trap_9_a_half_open_connection_ends_no_worker(deployment: Deployment, issuer: Issuer, proxy: Proxy) -> None:
    """Trap 9: every connection of notifier and shop goes deaf; both notice, come back in the same process, and work."""
    sid = str(uuid4())
    assert proxy.freeze() >= 4, "tasks and receipts of the notifier, tasks of the shop, and their publishers"
    issued = issuer.issue({"sub": "u", "sid": sid}, ttl_seconds=2)
    revoked = issuer.revoke("session", {"sid": str(uuid4())}, wait_for=["shop"], timeout_seconds=150)
    assert revoked.services["shop"].state == "done"
    found = deployment.wait_for_records(1, seconds=60, service="shop", event="session", sid=sid)
    assert [record["jti"] for record in found] == [issued.ref.jti]
    assert deployment.running("notifier")
    assert deployment.running("shop")


REQUIRED: dict[str, Any] = {
    "task_acks_late": True,
    "task_reject_on_worker_lost": True,
    "task_acks_on_failure": False,
    "task_acks_on_timeout": False,
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    "task_ignore_result": True,
    "result_backend": None,
    "task_serializer": "json",
    "accept_content": ["json"],
    "worker_enable_remote_control": False,
    "task_send_sent_event": False,
    "task_create_missing_queues": False,
}


def test_trap_11_neither_notifier_nor_service_has_celerys_defaults(deployment: Deployment) -> None:
    """Traps 9, 10 and 11: late acks that stay, JSON only, no result backend, no remote control, in every worker."""
    wanted = [*REQUIRED, "beat_schedule"]
    code = f"import json, tasks; print(json.dumps({{name: tasks.app.conf[name] for name in {wanted!r}}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=deployment.inherited, check=True, timeout=60, capture_output=True
    )
    found = json.loads(done.stdout)
    # A notifier that was stopped finds one sweep waiting, not hundreds; and two beats do no harm.
    (sweep,) = found.pop("beat_schedule").values()
    assert 0 < sweep["options"]["expires"] <= sweep["schedule"]
    assert found == REQUIRED
    app = Service("shop", settings=deployment.settings).celery_app()
    assert {name: app.conf[name] for name in REQUIRED} == REQUIRED
    assert app.conf.task_soft_time_limit < app.conf.task_time_limit < CONSUMER_TIMEOUT_SECONDS
    assert app.conf.broker_transport_options["confirm_publish"]


@pytest.mark.timeout(180)
def test_trap_11_a_hard_time_limit_gives_the_message_back(deployment: Deployment, issuer: Issuer, cable: Cable) -> None:
    """Trap 11: by default a task that is killed for its time is acknowledged and gone; here it is done the next try."""
    deployment.stop_one("choir")
    start_choir(deployment, cable, CHOIR_TIME_LIMIT_SECONDS="2")
    sub = f"stuck-{uuid4()}"
    revoked = issuer.revoke("subject", {"sub": sub}, wait_for=["choir"], timeout_seconds=60)
    assert revoked.services["choir"].state == "done"
    assert len(deployment.records(service="choir", event="began", sub=sub)) == 2
    assert len(deployment.records(service="choir", event="session", sub=sub)) == 1
    assert "Hard time limit" in deployment.log_of("choir").read_text()
    deployment.stop_one("choir")
    start_choir(deployment, cable)


@pytest.mark.timeout(180)
def test_trap_11_a_run_whose_connection_was_cut_ends_and_only_the_new_one_counts(
    deployment: Deployment, issuer: Issuer, cable: Cable
) -> None:
    """Trap 11: by default the old run goes on beside the redelivered one; here it is stopped, and one run is done."""
    worker, sub = deployment.pid("choir"), f"stuck-{uuid4()}"
    revoked = issuer.revoke("subject", {"sub": sub})
    (old,) = deployment.wait_for_records(1, service="choir", event="began", sub=sub)
    assert cable.cut()
    until(lambda: not Path(f"/proc/{old['pid']}").exists(), what="the old run's process has ended")
    until(lambda: (deployment.store.status(revoked.id) or {})["choir"].state == "done", what="the choir is done")
    began = deployment.records(service="choir", event="began", sub=sub)
    (ended,) = deployment.records(service="choir", event="session", sub=sub)
    assert [record["pid"] for record in began] == [old["pid"], ended["pid"]]
    assert ended["pid"] != old["pid"]
    assert deployment.pid("choir") == worker
    assert deployment.running("choir")


def test_trap_13_two_services_in_one_process_keep_to_their_own_handlers(settings: Callable[..., Settings]) -> None:
    """Trap 13: Celery shares a task with every app of the process, and the first one's would run for both."""
    here = settings()
    told: list[str] = []
    apps = {}
    for name in ("shop", "partner"):
        service = Service(name, settings=here)
        service.on_session_end(_noting(told, name))
        apps[name] = service.celery_app()
    for name, app in apps.items():
        register_embedded(name, here, app)
    for name in ("partner", "shop"):
        apps[name].tasks[TERMINATE](_signed(here))
        assert told.pop() == name
        assert not told


# At a fork: the names of the threads that the child will lack, whatever they hold. Nothing is forked after all.
AT_A_FORK = """
import json, os, sys, threading
def tell():
    print(json.dumps([thread.name for thread in threading.enumerate()]), flush=True)
    os._exit(0)
os.register_at_fork(before=tell)
sys.argv = ["celery", "-A", "tasks", "worker", "-B", "-l", "CRITICAL", "-n", "forking@test"]
from celery.__main__ import main
main()
"""


def test_trap_14_beat_is_forked_while_nothing_else_runs(deployment: Deployment) -> None:
    """Trap 14: with -B the notifier forks; a thread that held a lock then would leave beat waiting for it for ever."""
    # Celery starts its parts in an order that depends on hashes, wherever none is asked for.
    started = [
        subprocess.Popen(
            [sys.executable, "-c", AT_A_FORK],
            cwd=ROOT,
            env={**deployment.inherited, "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for seed in range(4)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    assert [json.loads(output.splitlines()[-1]) for output in outputs] == [["MainThread"]] * len(started)


@pytest.mark.timeout(180)
def test_trap_14_what_was_opened_before_the_fork_is_not_shared(deployment: Deployment, issuer: Issuer) -> None:
    """Trap 14: with its connections and its event loop open in the parent, two children work at the same time."""
    sub = f"duet-{uuid4()}"
    first = issuer.revoke("subject", {"sub": sub}, wait_for=["shop"])
    # A slow service makes no other one wait: the choir cannot be done before its second notice is there.
    assert (first.services["shop"].state, first.services["choir"].state) == ("done", "waiting")
    second = issuer.revoke("subject", {"sub": sub}, wait_for=["choir"], timeout_seconds=90)
    assert second.services["choir"].state == "done"
    until(lambda: (deployment.store.status(first.id) or {})["choir"].state == "done", what="both are done")
    found = deployment.records(service="choir", event="session", sub=sub)
    assert len(found) == len({record["id"] for record in found}) == 2
    pids = {record["pid"] for record in found}
    assert len(pids) == 2
    assert deployment.pid("choir") not in pids


def test_trap_14_pyjwt_is_new_enough() -> None:
    """Trap 14: what is installed with the library can be no PyJWT below its floor."""
    from importlib.metadata import requires

    (wanted,) = [each for each in requires("knell") or () if each.lower().startswith("pyjwt")]
    assert wanted.lower().replace(" ", "") == "pyjwt[crypto]>=2.15"


def _noting(told: list[str], name: str) -> Callable[[Notice], None]:
    return lambda notice: told.append(name)


def _signed(settings: Settings) -> str:
    now, batch_id = time.time(), new_batch_id("e")
    notice = Notice(batch_id=batch_id, n=0, cause=Cause.EXPIRED, ends=frozenset({"session"}), scope=Scope.SESSION,
                    at=now, iss=ISS, sid="s", sub="u")  # fmt: skip
    batch = NoticeBatch(id=batch_id, entries=[notice], issued_at=now, expires_at=now + 600)
    key = notice_key(settings)
    assert key is not None
    return key.sign(batch.as_payload(signer=NOTIFIER, audience=settings.audience), typ=NOTICE_TYPE)
