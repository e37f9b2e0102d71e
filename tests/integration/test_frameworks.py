"""The example of each framework, on a real server: a request is accepted, its token revoked, the next one refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from knell.integrations.refusals import CLOSE_UNAUTHORIZED
from tests.deployment import until
from tests.frameworks import Home, accepted, get, run_django, serve_asgi, serve_wsgi

SCOPED = ["with_asgi", "with_fastapi", "with_flask", "with_drf"]
LIVE = ["with_asgi", "with_fastapi"]
SERVERS: dict[str, Callable[[Any], AbstractContextManager[str]]] = {
    "with_asgi": serve_asgi,
    "with_fastapi": serve_asgi,
    "with_wsgi": serve_wsgi,
    "with_flask": serve_wsgi,
}
DJANGO = ["with_django", "with_drf"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """One issuer for all of them."""
    made = Home(tmp_path_factory.mktemp("frameworks"))
    yield made
    made.issuer.close()


every = pytest.mark.parametrize("served", [*SERVERS, *DJANGO], indirect=True)


@pytest.fixture(scope="module")
def servers(home: Home) -> Iterator[Callable[[str], str]]:
    """Starts an example when it is asked for, and gives its URL. All of them run until the end."""
    urls: dict[str, str] = {}
    with contextlib.ExitStack() as opened:

        def start(name: str) -> str:
            if name not in urls and name in DJANGO:
                urls[name] = opened.enter_context(run_django(home, name))
            elif name not in urls:
                names = opened.enter_context(home.loaded(name))
                urls[name] = opened.enter_context(SERVERS[name](names["app"]))
            accepted(f"{urls[name]}/me", home.token())
            return urls[name]

        yield start


@pytest.fixture
def served(request: pytest.FixtureRequest, servers: Callable[[str], str]) -> tuple[str, str]:
    """The name and the URL of an example."""
    return request.param, servers(request.param)


def _live(url: str, token: str | None, **more: Any) -> Any:
    headers = None if token is None else {"Authorization": f"Bearer {token}"}
    return connect(f"{url.replace('http', 'ws', 1)}/live", additional_headers=headers, proxy=None, **more)


# ---- HTTP


@every
def test_a_revoked_token_is_refused_at_once(served: tuple[str, str], home: Home) -> None:
    """A good token is let in with its claims; revoked, it is 401 invalid_token, while another one goes on."""
    _, url = served
    token, other = home.token(), home.token()
    for good in (token, other):
        answer = get(f"{url}/me", good)
        assert (answer.status_code, answer.text.strip().strip('"')) == (200, "alice")
    home.issuer.revoke("token", {"jti": _jti(home, token)}, reason="stolen")
    refused = until(lambda: found if (found := get(f"{url}/me", token)).status_code == 401 else None)
    header = refused.headers["www-authenticate"]
    assert header.startswith('Bearer realm="api", error="invalid_token", error_description="the token was revoked by ')
    assert token not in refused.text + header
    assert "stolen" in refused.text
    assert get(f"{url}/me", other).status_code == 200


@every
def test_a_revoked_session_takes_its_refreshed_tokens_along(served: tuple[str, str], home: Home) -> None:
    """Every token of a session is refused, those of a refresh too."""
    _, url = served
    sid = uuid4().hex
    first = home.token(sid=sid)
    second = home.issuer.refresh(first, ttl_seconds=600).token
    assert get(f"{url}/me", second).status_code == 200
    home.issuer.revoke("session", {"sid": sid})
    for token in (first, second):
        until(lambda token=token: get(f"{url}/me", token).status_code == 401)


@every
def test_no_token_and_nonsense(served: tuple[str, str]) -> None:
    """Without a token the challenge names no error (RFC 6750, section 3.1); with nonsense it does."""
    _, url = served
    answer = get(f"{url}/me")
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer realm="api"')
    assert httpx.get(f"{url}/me", auth=("alice", "x"), trust_env=False).headers["www-authenticate"].count("error") == 0
    answer = get(f"{url}/me", "no-token-at-all")
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert "no-token-at-all" not in answer.text


@pytest.mark.parametrize("served", SCOPED, indirect=True)
def test_scopes(served: tuple[str, str], home: Home) -> None:
    """What asks for a scope is 403 without it, and says so where the framework lets it."""
    name, url = served
    assert get(f"{url}/orders", home.token(scope="orders:read orders:write")).status_code == 200
    for scope in ("orders:write", ["orders:read"]):
        refused = get(f"{url}/orders", home.token(scope=scope))
        assert refused.status_code == 403
        if name != "with_asgi":  # Starlette's own `requires`
            assert 'error="insufficient_scope"' in refused.headers["www-authenticate"]
            assert 'scope="orders:read"' in refused.headers["www-authenticate"]


@pytest.mark.parametrize("name", [*SERVERS, "with_drf"])
def test_a_stale_denylist_is_503_with_retry_after(home: Home, name: str) -> None:
    """With a store that nobody reaches, a good token is 503 with Retry-After, and a bad one is still 401."""
    away = {"KNELL_STORE_URL": "redis://127.0.0.1:1/0"}
    with contextlib.ExitStack() as opened:
        if name in DJANGO:
            url = opened.enter_context(run_django(home, name, **away))
        else:
            url = opened.enter_context(SERVERS[name](opened.enter_context(home.loaded(name, **away))["app"]))
        stale = get(f"{url}/me", home.token())
        assert (stale.status_code, stale.headers["retry-after"]) == (503, "5")
        assert "www-authenticate" not in stale.headers
        assert get(f"{url}/me", "nonsense").status_code == 401


@pytest.mark.parametrize("served", ["with_django"], indirect=True)
def test_exempt_paths(served: tuple[str, str]) -> None:
    """What is exempt needs no token, and what merely begins like it does."""
    _, url = served
    assert get(f"{url}/health").text == "well"
    assert get(f"{url}/healthy").status_code == 401
    assert get(f"{url}/admin/login").status_code == 404  # no token was asked for
    assert get(f"{url}/admin").status_code == 401


def test_openapi_names_the_bearer_scheme(home: Home) -> None:
    """FastAPI's schema has the scheme, and the operations that ask for it with their scopes."""
    with home.loaded("with_fastapi") as names:
        schema = names["app"].openapi()
    assert schema["components"]["securitySchemes"] == {
        "Bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    }
    assert schema["paths"]["/me"]["get"]["security"] == [{"Bearer": []}]
    assert schema["paths"]["/orders"]["get"]["security"] == [{"Bearer": ["orders:read"]}]


# ---- WebSocket


@pytest.mark.parametrize("served", LIVE, indirect=True)
def test_an_open_websocket_is_closed_when_its_token_is_revoked(served: tuple[str, str], home: Home) -> None:
    """The socket echoes, then its session is revoked: 4401, while another one stays open."""
    _, url = served
    sid = uuid4().hex
    token, other = home.token(sid=sid), home.token()

    async def scenario() -> None:
        async with _live(url, token) as socket, _live(url, other) as second:
            await socket.send("hello")
            assert await socket.recv() == "alice: hello"
            await asyncio.to_thread(home.issuer.revoke, "session", {"sid": sid})
            with pytest.raises(ConnectionClosed) as closed:
                await asyncio.wait_for(socket.recv(), 20)
            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (CLOSE_UNAUTHORIZED, "token revoked")
            await second.send("still here")
            assert await second.recv() == "alice: still here"

    asyncio.run(scenario())


@pytest.mark.parametrize("served", LIVE, indirect=True)
def test_a_websocket_without_a_good_token_is_refused(served: tuple[str, str], home: Home) -> None:
    """The handshake is answered with 401; a browser's way to bring a token works, and "bearer" is the answer to it."""
    _, url = served

    async def scenario() -> None:
        for bad in (None, "nonsense"):
            with pytest.raises(InvalidStatus) as refused:
                async with _live(url, bad):
                    raise AssertionError("accepted")
            assert refused.value.response.status_code == 401
            assert refused.value.response.headers["WWW-Authenticate"].startswith("Bearer ")
        subprotocols: Any = ["bearer", home.token()]
        async with _live(url, None, subprotocols=subprotocols) as socket:
            assert socket.subprotocol == "bearer"

    asyncio.run(scenario())


def _jti(home: Home, token: str) -> str:
    claims = jwt.decode(token, home.key.verifying_key, algorithms=["EdDSA"], audience="shop")
    return str(claims["jti"])
