"""The tables of the SQL store. The namespace is in every name, so that two environments share one database."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine


class _Text(TypeDecorator[str]):
    """Text. On PostgreSQL in the order of its bytes, whatever the locale: ids are paged through in that order."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return postgresql.TEXT(collation="C") if dialect.name == "postgresql" else Text()

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        # PostgreSQL has no NUL in a text. No name of Knell's has one; what others wrote, such as an error, may.
        return value.replace("\0", "\ufffd") if value and dialect.name == "postgresql" else value


TEXT = _Text()
# Raised when a table changes in a way that older code cannot work with.
SCHEMA_VERSION = 1
# The migration that made what this code uses. It works on later ones too, up to one that raises SCHEMA_VERSION.
REVISION = "0002"


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one namespace. Times are Unix seconds; keys are digests made by `key_of`."""

    namespace: str
    metadata: MetaData
    meta: Table
    counters: Table
    tokens: Table
    sessions: Table
    seconds: Table
    denylist: Table
    claim_names: Table
    feed: Table
    notices: Table
    waiting: Table
    services: Table
    dedupe: Table
    parked: Table
    parked_jws: Table
    leases: Table
    audit: Table
    # Alembic's; on PostgreSQL only.
    revision: Table

    @property
    def channel(self) -> str:
        """What PostgreSQL calls the news of a change by."""
        return f"knell {self.namespace}"[:63]


def key_of(*names: str) -> bytes:
    """16 bytes that stand for a tuple of names: a fixed size, and one column to look up by.

    A collision needs 2**64 names; BLAKE2b makes sure that nobody can choose names that collide sooner.
    """
    joined = "".join(f"{len(name)}:{name}" for name in names)
    return hashlib.blake2b(joined.encode(), digest_size=16).digest()


def lock_key(*names: str) -> int:
    """The 64 bits that PostgreSQL names a lock by."""
    return int.from_bytes(key_of(*names)[:8], signed=True)


def make_tables(namespace: str, *, schema: bool = False) -> Tables:
    """The tables of a namespace: it begins their names, or, with `schema`, names the schema that they are in."""
    metadata = MetaData(schema=namespace if schema else None)
    prefix = "" if schema else f"{namespace}_"

    def table(name: str, *parts: Column[Any] | PrimaryKeyConstraint | Index) -> Table:
        return Table(f"{prefix}{name}", metadata, *parts)

    def index(table_name: str, *columns: str) -> Index:
        return Index(f"ix_{prefix}{table_name}_{'_'.join(columns)}", *columns)

    return Tables(
        namespace=namespace,
        metadata=metadata,
        meta=table("meta", _key("name", TEXT), _some("value", TEXT)),
        # head: the feed's last position; trimmed: the last position that it no longer has; log_bytes: the size of the
        # open part of the notice log. Updated in place, so that their row is the lock that orders the writers.
        counters=table("counters", _key("name", TEXT), _some("value", BigInteger())),
        tokens=table(
            "tokens",
            _key("key", LargeBinary(16)),
            _some("second", BigInteger()),
            _maybe("session", LargeBinary(16)),
            # The life of the session that it belongs to: a token that outlives its life leaves the next one alone.
            _maybe("life", BigInteger()),
            # The revocation that it was detached under, and whether that closed the life.
            _maybe("detached", TEXT),
            _some("closed", Boolean()),
            _some("ref", TEXT),
            index("tokens", "second"),
        ),
        sessions=table(
            "sessions",
            _key("key", LargeBinary(16)),
            _some("ref", TEXT),
            _maybe("started", Float()),
            _some("live", Integer()),
            _some("last_exp", Float()),
            _maybe("session_exp", Float()),
            _maybe("due", BigInteger()),
            _some("life", BigInteger()),
            # A life that a detach closed stays as a closed row until its token is claimed, or it is opened again.
            _maybe("closed_by", TEXT),
            index("sessions", "due"),
        ),
        seconds=table(
            "seconds",
            Column("second", BigInteger(), primary_key=True, autoincrement=False),
            _some("armed", Boolean()),
            _some("leased_at", Float()),
        ),
        denylist=table(
            "denylist",
            _key("id", TEXT),
            _some("target", LargeBinary(16)),
            _some("position", BigInteger()),
            _some("expires_at", Float()),
            # See `denylist.strength`: of those of one target that live, the strongest is what a look-up reads.
            _some("strength", Float()),
            _some("body", TEXT),
            index("denylist", "target", "strength", "id"),
            index("denylist", "position"),
            index("denylist", "expires_at"),
        ),
        # Which sets of claims revocations are by: a token is looked up once for each set of names that it has.
        claim_names=table(
            "claim_names",
            _some("iss", LargeBinary(16)),
            _some("names", TEXT),
            _some("revocations", Integer()),
            PrimaryKeyConstraint("iss", "names"),
        ),
        feed=table(
            "feed",
            Column("position", BigInteger(), primary_key=True, autoincrement=False),
            _some("kind", TEXT),
            _some("revocation_id", TEXT),
            _some("body", TEXT),
        ),
        notices=table(
            "notices",
            _key("batch_id", TEXT),
            _some("kind", TEXT),
            _some("created_at", Float()),
            _maybe("jws", TEXT),
            _maybe("entries", TEXT),
            _some("settled", Boolean()),
            _maybe("since", Float()),
            _some("attempts", Integer()),
            # When it is to be sent again; NULL once nobody waits for it.
            _maybe("resend_at", Float()),
            _some("size", BigInteger()),
            # The feed position, for a revocation.
            _maybe("position", BigInteger()),
            index("notices", "resend_at", "created_at", "batch_id"),
            index("notices", "kind", "created_at"),
        ),
        waiting=table(
            "waiting",
            _some("batch_id", TEXT),
            _some("service", TEXT),
            # Bitmap of the open entries, in hexadecimal; "0" for a revocation that the service has closed.
            _some("todo", TEXT),
            _some("state", TEXT),
            _maybe("at", Float()),
            _some("hold_until", Float()),
            PrimaryKeyConstraint("batch_id", "service"),
            index("waiting", "service"),
        ),
        # A removed service stays as a row: a claim that read the list before may name it.
        services=table("services", _key("name", TEXT), _some("added_at", Float()), _some("removed", Boolean())),
        dedupe=table(
            "dedupe",
            _some("service", TEXT),
            _some("batch_id", TEXT),
            # Bitmaps, in hexadecimal.
            _some("done", TEXT),
            _some("parked", TEXT),
            _maybe("holder", TEXT),
            _some("leased_until", Float()),
            _some("expires_at", Float()),
            PrimaryKeyConstraint("service", "batch_id"),
            index("dedupe", "expires_at"),
        ),
        parked=table(
            "parked",
            _key("id", TEXT),
            _some("service", TEXT),
            _some("queue", TEXT),
            _some("error", TEXT),
            _some("at", Float()),
            _some("attempts", Integer()),
            _maybe("notice_id", TEXT),
            _maybe("jws_key", LargeBinary(16)),
            _maybe("body", LargeBinary()),
            index("parked", "service", "id"),
            index("parked", "at"),
            index("parked", "jws_key"),
        ),
        # A whole batch is parked with one JWS, in as many rows as it has entries.
        parked_jws=table("parked_jws", _key("key", LargeBinary(16)), _some("jws", TEXT)),
        leases=table("leases", _key("name", TEXT), _some("holder", TEXT), _some("leased_until", Float())),
        audit=table("audit", _key("id", TEXT), _some("at", Float()), _some("body", TEXT), index("audit", "at", "id")),
        revision=Table("alembic_version", MetaData(schema=metadata.schema), Column("version_num", Text())),
    )


def _key(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, primary_key=True)


def _some(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, nullable=False)


def _maybe(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, nullable=True)
