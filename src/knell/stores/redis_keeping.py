"""What else Redis keeps: dedupe records, parked entries, leases; and what is removed in time."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Sequence
from typing import Any

from knell import store as contract
from knell.store import AuditEntry, Begun, Parked, Pruned
from knell.stores.redis_codec import pack_audit, pack_bitmap, read_bitmap
from knell.stores.redis_link import script
from knell.stores.redis_log import RedisLog
from knell.stores.redis_part import CHUNK, RedisPart, chunks

# How much of each kind one prune removes at most.
PRUNE_LIMIT = 1000
# A dedupe record outlives the last notice that it could be asked about.
DEDUPE_MARGIN_SECONDS = 86_400.0
# A record of the notice log holds up to 500 tokens, so that fewer of them are looked at in one script.
_DROP_CHUNK = CHUNK // 5


class RedisDedupe(RedisPart):
    """The part of the store that services need."""

    def begin(self, service: str, batch_id: str, *, holder: str, lease_seconds: float) -> Begun:
        granted, done, parked, abandoned = self._call_feed(
            "begin", self._now, self._dedupe_seconds, service, batch_id, holder, repr(float(lease_seconds))
        )
        return Begun(bool(granted), read_bitmap(done), read_bitmap(parked), abandoned.decode() or None)

    def mark(
        self,
        service: str,
        batch_id: str,
        *,
        holder: str,
        done: int,
        parked: int = 0,
        unparked: int = 0,
        lease_seconds: float,
    ) -> bool:
        held = self._call_feed(
            "mark", self._now, self._dedupe_seconds, service, batch_id, holder, repr(float(lease_seconds)),
            pack_bitmap(done), pack_bitmap(parked), pack_bitmap(unparked),
        )  # fmt: skip
        return bool(held)

    @property
    def _dedupe_seconds(self) -> str:
        return repr(self.rules.retention_seconds + DEDUPE_MARGIN_SECONDS)


class RedisParked(RedisPart):
    """The part of the store that keeps what was given up on."""

    def park(self, parked: Sequence[Parked]) -> None:
        for some in chunks(parked, CHUNK):
            jws = {_digest(one.jws): one.jws for one in some if one.jws is not None}
            entries = [part for one in some for part in _parked_arguments(one)]
            flat = [part for digest, text in jws.items() for part in (digest, text)]
            self._call_feed("park", len(jws), *flat, *entries)

    def parked(self, *, service: str | None = None, after: str = "", limit: int = 100) -> list[Parked]:
        which = "" if service is None else f":{service}"
        found = self._call_feed("list_parked", which, f"({after}" if after else "-", limit)
        return [_read_parked(body, jws) for body, jws in found]

    def unpark(self, ids: Collection[str]) -> int:
        return sum(self._call_feed("unpark", *some) for some in chunks(ids))


class RedisAudit(RedisPart):
    """The part of the store that keeps who did what."""

    def note(self, entry: AuditEntry) -> None:
        self._call_feed("note", *pack_audit(entry))

    def audit(self, *, before: tuple[float, str] | None = None, limit: int = 100) -> list[AuditEntry]:
        at, id = ("", "") if before is None else (repr(float(before[0])), before[1])
        return [AuditEntry.from_json(json.loads(entry)) for entry in self._call_feed("list_audit", at, id, limit)]


class RedisKeeping(RedisLog):
    """The part of the store that keeps house."""

    def lease(self, name: str, *, holder: str, seconds: float) -> bool:
        return bool(self._call_feed("lease", self._now, name, holder, repr(float(seconds))))

    def prune(self) -> Pruned:
        retention = repr(self.rules.retention_seconds)
        (revocations, changes), (dedupe, parked, audit) = self._link.run(
            script("prune_feed", self._feed, self._now, contract.FEED_LENGTH, PRUNE_LIMIT),
            script("prune_kept", self._feed, self._now, retention, PRUNE_LIMIT, repr(self.rules.audit_seconds)),
        )
        notices, missed = self._prune_log(retention)
        return Pruned(
            revocations=revocations,
            changes=changes,
            notices=notices,
            dedupe=dedupe,
            parked=parked,
            audit=audit,
            missed=missed,
        )

    def _prune_log(self, retention: str) -> tuple[int, dict[str, float]]:
        tags = [self._feed, *self._tags]
        sizes = [int(size or 0) for size in self._link.run(*(("GET", f"{tag}:b") for tag in tags))]
        # The feed's slot has no expiry records: the partitions give back what is too much, each its share.
        excess, own = sum(sizes) - self.rules.log_max_bytes, sum(sizes[1:])
        shares = [0 if tag == self._feed or excess <= 0 else -(-excess * size // max(own, 1)) for tag, size in
                  zip(tags, sizes, strict=True)]  # fmt: skip
        answers = self._link.run(
            *(script("outdated", tag, self._now, retention, share, PRUNE_LIMIT)
              for tag, share in zip(tags, shares, strict=True))
        )  # fmt: skip
        missed: dict[str, float] = {}
        for _, made, *services in (record for answer in answers for record in answer):
            for name in services:
                since = missed.get(name.decode(), float(made))
                missed[name.decode()] = min(since, float(made))
        if missed:
            [registered] = self._link.run(("HKEYS", f"{self._feed}:s"))
            missed = {name: since for name, since in missed.items() if name.encode() in registered}
            # Marked before anything is removed: a crash in between tells a service too much, not too little.
            self._mark_missed(missed)
        removed = self._link.run(
            *(script("drop", tag, *(record[0] for record in some))
              for tag, answer in zip(tags, answers, strict=True) for some in chunks(answer, _DROP_CHUNK))
        )  # fmt: skip
        return sum(removed), missed


def _digest(jws: str) -> bytes:
    return hashlib.sha256(jws.encode()).digest()


def _parked_arguments(parked: Parked) -> tuple[str | bytes, ...]:
    body: dict[str, Any] = {
        "id": parked.id,
        "service": parked.service,
        "queue": parked.queue,
        "error": parked.error,
        "at": parked.at,
        "attempts": parked.attempts,
        "notice_id": parked.notice_id,
        "body": None if parked.body is None else base64.b64encode(parked.body).decode(),
    }
    return (
        parked.id,
        b"" if parked.jws is None else _digest(parked.jws),
        parked.service,
        repr(float(parked.at)),
        json.dumps(body, separators=(",", ":")),
    )


def _read_parked(packed: bytes, jws: bytes) -> Parked:
    found = json.loads(packed)
    body = found.pop("body")
    return Parked(
        **found,
        jws=jws.decode() or None,
        body=None if body is None else base64.b64decode(body),
    )
