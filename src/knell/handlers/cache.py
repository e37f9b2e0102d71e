"""A ready-made handler: removes what a cache keeps of what has ended.

purge = CachePurge(cache.delete_many, ["token:{jti}", "session:{iss}:{sid}", "user:{iss}:{sub}"])
purge.attach(shop)                                # by what the notices name
attach(sessions, shop, on_end=purge.of_sessions)  # or by every session that has ended, for wide scopes as well
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

from knell.errors import InvalidSettings
from knell.handlers.held import in_pages
from knell.handlers.sessions import Ended
from knell.notices import Notice
from knell.tokens import TokenRef

if TYPE_CHECKING:
    from knell.service import Service

# How many keys one call removes: below what any cache takes in one command.
KEYS_AT_ONCE = 500
FIELDS = ("iss", "jti", "sid", "sub", "client_id", "kid")


class CachePurge:
    """Removes cache entries whose keys are made of what a notice, or an ended session, names. Idempotent.

    A key is removed if all that its template asks for is known: of a notice for a subject that is the iss and the sub.
    A notice for a client, a key, an issuer, or claims names no sessions: there, hand `of_sessions` to the `attach` of
    `knell.handlers.sessions`. There are no patterns (`session:*`): each would read the whole cache, for each notice.

    Args:
        delete_many: removes the keys of a list; missing ones are no error. `cache.delete_many` of Django,
            `region.delete_multi` of dogpile, `lambda keys: client.unlink(*keys)` with redis-py. It must be bounded in
            time; what it raises has the notices tried again.
        templates: of keys, with {iss}, {jti}, {sid}, {sub}, {client_id} and {kid}.

    Raises:
        InvalidSettings: a template asks for something else, or for nothing.
    """

    def __init__(self, delete_many: Callable[[list[str]], Any], templates: Sequence[str]) -> None:
        if isinstance(templates, str) or not templates:
            raise InvalidSettings('templates is a list of keys, for example ["session:{iss}:{sid}"]')
        self._delete_many = delete_many
        self._templates = [(template, _fields_of(template)) for template in templates]

    def __call__(self, notices: Sequence[Notice]) -> None:
        """Remove what these notices name. A batch handler."""
        self._purge(notices)

    def of_sessions(self, ended: Sequence[Ended]) -> None:
        """Remove what these sessions' tokens name."""
        self._purge([each.token for each in ended])

    def attach(self, service: Service) -> None:
        """Register it for the ends of tokens and of sessions.

        Raises:
            InvalidInput: the service has such a handler already.
        """
        service.on_session_end(batch=True)(self)
        service.on_token_end(batch=True)(self)

    def _purge(self, named: Iterable[Notice | TokenRef]) -> None:
        keys = dict.fromkeys(key for each in named for key in self._keys(each))
        for some in in_pages(keys, KEYS_AT_ONCE):
            self._delete_many(some)

    def _keys(self, named: Notice | TokenRef) -> Iterable[str]:
        known = {name: value for name in FIELDS if (value := getattr(named, name)) is not None}
        return (template.format_map(known) for template, fields in self._templates if fields <= known.keys())


def _fields_of(template: str) -> set[str]:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InvalidSettings(f"{template!r} is no template of a key: {error}") from None
    fields = {name for _, name, _, _ in parts if name is not None}
    if not fields or not fields <= set(FIELDS) or any(spec or conversion for _, _, spec, conversion in parts):
        raise InvalidSettings(
            f"{template!r} must have in braces one of {', '.join(FIELDS)}, or several, and nothing else"
        )
    return fields
