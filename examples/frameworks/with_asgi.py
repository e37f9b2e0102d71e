"""Any ASGI application, Starlette here: uvicorn with_asgi:app"""

from pathlib import Path

from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from knell import Verifier
from knell.integrations.asgi import KnellMiddleware
from knell.integrations.starlette import ClaimsBackend

verifier = Verifier(
    Path("public.pem").read_text(), algorithms=["EdDSA"], issuer="https://auth.example", audience="shop"
)


async def me(request: Request) -> PlainTextResponse:
    return PlainTextResponse(request.user.display_name)


@requires("orders:read")  # a scope of the token; without it 403
async def orders(request: Request) -> PlainTextResponse:
    return PlainTextResponse("none")


async def live(socket: WebSocket) -> None:  # closed with 4401 the moment the token ends
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(f"{socket.user.display_name}: {text}")


app = Starlette(
    routes=[Route("/me", me), Route("/orders", orders), WebSocketRoute("/live", live)],
    middleware=[
        Middleware(KnellMiddleware, verifier=verifier),
        Middleware(AuthenticationMiddleware, backend=ClaimsBackend()),  # optional: request.user and @requires
    ],
)
