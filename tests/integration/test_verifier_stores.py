"""The verifier on real stores: opened from its settings, revoked through the store, forked."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from knell.errors import TokenRefused, TokenRevoked
from knell.keys import SigningKey
from knell.notices import batch_id_of_revocation
from knell.revocations import Revocation, make_revocation
from knell.settings import Settings
from knell.store import Store, open_store
from knell.verifier import TokenEnd, Verifier
from tests.contract.making import noted
from tests.schemas import Schemas

ISS = "https://auth.example"
KEY = SigningKey.generate()


@pytest.fixture(
    params=["sqlite", *(pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in ("redis", "postgresql"))]
)
def store_settings(
    request: pytest.FixtureRequest, settings: Callable[..., Settings], tmp_path: Path
) -> Callable[[], Settings]:
    """Settings whose store is of each kind, with a namespace of the test's own."""
    if request.param == "postgresql":
        schemas: Schemas = request.getfixturevalue("schemas")
        made = settings(store_url=schemas.url)
        schemas.lend(made.namespace)
    else:
        file = f"sqlite:///{tmp_path / 'store.db'}"
        made = settings(store_url=file if request.param == "sqlite" else request.getfixturevalue("redis_url"))
    return lambda: made


@pytest.fixture
def store(store_settings: Callable[[], Settings]) -> Iterator[Store]:
    """The store as whoever revokes has it."""
    found = store_settings()
    opened = open_store(found.store_url, namespace=found.namespace, rules=found.rules)
    yield opened
    opened.close()


@pytest.fixture
def verifier(store: Store, store_settings: Callable[[], Settings]) -> Iterator[Verifier]:
    """A verifier that opens its store from its settings."""
    with Verifier(KEY, algorithms=["EdDSA"], issuer=ISS, audience="shop", settings=store_settings()) as made:
        yield made


def _token(jti: str = "j1") -> str:
    now = time.time()
    claims = {"iss": ISS, "aud": "shop", "jti": jti, "sub": "alice", "sid": "s1", "iat": now, "exp": now + 600}
    return KEY.sign(claims, typ="at+jwt")


def _revoke(store: Store, scope: str, match: dict[str, str]) -> Revocation:
    made = make_revocation(scope, match, iss=ISS, now=time.time(), rules=store.rules)
    store.revoke(made, batch_id=batch_id_of_revocation(made.id), jws="a.b.c", audit=noted(made))
    return made


def _refused_soon(verifier: Verifier, token: str) -> TokenRefused:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            verifier.verify(token)
        except TokenRefused as error:
            return error
        time.sleep(0.005)
    raise AssertionError("the token was accepted for 20 s")


@pytest.mark.parametrize(
    ("scope", "match"), [("token", {"jti": "j1"}), ("session", {"sid": "s1"}), ("subject", {"sub": "alice"})]
)
def test_a_revocation_reaches_the_verifier(store: Store, verifier: Verifier, scope: str, match: dict[str, str]) -> None:
    """What is revoked through a store, before or after the verifier's start, is refused by it, and watches end."""
    before, token = _token("before"), _token()
    early = _revoke(store, "token", {"jti": "before"})
    with pytest.raises(TokenRevoked) as refused:
        verifier.verify(before)
    assert refused.value.revocation_id == early.id
    ends: queue.Queue[TokenEnd] = queue.Queue()
    verifier.watch(verifier.verify(token), ends.put)
    late = _revoke(store, scope, match)
    assert ends.get(timeout=20).revocation_id == late.id
    error: Any = _refused_soon(verifier, token)
    assert error.revocation_id == late.id


def test_a_forked_child_follows_the_store_by_itself(store: Store, verifier: Verifier) -> None:
    """A verifier in use works on in a forked child, with a connection of the child's own, and in the parent."""
    token = _token()
    assert verifier.verify(token)
    told_r, told_w = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ready = verifier.verify(token)["jti"] == "j1"
            os.write(told_w, b"x")
            os._exit(0 if ready and isinstance(_refused_soon(verifier, token), TokenRevoked) else 1)
        finally:
            os._exit(2)
    os.read(told_r, 1)
    _revoke(store, "token", {"jti": "j1"})
    assert isinstance(_refused_soon(verifier, token), TokenRevoked)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert verifier.resyncs == 0
    os.close(told_r)
    os.close(told_w)
