"""The whole topology beside what a broker has: what is missing, what is different, and what is there beside it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

from kombu.transport.native_delayed_delivery import MAX_LEVEL, level_name

from knell.settings import Settings
from knell.topology.accounts import planned, unplanned
from knell.topology.api import ApiRefused, call_api
from knell.topology.names import DELAYED, UNROUTED_POLICY
from knell.topology.plan import EXCHANGES, queues
from knell.topology.policies import bindings, policy_in_force, vhost_of
from knell.topology.users import differences, read_users

State = Literal["as it should be", "missing", "different", "not planned", "not looked at"]
# What has to be put right; what is beside it may be there for a reason.
WRONG: frozenset[State] = frozenset({"missing", "different"})


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that the broker has, or should have.

    Attributes:
        kind: "exchange", "queue", "binding", "policy" or "account".
        name: what it is called.
        state: "as it should be", "missing", "different", "not planned" or "not looked at".
        detail: in which way it is different, or what is known of it.
    """

    kind: str
    name: str
    state: State
    detail: str = ""


def compare(settings: Settings, services: Collection[str]) -> list[Row]:
    """Every exchange, queue, binding, policy and account that is there or should be.

    Args:
        settings: with a management API; without an administrator's account there, accounts are unknown.
        services: the registered services.

    Raises:
        BrokerUnavailable: the API did not answer, or refused.
    """
    api_url, vhost = settings.broker_api_url or "", vhost_of(settings)
    host = quote(vhost, safe="")
    made = {each["name"]: each for each in call_api(api_url, "GET", f"/api/exchanges/{host}")}
    held = {each["name"]: each for each in call_api(api_url, "GET", f"/api/queues/{host}")}
    rows = [*_exchanges(made), *_queues(settings, services, held)]
    rows += _bindings(settings, services, bindings(api_url, vhost))
    rows.append(Row("policy", UNROUTED_POLICY, "as it should be" if policy_in_force(api_url, vhost) else "missing"))
    return [*rows, *_accounts(settings, services)]


def _exchanges(found: Mapping[str, Any]) -> Iterator[Row]:
    levels: list[tuple[str, str, Any]] = [(level_name(level), "topic", {}) for level in range(MAX_LEVEL + 1)]
    plans = [(each.name, each.type, dict(each.arguments)) for each in EXCHANGES]
    for name, kind, arguments in [*plans, *levels, (DELAYED, "topic", {})]:
        there = found.get(name)
        if there is None:
            yield Row("exchange", name, "missing")
        elif (there["type"], there["arguments"]) == (kind, arguments):
            yield Row("exchange", name, "as it should be")
        else:
            yield Row("exchange", name, "different", f"{there['type']}, {there['arguments']}")
    known = {name for name, _, _ in [*plans, *levels]} | {DELAYED}
    yield from (Row("exchange", name, "not planned") for name in _beside(found, known))


def _queues(settings: Settings, services: Iterable[str], found: Mapping[str, Any]) -> Iterator[Row]:
    plans = {each.name: dict(each.arguments) for each in queues(services, settings.rules)}
    ladder = {level_name(level): None for level in range(MAX_LEVEL + 1)}
    for name, arguments in {**plans, **ladder}.items():
        there = found.get(name)
        if there is None:
            yield Row("queue", name, "missing")
        elif arguments is not None and there["arguments"] != arguments:
            yield Row("queue", name, "different", str(there["arguments"]))
        else:
            yield Row("queue", name, "as it should be", _depth(there))
    for name in _beside(found, {*plans, *ladder}):
        yield Row("queue", name, "not planned", f"{_depth(found[name])}; no such service is registered")


def _bindings(settings: Settings, services: Iterable[str], found: Collection[tuple[str, str, str]]) -> Iterator[Row]:
    plan = [(exchange, key, each.name) for each in queues(services, settings.rules) for exchange, key in each.bindings]
    for binding in plan:
        yield Row("binding", _named(binding), "as it should be" if binding in found else "missing")
    sources = {each.name for each in EXCHANGES} | {DELAYED}
    for binding in sorted(set(found) - set(plan)):
        if binding[0] in sources:
            yield Row("binding", _named(binding), "not planned")


def _accounts(settings: Settings, services: Collection[str]) -> Iterator[Row]:
    api_url = settings.broker_api_url or ""
    try:
        users = read_users(api_url, vhost_of(settings))
    except ApiRefused:
        yield Row("account", f"{settings.namespace}.*", "not looked at", "KNELL_BROKER_API_URL is no administrator's")
        return
    plan = {account.name: account for account in planned(settings, services, users)}
    for name, account in plan.items():
        user = users.get(name)
        unlike = [] if user is None else differences(account, user)
        yield Row(
            "account",
            name,
            "missing" if user is None else "different" if unlike else "as it should be",
            "; ".join(unlike),
        )
    late = unplanned(settings, plan.values(), users)
    for name, user in users.items():
        if name in late:
            yield Row("account", name, "different", "it has rights, and no such service is registered")
        elif name not in plan and user.permissions is not None:
            rights = user.permissions
            detail = f"configure {rights.configure}, write {rights.write}, read {rights.read}"
            yield Row("account", name, "not planned", detail)


def _beside(found: Iterable[str], known: Collection[str]) -> list[str]:
    return sorted(name for name in found if name.startswith("knell.") and name not in known)


def _depth(queue: Mapping[str, Any]) -> str:
    # Neither is there for a queue that was made this moment.
    return f"{queue.get('messages', 0)} messages, {queue.get('consumers', 0)} readers"


def _named(binding: tuple[str, str, str]) -> str:
    exchange, key, queue = binding
    return f"{exchange} -> {queue} ({key!r})"
