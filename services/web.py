"""What the web process of every service has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from knell import logs


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    """Set the log up as the server starts: left to itself, structlog writes out variables, tokens among them."""
    logs.configure()
    yield


def health(_: Request) -> Response:
    """GET /health: the process answers."""
    return Response(status_code=204)
