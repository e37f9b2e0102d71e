"""The hubs, behind the middleware, on a real uvicorn with real clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route, WebSocketRoute
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from knell import Cause, InvalidInput, Notice, Scope, TokenRef, Verifier
from knell.handlers.hub import RESTART, Connection, Hub
from knell.handlers.sse import EventHub, encoded
from knell.handlers.websocket import WebSocketHub
from knell.integrations.asgi import KnellMiddleware
from tests.unit.memory_feed import ISS, MemoryFeed, eventually, revocation
from tests.unit.tokens_for_tests import claims, mint, verifier

BOTH = frozenset({"token", "session"})
DEADLINE_SECONDS = 20.0


class Site:
    """A server with a hub of each kind."""

    def __init__(self, checker: Verifier) -> None:
        self.heard: list[tuple[str | None, str | bytes]] = []
        self.sockets = WebSocketHub(checker, on_message=self._hear, max_connections=3, max_waiting=50)
        self.events = EventHub(checker, max_connections=3)
        routes = [WebSocketRoute("/live", self.sockets), Route("/events", self.events, methods=None)]
        self.app = KnellMiddleware(Starlette(routes=routes), checker)
        self.port = 0

    async def _hear(self, token: TokenRef, message: str | bytes) -> None:
        self.heard.append((token.sub, message))

    @contextlib.contextmanager
    def live(self, **changes: Any) -> Iterator[ClientConnection]:
        """A WebSocket, once the hub has it."""
        before = len(self.sockets)
        headers = {"Authorization": f"Bearer {token(**changes)}"}
        with connect(f"ws://127.0.0.1:{self.port}/live", additional_headers=headers, proxy=None) as made:
            eventually(lambda: len(self.sockets) > before)
            yield made

    @contextlib.contextmanager
    def listening(self, **changes: Any) -> Iterator[Iterator[dict[str, str]]]:
        """A stream of events, once the hub has it."""
        headers = {"Authorization": f"Bearer {token(**changes)}"}
        url = f"http://127.0.0.1:{self.port}/events"
        with (
            httpx.Client(trust_env=False, timeout=DEADLINE_SECONDS) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            assert next(lines) == ":"
            yield read_events(lines)


def read_events(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Events as a browser reads them."""
    event: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line and not line.startswith(":"):
            event[name] = f"{event[name]}\n{value}" if name in event else value
        elif event:
            yield event
            event = {}


def token(**changes: Any) -> str:
    now = time.time()
    return mint(claims(**{"iat": now - 1, "exp": now + 600} | changes))


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed(clock=time.time)


@pytest.fixture
def site(feed: MemoryFeed) -> Iterator[Site]:
    with verifier(feed, clock=time.time) as checker, socket.create_server(("127.0.0.1", 0)) as listener:
        site = Site(checker)
        site.port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(site.app, log_level="warning", lifespan="on"))
        thread = threading.Thread(target=lambda: server.run([listener]))
        thread.start()
        try:
            eventually(lambda: server.started)
            yield site
        finally:
            site.sockets.close()
            site.events.close()
            server.should_exit = True
            thread.join(20)


def close_of(connection: ClientConnection) -> tuple[int, str]:
    """How the server closes it."""
    with pytest.raises(ConnectionClosed) as closed:
        connection.recv(DEADLINE_SECONDS)
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


def revoke(feed: MemoryFeed, scope: str, value: str) -> None:
    feed.revoke(revocation(scope, value, now=time.time()))


# ---- what a hub does while tokens live


def test_a_message_reaches_those_that_it_is_for(site: Site) -> None:
    """From any thread, text and bytes, to one user or to all; and what a client sends is heard with its token."""
    with site.live(sub="alice", jti="a") as alice, site.live(sub="bob", jti="b") as bob:
        site.sockets.publish("for alice", to=lambda token: token.sub == "alice")
        site.sockets.publish(b"for all")
        assert [alice.recv(DEADLINE_SECONDS), alice.recv(DEADLINE_SECONDS)] == ["for alice", b"for all"]
        assert bob.recv(DEADLINE_SECONDS) == b"for all"
        bob.send("hello")
        eventually(lambda: site.heard)
    assert site.heard == [("bob", "hello")]
    eventually(lambda: len(site.sockets) == 0)


def test_an_event_reaches_those_that_it_is_for(site: Site) -> None:
    """With its name, its id, and each line of its data."""
    with site.listening(sub="alice", jti="a") as alice, site.listening(sub="bob", jti="b") as bob:
        site.events.publish("one\r\ntwo", event="order", id="7", to=lambda token: token.sub == "alice")
        site.events.publish("for all")
        assert [next(alice), next(alice)] == [{"event": "order", "id": "7", "data": "one\ntwo"}, {"data": "for all"}]
        assert next(bob) == {"data": "for all"}
    eventually(lambda: len(site.events) == 0)


# ---- the end


@pytest.mark.parametrize(("scope", "value"), [("token", "a"), ("session", "s-a"), ("subject", "alice")])
def test_a_revocation_closes_exactly_the_connections_that_it_matches(
    site: Site, feed: MemoryFeed, scope: str, value: str
) -> None:
    """WebSockets with 4401, streams with a last event; the others stay open."""
    mine, other = {"sub": "alice", "jti": "a", "sid": "s-a"}, {"sub": "bob", "jti": "b", "sid": "s-b"}
    with (
        site.live(**mine) as alice,
        site.live(**other) as bob,
        site.listening(**mine) as stream,
        site.listening(**other) as stays,
    ):
        revoke(feed, scope, value)
        assert close_of(alice) == (4401, "token revoked")
        last = list(stream)[-1]
        assert (last["event"], json.loads(last["data"])) == ("end", {"reason": "token revoked"})
        site.sockets.publish("still here")
        site.events.publish("still here")
        assert bob.recv(DEADLINE_SECONDS) == "still here"
        assert next(stays) == {"data": "still here"}


def test_an_expiry_closes_both_kinds(site: Site) -> None:
    """At the token's exp, and not before."""
    exp = time.time() + 1
    with site.live(exp=exp) as alice, site.listening(exp=exp) as stream:
        assert close_of(alice) == (4401, "token expired")
        assert [json.loads(each["data"]) for each in stream] == [{"reason": "token expired"}]
        assert time.time() >= exp


def test_a_notice_closes_exactly_the_connections_that_it_matches(site: Site) -> None:
    """For a process that is told notices: by whatever scope `Notice.matches` knows."""
    told = Notice(
        batch_id="r-1", cause=Cause.REVOKED, ends=BOTH, scope=Scope.CLIENT, at=time.time(), iss=ISS, client_id="web",
        issued_before=time.time(),
    )  # fmt: skip
    late = {"client_id": "web", "auth_time": time.time() + 5, "jti": "late"}
    with (
        site.live(client_id="web") as web,
        site.live(client_id="app") as app,
        site.listening(client_id="web") as stream,
        site.listening(**late) as stays,
    ):
        for hub in (site.sockets, site.events):
            hub.end([told, told])
        assert close_of(web) == (4401, "token revoked")
        assert [each["event"] for each in stream] == ["end"]
        site.sockets.publish("still here")
        site.events.publish("still here")
        assert app.recv(DEADLINE_SECONDS) == "still here"
        assert next(stays) == {"data": "still here"}


def test_an_end_that_came_before_the_connection_closes_it(site: Site, feed: MemoryFeed) -> None:
    """What the verifier knows when the connection is registered counts, though the token was let in just before."""
    claims_of_it = claims(jti="gone", exp=time.time() + 600)
    feed.revoke(revocation("token", "gone", now=time.time()))

    async def join() -> str:
        with site.sockets._joined(claims_of_it) as connection:
            return (await asyncio.wait_for(connection.ended, DEADLINE_SECONDS)).reason

    assert asyncio.run(join()) == "token revoked"


# ---- bounds


def test_a_hub_that_is_full_asks_to_come_back(site: Site) -> None:
    """With 1013, or 503 and Retry-After; a place that is free again is given away again."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(site.live(jti=f"j-{n}")) for n in range(3)]
        for n in range(3):
            stack.enter_context(site.listening(jti=f"j-{n}"))
        headers = {"Authorization": f"Bearer {token()}"}
        answer = httpx.get(f"http://127.0.0.1:{site.port}/events", headers=headers, trust_env=False)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        with pytest.raises(Exception, match="403"), site.live():
            pass
        sockets[0].close()
        eventually(lambda: len(site.sockets) == 2)
        with site.live(jti="another"):
            assert len(site.sockets) == 3


def test_a_client_that_does_not_read_is_let_go(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it is bounded, and so is its close."""
    monkeypatch.setattr("knell.handlers.websocket.CLOSE_SECONDS", 0.1)
    headers = {"Authorization": f"Bearer {token()}"}
    url = f"ws://127.0.0.1:{site.port}/live"
    with connect(url, additional_headers=headers, proxy=None, max_queue=1, close_timeout=0.1):
        eventually(lambda: len(site.sockets) == 1)
        for _ in range(1000):
            site.sockets.publish(bytes(100_000))
            if not len(site.sockets):
                break
        eventually(lambda: len(site.sockets) == 0)


def test_whatever_waits_for_too_long_ends_the_connection() -> None:
    """The message after the last that may wait closes it, and the first goodbye counts."""

    async def fill() -> Any:
        connection: Connection[str] = Connection(2)
        for word in ("one", "two", "three"):
            connection.offer(word)
        connection.end(RESTART)
        return await connection.ended

    assert asyncio.run(fill()).reason == "too slow"


def test_closing_a_hub_ends_every_connection(site: Site) -> None:
    """Before a server stops: clients are told to come back."""
    with site.live() as live, site.listening() as stream:
        hubs: tuple[Hub[Any], ...] = (site.sockets, site.events)
        for hub in hubs:
            hub.close()
        assert close_of(live) == (1012, "restart")
        assert [json.loads(each["data"]) for each in stream] == [{"reason": "restart"}]


def test_only_get_is_answered_with_a_stream(site: Site) -> None:
    """Anything else is 405."""
    headers = {"Authorization": f"Bearer {token()}"}
    answer = httpx.post(f"http://127.0.0.1:{site.port}/events", headers=headers, trust_env=False)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


def test_a_hub_without_the_middleware_lets_nobody_in(site: Site) -> None:
    """Without verified claims there is nothing to register a connection under."""

    async def call() -> None:
        await site.sockets({"type": "websocket", "path": "/live"}, None, None)  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match="KnellMiddleware"):
        asyncio.run(call())


@pytest.mark.parametrize("bad", [{"event": "a\nb"}, {"event": "a\rb"}, {"id": "1\n"}, {"id": "\0"}])
def test_no_line_of_an_event_is_made_by_its_name(bad: dict[str, str]) -> None:
    """Whoever chooses a name or an id writes no further fields."""
    with pytest.raises(InvalidInput):
        encoded("data", **bad)


def test_the_last_event_is_the_hub_s_own(site: Site) -> None:
    """Nobody else can say that a stream is over."""
    with pytest.raises(InvalidInput):
        site.events.publish("{}", event="end")
