"""What `knell doctor` looks at: each check says what was found, and what to do about it."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from amqp.exceptions import NotFound
from kombu import Connection

from knell import topology
from knell.connection import BROKER_ERRORS, connect, hosts
from knell.errors import BrokerUnavailable, InvalidSettings, KnellError, MessageRefused
from knell.keys import NOTICE_TYPE, NOTIFIER, SigningKey, TrustedKey, TrustList, notice_key, trust_list
from knell.keyset import notice_keys
from knell.notices import Cause
from knell.replay import all_parked
from knell.settings import EMBEDDED_BROKER, Settings
from knell.store import ServiceInfo, Store, open_store
from knell.topology import Finding
from knell.topology.check import APPLY

# Sessions and tokens are compared across hosts by whole seconds and more; a clock further off than this is broken.
MAX_OFFSET_SECONDS = 1.0
# The sweep tells what is overdue; what it has left for so many of its intervals, nobody will tell.
PATIENT_SWEEPS = 3
# Parked entries are counted up to here: more is "a lot" whatever the number.
COUNT_LIMIT = 1000
OTHERS = stat.S_IRWXO


def look(settings: Settings, *, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Check everything, one finding after the other. Nothing is changed anywhere, and nothing is raised.

    Args:
        settings: of the deployment, as the `knell` command reads them.
        clock: this host's clock, Unix seconds.
    """
    yield Finding(True, f"settings: namespace {settings.namespace}, broker {hosts(settings)}")
    services: list[ServiceInfo] = []
    # Each begins when its turn comes: the broker is looked at for the services that the store has told.
    for part, todo, findings in (
        ("keys", "see that this account may read them", look_at_keys(settings)),
        ("store", "see that it runs and that KNELL_STORE_URL is right", _open_and_look(settings, services, clock)),
        ("broker", "see that KNELL_BROKER_URL and KNELL_BROKER_API_URL are right", look_at_broker(settings, services)),
    ):
        try:
            yield from findings
        except (KnellError, OSError) as error:
            yield Finding(False, f"{part}: {error}", todo)


def look_at_keys(settings: Settings) -> Iterator[Finding]:
    """The notice key, who can read it, and whether the trust list has it for what the notifier tells."""
    if settings.embedded:
        for path in (settings.notice_key, settings.trust):
            if path is not None and not path.exists():  # reading either makes what is missing
                yield Finding(True, f"keys: {path} is made when it is first needed")
                return
    try:
        key = notice_key(settings)
    except InvalidSettings as error:
        yield Finding(False, f"notice key: {error}", "make one with `knell keys new`")
        return
    if key is None:
        todo = "make one with `knell keys new`, and set KNELL_NOTICE_KEY where notices are signed"
        yield Finding(False, "notice key: KNELL_NOTICE_KEY is not set", todo)
    else:
        assert settings.notice_key is not None
        yield _private(settings.notice_key, key)
    try:
        trust = trust_list(settings)
    except InvalidSettings as error:
        yield Finding(False, f"trust list: {error}", "`knell keys new` and `knell keys trust` write one")
        return
    if key is not None:
        yield _trusted(trust, key, settings)
        yield from _coming(trust, settings)


def look_at_store(settings: Settings, store: Store, clock: Callable[[], float]) -> Iterator[Finding]:
    """Whether it answers, what it warns of, and how far this host's clock is from its own.

    Raises:
        StoreUnavailable: it does not answer.
    """
    yield Finding(True, f"store: {store.ping()}")
    for warning in store.warnings():
        yield Finding(False, f"store: {warning}", "see the store's documentation")
    before = clock()
    told = store.time()
    offset = told - (before + clock()) / 2
    what = f"clock: the store is {abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} this host"
    fine = abs(offset) <= MAX_OFFSET_SECONDS
    yield Finding(fine, what, "" if fine else "run a time service (NTP) on both hosts")


def look_at_work(settings: Settings, store: Store, services: list[ServiceInfo]) -> Iterator[Finding]:
    """Who is registered, what they missed, what is parked, and whether a notifier is at work.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    yield _registered(services)
    for service in services:
        if service.missed_since is not None:
            ago = store.time() - service.missed_since
            what = f"service {service.name}: notices since {ago:.0f} s ago were dropped before it came for them"
            yield Finding(False, what, "start its worker: it is told, and its on_missed handler makes up for it")
    parked = sum(1 for _ in islice(all_parked(store), COUNT_LIMIT))
    count = f"{COUNT_LIMIT} or more" if parked == COUNT_LIMIT else str(parked)
    yield Finding(not parked, f"parked: {count}", "`knell parked list`, then replay or drop them" if parked else "")
    yield _overdue(settings, store)


def look_at_broker(settings: Settings, services: list[ServiceInfo]) -> Iterator[Finding]:
    """Whether it answers, whether the topology and its policies are there, and the queue of each service."""
    if settings.embedded and not (file := Path(settings.broker_url.removeprefix(f"{EMBEDDED_BROKER}:///"))).exists():
        yield Finding(False, f"broker: there is no {file} yet: the embedded broker has not been used", APPLY)
        return
    found = topology.check(settings, [service.name for service in services])
    yield from found
    if not found[0].ok:
        return
    try:
        with connect(settings) as connection:
            readers = not settings.embedded  # the embedded broker does not count them
            start = "start one: `celery -A tasks worker -B`"
            yield from _queue(connection, "notifier", topology.RECEIPTS, start=start if readers else None)
            for service in services:
                what, start = f"service {service.name}", "start its worker"
                queue = topology.service_queue(service.name)
                yield from _queue(connection, what, queue, start=start if readers else None)
    except BrokerUnavailable as error:
        yield Finding(False, f"broker: {error}", "see its log, and what this account may do")


def distrust(settings: Settings, key: SigningKey, iss: str, cause: Cause) -> str | None:
    """Why services would refuse what this key tells of `iss`, as far as the trust list here can say; None if not."""
    if settings.trust is None:
        return None
    try:
        trusted = _find(trust_list(settings), key, settings)
    except InvalidSettings as error:
        return f"whether services will act on it is unknown: {error}"
    if trusted is not None and trusted.may_tell(iss, cause):
        return None
    return (
        f"the trust list {settings.trust} does not let key {key.kid} tell that something of {iss!r} is {cause.value}: "
        "verifiers refuse it, but services will not act on the notice"
    )


def _open_and_look(settings: Settings, services: list[ServiceInfo], clock: Callable[[], float]) -> Iterator[Finding]:
    """Look at the store and at the work in it, and add to `services` who is registered."""
    if (file := _unused_file(settings)) is not None:
        folder = next(each for each in file.absolute().parents if each.exists())
        fine = folder.is_dir() and os.access(folder, os.W_OK)
        what = f"store: nothing is in {file} yet; it is made when it is first needed"
        yield Finding(fine, what, "" if fine else f"see that {folder} is a folder that this account may write into")
        yield _registered(services)
        return
    opened = open_store(
        settings.store_url, namespace=settings.namespace, rules=settings.rules, partitions=settings.partitions
    )
    with closing(opened) as store:
        yield from look_at_store(settings, store, clock)
        services += store.services()
        yield from look_at_work(settings, store, services)


def _unused_file(settings: Settings) -> Path | None:
    """The SQLite store's file, if to open the store would make it, or this namespace's tables in it."""
    if not settings.store_url.startswith("sqlite:///"):
        return None
    from knell.stores.sql_schema import make_tables  # loads SQLAlchemy

    file = Path(settings.store_url.removeprefix("sqlite:///").partition("?")[0])
    if not file.exists():
        return file
    try:
        with closing(sqlite3.connect(file)) as database:
            name = make_tables(settings.namespace).meta.name
            found = database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    except sqlite3.Error:
        return None  # the store says what is wrong with it
    return None if found else file


def _registered(services: list[ServiceInfo]) -> Finding:
    if services:
        return Finding(True, f"services: {', '.join(service.name for service in services)}")
    return Finding(False, "services: none is registered, so nobody is told", "`knell services add NAME`")


def _private(path: Path, key: SigningKey) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & OTHERS:
        return Finding(
            False, f"notice key: everybody on this host can use {path} (mode {mode:04o})", f"chmod o= {path}"
        )
    return Finding(True, f"notice key: {path}, kid {key.kid}")


def _trusted(trust: TrustList, key: SigningKey, settings: Settings) -> Finding:
    trusted = _find(trust, key, settings)
    needed = {Cause.EXPIRED, Cause.MISSED}
    if trusted is None or not needed <= trusted.causes:
        what = f"trust list: {settings.trust} does not let the notice key tell expired and missed"
        return Finding(False, what, "right for an issuer's key; the notifier's needs `--cause expired --cause missed`")
    return Finding(True, f"trust list: {settings.trust} has the notice key")


def _coming(trust: TrustList, settings: Settings) -> Iterator[Finding]:
    """Keys that are yet to sign, and that nobody would believe."""
    keys = notice_keys(settings)
    now = time.time()
    for each in () if keys is None else keys.current.keys:
        if each.lives(now) and each.nbf > now and _find(trust, each.key, settings) is None:
            what = (
                f"trust list: {settings.trust} does not have key {each.key.kid}, which signs in {each.nbf - now:.0f} s"
            )
            yield Finding(False, what, "put the trust list here that `knell keys rotate` has changed")


def _find(trust: TrustList, key: SigningKey, settings: Settings) -> TrustedKey | None:
    """The trust list's entry for a key, found as a service finds it: by checking a signature."""
    payload = {"iss": NOTIFIER, "aud": settings.audience, "iat": 0}
    try:
        return trust.verify(key.sign(payload, typ=NOTICE_TYPE), typ=NOTICE_TYPE, audience=settings.audience)[1]
    except MessageRefused:
        return None


def _overdue(settings: Settings, store: Store) -> Finding:
    now = store.time()
    patience = PATIENT_SWEEPS * settings.sweep_interval_seconds
    late = store.due(before=now - patience, limit=1)
    if not late:
        return Finding(True, "expiries: none is overdue")
    what = f"expiries: one is overdue by {now - late[0]:.0f} s"
    return Finding(False, what, "start a notifier with beat: `celery -A tasks worker -B`")


def _queue(connection: Connection, reader: str, name: str, *, start: str | None) -> Iterator[Finding]:
    """What waits for a reader, and, if `start` says what to do about it, whether there is one."""
    opened: Any = connection.channel()
    try:
        with opened as channel:
            found = channel.queue_declare(name, passive=True)
    except NotFound:
        return  # the check of the topology has said so
    except BROKER_ERRORS as error:
        raise BrokerUnavailable(f"the state of {name} is unknown: {error or type(error).__name__}") from error
    what = f"{reader}: {found.message_count} waiting in {name}"
    if start is not None and not found.consumer_count:
        yield Finding(False, f"{what}, and nobody reads them", start)
    else:
        yield Finding(True, what)
