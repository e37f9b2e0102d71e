"""Sessions that hang on tokens, kept so that a notice finds what it ends.

Each session is kept with its TokenRef and indexed by (iss, jti), (iss, sid) and (iss, sub). A notice leaves a tombstone
in the same step in which it looks for sessions, and `open` looks for tombstones in the step in which it writes a
session: of a notice and a request in flight, whichever comes second sees the other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from knell import Notice, Scope, Settings, TokenRef
from knell.follower import Follower
from knell.revocations import named_by
from knell.settings import check_store_url
from knell.store import open_store

# Longer than any request is in flight, and than a verifier may go on accepting what is revoked.
TOMBSTONE_SECONDS = 3600


class Sessions(Protocol):
    """Where a service keeps its sessions. Safe to use from several threads and processes."""

    def open(self, token: TokenRef) -> str | None:
        """Open a session. Returns its id, which is a secret of its client; None if the token's session has ended."""

    def get(self, session_id: str) -> TokenRef | None:
        """The token that a session hangs on; None if there is no such session (any more)."""

    def remove(self, session_id: str) -> TokenRef | None:
        """Remove one session, as a logout does. Returns its token; None if there was none."""

    def end(self, notice: Notice) -> list[TokenRef]:
        """Remove the sessions that a notice ends, and let no new one begin. Returns their tokens; idempotent."""

    def all(self) -> Iterator[tuple[str, TokenRef]]:
        """Every session, by id, read page by page."""


def open_sessions(url: str | None, settings: Settings, *, name: str) -> Sessions:
    """Open the sessions of one service.

    Args:
        url: `redis://`, `rediss://`, `unix://` or `sqlite:///path`. None: Knell's own store if that is Redis, else a
            SQLite file under KNELL_HOME.
        name: keeps them apart from what else is there.

    Raises:
        InvalidSettings: another scheme, or a URL that cannot be used.
    """
    if not url:
        sqlite = settings.store_url.startswith("sqlite:")
        url = f"sqlite:///{settings.home / name}.db" if sqlite else settings.store_url
    check_store_url(f"the URL of the {name}'s sessions", url)
    if url.startswith("sqlite:"):
        from services.sessions_sqlite import SqliteSessions

        return SqliteSessions(url.removeprefix("sqlite:///"))
    from services.sessions_redis import RedisSessions

    return RedisSessions(url, prefix=f"{settings.namespace}:{name}")


def end_missed(sessions: Sessions, settings: Settings) -> list[TokenRef]:
    """Remove each session that is on the denylist or past its own end, for when notices were dropped. Idempotent."""
    follower = Follower(
        lambda: open_store(
            settings.store_url, namespace=settings.namespace, rules=settings.rules, partitions=settings.partitions
        )
    )
    try:
        follower.catch_up()
    finally:
        follower.close()
    ended = []
    for session_id, token in sessions.all():
        over = _own_end(token, settings) <= time.time()
        if (over or follower.denylist.find(token)) and sessions.remove(session_id):
            ended.append(token)
    return ended


def names_of(token: TokenRef) -> list[str]:
    """What a notice may call a session by."""
    return [_name(token.iss, scope, value) for scope, value in named_by(token)]


def names_in(notice: Notice) -> list[str]:
    """What a notice calls the sessions that it ends by."""
    # By claims it may be any of the issuer's: `Notice.matches` decides.
    scope = notice.scope if notice.scope.claim else Scope.ISSUER
    found = [_name(notice.iss, scope, str(getattr(notice, scope.claim or "iss")))]
    if notice.scope is Scope.TOKEN and notice.sid is not None and "session" in notice.ends:
        found.append(_name(notice.iss, Scope.SESSION, notice.sid))
    return found


def written(notice: Notice) -> str:
    """A tombstone: the notice itself, so that `Notice.matches` decides whom it keeps out."""
    return json.dumps([notice.batch_id, notice.as_json()])


def kept_out(token: TokenRef, tombstones: Iterable[str]) -> bool:
    """Whether a tombstone says that the token's session has ended."""
    return any(Notice.from_json(*json.loads(found)).matches(token) for found in tombstones)


def _name(iss: str, scope: Scope, value: str) -> str:
    return json.dumps([scope, iss, value])


def _own_end(token: TokenRef, settings: Settings) -> float:
    return token.exp + settings.rules.session_grace_seconds if token.session_exp is None else token.session_exp
