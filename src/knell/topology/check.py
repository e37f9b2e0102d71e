"""Looking at the topology without changing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from amqp.exceptions import NotFound
from kombu import Connection
from kombu.transport.native_delayed_delivery import MAX_LEVEL, level_name

from knell.connection import BROKER_ERRORS, connect, hosts
from knell.errors import BrokerUnavailable
from knell.settings import Settings
from knell.topology.accounts import planned, unplanned
from knell.topology.api import ApiRefused
from knell.topology.names import DELAYED
from knell.topology.plan import EXCHANGES, QueuePlan, queues
from knell.topology.policies import bindings, policy_command, policy_in_force, vhost_of
from knell.topology.users import differences, read_users

APPLY = "run `knell topology apply`"
APPLY_ACCOUNTS = "run `knell topology apply --passwords FOLDER`"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        ok: whether it is as it has to be.
        what: what was found, in one line.
        todo: what to do about it; empty if it is ok.
    """

    ok: bool
    what: str
    todo: str = ""


def missing(connection: Connection, services: Iterable[str], *, settings: Settings) -> list[str]:
    """The exchanges and queues that the broker does not have, as "exchange NAME" and "queue NAME".

    Raises:
        BrokerUnavailable: the broker did not answer, or does not let this account ask.
    """
    levels = [] if settings.embedded else [level_name(level) for level in range(MAX_LEVEL + 1)]
    last = [] if settings.embedded else [DELAYED]
    exchanges = [*(exchange.name for exchange in EXCHANGES), *levels, *last]
    wanted = [("exchange", name) for name in exchanges]
    wanted += [("queue", name) for name in (*(plan.name for plan in queues(services, settings.rules)), *levels)]
    try:
        return [f"{kind} {name}" for kind, name in wanted if not _exists(connection, kind, name)]
    except BROKER_ERRORS as error:
        raise BrokerUnavailable(f"the topology could not be read: {error or type(error).__name__}") from error


def in_short(absent: Iterable[str]) -> list[str]:
    """What `missing` answered, with the levels of the delay ladder in one line a kind."""
    names = list(absent)
    levels = {name for name in names if name.rpartition("_")[2].isdigit()}
    short = [name for name in names if name not in levels]
    for kind in ("exchange", "queue"):
        count = sum(name.startswith(kind) for name in levels)
        if count:
            short.append(f"{kind} {level_name(0)} to {level_name(MAX_LEVEL)[-2:]} ({count} of {MAX_LEVEL + 1})")
    return short


def check(settings: Settings, services: Iterable[str] = ()) -> list[Finding]:
    """Whether the broker has everything; for `knell doctor`. What is wrong is a finding, never an error.

    Args:
        services: the registered services.
    """
    names = list(services)
    where = hosts(settings)
    try:
        with connect(settings) as connection:
            absent = missing(connection, names, settings=settings)
            found = _embedded_bindings(connection) if settings.embedded else set()
    except BrokerUnavailable as error:
        return [Finding(False, f"broker: {error}", "start it, or correct KNELL_BROKER_URL")]
    findings = [Finding(True, f"broker: {where} answers")]
    findings += [Finding(False, f"broker: {what} is missing", APPLY) for what in in_short(absent)]
    if not absent:
        findings.append(Finding(True, "broker: every exchange and queue is there"))
    if settings.embedded:
        findings += _bound(_unbound(found, queues(names, settings.rules), embedded=True))
    else:
        findings += _check_with_api(settings, names, look_at_bindings=not absent)
    return findings


def _check_with_api(settings: Settings, services: Iterable[str], *, look_at_bindings: bool) -> Iterator[Finding]:
    vhost = vhost_of(settings)
    api_url = settings.broker_api_url
    if api_url is None:
        todo = f"set KNELL_BROKER_API_URL, or make sure that this was run: {policy_command(vhost)}"
        yield Finding(False, "broker: without its management API, bindings and policies cannot be checked", todo)
        return
    try:
        if look_at_bindings:
            yield from _bound(_unbound(bindings(api_url, vhost), queues(services, settings.rules), embedded=False))
        if policy_in_force(api_url, vhost):
            yield Finding(True, "broker: what the delay ladder cannot deliver is caught")
        else:
            yield Finding(False, "broker: no policy catches what the delay ladder cannot deliver", APPLY)
        yield from _check_accounts(settings, api_url, services)
    except BrokerUnavailable as error:
        yield Finding(False, f"broker: {error}", "correct KNELL_BROKER_API_URL, or the rights of its account")


def _check_accounts(settings: Settings, api_url: str, services: Iterable[str]) -> Iterator[Finding]:
    try:
        users = read_users(api_url, vhost_of(settings))
    except ApiRefused:
        yield Finding(True, "accounts: not looked at, for KNELL_BROKER_API_URL is no administrator's")
        return
    if not any(name.startswith(f"{settings.namespace}.") for name in users):
        yield Finding(True, "accounts: none has the rights of one process alone; see `knell topology permissions`")
        return
    wrong = 0
    plan = planned(settings, services, users)
    for account in plan:
        user = users.get(account.name)
        unlike = ["is missing"] if user is None else differences(account, user)
        wrong += bool(unlike)
        if unlike:
            yield Finding(False, f"accounts: {account.name}: {'; '.join(unlike)}", APPLY_ACCOUNTS)
    for name in unplanned(settings, plan, users):
        wrong += 1
        yield Finding(False, f"accounts: {name} has rights, and no such service is registered", APPLY)
    if not wrong:
        yield Finding(True, "accounts: each has the rights that it needs")


def _bound(unbound: list[str]) -> Iterator[Finding]:
    yield from (Finding(False, f"broker: {what} is missing", APPLY) for what in unbound)
    if not unbound:
        yield Finding(True, "broker: every binding is there")


def _unbound(found: set[tuple[str, str, str]], plans: Iterable[QueuePlan], *, embedded: bool) -> list[str]:
    return [
        f"binding {exchange} -> {plan.name} ({routing_key!r})"
        for plan in plans
        for exchange, routing_key in plan.bindings
        if (exchange, routing_key, plan.name) not in found and not (embedded and exchange == DELAYED)
    ]


def _embedded_bindings(connection: Connection) -> set[tuple[str, str, str]]:
    channel: Any = connection.channel()
    return {(exchange, routing_key, queue) for queue, exchange, routing_key in channel.list_bindings()}


def _exists(connection: Connection, kind: str, name: str) -> bool:
    # A channel for each question: the broker closes it when the answer is no.
    opened: Any = connection.channel()
    try:
        with opened as channel:
            if kind == "queue":
                channel.queue_declare(name, passive=True)
            else:
                channel.exchange_declare(name, "topic", passive=True)
    except NotFound:
        return False
    return True
