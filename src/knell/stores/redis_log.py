"""The notice log in Redis, and the services that it waits for."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from knell import store as contract
from knell.errors import MessageRefused
from knell.notices import Receipt, new_batch_id, partition_of_batch
from knell.settings import check_service_name
from knell.store import OpenNotice, ServiceInfo, Waiting
from knell.stores.notices import read_notices
from knell.stores.redis_codec import Reader, open_numbers, pack_bits, pairs, read_entries
from knell.stores.redis_link import script
from knell.stores.redis_part import CHUNK, RedisPart, chunks

_KINDS: Mapping[bytes, Any] = {b"e": "expiry", b"r": "revocation", b"m": "missed"}


class RedisLog(RedisPart):
    """The part of the store that knows notices and services."""

    def settle(self, batch_id: str, *, dead: Collection[int]) -> None:
        if tag := self._tag_of(batch_id):
            self._link.call("settle", tag, batch_id, pack_bits(dead))

    def open_notices(self, *, limit: int = 100) -> list[OpenNotice]:
        tags = [self._feed, *self._tags]
        gone, *answers = self._link.run(
            ("SMEMBERS", f"{self._feed}:gone"), *(script("waiting", tag, self._now, limit) for tag in tags)
        )
        ready = sorted(
            (float(at), tag, batch_id)
            for tag, flat in zip(tags, answers, strict=True)
            for batch_id, at in zip(flat[::2], flat[1::2], strict=True)
        )[:limit]
        chosen = {tag: [batch_id for _, its, batch_id in ready if its == tag] for tag in tags}
        unsent = {batch_id for at, _, batch_id in ready if at == 0}
        first, longest = contract.FIRST_RESEND_SECONDS, contract.LONGEST_RESEND_SECONDS
        mark = secrets.token_bytes(8)
        taken = self._link.run(
            *(
                script("take", tag, self._now, first, longest, mark, *some)
                for tag, batch_ids in chosen.items()
                for some in chunks(batch_ids, CHUNK // 5)
            )
        )
        removed = {name.decode() for name in gone}
        records = {batch_id.decode(): pairs(record) for answer in taken for batch_id, record in answer}
        found = read_notices(
            {batch_id: int(record[b"a"]) for batch_id, record in records.items()},
            lambda batch_id: _read_notice(batch_id, records[batch_id], removed, unsent=batch_id.encode() in unsent),
        )
        return sorted((notice for notice in found if notice.waiting), key=lambda notice: notice.created_at)

    def resend_at(self, batch_ids: Collection[str], at: float) -> None:
        by_tag: dict[str, list[str]] = {}
        for batch_id in batch_ids:
            if tag := self._tag_of(batch_id):
                by_tag.setdefault(tag, []).append(batch_id)
        self._link.run(
            *(script("resend", tag, repr(float(at)), *some) for tag, ids in by_tag.items() for some in chunks(ids))
        )

    def receive(self, receipts: Sequence[tuple[str, Receipt]]) -> None:
        by_tag: dict[str, list[tuple[str | bytes, ...]]] = {}
        for service, receipt in receipts:
            if tag := self._tag_of(receipt.batch_id):
                by_tag.setdefault(tag, []).append(_receipt_arguments(service, receipt))
        self._link.run(
            *(
                script(
                    "receive", tag, self._now, contract.RETRY_MARGIN_SECONDS, *(part for one in some for part in one)
                )
                for tag, arguments in by_tag.items()
                for some in chunks(arguments)
            )
        )

    def add_service(self, name: str) -> bool:
        return bool(self._call_feed("add_service", self._now, check_service_name(name)))

    def remove_service(self, name: str) -> bool:
        # Taken out of the registry first: what is recorded from here on does not wait for it.
        removed = self._call_feed("remove_service", name)
        for tag in (self._feed, *self._tags):
            start = 0
            while True:
                seen, kept = self._link.call("forget", tag, name, start, CHUNK)
                start += kept
                if seen < CHUNK:
                    break
        return bool(removed)

    def services(self) -> list[ServiceInfo]:
        found = [
            ServiceInfo(name.decode(), float(added), float(since) if since else None)
            for name, added, since in self._call_feed("services")
        ]
        return sorted(found, key=lambda service: service.name)

    def mark_missed(self, service: str, since: float) -> None:
        self._mark_missed({service: since})

    def _mark_missed(self, missed: Mapping[str, float]) -> None:
        arguments = [
            part for service, since in missed.items() for part in (service, repr(float(since)), new_batch_id("m"))
        ]
        self._call_feed("missed", self._now, *arguments)

    def _tag_of(self, batch_id: str) -> str | None:
        """The tag of the slot that holds a record; None if there can be no such record."""
        try:
            partition = partition_of_batch(batch_id)
        except MessageRefused:
            return None
        if partition is None:
            return self._feed
        return self._tag(partition) if partition < self._partitions else None


def _receipt_arguments(service: str, receipt: Receipt) -> tuple[str | bytes, ...]:
    return (
        service,
        receipt.batch_id,
        pack_bits(receipt.done),
        pack_bits(receipt.parked),
        pack_bits(receipt.retrying),
        "" if receipt.until is None else repr(float(receipt.until)),
    )


def _read_notice(batch_id: str, record: Mapping[bytes, bytes], removed: Collection[str], *, unsent: bool) -> OpenNotice:
    kind = _KINDS[record[b"k"]]
    waiting = {
        name[2:].decode(): _read_waiting(record[b"l"], part) for name, part in record.items() if name.startswith(b"w:")
    }
    return OpenNotice(
        batch_id=batch_id,
        kind=kind,
        created_at=float(record[b"c"]),
        jws=record[b"b"].decode() if kind == "revocation" else None,
        entries=read_entries(record[b"b"]) if kind == "expiry" else (),
        settled=kind != "expiry" or b"st" in record,
        since=float(record[b"z"]) if b"z" in record else None,
        attempts=int(record[b"a"]),
        waiting={name: waiting[name] for name in sorted(waiting) if name not in removed},
        unsent=unsent and kind != "missed",
    )


def _read_waiting(live: bytes, part: bytes) -> Waiting:
    reader = Reader(part)
    hold_until = reader.double()
    return Waiting(todo=open_numbers(live, part[reader.at :]), hold_until=hold_until)
