"""The embedded broker: routing, leases, dead letters, delays, and what survives a kill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import amqp
import pytest
from kombu import Connection

from knell import embedded
from knell.embedded_file import Owner
from knell.errors import InvalidSettings

DEADLINE_SECONDS = 20.0


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_SECONDS:g} s"
        time.sleep(0.01)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of a new file."""
    embedded.register()
    return f"knell+sqlite:///{tmp_path / 'in' / 'broker.db'}"


@pytest.fixture
def clock() -> Clock:
    """The clock that `channel` goes by."""
    return Clock()


@pytest.fixture
def channel(url: str, clock: Clock) -> Iterator[Any]:
    """A channel on it."""
    with Connection(url, transport_options={"clock": clock}) as connection:
        yield connection.channel()


def publish(channel: Any, body: str, exchange: str, key: str = "", *, mandatory: bool = False, **headers: Any) -> None:
    made = channel.prepare_message(body, content_type="text/plain", content_encoding="utf-8", headers=headers)
    channel.basic_publish(made, exchange, key, mandatory=mandatory)


def bodies(channel: Any, queue: str) -> list[str]:
    """Take everything that is ready."""
    found = []
    while (message := channel.basic_get(queue, no_ack=True)) is not None:
        found.append(message.body if isinstance(message.body, str) else message.body.decode())
    return found


def ready(channel: Any, queue: str) -> int:
    count: int = channel.queue_declare(queue, passive=True).message_count
    return count


def bound(channel: Any, queue: str, exchange: str, kind: str, *keys: str, **arguments: Any) -> None:
    channel.exchange_declare(exchange, kind, durable=True)
    channel.queue_declare(queue, arguments={name.replace("_", "-"): value for name, value in arguments.items()})
    for key in keys:
        channel.queue_bind(queue, exchange, key)


@pytest.mark.parametrize(
    ("kind", "binding", "key", "routed"),
    [
        ("direct", "a.b", "a.b", True),
        ("direct", "a.*", "a.b", False),
        ("topic", "a.*", "a.b", True),
        ("topic", "a.*", "a.b.c", False),
        ("topic", "a.*", "a", False),
        ("topic", "#.b", "b", True),
        ("topic", "#.b", "x.y.b", True),
        ("topic", "#.b", "xb", False),
        ("topic", "a.#.b", "a.b", True),
        ("topic", "#", "", True),
        ("topic", "retry.eu-billing", "retry.billing", False),
        ("topic", "receipt.*", "receipt.s+p", True),
        ("fanout", "", "anything", True),
    ],
)
def test_routing(channel: Any, kind: str, binding: str, key: str, routed: bool) -> None:
    """Direct, topic and fanout exchanges route as AMQP says."""
    bound(channel, "q", "x", kind, binding)
    publish(channel, "m", "x", key)
    assert ready(channel, "q") == int(routed)


def test_a_fanout_copies_to_each_queue_once(channel: Any) -> None:
    """Each bound queue has one copy, however often it is bound."""
    for queue in ("q1", "q2"):
        bound(channel, queue, "x", "fanout", "", "again")
    publish(channel, "m", "x")
    assert [bodies(channel, queue) for queue in ("q1", "q2")] == [["m"], ["m"]]


def test_bindings_are_shared_and_stay(url: str, channel: Any) -> None:
    """Another connection sees what was declared here, and messages outlive their publisher."""
    bound(channel, "q", "x", "topic", "k")
    with Connection(url, transport_options={"clock": channel.file._clock}) as other:
        publish(other.channel(), "m", "x", "k")
    assert bodies(channel, "q") == ["m"]


def test_unroutable_messages(channel: Any) -> None:
    """Dropped; with mandatory an error; taken by the alternate exchange where there is one; no exchange is an error."""
    channel.exchange_declare("x", "topic")
    publish(channel, "m", "x", "k")
    with pytest.raises(amqp.exceptions.ChannelError) as failure:
        publish(channel, "m", "x", "k", mandatory=True)
    assert failure.value.reply_code == 312
    with pytest.raises(amqp.exceptions.NotFound):
        publish(channel, "m", "nowhere", "k")
    bound(channel, "lost", "unrouted", "fanout", "")
    channel.exchange_declare("y", "fanout", arguments={"alternate-exchange": "unrouted"})
    publish(channel, "m", "y", mandatory=True)
    assert bodies(channel, "lost") == ["m"]


def test_declaring_again_with_other_arguments_is_refused(channel: Any) -> None:
    """A second declaration has to agree with the first."""
    bound(channel, "q", "x", "topic", "k", x_message_ttl=1000)
    bound(channel, "q", "x", "topic", "k", x_message_ttl=1000)
    with pytest.raises(amqp.exceptions.PreconditionFailed):
        channel.queue_declare("q", arguments={})
    with pytest.raises(amqp.exceptions.PreconditionFailed):
        channel.exchange_declare("x", "fanout")


def test_passive_declarations_ask(channel: Any) -> None:
    """Passive declare counts what is ready, or raises NotFound."""
    with pytest.raises(amqp.exceptions.NotFound):
        channel.queue_declare("q", passive=True)
    with pytest.raises(amqp.exceptions.NotFound):
        channel.exchange_declare("x", passive=True)
    bound(channel, "q", "x", "fanout", "")
    channel.exchange_declare("x", passive=True)
    publish(channel, "m", "x")
    assert ready(channel, "q") == 1


def test_purge_and_delete(channel: Any) -> None:
    """Purge empties a queue; delete takes its bindings with it; both say how many messages there were."""
    bound(channel, "q", "x", "fanout", "")
    publish(channel, "m", "x")
    assert channel.queue_purge("q") == 1
    publish(channel, "m", "x")
    assert channel.queue_delete("q") == 1
    assert channel.queue_delete("q") == 0
    assert list(channel.list_bindings()) == []
    channel.exchange_delete("x")
    with pytest.raises(amqp.exceptions.NotFound):
        channel.exchange_declare("x", passive=True)


def test_messages_come_in_order_and_once(url: str, channel: Any) -> None:
    """What one consumer holds, no other is given; a requeued message goes back to its place, as redelivered."""
    bound(channel, "q", "x", "fanout", "")
    for body in "abc":
        publish(channel, body, "x")
    first = channel.basic_get("q")
    assert not first.delivery_info["redelivered"]
    with Connection(url, transport_options={"clock": channel.file._clock}) as connection:
        other: Any = connection.channel()
        second = other.basic_get("q")
        assert bytes(second.body) == b"b"
        first.requeue()
        again = other.basic_get("q")
        assert bytes(again.body) == b"a"
        assert again.delivery_info["redelivered"]
        second.ack()
        again.ack()
        assert bodies(other, "q") == ["c"]


def test_a_closed_channel_gives_everything_back(url: str, channel: Any) -> None:
    """Closing releases what was not answered, and an answer after it is an error."""
    bound(channel, "q", "x", "fanout", "")
    publish(channel, "m", "x")
    with Connection(url, transport_options={"clock": channel.file._clock}) as connection:
        other: Any = connection.channel()
        message = other.basic_get("q")
        assert ready(channel, "q") == 0
        other.close()
    assert ready(channel, "q") == 1
    with pytest.raises(amqp.exceptions.RecoverableConnectionError):
        message.ack()


def test_an_abandoned_channel_gives_everything_back(url: str, channel: Any) -> None:
    """A channel that was dropped without being closed loses its leases when it is gone."""
    bound(channel, "q", "x", "fanout", "")
    publish(channel, "m", "x")
    owner = Owner()
    assert channel.file.fetch(["q"], owner.token, limit=1)
    channel.file.maintain()
    assert ready(channel, "q") == 0
    del owner
    channel.file.maintain()
    assert ready(channel, "q") == 1


def test_several_acks_at_once(channel: Any) -> None:
    """`multiple` answers everything up to that delivery, in the order of delivery."""
    bound(channel, "q", "x", "fanout", "")
    for body in "abcd":
        publish(channel, body, "x")
    held = [channel.basic_get("q") for _ in range(4)]
    held[2].ack(multiple=True)
    channel.basic_recover(requeue=True)
    assert bodies(channel, "q") == ["d"]


def test_rejected_messages_are_dead_lettered(channel: Any) -> None:
    """A reject writes x-death as RabbitMQ does: the last queue first, counted, with where it came from."""
    bound(channel, "dead", "dlx", "fanout", "", x_dead_letter_exchange="x")
    bound(channel, "q", "x", "topic", "k", x_dead_letter_exchange="dlx")
    publish(channel, "m", "x", "k", kept="yes")
    channel.basic_get("q").reject()
    message = channel.basic_get("dead")
    (death,) = message.headers["x-death"]
    assert (death["queue"], death["reason"], death["count"]) == ("q", "rejected", 1)
    assert (death["exchange"], death["routing-keys"]) == ("x", ["k"])
    assert (message.headers["x-first-death-queue"], message.headers["kept"]) == ("q", "yes")
    assert (message.delivery_info["exchange"], message.delivery_info["routing_key"]) == ("dlx", "k")
    message.reject()
    channel.basic_get("q").reject()
    deaths = channel.basic_get("dead").headers["x-death"]
    assert [(death["queue"], death["count"]) for death in deaths] == [("q", 2), ("dead", 1)]


def test_without_a_dead_letter_exchange_a_reject_drops(channel: Any) -> None:
    """Rejected is gone where the queue names no exchange, or one that does not exist."""
    for number, arguments in enumerate([{}, {"x-dead-letter-exchange": "nowhere"}]):
        channel.queue_declare(f"q{number}", arguments=arguments)
        publish(channel, "m", "", f"q{number}")
        channel.basic_get(f"q{number}").reject()
        assert ready(channel, f"q{number}") == 0


def test_old_messages_expire(channel: Any, clock: Clock) -> None:
    """Beyond its queue's age limit a message is nobody's, and is dead-lettered as expired."""
    bound(channel, "dead", "dlx", "fanout", "")
    bound(channel, "q", "x", "fanout", "", x_message_ttl=1000, x_dead_letter_exchange="dlx")
    publish(channel, "m", "x")
    clock.now += 0.999
    assert ready(channel, "q") == 1
    clock.now += 0.001
    assert ready(channel, "q") == 0
    assert channel.basic_get("q") is None
    channel.file.maintain()
    message = channel.basic_get("dead")
    assert message.headers["x-death"][0]["reason"] == "expired"


def test_delayed_messages_are_invisible_until_their_time(channel: Any, clock: Clock) -> None:
    """The header decides to the millisecond; what is due first comes first; an eta in the past is now."""
    bound(channel, "q", "x", "fanout", "")
    for body, delay in (("late", 2.0), ("early", 1.0), ("past", -5.0)):
        headers: dict[str, Any] = {embedded.ETA_HEADER: clock.now + delay}
        publish(channel, body, "x", **headers)
    assert bodies(channel, "q") == ["past"]
    clock.now += 0.999
    assert bodies(channel, "q") == []
    clock.now += 1.001
    assert bodies(channel, "q") == ["early", "late"]


def test_passing_queues_go_with_their_channel(url: str, channel: Any) -> None:
    """An exclusive or auto-delete queue lives as long as the channel that declared it."""
    with Connection(url) as connection:
        other: Any = connection.channel()
        other.queue_declare("events", auto_delete=True)
        assert ready(channel, "events") == 0
    with pytest.raises(amqp.exceptions.NotFound):
        channel.queue_declare("events", passive=True)


def test_the_prefetch_limit_is_kept(url: str) -> None:
    """A consumer is given no more unanswered messages than it asked for."""
    with Connection(url) as connection:
        channel: Any = connection.channel()
        bound(channel, "q", "x", "fanout", "")
        for number in range(5):
            publish(channel, str(number), "x")
        got: list[Any] = []
        channel.basic_qos(0, 2, False)
        channel.basic_consume("q", no_ack=False, callback=got.append, consumer_tag="c")
        connection.drain_events(timeout=1)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.05)
        assert len(got) == 2
        assert got[0].delivery_info["consumer_tag"] == "c"
        got[0].ack()
        connection.drain_events(timeout=1)
        assert len(got) == 3
        channel.basic_cancel("c")
        got[1].ack()


def test_many_processes_declare_at_once(url: str) -> None:
    """Eight processes that open a new file and declare the same things at the same time all succeed."""
    code = """
import sys
from kombu import Connection
import knell.embedded
with Connection(sys.argv[1]) as connection:
    channel = connection.channel()
    channel.exchange_declare("x", "fanout")
    for number in range(20):
        channel.queue_declare(f"q{number}", arguments={"x-message-ttl": 1000})
        channel.queue_bind(f"q{number}", "x", "")
"""
    children = [subprocess.Popen([sys.executable, "-c", code, url]) for _ in range(8)]
    assert [child.wait(60) for child in children] == [0] * 8
    with Connection(url) as connection:
        channel: Any = connection.channel()
        publish(channel, "m", "x")
        assert sum(ready(channel, f"q{number}") for number in range(20)) == 20


CONSUMER = """
import sys
from kombu import Connection
import knell.embedded
with Connection(sys.argv[1]) as connection:
    channel = connection.channel()
    def got(message):
        print("got", flush=True)
        if sys.argv[2] == "ack":
            message.ack()
    channel.basic_qos(0, 10, False)
    channel.basic_consume("q", no_ack=False, callback=got, consumer_tag="c")
    while True:
        connection.drain_events()
"""


def test_a_killed_consumer_loses_nothing(url: str) -> None:
    """kill -9 of a consumer that holds messages: another one, which runs already, is given all of them."""
    with Connection(url) as connection:
        channel: Any = connection.channel()
        bound(channel, "q", "x", "fanout", "")
        for number in range(10):
            publish(channel, str(number), "x")
        child = subprocess.Popen([sys.executable, "-c", CONSUMER, url, "hold"], stdout=subprocess.PIPE)
        assert child.stdout is not None
        for _ in range(10):
            child.stdout.readline()
        got: list[Any] = []
        channel.basic_consume("q", no_ack=False, callback=got.append, consumer_tag="c")
        assert ready(channel, "q") == 0
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()

        def all_there() -> bool:
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
            return len(got) == 10

        eventually(all_there, "the messages of the killed consumer")
        assert all(message.delivery_info["redelivered"] for message in got)


def test_killed_consumers_under_load_lose_nothing(url: str) -> None:
    """Consumers that ack are killed in the middle of it: what was not acked is still there, and nothing twice."""
    with Connection(url) as connection:
        channel: Any = connection.channel()
        bound(channel, "q", "x", "fanout", "")
        children = [
            subprocess.Popen([sys.executable, "-c", CONSUMER, url, "ack"], stdout=subprocess.PIPE) for _ in range(2)
        ]
        seen: list[bytes] = []
        begun = [threading.Event() for _ in children]
        readers = [
            threading.Thread(target=read_lines, args=(child, seen, event))
            for child, event in zip(children, begun, strict=True)
        ]
        for reader in readers:
            reader.start()
        published = 0
        # Until both are at work, whichever was there first.
        while not all(event.is_set() for event in begun):
            publish(channel, str(published), "x")
            published += 1
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        for reader in readers:
            reader.join()
        channel.file.maintain()
        left = bodies(channel, "q")
        assert len(set(left)) == len(left)
        # A killed consumer had printed at most one message more than it had acked.
        assert published <= len(left) + len(seen) <= published + len(children)


def read_lines(child: subprocess.Popen[bytes], seen: list[bytes], begun: threading.Event) -> None:
    """Read what a consumer prints, to its end."""
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            seen.append(line)
            begun.set()


def test_threads_publish_and_ack_on_one_file(url: str) -> None:
    """Acks from other threads than the consumer's are safe, beside publishers with connections of their own."""
    total = 200

    def produce(start: int) -> None:
        with Connection(url) as mine:
            channel: Any = mine.channel()
            for number in range(start, start + total // 4):
                publish(channel, str(number), "x")

    with Connection(url) as connection:
        channel: Any = connection.channel()
        bound(channel, "q", "x", "fanout", "")
        got: list[str] = []
        ackers: list[threading.Thread] = []

        def receive(message: Any) -> None:
            got.append(bytes(message.body).decode())
            ackers.append(threading.Thread(target=message.ack))
            ackers[-1].start()

        channel.basic_consume("q", no_ack=False, callback=receive, consumer_tag="c")
        producers = [threading.Thread(target=produce, args=(n * total // 4,)) for n in range(4)]
        for thread in producers:
            thread.start()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(got) < total and time.monotonic() < deadline:
            connection.drain_events(timeout=DEADLINE_SECONDS)
        for thread in producers + ackers:
            thread.join()
        assert sorted(map(int, got)) == list(range(total))
        channel.close()
        assert ready(connection.channel(), "q") == 0


WORKER = """
import sys
from pathlib import Path
from celery import Celery
from kombu import Exchange, Queue
import knell.embedded
folder = Path(sys.argv[1])
app = Celery("embedded", broker=f"knell+sqlite:///{folder}/broker.db")
app.conf.update(
    worker_enable_remote_control=False, task_ignore_result=True, task_acks_late=True, task_default_queue="q",
    task_queues=[Queue("q", Exchange("x", type="topic"), routing_key="k")],
    worker_send_task_events=sys.argv[3] == "events",
)
@app.task(name="write")
def write(number):
    with (folder / "out").open("a") as out:
        out.write(f"{number}\\n")
if sys.argv[4] == "work":
    app.worker_main(["worker", "--pool", sys.argv[2], "--concurrency", "2", "--loglevel", "WARNING"])
else:
    for number in range(20):
        write.apply_async((number,), queue="q")
"""


@pytest.mark.parametrize("pool", ["solo", "threads"])
@pytest.mark.parametrize("events", ["events", "quiet"])
def test_under_a_celery_worker(tmp_path: Path, pool: str, events: str) -> None:
    """A Celery worker runs each task once, and shuts down warm with nothing left behind."""
    script = tmp_path / "app.py"
    script.write_text(WORKER)
    command = [sys.executable, str(script), str(tmp_path), pool, events]
    subprocess.run([*command, "send"], check=True, timeout=60)
    out = tmp_path / "out"
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen([*command, "work"], stdout=log, stderr=log)
    try:
        eventually(lambda: out.exists() and len(out.read_text().split()) >= 20, "twenty tasks")
    finally:
        worker.terminate()
        code = worker.wait(30)
    assert code == 0, (tmp_path / "log").read_text()
    assert sorted(map(int, out.read_text().split())) == list(range(20))
    with Connection(f"knell+sqlite:///{tmp_path}/broker.db") as connection:
        assert ready(connection.channel(), "q") == 0


def test_a_url_without_a_path_is_refused() -> None:
    """The error says what a URL looks like."""
    with pytest.raises(InvalidSettings, match="knell\\+sqlite:///path"):
        Connection("knell+sqlite://").connect()
