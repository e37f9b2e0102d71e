"""What a refresh must not bring back to life."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from knell import Issuer, SessionEnded, SessionRevoked, Settings
from knell.errors import InvalidClaims
from knell.keys import SigningKey
from knell.publisher import connect
from knell.settings import Rules
from knell.topology import declare

ISS = "https://auth.example"


@pytest.fixture(params=["sqlite", "redis"])
def make(request: pytest.FixtureRequest, settings: Callable[..., Settings]) -> Iterator[Callable[..., Issuer]]:
    made: list[Issuer] = []
    where = {"store_url": request.getfixturevalue("redis_url")} if request.param == "redis" else {}

    def _make(**rules: Any) -> Issuer:
        chosen = settings(rules=Rules(**rules), **where)
        with connect(chosen) as connection:
            declare(connection, [], settings=chosen)
        made.append(Issuer(ISS, SigningKey.generate(), settings=chosen))
        return made[-1]

    yield _make
    for issuer in made:
        issuer.close()


@pytest.mark.parametrize("life", ["session_exp", "grace", "another token"])
def test_a_revoked_token_is_not_refreshed(make: Callable[..., Issuer], life: str) -> None:
    """Its session lives on, and whoever has stolen the one token does not get another for it."""
    issuer = make(session_grace_seconds=600 if life == "grace" else 0)
    more = {"session_exp": time.time() + 3600} if life == "session_exp" else {}
    stolen = issuer.issue({"sub": "alice", "sid": "s", **more}, ttl_seconds=60)
    mine = issuer.refresh(stolen.token, ttl_seconds=61)
    revoked = issuer.revoke("token", {"jti": stolen.ref.jti}, reason="stolen")
    with pytest.raises(SessionRevoked) as refused:
        issuer.refresh(stolen.token, ttl_seconds=600)
    assert (refused.value.revocation_id, refused.value.reason) == (revoked.id, "stolen")
    with pytest.raises(SessionRevoked):
        issuer.refresh(stolen.token, ttl_seconds=600, reopen=True)
    assert issuer.refresh(mine.token, ttl_seconds=60).recorded == "store"


def test_the_last_token_of_a_session_takes_the_session_with_it(make: Callable[..., Issuer]) -> None:
    """The token was the session: there is nothing to carry on, and the token is revoked besides."""
    issuer = make()
    issued = issuer.issue({"sub": "alice", "sid": "s"}, ttl_seconds=60)
    issuer.revoke("token", {"jti": issued.ref.jti})
    with pytest.raises((SessionRevoked, SessionEnded)):
        issuer.refresh(issued.token, ttl_seconds=60)


def test_a_refused_refresh_leaves_nothing_behind(make: Callable[..., Issuer]) -> None:
    """The token that was not given out has no timer, and no entry on the denylist."""
    issuer = make()
    stolen = issuer.issue({"sub": "alice", "sid": "s", "session_exp": time.time() + 3600}, ttl_seconds=60)
    issuer.revoke("token", {"jti": stolen.ref.jti})
    store = issuer._store
    before = store.due(before=2.0**39), store.head()
    with pytest.raises(SessionRevoked):
        issuer.refresh(stolen.token, ttl_seconds=600)
    assert (store.due(before=2.0**39), store.head()) == before


def test_a_session_stays_its_subjects(make: Callable[..., Issuer]) -> None:
    """A refresh under another sub would escape the revocation of the one who logged in."""
    issuer = make()
    issued = issuer.issue({"sub": "alice", "sid": "s"}, ttl_seconds=60)
    with pytest.raises(InvalidClaims, match="sub"):
        issuer.refresh(issued.token, ttl_seconds=60, claims={"sub": "bob"})
