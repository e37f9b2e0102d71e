"""The shop: server-side sessions, opened with a token, ended when Knell tells that the token's session has ended.

uvicorn services.shop:web
celery -A services.shop worker
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from knell import KeptOut, Service
from knell.handlers.sessions import Ended, attach, open_sessions
from knell.integrations.asgi import KnellMiddleware
from services.auth import open_verifier
from services.web import health, lifespan

# The prefix makes browsers refuse the cookie from anywhere but this host, over TLS.
COOKIE = "__Host-shop"

shop = Service("shop")
sessions = open_sessions(os.environ.get("SHOP_SESSIONS_URL"), settings=shop.settings, name="shop")
log = structlog.get_logger("services.shop")


# ---- the worker: what Knell tells


def log_ended(ended: Sequence[Ended]) -> None:
    """Write down which sessions end, and why."""
    for each in ended:
        log.info("session_ended", cause=each.cause, notice=each.notice_id, jti=each.token.jti, sid=each.token.sid)


attach(sessions, shop, on_end=log_ended)
app = shop.celery_app()


# ---- the web: what clients ask

verifier = open_verifier("shop", shop.settings)


def log_in(request: Request) -> Response:
    """POST /session with a Bearer token: open a session, whose id comes back as a cookie."""
    session_id = secrets.token_urlsafe(32)
    try:
        sessions.add(session_id, verifier.reference(request.scope["knell.claims"]))
    except KeptOut:
        return JSONResponse({"error": "this session has ended; log in again"}, status_code=401)
    response = Response(status_code=204)
    response.set_cookie(COOKIE, session_id, secure=True, httponly=True, samesite="lax")
    return response


def log_out(request: Request) -> Response:
    """POST /logout: end the session of the cookie, here and nowhere else."""
    sessions.remove(request.cookies.get(COOKIE, ""))
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, secure=True, httponly=True, samesite="lax")
    return response


def me(request: Request) -> Response:
    """GET /me: whose session it is."""
    token = sessions.get(request.cookies.get(COOKIE, ""))
    if token is None:
        return JSONResponse({"error": "no session"}, status_code=401)
    return JSONResponse({"iss": token.iss, "sub": token.sub, "sid": token.sid})


_pages = Starlette(
    routes=[
        Route("/session", log_in, methods=["POST"]),
        Route("/logout", log_out, methods=["POST"]),
        Route("/me", me),
        Route("/health", health),
    ],
    lifespan=lifespan,
)
web = KnellMiddleware(_pages, verifier, exempt={"/logout", "/me", "/health"}, realm="shop")
