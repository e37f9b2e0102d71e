"""The clients of the shop and of the gateway."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Self

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from stage.ledger import Session, Token

COOKIE = "__Host-shop"
ANSWER_SECONDS = 5.0
# The gateway's close code for a token that has ended.
TOKEN_ENDED = 4401


class ClientFailed(Exception):
    """A service did not let in a client that it should have."""


class ShopClient:
    """A browser's view of the shop."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, trust_env=False)

    async def log_in(self, session: Session) -> None:
        """Open a session of the shop with the session's first token."""
        token = session.tokens[0].issued.token
        answer = await self._http.post("/session", headers={"authorization": f"Bearer {token}"})
        if answer.status_code != 204:
            raise ClientFailed(f"the shop answered {answer.status_code} to the login of {session.user}: {answer.text}")
        # The cookie is for https, as it should be: httpx would not send it over this loopback connection by itself.
        session.cookie = answer.cookies[COOKIE]

    async def is_alive(self, session: Session) -> bool:
        """Whether the shop still knows the session."""
        answer = await self._http.get("/me", headers={"cookie": f"{COOKIE}={session.cookie}"})
        return answer.status_code == 200 and answer.json()["sid"] == session.sid

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()


class GatewayClient:
    """One live connection to the gateway, for one token.

    Args:
        url: the gateway's, ws://.
        token: what it is opened with.
        on_close: called once with the token, the close code and the time, Unix seconds, when it is closed.
    """

    def __init__(self, url: str, token: Token, on_close: Callable[[Token, int | None, float], None]) -> None:
        self._url = url
        self.token = token
        self._on_close = on_close
        self._stack = AsyncExitStack()
        self._socket: ClientConnection | None = None
        self._echoed = asyncio.Event()

    async def open(self) -> None:
        """Connect, and take the resume ticket."""
        headers = {"authorization": f"Bearer {self.token.issued.token}"}
        connecting = connect(f"{self._url}/live", additional_headers=headers, proxy=None)
        self._socket = await self._stack.enter_async_context(connecting)
        self.token.ticket = json.loads(await self._socket.recv())["ticket"]

    async def listen(self) -> None:
        """Take what comes, until the connection is closed."""
        assert self._socket is not None
        try:
            while True:
                await self._socket.recv()
                self._echoed.set()
        except ConnectionClosed as closed:
            self._on_close(self.token, closed.rcvd.code if closed.rcvd else None, time.time())

    async def is_alive(self) -> bool:
        """Whether a message still comes back."""
        assert self._socket is not None
        self._echoed.clear()
        try:
            await self._socket.send("are you there?")
            await asyncio.wait_for(self._echoed.wait(), ANSWER_SECONDS)
        except (ConnectionClosed, TimeoutError):
            return False
        return True

    async def close(self) -> None:
        """Close the connection."""
        await self._stack.aclose()
