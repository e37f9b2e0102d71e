"""Sessions in Redis or Valkey, version 7 or newer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import redis
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from knell.errors import InvalidSettings, KeptOut, StoreUnavailable
from knell.handlers.held import Held, check_session_id, in_pages, lives_until, written
from knell.handlers.tombstones import buried_under, kept_until, names_in, names_of, of_revocation, that_keeps_out
from knell.handlers.tombstones import written as written_notice
from knell.notices import Notice
from knell.settings import Rules
from knell.stores.redis_url import parse_redis_url
from knell.tokens import TokenRef

# redis-py waits 5 s and tries ten times by default: too long for a request.
TIMEOUT_SECONDS = 1.0
RETRY_PAUSE_SECONDS = 0.05
# How many sessions one step of a scan looks at, and at how many names at once: a page stays below 10 MB.
PAGE = 500
NAMES_AT_ONCE = 20
# How many sessions one script removes: far below a millisecond each.
DISCARDED_AT_ONCE = 50

# A session is a hash (its token, its names) and stands under each name, by its start, and under "due", by its last day.
_DROP = """
local tag = KEYS[1]
local function drop(id, text)
  local key = tag .. ':s:' .. id
  local found = redis.call('HMGET', key, 'token', 'names')
  if not found[1] or (text ~= '' and found[1] ~= text) then return false end
  for name in string.gmatch(found[2], '%S+') do redis.call('ZREM', tag .. ':n:' .. name, id) end
  redis.call('DEL', key)
  redis.call('ZREM', tag .. ':due', id)
  return found[1]
end
"""
# ARGV: now, id, token, last day, start, names. What has seen its last day goes by the way.
_ADD = f"""{_DROP}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', tag .. ':due', '-inf', ARGV[1], 'LIMIT', 0, {DISCARDED_AT_ONCE})) do
  drop(id, '')
end
local id, names, tombstones = ARGV[2], ARGV[6], {{}}
drop(id, '')
redis.call('HSET', tag .. ':s:' .. id, 'token', ARGV[3], 'names', names)
redis.call('ZADD', tag .. ':due', ARGV[4], id)
for name in string.gmatch(names, '%S+') do
  redis.call('ZADD', tag .. ':n:' .. name, ARGV[5], id)
  for _, text in ipairs(redis.call('ZRANGEBYSCORE', tag .. ':t:' .. name, '(' .. ARGV[1], '+inf')) do
    tombstones[#tombstones + 1] = text
  end
end
return tombstones
"""
# ARGV: ids, and after each the token that it must still hang on ('': whichever).
_DISCARD = f"""{_DROP}
local dropped = {{}}
for n = 1, #ARGV, 2 do dropped[#dropped + 1] = drop(ARGV[n], ARGV[n + 1]) or '' end
return dropped
"""

T = TypeVar("T")


class RedisSessions:
    """See `knell.handlers.sessions.Sessions`. All its keys lie in one slot of a cluster.

    Adding, ending and looking up cost a round trip or two, whatever the number of sessions; what may name many sessions
    is read in pages of about 500, and no script runs for longer than it takes to remove 50 of them.

    Args:
        server: a URL (`redis://`, `rediss://`, `unix://`), or a client with `decode_responses=True` and time-outs of
            its own, which stays yours to close.
        prefix: of every key.
        rules: the lifetimes of the deployment. Default `Rules()`.
        clock: Unix seconds; for tests.

    Raises:
        InvalidSettings: the URL cannot be used. Nothing is contacted here.
    """

    def __init__(
        self,
        server: str | redis.Redis,
        *,
        prefix: str,
        rules: Rules | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._owned = isinstance(server, str)
        self._redis: Any = _client(server) if isinstance(server, str) else server
        self._tag = f"{{{prefix}}}"
        self._rules = rules or Rules()
        self._clock = clock
        self._add = self._redis.register_script(_ADD)
        self._discard = self._redis.register_script(_DISCARD)

    def add(self, session_id: str, token: TokenRef) -> None:
        """See Sessions.add."""
        check_session_id(session_id)
        now, text = self._clock(), written(token)
        until = lives_until(token, self._rules, now=now)
        start = 0.0 if token.started is None else token.started
        arguments: list[str | float] = [now, session_id, text, until, start, " ".join(names_of(token))]
        tombstones = self._bounded(lambda: self._add(keys=[self._tag], args=arguments))
        over = that_keeps_out(token, tombstones)
        if over is not None:
            self.discard([Held(session_id, token, text)])
            raise KeptOut(over.id, over.cause.value)

    def get(self, session_id: str) -> TokenRef | None:
        """See Sessions.get."""
        text = self._bounded(lambda: self._redis.hget(self._session(session_id), "token"))
        return None if text is None else self._alive(Held.read(session_id, text).token)

    def remove(self, session_id: str) -> TokenRef | None:
        """See Sessions.remove."""
        [text] = self._bounded(lambda: self._discard(keys=[self._tag], args=[session_id, ""]))
        return Held.read(session_id, text).token if text else None

    def bury(self, notices: Sequence[Notice]) -> None:
        """See Sessions.bury."""
        now = self._clock()
        kept = [(notice, until) for notice in notices if (until := kept_until(notice, self._rules)) > now]
        with self._redis.pipeline(transaction=False) as step:
            for notice, until in kept:
                for name in buried_under(notice):
                    key = self._tombstones(name)
                    step.zremrangebyscore(key, "-inf", now)
                    step.zadd(key, {written_notice(notice): until})
                    # For as long as the last of them: NX if it has no end yet, GT if this one is later.
                    step.expireat(key, int(until) + 1, nx=True)
                    step.expireat(key, int(until) + 1, gt=True)
            self._bounded(step.execute)

    def unearth(self, undone: Sequence[Notice]) -> None:
        """See Sessions.unearth."""
        for notice in undone:
            for name in names_in(notice):
                key = self._tombstones(name)
                texts = self._bounded(partial(self._redis.zrange, key, 0, -1))
                for text, names in of_revocation(notice, texts):
                    for each in names:
                        self._bounded(partial(self._redis.zrem, self._tombstones(each), text))

    def named_in(self, notices: Sequence[Notice]) -> Iterator[Sequence[Held]]:
        """See Sessions.named_in."""
        # What began after the cut-off is not even read.
        latest: dict[str, float] = {}
        for notice in notices:
            for name in names_in(notice):
                cut_off = float("inf") if notice.issued_before is None else notice.issued_before
                latest[name] = max(cut_off, latest.get(name, cut_off))
        for names in in_pages(latest, NAMES_AT_ONCE):
            yield from self._scanned({self._name(name): latest[name] for name in names})

    def all(self) -> Iterator[Sequence[Held]]:
        """See Sessions.all."""
        return self._scanned({f"{self._tag}:due": float("inf")})

    def discard(self, held: Sequence[Held]) -> None:
        """See Sessions.discard."""
        with self._redis.pipeline(transaction=False) as step:
            for some in in_pages(held, DISCARDED_AT_ONCE):
                arguments = [text for each in some for text in (each.session_id, each.text)]
                self._discard(keys=[self._tag], args=arguments, client=step)
            self._bounded(step.execute)

    def close(self) -> None:
        """See Sessions.close."""
        if self._owned:
            self._redis.close()

    def _scanned(self, keys: dict[str, float]) -> Iterator[Sequence[Held]]:
        """The sessions in some sorted sets whose score is at most the given one: all that are there the whole time."""
        cursors = dict.fromkeys(keys, 0)
        while cursors:
            with self._redis.pipeline(transaction=False) as step:
                for key, cursor in cursors.items():
                    step.zscan(key, cursor, count=PAGE)
                answers = self._bounded(step.execute)
            found = {
                session_id
                for key, (_, members) in zip(cursors, answers, strict=True)
                for session_id, score in members
                if score <= keys[key]
            }
            cursors = {key: cursor for key, (cursor, _) in zip(cursors, answers, strict=True) if cursor}
            for ids in in_pages(found, PAGE):
                yield self._read(ids)

    def _read(self, ids: Iterable[str]) -> list[Held]:
        with self._redis.pipeline(transaction=False) as step:
            for session_id in ids:
                step.hget(self._session(session_id), "token")
            texts = self._bounded(step.execute)
        return [Held.read(each, text) for each, text in zip(ids, texts, strict=True) if text is not None]

    def _alive(self, token: TokenRef) -> TokenRef | None:
        now = self._clock()
        return token if lives_until(token, self._rules, now=now) > now else None

    def _bounded(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"the sessions' Redis did not answer, or refused: {type(error).__name__}") from error

    def _session(self, session_id: str) -> str:
        return f"{self._tag}:s:{session_id}"

    def _name(self, name: str) -> str:
        return f"{self._tag}:n:{name}"

    def _tombstones(self, name: str) -> str:
        return f"{self._tag}:t:{name}"


def _client(url: str) -> redis.Redis:
    parsed = parse_redis_url("the URL of the sessions", url)
    if parsed.kind != "one":
        raise InvalidSettings(
            "the URL of the sessions is of sentinels or a cluster: name one Redis, or give RedisSessions a client of "
            "redis-py, such as Sentinel(...).master_for(...)"
        )
    return redis.Redis.from_url(
        parsed.server(*parsed.hosts[0] if parsed.hosts else ()),
        decode_responses=True,
        socket_timeout=TIMEOUT_SECONDS,
        socket_connect_timeout=TIMEOUT_SECONDS,
        retry=Retry(ConstantBackoff(RETRY_PAUSE_SECONDS), 1),
    )
