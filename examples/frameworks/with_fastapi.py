"""FastAPI: uvicorn with_fastapi:app"""

from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Security

from knell import Verifier
from knell.integrations.fastapi import Bearer, LiveWebSocket

verifier = Verifier(
    Path("public.pem").read_text(), algorithms=["EdDSA"], issuer="https://auth.example", audience="shop"
)
bearer = Bearer(verifier)
app = FastAPI()


@app.get("/me")
async def me(claims: Annotated[dict[str, Any], Depends(bearer)]) -> str:
    return claims["sub"]


@app.get("/orders")
async def orders(claims: Annotated[dict[str, Any], Security(bearer, scopes=["orders:read"])]) -> list[str]:
    return []


@app.websocket("/live")
async def live(socket: Annotated[LiveWebSocket, Depends(bearer.websocket)]) -> None:
    await socket.accept()
    while True:  # until the client leaves, or the token ends: the socket is then closed with 4401
        await socket.send_text(f"{socket.claims['sub']}: {await socket.receive_text()}")
