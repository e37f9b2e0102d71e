"""With the store away, a call of the issuer waits for it once, whatever the call has to do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn

import pytest

from knell import Issuer, Settings, Unavailable
from knell.errors import BrokerUnavailable, StoreUnavailable
from knell.keys import SigningKey
from knell.settings import Rules

ISS = "https://auth.example"


class Away:
    """A store that never answers, and counts how often it was asked."""

    rules = Rules()

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        def ask(*_: object, **__: object) -> NoReturn:
            self.asked.append(name)
            raise StoreUnavailable("it does not answer")

        return ask

    def close(self) -> None:
        """Nothing is open."""


class Refusing:
    """A broker that takes nothing, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def send(self, messages: Any) -> Future[None]:
        """What Publisher.send promises."""
        self.calls += 1
        future: Future[None] = Future()
        future.set_exception(BrokerUnavailable("it does not answer either"))
        return future


@pytest.mark.parametrize(
    "call",
    [
        lambda issuer: issuer.issue({"sub": "alice", "sid": "s"}, ttl_seconds=60),
        lambda issuer: issuer.refresh({"iss": ISS, "sid": "s", "jti": "j"}, ttl_seconds=60),
        lambda issuer: issuer.track_many({"iss": ISS, "jti": f"j{n}", "exp": 2.0**33} for n in range(3000)),
        lambda issuer: issuer.revoke("session", {"sid": "s"}, wait_for=["shop"]),
    ],
    ids=["issue", "refresh", "track_many", "revoke"],
)
@pytest.mark.parametrize("measured", [False, True], ids=["first call", "later call"])
def test_a_store_that_is_away_is_waited_for_once(
    settings: Callable[..., Settings], call: Callable[[Issuer], object], measured: bool
) -> None:
    """One attempt at the store, one at the broker, and then the policy: each costs its whole time-out."""
    store: Any = Away()
    broker: Any = Refusing()
    rules = Rules(max_token_seconds=2.0**34)
    issuer = Issuer(ISS, SigningKey.generate(), settings=settings(rules=rules), store=store, publisher=broker)
    if measured:
        issuer._clock.now()
        store.asked.clear()
    with pytest.raises(Unavailable, match="neither"):
        call(issuer)
    assert len(store.asked) == 1
    assert broker.calls == 1
