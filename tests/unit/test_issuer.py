"""The issuer's face, on the embedded default."""

from __future__ import annotations

import asyncio
import json
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any
from uuid import uuid4

import jwt
import pytest
from kombu import Queue

from knell import (
    AsyncIssuer,
    InvalidClaims,
    InvalidRevocation,
    InvalidSettings,
    Issuer,
    SessionEnded,
    SessionRevoked,
    Settings,
    UnknownService,
)
from knell.commands import MAX_TOKENS, CommandReader
from knell.errors import StoreUnavailable, Unavailable
from knell.keys import SigningKey, trust_list
from knell.publisher import connect
from knell.store import Store, open_store
from knell.tokens import TokenRef
from knell.topology import COMMANDS, EXPIRY, declare, service_queue
from tests.contract.making import Clock

ISS = "https://auth.example"
KEY = SigningKey.generate()


@pytest.fixture
def deployed(settings: Callable[..., Settings]) -> Settings:
    made = settings()
    with connect(made) as connection:
        declare(connection, ["shop"], settings=made)
    return made


@pytest.fixture
def store(deployed: Settings) -> Iterator[Store]:
    store = open_store(deployed.store_url, namespace=deployed.namespace, rules=deployed.rules)
    store.add_service("shop")
    yield store
    store.close()


@pytest.fixture
def issuer(deployed: Settings, store: Store) -> Iterator[Issuer]:
    with Issuer(ISS, KEY, settings=deployed) as issuer:
        yield issuer


def everything(store: Store) -> tuple[Any, ...]:
    """What a failed call must not change."""
    return store.due(before=2.0**39), store.head(), store.snapshot(), store.parked(), store.services()


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "ES256", "EdDSA"])
def test_issue_mints_and_tracks(deployed: Settings, store: Store, algorithm: str) -> None:
    """A token in each algorithm has iss, iat, exp, jti and kid, and stands under its expiry second."""
    key = make_key(algorithm)
    with Issuer(ISS, key, settings=deployed) as issuer:
        issued = issuer.issue({"sub": "alice", "sid": "s-1", "aud": "shop"}, ttl_seconds=60.5)
    claims = jwt.decode(issued.token, key.verifying_key, algorithms=[algorithm], audience="shop")
    assert jwt.get_unverified_header(issued.token)["kid"] == key.kid
    assert (claims["iss"], claims["sub"], claims["sid"]) == (ISS, "alice", "s-1")
    assert claims["exp"] - claims["iat"] == pytest.approx(60.5, abs=0.002)
    assert claims["auth_time"] == claims["iat"]
    assert issued.recorded == "store"
    assert issued.ref.second in store.due(before=claims["exp"] + 1)
    assert issued.token not in repr(issued)


class Counted:
    """A store that counts its calls, and is away from the call of a name on that comes after so many others of it."""

    def __init__(self, store: Store, **away_after: int) -> None:
        self._store = store
        self._away_after = away_after
        self._away = False
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            self._away = self._away or self.calls[name] == self._away_after.get(name)
            self.calls[name] += 1
            if self._away:
                raise StoreUnavailable("away")
            return found(*args, **options)

        return call


def many(store: Store, count: int) -> list[TokenRef]:
    """Tokens that end within the next three seconds."""
    now = math.floor(store.time())
    return [TokenRef(iss=ISS, jti=f"t{n}", iat=now, exp=now + 1 + n % 3, sid=f"s{n}") for n in range(count)]


def claimed(store: Store, clock: Clock, seconds: Iterable[int]) -> list[str]:
    """What these seconds have, once they are due."""
    found: list[str] = []
    for second in sorted(seconds):
        clock.reach(second)
        while (claim := store.claim(second, services=["shop"])) is not None:
            found += [entry.ref.jti for entry in claim.entries]
            if not claim.more:
                break
    return found


def commanded(settings: Settings, clock: Callable[[], float]) -> list[list[str]]:
    """What each command on the broker asks to track, as the notifier reads it."""
    reader = CommandReader(trust_list(settings), settings.audience, clock, settings.rules)
    found = []
    with connect(settings) as connection:
        queue = Queue(COMMANDS, channel=connection.channel())
        while (message := queue.get()) is not None:
            message.ack()
            [jws] = json.loads(message.body)[0]
            found.append([ref.jti for ref in reader.track(jws).refs])
    return found


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def still(deployed: Settings, clock: Clock) -> Iterator[Store]:
    """The same store, on a clock that the test moves."""
    store = open_store(deployed.store_url, namespace=deployed.namespace, rules=deployed.rules, clock=clock)
    yield store
    store.close()


def test_thousands_are_tracked_in_a_few_calls_of_the_store(deployed: Settings, still: Store, clock: Clock) -> None:
    """A round trip for each thousand, whatever it is that they have to be asked; every one of them is tracked."""
    counted: Any = Counted(still)
    refs = many(still, 2500)
    with Issuer(ISS, KEY, settings=deployed, store=counted, clock=clock) as issuer:
        found = issuer.track_many(refs)
    assert [each.ref for each in found] == refs
    assert {each.recorded for each in found} == {"store"}
    assert counted.calls["track"] == 3
    # Beside those: the store's clock once, and once for each page that the timers are confirmed of it.
    assert sum(counted.calls.values()) <= 3 + 1 + 3
    assert sorted(claimed(still, clock, {ref.second for ref in refs})) == sorted(ref.jti for ref in refs)


@pytest.mark.parametrize(
    ("away_after", "tracked"),
    [({"time": 0}, 0), ({"track": 0}, 0), ({"track": 1}, 1000)],
    ids=["from the first call", "for the first thousand", "for the second thousand"],
)
def test_with_the_store_away_thousands_are_queued(
    deployed: Settings, still: Store, clock: Clock, away_after: dict[str, int], tracked: int
) -> None:
    """The commands hold all that the store did not take, and a store that is away is not asked for each thousand."""
    counted: Any = Counted(still, **away_after)
    refs = many(still, 2500)
    with Issuer(ISS, KEY, settings=deployed, store=counted, clock=clock) as issuer:
        found = issuer.track_many(refs)
    assert [each.ref for each in found] == refs
    assert [each.recorded for each in found] == ["store"] * tracked + ["queued"] * (2500 - tracked)
    commands = commanded(deployed, clock)
    assert max(len(command) for command in commands) <= MAX_TOKENS
    assert len(commands) == (2500 - tracked) / MAX_TOKENS
    assert sorted(jti for command in commands for jti in command) == sorted(ref.jti for ref in refs[tracked:])
    assert sorted(claimed(still, clock, {ref.second for ref in refs})) == sorted(ref.jti for ref in refs[:tracked])
    assert counted.calls["track"] <= tracked / 1000 + 1


def test_a_second_gets_one_timer(issuer: Issuer, deployed: Settings) -> None:
    """Tokens that end in the same second share a timer on the broker."""
    end = math.floor(time.time()) + 100.5
    issuer.track_many([{"iss": ISS, "jti": str(uuid4()), "iat": time.time(), "exp": end} for _ in range(50)])
    issuer.close()
    assert waiting(deployed, EXPIRY) == 1


def test_refresh_carries_the_session_on(issuer: Issuer) -> None:
    """A refreshed token has the old one's session and claims, a jti of its own, and changes where asked."""
    first = issuer.issue({"sub": "alice", "sid": "s-1", "aud": "shop", "role": "user"}, ttl_seconds=60)
    second = issuer.refresh(first.token, ttl_seconds=120, claims={"role": "admin"})
    assert second.ref.jti != first.ref.jti
    assert (second.ref.sid, second.ref.sub, second.ref.auth_time) == ("s-1", "alice", first.ref.auth_time)
    assert jwt.decode(second.token, options={"verify_signature": False})["role"] == "admin"


def test_refresh_of_a_session_that_has_ended_is_refused(issuer: Issuer) -> None:
    """A session that ended stays ended, unless a new life of it is asked for by name."""
    long_ago = {"iss": ISS, "sub": "alice", "sid": "s-1", "jti": "j-1"}
    with pytest.raises(SessionEnded) as ended:
        issuer.refresh(long_ago, ttl_seconds=60)
    assert (ended.value.iss, ended.value.sid) == (ISS, "s-1")
    assert issuer.refresh(long_ago, ttl_seconds=60, reopen=True).ref.sid == "s-1"


def test_session_exp_ends_tokens_with_the_session(issuer: Issuer) -> None:
    """No token of a session outlives its session_exp."""
    end = round(time.time() + 30, 3)
    issued = issuer.issue({"sub": "alice", "sid": "s-1", "session_exp": end}, ttl_seconds=600)
    assert issued.ref.exp == end


def test_a_dead_session_gets_no_token(issuer: Issuer) -> None:
    """issue, refresh and track say that the session was revoked, by what, and why."""
    first = issuer.issue({"sub": "alice", "sid": "s-1"}, ttl_seconds=60)
    revoked = issuer.revoke("session", {"sid": "s-1"}, reason="stolen laptop")
    for attempt in (
        lambda: issuer.issue({"sub": "alice", "sid": "s-1"}, ttl_seconds=60),
        lambda: issuer.refresh(first.token, ttl_seconds=60, reopen=True),
        lambda: issuer.track(first.ref),
    ):
        with pytest.raises(SessionRevoked) as refused:
            attempt()
        assert (refused.value.revocation_id, refused.value.reason) == (revoked.id, "stolen laptop")


def test_a_subject_may_log_in_again_after_a_revocation(issuer: Issuer) -> None:
    """A cut-off ends what began before it; a refresh does not escape it, a new session does."""
    first = issuer.issue({"sub": "alice", "sid": "s-1"}, ttl_seconds=60)
    issuer.revoke("subject", {"sub": "alice"})
    with pytest.raises(SessionRevoked):
        issuer.refresh(first.token, ttl_seconds=60)
    assert issuer.issue({"sub": "alice", "sid": "s-2"}, ttl_seconds=60).recorded == "store"


def test_a_foreign_token_of_a_dead_session_is_revoked_by_name(issuer: Issuer, store: Store) -> None:
    """Without auth_time only the store knows how old the session is: verifiers are told of the token itself."""
    now = time.time()
    old = {"iss": ISS, "jti": "t-1", "sid": "s-1", "sub": "bob", "iat": now - 10, "exp": now + 60}
    issuer.track(old)
    revoked = issuer.revoke("subject", {"sub": "bob"}, issued_before=now - 1)
    with pytest.raises(SessionRevoked) as refused:
        issuer.track(old | {"jti": "t-2", "iat": now})
    assert refused.value.revocation_id == revoked.id
    assert {"jti": "t-2"} in [dict(change.revocation.match) for change in store.snapshot()]


def test_foreign_tokens_are_checked_before_they_are_believed(deployed: Settings, store: Store) -> None:
    """A raw token of somebody else needs a key to check it with, and a signature that verifies."""
    theirs = SigningKey.generate()
    now = time.time()
    token = jwt.encode(
        {"iss": "https://other", "jti": "t", "iat": now, "exp": now + 60}, theirs.key, "EdDSA", headers={"kid": "k1"}
    )
    with Issuer(ISS, KEY, settings=deployed) as issuer, pytest.raises(InvalidClaims, match="no key checks"):
        issuer.track(token)
    keys = {"https://other": (theirs.verifying_key, "EdDSA")}
    with Issuer(ISS, KEY, settings=deployed, foreign_keys=keys) as issuer:
        assert issuer.track(token).ref.kid == "k1"
        head, payload, _ = token.split(".")
        with pytest.raises(InvalidClaims, match="does not verify") as refused:
            issuer.track(f"{head}.{payload}.{'A' * 86}")
        assert payload not in str(refused.value)


BAD_CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "no jti": ({"jti": None}, "no 'jti'"),
    "no exp": ({"exp": None}, "no 'exp'"),
    "no iss": ({"iss": None}, "no 'iss'"),
    "exp in the past": ({"exp": 1_000_000.0}, "ago"),
    "exp NaN": ({"exp": math.nan}, "finite"),
    "exp infinite": ({"exp": math.inf}, "finite"),
    "exp boolean": ({"exp": True}, "bool"),
    "exp text": ({"exp": "tomorrow"}, "number"),
    "exp in milliseconds": ({"exp": 1.8e12}, "milliseconds"),
    "too long a life": ({"exp": time.time() + 86_400 * 30}, "longest"),
    "jti too long": ({"jti": "j" * 257}, "257 bytes"),
    "jti empty": ({"jti": ""}, "empty"),
    "sid of another type": ({"sid": 7}, "string"),
    "sub with a control character": ({"sub": "a\nb"}, "control"),
    "sub not Unicode": ({"sub": "\ud800"}, "Unicode"),
    "auth_time in the future": ({"auth_time": time.time() + 3600}, "future"),
    "a session too old": ({"auth_time": time.time() - 86_400 * 31, "sid": "s"}, "log in again"),
}


@pytest.mark.parametrize("name", BAD_CLAIMS)
def test_bad_claims_change_nothing(issuer: Issuer, store: Store, name: str) -> None:
    """Claims that cannot be tracked are named, with what to do, and none of a list is tracked."""
    changes, said = BAD_CLAIMS[name]
    good = {"iss": ISS, "jti": "j-1", "iat": time.time(), "exp": time.time() + 60, "sid": "s"}
    before = everything(store)
    with pytest.raises(InvalidClaims, match=said):
        issuer.track_many([good, good | {"jti": "j-2"} | changes])
    assert everything(store) == before


@pytest.mark.parametrize("ttl", [0, -1, math.nan, math.inf, True, "900", 86_401])
def test_a_bad_lifetime_changes_nothing(issuer: Issuer, store: Store, ttl: Any) -> None:
    """ttl_seconds is a finite number above 0, and at most the longest lifetime."""
    before = everything(store)
    with pytest.raises(InvalidClaims, match="ttl_seconds"):
        issuer.issue({"sub": "alice"}, ttl_seconds=ttl)
    assert everything(store) == before


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("galaxy", {"sub": "a"}), {}, "unknown scope"),
        (("subject", {}), {}, "empty"),
        (("subject", {"sub": ""}), {}, "empty"),
        (("subject", {"sid": "s"}), {}, "matches by 'sub'"),
        (("subject", {"sub": "a", "sid": "s"}), {}, "alone"),
        (("subject", {"sub": "a"}), {"issued_before": time.time() + 3600}, "future"),
        (("subject", {"sub": "a"}), {"issued_before": math.nan}, "finite"),
        (("session", {"sid": "s"}), {"issued_before": 1.0}, "absolute"),
        (("session", {"sid": "s" * 300}), {}, "300 bytes"),
        (("session", {"sid": "s"}), {"initiating_entity": "cat"}, "initiating_entity"),
        (("session", {"sid": "s"}), {"reason": "r" * 2000}, "reason"),
    ],
)
def test_a_bad_revocation_changes_nothing(
    issuer: Issuer, store: Store, arguments: tuple[Any, ...], options: dict[str, Any], said: str
) -> None:
    """A revocation that cannot be recorded is refused with what was found, and leaves no trace."""
    before = everything(store)
    with pytest.raises(InvalidRevocation, match=said):
        issuer.revoke(*arguments, **options)
    assert everything(store) == before


def test_a_service_that_nobody_registered_is_not_waited_for(issuer: Issuer, store: Store) -> None:
    """wait_for names registered services; a mistyped one is an error before anything is recorded."""
    before = everything(store)
    with pytest.raises(UnknownService, match="knell services add shpo"):
        issuer.revoke("session", {"sid": "s"}, wait_for=["shpo"])
    assert everything(store) == before


def test_the_result_of_a_revocation_says_what_is_where(issuer: Issuer, store: Store, deployed: Settings) -> None:
    """Recorded in the store, confirmed by the broker, and nobody has answered yet."""
    revoked = issuer.revoke("session", {"sid": "s"}, wait_for=["shop"], timeout_seconds=0.1)
    assert (revoked.recorded, revoked.published, revoked.created) == ("store", True, True)
    assert revoked.services["shop"].state == "waiting"
    assert waiting(deployed, service_queue("shop")) == 1


def test_the_same_idempotency_key_is_one_revocation(issuer: Issuer, store: Store, deployed: Settings) -> None:
    """A repeated call changes nothing and sends nothing."""
    first = issuer.revoke("session", {"sid": "s"}, idempotency_key="incident-7")
    again = issuer.revoke("session", {"sid": "s"}, idempotency_key="incident-7")
    assert (first.id, first.created, again.id, again.created) == ("incident-7", True, "incident-7", False)
    assert len(store.snapshot()) == 1
    assert waiting(deployed, service_queue("shop")) == 1


def test_an_idempotency_key_that_named_another_token_leaves_this_one_alone(issuer: Issuer) -> None:
    """The first revocation counts: the result shows it, and the second token's session lives on."""
    first, second = (issuer.issue({"sid": sid}, ttl_seconds=60) for sid in ("s-1", "s-2"))
    issuer.revoke("token", {"jti": first.ref.jti}, idempotency_key="incident-7")
    again = issuer.revoke("token", {"jti": second.ref.jti}, idempotency_key="incident-7")
    assert (again.created, again.revocation.value) == (False, first.ref.jti)
    assert issuer.refresh(second.token, ttl_seconds=60).recorded == "store"


def test_without_a_key_that_signs_commands_an_outage_of_the_store_is_an_outage(
    settings: Callable[..., Settings],
) -> None:
    """An issuer with a symmetric key alone cannot queue: it does what its policy says, and says what it lacks."""
    secret = SigningKey.load("s" * 32, algorithm="HS256")
    away = settings(store_url="redis://127.0.0.1:1/0", broker_url="amqp://127.0.0.1:1/")
    with Issuer(ISS, secret, settings=away) as strict, pytest.raises(Unavailable, match="KNELL_NOTICE_KEY"):
        strict.issue({"sub": "alice"}, ttl_seconds=60)
    with Issuer(ISS, secret, settings=away, when_unavailable="allow") as lenient:
        assert lenient.issue({"sub": "alice"}, ttl_seconds=60).recorded == "nowhere"


def test_revoking_the_only_token_of_a_session_ends_it(issuer: Issuer) -> None:
    """One of two tokens is a token's end; the last one is the session's too."""
    first = issuer.issue({"sub": "alice", "sid": "s-1"}, ttl_seconds=60)
    second = issuer.refresh(first.token, ttl_seconds=60)
    assert issuer.revoke("token", {"jti": first.ref.jti}).revocation.ends == {"token"}
    last = issuer.revoke("token", {"jti": second.ref.jti})
    assert last.revocation.ends == {"token", "session"}
    assert last.revocation.expires_at == second.ref.exp + 10


def test_a_symmetric_key_never_signs_a_notice(settings: Callable[..., Settings]) -> None:
    """Whoever can verify HS256 could forge a notice: such an issuer needs a notice key."""
    secret = SigningKey.load("s" * 32, algorithm="HS256")
    made = settings()
    with pytest.raises(InvalidSettings, match="forge"):
        Issuer(ISS, secret, notice_key=secret, settings=made)


def test_async_issuer_awaits_the_same(deployed: Settings, store: Store) -> None:
    """The same methods, on an event loop."""

    async def use() -> None:
        async with AsyncIssuer(ISS, KEY, settings=deployed) as issuer:
            issued = await asyncio.gather(*(issuer.issue({"sid": f"s-{n}"}, ttl_seconds=60) for n in range(20)))
            assert len({each.ref.jti for each in issued}) == 20
            refreshed = await issuer.refresh(issued[0].token, ttl_seconds=60)
            assert (await issuer.track(refreshed.ref)).recorded == "store"
            assert len(await issuer.track_many([each.ref for each in issued])) == 20
            revoked = await issuer.revoke("session", {"sid": "s-0"})
            assert (await issuer.status(revoked.id) or {})["shop"].state == "waiting"

    asyncio.run(use())


def make_key(algorithm: str) -> SigningKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if algorithm == "HS256":
        return SigningKey.load(b"0123456789abcdef" * 2, algorithm=algorithm)
    if algorithm == "EdDSA":
        return SigningKey.generate()
    private: Any = (
        rsa.generate_private_key(65537, 2048) if algorithm == "RS256" else ec.generate_private_key(ec.SECP256R1())
    )
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return SigningKey.load(pem, algorithm=algorithm)


def waiting(settings: Settings, queue: str) -> int:
    """Messages on a queue of the embedded broker, those that are not due yet included."""
    with closing(sqlite3.connect(settings.home / "broker.db")) as database:
        found = database.execute("SELECT count(*) FROM message WHERE queue = ?", (queue,)).fetchone()
    return int(found[0])
