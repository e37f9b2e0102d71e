"""The gateway: live WebSocket connections that close with code 4401 the moment their token ends.

Each connection gets a resume ticket, with which its client is recognised after a lost connection; the worker voids the
tickets of what has ended.

    uvicorn services.gateway:web
    celery -A services.gateway worker
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence

import structlog
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from knell import KeptOut, Service, TokenRef
from knell.handlers.sessions import Ended, attach, open_sessions
from knell.integrations.asgi import CLOSE_UNAUTHORIZED, KnellMiddleware
from services.auth import open_verifier
from services.web import health, lifespan

gateway = Service("gateway")
tickets = open_sessions(os.environ.get("GATEWAY_TICKETS_URL"), settings=gateway.settings, name="gateway")
log = structlog.get_logger("services.gateway")


# ---- the worker: what Knell tells


def log_voided(ended: Sequence[Ended]) -> None:
    """Write down which tickets are voided, and why."""
    for each in ended:
        log.info("ticket_voided", cause=each.cause, notice=each.notice_id, jti=each.token.jti, sid=each.token.sid)


attach(tickets, gateway, token_ends=True, on_end=log_voided)
app = gateway.celery_app()


# ---- the web: live connections

verifier = open_verifier("gateway", gateway.settings)


async def live(websocket: WebSocket) -> None:
    """/live?ticket=...: says whether the ticket was good, gives a new one, then answers each message.

    The middleware has checked the token, and closes the connection when it ends: nothing here has to.
    """
    await websocket.accept()
    token = verifier.reference(websocket.scope["knell.claims"])
    resumed = await run_in_threadpool(_use, websocket.query_params.get("ticket"), token)
    ticket = secrets.token_urlsafe(32)
    try:
        await run_in_threadpool(tickets.add, ticket, token)
    except KeptOut:
        await websocket.close(CLOSE_UNAUTHORIZED, "token ended")
        return
    await websocket.send_json({"ticket": ticket, "resumed": resumed})
    async for text in websocket.iter_text():
        await websocket.send_text(text)


def _use(ticket: str | None, token: TokenRef) -> bool:
    """Whether the ticket is one of the same user's. A ticket is good once."""
    found = tickets.remove(ticket) if ticket else None
    return found is not None and (found.iss, found.sub) == (token.iss, token.sub)


_pages = Starlette(routes=[WebSocketRoute("/live", live), Route("/health", health)], lifespan=lifespan)
web = KnellMiddleware(_pages, verifier, exempt={"/health"}, realm="gateway")
