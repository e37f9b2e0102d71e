"""Sessions in Redis."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from knell import Notice, TokenRef
from services.sessions import TOMBSTONE_SECONDS, kept_out, names_in, names_of, written

# redis-py waits 5 s and tries ten times by default: too long for a request.
TIMEOUT_SECONDS = 1.0
PAGE = 1000


class RedisSessions:
    """See `services.sessions.Sessions`. MULTI makes each step atomic.

    Args:
        url: as redis-py takes it.
        prefix: of every key.
    """

    def __init__(self, url: str, *, prefix: str) -> None:
        self._prefix = prefix
        self._redis: Any = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=Retry(ConstantBackoff(0.05), 1),
        )

    def open(self, token: TokenRef) -> str | None:
        """A new session's id; None if a tombstone says that the token's session has ended."""
        session_id, names = secrets.token_urlsafe(32), names_of(token)
        with self._redis.pipeline(transaction=True) as step:
            step.set(self._session(session_id), json.dumps(token.as_json()))
            for name in names:
                step.sadd(self._name(name), session_id)
            for name in names:
                step.hvals(self._tombstone(name))
            tombstones = step.execute()[-len(names) :]
        if kept_out(token, (notice for found in tombstones for notice in found)):
            self.remove(session_id)
            return None
        return session_id

    def get(self, session_id: str) -> TokenRef | None:
        """The token that a session hangs on."""
        found = self._redis.get(self._session(session_id))
        return None if found is None else TokenRef.from_claims(json.loads(found))

    def remove(self, session_id: str) -> TokenRef | None:
        """Remove one session."""
        token = self.get(session_id)
        if token is None:
            return None
        with self._redis.pipeline(transaction=True) as step:
            step.delete(self._session(session_id))
            for name in names_of(token):
                step.srem(self._name(name), session_id)
            removed = step.execute()[0]
        return token if removed else None

    def end(self, notice: Notice) -> list[TokenRef]:
        """Remove what the notice ends, and leave a tombstone."""
        names = names_in(notice)
        with self._redis.pipeline(transaction=True) as step:
            for name in names:
                step.hset(self._tombstone(name), notice.id, written(notice))
                step.expire(self._tombstone(name), TOMBSTONE_SECONDS)
            for name in names:
                step.smembers(self._name(name))
            found = step.execute()[-len(names) :]
        ended = []
        for session_id in set().union(*found):
            token = self.get(session_id)
            if token is not None and notice.matches(token) and self.remove(session_id):
                ended.append(token)
        return ended

    def all(self) -> Iterator[tuple[str, TokenRef]]:
        """Every session."""
        prefix = self._session("")
        for key in self._redis.scan_iter(match=f"{prefix}*", count=PAGE):
            token = self.get(key.removeprefix(prefix))
            if token is not None:
                yield key.removeprefix(prefix), token

    def _session(self, session_id: str) -> str:
        return f"{self._prefix}:session:{session_id}"

    def _name(self, name: str) -> str:
        return f"{self._prefix}:name:{name}"

    def _tombstone(self, name: str) -> str:
        return f"{self._prefix}:tombstone:{name}"
