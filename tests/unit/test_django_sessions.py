"""Sessions of Django, ended in Django's own backends: what a browser's next request finds."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from django.contrib.sessions.backends.base import UpdateError
from django.db import connection
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from knell import Cause, InvalidSettings, KeptOut, Notice, Scope, TokenRef
from knell.errors import StoreUnavailable
from knell.handlers.django import DjangoSessions
from knell.handlers.sessions import end_sessions
from knell.handlers.sql import SqlSessions
from tests.apps import django_site

ENGINES = [f"django.contrib.sessions.backends.{name}" for name in ("db", "cached_db", "cache", "file")]
ISS = "https://auth.example"


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    django_site.set_up()
    with override_settings(SESSION_ENGINE=request.param, SESSION_FILE_PATH=str(tmp_path)):
        yield str(request.param)


@pytest.fixture
def sessions(engine: str, tmp_path: Path) -> DjangoSessions:
    return DjangoSessions(SqlSessions(f"sqlite:///{tmp_path / 'index.db'}"))


def log_in(engine: str, user: str) -> Any:
    """A session as a login leaves it: saved, with a key."""
    session = import_module(engine).SessionStore()
    session["user"] = user
    session.create()
    return session


def found(engine: str, key: str) -> dict[str, Any]:
    """What the next request with that cookie finds."""
    return dict(import_module(engine).SessionStore(key).load())


def token(**changes: Any) -> TokenRef:
    return TokenRef(**{"iss": ISS, "jti": "t-1", "exp": 4e9, "iat": 1e9, "sid": "s-1", "sub": "alice"} | changes)


def notice(**changes: Any) -> Notice:
    fields: dict[str, Any] = {"cause": Cause.REVOKED, "ends": frozenset({"token", "session"}), "at": 2e9, "iss": ISS}
    return Notice(batch_id="r-1", scope=Scope.SESSION, **fields | {"sid": "s-1"} | changes)


def test_an_ended_session_is_gone_for_django(engine: str, sessions: DjangoSessions) -> None:
    """The next request with its cookie is nobody's; others go on."""
    ended, other = log_in(engine, "alice"), log_in(engine, "bob")
    sessions.add(ended.session_key, token())
    sessions.add(other.session_key, token(jti="t-2", sid="s-2", sub="bob"))
    assert end_sessions(sessions, [notice()]) == 1
    assert found(engine, ended.session_key) == {}
    assert found(engine, other.session_key)["user"] == "bob"


def test_a_request_in_flight_does_not_save_an_ended_session(engine: str, sessions: DjangoSessions) -> None:
    """Django refuses to save what was deleted meanwhile, and the tombstone keeps a new login with that token out."""
    session = log_in(engine, "alice")
    sessions.add(session.session_key, token())
    in_flight = import_module(engine).SessionStore(session.session_key)
    in_flight["cart"] = ["book"]
    end_sessions(sessions, [notice()])
    with pytest.raises(UpdateError):
        in_flight.save()
    again = log_in(engine, "alice")
    with pytest.raises(KeptOut):
        sessions.add(again.session_key, token())
    assert found(engine, again.session_key) == {}


def test_a_logout_is_one_in_django_too(engine: str, sessions: DjangoSessions) -> None:
    """`remove` deletes the session wherever it is kept."""
    session = log_in(engine, "alice")
    sessions.add(session.session_key, token())
    assert sessions.remove(session.session_key) == token()
    assert found(engine, session.session_key) == {}
    assert sessions.get(session.session_key) is None


def test_a_database_that_fails_leaves_the_index_as_it_was(
    sessions: DjangoSessions, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index forgets a session after Django has: the notice that comes again finds what is left to do."""
    session = log_in(engine, "alice")
    sessions.add(session.session_key, token())

    def fail(*_: object) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "_delete_at_once", fail)
        with pytest.raises(StoreUnavailable, match="away"):
            end_sessions(sessions, [notice()])
    assert sessions.get(session.session_key) == token()
    assert end_sessions(sessions, [notice()]) == 1


def test_a_worker_s_connection_that_was_lost_is_made_anew(tmp_path: Path) -> None:
    """In a worker no request begins, at which Django itself would look."""
    django_site.set_up()
    with override_settings(SESSION_ENGINE=ENGINES[0]):
        sessions = DjangoSessions(SqlSessions(f"sqlite:///{tmp_path / 'index.db'}"))
        session = log_in(ENGINES[0], "alice")
        sessions.add(session.session_key, token())
        assert connection.connection is not None
        connection.connection.close()
        assert end_sessions(sessions, [notice()]) == 1
        assert found(ENGINES[0], session.session_key) == {}


def test_a_batch_is_one_query(tmp_path: Path) -> None:
    """A page of sessions leaves Django's database in one statement."""
    django_site.set_up()
    from django.contrib.sessions.models import Session

    with override_settings(SESSION_ENGINE=ENGINES[0]):
        sessions = DjangoSessions(SqlSessions(f"sqlite:///{tmp_path / 'index.db'}"))
        before = Session.objects.count()
        for n in range(20):
            sessions.add(log_in(ENGINES[0], "alice").session_key, token(jti=f"t-{n}"))
        with CaptureQueriesContext(connection) as queries:
            assert end_sessions(sessions, [notice()]) == 20
        assert Session.objects.count() == before
    assert [query["sql"][:7] for query in queries if query["sql"] not in ("BEGIN", "COMMIT")] == ["DELETE "]


def test_sessions_in_cookies_are_refused(tmp_path: Path) -> None:
    """No server can end what only the browser has."""
    django_site.set_up()
    index = SqlSessions(f"sqlite:///{tmp_path / 'index.db'}")
    cookies = override_settings(SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies")
    with cookies, pytest.raises(InvalidSettings, match="cookies"):
        DjangoSessions(index)
