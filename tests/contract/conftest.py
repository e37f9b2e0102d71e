"""One suite for every store: each test runs over each implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import pytest

from knell.settings import Rules
from knell.store import Store, open_store
from tests.contract.making import Clock


class MakeStore(Protocol):
    def __call__(self, *, rules: Rules | None = None, namespace: str | None = None) -> Store: ...


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def kind(request: pytest.FixtureRequest) -> str:
    """Which implementation a test runs over."""
    return str(request.param)


@pytest.fixture
def store_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.getfixturevalue("redis_url")) if kind == "redis" else f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_at(clock: Clock) -> Iterator[Callable[..., Store]]:
    """Opens stores and closes them after the test."""
    opened: list[Store] = []

    def open_one(url: str, **options: Any) -> Store:
        store = open_store(url, **({"clock": clock} | options))
        opened.append(store)
        return store

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def make_store(store_url: str, open_at: Callable[..., Store]) -> MakeStore:
    """Opens one more store object on the same data, as another process would."""
    fresh = f"t{uuid4().hex}"

    def make(*, rules: Rules | None = None, namespace: str | None = None) -> Store:
        return open_at(store_url, namespace=namespace or fresh, rules=rules)

    return make


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    return make_store()
