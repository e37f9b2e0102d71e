"""A hub of server-sent events (HTML, section 9.2): streams, each ended the moment that its token ends.

hub = EventHub(verifier)
app = KnellMiddleware(Starlette(routes=[Route("/events", hub), ...]), verifier)

hub.publish('{"order": 7}', event="order", to=lambda token: token.sub == "alice")  # from any thread
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Callable

from knell.errors import InvalidInput
from knell.handlers.hub import CLOSE_SECONDS, Connection, Hub, HubFull, claims_of, first_of
from knell.integrations.asgi import RETRY_AFTER_SECONDS, Receive, Scope, Send
from knell.tokens import TokenRef

# The name of the last event of a stream that was ended here.
END = "end"
# A comment this often keeps proxies from closing a quiet stream, and finds clients that have gone without a word.
KEEP_ALIVE_SECONDS = 15.0
_LINE_END = re.compile("\r\n|\n|\r")


class EventHub(Hub[bytes]):
    """An ASGI application for a GET route behind KnellMiddleware.

    The last event of a stream is named "end", and its data say why: {"reason": "token expired"}, "token revoked", "too
    slow" or "restart". A browser's EventSource then connects again, by itself, and gets the middleware's 401, after
    which it tries no more. See Hub for the arguments.
    """

    def publish(
        self,
        data: str,
        *,
        event: str | None = None,
        id: str | None = None,
        to: Callable[[TokenRef], bool] | None = None,
    ) -> None:
        """Send an event to those that `to` picks, or to all. From any thread; to connections of this process.

        Raises:
            InvalidInput: the event's name or id has a line end in it, or the name is "end".
        """
        if event == END:
            raise InvalidInput(f"an event named {END!r} is the hub's own: it says that the stream is over")
        self._publish(encoded(data, event=event, id=id), to)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        claims = claims_of(scope)
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, (b"allow", b"GET"))
            return
        try:
            with self._joined(claims) as connection:
                await self._stream(connection, receive, send, body=scope["method"] == "GET")
        except HubFull:
            await _answer(send, 503, (b"retry-after", str(RETRY_AFTER_SECONDS).encode()))

    async def _stream(self, connection: Connection[bytes], receive: Receive, send: Send, *, body: bool) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if body:
            await first_of(
                asyncio.ensure_future(_until_gone(receive)),
                asyncio.ensure_future(_write(connection, send)),
                connection.ended,
            )
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await send({"type": "http.response.body", "body": _last_words(connection)})


def encoded(data: str, *, event: str | None = None, id: str | None = None) -> bytes:
    """An event as it stands in the stream. InvalidInput if its name or id has a line end, or a NUL, in it."""
    lines = []
    for name, value in (("event", event), ("id", id)):
        if value is not None:
            if _LINE_END.search(value) or "\0" in value:
                raise InvalidInput(f"the {name} of a server-sent event is one line of text; this one is not")
            lines.append(f"{name}: {value}")
    lines += [f"data: {line}" for line in _LINE_END.split(data)]
    return ("\n".join(lines) + "\n\n").encode()


def _last_words(connection: Connection[bytes]) -> bytes:
    if not connection.ended.done() or connection.ended.cancelled():
        return b""
    return encoded(json.dumps({"reason": connection.ended.result().reason}), event=END)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _write(connection: Connection[bytes], send: Send) -> None:
    with contextlib.suppress(OSError):  # the client has gone
        await send({"type": "http.response.body", "body": b":\n\n", "more_body": True})  # the stream is open
        while True:
            try:
                event = await asyncio.wait_for(connection.waiting.get(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                event = b":\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})


async def _answer(send: Send, status: int, header: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [header, (b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
