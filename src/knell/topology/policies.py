"""What AMQP itself can neither set nor show: policies, and bindings."""

from __future__ import annotations

import json
import shlex
from urllib.parse import quote

from kombu.utils.url import parse_url

from knell.settings import Settings
from knell.topology.api import call_api
from knell.topology.names import DEAD, DELAYED, UNROUTED_POLICY

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
