"""The denylist in Redis, and its change feed."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from knell import store as contract
from knell.denylist import strength
from knell.errors import StoreUnavailable
from knell.notices import batch_id_of_revocation, batch_id_of_undo, new_batch_id
from knell.revocations import Revocation
from knell.store import AuditEntry, Change, Cursor, Recorded, ServiceStatus
from knell.stores.feed import NO_EPOCH, changes_after
from knell.stores.redis_codec import Reader, deny_key_of, pack_audit, pack_revocation, pairs, read_revocation
from knell.stores.redis_node import BLOCK_SECONDS, Command
from knell.stores.redis_part import RedisPart

# How old what we know of the server's identity may be; it is asked again after each new connection as well.
IDENTITY_SECONDS = 1.0
# For so long, what was read while a connection was opened is read again: a server that closes each holds nobody up.
SETTLE_SECONDS = 2.0


class Identity:
    """The server's replication id, which changes when it restarts or another one takes its place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = ""
        self._asked_at = float("-inf")
        self._opened = -1

    def fresh(self, opened: int) -> str:
        """The id, "" if it has to be asked for. `opened` counts the connections that were opened."""
        with self._lock:
            old = time.monotonic() - self._asked_at > IDENTITY_SECONDS or opened != self._opened
            return "" if old else self._known

    def learn(self, info: Mapping[str, Any], opened: int) -> str:
        """Take it from the answer to INFO replication, asked when `opened` connections had been opened."""
        with self._lock:
            self._known = str(info["master_replid"])
            self._asked_at = time.monotonic()
            self._opened = opened
            return self._known


class RedisFeed(RedisPart):
    """The part of the store that verifiers read, and `revoke`."""

    _identity: Identity

    def head(self) -> Cursor:
        return self._read_feed(None)[0]

    def changes(self, cursor: Cursor, *, wait_seconds: float = 0.0, limit: int = 1000) -> list[Change]:
        deadline = time.monotonic() + wait_seconds
        while True:
            head, entries = self._read_feed(cursor.position, limit + 1)
            found = changes_after(cursor, head, entries, limit=limit)
            left = deadline - time.monotonic()
            if found or left <= 0:
                return found
            self._link.block(f"{self._feed}:f", cursor.position, min(left, BLOCK_SECONDS))

    def snapshot(self, *, after: int = 0, limit: int = 1000) -> list[Change]:
        while True:
            [ids] = self._link.run(("ZRANGEBYSCORE", f"{self._feed}:p", f"({after}", "+inf", "LIMIT", 0, limit))
            if not ids:
                return []
            [found] = self._link.run(("HMGET", f"{self._feed}:v", *ids))
            # An empty page means the end. One whose revocations have all been removed since is none.
            if changes := [_read_kept(packed) for packed in found if packed is not None]:
                return changes

    def revoke(self, revocation: Revocation, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded:
        stored, position, created, *services = self._call_feed(
            "revoke", self._now, secrets.token_hex(8), revocation.id, pack_revocation(revocation),
            repr(revocation.expires_at), repr(strength(revocation)), deny_key_of(revocation), batch_id, jws,
            contract.FIRST_RESEND_SECONDS, batch_id_of_undo(revocation.id), *pack_audit(audit),
        )  # fmt: skip
        return Recorded(
            cursor=self._cursor(stored, position, revocation.id),
            created=created == 1,
            services=_names(services),
            undone=created == -1,
        )

    def undo(self, revocation_id: str, *, batch_id: str, jws: str, audit: AuditEntry) -> Recorded | None:
        answer = self._call_feed(
            "undo", self._now, revocation_id, batch_id_of_revocation(revocation_id), batch_id, jws,
            contract.FIRST_RESEND_SECONDS, *pack_audit(audit), new_batch_id("m"),
        )  # fmt: skip
        if answer is None:
            return None
        stored, position, created, count, *names = answer
        return Recorded(
            cursor=self._cursor(stored, position, revocation_id),
            created=bool(created),
            services=_names(names[:count]),
            untold=_names(names[count:]),
        )

    def undone(self, revocation_id: str) -> bool:
        [found] = self._link.run(("EXISTS", f"{self._feed}:n:{batch_id_of_undo(revocation_id)}"))
        return bool(found)

    def _cursor(self, stored: bytes, position: int, revocation_id: str) -> Cursor:
        return Cursor(f"{stored.decode()}.{self._server_id()}", position, revocation_id)

    def revocation(self, revocation_id: str) -> Revocation | None:
        answer = self._call_feed("revocation", self._now, revocation_id)
        if answer is None:
            return None
        now, packed = answer
        found = read_revocation(packed)
        return found if found.expires_at > float(now) else None

    def status(self, revocation_id: str) -> Mapping[str, ServiceStatus] | None:
        key = f"{self._feed}:n:{batch_id_of_revocation(revocation_id)}"
        [record] = self._link.run(("HGETALL", key))
        record = record if isinstance(record, dict) else pairs(record)
        if not record:
            return None
        states = {name[2:].decode(): state.decode() for name, state in record.items() if name.startswith(b"s:")}
        return {name: _read_status(state) for name, state in sorted(states.items())}

    def _server_id(self) -> str:
        known = self._identity.fresh(self._link.opened)
        return known or self.head().epoch.rpartition(".")[2]

    def _read_feed(self, position: int | None, limit: int = 0) -> tuple[Cursor, list[Change]]:
        """The head, and the entries from a position on (None: no entries).

        A new connection may lead to another server: what came over it is read again, with that server's identity.
        """
        feed, deadline = self._feed, time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            opened = self._link.opened
            known = self._identity.fresh(opened)
            commands: list[Command] = []
            if not known:
                self._link.look()
                commands.append(("INFO", "replication"))
            # No script: whoever only reads the feed needs no right to run any.
            commands.append(("HMGET", f"{feed}:m", "epoch", "pos", "last"))
            if position is not None:
                commands += [
                    ("XRANGE", f"{feed}:f", f"{position}-0", "+", "COUNT", limit),
                    ("HGET", f"{feed}:m", "epoch"),
                ]
            answers = self._link.run(*commands)
            if not known:
                known = self._identity.learn(answers.pop(0), opened)
            (stored, last, revocation_id), *read = answers
            entries, still = read or ([], stored)
            # Entries of a store that was emptied meanwhile must not be judged by what it was before.
            if self._link.opened != opened or still != stored:
                continue
            epoch = f"{self._begin() if stored is None else stored.decode()}.{known}"
            head = Cursor(epoch, int(last or 0), None if revocation_id is None else revocation_id.decode())
            return head, [_read_change(entry_id, entry) for entry_id, entry in entries]
        raise StoreUnavailable(f"the store at {self._link.where} keeps no connection open; is it restarting?")

    def _begin(self) -> str:
        """Give an empty store its epoch. Who may only read it, or reads a replica, cannot, and there is none yet."""
        key = f"{self._feed}:m"
        try:
            _, stored = self._link.run(("HSETNX", key, "epoch", secrets.token_hex(8)), ("HGET", key, "epoch"))
        except StoreUnavailable as error:
            if any(name in str(error) for name in ("ReadOnlyError", "NoPermissionError")):
                return NO_EPOCH
            raise
        return str(stored.decode())


def _names(found: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(sorted(name.decode() for name in found))


def _read_change(entry_id: bytes, entry: Mapping[bytes, bytes]) -> Change:
    kind: Literal["revoked", "undone"] = "undone" if entry[b"k"] == b"undone" else "revoked"
    return Change(int(entry_id.split(b"-")[0]), kind, read_revocation(entry[b"d"]))


def _read_kept(packed: bytes) -> Change:
    """A revocation as the denylist keeps it; see lua/feed.lua."""
    reader = Reader(packed)
    position, _ = reader.integer(8), reader.item()
    return Change(position, "revoked", read_revocation(packed[reader.at :]))


def _read_status(state: str) -> ServiceStatus:
    name, _, at = state.partition(" ")
    known = cast(Literal["waiting", "retrying", "done", "parked", "undone"], name)
    return ServiceStatus(known, float(at) if at else None)
