"""The tables of the SQL store. Every name begins with the namespace, so that two environments share one database."""

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
from sqlalchemy.types import TypeEngine

# Raised when a table changes in a way that older code cannot work with.
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of one namespace. Times are Unix seconds; keys are digests made by `key_of`."""

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


def key_of(*names: str) -> bytes:
    """16 bytes that stand for a tuple of names: a fixed size, and one column to look up by.

    A collision needs 2**64 names; BLAKE2b makes sure that nobody can choose names that collide sooner.
    """
    joined = "".join(f"{len(name)}:{name}" for name in names)
    return hashlib.blake2b(joined.encode(), digest_size=16).digest()


def make_tables(namespace: str) -> Tables:
    """The tables of a namespace."""
    metadata = MetaData()

    def table(name: str, *parts: Column[Any] | PrimaryKeyConstraint | Index) -> Table:
        return Table(f"{namespace}_{name}", metadata, *parts)

    def index(table_name: str, *columns: str) -> Index:
        return Index(f"ix_{namespace}_{table_name}_{'_'.join(columns)}", *columns)

    return Tables(
        metadata=metadata,
        meta=table("meta", _key("name", Text()), _some("value", Text())),
        # head: the feed's last position; trimmed: the last position that it no longer has; log_bytes: the size of the
        # open part of the notice log. Updated in place, so that their row is the lock that orders the writers.
        counters=table("counters", _key("name", Text()), _some("value", BigInteger())),
        tokens=table(
            "tokens",
            _key("key", LargeBinary(16)),
            _some("second", BigInteger()),
            _maybe("session", LargeBinary(16)),
            # The life of the session that it belongs to: a token that outlives its life leaves the next one alone.
            _maybe("life", BigInteger()),
            # The revocation that it was detached under, and whether that closed the life.
            _maybe("detached", Text()),
            _some("closed", Boolean()),
            _some("ref", Text()),
            index("tokens", "second"),
        ),
        sessions=table(
            "sessions",
            _key("key", LargeBinary(16)),
            _some("ref", Text()),
            _maybe("started", Float()),
            _some("live", Integer()),
            _some("last_exp", Float()),
            _maybe("session_exp", Float()),
            _maybe("due", BigInteger()),
            _some("life", BigInteger()),
            # A life that a detach closed stays as a closed row until its token is claimed, or it is opened again.
            _maybe("closed_by", Text()),
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
            _key("id", Text()),
            _some("target", LargeBinary(16)),
            _some("position", BigInteger()),
            _some("expires_at", Float()),
            # See `denylist.strength`: of those of one target that live, the strongest is what a look-up reads.
            _some("strength", Float()),
            _some("body", Text()),
            index("denylist", "target", "strength", "id"),
            index("denylist", "position"),
            index("denylist", "expires_at"),
        ),
        # Which sets of claims revocations are by: a token is looked up once for each set of names that it has.
        claim_names=table(
            "claim_names",
            _some("iss", LargeBinary(16)),
            _some("names", Text()),
            _some("revocations", Integer()),
            PrimaryKeyConstraint("iss", "names"),
        ),
        feed=table(
            "feed",
            Column("position", BigInteger(), primary_key=True, autoincrement=False),
            _some("kind", Text()),
            _some("revocation_id", Text()),
            _some("body", Text()),
        ),
        notices=table(
            "notices",
            _key("batch_id", Text()),
            _some("kind", Text()),
            _some("created_at", Float()),
            _maybe("jws", Text()),
            _maybe("entries", Text()),
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
            _some("batch_id", Text()),
            _some("service", Text()),
            # Bitmap of the open entries, in hexadecimal; "0" for a revocation that the service has closed.
            _some("todo", Text()),
            _some("state", Text()),
            _maybe("at", Float()),
            _some("hold_until", Float()),
            PrimaryKeyConstraint("batch_id", "service"),
            index("waiting", "service"),
        ),
        # A removed service stays as a row: a claim that read the list before may name it.
        services=table("services", _key("name", Text()), _some("added_at", Float()), _some("removed", Boolean())),
        dedupe=table(
            "dedupe",
            _some("service", Text()),
            _some("batch_id", Text()),
            # Bitmaps, in hexadecimal.
            _some("done", Text()),
            _some("parked", Text()),
            _maybe("holder", Text()),
            _some("leased_until", Float()),
            _some("expires_at", Float()),
            PrimaryKeyConstraint("service", "batch_id"),
            index("dedupe", "expires_at"),
        ),
        parked=table(
            "parked",
            _key("id", Text()),
            _some("service", Text()),
            _some("queue", Text()),
            _some("error", Text()),
            _some("at", Float()),
            _some("attempts", Integer()),
            _maybe("notice_id", Text()),
            _maybe("jws_key", LargeBinary(16)),
            _maybe("body", LargeBinary()),
            index("parked", "service", "id"),
            index("parked", "at"),
            index("parked", "jws_key"),
        ),
        # A whole batch is parked with one JWS, in as many rows as it has entries.
        parked_jws=table("parked_jws", _key("key", LargeBinary(16)), _some("jws", Text())),
        leases=table("leases", _key("name", Text()), _some("holder", Text()), _some("leased_until", Float())),
        audit=table(
            "audit", _key("id", Text()), _some("at", Float()), _some("body", Text()), index("audit", "at", "id")
        ),
    )


def _key(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, primary_key=True)


def _some(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, nullable=False)


def _maybe(name: str, kind: TypeEngine[Any]) -> Column[Any]:
    return Column(name, kind, nullable=True)
