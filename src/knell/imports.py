"""Imports: what another system's blacklist refuses becomes revocations, one for each token however often it is run."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from itertools import islice
from typing import Any

import redis
from redis.exceptions import RedisError
from sqlalchemy import Integer, NullPool, column, create_engine, select, table
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from knell.errors import InvalidClaims, InvalidInput, InvalidRevocation, Unavailable
from knell.issuer import Issuer
from knell.redaction import without_tokens
from knell.revocations import check_reason
from knell.revoking import check_actor
from knell.tokens import check_identifier, check_time

# As many are asked for at once.
PAGE = 1000
CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 10.0
_GLOB = re.compile(rb"([*?\[\]\\^])")


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of a blacklist.

    Attributes:
        position: where it stands in its source: a row's id, or a key.
        jti: the token's id.
        exp: when the token ends, Unix seconds; None if the source does not say.
    """

    position: str
    jti: str
    exp: float | None


@dataclass(frozen=True, slots=True)
class Bad:
    """An entry that cannot be imported.

    Attributes:
        position: where it stands in its source.
        why: what is wrong with it.
    """

    position: str
    why: str


@dataclass(slots=True)
class Report:
    """What has become of a blacklist.

    Attributes:
        revoked: how many tokens were revoked; of a dry run, would be.
        known: how many had been revoked by an import before.
        expired: how many have ended by themselves, and need nothing.
        bad: those that cannot be imported.
        position: the last one that was looked at; None if there was none.
        stopped: why the import ended before the end; None if it did not. Run it again, after `position`.
    """

    revoked: int = 0
    known: int = 0
    expired: int = 0
    bad: list[Bad] = field(default_factory=list)
    position: str | None = None
    stopped: str | None = None


def import_blacklist(
    issuer: Issuer,
    entries: Iterable[Listed | Bad],
    *,
    leeway_seconds: float,
    dry_run: bool = False,
    reason: str | None = None,
    actor: str | None = None,
    clock: Callable[[], float] = time.time,
) -> Report:
    """Revoke every token of a blacklist that has not ended.

    A revocation's id is made of (iss, jti), so that running it again, or after it was stopped, revokes nothing twice.

    Args:
        issuer: revokes; its `iss` is that of the tokens.
        entries: what `from_simplejwt`, `from_redis` or `from_redis_set` reads.
        leeway_seconds: how long after its exp a token may still be accepted (`Rules.leeway_seconds`).
        dry_run: change nothing.
        reason: shown to whoever is refused.
        actor: who asks for it, for the audit log.

    Raises:
        InvalidRevocation, InvalidSettings: the reason, the actor, the issuer or its key cannot be used.
    """
    report = Report()
    if reason is not None:
        check_reason(reason)
    check_actor(actor)
    try:
        for entry in entries:
            ended = clock() - leeway_seconds
            _one(issuer, entry, report, ended=ended, dry_run=dry_run, reason=reason, actor=actor)
            report.position = without_tokens(entry.position)
            if report.stopped is not None:
                break
    except Unavailable as error:
        report.stopped = str(error)
    return report


def _one(issuer: Issuer, entry: Listed | Bad, report: Report, *, ended: float, dry_run: bool, **told: Any) -> None:
    if isinstance(entry, Bad):
        report.bad.append(entry)
    elif (why := _wrong_with(entry)) is not None:
        report.bad.append(Bad(without_tokens(entry.position), why))
    elif entry.exp is not None and entry.exp <= ended:
        report.expired += 1
    elif dry_run:
        report.revoked += 1
    else:
        try:
            revoked = issuer.revoke(
                "token",
                {"jti": entry.jti},
                exp=entry.exp,
                initiating_entity="system",
                idempotency_key=_id(issuer.iss, entry.jti),
                **told,
            )
        except InvalidRevocation as error:  # its revocation was undone: those after it are revoked all the same
            report.bad.append(Bad(without_tokens(entry.position), str(error)))
            return
        report.revoked += revoked.created
        report.known += not revoked.created
        if revoked.recorded == "queued":
            report.stopped = "the store is away; what was revoked so far is queued, or recorded"


def _wrong_with(entry: Listed) -> str | None:
    if without_tokens(entry.jti) != entry.jti:
        return "this is a whole token; its jti is needed"  # a raw token is kept nowhere
    try:
        check_identifier("jti", entry.jti)
        if entry.exp is not None:
            check_time("exp", entry.exp)
    except InvalidClaims as error:
        return str(error)
    return None


def _id(iss: str, jti: str) -> str:
    named = f"{iss}\0{jti}".encode()
    return f"import-{hashlib.sha256(named).hexdigest()[:40]}"


# ---- simplejwt


def from_simplejwt(url: str, *, after: int = 0, timezone: tzinfo = UTC) -> Iterator[Listed | Bad]:
    """The tables of djangorestframework-simplejwt's blacklist app, in the order of their ids.

    Args:
        url: of the database, as SQLAlchemy has it: `postgresql+psycopg://...`, `sqlite:///db.sqlite3`. Its driver has
            to be installed. The account needs to read jti, expires_at and the ids, and not the tokens themselves.
        after: the id of BlacklistedToken to go on after.
        timezone: of times that come without one: Django's TIME_ZONE where USE_TZ is False, else UTC.

    Raises:
        InvalidInput: the URL cannot be used.
        Unavailable: the database does not answer, or has no such tables. While it is read, as well.
    """
    blacklisted = table("token_blacklist_blacklistedtoken", column("id", Integer), column("token_id", Integer))
    outstanding = table("token_blacklist_outstandingtoken", column("id", Integer), column("jti"), column("expires_at"))
    rows = select(blacklisted.c.id, outstanding.c.jti, outstanding.c.expires_at).join_from(
        blacklisted, outstanding, outstanding.c.id == blacklisted.c.token_id
    )
    try:
        engine = create_engine(make_url(url), poolclass=NullPool)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise InvalidInput(
            f"the database's URL cannot be used ({type(error).__name__}; it is not shown here: it may hold a "
            "password); is its driver installed?"
        ) from None
    while True:
        try:
            with engine.connect() as connection:
                page = connection.execute(
                    rows.where(blacklisted.c.id > after).order_by(blacklisted.c.id).limit(PAGE)
                ).all()
        except DBAPIError as error:
            raise Unavailable(f"the blacklist cannot be read: {type(error.orig).__name__}: {error.orig}") from None
        for row in page:
            yield _of_row(row, timezone)
        if len(page) < PAGE:
            return
        after = page[-1].id


def _of_row(row: Any, timezone: tzinfo) -> Listed | Bad:
    if not isinstance(row.jti, str):
        return Bad(str(row.id), f"its jti is a {type(row.jti).__name__}")
    try:
        at = row.expires_at if isinstance(row.expires_at, datetime) else datetime.fromisoformat(row.expires_at)
        return Listed(str(row.id), row.jti, (at if at.tzinfo else at.replace(tzinfo=timezone)).timestamp())
    except (TypeError, ValueError, OverflowError):
        return Bad(str(row.id), "its expires_at is no time")


# ---- Redis


def from_redis(url: str, *, prefix: str) -> Iterator[Listed | Bad]:
    """A blacklist of keys `<prefix><jti>`, whose time to live is what is left of the token's life.

    Args:
        url: `redis://`, `rediss://` or `unix://`. The account needs SCAN, PTTL and TIME.
        prefix: "" for a database that has nothing but jtis in it.

    Raises:
        InvalidInput, Unavailable: as `from_simplejwt`.
    """
    start = prefix.encode()
    with _redis(url) as client:
        keys = _reading(client.scan_iter(match=_GLOB.sub(rb"\\\1", start) + b"*", count=PAGE))
        while page := list(islice(keys, PAGE)):
            now, ttls = _ttls(client, page)
            for key, ttl_milliseconds in zip(page, ttls, strict=True):
                if ttl_milliseconds != -2:  # it has gone since
                    exp = None if ttl_milliseconds == -1 else now + ttl_milliseconds / 1000
                    yield _of_bytes(key, key.removeprefix(start), exp)


def from_redis_set(url: str, *, key: str) -> Iterator[Listed | Bad]:
    """A blacklist that is one set of jtis. When they end is not known: each is revoked for the longest token lifetime.

    Args:
        url: as of `from_redis`. The account needs SSCAN.
        key: the set's.

    Raises:
        InvalidInput, Unavailable: as `from_simplejwt`.
    """
    with _redis(url) as client:
        for member in _reading(client.sscan_iter(key, count=PAGE)):
            yield _of_bytes(member, member, None)


def _redis(url: str) -> redis.Redis:
    try:
        return redis.Redis.from_url(
            url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=ANSWER_SECONDS, decode_responses=False
        )
    except (ValueError, TypeError, RedisError):
        raise InvalidInput(
            "the URL of Redis cannot be used (it is not shown here: it may hold a password); use redis://, rediss:// "
            "or unix://"
        ) from None


def _reading(found: Iterable[Any]) -> Iterator[bytes]:
    try:
        yield from found
    except RedisError as error:
        raise _unread(error) from None


def _ttls(client: redis.Redis, keys: Iterable[bytes]) -> tuple[float, list[int]]:
    pipeline = client.pipeline(transaction=False)
    pipeline.time()
    for key in keys:
        pipeline.pttl(key)
    try:
        (seconds, microseconds), *ttls = pipeline.execute()
    except RedisError as error:
        raise _unread(error) from None
    return seconds + microseconds / 1e6, ttls


def _unread(error: RedisError) -> Unavailable:
    return Unavailable(f"the blacklist cannot be read: {type(error).__name__}: {error}")


def _of_bytes(key: bytes, jti: bytes, exp: float | None) -> Listed | Bad:
    try:
        return Listed(key.decode(), jti.decode(), exp)
    except UnicodeDecodeError:
        return Bad(repr(key), "it is no text in UTF-8")
