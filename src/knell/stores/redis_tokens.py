"""Tokens, sessions and expiry seconds in Redis."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from knell import store as contract
from knell.errors import NotDue
from knell.notices import new_batch_id
from knell.store import Claim, Detached
from knell.stores.redis_codec import pack_id, read_entries, read_ref, read_start, read_strings
from knell.stores.redis_link import script
from knell.stores.redis_node import Command
from knell.stores.redis_part import RedisPart, chunks

# Hashes of about 100 tokens are compact; 16,384 of them hold 1.6 million tokens a partition in that form. A store keeps
# the number that it was begun with.
BUCKETS = 16_384


class RedisTokens(RedisPart):
    """The part of the store that knows tokens."""

    def armed(self, seconds: Collection[int]) -> None:
        self._link.run(*(script("armed", tag, *some) for some in chunks(sorted(seconds)) for tag in self._tags))

    def due(self, *, before: float, limit: int = 1000) -> list[int]:
        found = self._link.run(*(script("due", tag, repr(float(before)), limit) for tag in self._tags))
        return sorted({int(second) for seconds in found for second in seconds})[:limit]

    def detach(self, iss: str, jti: str, *, revocation_id: str) -> Detached:
        is_uuid, packed = pack_id(jti)
        # A token with a session lies in its session's partition, which its jti does not tell.
        answers = self._link.run(
            *(script("detach", tag, *self._layout, iss, is_uuid, packed, revocation_id) for tag in self._tags)
        )
        for answer in answers:
            if answer:
                ends, field, token, strings = answer
                return Detached(ref=read_ref(field, token, read_strings(strings)), ends_session=bool(ends))
        return Detached(ref=None, ends_session=False)

    def attach(self, iss: str, jti: str, *, revocation_id: str) -> None:
        is_uuid, packed = pack_id(jti)
        self._link.run(
            *(script("attach", tag, *self._layout, iss, is_uuid, packed, revocation_id) for tag in self._tags)
        )

    def session(self, iss: str, sid: str) -> float | None:
        [found] = self._link.run(self._session_command(iss, sid))
        return None if found is None else read_start(found) or 0.0

    def _session_command(self, iss: str, sid: str) -> Command:
        tag = self._tag(self._partition_of(iss, sid))
        return script("session", tag, *self._layout, iss, *pack_id(sid))

    def claim(self, second: int, *, services: Sequence[str], limit: int = 500) -> Claim | None:
        for partition in range(self._partitions):
            found = self._claim(partition, second, services, limit)
            if found is not None:
                return found if partition == self._partitions - 1 else self._with_more(found, partition, second)
        return None

    def _claim(self, partition: int, second: int, services: Sequence[str], limit: int) -> Claim | None:
        tag, batch_id = self._tag(partition), new_batch_id("e", partition)
        claim = script(
            "claim", tag, self._now, *self._layout, *self._arming, second, limit, batch_id,
            contract.FIRST_RESEND_SECONDS, *services,
        )  # fmt: skip
        # The record holds the entries: an answer that repeated them would be kept with them, for a call sent again.
        answer, recorded_body = self._link.run(claim, ("HGET", f"{tag}:n:{batch_id}", "b"))
        if answer is None:
            return None
        if len(answer) == 1:
            raise NotDue(second, second - float(answer[0]))
        more, recorded, body, rearm, closed = answer
        return Claim(
            batch_id=batch_id if recorded else "",
            entries=read_entries(recorded_body if recorded else body),
            rearm=tuple(rearm),
            more=bool(more),
            closed=frozenset(closed),
        )

    def _with_more(self, claim: Claim, partition: int, second: int) -> Claim:
        """The claim, which has more if a later partition has members of the second."""
        if claim.more:
            return claim
        key, name = second // 64, second % 64
        left = self._link.run(*(("HEXISTS", f"{tag}:x:{key}", name) for tag in self._tags[partition + 1 :]))
        return replace(claim, more=any(left))

    def _starts(
        self, sessions: Collection[tuple[str, str]], *, also_closed: bool = False
    ) -> dict[tuple[str, str], float | None]:
        """The starts of sessions that have an open life, or `also_closed` ones; None where it is not known."""
        answers = self._link.run(*(self._session_command(*session) for session in sessions))
        return {
            session: read_start(start or b"")
            for session, start in zip(sessions, answers, strict=True)
            if also_closed or start is not None
        }

    @property
    def _layout(self) -> tuple[int, int]:
        return BUCKETS, self._partitions

    @property
    def _arming(self) -> tuple[str, float, float]:
        return repr(float(self.rules.session_grace_seconds)), contract.ARM_LEASE_SECONDS, contract.IMMEDIATE_SECONDS
