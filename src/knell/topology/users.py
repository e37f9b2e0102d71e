"""The accounts that a broker has, read and written through its management API as an administrator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from knell.topology.api import ApiRefused, call_api
from knell.topology.passwords import HASHING, hashed, is_password
from knell.topology.permissions import Account, Permissions


@dataclass(frozen=True, slots=True)
class User:
    """An account as it is on the broker.

    Attributes:
        name: what it is called.
        tags: what it may do at the management API.
        permissions: what it may do in Knell's virtual host; None: not even enter it.
        elsewhere: the other virtual hosts that it may enter.
    """

    name: str
    tags: tuple[str, ...]
    permissions: Permissions | None
    elsewhere: tuple[str, ...]
    _hash: str = field(repr=False)
    _algorithm: str

    def has_password(self, password: str) -> bool | None:
        """Whether that is its password; None if that cannot be told."""
        return is_password(password, self._hash, self._algorithm)

    @property
    def login(self) -> dict[str, str]:
        """Its password as it is, for an account that is written anew."""
        return {"password_hash": self._hash, "hashing_algorithm": self._algorithm}


def read_users(api_url: str, vhost: str) -> dict[str, User]:
    """Every account of the broker, by name, with its rights in one virtual host.

    Raises:
        ApiRefused: the account of the URL is no administrator.
        BrokerUnavailable: the API did not answer.
    """
    try:
        users = call_api(api_url, "GET", "/api/users")
    except ApiRefused as error:
        raise ApiRefused(f"accounts take an administrator's account in KNELL_BROKER_API_URL: {error}") from None
    rights = call_api(api_url, "GET", "/api/permissions")
    topics: dict[str, dict[str, tuple[str, str]]] = {}
    for each in call_api(api_url, "GET", f"/api/vhosts/{quote(vhost, safe='')}/topic-permissions"):
        topics.setdefault(each["user"], {})[each["exchange"]] = (each["write"], each["read"])
    here = {each["user"]: each for each in rights if each["vhost"] == vhost}
    return {user["name"]: _user(user, here, topics, rights, vhost) for user in users}


def differences(account: Account, user: User) -> list[str]:
    """In which of its rights a broker's account is not what it should be, in a few words each."""
    wanted, found = account.permissions, user.permissions
    unlike = [] if set(account.tags) == set(user.tags) else [f"tags {_listed(user.tags)}, not {_listed(account.tags)}"]
    if found is None:
        return [*unlike, "no rights in the virtual host"]
    for name in ("configure", "write", "read"):
        if getattr(wanted, name) != getattr(found, name):
            unlike.append(f"{name} {getattr(found, name)!r}")
    exchanges = [
        name for name in {**wanted.topics, **found.topics} if wanted.topics.get(name) != found.topics.get(name)
    ]
    return [*unlike, *([f"topics of {', '.join(exchanges)}"] if exchanges else [])]


def put_user(api_url: str, account: Account, *, password: str | None, user: User | None) -> None:
    """Make an account, or write it anew; without a password, `user` keeps the one that it has."""
    if password is None:
        assert user is not None
        login = user.login
    else:
        login = {"password_hash": hashed(password), "hashing_algorithm": HASHING}
    call_api(api_url, "PUT", f"/api/users/{_path(account.name)}", {**login, "tags": ",".join(account.tags)})


def put_permissions(api_url: str, vhost: str, account: Account, user: User | None) -> None:
    """Give an account its rights in the virtual host, and take away what it has beside them."""
    wanted, host = account.permissions, _path(vhost)
    # First what holds it back, then what lets it in: it has at no moment more than it should.
    for exchange, (write, read) in wanted.topics.items():
        body = {"exchange": exchange, "write": write, "read": read}
        call_api(api_url, "PUT", f"/api/topic-permissions/{host}/{_path(account.name)}", body)
    body = {"configure": wanted.configure, "write": wanted.write, "read": wanted.read}
    call_api(api_url, "PUT", f"/api/permissions/{host}/{_path(account.name)}", body)
    found = {} if user is None or user.permissions is None else user.permissions.topics
    for exchange in found.keys() - wanted.topics.keys():
        path = f"/api/topic-permissions/{host}/{_path(account.name)}/{_path(exchange)}"
        call_api(api_url, "DELETE", path, absent_is_none=True)


def withdraw(api_url: str, vhost: str, name: str) -> None:
    """Take all rights in the virtual host from an account, and end its connections. What has no such account is well.

    The account stays, without a right; its connections would go on with those that they had.
    """
    host, user = _path(vhost), _path(name)
    call_api(api_url, "DELETE", f"/api/permissions/{host}/{user}", absent_is_none=True)
    call_api(api_url, "DELETE", f"/api/topic-permissions/{host}/{user}", absent_is_none=True)
    found = call_api(api_url, "GET", f"/api/connections/username/{user}", absent_is_none=True) or []
    here = [each["name"] for each in found if each["vhost"] == vhost]
    if len(here) == len(found):
        # All at once: by its name, the API knows a connection only seconds after it was opened.
        call_api(api_url, "DELETE", f"/api/connections/username/{user}", absent_is_none=True)
    else:
        for name in here:
            call_api(api_url, "DELETE", f"/api/connections/{_path(name)}", absent_is_none=True)


def _user(user: Any, here: Any, topics: Any, rights: Any, vhost: str) -> User:
    name = user["name"]
    found = here.get(name)
    permissions = None
    if found is not None:
        permissions = Permissions(found["configure"], found["write"], found["read"], topics.get(name, {}))
    return User(
        name=name,
        tags=tuple(user["tags"]),
        permissions=permissions,
        elsewhere=tuple(sorted(each["vhost"] for each in rights if each["user"] == name and each["vhost"] != vhost)),
        _hash=user.get("password_hash", ""),
        _algorithm=user.get("hashing_algorithm", ""),
    )


def _listed(tags: tuple[str, ...]) -> str:
    return ", ".join(tags) or "none"


def _path(name: str) -> str:
    return quote(name, safe="")
