"""One fetch of a JWK Set over HTTP: PyJWT's client, held to a time, a size and one address."""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from jwt import PyJWKClient
from jwt.exceptions import PyJWKClientConnectionError, PyJWKClientError

from knell.errors import InvalidSettings

# A set of a dozen RSA keys, with their certificates, has 40 KB.
MAX_BYTES = 256 * 1024


class JwksClient(PyJWKClient):
    """PyJWT's client for a JWK Set, with what it leaves open closed.

    Its time-out is for each read: here it is for the whole answer, so that a server which sends a byte a second holds
    nobody up. An answer is at most 256 KiB and has status 200. A redirect is an error, whatever it points to. A host on
    the loopback interface is never asked through a proxy.
    """

    def __init__(
        self, url: str, *, timeout_seconds: float, headers: Mapping[str, str], ssl_context: ssl.SSLContext | None
    ) -> None:
        super().__init__(
            url,
            cache_jwk_set=False,  # what was fetched is kept by whoever asks, and kept when a fetch fails
            headers={"Accept": "application/jwk-set+json, application/json", **headers},
            timeout=timeout_seconds,
            ssl_context=ssl_context or (ssl.create_default_context() if urlsplit(url).scheme == "https" else None),
        )
        self._direct = is_loopback(url)

    def fetch_data(self) -> dict[str, Any]:
        """The JWK Set as the server sent it.

        Raises:
            PyJWKClientError: there is none: no answer in time, a redirect, another status, too long, no JSON object.
        """
        try:
            text = self._get(time.monotonic() + self.timeout)
            found = json.loads(text)
        except urllib.error.HTTPError as error:
            error.close()
            raise PyJWKClientConnectionError(_status(error.code)) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            raise PyJWKClientConnectionError(f"no answer: {reason or type(reason).__name__}") from None
        except (ValueError, RecursionError):
            raise PyJWKClientError("the answer is no JSON") from None
        return self._as_jwk_set_payload(found)

    def _get(self, deadline: float) -> bytes:
        handlers: list[Any] = [_Http(deadline), _Https(deadline, self.ssl_context), _NoRedirect()]
        if self._direct:
            handlers.append(urllib.request.ProxyHandler({}))
        opener = urllib.request.build_opener(*handlers)
        request = urllib.request.Request(self.uri, headers=self.headers)  # noqa: S310 - https or http, by check_url
        with opener.open(request, timeout=self.timeout) as response:
            if response.status != http.client.OK:
                raise PyJWKClientConnectionError(_status(response.status))
            text: bytes = response.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise PyJWKClientError(f"the answer is longer than {MAX_BYTES} bytes")
        return text


def check_url(url: str, *, allow_http: bool) -> None:
    """InvalidSettings for a URL that keys must not be taken from. It is not shown: a secret may stand in it."""
    if not isinstance(url, str):
        raise InvalidSettings(f"the JWKS URL is a {type(url).__name__}; give https://HOST/PATH")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InvalidSettings("the JWKS URL cannot be read as a URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidSettings(f"the JWKS URL has scheme {parts.scheme!r}; use https://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise InvalidSettings("the JWKS URL has a user or password in it; pass headers={'Authorization': ...} instead")
    if parts.scheme == "http" and not (allow_http or is_loopback(url)):
        raise InvalidSettings(
            f"the JWKS of {host} would come over http: whoever sits in between could replace the keys; use https, or "
            "say allow_http=True"
        )


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _status(code: int) -> str:
    if 300 <= code < 400:
        return f"the server redirects (status {code}), which is not followed; use the URL that it redirects to"
    return f"the server answered with status {code}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_bounded(http.client.HTTPConnection, self._deadline), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: float, context: ssl.SSLContext | None) -> None:
        super().__init__(context=context)
        self._deadline = deadline
        self._verified = context

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_bounded(http.client.HTTPSConnection, self._deadline), request, context=self._verified)


def _bounded(kind: Callable[..., http.client.HTTPConnection], deadline: float) -> Any:
    def connection(*args: Any, **options: Any) -> http.client.HTTPConnection:
        made = kind(*args, **options)
        made.response_class = functools.partial(_Response, deadline=deadline)  # type: ignore[assignment]
        return made

    return connection


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: Any, *args: Any, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Until(sock, deadline))


class _Until(io.RawIOBase):
    """Reads of a socket that are all over at one moment."""

    def __init__(self, sock: Any, deadline: float) -> None:
        self._socket = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._raw.close()
        super().close()
