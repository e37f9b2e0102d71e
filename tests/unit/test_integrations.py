"""What the integrations share, and what the examples of the frameworks do not show."""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI, Security
from flask import Flask, g
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from knell.errors import DenylistStale, InvalidSettings, KeysUnavailable, TokenInvalid, TokenRevoked
from knell.integrations.fastapi import Bearer, LiveWebSocket
from knell.integrations.flask import Knell
from knell.integrations.refusals import InsufficientScope, NoToken, bearer, refusal, scopes_of
from knell.integrations.wsgi import KnellMiddleware
from knell.verifier import Verifier
from tests.unit.memory_feed import MemoryFeed, revocation
from tests.unit.test_asgi import Wire, _bearer, _closed, _serve, _token, _ws
from tests.unit.tokens_for_tests import verifier

MODULES = {
    "drf": "rest_framework",
    "django": "django",
    "fastapi": "fastapi",
    "fastapi_users": "fastapi_users",
    "flask": "flask",
    "flask_jwt_extended": "flask_jwt_extended",
    "starlette": "starlette",
}


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed(clock=time.time)


@pytest.fixture
def checker(feed: MemoryFeed) -> Iterator[Verifier]:
    with verifier(feed, clock=time.time) as made:
        assert made.wait_ready(20)
        yield made


@pytest.mark.parametrize("module", MODULES)
def test_a_module_without_its_framework_says_what_to_install(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError that names the extra, in place of a traceback through somebody else's package."""
    for name in list(sys.modules):
        if name == MODULES[module] or name.startswith((f"{MODULES[module]}.", "knell.integrations.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, MODULES[module], None)  # type: ignore[arg-type]
    extra = module.replace("_", "-")
    with pytest.raises(ImportError, match=rf"{MODULES[module]}.*pip install 'knell\[({extra}|django)\]'"):
        importlib.import_module(f"knell.integrations.{module}")


# ---- what a client is told


def test_one_mapping_for_every_framework() -> None:
    """Status, challenge and close code by what was wrong with the token (RFC 6750, section 3)."""
    none = refusal(NoToken("none"), "shop")
    assert (none.status, none.challenge, none.close_code) == (401, 'Bearer realm="shop"', 4401)
    invalid = refusal(TokenInvalid("bad\r\nX: 1"))
    assert invalid.challenge == 'Bearer realm="api", error="invalid_token", error_description="bad??X: 1"'
    revoked = refusal(TokenRevoked("r1", "lost"))
    assert (revoked.status, revoked.close_code, revoked.close_reason) == (401, 4401, "token revoked")
    narrow = refusal(InsufficientScope(["a", "b"]))
    assert (narrow.status, narrow.close_code) == (403, 4403)
    assert narrow.challenge is not None
    assert narrow.challenge.endswith('scope="a b"')
    stale = refusal(DenylistStale(20.0, 10.0))
    assert (stale.status, stale.challenge, stale.headers["Retry-After"], stale.close_code) == (503, None, "5", 1013)
    assert refusal(KeysUnavailable("no keys")) == stale
    assert all(told.headers["Cache-Control"] == "no-store" for told in (none, invalid, narrow, stale))


def test_what_counts_as_a_bearer_token() -> None:
    """The scheme is compared without case, and nothing else is a token."""
    assert bearer("bEaReR  abc ") == "abc"
    assert [bearer(header) for header in (None, "", "Basic abc", "Bearerabc")] == [None] * 4


def test_scopes_are_what_the_standard_says() -> None:
    """A text with spaces; a list, or anything else, grants nothing."""
    assert scopes_of({"scope": "a  b"}) == ["a", "b"]
    assert [scopes_of({"scope": scope}) for scope in (["a"], None, 7)] == [[]] * 3
    assert scopes_of({}) == []


# ---- WSGI and Flask


def test_an_exempt_path_of_a_wsgi_application(checker: Verifier) -> None:
    """It passes without a token and without claims."""
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> list[bytes]:
        seen.append(environ.get("knell.claims"))
        return [b""]

    guarded = KnellMiddleware(app, checker, exempt=["/health"])
    guarded({"PATH_INFO": "/health"}, lambda *_: None)  # type: ignore[arg-type, return-value]
    assert seen == [None]
    with pytest.raises(TypeError, match="collection"):
        KnellMiddleware(app, checker, exempt="/health")


def test_a_flask_application_that_is_made_by_a_factory(checker: Verifier) -> None:
    """The verifier is named in init_app; `check` before every request guards a whole application."""
    knell = Knell(realm="shop")
    app = Flask(__name__)
    app.testing = True  # errors come out of the client
    app.before_request(knell.check)
    app.add_url_rule("/", view_func=lambda: str(g.knell_claims["sub"]))
    with pytest.raises(InvalidSettings, match="no verifier"):
        knell.init_app(app)
    with pytest.raises(InvalidSettings, match="init_app"):
        app.test_client().get("/", headers=_bearer(_token()))
    knell.init_app(app, checker)
    client = app.test_client()
    assert client.get("/", headers=_bearer(_token())).text == "alice"
    assert client.get("/").headers["WWW-Authenticate"] == 'Bearer realm="shop"'


# ---- FastAPI's WebSockets


def _live(checker: Verifier) -> tuple[FastAPI, list[str]]:
    """An application whose route sends without end, and never receives."""
    guard, ended = Bearer(checker), list[str]()
    app = FastAPI()

    @app.websocket("/")
    async def flood(socket: LiveWebSocket = Depends(guard.websocket)) -> None:  # noqa: B008
        await socket.accept()
        try:
            while True:
                await socket.send_text("tick")
                await asyncio.sleep(0.01)
        finally:
            ended.append(str(socket.claims["sub"]))

    @app.websocket("/orders")
    async def orders(socket: LiveWebSocket = Security(guard.websocket, scopes=["orders:read"])) -> None:  # noqa: B008
        await socket.accept()
        await socket.close()

    return app, ended


def test_a_route_that_only_sends_ends_without_an_error(
    checker: Verifier, feed: MemoryFeed, capfd: pytest.CaptureFixture[str]
) -> None:
    """When its token ends the client gets 4401, and the route ends by what `send` raises, which nobody logs."""
    app, ended = _live(checker)

    async def scenario(port: int) -> None:
        async with _ws(port, _token()) as socket:
            assert await socket.recv() == "tick"
            feed.revoke(revocation("session", "s1", now=time.time()))
            await asyncio.wait_for(socket.wait_closed(), 20)
            assert (socket.close_code, socket.close_reason) == (4401, "token revoked")

    with _serve(app) as port:
        asyncio.run(scenario(port))
    assert ended == ["alice"]
    assert "ERROR" not in capfd.readouterr().err  # where uvicorn writes what comes out of an application


def test_a_client_that_leaves_is_the_routes_own_affair(checker: Verifier) -> None:
    """Without an end of the token, WebSocketDisconnect comes out of the route as ever; the watch goes."""
    app, ended = _live(checker)

    async def scenario(port: int) -> None:
        async with _ws(port, _token()) as socket:
            assert await socket.recv() == "tick"

    with _serve(app) as port:
        asyncio.run(scenario(port))
    assert ended == ["alice"]
    assert len(checker._watches) == 0


def test_a_server_that_cannot_deny_closes_with_a_code(checker: Verifier) -> None:
    """Without the extension the handshake is refused with the close code that says why: 4401, 4403, 1013."""
    app, _ = _live(checker)

    async def close_code(wire: Wire, app: FastAPI, path: str, token: str) -> int:
        await app({**wire.scope(token), "path": path, "query_string": b""}, wire.receive, wire.send)
        assert wire.types == ["close"]
        return int(wire.sent[0]["code"])

    async def scenario() -> None:
        assert await close_code(Wire(), app, "/", "nonsense") == 4401
        assert await close_code(Wire(), app, "/orders", _token()) == 4403
        down = MemoryFeed(clock=time.time)
        down.down = True
        with verifier(down, clock=time.time, start_wait_seconds=0) as stale:
            assert await close_code(Wire(), _live(stale)[0], "/", _token()) == 1013

    asyncio.run(scenario())


def test_scopes_of_a_websocket(checker: Verifier) -> None:
    """A WebSocket route can ask for scopes: 403 before the handshake."""
    app, _ = _live(checker)

    async def scenario(port: int) -> None:
        url = f"ws://127.0.0.1:{port}/orders"
        with pytest.raises(InvalidStatus) as refused:
            await connect(url, additional_headers=_bearer(_token()), proxy=None)
        assert refused.value.response.status_code == 403
        granted = await connect(url, additional_headers=_bearer(_token(scope="orders:read")), proxy=None)
        assert (await _closed(granted)).rcvd is not None

    with _serve(app) as port:
        asyncio.run(scenario(port))
