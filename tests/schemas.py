"""Schemas for stores on PostgreSQL: made by the migrations once, then emptied and renamed for the next test."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

from knell.stores import migrate
from knell.stores.sql_schema import make_tables
from tests.deployment import ROOT
from tests.servers import PostgresServer

_EMPTY = "".join(
    f"DELETE FROM {{schema}}.{table.name};"
    for table in make_tables("any", schema=True).metadata.tables.values()
    if table.name not in ("meta", "counters")
)
_GRANTS = re.compile(r"<!-- grants -->\n```sql\n(.*?)```", re.DOTALL)
ROLES = ("issuer", "notifier", "service", "verifier")
_RESET = (
    "UPDATE {schema}.counters SET value = 0;"
    "UPDATE {schema}.meta SET value = gen_random_uuid()::text WHERE name = 'epoch';"
)


class Schemas:
    """Makes schemas ready to be used, under any name. To empty one takes a tenth of that.

    Attributes:
        url: of the server, as its superuser.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection = psycopg.connect(url, autocommit=True)
        self._free: list[str] = []
        self._names = (f"free_{n}" for n in itertools.count())

    def lend(self, namespace: str) -> str:
        """Make an empty schema of this name; returns the URL of a store in it."""
        if not self._free:
            name = next(self._names)
            migrate.upgrade(self.url, namespace=name)
            self._free.append(name)
        self._rename(self._free.pop(), namespace)
        return self.url

    def take_back(self, namespace: str) -> None:
        """Empty a schema whose stores are closed, for the next one."""
        free = next(self._names)
        self._connection.execute(sql.SQL(_EMPTY + _RESET).format(schema=sql.Identifier(namespace)))
        self._rename(namespace, free)
        self._free.append(free)

    def lend_next(self) -> Callable[[str], None]:
        """Lends one schema after another, and takes back the one before: for the examples of a state machine."""
        before: list[str] = []

        def lend(namespace: str) -> None:
            if before:
                self.take_back(before.pop())
            self.lend(namespace)
            before.append(namespace)

        return lend

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()

    def _rename(self, old: str, new: str) -> None:
        self._connection.execute(
            sql.SQL("ALTER SCHEMA {} RENAME TO {}").format(sql.Identifier(old), sql.Identifier(new))
        )


@contextmanager
def granted(server: PostgresServer, namespace: str) -> Iterator[str]:
    """The roles of docs/deploy.md, with the rights that it gives them, for another schema; the SQL of that page.

    They are named <namespace>_<role>, and `role_url` has their URLs.
    """
    [page] = _GRANTS.findall((ROOT / "docs" / "deploy.md").read_text())
    text = page.replace("knell.", f"{namespace}.").replace("SCHEMA knell", f"SCHEMA {namespace}")
    text = text.replace("knell_", f"{namespace}_")
    server.sql(text)
    try:
        yield text
    finally:
        for role in ROLES:
            server.sql(f"DROP OWNED BY {namespace}_{role}", f"DROP ROLE {namespace}_{role}")


def role_url(server: PostgresServer, namespace: str, role: str) -> str:
    """The URL of the store for one of the roles."""
    return server.url_of(f"{namespace}_{role}", "change-me")
