"""RabbitMQ's management API."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import unquote, urlsplit

from knell.errors import BrokerUnavailable, InvalidSettings

API_SECONDS = 5.0


class ApiRefused(BrokerUnavailable):
    """The management API does not know the account, or does not let it do what was asked."""


def call_api(api_url: str, method: str, path: str, body: Any = None, *, absent_is_none: bool = False) -> Any:
    """Call RabbitMQ's management API.

    Args:
        api_url: `http://` or `https://`, with the credentials of an account that may administer.
        path: with every name in it quoted.
        body: sent as JSON.
        absent_is_none: answer None where the API says 404.

    Returns:
        The decoded answer; None for an empty one.

    Raises:
        InvalidSettings: the URL cannot be used.
        ApiRefused: it does not let this account do that.
        BrokerUnavailable: it did not answer, or it failed.
    """
    parts = urlsplit(api_url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise InvalidSettings("KNELL_BROKER_API_URL must be http:// or https:// with a host, such as http://host:15672")
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked
        address + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    if user:
        credentials = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
        request.add_header("Authorization", f"Basic {credentials}")
    try:
        with urllib.request.urlopen(request, timeout=API_SECONDS) as answer:  # noqa: S310
            text = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            if absent_is_none and error.code == 404:
                return None
            kind = ApiRefused if error.code in (401, 403) else BrokerUnavailable
            raise kind(f"{method} {address}{path} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise BrokerUnavailable(f"the management API at {address} did not answer: {error}") from error
    try:
        return json.loads(text) if text else None
    except ValueError:
        raise BrokerUnavailable(
            f"{method} {address}{path} answered something that is no JSON; is KNELL_BROKER_API_URL the management API?"
        ) from None
