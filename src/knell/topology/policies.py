"""RabbitMQ's management API, for what AMQP itself cannot set or show: policies and bindings."""

from __future__ import annotations

import base64
import http.client
import json
import shlex
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from kombu.utils.url import parse_url

from knell.errors import BrokerUnavailable, InvalidSettings
from knell.settings import Settings
from knell.topology.names import DEAD, DELAYED, UNROUTED_POLICY

API_SECONDS = 5.0
# Without it, 32 delayed messages that match no binding block their level of the delay ladder for everybody.
PATTERN = f"^{DELAYED}$"
DEFINITION = {"alternate-exchange": DEAD}


def apply_policies(api_url: str | None, vhost: str) -> str | None:
    """Set the policy that catches what the delay ladder cannot deliver.

    Args:
        api_url: the management API with credentials; None: nothing is set.
        vhost: the virtual host.

    Returns:
        None if it is set; without an API, the command for a person to run on the broker.

    Raises:
        BrokerUnavailable: the API did not answer, or refused.
    """
    if api_url is None:
        return policy_command(vhost)
    body = {"pattern": PATTERN, "definition": DEFINITION, "apply-to": "exchanges", "priority": 0}
    call_api(api_url, "PUT", f"/api/policies/{quote(vhost, safe='')}/{UNROUTED_POLICY}", body)
    return None


def policy_command(vhost: str) -> str:
    """The rabbitmqctl command that does what `apply_policies` does."""
    definition = json.dumps(DEFINITION)
    words = ["rabbitmqctl", "set_policy", "-p", vhost, UNROUTED_POLICY, PATTERN, definition, "--apply-to", "exchanges"]
    return shlex.join(words)


def policy_in_force(api_url: str, vhost: str) -> bool:
    """Whether the policy that RabbitMQ applies to the end of the delay ladder is one that catches the unroutable.

    Raises:
        BrokerUnavailable: the API did not answer, or refused.
    """
    host = quote(vhost, safe="")
    exchange = call_api(api_url, "GET", f"/api/exchanges/{host}/{DELAYED}", absent_is_none=True)
    name = (exchange or {}).get("policy")
    if not name:
        return False
    policy = call_api(api_url, "GET", f"/api/policies/{host}/{quote(name, safe='')}", absent_is_none=True)
    return ((policy or {}).get("definition") or {}).get("alternate-exchange") == DEAD


def bindings(api_url: str, vhost: str) -> set[tuple[str, str, str]]:
    """(exchange, routing key, queue) of every binding to a queue.

    Raises:
        BrokerUnavailable: the API did not answer, or refused.
    """
    found = call_api(api_url, "GET", f"/api/bindings/{quote(vhost, safe='')}")
    return {
        (each["source"], each["routing_key"], each["destination"])
        for each in found
        if each["destination_type"] == "queue"
    }


def vhost_of(settings: Settings) -> str:
    """The virtual host that the broker URL names."""
    vhost: str | None = parse_url(settings.broker_url.split(";")[0])["virtual_host"]
    return vhost or "/"


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
        BrokerUnavailable: the API did not answer, or refused.
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
            raise BrokerUnavailable(f"{method} {address}{path} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise BrokerUnavailable(f"the management API at {address} did not answer: {error}") from error
    try:
        return json.loads(text) if text else None
    except ValueError:
        raise BrokerUnavailable(
            f"{method} {address}{path} answered something that is no JSON; is KNELL_BROKER_API_URL the management API?"
        ) from None
