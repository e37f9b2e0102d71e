"""Revocations of clients, keys, claims and issuers: confirmed, counted, tried dry, and taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from knell import (
    ConfirmationNeeded,
    InvalidRevocation,
    Issuer,
    KeyRevoked,
    Notice,
    Rules,
    Scope,
    Service,
    SessionRevoked,
    Settings,
    TokenRevoked,
    Unavailable,
    Verifier,
)
from knell.keys import SigningKey
from knell.publisher import connect
from knell.store import Store, open_store
from knell.topology import COMMANDS, declare, service_queue
from tests.unit.test_issuer import KEY, waiting

ISS = "https://auth.example"
NOTICE_KEY = SigningKey.generate()
WIDE: list[tuple[str, dict[str, Any], str]] = [
    ("client", {"client_id": "web"}, "web"),
    ("key", {"kid": KEY.kid}, KEY.kid),
    ("claims", {"tenant": "acme", "beta": True}, "beta=true,tenant=acme"),
    ("issuer", {"iss": ISS}, ISS),
]


@pytest.fixture
def deployed(settings: Callable[..., Settings]) -> Settings:
    made = settings(confirm_sessions=2, rules=Rules(tracked_claims=("tenant", "beta")))
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
    with Issuer(ISS, KEY, notice_key=NOTICE_KEY, settings=deployed) as issuer:
        yield issuer


@pytest.fixture
def verifier(deployed: Settings, store: Store) -> Iterator[Verifier]:
    with Verifier(
        {KEY.kid: KEY.verifying_key}, algorithms=["EdDSA"], issuer=ISS, audience=None, settings=deployed
    ) as verifier:
        assert verifier.wait_ready(10)
        yield verifier


def login(issuer: Issuer, n: int, **claims: Any) -> str:
    """A token that each revocation of WIDE names, of a session of its own."""
    named = {"sub": f"user-{n}", "sid": f"s-{n}", "client_id": "web", "tenant": "acme", "beta": True}
    return issuer.issue(named | claims, ttl_seconds=600).token


@pytest.mark.parametrize(("scope", "match", "name"), WIDE, ids=[each[0] for each in WIDE])
def test_what_would_end_many_sessions_is_confirmed_by_name(
    issuer: Issuer, store: Store, scope: str, match: dict[str, Any], name: str
) -> None:
    """Above the limit nothing happens until the revocation's name is passed once more; the audit log has the count."""
    for n in range(3):
        login(issuer, n)
    with pytest.raises(ConfirmationNeeded) as caught:
        issuer.revoke(scope, match)
    assert (caught.value.confirm, caught.value.sessions) == (name, 3)
    with pytest.raises(InvalidRevocation, match="it has to be"):
        issuer.revoke(scope, match, confirm="yes")
    assert store.snapshot() == []
    assert store.audit() == []
    revoked = issuer.revoke(scope, match, confirm=name, actor="alice", reason="leaked")
    assert (revoked.created, revoked.tokens, revoked.sessions) == (True, 3, 3)
    [entry] = store.audit()
    assert (entry.actor, entry.reason, entry.counts) == ("alice", "leaked", {"tokens": 3, "sessions": 3})
    assert entry.what["match"] == match


@pytest.mark.parametrize(("scope", "match", "name"), WIDE, ids=[each[0] for each in WIDE])
def test_what_ends_few_sessions_needs_no_confirming(
    issuer: Issuer, store: Store, verifier: Verifier, scope: str, match: dict[str, Any], name: str
) -> None:
    """Up to the limit it is counted and done: verifiers refuse, a refresh is refused, the notice is on its way."""
    token = login(issuer, 1)
    verifier.verify(token)
    revoked = issuer.revoke(scope, match)
    assert (revoked.sessions, revoked.published) == (1, True)
    verifier._follower.catch_up()
    with pytest.raises(TokenRevoked) as refused:
        verifier.verify(token)
    assert refused.value.revocation_id == revoked.id
    with pytest.raises(KeyRevoked if scope == "key" else SessionRevoked):
        issuer.refresh(token, ttl_seconds=60)
    assert store.audit()[0].counts == {"tokens": 1, "sessions": 1}


@pytest.mark.parametrize(
    ("scope", "match", "name"),
    [*WIDE, ("subject", {"sub": "user-1"}, "")],
    ids=[*(each[0] for each in WIDE), "subject"],
)
def test_a_dry_run_changes_nothing(
    issuer: Issuer, store: Store, deployed: Settings, scope: str, match: dict[str, Any], name: str
) -> None:
    """It says how many live tokens and sessions would end, however many, and asks for no confirming."""
    for n in range(3):
        login(issuer, n)
    found = issuer.revoke(scope, match, dry_run=True)
    number = 1 if scope == "subject" else 3
    assert (found.recorded, found.tokens, found.sessions) == ("dry_run", number, number)
    assert store.snapshot() == []
    assert store.audit() == []
    assert waiting(deployed, service_queue("shop")) == 0


def test_what_cannot_be_counted_is_confirmed(issuer: Issuer) -> None:
    """By claims that are not tracked nobody knows how many sessions end: the name is needed, whatever the number."""
    login(issuer, 1, department="sales")
    assert issuer.revoke("claims", {"department": "sales"}, dry_run=True).sessions is None
    with pytest.raises(ConfirmationNeeded, match=r"it cannot be known how many.*`--confirm department=sales`"):
        issuer.revoke("claims", {"department": "sales"})
    revoked = issuer.revoke("claims", {"department": "sales"}, confirm="department=sales")
    assert (revoked.created, revoked.sessions) == (True, None)


def test_untracked_claims_refuse_at_the_issuer_too(issuer: Issuer, verifier: Verifier) -> None:
    """The issuer has the whole claims set in hand: a refresh is refused, and a new session is not."""
    token = login(issuer, 1, department="sales")
    issuer.revoke("claims", {"department": "sales"}, confirm="department=sales")
    with pytest.raises(SessionRevoked):
        issuer.refresh(token, ttl_seconds=60)
    verifier._follower.catch_up()
    with pytest.raises(TokenRevoked):
        verifier.verify(token)
    verifier.verify(login(issuer, 2, department="sales"))


@pytest.mark.parametrize("tenant", ["globex", ["globex"], None])
def test_a_refresh_with_other_claims_does_not_carry_a_refused_session_on(issuer: Issuer, tenant: Any) -> None:
    """What the old token was refused by refuses the new one, although that no longer has the claim."""
    old, later = login(issuer, 1), login(issuer, 2, tenant="globex")
    issuer.revoke("claims", {"tenant": "acme"})
    with pytest.raises(SessionRevoked):
        issuer.refresh(old, ttl_seconds=60, claims={"tenant": tenant})
    assert issuer.refresh(later, ttl_seconds=60, claims={"tenant": "initech"}).ref.sid == "s-2"
    fresh = login(issuer, 3)
    assert issuer.refresh(fresh, ttl_seconds=60, claims={"tenant": tenant}).ref.sid == "s-3"


def test_an_issuer_whose_key_is_revoked_mints_nothing(issuer: Issuer) -> None:
    """A stolen key is revoked: who goes on with it is told to take another."""
    issuer.revoke("key", {"kid": KEY.kid})
    with pytest.raises(KeyRevoked):
        login(issuer, 1)


def test_nobody_locks_out_the_key_that_signs_notices(issuer: Issuer, store: Store, deployed: Settings) -> None:
    """The key that this very process, or the notifier, signs with has to be another one first."""
    with pytest.raises(InvalidRevocation, match="let another key sign them first"):
        issuer.revoke("key", {"kid": NOTICE_KEY.kid}, confirm=NOTICE_KEY.kid)
    with Issuer(ISS, KEY, notice_key=KEY, settings=deployed) as same, pytest.raises(InvalidRevocation):
        same.revoke("key", {"kid": KEY.kid})
    assert store.snapshot() == []


def test_an_undo_lets_everybody_in_again(issuer: Issuer, store: Store, verifier: Verifier) -> None:
    """Verifiers accept, a refresh works, and the audit log says who took it back."""
    token = login(issuer, 1)
    revoked = issuer.revoke("client", {"client_id": "web"})
    undone = issuer.undo(revoked.id, reason="the wrong client", actor="bob")
    assert (undone.created, undone.published, undone.untold) == (True, True, ("shop",))
    verifier._follower.catch_up()
    verifier.verify(token)
    assert issuer.refresh(token, ttl_seconds=60).recorded == "store"
    [entry, _] = store.audit()
    assert (entry.action, entry.actor, entry.reason) == ("undone", "bob", "the wrong client")
    again = issuer.undo(revoked.id)
    assert (again.created, len(store.audit())) == (False, 2)
    with pytest.raises(InvalidRevocation, match="unknown, or expired"):
        issuer.undo("unknown")


def test_the_only_token_of_a_session_lives_again_with_it(issuer: Issuer) -> None:
    """Revoking it had ended the session; after the undo it is refreshed as before."""
    issued = issuer.issue({"sub": "alice", "sid": "s"}, ttl_seconds=60)
    revoked = issuer.revoke("token", {"jti": issued.ref.jti})
    issuer.undo(revoked.id)
    assert issuer.refresh(issued.token, ttl_seconds=60).recorded == "store"


def test_an_undone_idempotency_key_is_not_silently_used_again(issuer: Issuer) -> None:
    """The caller would believe that the session is revoked."""
    revoked = issuer.revoke("session", {"sid": "s"}, idempotency_key="incident-7")
    issuer.undo(revoked.id)
    with pytest.raises(InvalidRevocation, match="choose another idempotency key"):
        issuer.revoke("session", {"sid": "s"}, idempotency_key="incident-7")


def test_a_waiting_notice_of_an_undone_revocation_is_not_handled(store: Store, deployed: Settings) -> None:
    """It lies in the queue before the undo's notice: the service that takes it up then calls no handler."""
    ended: list[Notice] = []
    with Issuer(ISS, settings=deployed) as trusted:
        revoked = trusted.revoke("subject", {"sub": "alice"})
        trusted.undo(revoked.id)
    shop = Service("shop", settings=deployed)
    shop.on_session_end(ended.append)
    receipt = shop.handle(jws_of(deployed, revoked.id))
    assert receipt is not None
    assert tuple(receipt.done) == (0,)
    assert ended == []
    shop.close()


def jws_of(settings: Settings, revocation_id: str) -> str:
    """The signed notice of a revocation, as the notice log has kept it."""
    from sqlalchemy import create_engine, text

    engine = create_engine(settings.store_url)
    with engine.connect() as connection:
        query = text(f"SELECT jws FROM {settings.namespace}_notices WHERE batch_id = :id")
        found = connection.execute(query, {"id": f"r-{revocation_id}"}).scalar()
    engine.dispose()
    assert isinstance(found, str)
    return found


def test_with_the_store_away_a_wide_one_is_confirmed_and_queued(settings: Callable[..., Settings]) -> None:
    """Nobody can count then: by its name it goes to the broker as a command, without it goes nowhere."""
    away = settings(store_url="redis://127.0.0.1:1/0")
    with connect(away) as connection:
        declare(connection, [], settings=away)
    with Issuer(ISS, KEY, notice_key=NOTICE_KEY, settings=away) as issuer:
        with pytest.raises(ConfirmationNeeded):
            issuer.revoke("client", {"client_id": "web"})
        assert waiting(away, COMMANDS) == 0
        assert issuer.revoke("client", {"client_id": "web"}, confirm="web", actor="alice").recorded == "queued"
        assert waiting(away, COMMANDS) == 1
        with pytest.raises(Unavailable):
            issuer.undo("r-1")


def test_every_scope_is_told_in_words_without_its_values() -> None:
    """What Flower shows has no personal data: the scope and the number."""
    from knell.notices import describe
    from tests.unit.memory_feed import revocation

    values: dict[str, Any] = {"claims": {"tenant": "acme"}, "issuer": ISS}
    shown = {scope: describe([Notice.of_revocation(revocation(scope, values.get(scope, "secret")))]) for scope in Scope}
    assert shown["claims"] == "revoked 1 set of claims (admin)"
    assert shown["client"] == "revoked 1 client (admin)"
    assert not any("secret" in text or "acme" in text for text in shown.values())
