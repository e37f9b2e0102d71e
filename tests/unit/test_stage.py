"""What the demo says of what it has seen: its observer and ledger, its exit status, and its colours."""

from __future__ import annotations

import importlib
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from knell import Issued, Settings, TokenExpired, TokenRef, TokenRefused, TokenRevoked
from knell.handlers.sessions import open_sessions

EXAMPLES = Path(__file__).parents[2] / "examples"
# When the sessions of this stage end, Unix seconds.
MOMENT = 1_700_000_000.0
TOKEN_ENDED = 4401
CAUSES = {"expires": "expired", "revoked": "revoked", "lives": "revoked"}


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/demo.py, called without arguments, and without any process of its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    demo = importlib.import_module("demo")

    async def start_company(_: object) -> None:
        return None

    monkeypatch.setattr(demo, "Deployment", lambda **_: nullcontext())
    monkeypatch.setattr(demo, "start_company", start_company)
    return demo


class Stage:
    """Three sessions, of which one expires, one is revoked and one lives, and services that do right by them all.

    Attributes:
        said: when each service says that it has ended a session.
        works: what of each service still works in the end.
        verdicts: how each token is refused.
        code: what connections are closed with.
    """

    def __init__(self, settings: Settings, timeline: Any) -> None:
        from stage.ledger import Session, Token
        from stage.observer import Observer

        self._settings = settings
        self._sessions = {how: Session("ada", f"s-{how}", how) for how in ("expires", "revoked", "lives")}
        for how, session in self._sessions.items():
            session.moment = None if how == "lives" else MOMENT
            ref = TokenRef(iss="https://auth.example", jti=f"t-{how}", exp=MOMENT, iat=MOMENT - 60, sid=session.sid)
            session.tokens.append(Token(session, Issued(how, ref, "store"), how, session.moment))
        self._observer = Observer(timeline, list(self._sessions.values()))
        ended = {"expires": MOMENT + 0.02, "revoked": MOMENT + 0.01}
        self.said = {who: dict(ended) for who in ("shop", "connections", "tickets", "partner")}
        self.works = {who: {"lives"} for who in ("shop", "connections", "tickets")}
        self.verdicts: dict[str, TokenRefused | None] = {
            "expires": TokenExpired("too old"),
            "revoked": TokenRevoked("r-1", None),
            "lives": None,
        }
        self.code = TOKEN_ENDED

    async def play(self) -> list[Any]:
        """Let the observer hear all of it and look at what is left. Returns its rows."""
        for how, at in self.said["shop"].items():
            self._hear("shop", "session_ended", sid=f"s-{how}", cause=CAUSES[how], timestamp=_iso(at))
        for how, at in self.said["tickets"].items():
            self._hear("gateway", "ticket_voided", jti=f"t-{how}", cause=CAUSES[how], timestamp=_iso(at))
        for how, at in self.said["partner"].items():
            data = {"sid": f"s-{how}", "cause": CAUSES[how]}
            self._hear("receiver", "received", type="session.ended", data=data, at=at)
        for how, at in self.said["connections"].items():
            self._observer.closed(self._sessions[how].tokens[0], self.code, at)
        tickets = open_sessions(settings=self._settings, name="gateway")
        for how, session in self._sessions.items():
            token = session.tokens[0]
            token.ticket = f"ticket-{how}"
            # The stage's tokens are years old; a ticket is not kept for that long.
            tickets.add(token.ticket, token.issued.ref.replace(exp=time.time() + 60, iat=time.time()))
            if how not in self.works["tickets"]:
                tickets.remove(token.ticket)
        sockets = [
            SimpleNamespace(token=session.tokens[0], is_alive=self._alive("connections", how))
            for how, session in self._sessions.items()
        ]
        verifier = SimpleNamespace(wait_ready=lambda _: True, verify=self._verify)
        shop = SimpleNamespace(is_alive=lambda session: self._alive("shop", session.how)())
        await self._observer.look(shop, sockets, verifier, self._settings)
        return list(self._observer.rows)

    def _hear(self, name: str, event: str, **fields: object) -> None:
        self._observer.heard(name, json.dumps({"event": event, **fields}))

    def _alive(self, who: str, how: str) -> Callable[[], Any]:
        async def is_alive() -> bool:
            return how in self.works[who]

        return is_alive

    def _verify(self, token: str) -> dict[str, str]:
        refused = self.verdicts[token]
        if refused is not None:
            raise refused
        return {}


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def perform(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Stage], object]) -> int:
    """Run the demo with this stage in place of its story. Returns its exit status."""

    class Story:
        def __init__(self, _: object, settings: Settings, timeline: Any) -> None:
            self._stage = Stage(settings, timeline)
            fault(self._stage)

        async def tell(self, *_: object) -> list[Any]:
            return await self._stage.play()

    monkeypatch.setattr(demo, "Story", Story)
    return int(demo.main())


def test_the_demo_is_content_when_all_that_should_have_ended_has_and_no_other(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 0, and it says so."""
    assert perform(demo, monkeypatch, lambda stage: None) == 0
    assert "Every service ended every session that it should have, and no other." in capsys.readouterr().out


LIVES_ON: dict[str, Callable[[Stage], object]] = {
    **{
        f"{who}: what {how} works on": lambda stage, who=who, how=how: stage.works[who].add(how)
        for who in ("shop", "connections", "tickets")
        for how in ("expires", "revoked")
    },
    **{
        f"{who}: never says so": lambda stage, who=who: stage.said[who].pop("expires")
        for who in ("shop", "connections", "tickets", "partner")
    },
    "an expired token is accepted": lambda stage: stage.verdicts.update(expires=None),
    "a revoked token is accepted": lambda stage: stage.verdicts.update(revoked=None),
    "a revoked token is refused for another reason": lambda stage: stage.verdicts.update(revoked=TokenExpired("")),
    "a connection was closed with another code": lambda stage: setattr(stage, "code", 1011),
}
ENDED_WRONGLY: dict[str, Callable[[Stage], object]] = {
    **{
        f"{who}: what lives is gone": lambda stage, who=who: stage.works[who].clear()
        for who in ("shop", "connections", "tickets")
    },
    **{
        f"{who}: says that what lives has ended": lambda stage, who=who: stage.said[who].update(lives=MOMENT)
        for who in ("shop", "connections", "tickets", "partner")
    },
    **{
        f"{who}: ended too early": lambda stage, who=who: stage.said[who].update(expires=MOMENT - 0.5)
        for who in ("shop", "connections", "tickets", "partner")
    },
    "a token that should live is refused": lambda stage: stage.verdicts.update(lives=TokenRevoked("r-2", None)),
}


@pytest.mark.parametrize("fault", [*LIVES_ON.values(), *ENDED_WRONGLY.values()], ids=[*LIVES_ON, *ENDED_WRONGLY])
def test_the_demo_fails_when_one_thing_lives_on_or_has_ended_wrongly(
    demo: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[Stage], object],
) -> None:
    """Exit status 1, and it points at its table."""
    assert perform(demo, monkeypatch, fault) == 1
    assert "Something was not ended, or ended wrongly: see the table." in capsys.readouterr().out


# The demo with a story of one line, in a process whose output is what the test gives it.
ONE_LINE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import demo
from stage.ledger import row, table
from stage.timeline import Timeline

async def perform(console, home, log):
    Timeline(console).say("all are ready", who="shop")
    console.print(table([row("shop: sessions", [("s-1", "lives")])]))
    return True

demo.perform = perform
sys.exit(demo.main())
"""


def test_the_demo_is_in_colour_on_a_terminal_and_plain_in_a_pipe() -> None:
    """The same text, with and without escape sequences."""
    command = [sys.executable, "-c", ONE_LINE, str(EXAMPLES)]
    asked = {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}  # what people tell rich instead
    environ = {name: value for name, value in os.environ.items() if name not in asked} | {"TERM": "xterm"}
    piped = subprocess.run(command, env=environ, stdout=subprocess.PIPE, timeout=60, check=True).stdout
    near, far = pty.openpty()
    with subprocess.Popen(command, env=environ, stdin=far, stdout=far, stderr=far) as process:
        os.close(far)
        shown = b""
        try:
            while read := os.read(near, 65536):
                shown += read
        except OSError:
            pass  # how Linux says that nobody has the other end any more
        finally:
            os.close(near)
    assert process.returncode == 0
    for output in (piped, shown):
        assert b"all are ready" in output
        assert b"Every service ended every session" in output
    assert b"\x1b" not in piped
    assert b"\x1b[32mshop     all are ready" in shown
