"""The three example services: their session stores, and each of them as the processes that a deployment runs."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from knell import Cause, InvalidSettings, Issued, Issuer, Notice, Scope, Settings, TokenRef
from knell.handlers.webhook import Webhook
from knell.keys import SigningKey
from services.sessions import TOMBSTONE_SECONDS, Sessions, end_missed, open_sessions
from services.sessions_sqlite import SqliteSessions
from tests.servers import Process

ROOT = Path(__file__).resolve().parents[2]
ISSUER = "https://auth.example"
DEADLINE_SECONDS = 20.0
SECRET = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def until(check: Callable[[], Any], what: str) -> Any:
    """Wait until `check()` is true, and return what it returned."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := check()):
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_SECONDS:g} s"
        time.sleep(0.01)
    return found


# ---- where sessions are kept


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def sessions(request: pytest.FixtureRequest, settings: Callable[..., Settings]) -> Sessions:
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    return open_sessions(url, settings(), name="shop")


def token(**changes: Any) -> TokenRef:
    fields = {"iss": ISSUER, "jti": uuid4().hex, "exp": 2_000.0, "iat": 1_000.0, "auth_time": 1_000.0}
    return TokenRef(**fields | {"sid": "s-1", "sub": "alice"} | changes)


def notice(scope: Scope, **changes: Any) -> Notice:
    fields: dict[str, Any] = {"cause": Cause.REVOKED, "ends": frozenset({"token", "session"}), "at": 1_500.0}
    return Notice(batch_id=f"r-{uuid4()}", scope=scope, iss=ISSUER, **fields | changes)


@pytest.mark.parametrize(
    ("scope", "match"),
    [
        (Scope.TOKEN, {"jti": "t-1", "sid": "s-1"}),
        (Scope.TOKEN, {"jti": "a later token of the session", "sid": "s-1"}),
        (Scope.SESSION, {"sid": "s-1"}),
        (Scope.SUBJECT, {"sub": "alice", "issued_before": 1_500.0}),
    ],
)
def test_a_notice_ends_the_sessions_that_it_names_and_no_other(
    sessions: Sessions, scope: Scope, match: dict[str, Any]
) -> None:
    """Sessions are found by jti, by sid and by sub, within one issuer."""
    ended = sessions.open(token(jti="t-1"))
    others = [sessions.open(token(sid="s-2", sub="bob")), sessions.open(token(jti="t-1", iss="https://other.example"))]
    assert ended is not None
    assert [each.jti for each in sessions.end(notice(scope, **match))] == ["t-1"]
    assert sessions.get(ended) is None
    assert {session_id for session_id, _ in sessions.all()} == set(others)


def test_a_notice_that_comes_twice_ends_nothing_more(sessions: Sessions) -> None:
    """A copy of a notice finds nothing left to end."""
    sessions.open(token())
    told = notice(Scope.SESSION, sid="s-1")
    assert len(sessions.end(told)) == 1
    assert sessions.end(told) == []


def test_a_request_in_flight_cannot_open_an_ended_session_again(sessions: Sessions) -> None:
    """A tombstone keeps out whatever its notice matches: by session, by subject, and by token."""
    for told in (
        notice(Scope.SESSION, sid="s-1"),
        notice(Scope.SUBJECT, sub="bob", issued_before=1_500.0),
        notice(Scope.TOKEN, jti="t-9", sid="s-9", cause=Cause.EXPIRED),
    ):
        sessions.end(told)
    assert sessions.open(token()) is None
    assert sessions.open(token(sid="s-2", sub="bob")) is None
    assert sessions.open(token(sid="s-9", sub="carol", jti="another")) is None
    assert list(sessions.all()) == []


def test_a_new_life_is_not_kept_out(sessions: Sessions) -> None:
    """Who logs in after the end that a tombstone tells of gets a session, and a late copy of the notice spares it."""
    told = [
        notice(Scope.SUBJECT, sub="alice", issued_before=1_500.0),
        notice(Scope.TOKEN, jti="t-1", sid="s-1", cause=Cause.EXPIRED),
    ]
    for each in told:
        sessions.end(each)
    session_id = sessions.open(token(auth_time=1_501.0, iat=1_501.0))
    assert session_id is not None
    assert [sessions.end(each) for each in told] == [[], []]
    assert sessions.get(session_id) is not None


def test_of_an_end_and_an_opening_whichever_is_second_sees_the_other(sessions: Sessions) -> None:
    """However requests and a notice interleave, no session of what has ended is left."""
    told = notice(Scope.SESSION, sid="s-1")
    with ThreadPoolExecutor(8) as pool:
        opened = [pool.submit(sessions.open, token()) for _ in range(20)]
        ending = pool.submit(sessions.end, told)
        opened += [pool.submit(sessions.open, token()) for _ in range(20)]
        given = [session_id for each in opened if (session_id := each.result(DEADLINE_SECONDS)) is not None]
        ending.result(DEADLINE_SECONDS)
    assert [session_id for session_id in given if sessions.get(session_id)] == []
    assert list(sessions.all()) == []


def test_a_logout_removes_one_session(sessions: Sessions) -> None:
    """Removing a session leaves its user's others, and no tombstone."""
    first, second = sessions.open(token()), sessions.open(token())
    assert first is not None
    assert second is not None
    assert sessions.remove(first) is not None
    assert sessions.remove(first) is None
    assert sessions.get(second) is not None
    assert sessions.open(token()) is not None


def test_tombstones_of_sqlite_leave_in_time(tmp_path: Path) -> None:
    """A tombstone outlives any request in flight, and then goes."""
    now = [1_500.0]
    sessions = SqliteSessions(tmp_path / "shop.db", clock=lambda: now[0])
    sessions.end(notice(Scope.SESSION, sid="s-1"))
    now[0] += TOMBSTONE_SECONDS
    sessions.end(notice(Scope.SESSION, sid="another"))
    assert sessions.open(token()) is not None


def test_the_sqlite_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    """A session's id opens the session: nobody else on the machine may read the file, or what SQLite puts beside it."""
    path = tmp_path / "home" / "shop.db"
    before = os.umask(0o022)
    try:
        sessions = SqliteSessions(path)
        with sessions._writing() as db:
            db.execute("DELETE FROM sessions")
            modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert modes == dict.fromkeys(modes, 0o600)
    assert "shop.db" in modes


@pytest.mark.parametrize("url", ["rds://:hunter2@h", "sqlite://u:hunter2@h/db", "redis://:hunter2@h/0?bogus=1"])
def test_a_url_for_sessions_that_cannot_be_used_is_not_shown(url: str, settings: Callable[..., Settings]) -> None:
    """It is refused when it is opened, and the text has no password in it."""
    with pytest.raises(InvalidSettings, match="the URL of the shop's sessions") as caught:
        open_sessions(url, settings(), name="shop")
    assert "hunter2" not in str(caught.value)


def test_after_missed_notices_every_session_is_looked_up(sessions: Sessions, settings: Callable[..., Settings]) -> None:
    """What is on the denylist or past its own end goes, and the rest stays."""
    made = settings()
    with Issuer(ISSUER, SigningKey.generate(), settings=made) as issuer:
        refs = [issuer.issue({"sub": "alice", "sid": sid}, ttl_seconds=60).ref for sid in ("s-1", "s-2", "s-3")]
        issuer.revoke("session", {"sid": "s-2"})
    living = sessions.open(refs[0])
    sessions.open(refs[1])
    sessions.open(refs[2].replace(exp=time.time() - 1))
    assert sorted(str(each.sid) for each in end_missed(sessions, made)) == ["s-2", "s-3"]
    assert [session_id for session_id, _ in sessions.all()] == [living]


# ---- the services, as processes


@dataclass
class Company:
    """The processes of the three services, on the embedded default."""

    issuer: Issuer
    shop: str
    gateway: str
    receiver: Path

    def issue(self, user: str, sid: str, *, ttl_seconds: float = 300) -> Issued:
        claims = {"sub": user, "sid": sid, "aud": ["shop", "gateway"]}
        return self.issuer.issue(claims, ttl_seconds=ttl_seconds)

    def received(self) -> list[dict[str, Any]]:
        """What the partner's receiving end has acted on."""
        lines = [json.loads(line) for line in self.receiver.read_text().splitlines()]
        return [line for line in lines if line["event"] == "received"]


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    if shutil.which("node") is None:
        receiver_command = [sys.executable, str(ROOT / "examples" / "stage" / "receiver.py")]
    else:
        receiver_command = ["node", str(ROOT / "examples" / "partner-receiver.mjs")]
    home = tmp_path_factory.mktemp("company")
    key = SigningKey.generate()
    public_key = home / "auth.pem"
    public_key.write_bytes(key.verifying_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KNELL_")} | {
        "KNELL_HOME": str(home / "knell"),
        "AUTH_ISSUER": ISSUER,
        "AUTH_PUBLIC_KEY": str(public_key),
        "PARTNER_WEBHOOK_SECRET": SECRET,
        "PORT": "0",
        "PYTHONPATH": str(ROOT),
    }
    running: list[Process] = []

    def start(name: str, command: list[str], ready: str) -> str:
        process = Process(command, directory=home / name, environ=environ)
        running.append(process)
        process.run(lambda: re.search(ready, process.log.read_text()) is not None)
        found = re.search(ready, process.log.read_text())
        assert found is not None
        return found[1]

    try:
        port = start("receiver", receiver_command, r'"port": ?(\d+)')
        environ["PARTNER_WEBHOOK_URL"] = f"http://127.0.0.1:{port}/hooks"
        web = [sys.executable, "-m", "uvicorn", "--port", "0"]
        shop = start("shop-web", [*web, "services.shop:web"], r"running on (http://\S+)")
        gateway = start("gateway-web", [*web, "services.gateway:web"], r"running on http(://\S+)")
        for name in ("notifier", "shop", "gateway", "partner"):
            module = "tasks" if name == "notifier" else f"services.{name}"
            worker = [sys.executable, "-m", "celery", "-A", module, "worker", "-l", "INFO", "-n", f"{name}@test"]
            start(name, worker, rf"({name}@test) ready")
        settings = Settings(home=home / "knell")
        with Issuer(ISSUER, key, settings=settings) as issuer:
            yield Company(issuer, shop, f"ws{gateway}", running[0].log)
    finally:
        for process in running:
            process.stop()


def log_in(company: Company, issued: Issued) -> httpx.Response:
    headers = {"authorization": f"Bearer {issued.token}"}
    return httpx.post(f"{company.shop}/session", headers=headers, trust_env=False)


def me(company: Company, cookie: str) -> httpx.Response:
    return httpx.get(f"{company.shop}/me", headers={"cookie": f"__Host-shop={cookie}"}, trust_env=False)


@contextmanager
def live(company: Company, issued: Issued, *, ticket: str = "") -> Iterator[tuple[ClientConnection, dict[str, Any]]]:
    headers = {"authorization": f"Bearer {issued.token}"}
    with connect(f"{company.gateway}/live?ticket={ticket}", additional_headers=headers, proxy=None) as socket:
        yield socket, json.loads(socket.recv(DEADLINE_SECONDS))


def greeting(company: Company, issued: Issued, *, ticket: str = "") -> dict[str, Any]:
    with live(company, issued, ticket=ticket) as (_, found):
        return found


def test_the_shop_ends_a_session_when_its_token_is_revoked(company: Company) -> None:
    """A login gives a session that /me knows; revoking its token ends it, and the token opens no other."""
    issued, other = company.issue("alice", "shop-1"), company.issue("alice", "shop-2")
    cookies = [log_in(company, each).cookies["__Host-shop"] for each in (issued, other)]
    assert me(company, cookies[0]).json() == {"iss": ISSUER, "sub": "alice", "sid": "shop-1"}
    company.issuer.revoke("token", {"jti": issued.ref.jti})
    until(lambda: me(company, cookies[0]).status_code == 401, "the end of the session")
    assert log_in(company, issued).status_code == 401
    assert me(company, cookies[1]).status_code == 200


def test_the_shop_asks_for_a_token_and_forgets_at_logout(company: Company) -> None:
    """Without a token there is no login, without a cookie no session, and after a logout none either."""
    assert httpx.post(f"{company.shop}/session", trust_env=False).status_code == 401
    assert me(company, "made up").status_code == 401
    response = log_in(company, company.issue("alice", "shop-3"))
    assert re.search("secure", response.headers["set-cookie"], re.IGNORECASE)
    assert re.search("httponly", response.headers["set-cookie"], re.IGNORECASE)
    cookie = response.cookies["__Host-shop"]
    httpx.post(f"{company.shop}/logout", headers={"cookie": f"__Host-shop={cookie}"}, trust_env=False)
    assert me(company, cookie).status_code == 401


@pytest.mark.parametrize("how", ["expired", "revoked"])
def test_the_gateway_closes_with_4401_when_the_token_ends(company: Company, how: str) -> None:
    """A live connection is closed by the gateway the moment its token ends, by either way; another stays open."""
    issued = company.issue("bob", f"gateway-{how}", ttl_seconds=2 if how == "expired" else 300)
    staying = company.issue("bob", "gateway-other")
    with live(company, staying) as (other, _), live(company, issued) as (socket, _):
        if how == "revoked":
            company.issuer.revoke("token", {"jti": issued.ref.jti})
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(DEADLINE_SECONDS)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4401, f"token {how}")
        assert time.time() >= (issued.ref.exp if how == "expired" else 0)
        other.send("still here?")
        assert other.recv(DEADLINE_SECONDS) == "still here?"


def test_the_gateways_tickets_resume_once_and_are_voided(company: Company) -> None:
    """A ticket recognises its user once; the tickets of a revoked user are void."""
    issued = company.issue("carol", "gateway-3")
    first = greeting(company, issued)
    second = greeting(company, issued, ticket=first["ticket"])
    third = greeting(company, issued, ticket=first["ticket"])
    assert [each["resumed"] for each in (first, second, third)] == [False, True, False]
    revoked = company.issuer.revoke("subject", {"sub": "carol"}, wait_for=["gateway"], timeout_seconds=DEADLINE_SECONDS)
    assert revoked.services["gateway"].state == "done"
    fourth = greeting(company, company.issue("carol", "gateway-4"), ticket=third["ticket"])
    assert fourth["resumed"] is False


def test_the_partner_is_told_by_a_signed_post(company: Company) -> None:
    """The partner's receiving end verifies the POST of a revocation, and finds what it names."""
    issued = company.issue("dave", "partner-1")
    revoked = company.issuer.revoke(
        "session", {"sid": "partner-1"}, reason="stolen", wait_for=["partner"], timeout_seconds=DEADLINE_SECONDS
    )
    assert revoked.services["partner"].state == "done"
    found = [each for each in company.received() if each["data"].get("sid") == issued.ref.sid]
    assert [(each["type"], each["data"]["reason"]) for each in found] == [("session.ended", "stolen")]


# ---- the partner's receiving end


def receiver_commands() -> list[Any]:
    python = [sys.executable, str(ROOT / "examples" / "stage" / "receiver.py")]
    node = [shutil.which("node") or "node", str(ROOT / "examples" / "partner-receiver.mjs")]
    without_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
    return [pytest.param(python, id="python"), pytest.param(node, id="node", marks=without_node)]


@pytest.fixture(params=receiver_commands())
def receiver(request: pytest.FixtureRequest) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    environ = {**os.environ, "PARTNER_WEBHOOK_SECRET": SECRET, "PORT": "0"}
    with subprocess.Popen(request.param, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}/", process
        process.kill()


def post(url: str, headers: Mapping[str, str], body: bytes) -> int:
    return httpx.post(url, content=body, headers=dict(headers), trust_env=False).status_code


def test_the_receiver_acts_on_each_signed_notice_once(receiver: tuple[str, subprocess.Popen[str]]) -> None:
    """A POST with a good signature is acted on, a copy of it only answered, and a forged or stale one refused."""
    url, process = receiver
    body = json.dumps({"type": "session.ended", "timestamp": "", "data": {"sid": "s-1"}}).encode()
    signed = Webhook(url, SECRET).sign("n-1", body)
    assert post(url, signed, body) == 204
    assert post(url, signed, body) == 204
    assert post(url, signed, body.replace(b"s-1", b"s-2")) == 401
    assert post(url, Webhook(url, SECRET, clock=lambda: time.time() - 3600).sign("n-2", body), body) == 401
    other = "whsec_" + base64.b64encode(bytes(32)).decode()
    assert post(url, Webhook(url, other).sign("n-3", body), body) == 401
    assert post(url, {}, body) == 401
    assert post(url, Webhook(url, [other, SECRET]).sign("n-4", body), body) == 204
    process.kill()
    assert process.stdout is not None
    assert [json.loads(line)["data"]["sid"] for line in process.stdout] == ["s-1", "s-1"]
