"""One account for each role on Redis: what it is enough for, with the processes running, and what it is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis

from knell import Issuer, TokenRevoked, Verifier
from knell.errors import StoreUnavailable
from knell.keys import SigningKey
from knell.settings import Settings
from knell.store import open_store
from knell.stores.redis import RedisStore
from knell.stores.redis_accounts import service_account, store_accounts
from knell.tokens import TokenRef
from tests.contract.by_role import PASSWORD, let_in, url_of
from tests.deployment import ROOT, Deployment, environ_of, on_servers, until
from tests.servers import RabbitServer, RedisServer, start_redis

pytestmark = pytest.mark.redis

ISS = "https://issuer.example"
KEY = SigningKey.generate()
# A command is refused by one text, and a script's by another.
REFUSED = r"(?i)no permission|user executing the script can't"
KNELL = Path(sys.executable).with_name("knell")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server whose accounts are these tests' own."""
    one = start_redis(tmp_path_factory.mktemp("redis"))
    yield one
    one.kill()


@pytest.fixture
def namespace() -> str:
    return f"t{uuid4().hex[:10]}"


@pytest.fixture
def settings(server: RedisServer, namespace: str) -> Settings:
    return Settings(namespace=namespace, broker_url="amqp://none", store_url=server.url)


@pytest.fixture
def url(server: RedisServer, settings: Settings) -> Callable[[str], str]:
    """Makes the accounts, and tells the URL of a role, or of "service-<name>"."""
    made = [*store_accounts(settings), service_account(settings, "shop"), service_account(settings, "partner")]
    for account in made:
        let_in([server], account)
    return lambda role: next(url_of(each, server.url) for each in made if each.name == f"{settings.namespace}-{role}")


@pytest.fixture
def client(url: Callable[[str], str]) -> Iterator[Callable[[str], redis.Redis]]:
    """A plain client under the account of a role: whoever has its password."""
    opened: list[redis.Redis] = []

    def open_one(role: str) -> redis.Redis:
        opened.append(redis.Redis.from_url(url(role), protocol=2))
        return opened[-1]

    yield open_one
    for each in opened:
        each.close()


# ---- the processes


@pytest.mark.rabbitmq
def test_every_process_runs_under_its_own_account(
    tmp_path: Path, server: RedisServer, rabbitmq_server: RabbitServer, broker_url: str
) -> None:
    """Issue, expire, revoke, undo, on accounts with no more than their rights; the server has refused nothing."""
    settings = on_servers(tmp_path, rabbitmq_server, broker_url, server.url, sweep_interval_seconds=1.0)
    issuer, notifier, verifier, operator = (
        replace(settings, store_url=url_of(account, server.url), dedupe_url="") for account in store_accounts(settings)
    )
    shop = service_account(settings, "shop")
    for account in (*store_accounts(settings), shop):
        let_in([server], account)
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "LOG", "RESET")
    deployment = Deployment(tmp_path, operator)
    deployment.prepare(["shop"])
    deployment.store.head()  # a verifier, which may not, would try to begin an empty store
    own_store = {"KNELL_STORE_URL": f"sqlite:///{tmp_path}/none.db", "KNELL_DEDUPE_URL": url_of(shop, server.url)}
    try:
        deployment.start_notifier(KNELL_STORE_URL=notifier.store_url, KNELL_DEDUPE_URL=notifier.store_url)
        deployment.start_service("shop", **own_store)
        with (
            Issuer(ISS, KEY, settings=issuer) as issues,
            Verifier(KEY, algorithms=["EdDSA"], issuer=ISS, audience="api", settings=verifier) as verifies,
        ):
            claims = {"sub": "alice", "aud": "api"}
            short = issues.issue(claims | {"sid": "s1"}, ttl_seconds=2)
            long = issues.issue(claims | {"sid": "s2"}, ttl_seconds=600)
            assert verifies.verify(long.token)["sid"] == "s2"
            deployment.wait_for_records(1, event="token", jti=short.ref.jti)
            revoked = issues.revoke(scope="subject", match={"sub": "alice"}, actor="test")
            deployment.wait_for_records(1, cause="revoked")
            until(lambda: _is_done(issues, revoked.id), what="a receipt")
            until(lambda: _is_refused(verifies, long.token), what="a refusal")
            issues.undo(revoked.id, actor="test")
            until(lambda: not _is_refused(verifies, long.token), what="an acceptance")
        done = subprocess.run(
            [KNELL, "doctor"],
            cwd=ROOT, env=deployment.inherited, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "did not answer or refused" not in done.stdout + done.stderr
        with redis.Redis.from_url(server.url, decode_responses=True, protocol=2) as admin:
            refused: Any = admin.execute_command("ACL", "LOG")
        assert refused == []
    finally:
        deployment.stop()


def _is_done(issuer: Issuer, revocation_id: str) -> bool:
    status = issuer.status(revocation_id)
    return status is not None and status["shop"].state == "done"


def _is_refused(verifier: Verifier, token: str) -> bool:
    try:
        verifier.verify(token)
    except TokenRevoked:
        return True
    return False


# ---- what a stolen password is not good for


@pytest.fixture
def filled(settings: Settings, url: Callable[[str], str]) -> Iterator[RedisStore]:
    """A store with a token, a session and a dedupe record in it; opened as the server's own user."""
    store = open_store(settings.store_url, namespace=settings.namespace)
    assert isinstance(store, RedisStore)
    store.add_service("shop")
    store.track([TokenRef(iss=ISS, jti="t1", exp=store.time() + 600, sid="s1", sub="alice")])
    store.begin("partner", "e0-x", holder="h", lease_seconds=30)
    yield store
    store.close()


# What each role has no business with: F is the feed's tag, P that of the tokens.
FORBIDDEN = {
    "verifier": [
        "HSET F:m pos 0", "XADD F:f * k undone", "ZREM F:p x", "HDEL F:v x", "DEL F:f", "HGETALL P:i", "HGETALL P:t:1",
        "HGETALL F:n:x", "HGETALL F:k:shop:x", "HGETALL F:s", "GET F:a:x", "ZRANGE F:y:x 0 -1", "HGETALL F:ae",
        "SCRIPT LOAD return", "EVAL return 0", "EVALSHA_RO x 1 F", "KEYS *", "SCAN 0", "RANDOMKEY", "CONFIG GET *",
        "MONITOR", "FLUSHALL", "ACL LIST", "CLIENT LIST", "DUMP F:v", "OBJECT ENCODING P:m", "EXISTS P:m", "SHUTDOWN",
    ],
    "service-shop": [
        "HMGET F:k:partner:e0-x h", "HSET F:k:partner:e0-x d x", "DEL F:k:partner:e0-x", "ZADD F:kx:partner 0 e0-x",
        "ZREM F:kx:partner e0-x", "HMGET F:m pos", "XRANGE F:f - +", "HGETALL F:v", "HSET F:v x y", "XADD F:f * k x",
        "HGETALL P:t:1", "HGET P:i x", "HGETALL F:n:x", "HGETALL F:s", "HSET F:s x y", "HGETALL F:pd", "HGETALL F:ae",
        "EVALSHA x 1 P", "INFO", "KEYS *", "SCAN 0", "FLUSHALL", "CONFIG GET *", "SREM F:ks partner", "MONITOR",
    ],
    "issuer": [
        "HSET F:s x 1", "HDEL F:s shop", "SADD F:gone shop", "HGETALL F:k:shop:x", "HGETALL F:pd", "HGETALL F:pj",
        "HSET F:le sweep x", "XTRIM F:f MAXLEN 0", "XRANGE F:f - +", "DEL F:f", "DEL F:m", "LPOP P:l:1",
        "HSET P:n:x b y", "ZADD P:o 0 x", "HGET F:ae x", "HDEL F:ae x", "ZREM F:ai x", "KEYS *", "SCAN 0", "FLUSHALL",
        "CONFIG GET *", "MONITOR", "EVAL return 0", "DUMP P:t:1",
    ],
    "notifier": [
        "HSET F:s x 1", "HDEL F:s shop", "SADD F:gone shop", "HGET F:ae x", "DEL F:m", "DEL F:v", "DEL F:f",
        "HGETALL P:t:1", "HGETALL P:j", "ZRANGEBYLEX F:pk - +", "KEYS *", "SCAN 0", "FLUSHALL", "CONFIG GET *",
        "MONITOR", "EVAL return 0",
    ],
    "operator": [
        "HGETALL F:k:shop:x", "HDEL F:ae x", "DEL F:m", "KEYS *", "SCAN 0", "FLUSHALL", "CONFIG GET *", "MONITOR",
    ],
}  # fmt: skip


@pytest.mark.parametrize("role", FORBIDDEN)
def test_what_a_role_does_not_need_it_may_not_do(
    role: str, settings: Settings, client: Callable[[str], redis.Redis]
) -> None:
    """Each of these is refused by the server itself, whatever the program does."""
    tags = {"F": f"{{{settings.namespace}:feed}}", "P": f"{{{settings.namespace}:feed}}:0"}
    for line in FORBIDDEN[role]:
        words = [
            tags[word[0]] + word[1:] if word[:2] in ("F:", "P:") or word in ("F", "P") else word
            for word in line.split()
        ]
        if words[0] == "EVAL":
            words.append("0")
        with pytest.raises(redis.exceptions.NoPermissionError):
            client(role).execute_command(*words)


def test_another_namespace_is_not_to_be_seen(
    server: RedisServer, settings: Settings, client: Callable[[str], redis.Redis]
) -> None:
    """An account of one environment has no rights in another on the same server, nor in another service's records."""
    other = f"{settings.namespace}2"
    for role, command in (
        ("verifier", ("HMGET", f"{{{other}:feed}}:m", "pos")),
        ("issuer", ("HSET", f"{{{other}:feed}}:m", "pos", "1")),
        ("service-shop", ("HMGET", f"{{{other}:feed}}:k:shop:x", "h")),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            client(role).execute_command(*command)


@pytest.mark.usefixtures("filled")
def test_a_script_has_no_more_rights_than_who_runs_it(settings: Settings, client: Callable[[str], redis.Redis]) -> None:
    """A service can bring a script of its own, and reads no token and writes no denylist with it."""
    feed = f"{{{settings.namespace}:feed}}"
    for text in (
        f"return redis.call('HGETALL', '{feed}:v')",
        f"return redis.call('HSET', '{feed}:m', 'pos', 0)",
        f"return redis.call('HGET', '{feed}:0:i', 'x')",
        f"return redis.call('HMGET', '{feed}:k:partner:e0-x', 'h')",
    ):
        service = client("service-shop")
        sha = service.script_load(text)
        with pytest.raises(redis.ResponseError, match=REFUSED):
            service.evalsha(sha, 1, feed)


def test_calls_of_another_role_are_refused_by_the_store(
    filled: RedisStore, settings: Settings, url: Callable[[str], str]
) -> None:
    """What a stolen password lets nobody do is StoreUnavailable, and nothing was changed."""
    opened = {
        role: open_store(url(role), namespace=settings.namespace)
        for role in ("verifier", "service-shop", "issuer", "notifier")
    }
    calls: list[tuple[str, Callable[[Any], object]]] = [
        ("verifier", lambda store: store.track([TokenRef(iss=ISS, jti="t2", exp=store.time() + 60)])),
        ("verifier", lambda store: store.session(ISS, "s1")),
        ("verifier", lambda store: store.begin("shop", "e0-x", holder="h", lease_seconds=1)),
        ("service-shop", lambda store: store.begin("partner", "e0-x", holder="h", lease_seconds=1)),
        ("service-shop", lambda store: store.head()),
        ("service-shop", lambda store: store.services()),
        ("issuer", lambda store: store.add_service("rogue")),
        ("issuer", lambda store: store.claim(int(store.time()) - 1, services=[])),
        ("issuer", lambda store: store.parked()),
        ("issuer", lambda store: store.lease("sweep", holder="h", seconds=60)),
        ("notifier", lambda store: store.remove_service("shop")),
        ("notifier", lambda store: store.audit()),
    ]
    for role, call in calls:
        with pytest.raises(StoreUnavailable, match=REFUSED):
            call(opened[role])
    assert [service.name for service in filled.services()] == ["shop"]
    assert filled.begin("partner", "e0-x", holder="h", lease_seconds=30).granted
    for store in opened.values():
        store.close()


def test_a_verifier_waits_for_an_empty_store(settings: Settings, url: Callable[[str], str]) -> None:
    """It may not begin one; the first write by somebody else is an epoch that it notices, and no alarm."""
    verifier = open_store(url("verifier"), namespace=settings.namespace)
    before = verifier.head()
    assert verifier.changes(before) == []
    issuer = open_store(url("issuer"), namespace=settings.namespace)
    assert issuer.head().epoch != before.epoch
    assert verifier.head() == issuer.head()
    for store in (verifier, issuer):
        store.close()


# ---- the command


def test_the_command_prints_what_redis_takes(server: RedisServer, settings: Settings) -> None:
    """What `knell store permissions` prints is run as it is; run again, it leaves passwords and takes rights away."""
    with redis.Redis.from_url(server.url, protocol=2, decode_responses=True) as admin:
        open_store(server.url, namespace=settings.namespace).add_service("shop")
        printed = _knell(settings, "store", "permissions").splitlines()
        names = [
            f"{settings.namespace}-{role}" for role in ("issuer", "notifier", "verifier", "operator", "service-shop")
        ]
        assert [line.split()[:3] for line in printed] == [["ACL", "SETUSER", name] for name in names]
        fed = subprocess.run(
            ["redis-cli", "-p", str(server.port)], input="\n".join(printed), capture_output=True, text=True, timeout=20
        )
        assert fed.stdout.split() == ["OK"] * 5
        verifier = names[2]
        assert "off" in admin.execute_command("ACL", "GETUSER", verifier)[1]
        admin.execute_command("ACL", "SETUSER", verifier, "on", f">{PASSWORD}", "+flushall", "~*")
        admin.execute_command(*printed[2].split())
        assert admin.execute_command("ACL", "DRYRUN", verifier, "FLUSHALL") != "OK"
        with redis.Redis(port=server.port, username=verifier, password=PASSWORD) as client:
            assert client.ping()


def test_services_elsewhere_have_accounts_elsewhere(settings: Settings) -> None:
    """With a dedupe URL of its own the store has no account for services, and --dedupe prints those."""
    apart = replace(settings, dedupe_url="redis://elsewhere/3?client_name=shop")
    assert "-service-" not in _knell(apart, "store", "permissions", "shop")
    [line] = _knell(apart, "store", "permissions", "--dedupe", "shop").splitlines()
    assert f"{settings.namespace}-service-shop" in line
    assert "+select" in line
    assert "+client|setname" in line


def _knell(settings: Settings, *arguments: str) -> str:
    done = subprocess.run(
        [KNELL, *arguments],
        cwd=ROOT, env={"PATH": "/usr/bin:/bin"} | environ_of(settings), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
