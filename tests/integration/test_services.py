"""The three example services, each as the processes that a deployment runs."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from knell import Issued, Issuer, Settings
from knell.handlers.webhook import Webhook
from knell.keys import SigningKey
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
