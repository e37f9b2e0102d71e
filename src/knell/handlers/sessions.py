"""Sessions that hang on tokens: where a service keeps them, and what ends them when Knell says so.

    shop = Service("shop")
    sessions = open_sessions("redis://localhost:6379/0", settings=shop.settings, name="shop")
    attach(sessions, shop)

Each session is kept with its TokenRef, under every name that a notice may call it by: iss, jti, sid, sub, client_id,
kid and the tracked claims. A notice first leaves a tombstone and then looks for sessions; `add` looks for tombstones in
the step in which it writes a session: of a notice and a request in flight, whichever is second sees the other.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from knell.follower import Follower
from knell.handlers.held import Held
from knell.handlers.tombstones import names_in, names_of
from knell.notices import Cause, Notice
from knell.settings import Settings, check_store_url
from knell.store import open_store
from knell.tokens import TokenRef

if TYPE_CHECKING:
    from knell.service import Service


log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Ended:
    """A session that is about to be removed.

    Attributes:
        session_id, token: which.
        notice: what ends it; None where notices were missed, and the denylist or its own end did.
    """

    session_id: str = field(repr=False)
    token: TokenRef
    notice: Notice | None

    @property
    def cause(self) -> str:
        """Why it ends: "expired", "revoked", or "missed" where nobody could tell."""
        return Cause.MISSED.value if self.notice is None else self.notice.cause.value

    @property
    def notice_id(self) -> str | None:
        """The notice's id."""
        return None if self.notice is None else self.notice.id


OnEnd = Callable[[Sequence[Ended]], None]


class Sessions(Protocol):
    """Where a service keeps its sessions. Safe to use from several threads and processes, and after a fork.

    Every method raises StoreUnavailable, within seconds, if the store does not answer; all may then be repeated.
    """

    def add(self, session_id: str, token: TokenRef) -> None:
        """Keep a session; or let one that is there hang on another token, after a refresh.

        Raises:
            KeptOut: what the token belongs to has ended. The session is not kept, and no longer if it was.
            InvalidClaims: the id is empty, too long, or no text.
        """

    def get(self, session_id: str) -> TokenRef | None:
        """The token that a session hangs on; None if there is no such session (any more)."""

    def remove(self, session_id: str) -> TokenRef | None:
        """Remove one session, as a logout does. Returns its token; None if there was none."""

    def bury(self, notices: Sequence[Notice]) -> None:
        """Leave a tombstone for each notice: from now on `add` keeps out what it matches."""

    def unearth(self, undone: Sequence[Notice]) -> None:
        """Take away the tombstones of revocations that were undone."""

    def named_in(self, notices: Sequence[Notice]) -> Iterator[Sequence[Held]]:
        """Every session that has a name in common with a notice, page by page; a session may come twice."""

    def all(self) -> Iterator[Sequence[Held]]:
        """Every session, page by page."""

    def discard(self, held: Sequence[Held]) -> None:
        """Remove these sessions, unless they hang on another token by now."""

    def close(self) -> None:
        """Give back connections."""


def open_sessions(url: str | None = None, *, settings: Settings, name: str) -> Sessions:
    """Open the sessions of one service.

    Args:
        url: `redis://`, `rediss://`, `unix://`, `sqlite:///path` or `postgresql://`. None: Knell's own store, or, if
            that is a SQLite file, another one beside it, under KNELL_HOME.
        settings: where the store is, and the rules.
        name: keeps them apart from what else is there.

    Raises:
        InvalidSettings: another scheme, or a URL that cannot be used.
    """
    if not url:
        sqlite = settings.store_url.startswith("sqlite:")
        url = f"sqlite:///{settings.home / name}.db" if sqlite else settings.store_url
    check_store_url(f"the URL of the {name}'s sessions", url)
    if url.startswith(("sqlite:", "postgresql")):
        from knell.handlers.sql import SqlSessions

        return SqlSessions(url, name=name, rules=settings.rules)
    from knell.handlers.redis import RedisSessions

    return RedisSessions(url, prefix=f"{settings.namespace}:{name}", rules=settings.rules)


def attach(sessions: Sessions, service: Service, *, token_ends: bool = False, on_end: OnEnd | None = None) -> None:
    """Let a service end these sessions: registers its handlers for session end, missed notices, and undone ones.

    Args:
        token_ends: also end a session when the token that it hangs on ends, though the session goes on. For what must
            not outlive its token.
        on_end: is told what is about to be removed, page by page, at least once: to log it, or to remove what else
            hangs on it. If it raises, nothing of that page is removed, and the message comes again.

    Raises:
        InvalidInput: the service has such a handler already.
    """

    def end(notices: Sequence[Notice]) -> None:
        end_sessions(sessions, notices, on_end=on_end)

    def check(since: float) -> None:
        log.warning("notices_missed", service=service.name, since=since)
        end_missed(sessions, service.settings, on_end=on_end, now=service.now())

    service.on_session_end(batch=True)(end)
    if token_ends:
        service.on_token_end(batch=True)(end)
    service.on_undone(lambda notice: sessions.unearth([notice]))
    service.on_missed(check)


def end_sessions(sessions: Sessions, notices: Sequence[Notice], *, on_end: OnEnd | None = None) -> int:
    """Leave tombstones, then remove what the notices end. Returns how many sessions it was; idempotent."""
    sessions.bury(notices)
    by_name: dict[str, list[Notice]] = defaultdict(list)
    for notice in notices:
        for name in names_in(notice):
            by_name[name].append(notice)
    count = 0
    for page in sessions.named_in(notices):
        named = [(held, _that_ends(held.token, by_name)) for held in page]
        count += _end(sessions, [(held, notice) for held, notice in named if notice is not None], on_end)
    return count


def end_missed(sessions: Sessions, settings: Settings, *, on_end: OnEnd | None = None, now: float | None = None) -> int:
    """Remove each session that is on the denylist or past its own end, for when notices were dropped. Idempotent.

    A session's own end is its session_exp; without one, the exp of the token that it hangs on, and the grace: where
    clients refresh, `add` the session again with each new token, or they log in again.

    Args:
        settings: where the denylist is, and the rules.
        on_end: see `attach`.
        now: Unix seconds. Default the time.
    """
    now = time.time() if now is None else now
    follower = Follower(
        lambda: open_store(
            settings.store_url, namespace=settings.namespace, rules=settings.rules, partitions=settings.partitions
        )
    )
    try:
        follower.catch_up()
    finally:
        follower.close()
    count = 0
    for page in sessions.all():
        over = [
            held for held in page if _own_end(held.token, settings) <= now or follower.denylist.find(held.token)
        ]  # fmt: skip
        count += _end(sessions, [(held, None) for held in over], on_end)
    return count


def _end(sessions: Sessions, found: Sequence[tuple[Held, Notice | None]], on_end: OnEnd | None) -> int:
    if found:
        if on_end is not None:
            on_end([Ended(held.session_id, held.token, notice) for held, notice in found])
        sessions.discard([held for held, _ in found])
    return len(found)


def _that_ends(token: TokenRef, by_name: Mapping[str, Sequence[Notice]]) -> Notice | None:
    named = (notice for name in names_of(token) for notice in by_name.get(name, ()))
    return next((notice for notice in named if notice.matches(token)), None)


def _own_end(token: TokenRef, settings: Settings) -> float:
    return token.exp + settings.rules.session_grace_seconds if token.session_exp is None else token.session_exp
