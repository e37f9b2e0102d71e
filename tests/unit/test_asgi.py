"""The ASGI middleware: through a real server on loopback, and message by message where a server would hide it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from knell.integrations import asgi
from knell.integrations.asgi import CLOSE_UNAUTHORIZED, KnellMiddleware, Message, Receive, Scope, Send
from knell.verifier import AVAILABLE, Verifier
from tests.unit.memory_feed import MemoryFeed, eventually, revocation
from tests.unit.tokens_for_tests import claims, mint, verifier


class App:
    """Answers HTTP with the claims; echoes WebSocket messages, and keeps what it received."""

    def __init__(self) -> None:
        self.received: list[Message] = []
        self.scopes: list[Scope] = []
        self.started = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        self.scopes.append(scope)
        if scope["type"] == "http":
            body = json.dumps([scope.get("knell.claims"), scope.get("state", {}).get("knell_claims")]).encode()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})
            return
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            message = await receive()
            self.received.append(message)
            if message["type"] == "websocket.disconnect":
                return
            await send({"type": "websocket.send", "text": message["text"]})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
            self.started.set()


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed(clock=time.time)


@pytest.fixture
def checker(feed: MemoryFeed) -> Iterator[Verifier]:
    with verifier(feed, clock=time.time) as made:
        yield made


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def port(app: App, checker: Verifier) -> Iterator[int]:
    """The port of a real uvicorn that serves the app behind the middleware."""
    with _serve(KnellMiddleware(app, checker, exempt=["/health"])) as found:
        yield found


@contextlib.contextmanager
def _serve(app: Any) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        thread = threading.Thread(target=lambda: server.run([listener]))
        thread.start()
        try:
            eventually(lambda: server.started)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


def _token(**changes: Any) -> str:
    now = time.time()
    return mint(claims(**{"iat": now - 1, "exp": now + 600} | changes))


def _get(port: int, path: str = "/", **headers: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, trust_env=False)


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# ---- HTTP


def test_an_accepted_token_passes_with_its_claims(port: int, app: App) -> None:
    """A request with a good token reaches the application, with the claims in its scope and state."""
    answer = _get(port, **_bearer(_token()))
    assert answer.status_code == 200
    in_scope, in_state = answer.json()
    assert in_scope["sub"] == in_state["sub"] == "alice"
    assert _get(port, Authorization=f"bearer  {_token()}").status_code == 200


def test_no_token_is_401_without_an_error_code(port: int) -> None:
    """A request without a Bearer token is told the scheme and the realm, and no error (RFC 6750, section 3.1)."""
    for headers in ({}, {"Authorization": "Basic YTpi"}):
        answer = _get(port, **headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == 'Bearer realm="api"'


def test_a_refused_token_is_401_invalid_token(port: int, feed: MemoryFeed, checker: Verifier) -> None:
    """Broken, expired and revoked tokens are 401 with error and description, and no token in the answer."""
    feed.revoke(revocation("token", "dead", now=time.time(), reason='a "quoted"\\ réason\r\nX-Evil: 1'))
    eventually(lambda: len(checker._follower.denylist))
    for token, said in [("nonsense", "not a token"), (_token(exp=time.time() - 5), "expired"),
                        (_token(jti="dead"), "revoked")]:  # fmt: skip
        answer = _get(port, **_bearer(token))
        assert answer.status_code == 401
        header = answer.headers["www-authenticate"]
        assert header.startswith('Bearer realm="api", error="invalid_token", error_description="')
        assert header.count('"') == 6
        assert said in answer.json()["error_description"]
        assert "x-evil" not in answer.headers
        assert token not in answer.text + header
        assert answer.headers["cache-control"] == "no-store"


def test_a_stale_denylist_is_503_with_retry_after(feed: MemoryFeed, app: App) -> None:
    """While the verifier accepts nothing by its policy, the answer is 503 and says when to come back."""
    feed.down = True
    with verifier(feed, clock=time.time, start_wait_seconds=0) as made, _serve(KnellMiddleware(app, made)) as port:
        answer = _get(port, **_bearer(_token()))
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert "www-authenticate" not in answer.headers
        assert _get(port, **_bearer("nonsense")).status_code == 401


def test_exempt_paths_need_no_token(port: int) -> None:
    """An exempt path passes without a token and without claims; a path below it does not."""
    assert _get(port, "/health").json() == [None, None]
    assert _get(port, "/health/more").status_code == 401


def test_lifespan_passes_and_starts_the_verifier(port: int, app: App, checker: Verifier) -> None:
    """The application gets its lifespan, and the denylist is followed before the first request."""
    assert app.started.is_set()
    assert checker.wait_ready(20)
    assert not app.scopes


# ---- WebSocket, through a real server


@contextlib.asynccontextmanager
async def _ws(port: int, token: str | None, **more: Any) -> AsyncIterator[Any]:
    headers = None if token is None else _bearer(token)
    async with connect(f"ws://127.0.0.1:{port}/", additional_headers=headers, proxy=None, **more) as socket:
        yield socket


async def _closed(socket: Any) -> ConnectionClosed:
    with pytest.raises(ConnectionClosed) as closed:
        await asyncio.wait_for(socket.recv(), 20)
    return closed.value


def test_a_websocket_is_closed_the_moment_its_token_is_revoked(port: int, app: App, feed: MemoryFeed) -> None:
    """The client of an open WebSocket gets close code 4401 on revocation, and the application a disconnect 4401."""

    async def scenario() -> None:
        async with _ws(port, _token()) as socket, _ws(port, _token(jti="j2", sid="s2")) as other:
            await socket.send("hello")
            assert await socket.recv() == "hello"
            feed.revoke(revocation("session", "s1", now=time.time()))
            closed = await _closed(socket)
            assert closed.rcvd is not None
            assert (closed.rcvd.code, closed.rcvd.reason) == (CLOSE_UNAUTHORIZED, "token revoked")
            await other.send("still here")
            assert await other.recv() == "still here"

    asyncio.run(scenario())
    ends = eventually(lambda: [message for message in app.received if message["type"] == "websocket.disconnect"])
    assert ends[0]["code"] == CLOSE_UNAUTHORIZED


def test_a_websocket_is_closed_at_its_tokens_exp(port: int) -> None:
    """An idle WebSocket is closed with 4401 when its token expires, and not before."""

    async def scenario() -> None:
        exp = time.time() + 0.5
        async with _ws(port, _token(exp=exp)) as socket:
            closed = await _closed(socket)
            assert time.time() >= exp
            assert closed.rcvd is not None
            assert (closed.rcvd.code, closed.rcvd.reason) == (CLOSE_UNAUTHORIZED, "token expired")

    asyncio.run(scenario())


def test_a_browser_offers_its_token_as_a_subprotocol(port: int, app: App) -> None:
    """`bearer, <token>` is accepted, answered with "bearer", and the token is not among the app's subprotocols."""

    async def scenario() -> None:
        token: Any = _token()
        async with _ws(port, None, subprotocols=["bearer", token, "chat"]) as socket:
            assert socket.subprotocol == "bearer"
            await socket.send("hello")
            assert await socket.recv() == "hello"
        assert app.scopes[0]["subprotocols"] == ["chat"]

    asyncio.run(scenario())


def test_a_websocket_with_a_refused_token_is_401_before_the_handshake(port: int, app: App) -> None:
    """Without an accepted token the handshake is answered with 401, and the application sees nothing."""

    async def scenario() -> None:
        for token in (None, "nonsense", _token(exp=time.time() - 1)):
            with pytest.raises(InvalidStatus) as refused:
                async with _ws(port, token):
                    raise AssertionError("accepted")
            assert refused.value.response.status_code == 401
            assert refused.value.response.headers["WWW-Authenticate"].startswith("Bearer ")

    asyncio.run(scenario())
    assert not app.scopes


def test_a_closed_websocket_is_no_longer_watched(port: int, checker: Verifier) -> None:
    """When a WebSocket closes by itself, its watch goes with it."""

    async def scenario() -> None:
        async with _ws(port, _token()) as socket:
            await socket.send("hello")
            await socket.recv()
            assert len(checker._watches) == 1

    asyncio.run(scenario())
    eventually(lambda: len(checker._watches) == 0)


# ---- WebSocket, message by message


class Wire:
    """A server's end of one WebSocket."""

    def __init__(self, *, extensions: dict[str, Any] | None = None) -> None:
        self.to_app: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.closed = asyncio.Event()
        self.to_app.put_nowait({"type": "websocket.connect"})
        self.extensions = extensions

    def scope(self, token: str) -> Scope:
        headers = [(b"authorization", f"Bearer {token}".encode())]
        found: Scope = {"type": "websocket", "path": "/", "headers": headers, "subprotocols": []}
        return found if self.extensions is None else {**found, "extensions": self.extensions}

    async def receive(self) -> Message:
        return await self.to_app.get()

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] == "websocket.close":
            self.closed.set()

    @property
    def types(self) -> list[str]:
        return [message["type"].removeprefix("websocket.") for message in self.sent]


def test_without_the_extension_a_refused_websocket_is_closed_with_4401(checker: Verifier) -> None:
    """A server that cannot answer a handshake with HTTP gets a close with 4401 in place of an accept."""

    async def scenario() -> None:
        wire = Wire()
        await KnellMiddleware(_never, checker)(wire.scope("nonsense"), wire.receive, wire.send)
        assert wire.sent == [{"type": "websocket.close", "code": 4401, "reason": "token invalid"}]

    asyncio.run(scenario())


def test_a_stale_denylist_closes_with_try_again_later(feed: MemoryFeed) -> None:
    """A WebSocket that is refused for a stale denylist is closed with 1013."""

    async def scenario() -> None:
        feed.down = True
        with verifier(feed, clock=time.time, start_wait_seconds=0) as made:
            wire = Wire(extensions={})
            await KnellMiddleware(_never, made)(wire.scope(_token()), wire.receive, wire.send)
            assert [message["code"] for message in wire.sent] == [1013]

    asyncio.run(scenario())


async def _never(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the application was reached")


def test_nothing_is_sent_after_the_close(checker: Verifier, feed: MemoryFeed) -> None:
    """An application that goes on sending after the end gets an OSError, and none of it goes out."""
    raised: list[BaseException] = []

    async def scenario() -> None:
        wire = Wire()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            feed.revoke(revocation("token", "j1", now=time.time()))
            await asyncio.wait_for(wire.closed.wait(), 20)
            try:
                await send({"type": "websocket.send", "text": "late"})
            except OSError as error:
                raised.append(error)
            assert await receive() == await receive()
            await send({"type": "websocket.send", "text": "later"})  # not caught: ends the app, and hurts nobody

        await KnellMiddleware(app, checker)(wire.scope(_token()), wire.receive, wire.send)
        assert wire.types == ["accept", "close"]

    asyncio.run(scenario())
    assert len(raised) == 1


def test_an_end_before_the_accept_refuses_the_handshake(checker: Verifier, feed: MemoryFeed) -> None:
    """A token that ends while the application has not accepted yet never gets an open WebSocket."""

    async def scenario() -> None:
        wire = Wire()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            feed.revoke(revocation("token", "j1", now=time.time()))
            assert (await receive())["code"] == 4401
            await send({"type": "websocket.accept"})

        await KnellMiddleware(app, checker)(wire.scope(_token()), wire.receive, wire.send)
        assert wire.types == ["close"]

    asyncio.run(scenario())


def test_a_cancelled_receive_loses_no_message(checker: Verifier) -> None:
    """An application that gives up waiting for a message gets it with its next receive."""

    async def scenario() -> None:
        wire = Wire()
        got: list[Message] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(receive(), 0.01)
            wire.to_app.put_nowait({"type": "websocket.receive", "text": "one"})
            wire.to_app.put_nowait({"type": "websocket.disconnect", "code": 1000})
            got.extend([await receive(), await receive()])

        await KnellMiddleware(app, checker)(wire.scope(_token()), wire.receive, wire.send)
        assert [message.get("text", message.get("code")) for message in got] == ["one", 1000]
        assert wire.types == []

    asyncio.run(scenario())


def test_an_application_that_closes_by_itself_is_not_closed_again(checker: Verifier, feed: MemoryFeed) -> None:
    """After the application's own close, the end of the token sends nothing more."""

    async def scenario() -> None:
        wire = Wire()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": 1000})
            feed.revoke(revocation("token", "j1", now=time.time()))
            assert (await receive())["code"] == 4401

        await KnellMiddleware(app, checker)(wire.scope(_token()), wire.receive, wire.send)
        assert [message.get("code") for message in wire.sent] == [None, 1000]

    asyncio.run(scenario())


def test_a_client_that_left_while_nobody_received_is_not_closed(checker: Verifier, feed: MemoryFeed) -> None:
    """A disconnect that waits for the application to ask for it is the end: nothing is sent behind it."""

    async def scenario() -> None:
        wire = Wire()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(receive(), 0.01)
            wire.to_app.put_nowait({"type": "websocket.disconnect", "code": 1001})
            ended, loop = asyncio.Event(), asyncio.get_running_loop()
            # Watches are told in the order in which they were made: this one after the connection's.
            with checker.watch(scope["knell.claims"], lambda _: loop.call_soon_threadsafe(ended.set)):
                feed.revoke(revocation("token", "j1", now=time.time()))
                await asyncio.wait_for(ended.wait(), 20)
            assert wire.to_app.empty()
            assert (await receive())["code"] == 4401

        await KnellMiddleware(app, checker)(wire.scope(_token()), wire.receive, wire.send)
        assert wire.types == ["accept"]

    asyncio.run(scenario())


@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError])
def test_a_server_that_refuses_the_close_hurts_nobody(
    checker: Verifier, feed: MemoryFeed, error: type[Exception]
) -> None:
    """What a server raises because the client has just left does not come out of the application."""

    async def scenario() -> None:
        wire = Wire()

        async def send_to_nobody(message: Message) -> None:
            await wire.send(message)
            if message["type"] == "websocket.close":
                raise error("Unexpected ASGI message 'websocket.close'")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            feed.revoke(revocation("token", "j1", now=time.time()))
            assert (await receive())["code"] == 4401

        await KnellMiddleware(app, checker)(wire.scope(_token()), wire.receive, send_to_nobody)
        assert wire.types == ["accept", "close"]

    asyncio.run(scenario())


@pytest.mark.parametrize("blocked", ["websocket.send", "websocket.close"])
def test_a_client_that_does_not_read_keeps_nobody_waiting(
    checker: Verifier, feed: MemoryFeed, monkeypatch: pytest.MonkeyPatch, blocked: str
) -> None:
    """When a send does not return, the application's or that of the close, the application is still released."""
    monkeypatch.setattr(asgi, "CLOSE_SECONDS", 0.05)
    ended: list[str] = []

    async def scenario() -> None:
        wire = Wire()

        async def send_to_the_deaf(message: Message) -> None:
            await wire.send(message)
            if message["type"] == blocked:
                await asyncio.Event().wait()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            feed.revoke(revocation("token", "j1", now=time.time()))
            try:
                if blocked == "websocket.send":
                    await send({"type": "websocket.send", "text": "to nobody"})
                assert (await receive())["code"] == 4401
                ended.append("returned")
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        run = KnellMiddleware(app, checker)(wire.scope(_token()), wire.receive, send_to_the_deaf)
        await asyncio.wait_for(run, 20)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(scenario())
    assert ended == ["cancelled" if blocked == "websocket.send" else "returned"]


def test_a_client_that_does_not_read_on_a_real_server(
    checker: Verifier, feed: MemoryFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application whose sends a real server holds back is released when the token ends."""
    monkeypatch.setattr(asgi, "CLOSE_SECONDS", 0.1)
    blocked, released = threading.Event(), threading.Event()

    async def flood(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await App()._lifespan(receive, send)
            return
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                sending = asyncio.ensure_future(send({"type": "websocket.send", "bytes": bytes(2**20)}))
                if not (await asyncio.wait([sending], timeout=1.0))[0]:
                    blocked.set()
                await sending
        finally:
            released.set()

    async def scenario(port: int) -> None:
        async with _ws(port, _token(), compression=None, max_queue=1, close_timeout=0.1):
            assert await asyncio.to_thread(blocked.wait, 60)
            feed.revoke(revocation("token", "j1", now=time.time()))
            assert await asyncio.to_thread(released.wait, 20)

    with _serve(KnellMiddleware(flood, checker)) as port:
        asyncio.run(scenario(port))


def test_an_error_of_the_application_is_not_hidden(checker: Verifier) -> None:
    """What an application raises reaches the server, and the watch is gone."""

    async def scenario() -> None:
        wire = Wire()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise ConnectionResetError("the app's own")

        with pytest.raises(ConnectionResetError):
            await KnellMiddleware(app, checker)(wire.scope(_token()), wire.receive, wire.send)

    asyncio.run(scenario())
    assert len(checker._watches) == 0


def test_a_token_from_elsewhere(feed: MemoryFeed) -> None:
    """`websocket_token` takes the token from wherever the application wants it."""

    async def scenario() -> None:
        with verifier(feed, clock=time.time, policy=AVAILABLE) as made:
            wire, seen = Wire(), []

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                seen.append(scope["knell.claims"]["jti"])

            taken = KnellMiddleware(app, made, websocket_token=lambda scope: scope["query_string"].decode())
            scope = {**wire.scope("unused"), "query_string": _token().encode()}
            await taken(scope, wire.receive, wire.send)
            assert seen == ["j1"]

    asyncio.run(scenario())


def test_exempt_is_not_one_string(checker: Verifier) -> None:
    """A string for `exempt` would exempt its letters; it is refused."""
    with pytest.raises(TypeError, match="collection"):
        KnellMiddleware(_never, checker, exempt="/health")


def test_a_starlette_application(checker: Verifier, feed: MemoryFeed) -> None:
    """As Starlette's middleware it gives request.state.knell_claims, and ends a WebSocket as a disconnect."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route, WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    codes: list[int] = []

    async def who(request: Request) -> Response:
        return PlainTextResponse(request.state.knell_claims["sub"])

    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        try:
            while True:
                await socket.send_text(await socket.receive_text())
        except WebSocketDisconnect as end:
            codes.append(end.code)

    routes = [Route("/", who), WebSocketRoute("/", echo)]
    app = Starlette(routes=routes, middleware=[Middleware(KnellMiddleware, verifier=checker)])

    async def scenario(port: int) -> None:
        async with _ws(port, _token()) as socket:
            await socket.send("hello")
            assert await socket.recv() == "hello"
            feed.revoke(revocation("token", "j1", now=time.time()))
            closed = await _closed(socket)
            assert closed.rcvd is not None
            assert closed.rcvd.code == CLOSE_UNAUTHORIZED

    with _serve(app) as port:
        assert _get(port, **_bearer(_token())).text == "alice"
        asyncio.run(scenario(port))
        eventually(lambda: codes)
    assert codes == [CLOSE_UNAUTHORIZED]
