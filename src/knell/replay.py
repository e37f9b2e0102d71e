"""Parked entries, sent to their service once more."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jwt

from knell import commands, messages, topology
from knell.errors import BrokerUnavailable, MessageRefused
from knell.messages import Message
from knell.notices import NoticeBatch
from knell.publisher import Publisher
from knell.store import AuditEntry, Parked, Store

# The store hands out parked entries this many at a time.
PAGE = 500
# How long one message may take to be confirmed.
CONFIRM_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Replay:
    """One message: entries of one batch, for one service; or one command, for the notifier.

    Attributes:
        ids: the ids of the parked entries.
        message: what is sent.
    """

    ids: tuple[str, ...]
    message: Message


@dataclass(frozen=True, slots=True)
class Plan:
    """What a replay comes to.

    Attributes:
        replays: the messages to send.
        refused: by the id of each parked entry that cannot be replayed, why.
    """

    replays: Sequence[Replay]
    refused: Mapping[str, str]


def all_parked(store: Store, *, service: str | None = None, after: str = "") -> Iterator[Parked]:
    """Every parked entry after id `after`, in the order of their ids; of one service, or of all."""
    while page := store.parked(service=service, after=after, limit=PAGE):
        yield from page
        after = page[-1].id


def find_parked(store: Store, wanted: str) -> Parked | None:
    """The parked entry with this id; None if there is none."""
    for parked in all_parked(store, after=wanted[:-1]):
        if parked.id >= wanted:
            return parked if parked.id == wanted else None
    return None


def plan(parked: Sequence[Parked], *, services: Collection[str], now: float) -> Plan:
    """Sort parked entries into messages, one for each service and signed notice, and say which cannot be sent.

    Args:
        parked: the entries.
        services: the registered services.
        now: the store's time; a notice that is too old would be refused.
    """
    gathered: dict[tuple[str, str], list[Parked]] = {}
    refused: dict[str, str] = {}
    replays: list[Replay] = []
    for each in parked:
        if each.queue == topology.COMMANDS and each.jws is not None:
            try:
                replays.append(Replay((each.id,), _command(each.jws)))
            except MessageRefused as error:
                refused[each.id] = str(error)
        elif each.jws is None or each.notice_id is None:
            refused[each.id] = "it is no notice: look at it with `knell parked show`, then drop it"
        elif each.service not in services:
            refused[each.id] = f"no service {each.service!r} is registered"
        elif (why := _stale(each, now)) is not None:
            refused[each.id] = why
        else:
            gathered.setdefault((each.service, each.jws), []).append(each)
    for (service, jws), group in gathered.items():
        numbers = [number_of(each) for each in group]
        shown = f"replayed {len(group)}"
        message = messages.notice_to(service, jws, todo=numbers, replay=True, shown=shown)
        replays.append(Replay(tuple(each.id for each in group), message))
    return Plan(replays, refused)


def send(replays: Sequence[Replay], *, store: Store, publisher: Publisher, actor: str | None = None) -> int:
    """Send each message, wait for its confirm, and only then take its entries off the list. The audit log says so.

    Args:
        actor: who asks for it.

    Returns:
        How many entries were sent.

    Raises:
        BrokerUnavailable: one was not confirmed; it and those after it are still parked.
    """
    sent = 0
    # Written first, and then with what became of it: what was sent must not go unsaid.
    audit = AuditEntry(at=store.time(), action="replayed", actor=actor, what={"services": _services(replays)})
    store.note(audit)
    for each in replays:
        try:
            publisher.send([each.message]).result(CONFIRM_SECONDS)
        except (BrokerUnavailable, TimeoutError) as error:
            left = sum(len(replay.ids) for replay in replays) - sent
            raise BrokerUnavailable(
                f"{sent} entries were replayed, then the broker did not confirm one; {left} are still parked ({error})"
            ) from None
        # At once: a service that gives up again parks the entry anew, and that one must stay.
        store.unpark(each.ids)
        sent += len(each.ids)
        store.note(replace(audit, counts={"entries": sent}))
    return sent


def _services(replays: Sequence[Replay]) -> list[str]:
    """The services whose entries are replayed, by the entries' ids; of commands their queue."""
    return sorted({each.ids[0].partition("/")[0] if "/" in each.ids[0] else topology.COMMANDS for each in replays})


def read_batch(jws: str) -> NoticeBatch:
    """The notices in a signed notice, for people to look at. The signature is not checked: services do that.

    Raises:
        MessageRefused: it is none.
    """
    try:
        payload = jwt.decode(jws, options={"verify_signature": False})
    except jwt.InvalidTokenError as error:
        raise MessageRefused(f"not a signed notice: {error}") from None
    return NoticeBatch.from_payload(payload)


def _command(jws: str) -> Message:
    if commands.what_to_do(jws) == "track":
        return messages.track_command(jws, shown="replayed")
    return messages.revoke_command(jws, shown="replayed")


def number_of(parked: Parked) -> int:
    """The number of a parked entry in its batch."""
    assert parked.notice_id is not None
    return int(parked.notice_id.rpartition(".")[2])


def _stale(parked: Parked, now: float) -> str | None:
    assert parked.jws is not None
    try:
        batch = read_batch(parked.jws)
    except MessageRefused as error:
        return str(error)
    if number_of(parked) not in {notice.n for notice in batch.entries}:
        return "its signed notice has no such entry"
    if now >= batch.expires_at:
        return f"its notice expired {now - batch.expires_at:.0f} s ago, and the service would refuse it"
    return None
