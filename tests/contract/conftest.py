"""One suite for every store: each test runs over each implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast
from uuid import uuid4

import pytest

from knell.settings import Rules, Settings
from knell.store import Store, open_store
from tests.contract.by_role import ByRole
from tests.contract.making import Clock
from tests.redis_servers import Cluster
from tests.schemas import Schemas

# On a cluster: with most namespaces these lie on all three nodes.
PARTITIONS = 3
# These want all that ends in a second from one claim, which gives what ends in one partition; or they move a token to
# another session, which may lie in another one; or they count, which reads every hash of every partition.
IN_ONE_PARTITION = {
    "test_closed_records_do_not_count_against_the_limit", "test_beyond_the_size_limit_the_oldest_expiries_go",
    "test_every_field_of_a_token_is_kept", "test_a_token_is_named_by_issuer_and_jti",
    "test_a_detached_token_keeps_its_session", "test_a_moved_entry_does_not_ask_for_a_timer_that_is_confirmed",
    "test_what_a_detach_has_closed_is_named", "test_a_page_that_is_exactly_full_has_no_more",
    "test_a_large_second_is_claimed_in_pages", "test_many_session_entries_may_move_at_once",
    "test_a_record_with_much_text_is_whole", "test_started_is_told_where_it_is_known",
    "test_receipts_of_several_services_at_the_same_time_add_up", "test_a_count_stops_when_it_is_enough",
    "test_what_a_revocation_would_end_is_counted", "test_a_session_s_own_end_says_what_it_may_be_revoked_by",
}  # fmt: skip


class MakeStore(Protocol):
    def __call__(self, *, rules: Rules | None = None, namespace: str | None = None) -> Store: ...


KINDS = {
    "sqlite": [],
    "redis": [pytest.mark.redis],
    "cluster": [pytest.mark.redis],
    "postgresql": [pytest.mark.postgresql],
}


@pytest.fixture(params=[pytest.param(kind, marks=marks) for kind, marks in KINDS.items()])
def kind(request: pytest.FixtureRequest) -> str:
    """Which implementation a test runs over."""
    return str(request.param)


@pytest.fixture
def store_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """One server for all tests that run on it, or a file of the test's own."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    if kind == "cluster":
        cluster: Cluster = request.getfixturevalue("cluster")
        return cluster.url
    if kind == "postgresql":
        return str(request.getfixturevalue("schemas").url)
    return str(request.getfixturevalue("redis_url"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Redis Cluster of three nodes."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture
def ready(kind: str, request: pytest.FixtureRequest) -> Iterator[Callable[[str], object]]:
    """Makes a namespace ready to be used: on PostgreSQL, migrations do that, and no store by itself."""
    if kind != "postgresql":
        yield lambda namespace: None
        return
    schemas: Schemas = request.getfixturevalue("schemas")
    mine = set[str]()

    def lend(namespace: str) -> None:
        if namespace not in mine:
            schemas.lend(namespace)
            mine.add(namespace)

    yield lend
    for namespace in mine:
        schemas.take_back(namespace)


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
def partitions(kind: str, request: pytest.FixtureRequest) -> int:
    """Over how many slots the tokens are spread: on a cluster over several, unless the test asks for a whole second."""
    in_one = request.node.originalname in IN_ONE_PARTITION or request.node.path.stem == "test_notice_log"
    return PARTITIONS if kind == "cluster" and not in_one else 1


@pytest.fixture
def make_store(
    kind: str,
    partitions: int,
    store_url: str,
    ready: Callable[[str], object],
    open_at: Callable[..., Store],
    request: pytest.FixtureRequest,
) -> MakeStore:
    """Opens one more store object on the same data, as another process would.

    On a cluster each call is made under the account of the role that makes it, with no more rights than that has.
    """
    fresh = f"t{uuid4().hex}"

    def make(*, rules: Rules | None = None, namespace: str | None = None) -> Store:
        name = namespace or fresh
        ready(name)
        if kind != "cluster":
            return open_at(store_url, namespace=name, rules=rules)
        settings = Settings(namespace=name, store_url=store_url, partitions=partitions)
        open_one = partial(open_at, namespace=name, rules=rules, partitions=partitions)
        return cast(Store, ByRole(settings, request.getfixturevalue("cluster").nodes, open_one))

    return make


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    return make_store()
