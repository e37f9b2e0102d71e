"""Sessions of Django, whatever backend keeps them.

    sessions = DjangoSessions(open_sessions(settings=knell_settings, name="django"))
    sessions.add(request.session.session_key, verifier.reference(claims))  # when somebody has logged in
    attach(sessions, service)

Needs Django, with its settings configured, and a SESSION_ENGINE that keeps sessions on a server:
`pip install 'knell[django]'`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from django.conf import settings
from django.contrib.sessions.backends import cache, cached_db, db
from django.contrib.sessions.backends.base import SessionBase
from django.core.cache import caches
from django.db import close_old_connections

from knell.errors import InvalidSettings, KeptOut, StoreUnavailable
from knell.handlers.held import Held
from knell.handlers.sessions import Sessions
from knell.notices import Notice
from knell.tokens import TokenRef

COOKIES = "django.contrib.sessions.backends.signed_cookies"


class DjangoSessions:
    """See `knell.handlers.sessions.Sessions`: what is removed here, by a notice or by `remove`, is removed in Django.

    The data of a session stays with Django's backend; `index` keeps which token its key hangs on. Django itself saves
    no session that was deleted meanwhile (the request in flight gets SessionInterrupted). Only with the backend
    `cached_db` a request that saves at that very moment may put it back into the cache: there, look it up with `get`.

    Args:
        index: where the keys are kept: RedisSessions or SqlSessions.

    Raises:
        InvalidSettings: SESSION_ENGINE keeps sessions in cookies, which no server can end.
    """

    def __init__(self, index: Sessions) -> None:
        if settings.SESSION_ENGINE == COOKIES:
            raise InvalidSettings("SESSION_ENGINE keeps sessions in cookies, which nobody can end; use db or cached_db")
        self._index = index
        self._backend: type[SessionBase] = import_module(settings.SESSION_ENGINE).SessionStore

    def add(self, session_key: str, token: TokenRef) -> None:
        """See Sessions.add. Call it after `login()`, which gives the session a new key.

        Raises:
            KeptOut: what the token belongs to has ended. The session is removed in Django too: log it out.
        """
        try:
            self._index.add(session_key, token)
        except KeptOut:
            self._delete([session_key])
            raise

    def get(self, session_key: str) -> TokenRef | None:
        """See Sessions.get. It tells of the index; Django may have let the session expire before."""
        return self._index.get(session_key)

    def remove(self, session_key: str) -> TokenRef | None:
        """See Sessions.remove."""
        self._delete([session_key])
        return self._index.remove(session_key)

    def bury(self, notices: Sequence[Notice]) -> None:
        """See Sessions.bury."""
        self._index.bury(notices)

    def unearth(self, undone: Sequence[Notice]) -> None:
        """See Sessions.unearth."""
        self._index.unearth(undone)

    def named_in(self, notices: Sequence[Notice]) -> Iterator[Sequence[Held]]:
        """See Sessions.named_in."""
        return self._index.named_in(notices)

    def all(self) -> Iterator[Sequence[Held]]:
        """See Sessions.all."""
        return self._index.all()

    def discard(self, held: Sequence[Held]) -> None:
        """See Sessions.discard."""
        # In a worker no request begins or ends, at which Django would let go of connections that are lost, or too old.
        close_old_connections()
        # Django's first: should the process die in between, the index still knows what is left to do.
        self._delete([each.session_id for each in held])
        self._index.discard(held)

    def close(self) -> None:
        """See Sessions.close."""
        self._index.close()

    def _delete(self, keys: Sequence[str]) -> None:
        try:
            if not self._delete_at_once(keys):
                for key in keys:
                    self._backend(key).delete(key)
        except Exception as error:  # of whatever database or cache Django is set to use
            raise StoreUnavailable(
                f"Django's sessions could not be deleted: {type(error).__name__}: {error}"
            ) from error

    def _delete_at_once(self, keys: Sequence[str]) -> bool:
        """Delete all in one query, and from the cache in one call, if the backend is Django's own, or made of it."""
        backend: Any = self._backend
        if not issubclass(backend, cache.SessionStore | db.SessionStore):
            return False
        if issubclass(backend, db.SessionStore):
            backend.get_model_class().objects.filter(session_key__in=list(keys)).delete()
        if issubclass(backend, cache.SessionStore | cached_db.SessionStore):
            prefix = backend.cache_key_prefix
            caches[settings.SESSION_CACHE_ALIAS].delete_many([prefix + key for key in keys])
        return True
