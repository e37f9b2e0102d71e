"""Brings a PostgreSQL schema to what this Knell needs, in two steps: what is new first, what is old after a roll-out.

Every migration says which kind it is. One that *expands* adds what older code never looks at, so that older code goes
on working beside the new. One that *contracts* takes away what only older code used, and raises the schema's version:
older code then says so and stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError

from knell.errors import InvalidSettings, StoreUnavailable
from knell.postgresql_url import read_postgresql_url
from knell.stores.postgresql_link import Connector
from knell.stores.sql_schema import REVISION, lock_key

# Where they are, as Alembic takes it: it works in a wheel too.
MIGRATIONS = "knell.stores:migrations"
# A migration waits for those who use a table, and everybody else waits behind it: not for long.
_LOCK_TIMEOUT = "2s"


@dataclass(frozen=True, slots=True)
class Migration:
    """One of them. `kind` is "expand" or "contract"."""

    revision: str
    kind: str
    what: str


@dataclass(frozen=True, slots=True)
class State:
    """Where a schema is. `revision` is None while it is empty; `pending` is in order, and may hold both kinds."""

    revision: str | None
    pending: tuple[Migration, ...]

    @property
    def fits(self) -> bool:
        """Whether this Knell can work on it, as far as revisions say."""
        return self.revision is not None and int(self.revision) >= int(REVISION)


def state(url: str, *, namespace: str) -> State:
    """Where the schema of a namespace is.

    Raises:
        InvalidSettings: the URL cannot be used, or Alembic is missing.
        StoreUnavailable: the server does not answer, or refuses.
    """
    with _connected(url) as connection:
        return _state(connection, namespace)


def upgrade(url: str, *, namespace: str, contract: bool = False) -> list[Migration]:
    """Run the migrations that are next, all of them or none. Returns what was run, in order.

    Those that expand, up to the next one that contracts; with `contract`, those that contract first, if they are next:
    only when no process of an older Knell runs any more. Several callers at once are one after another.

    Args:
        url: of a role that may make the schema, or that owns it.

    Raises:
        InvalidSettings: the URL cannot be used, or Alembic is missing.
        StoreUnavailable: the server does not answer, or refuses; nothing has changed.
    """
    with _connected(url) as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key(namespace, "migrations")})
        _make_schema(connection, namespace)
        due = next_migrations(_state(connection, namespace).pending, contract=contract)
        if due:
            from alembic import command

            command.upgrade(_config(connection, namespace), due[-1].revision)
        return due


def next_migrations(pending: Sequence[Migration], *, contract: bool) -> list[Migration]:
    """Which of the pending ones one call runs."""
    due: list[Migration] = []
    for migration in pending:
        expanding = any(one.kind == "expand" for one in due)
        if migration.kind == "contract" and (expanding or not contract):
            break
        due.append(migration)
    return due


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    read = read_postgresql_url("KNELL_STORE_URL", url)
    connector = Connector(read)

    def opened() -> Any:
        connection = connector.open()
        # A migration may take its time.
        connection.deadline = float("inf")
        return connection

    engine = create_engine("postgresql+psycopg://", creator=opened, hide_parameters=True, use_native_hstore=False)
    try:
        with engine.begin() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'"))
            yield connection
    except DBAPIError as error:
        raise StoreUnavailable(f"{read.where}: {' '.join(str(error.orig).split())}; nothing was changed") from error
    finally:
        engine.dispose()


def _make_schema(connection: Connection, namespace: str) -> None:
    # IF NOT EXISTS would ask for the right to make one, which an owner of this one need not have.
    there = text("SELECT 1 FROM pg_namespace WHERE nspname = :name")
    quoted = connection.dialect.identifier_preparer.quote_identifier(namespace)
    if connection.execute(there, {"name": namespace}).first() is None:
        connection.execute(text(f"CREATE SCHEMA {quoted}"))
    connection.execute(text(f"SET LOCAL search_path TO {quoted}"))


def _state(connection: Connection, namespace: str) -> State:
    script, context = _alembic(connection, namespace)
    found = context.get_current_revision()
    known = [Migration(one.revision, one.module.step, str(one.doc)) for one in reversed(list(script.walk_revisions()))]
    done = 0 if found is None else int(found)
    return State(found, tuple(one for one in known if int(one.revision) > done))


def _alembic(connection: Connection, namespace: str) -> tuple[Any, Any]:
    config = _config(connection, namespace)
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    options = {"version_table_schema": namespace}
    return ScriptDirectory.from_config(config), MigrationContext.configure(connection, opts=options)


def _config(connection: Connection, namespace: str) -> Any:
    try:
        from alembic.config import Config
    except ImportError as error:
        raise InvalidSettings(
            f"to look at migrations takes Alembic ({error}); pip install 'knell[postgresql]'"
        ) from None
    config = Config(attributes={"connection": connection, "schema": namespace})
    config.set_main_option("script_location", MIGRATIONS)
    return config
