"""The webhook handler, against a real HTTP server on the loopback interface."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from knell import GiveUp, InvalidSettings, Notice
from knell.handlers.webhook import Webhook, WebhookFailed, _asked_for, webhook_id
from knell.notices import Cause
from knell.revocations import Scope
from tests.servers import free_port

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
NOTICE = Notice(
    batch_id="e0-0190",
    n=3,
    cause=Cause.REVOKED,
    ends=frozenset({"token", "session"}),
    scope=Scope.SESSION,
    at=1_700_000_000.5,
    iss="https://auth.example",
    sid="s1",
    sub="alice",
    reason="stolen",
)


class Receiver:
    """An endpoint that keeps what it gets and answers what it is told to."""

    def __init__(self) -> None:
        self.status = 204
        self.retry_after = ""
        self.answers: list[tuple[int, str]] = []  # before the status above is answered again and again
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.hold = threading.Event()
        self.hold.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
                receiver.hold.wait(30)
                status, retry_after = (receiver.answers or [(receiver.status, receiver.retry_after)])[0]
                del receiver.answers[:1]
                self.send_response(status)
                if retry_after:
                    self.send_header("retry-after", retry_after)
                self.send_header("location", "http://127.0.0.1:1/")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?key=secret"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.hold.set()
    receiver.server.shutdown()
    receiver.server.server_close()


def post(hook: Webhook, notice: Notice = NOTICE) -> None:
    async def run() -> None:
        try:
            await hook(notice)
        finally:
            await hook.close()

    asyncio.run(run())


def test_a_notice_is_posted_and_signed(receiver: Receiver) -> None:
    """Id, timestamp and signature are those of the Standard Webhooks specification."""
    post(Webhook(receiver.url, SECRET, clock=lambda: 1_700_000_009.9))
    [(headers, body)] = receiver.got
    assert headers["webhook-id"] == "e0-0190_3"
    assert headers["webhook-timestamp"] == "1700000009"
    signed = b"e0-0190_3.1700000009." + body
    expected = base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    found = json.loads(body)
    assert found["type"] == "session.ended"
    assert found["timestamp"] == "2023-11-14T22:13:20.500Z"
    assert found["data"]["sub"] == "alice"
    assert found["data"]["cause"] == "revoked"
    assert found["data"]["reason"] == "stolen"


def test_a_wide_notice_says_whom_it_is_for(receiver: Receiver) -> None:
    """The scope, what it names, and the cut-off: the receiving end finds its own sessions."""
    wide = {"sid": None, "sub": None, "issued_before": 1_700_000_000.0}
    post(Webhook(receiver.url, SECRET), replace(NOTICE, scope=Scope.CLAIMS, claims={"tenant": "acme"}, **wide))
    post(Webhook(receiver.url, SECRET), replace(NOTICE, scope=Scope.KEY, kid="k-1", sid=None, sub=None))
    by_claims, by_key = (json.loads(body)["data"] for _, body in receiver.got)
    assert (by_claims["scope"], by_claims["claims"]) == ("claims", {"tenant": "acme"})
    assert by_claims["issued_before"] == 1_700_000_000.0
    assert (by_key["scope"], by_key["kid"]) == ("key", "k-1")


def test_two_secrets_sign_side_by_side(receiver: Receiver) -> None:
    """While a secret is replaced, a receiver that knows either can check."""
    other = "whsec_" + base64.b64encode(bytes(24)).decode()
    post(Webhook(receiver.url, [other, SECRET]))
    assert len(receiver.got[0][0]["webhook-signature"].split(" ")) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 410, 422])
def test_a_request_that_is_not_wanted_is_given_up(receiver: Receiver, status: int) -> None:
    """A 4xx says that another try would not change anything."""
    receiver.status = status
    with pytest.raises(GiveUp, match=str(status)):
        post(Webhook(receiver.url, SECRET))


@pytest.mark.parametrize("status", [302, 408, 429, 500, 503])
def test_trouble_that_passes_is_tried_again(receiver: Receiver, status: int) -> None:
    """The error is one that the service retries, and no redirect is followed."""
    receiver.status = status
    with pytest.raises(WebhookFailed) as caught:
        post(Webhook(receiver.url, SECRET))
    assert caught.value.status == status
    assert len(receiver.got) == 1


class Time:
    """A clock that moves when somebody waits for it."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [("120", 120.0), ("Tue, 14 Nov 2023 22:15:20 GMT", 120.0), ("99999999", 3600.0)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_a_retry_after_is_passed_on_to_the_service(
    receiver: Receiver, status: int, retry_after: str, seconds: float
) -> None:
    """As seconds or as a date (RFC 9110, section 10.2.3); and until then nothing else is posted there."""
    receiver.status, receiver.retry_after = status, retry_after
    time = Time()
    hook = Webhook(receiver.url, SECRET, clock=time, sleep=time.sleep)
    for _ in range(2):
        with pytest.raises(WebhookFailed) as caught:
            post(hook)
        assert caught.value.after_seconds == seconds
    assert len(receiver.got) == 1
    time.now += seconds
    receiver.status = 204
    post(hook)
    assert len(receiver.got) == 2


def test_a_short_retry_after_is_waited_for_in_place(receiver: Receiver) -> None:
    """An endpoint with a rate limit gets the notice a few seconds later, signed anew."""
    receiver.answers = [(429, "2"), (503, "1")]
    time = Time()
    post(Webhook(receiver.url, SECRET, clock=time, sleep=time.sleep))
    stamps = [int(headers["webhook-timestamp"]) - 1_700_000_000 for headers, _ in receiver.got]
    assert stamps == [0, 2, 3]
    assert len({headers["webhook-signature"] for headers, _ in receiver.got}) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_an_endpoint_that_asks_to_wait_again_and_again_is_left_to_the_service(receiver: Receiver) -> None:
    """A handler waits in place for 30 s at most."""
    receiver.status, receiver.retry_after = 503, "4"
    time = Time()
    with pytest.raises(WebhookFailed, match="left alone"):
        post(Webhook(receiver.url, SECRET, clock=time, sleep=time.sleep))
    assert time.now - 1_700_000_000 <= 30
    assert len(receiver.got) == 8


@pytest.mark.parametrize("retry_after", ["soon", "-5", "1e3", "Tue, 14 Nov 2023 22:00:00 GMT", "9" * 400, "\u0661"])
def test_a_retry_after_that_says_nothing_is_none(retry_after: str) -> None:
    """It is tried again by the service's own patience."""
    assert _asked_for(retry_after, 1_700_000_000.0) == 0


def test_nobody_there_is_tried_again_and_the_query_stays_secret() -> None:
    """A refused connection is trouble that passes; the error names the host only."""
    with pytest.raises(WebhookFailed) as caught:
        post(Webhook(f"http://127.0.0.1:{free_port()}/hook?key=secret", SECRET))
    assert "secret" not in str(caught.value)


def test_an_endpoint_that_does_not_answer_is_left(receiver: Receiver) -> None:
    """The time-out is for the whole exchange."""
    receiver.hold.clear()
    with pytest.raises(WebhookFailed, match="did not answer"):
        post(Webhook(receiver.url, SECRET, timeout_seconds=0.2))


def test_an_id_that_no_header_can_carry_is_replaced() -> None:
    """An idempotency key may be any text; the header stays the same for the same notice."""
    odd = Notice(batch_id="r-ключ 1", cause=Cause.REVOKED, ends=NOTICE.ends, scope=Scope.TOKEN, at=0, iss="i", jti="j")
    assert webhook_id(odd) == webhook_id(odd)
    assert webhook_id(odd).isalnum()


def test_two_notices_never_share_an_id() -> None:
    """A receiver drops what it has seen: idempotency keys that are alike still give different ids."""
    keys = ["case.7", "case_7", "case-7", "r-case", "r-case_7", "case.7_0", "case_7.0", "r-case.7"]
    batches = [f"r-{key}" for key in keys]
    notices = [replace(NOTICE, batch_id=batch_id, n=n) for batch_id in batches for n in (0, 7, 70)]
    ids = {webhook_id(notice) for notice in notices}
    assert len(ids) == len(notices)
    assert all(re.fullmatch("[A-Za-z0-9_-]+", each) for each in ids)


@pytest.mark.parametrize("url", ["http://partner.example/h", "http://10.0.0.1/h", "http://localhost.example/h"])
def test_a_url_that_others_can_read_is_refused(url: str) -> None:
    """Only https, except to this machine or where it is asked for."""
    with pytest.raises(InvalidSettings, match="is http, which anybody on the way can read"):
        Webhook(url, SECRET)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://partner.example/",
        "partner.example",
        "https://",
        "http://[::1",
        "https://h:abc/",
        "https://h:99999/",
        "https://h..example/",
        "https://h/\x00",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_at_once(url: str) -> None:
    """What no call could ever be made to fails when the handler is made, not with each notice."""
    with pytest.raises(InvalidSettings, match="is no https URL"):
        Webhook(url, SECRET)


def test_a_loopback_webhook_needs_no_proxy(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """http to this machine goes straight there, whatever proxy the environment names."""
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    post(Webhook(receiver.url, SECRET))
    assert len(receiver.got) == 1


def test_a_webhook_to_elsewhere_goes_through_the_proxy(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A company's proxy is how other machines are reached."""
    for variable in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(variable, receiver.url.partition("/hook")[0])
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    post(Webhook("http://partner.invalid/h", SECRET, allow_http=True))
    assert [headers["host"] for headers, _ in receiver.got] == ["partner.invalid"]


def test_http_is_possible_where_it_is_asked_for() -> None:
    """allow_http, and loopback addresses."""
    Webhook("http://partner.example/h", SECRET, allow_http=True)
    Webhook("http://localhost/h", SECRET)
    Webhook("http://[::1]/h", SECRET)


@pytest.mark.parametrize("secret", ["", "plain", "whsec_", "whsec_AAAA", "whsec_!!!!", []])
def test_a_secret_that_is_too_short_or_no_secret_is_refused(secret: Any) -> None:
    """24 to 64 bytes, and the text does not repeat it."""
    with pytest.raises(InvalidSettings):
        Webhook("https://partner.example/h", secret)
