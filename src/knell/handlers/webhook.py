"""A ready-made handler: tells an HTTP endpoint, signed as the Standard Webhooks specification 1.0 says.

    partner = Service("partner")
    partner.on_session_end(Webhook("https://partner.example/hooks", secret="whsec_..."))

Needs httpx: `pip install 'knell[services]'`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx

from knell.answers import LONGEST_ASKED_SECONDS
from knell.errors import GiveUp, InvalidSettings, TryLater
from knell.notices import Notice

# Long enough for an endpoint that works before it answers; a batch of 500 still ends within the task's time limit.
TIMEOUT_SECONDS = 10.0
MAX_CONNECTIONS = 32
# What an endpoint answers is not used; this much of it is read so that its connection can be used again.
MAX_ANSWER_BYTES = 64 * 1024
# A Retry-After of up to the first is waited for in place, so that an endpoint with a rate limit gets them all; but a
# notice waits no longer than the second in all. What asks for more is tried again by the service.
LONGEST_WAIT_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
_PREFIX = "whsec_"
# Request Timeout and Too Many Requests pass; every other 4xx says that the request itself is wrong, or unwanted.
_WORTH_ANOTHER_TRY = frozenset({408, 429})
_DATA = (
    "iss", "jti", "sid", "sub", "client_id", "kid", "claims", "exp", "started", "issued_before", "revocation_id",
    "reason",
)  # fmt: skip


class WebhookFailed(TryLater):
    """The endpoint could not be reached, or did not take the notice. It is tried again later.

    Attributes:
        status: the HTTP status; None if there was no answer.
        after_seconds: what its Retry-After asked for; 0 if it had none.
    """

    def __init__(self, text: str, status: int | None = None, after_seconds: float = 0.0) -> None:
        super().__init__(text, after_seconds)
        self.status = status


class Webhook:
    """Posts each notice to a URL. Register it for on_session_end, on_token_end, or both.

    The body is `{"type": "session.ended" | "token.ended", "timestamp": ..., "data": {...}}`; the type is
    "session.ended" where the session ends too. The header webhook-id is the same each time a notice is sent: a notice
    that ends a token and its session, sent for both events, is one to a receiver that looks at it.

    What the environment says of proxies and certificates (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE) holds, except for http
    to a loopback address: a proxy would be another machine, to which nothing unencrypted is sent.

    An endpoint that answers with Retry-After (RFC 9110, section 10.2.3) is left alone for that long, by every notice of
    this process: for a few seconds they wait, beyond that the service tries them again later, after an hour at most.

    Args:
        url: where to post. https, unless it is a loopback address.
        secret: `whsec_` and 24 to 64 bytes in base64. Several, the newest first, while one is being replaced.
        timeout_seconds: for the whole exchange. Default 10.
        allow_http: True to send over http to another machine: whoever is on the way can then read it.
        clock: Unix seconds. Default time.time.
        sleep: waits so many seconds. Default asyncio.sleep.
        transport: replaces httpx's own, for tests.

    Raises:
        InvalidSettings: the URL or a secret cannot be used.
    """

    def __init__(
        self,
        url: str,
        secret: str | Sequence[str],
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        allow_http: bool = False,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url
        self._host, self._stays_here = _checked(url, allow_http=allow_http)
        secrets = [secret] if isinstance(secret, str) else list(secret)
        if not secrets:
            raise InvalidSettings("no webhook secret was given; make one with 24 to 64 random bytes")
        self._keys = [_key(each) for each in secrets]
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._sleep = sleep
        self._transport = transport
        # The endpoint wants nothing before this, by the clock.
        self._closed_until = 0.0
        # A client belongs to the event loop that it was first used in.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    async def __call__(self, notice: Notice) -> None:
        """Post one notice.

        Raises:
            WebhookFailed: no answer in time, 408, 429, 3xx or 5xx.
            GiveUp: any other 4xx; 410 says that the endpoint is gone for good.
        """
        body = json.dumps(body_of(notice), separators=(",", ":")).encode()
        give_up_at = self._clock() + PATIENCE_SECONDS
        while True:
            await self._wait_until_open(give_up_at)
            try:
                await self._send(body, webhook_id(notice))
            except WebhookFailed as error:
                if not error.after_seconds:
                    raise
                self._closed_until = max(self._closed_until, self._clock() + error.after_seconds)
            else:
                return

    async def _wait_until_open(self, give_up_at: float) -> None:
        """Wait for the time that the endpoint asked for; WebhookFailed if that is too long."""
        while (wait_seconds := self._closed_until - (now := self._clock())) > 0:
            if wait_seconds > LONGEST_WAIT_SECONDS or now + wait_seconds > give_up_at:
                text = f"{self._host} asked to be left alone for another {wait_seconds:.0f} s (Retry-After)"
                raise WebhookFailed(text, after_seconds=wait_seconds)
            await self._sleep(wait_seconds)

    async def _send(self, body: bytes, message_id: str) -> None:
        """Sign and post it once. The time of sending is signed: each try is signed anew."""
        headers = {"content-type": "application/json", "user-agent": "knell", **self.sign(message_id, body)}
        try:
            async with asyncio.timeout(self._timeout_seconds):
                status, retry_after = await self._post(body, headers)
        except TimeoutError:
            raise WebhookFailed(f"{self._host} did not answer within {self._timeout_seconds:g} s") from None
        except httpx.HTTPError as error:
            raise WebhookFailed(f"{self._host} could not be reached: {type(error).__name__}") from None
        if 200 <= status < 300:
            return
        if 400 <= status < 500 and status not in _WORTH_ANOTHER_TRY:
            raise GiveUp(f"{self._host} answered {status}, which another try would not change")
        raise WebhookFailed(f"{self._host} answered {status}", status, _asked_for(retry_after, self._clock()))

    def sign(self, message_id: str, body: bytes) -> dict[str, str]:
        """The three headers of the specification for a body that is sent now."""
        timestamp = str(int(self._clock()))
        signed = f"{message_id}.{timestamp}.".encode() + body
        signatures = [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode() for key in self._keys]
        return {
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
        }

    async def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        async with self._client().stream("POST", self._url, content=body, headers=headers) as response:
            size = 0
            async for chunk in response.aiter_raw():
                size += len(chunk)
                if size > MAX_ANSWER_BYTES:
                    break
            return response.status_code, response.headers.get("retry-after", "")

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        if (client := self._clients.get(loop)) is None:
            client = self._clients[loop] = httpx.AsyncClient(
                timeout=self._timeout_seconds,
                follow_redirects=False,
                limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
                transport=self._transport,
                trust_env=not self._stays_here,
            )
        return client

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def __repr__(self) -> str:
        return f"Webhook(to {self._host})"


def body_of(notice: Notice) -> dict[str, object]:
    """What is posted for a notice, before it is written as JSON."""
    data: dict[str, object] = {name: found for name in _DATA if (found := getattr(notice, name)) is not None}
    return {
        "type": "session.ended" if "session" in notice.ends else "token.ended",
        "timestamp": datetime.fromtimestamp(notice.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "data": {
            "id": notice.id,
            "cause": notice.cause.value,
            "scope": notice.scope.value,
            "ends": sorted(notice.ends),
            **data,
        },
    }


def webhook_id(notice: Notice) -> str:
    """The notice's id as a header can carry it: two notices never share one.

    The specification's own separator, the full stop, is not in it. An idempotency key may be any text: where it has
    other characters than a UUID has, the id is a hash.
    """
    if re.fullmatch("[A-Za-z0-9-]+", notice.batch_id):
        return f"{notice.batch_id}_{notice.n}"
    return hashlib.sha256(notice.id.encode()).hexdigest()


def _asked_for(retry_after: str, now: float) -> float:
    """The seconds that a Retry-After asks for, an hour at most: a number of them, or a date; 0 if it is neither."""
    try:
        number = re.fullmatch("[0-9]{1,9}", retry_after)
        asked = float(retry_after) if number else parsedate_to_datetime(retry_after).timestamp() - now
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, asked), LONGEST_ASKED_SECONDS)


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(_PREFIX) or not 24 <= len(key) <= 64:
        raise InvalidSettings(
            f"a webhook secret must be {_PREFIX!r} and then 24 to 64 bytes in base64; this one is not"
        )
    return key


def _checked(url: str, *, allow_http: bool) -> tuple[str, bool]:
    """The URL's host, and whether the URL is http to this machine."""
    try:
        parsed = httpx.URL(url)
        # These two would come to light at each call: a port that is out of range, a host name that is none.
        _ = urlsplit(url).port
        parsed.host.encode("idna")
    except (httpx.InvalidURL, ValueError):
        parsed = httpx.URL("")
    host = parsed.host
    if parsed.scheme not in ("https", "http") or not host:
        # The URL itself is not shown: whoever knows it may be able to post.
        raise InvalidSettings("the webhook's URL is no https URL; use one like https://partner.example/hooks")
    stays_here = parsed.scheme == "http" and _is_loopback(host)
    if parsed.scheme == "http" and not stays_here and not allow_http:
        raise InvalidSettings(f"the webhook to {host} is http, which anybody on the way can read; use https")
    return host, stays_here


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
