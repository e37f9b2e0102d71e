"""The examples of docs/handlers.md, run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from knell import TokenRevoked
from knell.testing import Knell
from tests.deployment import ROOT

EXAMPLE = re.compile(r"^<!-- example: (\w+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = dict(EXAMPLE.findall((ROOT / "docs" / "handlers.md").read_text()))


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What an example defines, run in an empty folder."""
    monkeypatch.setenv("KNELL_HOME", str(tmp_path))
    found: dict[str, Any] = {}
    exec(EXAMPLES[request.param], found)
    return found


@pytest.mark.parametrize("example", ["sessions"], indirect=True)
def test_the_sessions(example: dict[str, Any], knell: Knell) -> None:
    """A login opens a session, whose end closes it, and the token opens no other."""
    knell.record(example["shop"])
    claims = {"sub": "alice", "sid": "s-1"}
    session_id = example["log_in"](knell.verifier, knell.issue(claims).token)
    assert example["who_is"](session_id) == "alice"
    token = knell.issue(claims).token
    assert example["log_in"](knell.verifier, token) is not None
    knell.revoke("key", {"kid": knell.key.kid})
    assert example["who_is"](session_id) is None
    with pytest.raises(TokenRevoked):
        example["log_in"](knell.verifier, token)


@pytest.mark.parametrize("example", ["cache"], indirect=True)
def test_the_cache_purge(example: dict[str, Any], knell: Knell) -> None:
    """Keys of the token, the session and the user."""
    knell.record(example["shop"])
    issued = knell.issue({"sub": "alice", "sid": "s-1"}, ttl_seconds=60)
    knell.advance(60)
    iss = issued.ref.iss
    assert set(example["removed"]) == {f"token:{issued.ref.jti}", f"session:{iss}:s-1", f"user:{iss}:alice"}


@pytest.mark.parametrize("example", ["webhook"], indirect=True)
def test_the_webhook(example: dict[str, Any], knell: Knell) -> None:
    """It is registered, and its trouble is the service's to try again."""
    recorder = knell.record(example["partner"])
    recorder.fail(httpx.ConnectError("no network in a test"))
    knell.issue({"sid": "s-1"})
    knell.revoke("session", {"sid": "s-1"})
    assert len(recorder.failures) == 1


@pytest.mark.parametrize("example", ["hubs"], indirect=True)
def test_the_hubs(example: dict[str, Any], knell: Knell) -> None:
    """The application is one; what its hubs do is looked at in tests/unit/test_hubs.py."""
    assert callable(example["create_app"](knell.make_verifier("shop")))


def test_every_example_is_run() -> None:
    """A new one needs a test here."""
    assert set(EXAMPLES) == {"sessions", "cache", "webhook", "hubs"}
