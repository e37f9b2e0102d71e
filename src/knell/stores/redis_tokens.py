"""Tokens, sessions and expiry seconds in Redis."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knell import store as contract
from knell.errors import NotDue
from knell.notices import new_batch_id
from knell.revocations import Revocation, Scope
from knell.store import Claim, Detached, Tracked
from knell.stores.redis_codec import pack_id, pack_ref, read_entries, read_ref, read_start, read_strings
from knell.stores.redis_link import Command, script
from knell.stores.redis_part import CHUNK, RedisPart, chunks
from knell.tokens import TokenRef

# Hashes of about 100 tokens are compact; 16,384 of them hold 1.6 million tokens a partition in that form. A store keeps
# the number that it was begun with.
BUCKETS = 16_384
# One token takes a script 12 to 40 microseconds.
TRACK_CHUNK = 250
_ENDED = 1


@dataclass(slots=True)
class _Written:
    """What `track.lua` answered for one token."""

    ref: TokenRef
    partition: int
    outcome: int
    seconds: tuple[int, ...]
    after: bytes
    before: bytes
    denied: Revocation | None = None

    @property
    def ended(self) -> bool:
        return self.outcome & _ENDED != 0

    @property
    def started(self) -> float | None:
        return read_start(self.after) if self.after else self.ref.started


class RedisTokens(RedisPart):
    """The part of the store that knows tokens."""

    def track(self, refs: Sequence[TokenRef], *, continuing: bool = False, reopen: bool = False) -> list[Tracked]:
        # More than a few chunks in one pipeline would outlast the time-out.
        answers: list[Tracked] = []
        asked: set[int] = set()
        for some in chunks(refs, 8 * TRACK_CHUNK):
            written = self._write(some, must_continue=continuing and not reopen)
            self._untrack([one for one in written if one.denied])
            answers += _answers(written, asked)
        return answers

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
        tag = self._tag(self._partition_of(iss, sid))
        found = self._link.call("session", tag, *self._layout, iss, *pack_id(sid))
        # A session whose tokens told no time at all is open, and older than any cut-off.
        return None if found is None else read_start(found) or 0.0

    def claim(self, second: int, *, services: Sequence[str], limit: int = 500) -> Claim | None:
        for partition in range(self._partitions):
            found = self._claim(partition, second, services, limit)
            if found is not None:
                return found if partition == self._partitions - 1 else self._with_more(found, partition, second)
        return None

    def _claim(self, partition: int, second: int, services: Sequence[str], limit: int) -> Claim | None:
        batch_id = new_batch_id("e", partition)
        answer = self._link.call(
            "claim", self._tag(partition), self._now, *self._layout, *self._arming, second, limit, batch_id,
            contract.FIRST_RESEND_SECONDS, *services,
        )  # fmt: skip
        if answer is None:
            return None
        if len(answer) == 1:
            raise NotDue(second, second - float(answer[0]))
        more, recorded, body, rearm = answer
        return Claim(
            batch_id=batch_id if recorded else "",
            entries=read_entries(body),
            rearm=tuple(rearm),
            more=bool(more),
        )

    def _with_more(self, claim: Claim, partition: int, second: int) -> Claim:
        """The claim, which has more if a later partition has members of the second."""
        if claim.more:
            return claim
        key, name = second // 64, second % 64
        left = self._link.run(*(("HEXISTS", f"{tag}:x:{key}", name) for tag in self._tags[partition + 1 :]))
        return Claim(claim.batch_id, claim.entries, claim.rearm, any(left))

    @property
    def _layout(self) -> tuple[int, int]:
        return BUCKETS, self._partitions

    @property
    def _arming(self) -> tuple[str, float, float]:
        return repr(float(self.rules.session_grace_seconds)), contract.ARM_LEASE_SECONDS, contract.IMMEDIATE_SECONDS

    def _write(self, refs: Sequence[TokenRef], *, must_continue: bool) -> list[_Written]:
        """Write tokens, then look at the denylist: in one round trip, in this order."""
        placed: dict[int, list[int]] = {}
        for n, ref in enumerate(refs):
            placed.setdefault(self._partition_of(ref.iss, ref.sid or ref.jti), []).append(n)
        parts = [
            (partition, part) for partition, all_of_it in placed.items() for part in chunks(all_of_it, TRACK_CHUNK)
        ]
        names = sorted({name for ref in refs for name in _deny_keys(ref)})
        commands = [
            self._track_command(partition, [refs[n] for n in part], must_continue=must_continue)
            for partition, part in parts
        ]
        looks = list(chunks(names, 3 * CHUNK))
        answers = self._link.run(*commands, *(script("refusals", self._feed, self._now, *some) for some in looks))
        written: dict[int, _Written] = {}
        for (partition, part), answer in zip(parts, answers, strict=False):
            for n, (outcome, second, session_second, after, before) in zip(part, answer[1:], strict=True):
                seconds = tuple(at for at in (second, session_second) if at)
                written[n] = _Written(refs[n], partition, outcome, seconds, after, before)
        denied = _read_refusals(looks, answers[len(parts) :])
        for one in written.values():
            if not one.ended:
                one.denied = _refusal(one, denied)
        return [written[n] for n in range(len(refs))]

    def _track_command(self, partition: int, refs: Sequence[TokenRef], *, must_continue: bool) -> Command:
        strings: dict[str, int] = {}
        packed = [pack_ref(ref, strings) for ref in refs]
        return script(
            "track", self._tag(partition), self._now, *self._layout, *self._arming, int(must_continue),
            len(strings), *strings, *packed,
        )  # fmt: skip

    def _untrack(self, dead: Sequence[_Written]) -> None:
        commands = []
        # What was written last is taken back first: then each session is found as its token left it.
        backwards = dead[::-1]
        for partition in sorted({one.partition for one in dead}):
            for some in chunks(one for one in backwards if one.partition == partition):
                arguments = [part for one in some for part in _untrack_arguments(one)]
                commands.append(script("untrack", self._tag(partition), *self._layout, *arguments))
        if commands:
            self._link.run(*commands)


def _untrack_arguments(one: _Written) -> tuple[str | bytes | int, ...]:
    return one.ref.iss, *pack_id(one.ref.jti), one.ref.second, one.outcome, one.after, one.before


def _answers(written: Sequence[_Written], asked: set[int]) -> list[Tracked]:
    """The answers, where each second is in one of them at most: a dead token leaves its seconds to the living."""
    wanted = {second for one in written for second in one.seconds} - asked
    answers = []
    for one in written:
        must_arm: tuple[int, ...] = ()
        if not one.denied and not one.ended:
            must_arm = tuple(second for second in _seconds_of(one) if second in wanted)
            wanted.difference_update(must_arm)
            asked.update(must_arm)
        started = None if one.ended else one.started
        answers.append(Tracked(one.ref, must_arm, one.denied, session_ended=one.ended, started=started))
    return answers


def _seconds_of(one: _Written) -> Iterable[int]:
    """The seconds that a living token may have to arm: its own, and those that it was asked to."""
    return dict.fromkeys((one.ref.second, *one.seconds))


def deny_key(scope: Scope, iss: str, value: str) -> bytes:
    """Under what the denylist keeps revocations of one thing."""
    name = iss.encode()
    return scope.value[:2].encode() + len(name).to_bytes(2) + name + value.encode()


def _deny_keys(ref: TokenRef) -> list[bytes]:
    found = ((scope, getattr(ref, scope.claim)) for scope in Scope)
    return [deny_key(scope, ref.iss, value) for scope, value in found if value is not None]


def _read_refusals(looks: Sequence[list[bytes]], answers: Sequence[Any]) -> Mapping[bytes, list[Revocation]]:
    """The live revocations under each deny key that has some."""
    found: dict[bytes, list[Revocation]] = {}
    for names, (now, *hits) in zip(looks, answers, strict=True):
        for index, *packed in hits:
            revocations = [Revocation.from_json(json.loads(one)) for one in packed]
            found[names[index]] = [one for one in revocations if one.expires_at > float(now)]
    return found


def _refusal(one: _Written, denied: Mapping[bytes, list[Revocation]]) -> Revocation | None:
    if not denied:
        return None
    for name in _deny_keys(one.ref):
        for revocation in denied.get(name, ()):
            if revocation.refuses(one.ref, started=one.started):
                return revocation
    return None
