"""The SQL store, on PostgreSQL or SQLite. The steps are the same; who may run beside whom is the database's."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from knell.notices import Receipt
from knell.revocations import Revocation
from knell.settings import Rules
from knell.store import (
    AuditEntry,
    Begun,
    Change,
    Claim,
    Counted,
    Cursor,
    Detached,
    OpenNotice,
    Parked,
    Pruned,
    Recorded,
    ServiceInfo,
    ServiceStatus,
    Store,
    Tracked,
)
from knell.stores import sql_audit, sql_count, sql_feed, sql_house, sql_log, sql_tokens
from knell.stores.counting import Page, count
from knell.stores.denied import names_of_token
from knell.stores.sql_database import BUSY_SECONDS, DENYLIST, DENYLIST_READ, LOG, LOG_ADD, PARKED, Database
from knell.tokens import TokenRef

# Nobody waits for a prune, and what has piled up has to go however slow the server is.
PRUNE_SECONDS = 10.0
# What one call is about, such as thousands of tokens, may take this much longer for each.
EACH_SECONDS = 0.002


class SqlStore(Store):
    """A `Store` in PostgreSQL 15 or later, or in a SQLite file. `Store` says what each method does.

    Every method is one transaction (`prune` three). On PostgreSQL a commit is on the disk; see `PostgresDatabase` for
    what else it promises. On SQLite a commit survives the end of any process. It is not forced to the disk (WAL,
    synchronous=NORMAL): a loss of power may take the last commits away, and never leaves half of one. Use a local file
    system: SQLite's locks do not work on most network file systems.

    Args:
        url: `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`, several hosts separated by commas; or
            `sqlite:///relative/path`, `sqlite:////absolute/path`: made on first use, its directory too; both for their
            owner alone.
        namespace: the name of the schema on PostgreSQL; on SQLite it begins the name of every table. So two
            environments can share one database.
        rules: the deployment's lifetimes and limits.
        clock: replaces the server's clock (SQLite: this host's `time.time`), for tests that move it.

    Raises:
        InvalidSettings: the URL names no file, or has an option that cannot be used.
        StoreUnavailable: the file could not be opened, or a newer Knell has written it. Any method raises it too: when
            other writers were in the way for over 2 s, the server is away, the disk is full, or the file is damaged.
    """

    def __init__(self, url: str, *, namespace: str, rules: Rules, clock: Callable[[], float] | None = None) -> None:
        self.rules = rules
        self._database = _open(url, namespace=namespace, rules=rules, clock=clock)

    # ---- the feed

    def time(self) -> float:
        return self._database.time()

    def head(self) -> Cursor:
        return self._database.read(sql_feed.head)

    def changes(self, cursor: Cursor, *, wait_seconds: float = 0.0, limit: int = 1000) -> list[Change]:
        deadline = time.monotonic() + wait_seconds
        while True:
            found = self._database.read(lambda tx: sql_feed.changes(tx, cursor, limit=limit))
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            self._database.wait(left)

    def snapshot(self, *, after: int = 0, limit: int = 1000) -> list[Change]:
        return self._database.read(lambda tx: sql_feed.snapshot(tx, after=after, limit=limit))

    def close(self) -> None:
        self._database.close()

    # ---- dedupe

    def begin(self, service: str, batch_id: str, *, holder: str, lease_seconds: float) -> Begun:
        return self._database.write(
            lambda tx: sql_house.begin(tx, service, batch_id, holder=holder, lease_seconds=lease_seconds)
        )

    def mark(
        self,
        service: str,
        batch_id: str,
        *,
        holder: str,
        done: int,
        parked: int = 0,
        unparked: int = 0,
        lease_seconds: float,
    ) -> bool:
        return self._database.write(
            lambda tx: sql_house.mark(
                tx,
                service,
                batch_id,
                holder=holder,
                done=done,
                parked=parked,
                unparked=unparked,
                lease_seconds=lease_seconds,
            )
        )

    # ---- tokens and sessions

    def track(
        self,
        refs: Sequence[TokenRef],
        *,
        continuing: bool = False,
        reopen: bool = False,
        predecessor: str | None = None,
        predecessor_kid: str | None = None,
        claims: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[Tracked]:
        return self._database.write(
            lambda tx: sql_tokens.track(
                tx,
                refs,
                must_continue=continuing and not reopen,
                predecessor=names_of_token(predecessor, predecessor_kid),
                claims=claims,
            ),
            DENYLIST_READ,
            patience_seconds=_patience(len(refs)),
        )

    def armed(self, seconds: Collection[int]) -> None:
        return self._database.write(lambda tx: sql_tokens.armed(tx, seconds))

    def due(self, *, before: float, limit: int = 1000) -> list[int]:
        return self._database.read(lambda tx: sql_tokens.due(tx, before=before, limit=limit))

    def detach(self, iss: str, jti: str, *, revocation_id: str) -> Detached:
        return self._database.write(lambda tx: sql_tokens.detach(tx, iss, jti, revocation_id))

    def attach(self, iss: str, jti: str, *, revocation_id: str) -> None:
        return self._database.write(lambda tx: sql_tokens.attach(tx, iss, jti, revocation_id))

    def session(self, iss: str, sid: str) -> float | None:
        return self._database.read(lambda tx: sql_tokens.session(tx, iss, sid))

    def claim(self, second: int, *, services: Sequence[str], limit: int = 500) -> Claim | None:
        return self._database.write(
            lambda tx: sql_tokens.claim(tx, second, services=services, limit=limit),
            LOG_ADD,
            patience_seconds=_patience(limit),
        )

    # ---- revocations

    def revoke(self, revocation: Revocation, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded:
        return self._database.write(
            lambda tx: sql_feed.revoke(tx, revocation, batch_id=batch_id, jws=jws, audit=audit), LOG_ADD, DENYLIST
        )

    def undo(self, revocation_id: str, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded | None:
        return self._database.write(
            lambda tx: sql_feed.undo(tx, revocation_id, batch_id=batch_id, jws=jws, audit=audit), LOG, DENYLIST
        )

    def undone(self, revocation_id: str) -> bool:
        return self._database.read(lambda tx: sql_feed.undone(tx, revocation_id))

    def count(self, revocation: Revocation, *, enough: int, within_seconds: float) -> Counted | None:
        def page(after: bytes | None) -> Page[bytes]:
            return self._database.read(lambda tx: sql_count.page(tx, revocation, after))

        tracked = self.rules.tracked_claims
        return count(revocation, page, tracked=tracked, enough=enough, within_seconds=within_seconds)

    def revocation(self, revocation_id: str) -> Revocation | None:
        return self._database.read(lambda tx: sql_feed.revocation(tx, revocation_id))

    def status(self, revocation_id: str) -> Mapping[str, ServiceStatus] | None:
        return self._database.read(lambda tx: sql_log.status(tx, revocation_id))

    # ---- the notice log

    def settle(self, batch_id: str, *, dead: Collection[int]) -> None:
        return self._database.write(lambda tx: sql_log.settle(tx, batch_id, dead), LOG)

    def open_notices(self, *, limit: int = 100) -> list[OpenNotice]:
        return self._database.write(lambda tx: sql_log.open_notices(tx, limit=limit), LOG)

    def resend_at(self, batch_ids: Collection[str], at: float) -> None:
        return self._database.write(lambda tx: sql_log.resend_at(tx, batch_ids, at), LOG)

    def receive(self, receipts: Sequence[tuple[str, Receipt]]) -> None:
        step, patience = (lambda tx: sql_log.receive(tx, receipts)), _patience(len(receipts))
        return self._database.write(step, LOG, patience_seconds=patience)

    # ---- services

    def add_service(self, name: str) -> bool:
        return self._database.write(lambda tx: sql_house.add_service(tx, name), LOG)

    def remove_service(self, name: str) -> bool:
        return self._database.write(lambda tx: sql_house.remove_service(tx, name), LOG)

    def services(self) -> list[ServiceInfo]:
        return self._database.read(sql_house.services)

    def mark_missed(self, service: str, since: float) -> None:
        return self._database.write(lambda tx: sql_log.mark_missed(tx, service, since), LOG)

    # ---- parked entries

    def park(self, parked: Sequence[Parked]) -> None:
        step, patience = (lambda tx: sql_house.park(tx, parked)), _patience(len(parked))
        return self._database.write(step, PARKED, patience_seconds=patience)

    def parked(self, *, service: str | None = None, after: str = "", limit: int = 100) -> list[Parked]:
        return self._database.read(lambda tx: sql_house.parked(tx, service=service, after=after, limit=limit))

    def unpark(self, ids: Collection[str]) -> int:
        return self._database.write(lambda tx: sql_house.unpark(tx, ids), PARKED)

    # ---- the audit log

    def note(self, entry: AuditEntry) -> None:
        return self._database.write(lambda tx: sql_audit.note(tx, entry))

    def audit(self, *, before: tuple[float, str] | None = None, limit: int = 100) -> list[AuditEntry]:
        return self._database.read(lambda tx: sql_audit.audit(tx, before=before, limit=limit))

    # ---- keeping house

    def lease(self, name: str, *, holder: str, seconds: float) -> bool:
        return self._database.write(lambda tx: sql_house.lease(tx, name, holder=holder, seconds=seconds))

    def prune(self) -> Pruned:
        log = self._database.write(sql_house.prune_log, LOG, patience_seconds=PRUNE_SECONDS)
        denied = self._database.write(sql_house.prune_denylist, DENYLIST, patience_seconds=PRUNE_SECONDS)
        return log + denied + self._database.write(sql_house.prune_rest, PARKED, patience_seconds=PRUNE_SECONDS)

    def ping(self) -> str:
        return self._database.server()

    def warnings(self) -> list[str]:
        return self._database.warnings()


def _patience(count: int) -> float:
    return BUSY_SECONDS + count * EACH_SECONDS


def _open(url: str, *, namespace: str, rules: Rules, clock: Callable[[], float] | None) -> Database:
    if url.startswith("postgresql:"):
        from knell.stores.sql_postgresql import PostgresDatabase

        return PostgresDatabase(url, namespace=namespace, rules=rules, clock=clock)
    from knell.stores.sql_sqlite import SqliteDatabase

    return SqliteDatabase(url, namespace=namespace, rules=rules, clock=clock)
