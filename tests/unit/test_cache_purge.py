"""The cache purge, on a real Redis, Django's cache, and a list of what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from django.core.cache import cache

from knell import Cause, InvalidSettings, Notice, Scope, TokenRef
from knell.handlers.cache import KEYS_AT_ONCE, CachePurge
from knell.handlers.sessions import Ended
from tests.apps import django_site

KEYS = ["token:{jti}", "session:{iss}:{sid}", "user:{iss}:{sub}"]
BOTH = frozenset({"token", "session"})


def notice(scope: Scope = Scope.TOKEN, **changes: Any) -> Notice:
    fields: dict[str, Any] = {"batch_id": "r-1", "cause": Cause.REVOKED, "ends": BOTH, "at": 1.0, "iss": "i"}
    return Notice(scope=scope, **fields | changes)


@pytest.mark.redis
def test_what_a_notice_names_is_removed(redis_url: str) -> None:
    """Only keys whose template is wholly known, and a copy removes nothing more."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        client.mset(dict.fromkeys(["token:t-1", "session:i:s-1", "user:i:alice", "user:i:None", "user:i:bob"], "x"))
        purge = CachePurge(lambda keys: client.unlink(*keys), KEYS)
        for _ in range(2):
            purge([notice(jti="t-1", sid="s-1")])
            assert set(client.keys()) == {"user:i:alice", "user:i:None", "user:i:bob"}
        purge([notice(Scope.SUBJECT, sub="alice", issued_before=1.0)])
        assert set(client.keys()) == {"user:i:None", "user:i:bob"}


def test_what_an_ended_session_names_is_removed_whatever_ended_it() -> None:
    """By the session's own token, in Django's cache."""
    django_site.set_up()
    cache.set_many(dict.fromkeys(["token:t-1", "session:i:s-1", "user:i:alice", "user:i:bob"], "x"))
    token = TokenRef(iss="i", jti="t-1", exp=2.0, sid="s-1", sub="alice")
    purge = CachePurge(cache.delete_many, KEYS)
    purge.of_sessions([Ended("one", token, notice(Scope.ISSUER, issued_before=1.0))])
    left = cache.get_many(["token:t-1", "session:i:s-1", "user:i:alice", "user:i:bob"])
    assert set(left) == {"user:i:bob"}


def test_a_large_batch_is_a_few_calls_and_no_key_is_asked_for_twice() -> None:
    """Each call is bounded."""
    asked: list[list[str]] = []
    CachePurge(asked.append, KEYS)([notice(jti=f"t-{n}", sid="s-1", sub=f"u-{n}") for n in range(400)])
    assert [len(keys) for keys in asked] == [KEYS_AT_ONCE, 301]
    assert len({key for keys in asked for key in keys}) == 801


def test_a_notice_that_names_nothing_asks_for_nothing() -> None:
    """A client's end has no sub, no sid and no jti."""
    asked: list[list[str]] = []
    CachePurge(asked.append, KEYS)([notice(Scope.CLIENT, client_id="web", issued_before=1.0)])
    assert asked == []


def test_braces_in_a_value_are_text() -> None:
    """Whoever chooses a sub chooses no other key's template."""
    asked: list[list[str]] = []
    CachePurge(asked.append, ["user:{sub}"])([notice(Scope.SUBJECT, sub="{jti.__class__}", issued_before=1.0)])
    assert asked == [["user:{jti.__class__}"]]


@pytest.mark.parametrize(
    "templates", ["user:{sub}", [], ["users"], ["{exp}"], ["{sub.x}"], ["{sub!r}"], ["{sub:>9}"], ["{"]]
)
def test_a_template_that_cannot_be_used_is_refused(templates: Any) -> None:
    """When the handler is made, not with each notice."""
    with pytest.raises(InvalidSettings):
        CachePurge(print, templates)
