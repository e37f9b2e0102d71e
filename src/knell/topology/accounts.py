"""Making the accounts of a deployment on its broker what they should be, and locking nobody out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from knell.errors import InvalidInput, InvalidSettings
from knell.settings import Settings, is_service_name
from knell.topology.passwords import Passwords
from knell.topology.permissions import Account, accounts
from knell.topology.policies import vhost_of
from knell.topology.users import User, differences, put_permissions, put_user, read_users, withdraw

State = Literal["made", "changed", "as it was", "withdrawn", "not made", "left alone"]
# These leave something to do.
UNDONE: frozenset[State] = frozenset({"not made", "left alone"})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one account.

    Attributes:
        account: its name.
        state: "made", "changed", "as it was", "withdrawn" (it has no rights any more), "not made" or "left alone".
        why: what was different, or what to do, in one line.
        password: the file that holds its password; None where none is known.
    """

    account: str
    state: State
    why: str = ""
    password: Path | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What `apply_accounts` is asked for beside what the registered services need.

    Attributes:
        issuers: names of issuers that are to have an account. Those that have one keep it.
        passwords: where the passwords are, given or made; None: no account is made, and no password changed.
        rotate: accounts that get a new password.
        include: accounts that may be changed although the notifier, or whoever applies this, runs on them.
        remove: accounts whose rights are taken away.
    """

    issuers: Collection[str] = ()
    passwords: Passwords | None = None
    rotate: Collection[str] = ()
    include: Collection[str] = ()
    remove: Collection[str] = ()

    @property
    def named(self) -> frozenset[str]:
        """The accounts that are asked for by name."""
        return frozenset({*self.rotate, *self.include, *self.remove})


NOTHING_MORE = Asked()


def in_use(settings: Settings) -> frozenset[str]:
    """The accounts that the notifier, and whoever has these settings, runs on: a change may lock them out."""
    urls = [*settings.broker_url.split(";"), *([settings.broker_api_url] if settings.broker_api_url else [])]
    return frozenset({f"{settings.namespace}.notifier", *(unquote(urlsplit(url).username or "guest") for url in urls)})


def planned(
    settings: Settings, services: Iterable[str], users: Mapping[str, User], issuers: Iterable[str] = ()
) -> list[Account]:
    """The accounts that a broker with these users should have: an issuer's is kept while it has any right."""
    prefix = f"{settings.namespace}.issuer."
    there = [name.removeprefix(prefix) for name, user in users.items() if name.startswith(prefix) and user.permissions]
    named = {*issuers, *filter(is_service_name, there)}
    return accounts(settings.namespace, services, sorted(named))


def unplanned(settings: Settings, plan: Iterable[Account], users: Mapping[str, User]) -> list[str]:
    """The accounts that still have the rights of a service that is not registered any more."""
    known = {account.name for account in plan}
    prefix = f"{settings.namespace}.service."
    return [name for name, user in users.items() if name.startswith(prefix) and user.permissions and name not in known]


def apply_accounts(settings: Settings, services: Collection[str], asked: Asked = NOTHING_MORE) -> list[Outcome]:
    """Make the accounts that are missing, and the rights of the others what they should be. It can be repeated.

    An account that the notifier, or whoever calls this, runs on is not changed, and no existing password is, unless
    that is asked for by name, or by a password that was given for it. A service's account that has no registered
    service loses its rights, and its connections.

    Args:
        settings: with a management API whose account is an administrator.
        services: the registered services. None registered: no account loses its rights, for the store may be a wrong
            or an empty one.

    Returns:
        What became of each account, those that were left as they were included.

    Raises:
        InvalidInput: a name that is asked for is none of the deployment's, or a password's file cannot be used; nothing
            was changed.
        ApiRefused: the account of the management API is no administrator.
        BrokerUnavailable: the API did not answer; what was done before it is done.
    """
    return prepare_accounts(settings, services, asked)()


def prepare_accounts(
    settings: Settings, services: Collection[str], asked: Asked = NOTHING_MORE
) -> Callable[[], list[Outcome]]:
    """The first half of `apply_accounts`, which changes nothing and finds what is wrong; to call it does the rest."""
    if settings.broker_api_url is None:
        raise InvalidSettings(
            "KNELL_BROKER_API_URL is not set; it is the management API, with an administrator's account"
        )
    users = read_users(settings.broker_api_url, vhost_of(settings))
    plan = [each for each in planned(settings, services, users, asked.issuers) if each.name not in asked.remove]
    _check_names(settings, plan, users, asked)
    # With a new password, or without its tag, the account that the API is asked by does nothing more: it comes last.
    own = unquote(urlsplit(settings.broker_api_url).username or "")
    changes = [_Change(settings, account, users.get(account.name), asked) for account in plan]
    gone = [*(name for name in unplanned(settings, plan, users) if services), *asked.remove]
    gone = sorted(dict.fromkeys(gone), key=lambda name: name == own)

    def make() -> list[Outcome]:
        late = [change for change in changes if change.name == own]
        first = [change.make() for change in changes if change.name != own]
        return [*first, *_withdrawn(settings, gone, asked), *(change.make() for change in late)]

    return make


class _Change:
    """What is to be done to one account. To make one looks at its password's file, and changes nothing."""

    def __init__(self, settings: Settings, account: Account, user: User | None, asked: Asked) -> None:
        self._api_url = settings.broker_api_url or ""
        self._vhost = vhost_of(settings)
        self.name = account.name
        self._account = account
        self._user = user
        self._passwords = asked.passwords
        self._given = asked.passwords.find(account.name) if asked.passwords else None
        self._rotate = account.name in asked.rotate
        self._may = account.name not in in_use(settings) or account.name in asked.named

    def make(self) -> Outcome:
        """Do it, and say what was done."""
        if self._user is None:
            return self._make_anew()
        self._finish()
        unlike = differences(self._account, self._user)
        other = self._given is not None and self._user.has_password(self._given) is False
        what = [*unlike, *(["its password"] if other or self._rotate else [])]
        if not what:
            return self._outcome("as it was")
        if self._user.elsewhere:
            where = ", ".join(self._user.elsewhere)
            why = f"it is used in virtual host {where} too: tell the two deployments apart by KNELL_NAMESPACE"
            return self._outcome("left alone", why)
        if not self._may:
            why = f"in use by the notifier or by this command: --include {self._account.name} changes {'; '.join(what)}"
            return self._outcome("left alone", why)
        self._change(unlike, self._given if other else None)
        return self._outcome("changed", "; ".join(what))

    def _make_anew(self) -> Outcome:
        if self._passwords is None:
            return self._outcome("not made", "--passwords names the folder that its password is to be in")
        password = self._given or self._passwords.make(self._account.name)
        put_user(self._api_url, self._account, password=password, user=None)
        put_permissions(self._api_url, self._vhost, self._account, None)
        return self._outcome("made")

    def _finish(self) -> None:
        """End a rotation that was cut off after the broker had the new password."""
        if self._passwords is None or self._user is None:
            return
        begun = self._passwords.begun(self._account.name)
        if begun is not None and self._user.has_password(begun):
            self._passwords.finish(self._account.name)
            self._given, self._rotate = begun, False

    def _change(self, unlike: Collection[str], given: str | None) -> None:
        if self._rotate and self._passwords is not None:
            password: str | None = self._passwords.begin(self._account.name)
        else:
            password = given
        if unlike:
            put_permissions(self._api_url, self._vhost, self._account, self._user)
        if password is not None or (self._user and set(self._user.tags) != set(self._account.tags)):
            put_user(self._api_url, self._account, password=password, user=self._user)
        if self._rotate and self._passwords is not None:
            self._passwords.finish(self._account.name)

    def _outcome(self, state: State, why: str = "") -> Outcome:
        file = None
        if self._passwords is not None and (path := self._passwords.file_of(self._account.name)).exists():
            file = path
        return Outcome(self._account.name, state, why, file)


def _withdrawn(settings: Settings, names: Iterable[str], asked: Asked) -> Iterator[Outcome]:
    for name in names:
        if name in in_use(settings) and name not in asked.named:
            yield Outcome(name, "left alone", f"in use by this command: --remove {name} takes its rights away")
        else:
            withdraw(settings.broker_api_url or "", vhost_of(settings), name)
            yield Outcome(name, "withdrawn", "" if name in asked.remove else "no such service is registered")


def _check_names(settings: Settings, plan: Iterable[Account], users: Mapping[str, User], asked: Asked) -> None:
    known = {account.name for account in plan}
    for name in (*asked.rotate, *asked.include):
        if name not in known:
            raise InvalidInput(f"{name!r} is no account of this deployment; there are {', '.join(sorted(known))}")
    for name in asked.remove:
        if not name.startswith(f"{settings.namespace}.") or name not in users:
            raise InvalidInput(f"the broker has no account {name!r} of this deployment")
    if asked.rotate and asked.passwords is None:
        raise InvalidInput("a new password needs a place: --passwords names a folder")
