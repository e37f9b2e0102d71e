"""How tokens are recorded in Redis: in one step, unless the denylist has anything on them."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knell.revocations import Revocation, Scope
from knell.store import Tracked
from knell.stores.redis_codec import deny_key, pack_ref, read_revocation, read_start
from knell.stores.redis_link import Command, script
from knell.stores.redis_part import CHUNK, chunks
from knell.stores.redis_tokens import RedisTokens
from knell.tokens import TokenRef

# One token takes a script 12 to 40 microseconds.
TRACK_CHUNK = 250
# Two bytes name a call well enough: a second that is armed twice does no harm.
_MARKS = 0xFFFF


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens that one script takes, by their numbers in the call."""

    partition: int
    refs: Mapping[int, TokenRef]


class RedisTracking(RedisTokens):
    """The part of the store that takes tokens in."""

    def track(
        self,
        refs: Sequence[TokenRef],
        *,
        continuing: bool = False,
        reopen: bool = False,
        predecessor: str | None = None,
    ) -> list[Tracked]:
        answers: list[Tracked] = []
        asked: set[int] = set()
        # More than a few chunks in one pipeline would outlast the time-out.
        for some in chunks(refs, 8 * TRACK_CHUNK):
            refused, written = self._write(some, must_continue=continuing and not reopen, predecessor=predecessor)
            answers += [_answer(ref, refused.get(n), written[n], asked) for n, ref in enumerate(some)]
        return answers

    def _write(
        self, refs: Sequence[TokenRef], *, must_continue: bool, predecessor: str | None
    ) -> tuple[Mapping[int, Revocation], Mapping[int, Sequence[Any]]]:
        """Which tokens are refused, and what the script answered for each; by their numbers."""
        left = self._parts(refs)
        denied: dict[bytes, Revocation] = {}
        written: dict[int, Sequence[Any]] = {}
        if self._partitions == 1:
            # One slot, one step: what finds nothing in the denylist is written, what finds something is not.
            keys = [_deny_keys(part.refs.values(), predecessor) for part in left]
            commands = [self._command(part, {}, must_continue, some) for part, some in zip(left, keys, strict=True)]
            answers = self._link.run(*commands)
            for part, some, (done, *found) in zip(left, keys, answers, strict=True):
                if done:
                    written.update(zip(part.refs, found, strict=True))
                else:
                    denied |= _read_hits(some, found[0])
            left = [part for part, (done, *_) in zip(left, answers, strict=True) if not done]
        else:
            denied = self._look(_deny_keys(refs, predecessor))
        refused = self._refused(
            [pair for part in left for pair in part.refs.items()], denied, must_continue, predecessor
        )
        commands = [self._command(part, refused, must_continue, ()) for part in left]
        for part, (_, *found) in zip(left, self._link.run(*commands), strict=True):
            written.update(zip(part.refs, found, strict=True))
        return refused, written

    def _parts(self, refs: Sequence[TokenRef]) -> list[_Part]:
        placed: dict[int, list[int]] = {}
        for n, ref in enumerate(refs):
            placed.setdefault(self._partition_of(ref.iss, ref.sid or ref.jti), []).append(n)
        return [
            _Part(partition, {n: refs[n] for n in numbers})
            for partition, all_of_it in placed.items()
            for numbers in chunks(all_of_it, TRACK_CHUNK)
        ]

    def _command(
        self, part: _Part, refused: Mapping[int, Revocation], must_continue: bool, deny_keys: Sequence[bytes]
    ) -> Command:
        strings: dict[str, int] = {}
        packed = [pack_ref(ref, strings, refused=refused.get(n)) for n, ref in part.refs.items()]
        return script(
            "track", self._tag(part.partition), self._now, *self._layout, *self._arming, int(must_continue),
            secrets.randbelow(_MARKS) + 1, self._feed, len(deny_keys), *deny_keys, len(strings), *strings, *packed,
        )  # fmt: skip

    def _look(self, deny_keys: Sequence[bytes]) -> dict[bytes, Revocation]:
        parts = list(chunks(deny_keys, 3 * CHUNK))
        answers = self._link.run(*(script("refusals", self._feed, self._now, *some) for some in parts))
        found: dict[bytes, Revocation] = {}
        for some, hits in zip(parts, answers, strict=True):
            found |= _read_hits(some, hits)
        return found

    def _refused(
        self,
        refs: Sequence[tuple[int, TokenRef]],
        denied: Mapping[bytes, Revocation],
        must_continue: bool,
        predecessor: str | None,
    ) -> dict[int, Revocation]:
        """The tokens that are refused, by their numbers; `refs` are in the order in which they will be written."""
        if not denied:
            return {}
        asked = {(ref.iss, ref.sid) for _, ref in refs if ref.sid and _depends_on_start(ref, denied)}
        starts = self._starts(asked, also_closed=not must_continue)
        refused: dict[int, Revocation] = {}
        for n, ref in refs:
            session = (ref.iss, ref.sid or "")
            known = starts.get(session)
            found = _refusal(ref, ref.started if known is None else known, denied, predecessor)
            if found is not None:
                refused[n] = found
            elif session in starts and known is None:
                # It opens the life, or tells its start, and those after it are judged by that.
                starts[session] = ref.started
        return refused

    def _starts(
        self, sessions: Collection[tuple[str, str]], *, also_closed: bool
    ) -> dict[tuple[str, str], float | None]:
        """The starts of sessions that have an open life, or `also_closed` ones; None where it is not known."""
        answers = self._link.run(*(self._session_command(*session) for session in sessions))
        return {
            session: read_start(start or b"")
            for session, start in zip(sessions, answers, strict=True)
            if also_closed or start is not None
        }


def _answer(ref: TokenRef, refused: Revocation | None, written: Sequence[Any], asked: set[int]) -> Tracked:
    """The answer for one token. `asked` are the seconds that are in must_arm of another one."""
    ended, second, session_second, start = written
    must_arm = tuple(at for at in dict.fromkeys((second, session_second)) if at and at not in asked)
    asked.update(must_arm)
    known = read_start(start)
    started = ref.started if known is None else known
    return Tracked(ref, must_arm, refused, session_ended=bool(ended), started=started)


def _keys_of(ref: TokenRef) -> list[bytes]:
    named = ((scope, getattr(ref, scope.claim)) for scope in Scope)
    return [deny_key(scope, ref.iss, value) for scope, value in named if value is not None]


def _deny_keys(refs: Iterable[TokenRef], predecessor: str | None) -> list[bytes]:
    found = {}
    for ref in refs:
        found.update(dict.fromkeys(_keys_of(ref)))
        if predecessor is not None:
            found[deny_key(Scope.TOKEN, ref.iss, predecessor)] = None
    return list(found)


def _read_hits(deny_keys: Sequence[bytes], hits: Iterable[tuple[int, bytes]]) -> dict[bytes, Revocation]:
    return {deny_keys[number]: read_revocation(packed) for number, packed in hits}


def _depends_on_start(ref: TokenRef, denied: Mapping[bytes, Revocation]) -> bool:
    return ref.auth_time is None and ref.sub is not None and deny_key(Scope.SUBJECT, ref.iss, ref.sub) in denied


def _refusal(
    ref: TokenRef, started: float | None, denied: Mapping[bytes, Revocation], predecessor: str | None
) -> Revocation | None:
    if predecessor is not None and (stolen := denied.get(deny_key(Scope.TOKEN, ref.iss, predecessor))):
        return stolen
    found = (denied[key] for key in _keys_of(ref) if key in denied)
    return next((one for one in found if one.refuses(ref, started=started)), None)
