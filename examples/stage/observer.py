"""Listens to what the processes log and the clients see, and looks at everything in the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from knell import Settings, TokenExpired, TokenRefused, TokenRevoked, Verifier
from knell.handlers.sessions import open_sessions
from stage.clients import TOKEN_ENDED, GatewayClient, ShopClient
from stage.ledger import Row, Session, Token, row
from stage.timeline import Timeline

READY_SECONDS = 5.0


class Observer:
    """Keeps the ledger of a set of sessions.

    Attributes:
        shop_down_at, shop_back_at: while the shop's worker was away, Unix seconds; None before.
        over: True when connections are closed by their clients.
    """

    def __init__(self, timeline: Timeline, sessions: Sequence[Session]) -> None:
        self._timeline = timeline
        self._sessions = {session.sid: session for session in sessions}
        self._tokens = {token.jti: token for session in sessions for token in session.tokens}
        self._changed = asyncio.Event()
        self.shop_down_at: float | None = None
        self.shop_back_at: float | None = None
        self.over = False
        by_sid = [(each.sid, each.how) for each in self._sessions.values()]
        by_jti = [(each.jti, each.how) for each in self._tokens.values()]
        self.shop = row("shop: sessions", by_sid)
        self.connections = row("gateway: connections", by_jti)
        self.tickets = row("gateway: resume tickets", by_jti)
        self.partner = row("partner: sessions", by_sid)
        self.verifier = row("verifier: tokens", by_jti)

    @property
    def rows(self) -> list[Row]:
        """What was due and what became of it, service by service."""
        return [self.shop, self.connections, self.tickets, self.partner, self.verifier]

    async def wait(self, timeout_seconds: float) -> bool:
        """Wait until every end that is due was seen. False if some was not, in that time."""
        deadline = time.monotonic() + timeout_seconds
        while any(each.due - each.said for each in self.rows if each is not self.verifier):
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                return False
        return True

    # ---- what is heard

    def heard(self, name: str, line: str) -> None:
        """A line of a process's log."""
        try:
            told = json.loads(line)
        except ValueError:
            return  # some lines are for people
        if not isinstance(told, dict):
            return
        match name, told.get("event"):
            case "shop", "session_ended":
                moment = self._sessions[told["sid"]].moment
                self._ended(self.shop, told["sid"], moment, told["cause"], _time(told))
            case "gateway", "ticket_voided":
                moment = self._tokens[told["jti"]].moment
                self._ended(self.tickets, told["jti"], moment, told["cause"], _time(told))
            case "receiver", "received":
                for session in self._named(told["type"], told["data"]):
                    self._ended(self.partner, session.sid, session.moment, told["data"]["cause"], told["at"])

    def closed(self, token: Token, code: int | None, at: float) -> None:
        """A connection to the gateway was closed."""
        if self.over:
            return
        if code != TOKEN_ENDED:
            self._timeline.say(f"a connection was closed with code {code}", who="gateway", at=at)
        elif token.how == "expires":
            # A connection ends with its token, at exp; what is told to services comes at the full second.
            self._ended(self.connections, token.jti, token.issued.ref.exp, "expired", at)
        else:
            self._ended(self.connections, token.jti, token.moment, "revoked", at)

    def _ended(self, what: Row, name: str, moment: float | None, cause: str, at: float) -> None:
        who, _, things = what.title.partition(": ")
        if moment is None:
            what.late[name] = None
            self._timeline.say(f"{things}: {name} was ended, and should live on", who=who, at=at)
        else:
            ms = (at - moment) * 1000
            if what is self.shop and self._was_down(moment):
                back = at if self.shop_back_at is None else self.shop_back_at
                what.late_after_return[name] = max(0.0, (at - back) * 1000)
            else:
                what.late[name] = ms
            self._timeline.did(who, f"{things}, {cause}", at=at, ms=ms)
        self._changed.set()

    def _was_down(self, moment: float) -> bool:
        if self.shop_down_at is None or moment < self.shop_down_at:
            return False
        return self.shop_back_at is None or moment < self.shop_back_at

    def _named(self, kind: str, data: dict[str, Any]) -> list[Session]:
        """The sessions that a notice to the partner ends."""
        if kind != "session.ended":
            return []
        if "issued_before" in data:
            return [session for session in self._sessions.values() if session.user == data["sub"]]
        return [self._sessions[data["sid"]]]

    # ---- what is looked at in the end

    async def look(
        self, shop: ShopClient, sockets: Sequence[GatewayClient], verifier: Verifier, settings: Settings
    ) -> None:
        """Ask each service what still lives; that it said so is not enough."""
        self._timeline.flush()
        self._timeline.say("looking at every session, connection, ticket and token")
        sessions, tokens = list(self._sessions.values()), list(self._tokens.values())
        known = await asyncio.gather(*(shop.is_alive(session) for session in sessions))
        self.shop.alive = {each.sid for each, alive in zip(sessions, known, strict=True) if alive}
        answers = await asyncio.gather(*(socket.is_alive() for socket in sockets))
        self.connections.alive = {each.token.jti for each, alive in zip(sockets, answers, strict=True) if alive}
        tickets = open_sessions(settings=settings, name="gateway")
        self.tickets.alive = {token.jti for token in tokens if tickets.get(token.ticket)}
        self.partner.alive = self._sessions.keys() - self.partner.said
        await asyncio.to_thread(verifier.wait_ready, READY_SECONDS)
        for token in tokens:
            self._verify(verifier, token)

    def _verify(self, verifier: Verifier, token: Token) -> None:
        expected = {"expires": TokenExpired, "revoked": TokenRevoked, "lives": None}[token.how]
        try:
            verifier.verify(token.issued.token)
        except TokenRefused as refused:
            if type(refused) is expected:
                self.verifier.late[token.jti] = None
            else:
                self._timeline.say(f"a token that {token.how} was refused: {refused}", who="verifier")
        else:
            self.verifier.alive.add(token.jti)


def _time(told: dict[str, Any]) -> float:
    return datetime.fromisoformat(told["timestamp"]).timestamp()
