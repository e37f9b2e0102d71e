"""The story: who logs in, what ends when, and who is killed meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from knell import AsyncIssuer, Settings, Verifier
from knell.keys import SigningKey
from stage.clients import GatewayClient, ShopClient
from stage.company import SERVICES, Addresses, start_worker
from stage.deployment import Deployment
from stage.ledger import How, Row, Session, Token
from stage.observer import Observer
from stage.timeline import Timeline

ISSUER = "https://auth.example"
AUDIENCE = ["shop", "gateway"]
# Tokens that are to outlive the demo.
LONG_SECONDS = 300.0
# Time to open everything before the first tokens expire; a machine that starts the processes slowly gets as much again.
HEAD_START_SECONDS = 3.0
# An exp this much before the full second makes that second the one at which it is told.
BEFORE_SECONDS = 0.02
# Who has not caught up by then is not going to.
PATIENCE_SECONDS = 12.0
NAMES = (
    "ada", "alan", "barbara", "donald", "edsger", "frances", "grace", "hedy", "ida", "john", "katherine"
)  # fmt: skip


@dataclass(frozen=True)
class Cast:
    """The sessions, by what is to become of them.

    Attributes:
        first: the second in which the first group expires, Unix time.
        lost_token, lost_session, lost_while_down: sessions that are revoked, the last while the shop is down.
        fired: all sessions of one user.
        everyone: these, and those that expire or live.
    """

    first: int
    lost_token: Session
    lost_session: Session
    lost_while_down: Session
    fired: list[Session]
    everyone: list[Session]


class Story:
    """Tells it.

    Args:
        key: the issuer's.
        settings: of the deployment.
        timeline: where it is written.
    """

    def __init__(self, key: SigningKey, settings: Settings, timeline: Timeline) -> None:
        self._key = key
        self._settings = settings
        self._timeline = timeline
        self._observer: Observer | None = None
        self._names = itertools.cycle(NAMES)
        self._numbers = itertools.count(1)

    def heard(self, name: str, line: str) -> None:
        """A line of a process's log."""
        if self._observer is not None:
            self._observer.heard(name, line)

    async def tell(self, deployment: Deployment, addresses: Addresses) -> list[Row]:
        """Tell it, from the first login to the last look. Returns what became of everything, service by service."""
        with Verifier(
            self._key, algorithms=["EdDSA"], issuer=ISSUER, audience=AUDIENCE[0], settings=self._settings
        ) as verifier:
            async with (
                ShopClient(addresses.shop) as shop,
                AsyncIssuer(ISSUER, self._key, settings=self._settings) as issuer,
                asyncio.TaskGroup() as listening,
            ):
                cast = await self._issue(issuer)
                observer = self._observer = Observer(self._timeline, cast.everyone)
                sockets = await self._open(cast, shop, addresses, observer)
                for socket in sockets:
                    listening.create_task(socket.listen())
                await self._act(issuer, cast, observer, deployment)
                await observer.wait(PATIENCE_SECONDS)
                await observer.look(shop, sockets, verifier, self._settings)
                observer.over = True
                await asyncio.gather(*(socket.close() for socket in sockets))
        return observer.rows

    # ---- the logins

    async def _issue(self, issuer: AsyncIssuer) -> Cast:
        first = math.ceil(time.time() + max(HEAD_START_SECONDS, self._timeline.seconds))
        expiring = [(first, 6), (first + 3, 6), (first + 5, 5), (first + 9, 4)]
        ending = [self._log_in(issuer, "expires", second) for second, size in expiring for _ in range(size)]
        sessions = await asyncio.gather(*ending, *(self._log_in(issuer, "lives") for _ in range(6)))
        lost_token, lost_session, lost_while_down = [await self._log_in(issuer, "revoked") for _ in range(3)]
        fired = await asyncio.gather(*(self._log_in(issuer, "revoked", user="mallory") for _ in range(4)))
        # One token more for each of these two. The first token of one expires, and its session goes on.
        carried_on = await self._log_in(issuer, "lives", first + 3)
        for session in (carried_on, lost_session):
            issued = await issuer.refresh(session.tokens[0].issued.token, ttl_seconds=LONG_SECONDS)
            session.tokens.append(Token(session, issued, session.how))
        everyone = [*sessions, lost_token, lost_session, lost_while_down, *fired, carried_on]
        return Cast(first, lost_token, lost_session, lost_while_down, fired, everyone)

    async def _log_in(
        self, issuer: AsyncIssuer, how: How, second: float | None = None, *, user: str | None = None
    ) -> Session:
        session = Session(user or next(self._names), f"s-{next(self._numbers):02}", how)
        ttl_seconds = LONG_SECONDS if second is None else second - BEFORE_SECONDS - time.time()
        claims = {"sub": session.user, "sid": session.sid, "aud": AUDIENCE}
        issued = await issuer.issue(claims, ttl_seconds=ttl_seconds, headers={"typ": "at+jwt"})
        # Of the token as it was made: on a busy machine it may end in the second behind the one that was aimed at.
        moment = None if second is None else float(issued.ref.second)
        session.tokens.append(Token(session, issued, how if second is None else "expires", moment))
        session.moment = moment if how == "expires" else None
        return session

    async def _open(
        self, cast: Cast, shop: ShopClient, addresses: Addresses, observer: Observer
    ) -> list[GatewayClient]:
        tokens = [token for session in cast.everyone for token in session.tokens]
        sockets = [GatewayClient(addresses.gateway, token, observer.closed) for token in tokens]
        await asyncio.gather(
            *(shop.log_in(session) for session in cast.everyone), *(socket.open() for socket in sockets)
        )
        self._timeline.say(
            f"issued {len(tokens)} tokens; the shop has {len(cast.everyone)} sessions, the gateway {len(sockets)} "
            "WebSockets"
        )
        return sockets

    # ---- the ends

    async def _act(self, issuer: AsyncIssuer, cast: Cast, observer: Observer, deployment: Deployment) -> None:
        await _until(cast.first + 0.8)
        await self._revoke(issuer, "token", {"jti": cast.lost_token.tokens[0].jti}, [cast.lost_token])
        await _until(cast.first + 1.4)
        await self._revoke(issuer, "session", {"sid": cast.lost_session.sid}, [cast.lost_session])
        await _until(cast.first + 2.0)
        await self._revoke(issuer, "subject", {"sub": "mallory"}, cast.fired)
        await _until(cast.first + 3.7)
        observer.shop_down_at = time.time()
        await deployment.kill("shop")
        self._timeline.say("the shop's worker was killed (SIGKILL)")
        await _until(cast.first + 4.3)
        gone = cast.lost_while_down
        await self._revoke(issuer, "session", {"sid": gone.sid}, [gone], wait_for=("gateway", "partner"))
        await _until(cast.first + 5.7)
        self._timeline.say("the shop's worker is started again")
        await start_worker(deployment, "shop")
        observer.shop_back_at = time.time()
        self._timeline.say("the shop's worker is back")
        await _until(cast.first + 9)

    async def _revoke(
        self,
        issuer: AsyncIssuer,
        scope: str,
        match: dict[str, str],
        ended: Sequence[Session],
        *,
        wait_for: Sequence[str] = SERVICES,
    ) -> None:
        moment = time.time()
        for session in ended:
            session.moment = moment
            for token in session.tokens:
                token.moment = moment
        tokens = sum(len(session.tokens) for session in ended)
        self._timeline.say(f"one {scope} is revoked: {len(ended)} sessions, {tokens} tokens")
        revoked = await issuer.revoke(scope, match, reason="demo", wait_for=wait_for, timeout_seconds=PATIENCE_SECONDS)
        ms = (time.time() - moment) * 1000
        done = [name for name, status in sorted(revoked.services.items()) if status.state == "done"]
        self._timeline.say(f"its receipts are in after {ms:.0f} ms: {', '.join(done)}")


async def _until(second: float) -> None:
    await asyncio.sleep(max(0.0, second - time.time()))
