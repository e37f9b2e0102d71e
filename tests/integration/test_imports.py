"""Importing blacklists: simplejwt's own tables, a real Redis, and what happens to bad entries and interruptions."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis

from knell.errors import InvalidInput, InvalidRevocation, StoreUnavailable, Unavailable
from knell.imports import Bad, Listed, from_redis, from_simplejwt, import_blacklist
from knell.issuer import Issuer
from knell.keys import SigningKey
from knell.revocations import Revocation
from knell.settings import Settings
from knell.store import Store, open_store
from tests.commandline import Knell

ISS = "https://auth.example"
# Django with simplejwt's blacklist app: two tokens that are blacklisted and live, one that has expired, one that cannot
# be named, and one that nobody has blacklisted.
MAKE_TABLES = """
import json, sys
from datetime import timedelta
import django
from django.conf import settings
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1]}},
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "rest_framework",
                    "rest_framework_simplejwt.token_blacklist"],
    SECRET_KEY="a secret of at least 32 bytes, from a vault", USE_TZ=True,
)
django.setup()
from django.core.management import call_command
from django.contrib.auth.models import User
from rest_framework_simplejwt.token_blacklist.models import OutstandingToken
from rest_framework_simplejwt.tokens import RefreshToken
call_command("migrate", verbosity=0)
user = User(username="alice"); user.save()
tokens = [RefreshToken.for_user(user) for _ in range(5)]
for token in tokens[:4]:
    token.blacklist()
changed = {2: {"expires_at": "2020-01-01T00:00:00Z"}, 3: {"jti": "two\\nlines"}}
for number, values in changed.items():
    OutstandingToken.objects.filter(jti=tokens[number]["jti"]).update(**values)
print(json.dumps([[token["jti"], token["exp"]] for token in tokens]))
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int]]]:
    """A database with simplejwt's tables, and (jti, exp) of each of its tokens."""
    path = tmp_path_factory.mktemp("simplejwt") / "db.sqlite3"
    made = subprocess.run(
        [sys.executable, "-c", MAKE_TABLES, str(path)], capture_output=True, text=True, timeout=100, check=True
    )
    return path, [(jti, exp) for jti, exp in json.loads(made.stdout)]


@pytest.fixture
def place(settings: Callable[..., Settings]) -> Settings:
    return settings()


@pytest.fixture
def knell(place: Settings) -> Knell:
    return Knell(place)


@pytest.fixture
def store(place: Settings) -> Iterator[Store]:
    place.home.mkdir(parents=True, exist_ok=True)
    opened = open_store(place.store_url, namespace=place.namespace, rules=place.rules)
    yield opened
    opened.close()


def _denied(store: Store) -> dict[str, Revocation]:
    found = [change.revocation for change in store.snapshot()]
    return {each.match["jti"]: each for each in found if each.iss == ISS}


# ---- simplejwt


def test_simplejwts_tables(
    tables: tuple[Path, list[tuple[str, int]]], knell: Knell, store: Store, place: Settings
) -> None:
    """What is blacklisted and lives is revoked once, with its exp; what has expired is left out, a bad row is told."""
    path, tokens = tables
    command = ("import", "simplejwt", "--iss", ISS, "--from", f"sqlite:///{path}")
    dry = knell(*command, "--dry-run", exit_code=1)
    assert (dry["dry_run"], dry["revoked"], dry["expired"], _denied(store)) == (True, 2, 1, {})
    done = knell(*command, exit_code=1)
    assert (done["revoked"], done["known"], done["expired"], done["stopped"]) == (2, 0, 1, None)
    (bad,) = done["bad"]
    assert "control character" in bad["why"]
    denied = _denied(store)
    leeway = place.rules.leeway_seconds
    assert {jti: each.expires_at for jti, each in denied.items()} == {jti: exp + leeway for jti, exp in tokens[:2]}
    assert {each.reason for each in denied.values()} == {"imported from a blacklist"}
    again = knell(*command, exit_code=1)
    assert (again["revoked"], again["known"], len(_denied(store))) == (0, 2, 2)


def test_simplejwt_goes_on_after_a_row(tables: tuple[Path, list[tuple[str, int]]]) -> None:
    """`after` leaves out what comes before it, and pages meet without a gap."""
    path, _ = tables
    entries = list(from_simplejwt(f"sqlite:///{path}"))
    assert list(from_simplejwt(f"sqlite:///{path}", after=int(entries[1].position))) == entries[2:]


def test_times_without_a_zone(tmp_path: Path) -> None:
    """A time without a zone is of the zone that is named; one that is no time is a bad entry, and so is no jti."""
    path = tmp_path / "db.sqlite3"
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            "create table token_blacklist_outstandingtoken (id, jti, expires_at);"
            "create table token_blacklist_blacklistedtoken (id, token_id);"
            "insert into token_blacklist_blacklistedtoken values (1, 1), (2, 2), (3, 3);"
            "insert into token_blacklist_outstandingtoken values (1, 'a', '2026-01-01 12:00:00'), (2, 'b', 'soon'), "
            "(3, null, '2026-01-01 12:00:00')"
        )
    entries = from_simplejwt(f"sqlite:///{path}", timezone=ZoneInfo("Europe/Berlin"))
    assert list(entries) == [
        Listed("1", "a", 1767265200.0),
        Bad("2", "its expires_at is no time"),
        Bad("3", "its jti is a NoneType"),
    ]


def test_a_source_that_cannot_be_read(knell: Knell, tmp_path: Path) -> None:
    """A wrong URL is exit code 2, a source that does not answer 3; neither shows a password."""
    wrong = knell.run("import", "simplejwt", "--iss", ISS, "--from", "nosuchdb://ann:hunter2@host/db")
    assert (wrong.exit_code, "hunter2" in wrong.output) == (2, False)
    wrong = knell.run("import", "redis", "--iss", ISS, "--from", "http://ann:hunter2@host/db")
    assert (wrong.exit_code, "hunter2" in wrong.output) == (2, False)
    away = knell.run("import", "redis", "--iss", ISS, "--from", "redis://ann:hunter2@127.0.0.1:1/0")
    assert (away.exit_code, "hunter2" in away.output) == (3, False)
    assert knell("import", "simplejwt", "--iss", ISS, "--from", f"sqlite:///{tmp_path}/no.db", exit_code=3)["stopped"]
    assert knell.run("import", "simplejwt", "--iss", ISS, "--from", "sqlite://", "--timezone", "Mars").exit_code == 2


# ---- Redis


@pytest.mark.redis
def test_a_plain_redis_blacklist(redis_url: str, knell: Knell, store: Store) -> None:
    """Keys with a prefix are revoked until their time to live ends, those without one for the longest lifetime."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
        client.set("black[list]:a", "", ex=600)
        client.set("black[list]:b", "1")
        client.set("blackl:c", "", ex=600)
        client.set(b"black[list]:\xff", "")
        client.set(f"black[list]:{SigningKey.generate().sign({'jti': 'x'}, typ='JWT')}", "", ex=600)
    command = ("import", "redis", "--iss", ISS, "--from", redis_url, "--prefix", "black[list]:", "--reason", "moved")
    before = time.time()
    done = knell(*command, exit_code=1)
    assert (done["revoked"], done["known"], done["expired"]) == (2, 0, 0)
    assert sorted(bad["why"] for bad in done["bad"]) == [
        "it is no text in UTF-8",
        "this is a whole token; its jti is needed",
    ]
    assert "eyJ" not in json.dumps(done)
    denied = _denied(store)
    assert denied.keys() == {"a", "b"}
    assert before + 600 <= denied["a"].expires_at <= time.time() + 611
    assert denied["b"].expires_at >= before + 86_400
    assert denied["a"].reason == "moved"
    assert knell(*command, exit_code=1)["known"] == 2


@pytest.mark.redis
def test_a_set_of_jtis(redis_url: str, knell: Knell, store: Store) -> None:
    """The members of a set are revoked."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
        client.sadd("revoked", *(f"j{n}" for n in range(3)))
    done = knell("import", "redis", "--iss", ISS, "--from", redis_url, "--set", "revoked")
    assert (done["revoked"], done["bad"]) == (3, [])
    assert _denied(store).keys() == {"j0", "j1", "j2"}


@pytest.mark.redis
def test_more_keys_than_a_page(redis_url: str) -> None:
    """Every key is read, whatever their number."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
        client.mset({f"b:{n}": "" for n in range(2500)})
    assert {entry.jti for entry in from_redis(redis_url, prefix="b:") if isinstance(entry, Listed)} == {
        str(n) for n in range(2500)
    }


# ---- interruptions


class Failing:
    """A store that goes away at its third revocation."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def revoke(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise StoreUnavailable("gone")
        return self._store.revoke(*args, **options)


def test_an_import_that_is_stopped_goes_on(place: Settings, store: Store) -> None:
    """With the store away it stops, says where, and a second run does the rest, once each."""
    entries = [Listed(str(n), f"t{n}", time.time() + 600) for n in range(5)]
    failing: Any = Failing(store)
    with Issuer(ISS, SigningKey.generate(), settings=place, store=failing) as issuer:
        report = import_blacklist(issuer, entries, leeway_seconds=10)
        assert report.stopped is not None
        assert (report.revoked, report.position) == (2, "1")
        report = import_blacklist(issuer, entries, leeway_seconds=10)
        assert (report.revoked, report.known, report.stopped, report.position) == (3, 2, None, "4")
    assert len(_denied(store)) == 5


def test_what_has_just_expired_is_imported_still(place: Settings, store: Store) -> None:
    """A verifier may forgive the leeway, so that a token counts as alive until then."""
    now = time.time()
    entries = [Listed("1", "within", now - 5), Listed("2", "beyond", now - 20)]
    with Issuer(ISS, SigningKey.generate(), settings=place, store=store) as issuer:
        report = import_blacklist(issuer, entries, leeway_seconds=10, clock=lambda: now)
    assert (report.revoked, report.expired) == (1, 1)


def test_errors_of_a_source_are_typed() -> None:
    """A URL that cannot be used, and a database that is away, are told apart."""
    with pytest.raises(InvalidInput):
        next(from_simplejwt("not a url"))
    with pytest.raises(Unavailable):
        next(from_redis("redis://127.0.0.1:1/0", prefix=""))


def test_an_import_goes_on_past_what_was_undone(store: Store, place: Settings) -> None:
    """What somebody has let live again stays alive, and is told; what comes after it on the list is revoked."""
    entries = [Listed(str(n), f"t{n}", time.time() + 600) for n in range(3)]
    with Issuer(ISS, notice_key=SigningKey.generate(), settings=place) as issuer:
        import_blacklist(issuer, entries[:2], leeway_seconds=10)
        issuer.undo(_denied(store)["t0"].id)
        report = import_blacklist(issuer, entries, leeway_seconds=10)
        assert (report.revoked, report.known, report.position) == (1, 1, "2")
        (bad,) = report.bad
        assert (bad.position, "undone" in bad.why) == ("0", True)
        assert sorted(_denied(store)) == ["t1", "t2"]
        with pytest.raises(InvalidRevocation, match="the limit is 1024"):
            import_blacklist(issuer, [], leeway_seconds=10, reason="x" * 2000)
