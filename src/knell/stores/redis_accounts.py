"""The accounts on Redis: one for each role, with the rights that it needs and no others, as ACL SETUSER takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from knell.settings import Settings, check_service_name
from knell.stores.redis_link import READING_SCRIPTS, SCRIPTS_ANSWERED_ONCE, WRITING_SCRIPTS
from knell.stores.redis_rights import READS, RIGHTS, ROLES
from knell.stores.redis_url import RedisUrl, parse_redis_url

# What an answer that is kept for a call sent again needs (lua/once.lua).
_KEPT = ("get", "set", "expire")


@dataclass(frozen=True, slots=True)
class Account:
    """One account.

    Attributes:
        name: the user's name.
        rules: its rights, as `ACL SETUSER` takes them. A password is not among them, and an account that has none lets
            nobody in: `ACL SETUSER <name> on >PASSWORD`. Rules that are applied again leave passwords as they are.
    """

    name: str
    rules: tuple[str, ...]

    @property
    def line(self) -> str:
        """The command that makes it, or gives it the rights anew."""
        return f"ACL SETUSER {self.name} {' '.join(self.rules)}"


def store_accounts(settings: Settings) -> list[Account]:
    """The accounts of issuers, notifiers, verifiers and operators on the store of these settings."""
    url = parse_redis_url("KNELL_STORE_URL", settings.store_url)
    keys = _Keys(settings.namespace, settings.partitions)
    roles = ("issuer", "notifier", "verifier", "operator")
    return [Account(f"{settings.namespace}-{role}", _rules(url, keys, role)) for role in roles]


def service_account(settings: Settings, service: str) -> Account:
    """The account of a service on the store where it keeps what it has handled (KNELL_DEDUPE_URL)."""
    url = parse_redis_url("KNELL_DEDUPE_URL", settings.dedupe_url)
    keys = _Keys(settings.namespace, 1, check_service_name(service))
    return Account(f"{settings.namespace}-service-{service}", _rules(url, keys, "service"))


@dataclass(frozen=True, slots=True)
class _Keys:
    """The patterns of a deployment's keys."""

    namespace: str
    partitions: int
    service: str | None = None

    def tags(self, slot: str, *, only_feed: bool = False) -> list[str]:
        """The patterns of the tags of a kind of slot: F, P, or L for both."""
        feed = [f"{{{self.namespace}:feed}}"] if slot in "FL" else []
        if slot == "F" or only_feed:
            return feed
        others = [f"{{{self.namespace}:[0-9]*}}"] if self.partitions > 1 else []
        return [*feed, f"{{{self.namespace}:feed}}:0", *others]

    def patterns(self, keys: str, *, only_feed: bool = False) -> list[str]:
        """The patterns of such keys as a row names."""
        slot, _, rest = keys.partition(":")
        if self.service is not None:
            rest = {"k:*": f"k:{self.service}:*", "kx:*": f"kx:{self.service}"}.get(rest, rest)
        return [f"{tag}:{rest}" for tag in self.tags(slot, only_feed=only_feed)]


def _rules(url: RedisUrl, keys: _Keys, role: str) -> tuple[str, ...]:
    selectors = [f"({' '.join([*_granted(commands), *patterns])})" for commands, patterns in _selectors(keys, role)]
    # Rights are taken away first: what an earlier version needed may be too much.
    return ("resetkeys", "resetchannels", "clearselectors", "-@all", *_granted(_without_keys(url, role)), *selectors)


def _without_keys(url: RedisUrl, role: str) -> list[str]:
    """The commands that name no key: what is in the URL decides which of them its connections need."""
    parts = urlsplit(url.server(*url.hosts[0] if url.hosts else ()))
    options = parse_qs(parts.query)
    needed = {
        "ping": True,
        "time": True,
        "info": role != "service",
        "script|load": role != "verifier",
        "wait": url.min_replicas > 0 and role != "verifier",
        "cluster|slots": url.kind == "cluster",
        "select": "db" in options or (parts.scheme != "unix" and parts.path.strip("/") not in ("", "0")),
        "client|setname": "client_name" in options,
    }
    return [command for command, is_needed in needed.items() if is_needed]


def _selectors(keys: _Keys, role: str) -> Iterator[tuple[Iterable[str], list[str]]]:
    """Sets of commands, and the keys that these may have."""
    granted: dict[str, set[str]] = {}
    scripts: dict[str, set[str]] = {}
    for name, only_feed in _calls(role):
        for row in RIGHTS[name]:
            suffix, *commands = row.split()
            for pattern in keys.patterns(suffix, only_feed=only_feed):
                granted.setdefault(pattern, set()).update(commands)
        if name in READING_SCRIPTS | WRITING_SCRIPTS:
            runs = "evalsha_ro" if name in READING_SCRIPTS else "evalsha"
            for tag in keys.tags(_slot_of(name), only_feed=only_feed):
                scripts.setdefault(tag, set()).add(runs)
                if name in SCRIPTS_ANSWERED_ONCE:
                    scripts.setdefault(f"{tag}:a:*", set()).add(runs)
                    granted.setdefault(f"{tag}:a:*", set()).update(_KEPT)
    # A script has to have all of its keys from one selector.
    if scripts:
        yield set().union(*scripts.values()), [f"~{pattern}" for pattern in scripts]
    alike: dict[frozenset[str], list[str]] = {}
    for pattern, found in granted.items():
        alike.setdefault(frozenset(found), []).append(pattern)
    for together, patterns in alike.items():
        yield together, [f"{'%R' if together <= READS else ''}~{pattern}" for pattern in patterns]


def _calls(role: str) -> Iterator[tuple[str, bool]]:
    """The rows of a role, and whether it has them in the feed's slot alone."""
    for entry in ROLES[role]:
        name, _, where = entry.partition("@")
        yield name, where == "F"


def _slot_of(script: str) -> str:
    """Where a script runs: one that looks at both runs beside the tokens."""
    slots = {row[0] for row in RIGHTS[script]}
    return next(slot for slot in "LPF" if slot in slots)


def _granted(commands: Iterable[str]) -> list[str]:
    return [f"+{command}" for command in sorted(commands)]
