"""Makes the broker account of each service, with the rights that it needs and no other.

    python deploy/accounts.py shop gateway partner

KNELL_BROKER_API_URL is RabbitMQ's management API with an administrator's credentials, KNELL_BROKER_URL names the
virtual host, and SHOP_BROKER_PASSWORD, GATEWAY_BROKER_PASSWORD and so on are the passwords. An account is called like
its service. Doing it again changes passwords and rights to what is given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from knell import InvalidSettings, KnellError, Settings, topology
from knell.topology.policies import call_api


def main(services: Sequence[str], environ: Mapping[str, str]) -> None:
    """Make or change the account of each service. Nothing is made before every name and password is known."""
    settings = Settings.from_environ(environ)
    api_url = settings.broker_api_url
    if api_url is None:
        raise InvalidSettings("KNELL_BROKER_API_URL is not set; it is the management API, with credentials")
    vhost = quote(topology.vhost_of(settings), safe="")
    accounts = [(name, _password(name, environ), topology.permissions(name)) for name in services]
    for name, password, rights in accounts:
        call_api(api_url, "PUT", f"/api/users/{name}", {"password": password, "tags": ""})
        everywhere = {"configure": rights.configure, "write": rights.write, "read": rights.read}
        call_api(api_url, "PUT", f"/api/permissions/{vhost}/{name}", everywhere)
        for exchange, (write, read) in rights.topics.items():
            held = {"exchange": exchange, "write": write, "read": read}
            call_api(api_url, "PUT", f"/api/topic-permissions/{vhost}/{name}", held)
        sys.stdout.write(f"account {name} may read {topology.service_queue(name)}, and write its own answers\n")


def _password(name: str, environ: Mapping[str, str]) -> str:
    variable = f"{name.upper().replace('-', '_')}_BROKER_PASSWORD"
    if not environ.get(variable):
        raise InvalidSettings(f"{variable} is not set; it is the password of the account {name}")
    return environ[variable]


if __name__ == "__main__":
    try:
        main(sys.argv[1:], os.environ)
    except KnellError as error:
        sys.exit(f"error: {error}")
