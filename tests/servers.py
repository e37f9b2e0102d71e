"""Private servers for tests: loopback only, free ports, own data, stopped by their own pid."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

# RabbitMQ takes about 5 s to boot on an idle machine; a busy one is given ten times that.
BOOT_SECONDS = 60.0
STOP_SECONDS = 20.0
# Debian keeps the real script here; the one on PATH changes to the rabbitmq user and ignores the environment.
RABBITMQ_BIN = Path("/usr/lib/rabbitmq/bin")
_numbers = itertools.count(1)


class ServerMissing(Exception):
    """A server program is not installed."""


class ServerFailed(Exception):
    """A server did not become ready. The text holds the end of its log."""


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def find_program(*names: str, also: Sequence[Path] = ()) -> Path:
    """The first of these programs in the folders `also`, or on PATH; ServerMissing if there is none."""
    for name in names:
        for folder in also:
            if os.access(folder / name, os.X_OK):
                return folder / name
        if found := shutil.which(name):
            return Path(found)
    raise ServerMissing(f"{' or '.join(names)} is not installed; run scripts/servers.sh")


class Process:
    """A child with a process group of its own, which can be stopped, killed, suspended and started again."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        directory: Path,
        environ: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        self._command = list(command)
        self._user = user
        self._directory = directory
        self._environ = dict(os.environ if environ is None else environ)
        self._child: subprocess.Popen[bytes] | None = None
        self.log = directory / "output.log"

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._child is not None and self._child.poll() is None

    def run(self, ready: Callable[[], bool], *, timeout_seconds: float = BOOT_SECONDS) -> None:
        """Start the child and wait until `ready()`; ServerFailed if it ends, or is not ready in time."""
        self._directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._child = subprocess.Popen(
                self._command, cwd=self._directory, env=self._environ, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True, user=self._user,
            )  # fmt: skip
        atexit.register(self.signal, signal.SIGKILL)
        deadline = time.monotonic() + timeout_seconds
        while not ready():
            if self._child.poll() is not None or time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                tail = self.log.read_text(errors="replace")[-2000:]
                raise ServerFailed(f"{self._command[0]} was not ready after {timeout_seconds:g} s:\n{tail}")
            time.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole group; without effect when it has ended. SIGKILL waits for the end."""
        if self._child is None or self._child.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)
        if number is signal.SIGKILL:
            self._forget()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL if it has not ended by then."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        if self._child is not None:
            try:
                self._child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
        self._forget()

    def _forget(self) -> None:
        if self._child is not None:
            self._child.wait(STOP_SECONDS)
        self._child = None
        atexit.unregister(self.signal)


class RedisServer:
    """A private Redis (or Valkey) with append-only persistence.

    Attributes:
        port: where it listens, on 127.0.0.1; the same after each start.
        url: `redis://127.0.0.1:PORT/0`.
    """

    def __init__(self, directory: Path, *, extra: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        program = find_program("redis-server", "valkey-server")
        data = directory / "data"
        data.mkdir(parents=True, exist_ok=True)
        self._process = Process(
            [str(program), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(data), "--save", "",
             "--appendonly", "yes", "--appendfsync", "everysec", "--databases", "64", "--daemonize", "no", *extra],
            directory=directory,
        )  # fmt: skip

    def start(self) -> None:
        """Start it, or start it again on the same port and data; returns when it answers."""
        self._process.run(self._answers)

    def stop(self) -> None:
        """End it in good order."""
        self._process.stop()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.signal(signal.SIGKILL)

    def suspend(self) -> None:
        """Freeze it: connections stay open and nothing answers."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `suspend`."""
        self._process.signal(signal.SIGCONT)

    def _answers(self) -> bool:
        return _ask(self.port, b"PING\r\n").startswith(b"+PONG")


class RabbitServer:
    """A private RabbitMQ node, with an epmd of its own.

    Attributes:
        port: where it listens for AMQP, on 127.0.0.1; the same after each start.
        url: the AMQP URL of its virtual host "/".
        api_url: the management API with credentials, `http://guest:guest@127.0.0.1:PORT`; None without management.
    """

    def __init__(self, directory: Path, *, management: bool = True) -> None:
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self._api_port = free_port() if management else None
        self.api_url = f"http://guest:guest@127.0.0.1:{self._api_port}" if management else None
        self.node = f"knell-{os.getpid()}-{next(_numbers)}@localhost"
        self._epmd_port = free_port()
        program = find_program("rabbitmq-server", also=[RABBITMQ_BIN])
        self._epmd = Process(
            [str(find_program("epmd")), "-port", str(self._epmd_port), "-address", "127.0.0.1"],
            directory=directory / "epmd",
        )
        self._environ = self._write_config(directory)
        self._process = Process([str(program)], directory=directory, environ=self._environ)

    def start(self) -> None:
        """Start it, or start it again on the same ports and data; returns when it takes connections."""
        if not self._epmd.running:
            self._epmd.run(lambda: listens(self._epmd_port))
        self._process.run(self._answers)

    def stop(self) -> None:
        """End it in good order, its epmd as well."""
        self._process.stop()
        self._epmd.stop()

    def kill(self) -> None:
        """End it with SIGKILL; its epmd stays until `stop`."""
        self._process.signal(signal.SIGKILL)

    def suspend(self) -> None:
        """Freeze it: connections stay open, new ones are accepted by the kernel, and nothing answers."""
        self._process.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `suspend`."""
        self._process.signal(signal.SIGCONT)

    def vhost(self) -> str:
        """Make a new virtual host and return its AMQP URL."""
        name = f"test-{next(_numbers)}"
        self.api("PUT", f"/api/vhosts/{name}")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.api("PUT", f"/api/permissions/{name}/guest", everything)
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{name}"

    def add_user(self, url: str, user: str, password: str, permissions: Mapping[str, str]) -> str:
        """Make an account with these permissions in the virtual host of `url`; returns its URL there."""
        name = url.rsplit("/", 1)[1]
        self.api("PUT", f"/api/users/{quote(user, safe='')}", {"password": password, "tags": ""})
        self.api("PUT", f"/api/permissions/{name}/{quote(user, safe='')}", permissions)
        return f"amqp://{user}:{password}@127.0.0.1:{self.port}/{name}"

    def api(self, method: str, path: str, body: Any = None) -> Any:
        """Call the management API. Returns the decoded answer, None for an empty one; raises HTTPError."""
        if self._api_port is None:
            raise ServerFailed("this RabbitMQ was started without its management API")
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._api_port}{path}",
            method=method,
            data=json.dumps(body or {}).encode() if method in ("PUT", "POST") else None,
            headers={"Authorization": "Basic Z3Vlc3Q6Z3Vlc3Q=", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this node; returns what it prints. CalledProcessError if it fails."""
        program = find_program("rabbitmqctl", also=[RABBITMQ_BIN])
        done = subprocess.run(
            [str(program), "-q", "-n", self.node, *arguments],
            env=self._environ, check=True, timeout=60, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout

    def _write_config(self, directory: Path) -> dict[str, str]:
        home = directory / "home"
        home.mkdir(parents=True, exist_ok=True)
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self.port}",
            "disk_free_limit.absolute = 50MB",
            "heartbeat = 60",
            "log.console = false",
        ]
        if self._api_port is not None:
            lines += [f"management.tcp.port = {self._api_port}", "management.tcp.ip = 127.0.0.1"]
        (directory / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (directory / "enabled_plugins").write_text("[rabbitmq_management].\n" if self.api_url else "[].\n")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RABBITMQ_", "ERL_"))}
        return inherited | {
            "HOME": str(home),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_PID_FILE": str(directory / "rabbitmq.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2",
        }

    def _answers(self) -> bool:
        if not _ask(self.port, b"AMQP\x00\x00\x09\x01"):
            return False
        if self._api_port is None:
            return True
        try:
            self.api("GET", "/api/overview")
        except (OSError, urllib.error.URLError):
            return False
        return True


class PostgresServer:
    """A private PostgreSQL. It refuses to run as root, so for root it runs as another user, in a folder of that user's.

    Attributes:
        port: where it listens, on 127.0.0.1; the same after each start.
        url: the URL of its database "postgres", as its superuser "admin".
        data: its data folder.
    """

    password = "p@ss/word"

    def __init__(self, *, copy_of: PostgresServer | None = None, extra: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.url = self.url_of("admin", self.password)
        program = self._program("postgres")
        self._user = "postgres" if os.getuid() == 0 else None
        # Not under pytest's folders: those are root's alone.
        self._directory = Path(tempfile.mkdtemp(prefix="knell-postgresql-"))
        self.data = self._directory / "data"
        if self._user is not None:
            shutil.chown(self._directory, self._user, self._user)
        if copy_of is None:
            self._initdb()
        else:
            self._run("pg_basebackup", "-d", copy_of.url, "-D", str(self.data), "-R", "-c", "fast", "--no-sync")
        # Durable against the end of its processes, which is what tests bring about; not against a loss of power.
        self._process = Process(
            [str(program), "-D", str(self.data), "-p", str(self.port), "-c", "fsync=off",
             "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._directory}",
             "-c", "max_connections=60", "-c", "shared_buffers=32MB", "-c", "autovacuum=off", *extra],
            directory=self._directory, user=self._user,
        )  # fmt: skip

    def start(self) -> None:
        """Start it, or start it again on the same port and data; returns when it takes connections."""
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                return self._process.run(self._answers)
            except ServerFailed as error:
                # After a kill its children need a moment to notice, and hold the shared memory until then.
                if "still in use" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def stop(self) -> None:
        """End it in good order, whoever is connected."""
        self._process.signal(signal.SIGINT)
        self._process.stop()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.signal(signal.SIGKILL)

    def promote(self) -> None:
        """Make a standby a primary."""
        self._run("pg_ctl", "promote", "-w", "-D", str(self.data))

    def remove(self) -> None:
        """Stop it, and remove its data."""
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def url_of(self, user: str, password: str) -> str:
        """The URL of its database, for another role."""
        return f"postgresql://{user}:{quote(password, safe='')}@127.0.0.1:{self.port}/postgres"

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements as its superuser; the rows of the last one, if it has any."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def _initdb(self) -> None:
        secret = self._directory / "password"
        secret.write_text(self.password)
        # A locale that does not sort by bytes: what Knell pages through has to be in that order all the same.
        self._run("initdb", "-D", str(self.data), "-U", "admin", "--pwfile", str(secret), "--auth=scram-sha-256",
                  "--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US",
                  "--no-sync", "--no-instructions")  # fmt: skip

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._program(name)), *arguments], cwd=self._directory, user=self._user, timeout=BOOT_SECONDS,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ServerFailed(f"{name} failed:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")

    def _program(self, name: str) -> Path:
        return find_program(name, also=sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


def start_postgresql(*, copy_of: PostgresServer | None = None, extra: Sequence[str] = ()) -> PostgresServer:
    """Start a private PostgreSQL, or a standby of another one. `extra` are more arguments for postgres.

    Raises:
        ServerMissing: it is not installed.
        ServerFailed: it did not start.
    """
    server = PostgresServer(copy_of=copy_of, extra=extra)
    try:
        server.start()
    except ServerFailed:
        server.remove()
        raise
    return server


def start_redis(directory: Path, *, extra: Sequence[str] = ()) -> RedisServer:
    """Start a private Redis with its data under `directory`. `extra` are more arguments for redis-server.

    Raises:
        ServerMissing: it is not installed.
        ServerFailed: it did not start.
    """
    server = RedisServer(directory, extra=extra)
    server.start()
    return server


def start_rabbitmq(directory: Path, *, management: bool = True) -> RabbitServer:
    """Start a private RabbitMQ with its data under `directory`, and its management API unless told otherwise.

    Raises:
        ServerMissing: it is not installed.
        ServerFailed: it did not start.
    """
    server = RabbitServer(directory, management=management)
    try:
        server.start()
    except ServerFailed:
        server.stop()
        raise
    return server


def listens(port: int) -> bool:
    """Whether somebody takes connections at a port of the loopback interface."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _ask(port: int, question: bytes) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(question)
            return connection.recv(64)
    except OSError:
        return b""
