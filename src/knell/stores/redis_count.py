"""The live tokens in Redis, a page at a time, to be counted."""

from __future__ import annotations

from knell.revocations import Revocation, Scope
from knell.store import Counted
from knell.stores.counting import Found, Page, count
from knell.stores.redis_codec import is_detached, pack_id, pairs, read_ref
from knell.stores.redis_link import script
from knell.stores.redis_tokens import BUCKETS, RedisTokens

# How many hashes of tokens one page reads: of a store with a million tokens each holds about 60.
_BUCKETS_A_PAGE = 32

Place = tuple[int, int]


class RedisCount(RedisTokens):
    """The part of the store that counts what a revocation names."""

    def count(self, revocation: Revocation, *, enough: int, within_seconds: float) -> Counted | None:
        if revocation.scope is Scope.SESSION:
            return self._count_session(revocation)
        strings: dict[int, dict[int, str]] = {}

        def page(place: Place | None) -> Page[Place]:
            partition, bucket = place or (0, 0)
            if partition not in strings:
                strings[partition] = self._strings(partition)
            return self._page(partition, bucket, strings[partition])

        tracked = self.rules.tracked_claims
        return count(revocation, page, tracked=tracked, enough=enough, within_seconds=within_seconds)

    def _count_session(self, revocation: Revocation) -> Counted:
        tag = self._tag(self._partition_of(revocation.iss, revocation.value))
        asked = script("live_in_session", tag, *self._layout, revocation.iss, *pack_id(revocation.value))
        [live] = self._link.run(asked)
        return Counted(max(live, 0), int(live >= 0))

    def _strings(self, partition: int) -> dict[int, str]:
        [found] = self._link.run(("HGETALL", f"{self._tag(partition)}:j"))
        found = found if isinstance(found, dict) else pairs(found)
        return {int(number): name.decode() for number, name in found.items()}

    def _page(self, partition: int, bucket: int, strings: dict[int, str]) -> Page[Place]:
        tag, last = self._tag(partition), min(bucket + _BUCKETS_A_PAGE, BUCKETS)
        answers = self._link.run(*(("HGETALL", f"{tag}:t:{n}") for n in range(bucket, last)))
        hashes = [found if isinstance(found, dict) else pairs(found) for found in answers]
        now = self.time()
        live = [
            ref
            for found in hashes
            for field, packed in found.items()
            if not is_detached(packed) and (ref := read_ref(field, packed, strings)).exp > now
        ]
        starts = self._starts({(ref.iss, ref.sid) for ref in live if ref.sid and ref.auth_time is None})
        tokens = [Found(ref, starts.get((ref.iss, ref.sid or ""))) for ref in live]
        if last < BUCKETS:
            return Page(tokens, (partition, last))
        return Page(tokens, (partition + 1, 0) if partition + 1 < self._partitions else None)
