"""A raw token is never stored, logged, shown or put on the broker: a whole run, and then a search of everything."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from amqp.exceptions import NotFound

from knell import Issuer, messages, topology
from knell.connection import connect
from knell.keys import SigningKey
from knell.settings import Settings
from tests.commandline import Knell
from tests.deployment import ROOT, Deployment, make_keys, until
from tests.servers import RabbitServer, RedisServer, free_port, start_rabbitmq, start_redis

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis, pytest.mark.timeout(240)]

ISS = "https://auth.example"
SERVICES = ("shop", "leaky")
SPY = "spy"
KEY = SigningKey.generate()
# Each stands in a URL or a variable that processes are given, and none in what they write.
BROKER_PASSWORD, STORE_PASSWORD, FLOWER_PASSWORD = (uuid4().hex for _ in range(3))
# A part of a token that is shorter says nothing by itself.
SHORTEST_PART = 20

Found = Mapping[str, bytes]


class Run:
    """A deployment on servers of its own, whose folders are searched afterwards, and every raw token that was made."""

    def __init__(self, directory: Path, secret: Path, rabbitmq: RabbitServer, redis_server: RedisServer) -> None:
        self.directory, self.rabbitmq, self.redis_server = directory, rabbitmq, redis_server
        self.tokens: list[str] = []
        # Outside of what is searched: where a handler gets a raw token from.
        self.handed = secret / "tokens"
        self.handed.write_text("")
        with redis.Redis.from_url(redis_server.url) as client:
            client.config_set("requirepass", STORE_PASSWORD)
        broker_url = rabbitmq.vhost()
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        keys = secret / "keys"
        keys.mkdir()
        notice_key, trust = make_keys(keys)
        self.settings = Settings(
            namespace=f"n{uuid4().hex[:10]}",
            home=directory / "home",
            broker_url=rabbitmq.add_user(broker_url, "runner", BROKER_PASSWORD, everything),
            broker_api_url=rabbitmq.api_url,
            store_url=f"redis://:{STORE_PASSWORD}@127.0.0.1:{redis_server.port}/0",
            notice_key=notice_key,
            trust=trust,
            sweep_interval_seconds=1.0,
        )
        logs = directory / "processes"
        logs.mkdir()
        self.deployment = Deployment(logs, self.settings)
        self.deployment.prepare(SERVICES)
        self.flower_port = free_port()
        self._flower: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """The spy first, then Flower, the notifier with beat, and the services."""
        self._listen_in()
        with (self.deployment.directory / "flower.log").open("wb") as log:
            self._flower = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "tasks", "flower", f"--port={self.flower_port}",
                 "--address=127.0.0.1"],
                cwd=ROOT, stdout=log, stderr=log,
                env={**self.deployment.inherited, "FLOWER_BASIC_AUTH": f"operator:{FLOWER_PASSWORD}"},
            )  # fmt: skip
        until(lambda: self.flower("/healthcheck") is not None, seconds=60, what="Flower answers")
        self.deployment.start_notifier()
        self.deployment.start_service("shop")
        self.deployment.start_service("leaky", app="leaky", LEAKY_TOKENS=str(self.handed))

    def stop(self) -> None:
        """End every process and server."""
        if self._flower is not None:
            self._flower.terminate()
            self._flower.wait(20)
        self.redis_server.resume()
        self.deployment.stop()
        self.redis_server.stop()
        self.rabbitmq.kill()  # ending in good order takes it six seconds
        self.rabbitmq.stop()

    def made(self, token: str) -> str:
        """Remember a raw token: it is what is searched for."""
        self.tokens.append(token)
        return token

    # ---- where a token might be

    def broker(self) -> Found:
        """Every message that went through any exchange since the start: the spy has a copy."""
        found: dict[str, bytes] = {}
        with connect(self.settings) as connection:
            channel: Any = connection.channel()
            while (message := channel.basic_get(SPY, no_ack=True)) is not None:
                body = message.body if isinstance(message.body, bytes) else message.body.encode()
                about = repr((message.delivery_info, message.properties)).encode()
                found[f"message {len(found)} of {message.delivery_info['exchange']}"] = about + body
        return found

    def store(self) -> Found:
        """Every key of the store, and what it holds."""
        with redis.Redis.from_url(self.settings.store_url) as client:
            # What a time-to-live takes away meanwhile is in the append-only file all the same.
            return {
                repr(key): key + repr(_value(client, key)).encode() + (client.dump(key) or b"")
                for key in client.scan_iter()
            }

    def files(self, *, without: Iterable[str] = ()) -> Found:
        """Every file that a process or server has written: logs, the append-only file, RabbitMQ's data."""
        found: dict[str, bytes] = {}
        for path in sorted(self.directory.rglob("*")):
            if path.is_file() and not set(without) & set(path.relative_to(self.directory).parts):
                with suppress(FileNotFoundError):  # servers tidy up
                    found[str(path.relative_to(self.directory))] = path.read_bytes()
        return found

    def logs(self) -> Found:
        """What this deployment's own processes have written."""
        return {path.name: path.read_bytes() for path in self.deployment.directory.glob("*.log")}

    def flower_pages(self) -> Found:
        """Flower's API and every page that it has."""
        tasks = json.loads(self.flower("/api/tasks") or b"{}")
        workers = {task["worker"] for task in tasks.values()}
        pages = ["/api/tasks", "/api/workers", "/api/task/types", "/", "/workers", "/tasks", "/broker", "/metrics"]
        pages += [f"/tasks/datatable?draw=1&start=0&length=500&{_COLUMNS}"]
        pages += [f"/{kind}/{uuid}" for uuid in tasks for kind in ("task", "api/task/info")]
        pages += [f"/worker/{worker}" for worker in workers]
        return {page: self.flower(page) or b"" for page in pages}

    def flower(self, page: str) -> bytes | None:
        """What Flower answers the operator; None if it does not."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.flower_port}{page}")
        basic = base64.b64encode(f"operator:{FLOWER_PASSWORD}".encode()).decode()
        request.add_header("Authorization", f"Basic {basic}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            return error.read()
        except OSError:
            return None

    def command_line(self, *revocations: str) -> Found:
        """What `knell` answers, for people and for programs, and where it is asked wrong."""
        knell = Knell(self.settings)
        asked = [("parked", "list"), ("doctor",), ("services", "list"), ("status", "unknown")]
        asked += [("status", each) for each in revocations]
        asked += [("parked", "show", each.id) for each in self.deployment.store.parked(limit=1000)]
        answers = {each: (knell.run(*each), knell.run(*each, "--json")) for each in asked}
        found = {" ".join(each): f"{plain.output}{json_.output}".encode() for each, (plain, json_) in answers.items()}
        # As a process of its own, with the log that it sets up for itself.
        return found | {"knell doctor": self._knell("doctor"), "knell parked list": self._knell("parked", "list")}

    def processes(self) -> Found:
        """The arguments of every process of the deployment, as any user of the machine sees them."""
        assert self._flower is not None
        pids = [self._flower.pid, *(self.deployment.pid(name) for name in ("notifier", *SERVICES))]
        return {f"arguments of {pid}": Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}

    def _knell(self, *arguments: str) -> bytes:
        done = subprocess.run(
            [sys.executable, "-c", "from knell.cli import main; main()", *arguments],
            env=self.deployment.inherited, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def _listen_in(self) -> None:
        """Bind a queue to every exchange, those of the delay ladder and of events included."""
        _, _, vhost = self.settings.broker_url.rpartition("/")
        with connect(self.settings) as connection:
            channel: Any = connection.channel()
            channel.exchange_declare(topology.EVENTS, "topic", durable=True, auto_delete=False)
            channel.queue_declare(SPY, durable=True, auto_delete=False)
            for exchange in self.rabbitmq.api("GET", f"/api/exchanges/{vhost}"):
                if exchange["name"] and not exchange["name"].startswith("amq."):
                    channel.queue_bind(SPY, exchange["name"], "#" if exchange["type"] == "topic" else exchange["name"])


_COLUMNS = "order%5B0%5D%5Bcolumn%5D=0&order%5B0%5D%5Bdir%5D=asc&columns%5B0%5D%5Bdata%5D=name&search%5Bvalue%5D="


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    directory = tmp_path_factory.mktemp("searched")
    rabbitmq = start_rabbitmq(directory / "rabbitmq")
    try:
        redis_server = start_redis(directory / "redis")
    except BaseException:
        rabbitmq.stop()
        raise
    run = Run(directory, tmp_path_factory.mktemp("secret"), rabbitmq, redis_server)
    try:
        run.start()
        yield run
    finally:
        run.stop()


def test_no_raw_token_is_anywhere_after_a_whole_run(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """Issue, refresh, expire, revoke, fail, retry, park, the store away, poison: no part of a token is left behind."""
    revocations = _live(run)
    written = capfd.readouterr()
    everywhere = {
        **run.broker(), **run.store(), **run.files(), **run.flower_pages(), **run.command_line(*revocations),
        **run.processes(), "this process": (written.out + written.err).encode(),
    }  # fmt: skip
    _check_that_the_search_finds(run, everywhere, revocations)
    assert _where(everywhere, _parts(run.tokens)) == []

    poison = _poison(run)
    # Whoever sent it has put it on the broker, and into the broker's files. There it may be, and nowhere else.
    everywhere = {
        **run.store(), **run.files(without=["mnesia"]), **run.flower_pages(), **run.command_line(*revocations)
    }  # fmt: skip
    assert _where(everywhere, _parts([*run.tokens, *poison])) == []
    # Signed notices are no tokens, and still have no business in a log or in Flower.
    shown = {**run.logs(), **run.flower_pages()}
    assert _where(shown, [b"eyJ"]) == []
    secrets = [each.encode() for each in (BROKER_PASSWORD, STORE_PASSWORD, FLOWER_PASSWORD)]
    assert _where({**shown, **run.processes(), **run.command_line()}, secrets) == []


def _live(run: Run) -> list[str]:
    """Everything that can happen to a token, once. Returns the ids of the revocations."""
    with Issuer(ISS, KEY, settings=run.settings) as issuer:

        def issue(sub: str, *, ttl_seconds: float = 600) -> Any:
            issued = issuer.issue({"sub": sub, "sid": f"{sub}-{uuid4()}", "aud": "api"}, ttl_seconds=ttl_seconds)
            run.made(issued.token)
            return issued

        short = issue("expires", ttl_seconds=1.5)
        refreshed = issuer.refresh(short.token, ttl_seconds=2.5)
        run.made(refreshed.token)
        by_token, by_session, by_subject = issue("t"), issue("s"), issue("u")
        waiting: Any = {"wait_for": ["shop"], "timeout_seconds": 30}
        revoked = [
            issuer.revoke("token", {"jti": by_token.ref.jti}, **waiting),
            issuer.revoke("session", {"sid": by_session.ref.sid}, reason="lost phone", **waiting),
            issuer.revoke("subject", {"sub": by_subject.ref.sub}, **waiting),
        ]
        # Neither a wrong call nor the error that it raises writes a token down.
        with pytest.raises(Exception, match="signature") as caught:
            issuer.track(run.made(SigningKey.generate().sign({"iss": ISS, "sub": "forged", "exp": 2e9}, typ="JWT")))
        assert not _where({"error": repr(caught.value).encode()}, _parts(run.tokens))
        # Handlers that fail with a raw token in their hands: retried and parked, or parked at once.
        for sub in ("leak", "give-up"):
            leaked = issue(sub)
            with run.handed.open("a") as handed:
                handed.write(leaked.token + "\n")
            issuer.revoke("session", {"sid": leaked.ref.sid})
            until(lambda sid=leaked.ref.sid: _is_parked(run, sid), what=f"{sub} is parked")
        # With the store away, commands go by the broker.
        run.redis_server.suspend()
        queued = issue("queued")
        assert queued.recorded == "queued"
        run.redis_server.resume()
        until(lambda: issuer.status(revoked[0].id) is not None, what="the store is back")
        run.deployment.wait_for_records(1, event="session", sid=short.ref.sid)
        last = issue("last", ttl_seconds=1.5)
        run.deployment.wait_for_records(1, event="session", sid=last.ref.sid)
    return [each.id for each in revoked]


def _is_parked(run: Run, sid: str | None) -> bool:
    records = run.deployment.records(event="session", sid=sid)
    ids = {each.notice_id for each in run.deployment.store.parked(service="leaky")}
    return any(record["id"] in ids for record in records)


def _poison(run: Run) -> list[str]:
    """Messages with a raw token wherever a message has a place for one. Returns these tokens."""
    tokens = []

    def token(name: str) -> str:
        tokens.append(KEY.sign({"iss": ISS, "sub": f"poison-{name}", "jti": uuid4().hex, "exp": 2e9}, typ="JWT"))
        return tokens[-1]

    task = messages.notice("a.b.c", shown="poison")
    json_body: Callable[[Any], bytes] = lambda value: json.dumps(value).encode()  # noqa: E731
    to_all: list[tuple[str, str, bytes, dict[str, Any]]] = [
        (topology.NOTICES, "", json_body({"token": token("body")}), dict(task.headers)),
        (topology.NOTICES, "", json_body([[token("notice"), None, 0], {}, {}]), dict(task.headers)),
        (topology.NOTICES, "", b"\x00\xff " + token("bytes").encode() + b"\n\x80", dict(task.headers)),
        (topology.NOTICES, "", task.body, {**task.headers, "task": token("task")}),
        (topology.NOTICES, "", task.body, {**task.headers, "argsrepr": f"of {token('argsrepr')}"}),
        (topology.NOTICES, "", task.body, {**task.headers, "id": token("id")[:200]}),
        (topology.NOTICES, "", task.body, {**task.headers, "root_id": token("root")[-200:]}),
        (topology.NOTICES, "", json_body([["a.b.c", [token("todo")], 0], {}, {}]), dict(task.headers)),
        (topology.NOTICES, "", json_body([["a.b.c"], {"jws": token("kwargs")}, {}]), dict(task.headers)),
        (topology.COMMANDS, topology.COMMANDS, json_body([[token("track")], {}, {}]),
         dict(messages.track_command("x", shown="1 token").headers)),
        (topology.RECEIPTS, "receipt.shop", json_body({"v": 1, "batch_id": token("batch")}), {}),
        (topology.RECEIPTS, "parked.shop", json_body({"v": 1, "jws": token("jws"), "errors": {"0": "x"}}), {}),
        (topology.RECEIPTS, "receipt.shop", token("bare").encode(), {}),
    ]  # fmt: skip
    with connect(run.settings) as connection:
        channel: Any = connection.channel()
        for exchange, key, body, headers in to_all:
            made = channel.prepare_message(
                body, content_type="application/json", content_encoding="utf-8", headers=headers,
                properties={"correlation_id": "c", "delivery_mode": 2},
            )  # fmt: skip
            channel.basic_publish(made, exchange, key)
    # Each that went to all is refused by every service; the rest by the notifier.
    copies = sum(len(SERVICES) if exchange == topology.NOTICES else 1 for exchange, *_ in to_all)

    def all_are_parked() -> bool:
        return sum(each.body is not None for each in run.deployment.store.parked(limit=1000)) >= copies

    until(all_are_parked, what=f"{copies} poisoned messages are parked")
    for queue in (topology.DEAD, topology.RECEIPTS, *map(topology.service_queue, SERVICES)):
        until(lambda queue=queue: _depth(run, queue) == 0, what=f"{queue} is empty")
    return tokens


def _depth(run: Run, queue: str) -> int | None:
    with connect(run.settings) as connection:
        channel: Any = connection.channel()
        try:
            return int(channel.queue_declare(queue, passive=True).message_count)
        except NotFound:
            return None


def _check_that_the_search_finds(run: Run, everywhere: Found, revocations: list[str]) -> None:
    """A search that looks in the wrong places finds nothing either: what has to be there is there."""
    assert len(run.tokens) >= 9
    seen = b"\n".join(found for name, found in everywhere.items() if name.startswith("message "))
    for task in (messages.EXPIRE, messages.TERMINATE, messages.TRACK):
        assert f"'{task}'".encode() in seen
    assert KEY.kid.encode() not in seen  # the notice key signs here
    assert b'"retrying":[0]' in seen
    assert b"task-succeeded" in seen
    assert re.search(rb'"parked":\[0\]', seen)
    assert _where(run.files(), [revocations[0].encode()])
    assert _where(run.store(), [b"lost phone"])
    assert b"[token]" in run.logs()["leaky.log"]
    assert b"look_up_failed" in run.logs()["leaky.log"]
    assert any(b"[token]" in found for name, found in everywhere.items() if name.startswith("parked show"))
    assert b"knell.terminate" in everywhere["/api/tasks"]


def _parts(tokens: Iterable[str]) -> list[bytes]:
    """Each part that is long enough to say something, as it is and in base64: the store keeps bodies in it."""
    parts = {part.encode() for token in tokens for part in token.split(".") if len(part) > SHORTEST_PART}
    return sorted(form for part in parts for form in (part, *_in_base64(part)))


def _in_base64(part: bytes) -> Iterator[bytes]:
    """What it looks like inside of something longer, wherever it begins there."""
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + part).rstrip(b"=")
        inner = encoded[(0, 2, 3)[before] : -2]
        yield inner
        yield inner.translate(bytes.maketrans(b"+/", b"-_"))


def _where(everywhere: Found, wanted: Iterable[bytes]) -> list[tuple[str, bytes]]:
    """Where any of these stands, with the words around it."""
    pattern = re.compile(b"|".join(map(re.escape, wanted)))
    found = ((name, pattern.search(text), text) for name, text in everywhere.items())
    return [(name, text[max(0, hit.start() - 60) : hit.end() + 10]) for name, hit, text in found if hit]


def _value(client: Any, key: bytes) -> Any:
    reads: Mapping[bytes, Callable[[], Any]] = {
        b"string": lambda: client.get(key),
        b"hash": lambda: client.hgetall(key),
        b"list": lambda: client.lrange(key, 0, -1),
        b"set": lambda: client.smembers(key),
        b"zset": lambda: client.zrange(key, 0, -1, withscores=True),
        b"stream": lambda: client.xrange(key),
    }
    kind = client.type(key)
    return None if kind == b"none" else reads[kind]()
