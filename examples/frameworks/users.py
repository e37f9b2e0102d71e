"""The users of with_fastapi_users.py: two of them, in memory, in place of a database."""

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from fastapi_users.db import BaseUserDatabase
from fastapi_users.password import PasswordHelper


@dataclass
class User:
    email: str
    hashed_password: str
    id: UUID = field(default_factory=uuid4)
    is_active: bool = True
    is_superuser: bool = False
    is_verified: bool = True


_all = [User(f"{name}@shop.example", PasswordHelper().hash(f"{name}'s password")) for name in ("alice", "bob")]


class Users(BaseUserDatabase[User, UUID]):
    async def get(self, id: UUID) -> User | None:
        return next((user for user in _all if user.id == id), None)

    async def get_by_email(self, email: str) -> User | None:
        return next((user for user in _all if user.email == email), None)

    async def update(self, user: User, update_dict: dict[str, Any]) -> User:
        for name, value in update_dict.items():
            setattr(user, name, value)
        return user
