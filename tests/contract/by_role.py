"""A store each of whose calls is made under the account of whoever makes it in a deployment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

from knell.settings import Settings
from knell.store import Store
from knell.stores.redis_accounts import Account, service_account, store_accounts
from tests.redis_servers import ask
from tests.servers import RedisServer

PASSWORD = "s3cret"
_CALLS = {
    "issuer": "time track armed detach attach session revoke undo undone note revocation status count services head",
    "notifier": "due claim settle open_notices resend_at receive mark_missed park lease prune",
    "service": "begin mark",
    "verifier": "changes snapshot",
    "operator": "add_service remove_service parked unpark audit ping warnings",
}
ROLE_OF = {call: role for role, calls in _CALLS.items() for call in calls.split()}


def let_in(servers: Iterable[RedisServer], account: Account) -> None:
    """Make an account on servers, as an operator does."""
    for server in servers:
        with ask(server) as client:
            client.execute_command(*account.line.split())
            client.execute_command("ACL", "SETUSER", account.name, "on", f">{PASSWORD}")


def url_of(account: Account, url: str) -> str:
    """A URL with an account in it."""
    return url.replace("://", f"://{account.name}:{PASSWORD}@", 1)


class ByRole:
    """Has every call of a store. `open_one` opens one by its URL."""

    def __init__(self, settings: Settings, servers: Iterable[RedisServer], open_one: Callable[[str], Store]) -> None:
        self._settings = settings
        self._servers = list(servers)
        self._open = open_one
        self._accounts = {account.name: account for account in store_accounts(settings)}
        self._store = cache(self._opened)

    def __getattr__(self, call: str) -> Any:
        role = ROLE_OF[call]
        if role == "service":
            return partial(self._for_service, call)
        return getattr(self._store(self._accounts[f"{self._settings.namespace}-{role}"]), call)

    def _for_service(self, call: str, service: str, *arguments: Any, **more: Any) -> Any:
        return getattr(self._store(service_account(self._settings, service)), call)(service, *arguments, **more)

    def _opened(self, account: Account) -> Store:
        let_in(self._servers, account)
        return self._open(url_of(account, self._settings.store_url))
