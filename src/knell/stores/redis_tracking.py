"""How tokens are recorded in Redis: in one step, unless the denylist has anything on them."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knell.revocations import Revocation
from knell.store import Tracked
from knell.stores.denied import names_of_token
from knell.stores.redis_codec import pack_ref, read_start
from knell.stores.redis_denylist import Asked, ClaimNames, all_keys, read_hits
from knell.stores.redis_link import script
from knell.stores.redis_node import Command
from knell.stores.redis_part import CHUNK, chunks
from knell.stores.redis_tokens import RedisTokens
from knell.tokens import TokenRef

# One token takes a script 12 to 40 microseconds.
TRACK_CHUNK = 250
# Two bytes name a call well enough: a second that is armed twice does no harm.
_MARKS = 0xFFFF
# What a script did: found something in the denylist, wrote, or has names of claims that it was not asked for.
_DENIED, _WRITTEN = 0, 1


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens that one script takes, by their numbers in the call."""

    partition: int
    asked: Mapping[int, Asked]


class RedisTracking(RedisTokens):
    """The part of the store that takes tokens in."""

    _claim_names: ClaimNames

    def track(
        self,
        refs: Sequence[TokenRef],
        *,
        continuing: bool = False,
        reopen: bool = False,
        predecessor: str | None = None,
        predecessor_kid: str | None = None,
        claims: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Tracked]:
        answers: list[Tracked] = []
        seconds: set[int] = set()
        # More than a few chunks in one pipeline would outlast the time-out.
        for some in chunks(Asked.all(refs, claims, names_of_token(predecessor, predecessor_kid)), 8 * TRACK_CHUNK):
            refused, written = self._write(some, must_continue=continuing and not reopen)
            answers += [_answer(one.ref, refused.get(n), written[n], seconds) for n, one in enumerate(some)]
        return answers

    def _write(
        self, asked: Sequence[Asked], *, must_continue: bool
    ) -> tuple[Mapping[int, Revocation], Mapping[int, Sequence[Any]]]:
        """Which tokens are refused, and what the script answered for each; by their numbers."""
        left = self._parts(asked)
        denied: dict[bytes, Revocation] = {}
        written: dict[int, Sequence[Any]] = {}
        if self._partitions == 1:
            left, denied = self._write_unless_denied(left, must_continue, written)
        else:
            denied = self._look(asked)
        refused = self._refused([pair for part in left for pair in part.asked.items()], denied, must_continue)
        commands = [self._command(part, refused, must_continue) for part in left]
        for part, (_, *found) in zip(left, self._link.run(*commands), strict=True):
            written.update(zip(part.asked, found, strict=True))
        return refused, written

    def _write_unless_denied(
        self, parts: Sequence[_Part], must_continue: bool, written: dict[int, Sequence[Any]]
    ) -> tuple[list[_Part], dict[bytes, Revocation]]:
        """One slot, one step: what finds nothing in the denylist is written, what finds something is not.

        Returns:
            The parts that were not written, and what was found.
        """
        denied: dict[bytes, Revocation] = {}
        kept: list[_Part] = []
        left = list(parts)
        while left:
            names, again = self._claim_names, list[_Part]()
            keys = [all_keys(part.asked.values(), names) for part in left]
            commands = [
                self._command(part, {}, must_continue, deny_keys=some, mark=names.mark)
                for part, some in zip(left, keys, strict=True)
            ]
            for part, some, (what, *found) in zip(left, keys, self._link.run(*commands), strict=True):
                if what == _WRITTEN:
                    written.update(zip(part.asked, found, strict=True))
                elif what == _DENIED:
                    denied |= read_hits(some, found[0])
                    kept.append(part)
                else:
                    self._claim_names = ClaimNames.read(*found)
                    again.append(part)
            left = again
        return kept, denied

    def _parts(self, asked: Sequence[Asked]) -> list[_Part]:
        placed: dict[int, list[int]] = {}
        for n, one in enumerate(asked):
            placed.setdefault(self._partition_of(one.ref.iss, one.ref.sid or one.ref.jti), []).append(n)
        return [
            _Part(partition, {n: asked[n] for n in numbers})
            for partition, all_of_it in placed.items()
            for numbers in chunks(all_of_it, TRACK_CHUNK)
        ]

    def _command(
        self,
        part: _Part,
        refused: Mapping[int, Revocation],
        must_continue: bool,
        *,
        deny_keys: Sequence[bytes] = (),
        mark: bytes = b"-",
    ) -> Command:
        strings: dict[str, int] = {}
        packed = [pack_ref(one.ref, strings, refused=n in refused) for n, one in part.asked.items()]
        return script(
            "track", self._tag(part.partition), self._now, *self._layout, *self._arming, int(must_continue),
            secrets.randbelow(_MARKS) + 1, self._feed, mark, len(deny_keys), *deny_keys, len(strings), *strings,
            *packed,
        )  # fmt: skip

    def _look(self, asked: Sequence[Asked]) -> dict[bytes, Revocation]:
        while True:
            names, found = self._claim_names, dict[bytes, Revocation]()
            parts = list(chunks(all_keys(asked, names), 3 * CHUNK))
            commands = [script("refusals", self._feed, self._now, names.mark, *some) for some in parts]
            for some, (what, *answer) in zip(parts, self._link.run(*commands), strict=True):
                if what == _DENIED:
                    found |= read_hits(some, answer[0])
                else:
                    self._claim_names = ClaimNames.read(*answer)
            if self._claim_names is names:
                return found

    def _refused(
        self, asked: Sequence[tuple[int, Asked]], denied: Mapping[bytes, Revocation], must_continue: bool
    ) -> dict[int, Revocation]:
        """The tokens that are refused, by their numbers; `asked` are in the order in which they will be written."""
        if not denied:
            return {}
        names = self._claim_names
        some = {(one.ref.iss, one.ref.sid) for _, one in asked if one.ref.sid and one.depends_on_start(denied, names)}
        starts = self._starts(some, also_closed=not must_continue)
        refused: dict[int, Revocation] = {}
        for n, one in asked:
            ref, session = one.ref, (one.ref.iss, one.ref.sid or "")
            known = starts.get(session)
            found = one.refusal(ref.started if known is None else known, denied, names)
            if found is not None:
                refused[n] = found
            elif session in starts and known is None:
                # It opens the life, or tells its start, and those after it are judged by that.
                starts[session] = ref.started
        return refused


def _answer(ref: TokenRef, refused: Revocation | None, written: Sequence[Any], asked: set[int]) -> Tracked:
    """The answer for one token. `asked` are the seconds that are in must_arm of another one."""
    ended, second, session_second, start = written
    must_arm = tuple(at for at in dict.fromkeys((second, session_second)) if at and at not in asked)
    asked.update(must_arm)
    known = read_start(start)
    started = ref.started if known is None else known
    return Tracked(ref, must_arm, refused, session_ended=bool(ended), started=started)
