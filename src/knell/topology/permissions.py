"""What a service's account on the broker may do: read its own queue, write its own retries and receipts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kombu.transport.native_delayed_delivery import MAX_LEVEL, MAX_NUMBER_OF_BITS_TO_USE, level_name

from knell.settings import check_service_name
from knell.topology.names import EVENTS, RECEIPTS, RETRY, parked_key, receipt_key, retry_key, service_queue

NOTHING = "^$"


@dataclass(frozen=True, slots=True)
class Permissions:
    """An account's permissions in a virtual host; every value is a regular expression.

    Attributes:
        configure, write, read: as in `rabbitmqctl set_permissions`.
        topics: for an exchange, the (write, read) expressions of `rabbitmqctl set_topic_permissions`.
    """

    configure: str
    write: str
    read: str
    topics: Mapping[str, tuple[str, str]]


def permissions(service: str) -> Permissions:
    """What the account of a service needs, and nothing more.

    Whoever may write to a level of the delay ladder may write to all that it feeds; the topic permissions hold the
    account to its own key there. It may configure nothing: who may declare the exchange of events may delete it too.
    """
    check_service_name(service)
    levels = [level_name(level) for level in range(MAX_LEVEL + 1)]
    retries = re.escape(retry_key(service))
    answers = "|".join(re.escape(key(service)) for key in (receipt_key, parked_key))
    delay = rf"([01]\.){{{MAX_NUMBER_OF_BITS_TO_USE}}}"
    return Permissions(
        configure=NOTHING,
        write=f"^({'|'.join(re.escape(name) for name in (RETRY, RECEIPTS, EVENTS))}|celery_delayed_[0-9]+)$",
        read=f"^{re.escape(service_queue(service))}$",
        topics={
            RETRY: (f"^{retries}$", NOTHING),
            RECEIPTS: (f"^({answers})$", NOTHING),
            **dict.fromkeys(levels, (f"^{delay}{retries}$", NOTHING)),
        },
    )
