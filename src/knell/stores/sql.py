"""The SQL store: SQLite, in portable SQL. It needs no server, and several processes on one host share its file."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import text

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
from knell.stores.sql_database import Database, server_version
from knell.tokens import TokenRef

# How often a reader that waits for changes looks: a change is seen within this, for about one query per look.
_POLL_SECONDS = 0.015


class SqlStore(Store):
    """A `Store` in a SQLite file; every method is one transaction. `Store` says what each method does.

    A commit survives the end of any process. It is not forced to the disk (WAL, synchronous=NORMAL): a loss of power
    may take the last commits away, and never leaves half of one. Use a local file system: SQLite's locks do not work
    on most network file systems.

    Args:
        url: `sqlite:///relative/path` or `sqlite:////absolute/path`. Made on first use, its directory too; both for
            their owner alone.
        namespace: begins the name of every table, so that two environments can share one file.
        rules: the deployment's lifetimes and limits.
        clock: replaces this host's `time.time`, for tests that move it.

    Raises:
        InvalidSettings: the URL names no file.
        StoreUnavailable: the file could not be opened, or a newer Knell has written it. Any method raises it too: when
            another writer holds the file for over 2 s, the disk is full, or the file is damaged.
    """

    def __init__(self, url: str, *, namespace: str, rules: Rules, clock: Callable[[], float] | None = None) -> None:
        self.rules = rules
        self._database = Database(url, namespace=namespace, rules=rules, clock=clock)

    # ---- the feed

    def time(self) -> float:
        return self._database.time()

    def head(self) -> Cursor:
        with self._database.read() as tx:
            return sql_feed.head(tx)

    def changes(self, cursor: Cursor, *, wait_seconds: float = 0.0, limit: int = 1000) -> list[Change]:
        deadline = time.monotonic() + wait_seconds
        while True:
            with self._database.read() as tx:
                found = sql_feed.changes(tx, cursor, limit=limit)
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            time.sleep(min(left, _POLL_SECONDS))

    def snapshot(self, *, after: int = 0, limit: int = 1000) -> list[Change]:
        with self._database.read() as tx:
            return sql_feed.snapshot(tx, after=after, limit=limit)

    def close(self) -> None:
        self._database.close()

    # ---- dedupe

    def begin(self, service: str, batch_id: str, *, holder: str, lease_seconds: float) -> Begun:
        with self._database.write() as tx:
            return sql_house.begin(tx, service, batch_id, holder=holder, lease_seconds=lease_seconds)

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
        with self._database.write() as tx:
            return sql_house.mark(
                tx,
                service,
                batch_id,
                holder=holder,
                done=done,
                parked=parked,
                unparked=unparked,
                lease_seconds=lease_seconds,
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
        with self._database.write() as tx:
            return sql_tokens.track(
                tx,
                refs,
                must_continue=continuing and not reopen,
                predecessor=names_of_token(predecessor, predecessor_kid),
                claims=claims,
            )

    def armed(self, seconds: Collection[int]) -> None:
        with self._database.write() as tx:
            sql_tokens.armed(tx, seconds)

    def due(self, *, before: float, limit: int = 1000) -> list[int]:
        with self._database.read() as tx:
            return sql_tokens.due(tx, before=before, limit=limit)

    def detach(self, iss: str, jti: str, *, revocation_id: str) -> Detached:
        with self._database.write() as tx:
            return sql_tokens.detach(tx, iss, jti, revocation_id)

    def attach(self, iss: str, jti: str, *, revocation_id: str) -> None:
        with self._database.write() as tx:
            sql_tokens.attach(tx, iss, jti, revocation_id)

    def session(self, iss: str, sid: str) -> float | None:
        with self._database.read() as tx:
            return sql_tokens.session(tx, iss, sid)

    def claim(self, second: int, *, services: Sequence[str], limit: int = 500) -> Claim | None:
        with self._database.write() as tx:
            return sql_tokens.claim(tx, second, services=services, limit=limit)

    # ---- revocations

    def revoke(self, revocation: Revocation, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded:
        with self._database.write() as tx:
            return sql_feed.revoke(tx, revocation, batch_id=batch_id, jws=jws, audit=audit)

    def undo(self, revocation_id: str, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded | None:
        with self._database.write() as tx:
            return sql_feed.undo(tx, revocation_id, batch_id=batch_id, jws=jws, audit=audit)

    def undone(self, revocation_id: str) -> bool:
        with self._database.read() as tx:
            return sql_feed.undone(tx, revocation_id)

    def count(self, revocation: Revocation, *, enough: int, within_seconds: float) -> Counted | None:
        def page(after: bytes | None) -> Page[bytes]:
            with self._database.read() as tx:
                return sql_count.page(tx, revocation, after)

        tracked = self.rules.tracked_claims
        return count(revocation, page, tracked=tracked, enough=enough, within_seconds=within_seconds)

    def revocation(self, revocation_id: str) -> Revocation | None:
        with self._database.read() as tx:
            return sql_feed.revocation(tx, revocation_id)

    def status(self, revocation_id: str) -> Mapping[str, ServiceStatus] | None:
        with self._database.read() as tx:
            return sql_log.status(tx, revocation_id)

    # ---- the notice log

    def settle(self, batch_id: str, *, dead: Collection[int]) -> None:
        with self._database.write() as tx:
            sql_log.settle(tx, batch_id, dead)

    def open_notices(self, *, limit: int = 100) -> list[OpenNotice]:
        with self._database.write() as tx:
            return sql_log.open_notices(tx, limit=limit)

    def resend_at(self, batch_ids: Collection[str], at: float) -> None:
        with self._database.write() as tx:
            sql_log.resend_at(tx, batch_ids, at)

    def receive(self, receipts: Sequence[tuple[str, Receipt]]) -> None:
        with self._database.write() as tx:
            sql_log.receive(tx, receipts)

    # ---- services

    def add_service(self, name: str) -> bool:
        with self._database.write() as tx:
            return sql_house.add_service(tx, name)

    def remove_service(self, name: str) -> bool:
        with self._database.write() as tx:
            return sql_house.remove_service(tx, name)

    def services(self) -> list[ServiceInfo]:
        with self._database.read() as tx:
            return sql_house.services(tx)

    def mark_missed(self, service: str, since: float) -> None:
        with self._database.write() as tx:
            sql_log.mark_missed(tx, service, since)

    # ---- parked entries

    def park(self, parked: Sequence[Parked]) -> None:
        with self._database.write() as tx:
            sql_house.park(tx, parked)

    def parked(self, *, service: str | None = None, after: str = "", limit: int = 100) -> list[Parked]:
        with self._database.read() as tx:
            return sql_house.parked(tx, service=service, after=after, limit=limit)

    def unpark(self, ids: Collection[str]) -> int:
        with self._database.write() as tx:
            return sql_house.unpark(tx, ids)

    # ---- the audit log

    def note(self, entry: AuditEntry) -> None:
        with self._database.write() as tx:
            sql_audit.note(tx, entry)

    def audit(self, *, before: tuple[float, str] | None = None, limit: int = 100) -> list[AuditEntry]:
        with self._database.read() as tx:
            return sql_audit.audit(tx, before=before, limit=limit)

    # ---- keeping house

    def lease(self, name: str, *, holder: str, seconds: float) -> bool:
        with self._database.write() as tx:
            return sql_house.lease(tx, name, holder=holder, seconds=seconds)

    def prune(self) -> Pruned:
        with self._database.write() as tx:
            return sql_house.prune(tx)

    def ping(self) -> str:
        with self._database.read() as tx:
            return f"SQLite {server_version(tx)}"

    def warnings(self) -> list[str]:
        with self._database.read() as tx:
            mode = tx.value(text("PRAGMA journal_mode"))
        if str(mode).lower() == "wal":
            return []
        return [
            f"SQLite's journal mode is {mode}, not WAL: readers and writers wait for each other; is it a local disk?"
        ]
