"""The gateway: live WebSocket connections that close with code 4401 the moment their token ends.

Each connection gets a resume ticket, with which its client is recognised after a lost connection; the worker voids the
tickets of what has ended.

    uvicorn services.gateway:web
    celery -A services.gateway worker
"""

from __future__ import annotations

import os

import structlog
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from knell import Notice, Service, TokenRef
from knell.integrations.asgi import CLOSE_UNAUTHORIZED, KnellMiddleware
from services.auth import open_verifier
from services.sessions import end_missed, open_sessions
from services.web import health, lifespan

gateway = Service("gateway")
tickets = open_sessions(os.environ.get("GATEWAY_TICKETS_URL"), gateway.settings, name="gateway")
log = structlog.get_logger("services.gateway")


# ---- the worker: what Knell tells


@gateway.on_token_end
@gateway.on_session_end
def void_tickets(notice: Notice) -> None:
    """Void the tickets that hung on the token, or on its session."""
    for token in tickets.end(notice):
        log.info("ticket_voided", cause=notice.cause.value, notice=notice.id, jti=token.jti, sid=token.sid)


@gateway.on_missed
def check_every_ticket(since: float) -> None:
    """Notices since then were dropped, so nobody will tell: look each ticket up."""
    ended = end_missed(tickets, gateway.settings)
    log.warning("tickets_checked", missed_since=since, ended=len(ended))


app = gateway.celery_app()


# ---- the web: live connections


async def live(websocket: WebSocket) -> None:
    """/live?ticket=...: says whether the ticket was good, gives a new one, then answers each message.

    The middleware has checked the token, and closes the connection when it ends: nothing here has to.
    """
    await websocket.accept()
    token = TokenRef.from_claims(websocket.scope["knell.claims"])
    resumed = await run_in_threadpool(_use, websocket.query_params.get("ticket"), token)
    ticket = await run_in_threadpool(tickets.open, token)
    if ticket is None:
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
web = KnellMiddleware(_pages, open_verifier("gateway", gateway.settings), exempt={"/health"}, realm="gateway")
