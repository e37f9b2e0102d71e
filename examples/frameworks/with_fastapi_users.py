"""fastapi-users: uvicorn with_fastapi_users:app"""

from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin
from fastapi_users.authentication import AuthenticationBackend, BearerTransport
from users import User, Users  # as fastapi-users' own documentation makes them, on any database

from knell import AsyncIssuer, Verifier
from knell.integrations.fastapi_users import AUDIENCE, KnellStrategy
from knell.keys import SigningKey

key = SigningKey.generate()  # a real one comes from a vault
issuer = AsyncIssuer("https://auth.example", key)
verifier = Verifier(key, algorithms=["EdDSA"], issuer="https://auth.example", audience=AUDIENCE)


class UserManager(UUIDIDMixin, BaseUserManager[User, UUID]):
    pass


backend = AuthenticationBackend(
    name="knell",
    transport=BearerTransport(tokenUrl="login"),
    get_strategy=lambda: KnellStrategy(issuer, verifier, ttl_seconds=3600),
)
users = FastAPIUsers[User, UUID](lambda: UserManager(Users()), [backend])
app = FastAPI()
app.include_router(users.get_auth_router(backend))  # POST /login and POST /logout


@app.get("/me")
async def me(user: Annotated[User, Depends(users.current_user(active=True))]) -> str:
    return user.email
