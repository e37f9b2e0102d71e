"""The issuer on an event loop: bounded threads, none held while it waits, and a fork."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from knell import AsyncIssuer, Settings, Unavailable
from knell.keys import SigningKey
from knell.publisher import connect
from knell.store import Store, open_store
from knell.topology import declare

ISS = "https://auth.example"
KEY = SigningKey.generate()


@pytest.fixture
def deployed(settings: Callable[..., Settings]) -> Settings:
    made = settings()
    with connect(made) as connection:
        declare(connection, ["shop"], settings=made)
    return made


@pytest.fixture
def store(deployed: Settings) -> Iterator[Store]:
    store = open_store(deployed.store_url, namespace=deployed.namespace, rules=deployed.rules)
    store.add_service("shop")
    yield store
    store.close()


def test_waiting_for_a_service_holds_no_thread(deployed: Settings, store: Store) -> None:
    """With one thread, a login goes through while a revocation waits for a service that does not answer."""

    async def use() -> None:
        async with AsyncIssuer(ISS, KEY, settings=deployed, threads=1) as issuer:
            waiting = asyncio.create_task(issuer.revoke("session", {"sid": "s"}, wait_for=["shop"], timeout_seconds=60))
            while not store.head().position:
                await asyncio.sleep(0.01)
            assert (await issuer.issue({"sub": "alice"}, ttl_seconds=60)).recorded == "store"
            assert not waiting.done()
            waiting.cancel()

    asyncio.run(use())


def test_a_call_that_finds_no_thread_is_refused_and_has_done_nothing(
    deployed: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind calls that hang, a login is not queued without end."""
    monkeypatch.setattr("knell.async_issuer.BEGIN_SECONDS", 0.05)
    gate = threading.Event()

    async def use() -> None:
        async with AsyncIssuer(ISS, KEY, settings=deployed, threads=1) as issuer:
            issuer._pool().submit(gate.wait, 60)
            with pytest.raises(Unavailable, match="busy"):
                await issuer.issue({"sub": "alice"}, ttl_seconds=60)
            gate.set()
            assert (await issuer.issue({"sub": "bob"}, ttl_seconds=61)).recorded == "store"
        assert len(store.due(before=2.0**39)) == 1

    asyncio.run(use())


def test_a_forked_child_has_threads_of_its_own(deployed: Settings, store: Store) -> None:
    """An issuer that was used before the fork, as with a preloaded application, works in the child."""
    issuer = AsyncIssuer(ISS, KEY, settings=deployed)
    asyncio.run(issuer.issue({"sub": "alice"}, ttl_seconds=60))
    pid = os.fork()
    if not pid:
        recorded = asyncio.run(asyncio.wait_for(issuer.issue({"sub": "bob"}, ttl_seconds=62), 20)).recorded
        os._exit(0 if recorded == "store" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(store.due(before=2.0**39)) == 2
    asyncio.run(issuer.close())
