"""Running the `knell` command inside of a test, and something for it to look at."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import structlog
from typer.testing import CliRunner

from knell.cli import app
from knell.keys import NOTICE_TYPE, notice_key
from knell.notices import Cause, Notice, NoticeBatch
from knell.revocations import Scope
from knell.settings import Settings
from knell.store import Parked, Store
from knell.topology import service_queue
from tests.deployment import environ_of

ISS = "https://issuer.example"
BATCH_ID = "e0-b"


class Answer(Protocol):
    """What a command has answered."""

    @property
    def exit_code(self) -> int: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...
    @property
    def output(self) -> str: ...


class Knell:
    """The command, as a process with the KNELL_* variables of `settings` would run it."""

    def __init__(self, settings: Settings) -> None:
        self._environ = environ_of(settings)

    def run(self, *arguments: str, **environ: str) -> Answer:
        """Run it. An error that the command does not turn into an exit code is raised."""
        with _quiet():
            result = CliRunner().invoke(app, arguments, env={**self._environ, **environ})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def __call__(self, *arguments: str, exit_code: int = 0, **environ: str) -> Any:
        """Run it under --json, check the exit code, and return its document; None if it has printed none."""
        answer = self.run(*arguments, "--json", **environ)
        assert answer.exit_code == exit_code, answer.output
        return json.loads(answer.stdout) if answer.stdout else None


@contextmanager
def _quiet() -> Iterator[None]:
    """The library's log as `main` has it, which the tests do not go through: errors only, and not on stdout."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def park(settings: Settings, store: Store, *numbers: int, service: str = "shop", expires_in: float = 3600.0) -> str:
    """Park entries of one signed notice, under `<service>/e0-b.<number>`. Returns the signed notice."""
    key = notice_key(settings)
    assert key is not None
    now = store.time()
    entries = tuple(_expired(n, now) for n in numbers)
    batch = NoticeBatch(id=BATCH_ID, entries=entries, issued_at=now, expires_at=now + expires_in)
    jws = key.sign(batch.as_payload(signer="knell-notifier", audience=settings.audience), typ=NOTICE_TYPE)
    store.park(
        [
            Parked(
                id=f"{service}/{entry.id}",
                service=service,
                queue=service_queue(service),
                error="KeyError: 'x'",
                at=now,
                attempts=8,
                notice_id=entry.id,
                jws=jws,
            )
            for entry in entries
        ]
    )
    return jws


def _expired(n: int, at: float) -> Notice:
    return Notice(
        batch_id=BATCH_ID,
        n=n,
        cause=Cause.EXPIRED,
        ends=frozenset({"token"}),
        scope=Scope.TOKEN,
        at=at,
        iss=ISS,
        jti=f"t{n}",
        sub="alice",
    )
