"""A whole deployment as real processes: the notifier and services, on whatever broker and store the settings name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from knell import topology
from knell.keys import ANY_ISSUER, SigningKey, trust_entry
from knell.notices import Cause
from knell.publisher import connect
from knell.settings import Settings
from knell.store import Store, open_store
from tests.servers import RabbitServer

ROOT = Path(__file__).parent.parent
T = TypeVar("T")


def until(condition: Callable[[], T], *, seconds: float = 30.0, what: str | Callable[[], str] = "the condition") -> T:
    """Wait until a condition holds, and return what it said; AssertionError after `seconds`.

    `what` names it in the error; a function is asked then, and can say how far things have come.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            named = what if isinstance(what, str) else what()
            raise AssertionError(f"{named} did not come true within {seconds} s; last: {found!r}")
        time.sleep(0.02)
    return found


def make_keys(directory: Path) -> tuple[Path, Path]:
    """An EdDSA notice key and a trust list that trusts it with everything: (notice key, trust list)."""
    key = SigningKey.generate()
    notice_key, trust = directory / "notice-key.pem", directory / "trust.json"
    notice_key.touch(mode=0o600)
    notice_key.write_bytes(key.pem())
    trust.write_text(json.dumps({"keys": [trust_entry(key, issuers=[ANY_ISSUER], causes=list(Cause))]}))
    return notice_key, trust


def on_servers(directory: Path, rabbitmq: RabbitServer, broker_url: str, store_url: str, **changes: Any) -> Settings:
    """Settings of a deployment on real servers, with keys and a namespace of its own."""
    notice_key, trust = make_keys(directory)
    given: dict[str, Any] = {
        "namespace": f"t{uuid4().hex[:10]}",
        "home": directory,
        "broker_url": broker_url,
        "broker_api_url": rabbitmq.api_url,
        "store_url": store_url,
        "notice_key": notice_key,
        "trust": trust,
    }
    return Settings(**given | changes)


class Deployment:
    """The processes of one deployment. `stop` ends every one of them, by its process id."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory = directory
        self.settings = settings
        self.record = directory / "record.jsonl"
        self.trouble = directory / "trouble"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.store: Store = open_store(settings.store_url, namespace=settings.namespace, rules=settings.rules)

    def prepare(self, services: Iterable[str]) -> None:
        """Register services, and declare everything on the broker."""
        names = list(services)
        for name in names:
            self.store.add_service(name)
        with connect(self.settings) as connection:
            topology.declare(connection, names, settings=self.settings)
        if self.settings.broker_api_url:
            topology.apply_policies(self.settings.broker_api_url, self.settings.broker_url.rpartition("/")[2])

    def start_notifier(self, *, beat: bool = True, **environ: str) -> None:
        """`celery -A tasks worker -B`. `environ` goes before the variables of the settings."""
        arguments = ["-A", "tasks", "worker", *(["-B"] if beat else []), *self._node("notifier")]
        self._start("notifier", arguments, **environ)

    def start_service(
        self, name: str, *, app: str = "recorder", options: Sequence[str] = ("--pool=solo",), **environ: str
    ) -> None:
        """A service of that name: an app of tests/apps, with these options of `celery worker`."""
        recorder = {
            "RECORDER_NAME": name,
            "RECORDER_FILE": str(self.record),
            "RECORDER_TROUBLE": str(self.trouble) if name == "partner" else str(self.directory / "none"),
        }
        self._start(name, ["-A", f"tests.apps.{app}", "worker", *options, *self._node(name)], **recorder, **environ)

    def _node(self, name: str) -> list[str]:
        return ["-n", f"{name}@{self.settings.namespace}", "-l", "info"]

    def _start(self, name: str, arguments: list[str], **environ: str) -> None:
        log = self.log_of(name).open("ab")
        size = self.log_of(name).stat().st_size
        self._processes[name] = subprocess.Popen(
            [sys.executable, "-m", "celery", *arguments],
            cwd=ROOT,
            env={**self.inherited, **environ},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        until(lambda: self._is_ready(name, size), seconds=60, what=f"{name} is ready")

    def _is_ready(self, name: str, after: int) -> bool:
        text = self.log_of(name).read_bytes()[after:].decode(errors="replace")
        assert self._processes[name].poll() is None, f"{name} exited:\n{text[-4000:]}"
        return " ready." in text

    @property
    def inherited(self) -> dict[str, str]:
        """This process's environment, with the KNELL_* variables of these settings in place of its own."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("KNELL_")}
        return {**others, **self.environ}

    @property
    def environ(self) -> dict[str, str]:
        """The KNELL_* variables of these settings."""
        return environ_of(self.settings)

    def log_of(self, name: str) -> Path:
        """Where a process writes."""
        return self.directory / f"{name}.log"

    def pid(self, name: str) -> int:
        """The process id of a process of ours."""
        return self._processes[name].pid

    def running(self, name: str) -> bool:
        """Whether a process of ours has not ended."""
        return self._processes[name].poll() is None

    def exit_code(self, name: str, *, seconds: float = 30.0) -> int:
        """Wait for a process of ours to end by itself."""
        return self._processes[name].wait(seconds)

    def stop_one(self, name: str, number: int = signal.SIGTERM) -> None:
        """Send a signal to a process and all its children, and wait for its end."""
        process = self._processes.pop(name)
        _signal_group(process.pid, number if number == signal.SIGKILL else signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait(10)

    def stop(self) -> None:
        """End everything."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.stop_one, list(self._processes)))
        self.store.close()

    def records(self, **wanted: Any) -> list[dict[str, Any]]:
        """What the handlers wrote down, with these values."""
        if not self.record.exists():
            return []
        lines = [json.loads(line) for line in self.record.read_text().splitlines()]
        return [line for line in lines if all(line.get(name) == value for name, value in wanted.items())]

    def wait_for_records(self, count: int, *, seconds: float = 30.0, **wanted: Any) -> list[dict[str, Any]]:
        """Wait until at least `count` such records are there."""
        return until(
            lambda: found if len(found := self.records(**wanted)) >= count else None,
            seconds=seconds,
            what=lambda: (
                f"{count} records with {wanted} (there are {len(self.records(**wanted))}; logs in {self.directory})"
            ),
        )


def environ_of(settings: Settings) -> dict[str, str]:
    """The KNELL_* variables that make a process have these settings."""
    values: Mapping[str, Any] = {
        "NAMESPACE": settings.namespace,
        "HOME": settings.home,
        "BROKER_URL": settings.broker_url,
        "BROKER_API_URL": settings.broker_api_url or "",
        "STORE_URL": settings.store_url,
        "DEDUPE_URL": settings.dedupe_url,
        "TRUST": settings.trust or "",
        "NOTICE_KEY": settings.notice_key or "",
        "HEALTH_FILE": settings.health_file or "",
        "SWEEP_INTERVAL_SECONDS": settings.sweep_interval_seconds,
        "PARTITIONS": settings.partitions,
        "MAX_TOKEN_SECONDS": settings.rules.max_token_seconds,
        "MAX_SESSION_SECONDS": settings.rules.max_session_seconds,
        "LEEWAY_SECONDS": settings.rules.leeway_seconds,
        "SESSION_GRACE_SECONDS": settings.rules.session_grace_seconds,
        "RETENTION_SECONDS": settings.rules.retention_seconds,
        "LOG_MAX_BYTES": settings.rules.log_max_bytes,
    }
    return {f"KNELL_{name}": str(value) for name, value in values.items()}


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return
