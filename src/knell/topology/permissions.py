"""What each account on the broker may do, and nothing more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kombu.transport.native_delayed_delivery import MAX_LEVEL, MAX_NUMBER_OF_BITS_TO_USE, level_name

from knell.settings import check_service_name
from knell.topology.names import (
    COMMANDS,
    DEAD,
    EVENTS,
    EXPIRY,
    NOTICES,
    RECEIPTS,
    RETRY,
    SWEEP,
    parked_key,
    receipt_key,
    retry_key,
    service_queue,
)

NOTHING = "^$"
# Whoever may write to a level of the delay ladder may write to all that it feeds, but for the topic permissions.
LADDER = "celery_delayed_[0-9]+"
_LEVELS = tuple(level_name(level) for level in range(MAX_LEVEL + 1))
_DELAY = rf"([01]\.){{{MAX_NUMBER_OF_BITS_TO_USE}}}"
# What workers say of themselves and of their tasks, for Flower.
_TOLD = (r"^(task|worker)\.[a-z]+$", NOTHING)
_SERVICE_NAME = "[a-z][a-z0-9_-]*"


@dataclass(frozen=True, slots=True)
class Permissions:
    """An account's permissions in a virtual host; every value is a regular expression.

    Attributes:
        configure, write, read: as in `rabbitmqctl set_permissions`.
        topics: for an exchange, the (write, read) expressions of `rabbitmqctl set_topic_permissions`.
    """

    configure: str = NOTHING
    write: str = NOTHING
    read: str = NOTHING
    topics: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Account:
    """An account that a deployment has on its broker.

    Attributes:
        name: what it is called there. Accounts are the whole broker's, so the deployment's namespace is in it.
        role: "notifier", "beat", "flower", "operator", "issuer" or "service".
        whose: the name of the issuer or the service; "" for the others.
        tags: RabbitMQ's, which say what it may do at the management API.
        permissions: what it may do in Knell's virtual host.
    """

    name: str
    role: str
    whose: str
    tags: tuple[str, ...]
    permissions: Permissions


def accounts(namespace: str, services: Iterable[str], issuers: Iterable[str] = ()) -> list[Account]:
    """Every account of a deployment. A verifier has none: it reads the store, and nothing of the broker.

    Args:
        namespace: the deployment's; the accounts are called "<namespace>.notifier", "<namespace>.service.shop".
        services: the registered services.
        issuers: what the issuers are called; names like those of services.
    """
    alone = (
        ("notifier", (), _notifier()),
        ("beat", (), Permissions(write=_exactly(SWEEP))),
        ("flower", (), _flower()),
        ("operator", ("policymaker",), _operator()),
    )
    named = [("issuer", each, _issuer()) for each in issuers] + [
        ("service", each, permissions(each)) for each in services
    ]
    return [
        *(Account(f"{namespace}.{role}", role, "", tags, rights) for role, tags, rights in alone),
        *(Account(account_name(namespace, role, each), role, each, (), rights) for role, each, rights in named),
    ]


def account_name(namespace: str, role: str, whose: str) -> str:
    """What the account of a service or an issuer is called."""
    return f"{namespace}.{role}.{check_service_name(whose)}"


def permissions(service: str) -> Permissions:
    """What the account of a service needs: to read its own queue, and to write its own retries, receipts and events.

    It may configure nothing: who may declare the exchange of events may delete it too.
    """
    check_service_name(service)
    retries = re.escape(retry_key(service))
    answers = "|".join(re.escape(key(service)) for key in (receipt_key, parked_key))
    return Permissions(
        write=_exactly(RETRY, RECEIPTS, EVENTS, more=LADDER),
        read=_exactly(service_queue(service)),
        topics={
            RETRY: (f"^{retries}$", NOTHING),
            RECEIPTS: (f"^({answers})$", NOTHING),
            EVENTS: _TOLD,
            **_ladder(retries),
        },
    )


def _notifier() -> Permissions:
    """The notifier's worker, with beat in it or without: it reads all that is not a service's."""
    timers = re.escape(EXPIRY)
    return Permissions(
        write=_exactly(EXPIRY, NOTICES, RETRY, SWEEP, EVENTS, more=LADDER),
        read=_exactly(EXPIRY, COMMANDS, SWEEP, RECEIPTS, DEAD),
        topics={
            EXPIRY: (f"^{timers}$", NOTHING),
            RETRY: (f"^{re.escape(retry_key(''))}{_SERVICE_NAME}$", NOTHING),
            EVENTS: _TOLD,
            **_ladder(timers),
        },
    )


def _issuer() -> Permissions:
    """An issuer sends timers, notices and commands, the last two signed, and reads nothing."""
    timers = re.escape(EXPIRY)
    return Permissions(
        write=_exactly(EXPIRY, NOTICES, COMMANDS, more=LADDER),
        topics={EXPIRY: (f"^{timers}$", NOTHING), **_ladder(timers)},
    )


def _flower() -> Permissions:
    """Flower makes a queue of its own for the events of workers; it neither sends any nor touches their exchange."""
    own = rf"{re.escape(EVENTS)}\..+"
    return Permissions(
        configure=f"^{own}$",
        write=f"^{own}$",
        read=_exactly(EVENTS, more=own),
        topics={EVENTS: (NOTHING, "^#$")},
    )


def _operator() -> Permissions:
    """Whoever runs `knell`: all of what is Knell's, and nothing else that may be in the virtual host."""
    everything = _exactly(EVENTS, more=r"knell\..+|celery_delayed_.+")
    return Permissions(configure=everything, write=everything, read=everything)


def _exactly(*names: str, more: str = "") -> str:
    return f"^({'|'.join([*map(re.escape, names), *([more] if more else [])])})$"


def _ladder(key: str) -> dict[str, tuple[str, str]]:
    """On each level of the delay ladder, this key alone."""
    return dict.fromkeys(_LEVELS, (f"^{_DELAY}{key}$", NOTHING))
