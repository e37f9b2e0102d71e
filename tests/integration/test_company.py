"""docker-compose.yml without Docker: its words, on a private RabbitMQ and Redis, with the accounts that it makes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from websockets.exceptions import ConnectionClosed

from knell import Issuer, Settings
from knell.keys import SigningKey
from tests.deployment import ROOT, until
from tests.integration.test_services import DEADLINE_SECONDS, ISSUER, SECRET, Company, greeting, live, log_in, me
from tests.servers import Process, RabbitServer, free_port
from tests.unit.test_compose import REFERENCE, SERVICES, example

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis, pytest.mark.timeout(240)]

PROGRAMS = Path(sys.executable).parent
SERVICE_NAMES = ("shop", "gateway", "partner")
WORKERS = ("notifier", *SERVICE_NAMES)
WEBS = ("shop-web", "gateway-web", "flower")
# What a process writes when it is ready.
READY = r"\S+@\S+ ready\.|Uvicorn running on|Visit me at|beat: Starting"


class Compose:
    """The services of docker-compose.yml, with this machine's places in place of the containers'.

    Attributes:
        ports: where each web listens.
        vhost: the virtual host on the broker.
        settings: what an issuer is pointed at.
    """

    def __init__(self, home: Path, broker: RabbitServer, redis_url: str, webhook_url: str) -> None:
        self.ports = {name: free_port() for name in WEBS}
        self.vhost = broker.vhost().rpartition("/")[2]
        self._home = home
        self._env_file = {name: uuid4().hex for name in example()} | {
            "FLOWER_BASIC_AUTH": "operator:secret",
            "AUTH_ISSUER": ISSUER,
            "PARTNER_WEBHOOK_URL": webhook_url,
            "PARTNER_WEBHOOK_SECRET": SECRET,
        }
        self._places = {
            f":{self._env_file['REDIS_PASSWORD']}@redis:6379/0": redis_url.removeprefix("redis://"),
            "@rabbitmq:5672/knell": f"@127.0.0.1:{broker.port}/{self.vhost}",
            "@rabbitmq:15672": f"@{str(broker.api_url).rpartition('@')[2]}",
            "/keys/": f"{home}/keys/",
            "/tmp/passwords": f"{home}/passwords",
            "$$": "$",
            "0.0.0.0": "127.0.0.1",
        }
        for folder in ("private", "trust"):  # as the Dockerfile makes them
            (home / "keys" / folder).mkdir(parents=True)
        # The administrator's account, as the image of RabbitMQ makes it at its first start.
        admin = {"password": self._env_file["RABBITMQ_PASSWORD"], "tags": "administrator"}
        broker.api("PUT", "/api/users/knell", admin)
        broker.api("PUT", f"/api/permissions/{self.vhost}/knell", {"configure": ".*", "write": ".*", "read": ".*"})
        environ = self._environ("notifier")
        where = environ["KNELL_BROKER_URL"].rpartition("@")[2]
        broker_url = f"amqp://knell.issuer.auth:{self._env_file['AUTH_BROKER_PASSWORD']}@{where}"
        self.settings = Settings(broker_url=broker_url, store_url=environ["KNELL_STORE_URL"])

    def run(self, name: str) -> None:
        """A service that ends by itself, in the folder that the image has copied."""
        self._run(name, self._words(name, SERVICES[name]["command"]))

    def trust(self, public_key: Path) -> None:
        """Step 4 of docs/deploy.md: an issuer's key."""
        trust = str(self._home / "keys" / "trust" / "trust.json")
        words = ["--public", str(public_key), "--algorithm", "EdDSA", "--iss", ISSUER, "--trust", trust]
        self._run("keys", ["knell", "keys", "trust", *words])

    def process(self, name: str) -> Process:
        """A service that runs on; not started yet."""
        program, *words = self._words(name, SERVICES[name]["command"])
        folder = self.folder(name)
        return Process([str(PROGRAMS / program), *words], directory=folder, environ=self._environ(name))

    def health(self, name: str, folder: Path | None = None) -> int:
        """The exit status of a service's health check; `folder` stands in for the service's own."""
        kind, *words = SERVICES[name]["healthcheck"]["test"]
        shell = ["sh", "-c"] if kind == "CMD-SHELL" else []
        own = str(self.folder(name))
        asked = [word.replace(own, str(folder or own)) for word in self._words(name, words)]
        return subprocess.run([*shell, *asked], env=self._environ(name), capture_output=True, timeout=60).returncode

    def folder(self, name: str) -> Path:
        """What a service has as /run/knell."""
        return self._home / name

    def _run(self, name: str, words: Sequence[str]) -> None:
        done = subprocess.run(words, cwd=ROOT, env=self._environ(name), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def _environ(self, name: str) -> dict[str, str]:
        given: Mapping[str, object] = SERVICES[name].get("environment") or {}
        filled = [REFERENCE.sub(lambda found: self._env_file[found[1]], str(value)) for value in given.values()]
        image = {
            "PATH": os.pathsep.join([str(PROGRAMS), os.environ["PATH"]]),
            "HOME": str(self._home),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONUNBUFFERED": "1",
        }
        return image | dict(zip(given, self._words(name, filled), strict=True))

    def _words(self, name: str, words: Iterable[object]) -> list[str]:
        return [self._here(name, str(word)) for word in words]

    def _here(self, name: str, text: str) -> str:
        for place, here in {**self._places, "/run/knell/": f"{self.folder(name)}/"}.items():
            text = text.replace(place, here)
        return re.sub(r"\b(8000|5555)\b", str(self.ports[name]), text) if name in self.ports else text


@dataclass
class Composed(Company):
    """The company, with what it was composed of."""

    compose: Compose
    broker: RabbitServer
    processes: Mapping[str, Process]

    def has_written(self, name: str, *texts: str) -> bool:
        """Whether a process has written a line with all of that in it."""
        lines = self.processes[name].log.read_text().splitlines()
        return any(all(text in line for text in texts) for line in lines)


@pytest.fixture(scope="module")
def company(
    tmp_path_factory: pytest.TempPathFactory, rabbitmq_server: RabbitServer, redis_url: str
) -> Iterator[Composed]:
    """Everything that docker-compose.yml has, but for the servers: set up and started with its own commands."""
    home = tmp_path_factory.mktemp("compose")
    key = SigningKey.generate()
    public_key = home / "keys" / "issuer.pem"
    public_key.parent.mkdir()
    public_key.write_bytes(key.verifying_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    receiver = Process(
        [sys.executable, str(ROOT / "examples" / "stage" / "receiver.py")],
        directory=home / "receiver",
        environ={"PARTNER_WEBHOOK_SECRET": SECRET, "PORT": "0"},
    )
    processes = {"receiver": receiver}
    try:
        port = ready(receiver, r'"port": ?(\d+)')
        compose = Compose(home, rabbitmq_server, redis_url, f"http://127.0.0.1:{port}/hooks")
        for name in ("keys", "setup"):
            compose.run(name)
        compose.trust(public_key)
        names = (*WEBS, *WORKERS, "beat")
        processes |= {name: compose.process(name) for name in names}
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda name: ready(processes[name], READY), names))
        with Issuer(ISSUER, key, settings=compose.settings) as issuer:
            shop, gateway = (f"127.0.0.1:{compose.ports[name]}" for name in ("shop-web", "gateway-web"))
            yield Composed(
                issuer, f"http://{shop}", f"ws://{gateway}", receiver.log, compose, rabbitmq_server, processes
            )
    finally:
        with ThreadPoolExecutor(len(processes)) as pool:
            list(pool.map(Process.stop, processes.values()))


def ready(process: Process, pattern: str) -> str:
    """Start a process and wait until it has written something; returns the pattern's first group, or all of it."""
    process.run(lambda: re.search(pattern, process.log.read_text()) is not None)
    found = re.search(pattern, process.log.read_text())
    assert found is not None
    return found[found.re.groups]


@pytest.mark.parametrize("how", ["expired", "revoked"])
def test_every_service_ends_a_session_by_either_way(company: Composed, how: str) -> None:
    """The shop forgets the session, the gateway closes with 4401 and voids its ticket, the partner gets a POST."""
    sub, sid = f"u-{uuid4()}", f"s-{uuid4()}"
    issued = company.issue(sub, sid, ttl_seconds=5 if how == "expired" else 300)
    other = company.issue(sub, f"s-{uuid4()}")
    cookie, others = (log_in(company, each).cookies["__Host-shop"] for each in (issued, other))
    assert me(company, cookie).json() == {"iss": ISSUER, "sub": sub, "sid": sid}
    with live(company, other) as (staying, _), live(company, issued) as (socket, first):
        if how == "revoked":
            revoked = company.issuer.revoke("session", {"sid": sid}, wait_for=SERVICE_NAMES, timeout_seconds=30)
            assert {name: each.state for name, each in revoked.services.items()} == dict.fromkeys(SERVICE_NAMES, "done")
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(DEADLINE_SECONDS)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4401, f"token {how}")
        staying.send("still here?")
        assert staying.recv(DEADLINE_SECONDS) == "still here?"
    until(lambda: me(company, cookie).status_code == 401, what="the shop has ended the session")
    assert me(company, others).status_code == 200
    until(lambda: company.has_written("gateway", "ticket_voided", issued.ref.jti), what="the gateway has told")
    assert greeting(company, other, ticket=first["ticket"])["resumed"] is False
    told = until(
        lambda: [each for each in company.received() if each["data"]["sid"] == sid], what="the partner was told"
    )
    assert [(each["type"], each["data"]["cause"]) for each in told] == [("session.ended", how)]


def test_each_service_logs_in_as_itself(company: Composed) -> None:
    """No process has a connection to the broker under another account than its own, and nobody is refused anything."""

    def accounts() -> set[str]:
        found = company.broker.api("GET", f"/api/vhosts/{company.compose.vhost}/connections")
        return {each["user"] for each in found if each.get("user")}

    company.issuer.issue({"sub": "alice"}, ttl_seconds=60)  # it connects when it has something to send
    names = {name: f"knell.service.{name}" for name in SERVICE_NAMES}
    names |= {name: f"knell.{name}" for name in ("notifier", "beat", "flower")}
    until(lambda: accounts() == {"knell.issuer.auth", *names.values()}, what="each account has a connection, no other")
    for name, account in names.items():
        log = company.processes[name].log.read_text()
        assert f"amqp://{account}:**@" in log
        assert not re.search(r"amqp://(?!" + re.escape(account) + ")", log)
        assert "ACCESS_REFUSED" not in log


@pytest.mark.parametrize("name", [*WORKERS, "beat"])
def test_the_health_check_of_a_worker_looks_at_the_age_of_its_file(
    company: Composed, name: str, tmp_path: Path
) -> None:
    """It says yes while the file is touched, and no when it is a minute old, or not there."""
    until(lambda: company.compose.health(name) == 0, what=f"{name} is healthy")
    # The same words about a file that nobody touches.
    assert company.compose.health(name, tmp_path) != 0
    alive = tmp_path / "alive"
    for age_seconds, healthy in ((0, True), (70, False)):
        alive.touch()
        os.utime(alive, (time.time() - age_seconds,) * 2)
        assert (company.compose.health(name, tmp_path) == 0) is healthy


@pytest.mark.parametrize("name", WEBS)
def test_the_health_check_of_a_web_asks_it(company: Composed, name: str) -> None:
    """The command of docker-compose.yml says yes where the web answers, and no where nobody does."""
    assert company.compose.health(name) == 0
    listening = company.compose.ports[name]
    company.compose.ports[name] = free_port()
    try:
        assert company.compose.health(name) != 0
    finally:
        company.compose.ports[name] = listening
