"""Fixtures that every test may use: private servers, a place of one's own on them, and settings."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import pytest

from knell.settings import Settings
from tests.schemas import Schemas
from tests.servers import (
    PostgresServer,
    RabbitServer,
    RedisServer,
    ServerMissing,
    start_postgresql,
    start_rabbitmq,
    start_redis,
)

_databases = itertools.cycle(range(1, 64))
_missing: set[str] = set()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A private Redis for the whole run. Tests that kill or freeze it start one of their own."""
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgresServer]:
    """A private PostgreSQL for the whole run. Tests that kill it start one of their own."""
    server = start_postgresql(extra=["-c", "deadlock_timeout=100ms"])
    yield server
    server.remove()


@pytest.fixture(scope="session")
def schemas(postgresql_server: PostgresServer) -> Iterator[Schemas]:
    """Places for stores on PostgreSQL."""
    made = Schemas(postgresql_server.url)
    yield made
    made.close()


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A private RabbitMQ with management for the whole run. Tests that kill or freeze it start one of their own."""
    server = start_rabbitmq(tmp_path_factory.mktemp("rabbitmq"))
    yield server
    server.kill()  # nobody needs its data again, and ending in good order takes it six seconds
    server.stop()


@pytest.fixture(scope="module")
def redis_url(redis_server: RedisServer) -> str:
    """The URL of a Redis database that is this module's own, and empty."""
    import redis

    url = f"redis://127.0.0.1:{redis_server.port}/{next(_databases)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture(scope="module")
def broker_url(rabbitmq_server: RabbitServer) -> str:
    """The AMQP URL of a virtual host that is this module's own, and empty."""
    return rabbitmq_server.vhost()


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Makes settings: the embedded defaults under the test's own folder, a new namespace, and what is passed."""

    def make(**changes: Any) -> Settings:
        defaults: dict[str, Any] = {"namespace": f"t{uuid4().hex[:12]}", "home": tmp_path / "knell"}
        return Settings(**defaults | changes)

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    """A fixture whose server is not installed skips its tests."""
    return (yield from _unless_missing())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test that starts a server which is not installed is skipped."""
    return (yield from _unless_missing())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly that tests were skipped for want of a server: a green run is then less than it looks."""
    for missing in sorted(_missing):
        terminalreporter.write_line(f"*** TESTS WERE SKIPPED: {missing} ***", red=True, bold=True)


def _unless_missing() -> Generator[None, object, object]:
    try:
        return (yield)
    except ServerMissing as error:
        _without(error)


def _without(error: ServerMissing) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"{error} (under CI, which is set, that is a failure)", pytrace=False)
    _missing.add(str(error))
    pytest.skip(str(error))
