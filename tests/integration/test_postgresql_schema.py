"""The PostgreSQL store's schema: migrations in two steps, and the rights that each role needs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from knell.errors import StoreUnavailable
from knell.notices import batch_id_of_undo
from knell.settings import Rules, Settings
from knell.store import Parked, Store, open_store
from knell.stores import migrate, sql_audit, sql_denylist, sql_house, sql_postgresql
from knell.stores.migrate import Migration, next_migrations
from knell.stores.sql import SqlStore
from knell.stores.sql_schema import REVISION, make_tables
from knell.tokens import TokenRef
from tests.commandline import Knell
from tests.contract.making import BEGAN, ISS, Clock, done, noted, record, revocation, token
from tests.schemas import Schemas, granted, role_url
from tests.servers import PostgresServer

pytestmark = pytest.mark.postgresql
LATER = '''
from alembic import op
revision, down_revision, step = "{revision}", "{before}", "{step}"
def upgrade() -> None:
    op.execute("""{sql}""")
'''


@pytest.fixture
def namespace(postgresql_server: PostgresServer) -> Iterator[str]:
    """The name of a schema that is not there yet; one with a "-" in it, which has to be quoted."""
    name = f"t-{uuid4().hex[:12]}"
    yield name
    postgresql_server.sql(f'DROP SCHEMA IF EXISTS "{name}" CASCADE')


@pytest.fixture
def later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds a migration after the real ones: (revision, the one before, step, SQL)."""
    folder = tmp_path / "migrations"
    shutil.copytree(Path(migrate.__file__).parent / "migrations", folder)
    monkeypatch.setattr(migrate, "MIGRATIONS", str(folder))

    def add(revision: str, before: str, step: str, sql: str) -> None:
        text = LATER.format(revision=revision, before=before, step=step, sql=sql)
        (folder / "versions" / f"r{revision}.py").write_text(text)

    return add


def migrated_to(url: str, namespace: str, revision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Migrate up to a revision, as an older Knell would have."""
    with monkeypatch.context() as patch:
        patch.setattr(
            migrate, "next_migrations", lambda pending, **_: [one for one in pending if one.revision <= revision]
        )
        migrate.upgrade(url, namespace=namespace)


def some_work(store: Store, clock: Clock) -> None:
    """A little of everything, with names of its own."""
    name = uuid4().hex
    store.add_service("shop")
    tokens = [token(f"{name}{n}", sid=f"s{name}{n}", sub=name, iat=clock.now, exp=clock.now + 60) for n in range(3)]
    assert {answer.denied for answer in store.track(tokens)} == {None}
    store.detach(ISS, tokens[0].jti, revocation_id=name)
    assert record(store, revocation("subject", name, now=clock.now)).created
    store.armed(store.due(before=clock.now + 100))
    assert store.track([tokens[1]])[0].denied is not None
    clock.advance(61)
    for second in store.due(before=clock.now):
        claim = store.claim(second, services=["shop"])
        assert claim is not None
        store.settle(claim.batch_id, dead=[0])
    for notice in store.open_notices():
        done(store, "shop", notice.batch_id)
    assert store.begin("shop", name, holder="h", lease_seconds=5).granted
    assert store.mark("shop", name, holder="h", done=1, lease_seconds=0)
    store.park([Parked(id=name, service="shop", queue="q", error="no", at=clock.now, jws="a.b.c")])
    store.unpark([name])
    assert store.lease("sweep", holder="h", seconds=5)
    store.prune()


# ---- what the migrations make


def test_the_migrations_make_what_the_code_uses(postgresql_server: PostgresServer, namespace: str) -> None:
    """Column by column, index by index."""
    migrate.upgrade(postgresql_server.url, namespace=namespace)
    tables = make_tables(namespace, schema=True)
    url = postgresql_server.url.replace("postgresql:", "postgresql+psycopg:")
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        options = {
            "include_schemas": True,
            "include_name": lambda name, kind, _: kind != "schema" or name == namespace,
            "version_table_schema": namespace,
            "compare_type": True,
        }
        assert compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata) == []
        ordered = sqlalchemy.text(
            "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = :name "
            "AND data_type = 'text' AND collation_name IS DISTINCT FROM 'C'"
        )
        assert connection.execute(ordered, {"name": namespace}).all() == []
    engine.dispose()


def test_every_expanding_migration_leaves_old_code_alone(
    postgresql_server: PostgresServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there is as it was: tables, columns, types, constraints; what is new may be left out of an INSERT."""
    url = postgresql_server.url
    known = migrate.state(url, namespace=namespace).pending
    assert [one.revision for one in known][-1] == REVISION
    before: dict[str, Any] = {}
    for migration in known:
        migrated_to(url, namespace, migration.revision, monkeypatch)
        now = _look(url, namespace)
        if migration.kind == "expand":
            for table, columns in before.items():
                assert {name: now[table].pop(name) for name in columns} == columns
                for name, (_, nullable, default) in now[table].items():
                    assert nullable == "YES" or default is not None, f"{table}.{name} has to be filled in"
        before = _look(url, namespace)


def _look(url: str, namespace: str) -> dict[str, dict[str, tuple[Any, ...]]]:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        columns = sqlalchemy.text(
            "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
            "WHERE table_schema = :name"
        )
        checks = sqlalchemy.text(
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE connamespace = CAST(:quoted AS regnamespace)"
        )
        found: dict[str, dict[str, tuple[Any, ...]]] = {}
        for table, name, kind, nullable, default in connection.execute(columns, {"name": namespace}):
            found.setdefault(table, {})[name] = (kind, nullable, default)
        for table, name, definition in connection.execute(checks, {"quoted": f'"{namespace}"'}):
            found[table.rpartition(".")[2]][f"constraint {name}"] = (definition, "YES", None)
    engine.dispose()
    return found


def test_the_code_before_the_audit_log_works_on_the_new_schema(
    postgresql_server: PostgresServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ran at revision 0001, goes on over the upgrade with the store that it has open, and beside the new code."""
    url, clock = postgresql_server.url, Clock()
    migrated_to(url, namespace, "0001", monkeypatch)

    def open_one() -> SqlStore:
        return SqlStore(url, namespace=namespace, rules=Rules(), clock=clock)

    with monkeypatch.context() as patch:
        _as_before_the_audit_log(patch)
        old = open_one()
        some_work(old, clock)
    with closing(open_one()) as new, pytest.raises(StoreUnavailable, match="at revision 0001, and this Knell needs"):
        new.head()
    assert [one.revision for one in migrate.upgrade(url, namespace=namespace)] == ["0002"]
    with closing(open_one()) as new, closing(old):
        for _ in range(2):
            with monkeypatch.context() as patch:
                _as_before_the_audit_log(patch)
                some_work(old, clock)
            some_work(new, clock)
        assert len(new.audit()) == 2
        assert [change.position for change in new.snapshot()] == list(range(1, 6))


def _as_before_the_audit_log(patch: pytest.MonkeyPatch) -> None:
    """The code before 0002 is the code of today without those tables: it has made none of these statements."""
    patch.setattr(sql_postgresql, "REVISION", "0001")
    patch.setattr(sql_audit, "note", lambda tx, entry: None)
    patch.setattr(sql_denylist, "count_names", lambda tx, revocation, amount: None)
    patch.setattr(sql_denylist, "_names", lambda tx, issuers: {})
    prune_past = sql_house._prune_past
    patch.setattr(
        sql_house,
        "_prune_past",
        lambda tx, table, *rest: 0 if table.name == "audit" else prune_past(tx, table, *rest),
    )


# ---- two steps


@pytest.mark.parametrize(
    ("pending", "contract", "due"),
    [
        ("", False, 0),
        ("eec", False, 2),
        ("eec", True, 2),  # not in one go: the old code still needs what the contraction takes
        ("ceec", False, 0),
        ("ceec", True, 3),
        ("cce", True, 3),
        ("cec", True, 2),
    ],
)
def test_which_migrations_are_next(pending: str, contract: bool, due: int) -> None:
    """Expanding ones up to the next contraction; a contraction only when asked for, and only if it is the next."""
    kinds = {"e": "expand", "c": "contract"}
    these = [Migration(f"{n:04}", kinds[kind], "") for n, kind in enumerate(pending, 1)]
    assert next_migrations(these, contract=contract) == these[:due]


def test_a_contraction_waits_to_be_asked_for_and_stops_older_code(
    postgresql_server: PostgresServer, namespace: str, later: Callable[..., None]
) -> None:
    """Code that knows only an earlier version of the schema works until the contraction, and then says what to do."""
    url = postgresql_server.url
    later("0003", REVISION, "expand", "ALTER TABLE meta ADD note text")
    later("0004", "0003", "contract", "UPDATE meta SET value = 2 WHERE name = 'schema'; DROP TABLE leases")
    assert [one.revision for one in migrate.upgrade(url, namespace=namespace)] == ["0001", "0002", "0003"]
    assert migrate.upgrade(url, namespace=namespace) == []
    with closing(open_store(url, namespace=namespace)) as store:
        assert store.head().position == 0
    assert [one.revision for one in migrate.upgrade(url, namespace=namespace, contract=True)] == ["0004"]
    with (
        closing(open_store(url, namespace=namespace)) as store,
        pytest.raises(StoreUnavailable, match=r"has version 2, and this Knell knows version 1; .*upgrade this one"),
    ):
        store.head()


def test_a_migration_that_fails_changes_nothing(
    postgresql_server: PostgresServer, namespace: str, later: Callable[..., None]
) -> None:
    """All of them or none, and the error says why."""
    url = postgresql_server.url
    later("0003", REVISION, "expand", "CREATE TABLE more (a int); SELECT 1 / 0")
    with pytest.raises(StoreUnavailable, match="division by zero"):
        migrate.upgrade(url, namespace=namespace)
    assert migrate.state(url, namespace=namespace).revision is None


def test_several_upgrades_at_once_are_one(postgresql_server: PostgresServer, namespace: str) -> None:
    """Processes that start together: one migrates, the others find nothing to do."""
    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(migrate.upgrade, postgresql_server.url, namespace=namespace) for _ in range(3)]
        assert sorted(len(task.result(60)) for task in tasks) == [0, 0, 2]


def test_a_store_does_not_migrate_by_itself(postgresql_server: PostgresServer, namespace: str) -> None:
    """An empty database says which command to run, whatever the role may do."""
    with (
        closing(open_store(postgresql_server.url, namespace=namespace)) as store,
        pytest.raises(StoreUnavailable, match="run `knell store upgrade`"),
    ):
        store.head()
    assert migrate.state(postgresql_server.url, namespace=namespace).revision is None


def test_who_may_not_make_a_schema_is_told_so(postgresql_server: PostgresServer, namespace: str) -> None:
    """An ordinary role upgrades a schema only if it owns it."""
    role = f"r{uuid4().hex[:8]}"
    postgresql_server.sql(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    url = postgresql_server.url_of(role, "secret")
    with pytest.raises(StoreUnavailable, match="permission denied"):
        migrate.upgrade(url, namespace=namespace)
    postgresql_server.sql(f'CREATE SCHEMA "{namespace}" AUTHORIZATION {role}')
    assert migrate.upgrade(url, namespace=namespace)
    with closing(open_store(url, namespace=namespace)) as store:
        assert store.head().position == 0


def test_the_command_upgrades_and_checks(
    postgresql_server: PostgresServer, namespace: str, settings: Callable[..., Settings], later: Callable[..., None]
) -> None:
    """`knell store check` says what is to be done, `knell store upgrade` does it, as often as one likes."""
    later("0003", REVISION, "contract", "DROP TABLE leases")
    knell = Knell(settings(store_url=postgresql_server.url, namespace=namespace))
    everything = ["0001", "0002", "0003"]
    assert knell("store", "check", exit_code=1) == {"ok": False, "revision": None, "pending": everything}
    assert "to do: knell store upgrade" in knell.run("store", "check").stdout
    done = knell("store", "upgrade")
    assert done == {"applied": everything[:2], "revision": "0002", "pending": ["0003"]}
    assert knell("store", "upgrade")["applied"] == []
    assert knell("store", "check") == {"ok": True, "revision": "0002", "pending": ["0003"]}
    assert "knell store upgrade --contract" in knell.run("store", "upgrade").stdout
    assert knell("store", "upgrade", "--contract")["applied"] == ["0003"]


def test_the_command_has_nothing_to_do_for_other_stores(settings: Callable[..., Settings]) -> None:
    """SQLite and Redis make what they need by themselves."""
    answer = Knell(settings()).run("store", "upgrade")
    assert answer.exit_code == 2
    assert "by itself" in answer.stderr


# ---- roles


def _verify(store: Store, clock: Clock) -> None:
    store.snapshot()
    store.changes(store.head(), wait_seconds=0.01)


def _serve(store: Store, clock: Clock) -> None:
    batch_id = uuid4().hex
    for _ in range(2):
        store.begin("shop", batch_id, holder="h", lease_seconds=5)
        store.mark("shop", batch_id, holder="h", done=1, lease_seconds=0)


def _issue(store: Store, clock: Clock) -> None:
    name = uuid4().hex
    clock.advance(3600)  # what other tests have left is due by now

    def ref(n: int, **more: Any) -> TokenRef:
        return token(f"{name}{n}", sid=f"{name}{n}", sub=name, iat=clock.now, exp=clock.now + 60 + n, **more)

    store.track([ref(1), ref(2)])
    store.track([ref(1).replace(exp=clock.now + 70)])  # moved to another second: the first one is empty
    store.armed([int(clock.now) + 70])
    store.detach(ISS, f"{name}1", revocation_id="r")
    store.attach(ISS, f"{name}1", revocation_id="r")
    for _ in range(2):  # two by the same names of claims
        made = revocation("claims", {name: "x"}, now=clock.now)
        record(store, made)
        store.count(made, enough=1, within_seconds=1)
        store.status(made.id)
        store.undo(made.id, batch_id=batch_id_of_undo(made.id), jws="u.n.do", audit=noted(made))
        store.open_notices()  # the next undo finds that what was missed through this one was told
    both = [revocation("claims", {name: value}, now=clock.now) for value in ("x", "y")]
    for made in both:
        record(store, made)
    record(store, revocation("session", f"{name}2", now=clock.now))
    store.track([ref(2)])  # denied: it stays as it was
    store.track([ref(3)])
    store.track([ref(3).replace(sid=name)])  # of another session now: the one that it alone was of is gone
    store.session(ISS, f"{name}1")
    store.revocation(both[0].id)
    store.note(noted(both[0]))


def _notify(store: Store, clock: Clock) -> None:
    some_work(store, clock)
    store.add_service("shop")
    store.mark_missed("shop", clock.now)
    store.audit()
    store.parked()
    store.services()


WORK = {"verifier": _verify, "service": _serve, "issuer": _issue, "notifier": _notify}
ROLED = "roled"


@pytest.fixture(scope="module")
def rights(schemas: Schemas, postgresql_server: PostgresServer) -> Iterator[str]:
    """A schema with the roles of docs/deploy.md; the SQL that gives them their rights."""
    schemas.lend(ROLED)
    with closing(open_store(schemas.url, namespace=ROLED)) as store:
        store.add_service("shop")
    with granted(postgresql_server, ROLED) as sql:
        yield sql
    schemas.take_back(ROLED)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def as_role(rights: str, postgresql_server: PostgresServer, clock: Clock) -> Iterator[Callable[[str], SqlStore]]:
    """Opens the store as a role."""
    opened = []

    def open_one(role: str) -> SqlStore:
        url = role_url(postgresql_server, ROLED, role)
        opened.append(SqlStore(url, namespace=ROLED, rules=Rules(), clock=clock))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.mark.parametrize("role", WORK)
def test_a_role_can_do_its_work(as_role: Callable[[str], SqlStore], role: str, clock: Clock) -> None:
    """With the rights of docs/deploy.md, each does what its part of a deployment does."""
    WORK[role](as_role(role), clock)


@pytest.mark.parametrize("role", ["verifier", "service", "issuer"])
def test_a_role_has_no_right_that_it_does_not_need(
    as_role: Callable[[str], SqlStore], rights: str, postgresql_server: PostgresServer, role: str, clock: Clock
) -> None:
    """Without any one of its rights it cannot do its work."""
    store = as_role(role)
    WORK[role](store, clock)
    user = f"{ROLED}_{role}"
    each = [
        (right, table)
        for some, tables, roles in re.findall(r"^GRANT (.*) ON (.*) TO (.*);", rights, re.MULTILINE)
        for right in some.split(", ")
        for table in tables.split(", ")
        if user in roles.split(", ") and "alembic_version" not in table  # looked at once
    ]
    assert len(each) > 3
    for right, table in each:
        postgresql_server.sql(f"REVOKE {right} ON {table} FROM {user}")
        denied = _is_denied(WORK[role], store, clock)
        postgresql_server.sql(f"GRANT {right} ON {table} TO {user}")
        assert denied, f"{role} did without {right} on {table}"


def _is_denied(work: Callable[[Store, Clock], None], store: Store, clock: Clock) -> bool:
    try:
        work(store, clock)
    except StoreUnavailable as error:
        assert "permission denied" in str(error)  # noqa: PT017 - that nothing is raised is an answer too
        return True
    return False


def test_a_role_can_do_no_other_s_work(as_role: Callable[[str], SqlStore]) -> None:
    """The error says that it is a matter of rights."""
    for role, calls in {
        "verifier": (lambda s: record(s, revocation("token", "t")), lambda s: s.track([token()])),
        "service": (lambda s: s.head(), lambda s: s.snapshot(), lambda s: s.due(before=BEGAN)),
        "issuer": (
            lambda s: s.begin("shop", "b", holder="h", lease_seconds=1),
            lambda s: s.add_service("more"),
            lambda s: s.parked(),
        ),
        "notifier": (lambda s: s._database.write(lambda tx: tx.run(sqlalchemy.delete(tx.tables.meta))),),
    }.items():
        store = as_role(role)
        for call in calls:
            with pytest.raises(StoreUnavailable, match=r"permission denied .*rights that each role needs"):
                call(store)
