"""Makes the broker account of each service, with the rights that it needs and no other.

    python deploy/accounts.py shop gateway partner

KNELL_BROKER_API_URL is RabbitMQ's management API with an administrator's credentials, KNELL_BROKER_URL names the
virtual host, and SHOP_BROKER_PASSWORD, GATEWAY_BROKER_PASSWORD and so on are the passwords. An account is called like
its service. Doing it again changes passwords and rights to what is given.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from knell import InvalidSettings, Settings, topology


def main(services: Sequence[str], environ: Mapping[str, str]) -> None:
    """Make or change the account of each service."""
    settings = Settings.from_environ(environ)
    if settings.broker_api_url is None:
        raise InvalidSettings("KNELL_BROKER_API_URL is not set; it is the management API, with credentials")
    passwords = {name: _password(name, environ) for name in services}
    vhost = quote(topology.vhost_of(settings), safe="")
    for name, password in passwords.items():
        _put(settings.broker_api_url, f"/api/users/{name}", {"password": password, "tags": ""})
        rights = topology.permissions(name)
        _put(
            settings.broker_api_url,
            f"/api/permissions/{vhost}/{name}",
            {"configure": rights.configure, "write": rights.write, "read": rights.read},
        )
        for exchange, (write, read) in rights.topics.items():
            held = {"exchange": exchange, "write": write, "read": read}
            _put(settings.broker_api_url, f"/api/topic-permissions/{vhost}/{name}", held)
        sys.stdout.write(f"account {name} may read {topology.service_queue(name)}, and write its own answers\n")


def _password(name: str, environ: Mapping[str, str]) -> str:
    variable = f"{name.upper().replace('-', '_')}_BROKER_PASSWORD"
    if not environ.get(variable):
        raise InvalidSettings(f"{variable} is not set; it is the password of the account {name}")
    return environ[variable]


def _put(api_url: str, path: str, body: dict[str, Any]) -> None:
    url = urlsplit(api_url)
    if url.scheme not in ("http", "https"):
        raise InvalidSettings(f"KNELL_BROKER_API_URL has scheme {url.scheme!r}; use http:// or https://")
    credentials = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
    request = urllib.request.Request(  # noqa: S310 - the scheme was checked
        f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path.rstrip('/')}{path}",
        method="PUT",
        data=json.dumps(body).encode(),
        headers={
            "Authorization": "Basic " + base64.b64encode(credentials.encode()).decode(),
            "Content-Type": "application/json",
        },
    )
    urllib.request.urlopen(request, timeout=10).close()  # noqa: S310


if __name__ == "__main__":
    main(sys.argv[1:], os.environ)
