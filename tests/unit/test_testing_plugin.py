"""The pytest plugin, as pytest finds it by the installed package: with a conftest, and tests, of a user's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
import pytest
from knell import Rules

@pytest.fixture
def knell_rules():
    return Rules(max_token_seconds=60)
"""

TESTS = """
import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from knell import InvalidClaims, Service
from knell.integrations.asgi import KnellMiddleware

shop = Service("shop")
shop.on_session_end(lambda notice: None)


def create_app(verifier):
    pages = Starlette(routes=[Route("/", lambda request: PlainTextResponse("hello"))])
    return KnellMiddleware(pages, verifier)


def get(app, token):
    async def ask():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="https://shop.example") as client:
            return await client.get("/", headers={"authorization": f"Bearer {token}"})
    return asyncio.run(ask()).status_code


def test_that_fails(knell):
    recorder = knell.record(shop)
    knell.issue({"sid": "s-1"}, ttl_seconds=60)
    knell.advance(60)
    assert recorder.session_ends == []


def test_that_the_next_one_begins_anew(knell):
    assert knell.record(shop).session_ends == []
    assert knell.store.due(before=knell.clock.now + 1000) == []


def test_rules(knell):
    with pytest.raises(InvalidClaims):
        knell.issue({"sub": "alice"}, ttl_seconds=61)


def test_an_application(knell):
    app = create_app(knell.make_verifier("shop"))
    issued = knell.issue({"sub": "alice", "aud": "shop"}, ttl_seconds=30)
    assert get(app, issued.token) == 200
    assert get(app, knell.issue({"sub": "alice"}, ttl_seconds=30).token) == 401
    knell.revoke("subject", {"sub": "alice"})
    assert get(app, issued.token) == 401
"""


def test_a_user_s_tests_pass_and_fail_as_they_should(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules come from a conftest, an application gets a verifier, nothing of one test is left in the next."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider -p no:randomly -W error")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    done = pytester.runpytest_subprocess()
    done.assert_outcomes(passed=3, failed=1)
    done.stdout.fnmatch_lines(["FAILED *::test_that_fails - *"])
    assert not (pytester.path / ".knell").exists()


def test_who_does_not_ask_for_it_loads_nothing_of_it() -> None:
    """Every run of pytest where Knell is installed imports the plugin, and no more."""
    heavy = ("celery", "kombu", "sqlalchemy", "redis", "jwt", "structlog", "knell.service", "knell.testing.inprocess")
    program = f"import sys, knell.testing.plugin; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
