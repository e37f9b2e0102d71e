"""The verifier: tokens of every algorithm, attacks, limits, revocations, and what happens out of contact."""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jwt
import pytest
from joserfc import jwk

from knell.errors import (
    DenylistStale,
    InvalidClaims,
    InvalidSettings,
    TokenExpired,
    TokenInvalid,
    TokenRefused,
    TokenRevoked,
)
from knell.keys import SigningKey, thumbprint
from knell.settings import Rules, Settings
from knell.verifier import AVAILABLE, STRICT, Policy, TokenEnd, Verifier
from tests.unit.memory_feed import ISS, MemoryFeed, eventually, revocation
from tests.unit.tokens_for_tests import (
    AUD,
    NOW,
    RFC_7515_KEY,
    RFC_7519,
    RFC_9068,
    SECRET,
    claims,
    key,
    mint,
    pem,
    verifier,
)


@pytest.fixture
def feed() -> MemoryFeed:
    return MemoryFeed(clock=lambda: NOW)


@pytest.fixture
def make(feed: MemoryFeed) -> Iterator[Callable[..., Verifier]]:
    """Makes verifiers on the test's feed, and closes them."""
    made: list[Verifier] = []

    def _make(**changes: Any) -> Verifier:
        made.append(verifier(**{"feed": feed} | changes))
        return made[-1]

    yield _make
    for one in made:
        one.close()


def _b64(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


# ---- tokens that others mint


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256", "PS256", "HS256", "HS512"])
def test_tokens_of_another_library_are_accepted(make: Callable[..., Verifier], algorithm: str) -> None:
    """A token that joserfc signed is accepted, whatever the algorithm, and its claims come back."""
    keys = SECRET if algorithm.startswith("HS") else pem(algorithm)
    assert make(keys=keys, algorithms=[algorithm]).verify(mint(algorithm=algorithm)) == claims()


def test_keys_come_in_every_form(make: Callable[..., Verifier]) -> None:
    """A private PEM, bytes, a JWK, a SigningKey and a public key object each verify the same token."""
    private = pem("EdDSA", private=True)
    signing = SigningKey.load(private, algorithm="EdDSA")
    jwk_of_it = jwt.PyJWK(key("EdDSA").as_dict(private=False), algorithm="EdDSA")
    for keys in (private, private.encode(), pem("EdDSA").encode(), jwk_of_it, signing, signing.verifying_key):
        assert make(keys=keys).verify(mint())["sub"] == "alice"


def test_the_kid_chooses_among_several_keys(make: Callable[..., Verifier]) -> None:
    """With keys by kid, the header's kid decides; an unknown kid, and none, are refused."""
    one = make(keys={"ed": pem("EdDSA"), "ec": pem("ES256")}, algorithms=["EdDSA", "ES256"])
    assert one.verify(mint(kid="ed"))
    assert one.verify(mint(algorithm="ES256", kid="ec"))
    for token in (mint(kid="other"), mint(kid="ec"), mint(algorithm="ES256", kid="ed"), mint()):
        with pytest.raises(TokenInvalid):
            one.verify(token)
    assert make(keys={"ed": pem("EdDSA")}).verify(mint())


def test_the_example_of_rfc_7519(make: Callable[..., Verifier]) -> None:
    """The token of RFC 7519, section 3.1, is refused for want of a jti, and accepted where none is required."""
    given: dict[str, Any] = {"keys": RFC_7515_KEY, "algorithms": ["HS256"], "issuer": "joe", "audience": None}
    now = 1_300_819_000.0
    with pytest.raises(TokenInvalid, match="jti"):
        make(**given, clock=lambda: now).verify(RFC_7519)
    one = make(**given, clock=lambda: now, require=("exp",))
    assert one.verify(RFC_7519) == {"iss": "joe", "exp": 1300819380, "http://example.com/is_root": True}
    now = 1_300_819_380.0
    with pytest.raises(TokenExpired):
        one.verify(RFC_7519)


def test_the_example_of_rfc_9068(make: Callable[..., Verifier]) -> None:
    """The access token of RFC 9068, section 3 (typ at+jwt), signed with a test key, is accepted and can be revoked."""
    payload = RFC_9068
    given: dict[str, Any] = {"issuer": payload["iss"], "audience": payload["aud"], "clock": lambda: 1639528000.0}
    token = mint(payload, typ="at+jwt", kid="RjEwOwOA")
    with pytest.raises(TokenInvalid, match="maximum"):
        make(**given).verify(token)  # the example lives for 245 days
    long = Settings(rules=Rules(max_token_seconds=300 * 86_400.0))
    feed = MemoryFeed(clock=lambda: 1639528000.0)
    one = make(**given, settings=long, feed=feed)
    assert one.verify(token) == payload
    feed.revoke(revocation("token", payload["jti"], iss=payload["iss"], now=1639527000.0))  # type: ignore[arg-type]
    eventually(lambda: _refusal(one, token))


def _refusal(one: Verifier, token: str) -> TokenRefused | None:
    try:
        one.verify(token)
    except TokenRefused as error:
        return error
    return None


# ---- attacks


def _unsigned() -> str:
    return f"{_b64({'alg': 'none', 'typ': 'JWT'})}.{_b64(claims())}."


def _signed_with_the_public_key() -> str:
    import hashlib
    import hmac

    text = f"{_b64({'alg': 'HS256', 'typ': 'JWT'})}.{_b64(claims())}"
    digest = hmac.new(pem("EdDSA").encode(), text.encode(), hashlib.sha256).digest()
    return f"{text}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def _with_header(**header: Any) -> str:
    private = key("EdDSA").private_key
    text = f"{_b64({'alg': 'EdDSA'} | header)}.{_b64(claims())}"
    return f"{text}.{base64.urlsafe_b64encode(private.sign(text.encode())).rstrip(b'=').decode()}"


_NOT_OURS: dict[str, Callable[[], Any]] = {
    "unsigned": _unsigned,
    "unsigned in mixed case": lambda: f"{_b64({'alg': 'nOnE'})}.{_b64(claims())}.",
    "HS256 with the public key": _signed_with_the_public_key,
    "RS256 by a stranger": lambda: mint(algorithm="RS256"),
    "ES256 by a stranger": lambda: mint(algorithm="ES256"),
    "crit": lambda: _with_header(crit=["exp"], exp=1),
    "crit b64": lambda: _with_header(crit=["b64"], b64=True),
    "b64": lambda: _with_header(b64=False),
    "alg is a list": lambda: _with_header(alg=["EdDSA"]),
    "alg is an object": lambda: _with_header(alg={"EdDSA": 1}),
    "kid is a number": lambda: _with_header(kid=5),
    "kid is long": lambda: _with_header(kid="k" * 5000),
    "a notice": lambda: _with_header(typ="knell-notice+jwt"),
    "a command": lambda: _with_header(typ="application/Knell-Command+JWT"),
    "a longer signature": lambda: mint() + "A",
    "a shorter signature": lambda: mint()[:-4],
    "an empty part": lambda: mint().replace(".", "..", 1),
    "a line end": lambda: mint() + "\n",
    "too long": lambda: mint(claims(much="x" * 20_000)),
    "no base64url": lambda: "a.b.c",
    "dots": lambda: "....",
    "nothing": lambda: "",
    "not ASCII": lambda: "é.é.é",
    "no Unicode": lambda: "\udcff.a.b",
    "header is a list": lambda: f"{_b64([1])}.e30.e30",
    "header is a string": lambda: f"{_b64('x')}.e30.e30",
    "header is deep": lambda: base64.urlsafe_b64encode(b"[" * 9000).decode() + ".e30.e30",
    "None": lambda: None,
    "bytes": lambda: mint().encode(),
    "a number": lambda: 5,
}


@pytest.mark.parametrize("name", _NOT_OURS)
def test_what_is_no_token_of_ours_is_refused(make: Callable[..., Verifier], name: str) -> None:
    """Unsigned, confused, critical, foreign and broken tokens are refused, and the error does not have them in it."""
    token = _NOT_OURS[name]()
    with pytest.raises(TokenInvalid) as refused:
        make().verify(token)
    if isinstance(token, str) and len(token) > 40:
        assert not any(part in str(refused.value) for part in token.split(".") if len(part) > 8)


def test_a_header_that_asks_for_nothing_odd_is_accepted() -> None:
    """The hand-made tokens of these tests are accepted when their header asks for nothing odd."""
    with verifier() as one:
        assert one.verify(_with_header(kid="any", typ="at+jwt")) == claims()


@pytest.mark.parametrize(
    "changes",
    [
        {"keys": pem("EdDSA"), "algorithms": ["HS256"]},
        {"keys": pem("EdDSA").encode(), "algorithms": ["HS256"]},
        {"keys": {"a": pem("EdDSA")}, "algorithms": ["HS256"]},
        {"keys": SECRET, "algorithms": ["HS256", "EdDSA"]},
        {"keys": SECRET, "algorithms": ["none"]},
        {"keys": SECRET, "algorithms": []},
        {"algorithms": "EdDSA"},
        {"algorithms": ["RS256"]},
        {"keys": SECRET},
        {"keys": "too short", "algorithms": ["HS256"]},
        {"keys": "x" * 40, "algorithms": ["HS512"]},
        {"keys": {}},
        {"keys": {"": pem("EdDSA")}},
        {"keys": None},
        {"keys": 5, "algorithms": ["HS256"]},
        {"keys": SigningKey.generate(), "algorithms": ["ES256"]},
        {"issuer": ""},
        {"issuer": []},
        {"issuer": None},
        {"audience": ""},
        {"audience": []},
        {"leeway_seconds": 11.0},
        {"leeway_seconds": -1.0},
        {"leeway_seconds": math.nan},
        {"require": "jti"},
    ],
)
def test_what_cannot_be_safe_is_refused_at_construction(changes: dict[str, Any]) -> None:
    """A configuration that mixes, confuses, weakens or forgets something is no verifier, and no key is shown."""
    with pytest.raises(InvalidSettings) as refused:
        verifier(**changes)
    assert SECRET not in str(refused.value)
    assert "BEGIN" not in str(refused.value)


def test_a_small_rsa_key_is_refused() -> None:
    """An RSA key of less than 2048 bits is no key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    small = rsa.generate_private_key(65537, 1024).public_key()
    text = small.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(InvalidSettings, match="1024"):
        verifier(keys=text, algorithms=["RS256"])


# ---- claims


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": ...},
        {"jti": ...},
        {"iss": ...},
        {"aud": ...},
        {"exp": None},
        {"jti": None},
        {"exp": True},
        {"exp": math.nan},
        {"exp": math.inf},
        {"exp": str(int(NOW) + 600)},
        {"exp": (NOW + 600) * 1000},
        {"exp": [1]},
        {"iat": "x"},
        {"iat": NOW + 60},
        {"iat": NOW - 86_400, "exp": NOW + 1},
        {"iat": ..., "exp": NOW + 86_500},
        {"nbf": NOW + 60},
        {"nbf": "x"},
        {"nbf": True},
        {"jti": 5},
        {"jti": ""},
        {"jti": "x" * 257},
        {"jti": "a\nb"},
        {"sid": 5},
        {"sub": 5},
        {"sub": {}},
        {"iss": "https://other.example"},
        {"iss": [ISS]},
        {"aud": "other"},
        {"aud": ["other", "third"]},
        {"aud": {"shop": 1}},
        {"aud": [AUD, 5]},
        {"session_exp": "x"},
        {"auth_time": False},
        {"auth_time": NOW + 3600},
    ],
)
def test_wrong_claims_are_refused(make: Callable[..., Verifier], changes: dict[str, Any]) -> None:
    """A claim that is missing, of the wrong type, out of range or meant for someone else makes the token invalid."""
    payload = json.dumps(claims(**changes)).encode()
    token = jwt.api_jws.encode(payload, key("EdDSA").private_key, algorithm="EdDSA")
    with pytest.raises(TokenInvalid):
        make().verify(token)


def test_a_payload_that_is_no_object_is_refused(make: Callable[..., Verifier]) -> None:
    """A signed payload that is a list, or not JSON, is no claims set."""
    for payload in (b"[1]", b"nothing", b"\xff\xfe", b"[" * 9000):
        token = jwt.api_jws.encode(payload, key("EdDSA").private_key, algorithm="EdDSA")
        with pytest.raises(TokenInvalid):
            make().verify(token)


def test_several_issuers_and_audiences(make: Callable[..., Verifier]) -> None:
    """Any of the issuers and any of the audiences that were given will do, and no audience means none."""
    one = make(issuer=["https://b.example", ISS], audience=["web", AUD])
    assert one.verify(mint(claims(aud=["x", AUD])))
    assert one.verify(mint(claims(iss="https://b.example", aud="web")))
    none = make(audience=None)
    assert none.verify(mint(claims(aud=...)))
    with pytest.raises(TokenInvalid):
        none.verify(mint())


def test_a_token_ends_at_its_exp_and_not_before(make: Callable[..., Verifier]) -> None:
    """A token is accepted until just before exp, and from exp on it has expired; fractions count."""
    now = NOW
    one = make(clock=lambda: now)
    token = mint(claims(exp=NOW + 10.5))
    now = NOW + 10.49
    assert one.verify(token)
    now = NOW + 10.5
    with pytest.raises(TokenExpired):
        one.verify(token)


def test_leeway_forgives_as_much_as_was_said(make: Callable[..., Verifier]) -> None:
    """With a leeway a token is accepted that much after exp, and before nbf."""
    now = NOW
    one = make(clock=lambda: now, leeway_seconds=5)
    token = mint(claims(exp=NOW + 10, nbf=NOW + 4))
    assert one.verify(token)
    now = NOW + 14.9
    assert one.verify(token)
    now = NOW + 15
    with pytest.raises(TokenExpired):
        one.verify(token)


def test_a_token_ends_with_its_session(make: Callable[..., Verifier]) -> None:
    """A token whose session_exp has passed has expired, though its exp has not."""
    now = NOW
    one = make(clock=lambda: now)
    token = mint(claims(session_exp=NOW + 5))
    assert one.verify(token)
    now = NOW + 5
    with pytest.raises(TokenExpired, match="session"):
        one.verify(token)


def test_the_claims_are_the_callers_own(make: Callable[..., Verifier]) -> None:
    """What a caller does to the claims that it got changes nothing that another verify returns."""
    one, token = make(), mint(claims(roles=["a", {"b": 1}]))
    first = one.verify(token)
    first["roles"][1]["b"] = 2
    first["roles"].append("admin")
    first["sub"] = "mallory"
    assert one.verify(token) == claims(roles=["a", {"b": 1}])


def test_a_token_of_another_kind_by_the_same_key_is_refused(make: Callable[..., Verifier]) -> None:
    """Where one key signs access and refresh tokens, a claim tells them apart, with its very value."""
    one = make(match={"token_type": "access", "level": 1})
    assert one.verify(mint(claims(token_type="access", level=1)))
    for wrong in ({"token_type": "refresh", "level": 1}, {"token_type": "access", "level": True}, {"level": 1}):
        with pytest.raises(TokenInvalid, match="which is asked for here"):
            one.verify(mint(claims(**wrong)))
    for unfit in ({"token_type": 1.5}, {"": "x"}, "access"):
        with pytest.raises(InvalidSettings, match="match is"):
            make(match=unfit)


# ---- revocations


@pytest.mark.parametrize(
    ("scope", "value"),
    [
        ("token", "j1"),
        ("session", "s1"),
        ("subject", "alice"),
        ("client", "web"),
        ("key", "k-1"),
        ("claims", {"roles": "admin", "level": 3}),
        ("issuer", ISS),
    ],
)
def test_a_revoked_token_is_refused_and_accepted_again_when_undone(
    make: Callable[..., Verifier], feed: MemoryFeed, scope: str, value: Any
) -> None:
    """A revocation of each scope refuses the token, saying which and why, until it is undone."""
    more = {"client_id": "web", "roles": ["user", "admin"], "level": 3}
    one, token = make(), mint(claims(**more), kid="k-1")
    assert one.verify(token)
    revoked = revocation(scope, value, now=NOW, reason="stolen")
    feed.revoke(revoked)
    error = eventually(lambda: _refusal(one, token))
    assert isinstance(error, TokenRevoked)
    assert (error.revocation_id, error.reason) == (revoked.id, "stolen")
    feed.undo(revoked)
    eventually(lambda: _refusal(one, token) is None)


def test_a_token_of_a_later_session_escapes_a_subjects_cut_off(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """A subject's revocation refuses what began before its cut-off, and not what began after it."""
    feed.revoke(revocation("subject", "alice", now=NOW - 100))
    one = make()
    assert one.verify(mint(claims(iat=NOW - 50)))
    with pytest.raises(TokenRevoked):
        one.verify(mint(claims(iat=NOW - 50, auth_time=NOW - 200)))


def test_another_issuers_revocation_is_not_ours(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """The same jti, sid or sub of another issuer is another token, session or subject."""
    feed.revoke(*(revocation(s, v, iss="https://b.example", now=NOW) for s, v in
                  [("token", "j1"), ("session", "s1"), ("subject", "alice")]))  # fmt: skip
    assert make().verify(mint())


def test_a_revoked_key_is_refused_whichever_issuer_a_token_speaks_of(
    make: Callable[..., Verifier], feed: MemoryFeed
) -> None:
    """A verifier with several issuers takes any of its keys for any of them, and so does whoever has stolen one."""
    other = "https://b.example"
    one = make(keys={"stolen": pem("EdDSA"), "sound": pem("ES256")}, algorithms=["EdDSA", "ES256"], issuer=[ISS, other])
    forged = mint(claims(iss=other, sub="mallory"), kid="stolen")
    ended: list[TokenEnd] = []
    one.watch(one.verify(forged), ended.append)
    feed.revoke(revocation("key", "stolen", now=NOW))
    assert eventually(lambda: ended)[0].cause == "revoked"
    one.watch(one._decoder.decode(forged)[0], ended.append)
    assert eventually(lambda: len(ended) == 2)
    with pytest.raises(TokenRevoked):
        one.verify(forged)
    assert one.verify(mint(claims(iss=other), algorithm="ES256", kid="sound"))
    alone = make(keys={"stolen": pem("EdDSA")}, issuer=[other])
    assert alone.verify(forged)


def test_claims_that_another_library_verified_end_with_the_verifiers_only_key(
    make: Callable[..., Verifier], feed: MemoryFeed
) -> None:
    """Claims tell no key. Where there is only one, it is known; and what a claim of that name says does not count."""
    one, several = make(), make(keys={"k1": pem("EdDSA"), "k2": pem("ES256")}, algorithms=["EdDSA", "ES256"])
    kid = thumbprint(key("EdDSA").as_dict(private=False))
    assert (one.only_kid, several.only_kid) == (kid, None)
    one.check(claims())
    feed.revoke(revocation("key", kid, now=NOW))
    eventually(lambda: len(one._follower.denylist))
    for checked in (claims(), claims(kid="forged")):
        with pytest.raises(TokenRevoked):
            one.check(checked)
    one.check(claims(), kid="another")
    several.check(claims())


def test_a_token_without_jti_can_be_revoked_by_its_session(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """Where no jti is required, the other scopes still reach the token."""
    one, token = make(require=("exp",)), mint(claims(jti=...))
    assert one.verify(token)
    feed.revoke(revocation("session", "s1", now=NOW))
    eventually(lambda: _refusal(one, token))


def test_claims_are_checked_again_without_the_token(make: Callable[..., Verifier], feed: MemoryFeed) -> None:
    """`check` tells by verified claims what `verify` would by now: revoked, expired, out of order."""
    checker = make()
    good = checker.verify(mint())
    checker.check(good)
    feed.revoke(revocation("session", "s1", now=NOW, reason="logout"))
    eventually(lambda: len(checker._follower.denylist))
    with pytest.raises(TokenRevoked, match="logout"):
        checker.check(good)
    checker.check(good | {"sid": "s2"})
    with pytest.raises(TokenExpired):
        checker.check(good | {"exp": NOW - 1})
    for wrong in ({"jti": 7}, {"exp": None}, {"iss": ""}, {"nbf": NOW + 60}, {"exp": NOW + 90_000}):
        with pytest.raises(TokenInvalid):
            checker.check(good | {"sid": "s2"} | wrong)


def test_a_session_is_checked_without_the_end_of_its_first_token(
    make: Callable[..., Verifier], feed: MemoryFeed
) -> None:
    """With `of_session`, exp and jti do not count where there is a sid; session_exp and other revocations do."""
    checker = make()
    assert checker.wait_ready(20)
    old = claims(exp=NOW - 60, iat=NOW - 120, auth_time=NOW - 120)
    feed.revoke(revocation("token", "j1", now=NOW))
    eventually(lambda: len(checker._follower.denylist))
    checker.check(old, of_session=True)
    with pytest.raises(TokenExpired):
        checker.check(old | {"session_exp": NOW}, of_session=True)
    for of_session in (True, False):
        with pytest.raises(TokenRevoked):
            checker.check(claims(sid=...), of_session=of_session)
    feed.revoke(revocation("subject", "alice", now=NOW))
    eventually(lambda: len(checker._follower.denylist) == 2)
    with pytest.raises(TokenRevoked):
        checker.check(old, of_session=True)


def test_the_kid_of_the_claims_does_not_count() -> None:
    """The key's id is what the header says, whatever a claim of that name says."""
    with verifier() as one:
        token = mint(claims(kid="forged"), kid="real")
        _, ref = one._decoder.decode(token)
        assert ref.kid == "real"
        unnamed = one._decoder.decode(mint(claims(kid=5)))[1]
        assert unnamed.kid == thumbprint(key("EdDSA").as_dict(private=False))


# ---- out of contact


def test_strict_refuses_everything_until_the_denylist_is_there(feed: MemoryFeed) -> None:
    """Under STRICT no token is accepted before the first snapshot, and tokens are from then on."""
    feed.down = True
    with verifier(feed, start_wait_seconds=0.05) as one:
        with pytest.raises(DenylistStale) as refused:
            one.verify(mint())
        assert refused.value.staleness_seconds == math.inf
        assert refused.value.limit_seconds == STRICT.refuse_after_seconds
        assert not one.wait_ready(0.01)
        feed.down = False
        assert one.wait_ready(20)
        assert one.verify(mint())


def test_strict_refuses_everything_once_the_denylist_is_too_old(feed: MemoryFeed) -> None:
    """Under STRICT a denylist older than 10 s refuses every token, and a known revocation still says so."""
    now = 100.0
    feed.revoke(revocation("token", "dead", now=NOW))
    with verifier(feed, monotonic=lambda: now) as one:
        assert one.verify(mint())
        feed.down = True
        reads = feed.reads
        eventually(lambda: feed.reads > reads + 1)
        now = 110.0
        assert one.verify(mint())
        now = 110.5
        with pytest.raises(DenylistStale) as refused:
            one.verify(mint())
        assert refused.value.staleness_seconds == pytest.approx(10.5)
        assert one.staleness_seconds == pytest.approx(10.5)
        with pytest.raises(TokenRevoked):
            one.verify(mint(claims(jti="dead")))
        with pytest.raises(TokenExpired):
            one.verify(mint(claims(exp=NOW)))
        feed.down = False
        eventually(lambda: _refusal(one, mint()) is None)


def test_available_goes_on_for_an_hour_and_no_longer(feed: MemoryFeed) -> None:
    """Under AVAILABLE tokens are accepted with no denylist at all, but not for longer than the limit."""
    now = 100.0
    feed.down = True
    with verifier(feed, policy=AVAILABLE, monotonic=lambda: now, start_wait_seconds=0) as one:
        assert one.verify(mint())
        now = 3700.0
        assert one.verify(mint())
        now = 3700.5
        with pytest.raises(DenylistStale):
            one.verify(mint())


def test_available_still_refuses_what_it_knows(feed: MemoryFeed) -> None:
    """Out of contact under AVAILABLE, a revocation that was known before is still refused."""
    feed.revoke(revocation("token", "j1", now=NOW))
    with verifier(feed, policy=AVAILABLE) as one:
        assert one.wait_ready(20)
        feed.down = True
        with pytest.raises(TokenRevoked):
            one.verify(mint())


def test_a_policy_of_any_age_still_needs_a_first_denylist(feed: MemoryFeed) -> None:
    """A denylist that may be as old as it likes is not one that was never there."""
    feed.down = True
    with verifier(feed, policy=Policy("mine", math.inf), start_wait_seconds=0) as one:
        assert isinstance(_refusal(one, mint()), DenylistStale)
        feed.down = False
        assert one.wait_ready(20)
        assert one.verify(mint())


def test_a_thread_that_cannot_be_started_is_tried_again(feed: MemoryFeed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a thread the policy decides; the next token starts it, and revocations are then seen."""
    feed.revoke(revocation("token", "j1", now=NOW))
    with verifier(feed) as one:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", _no_thread)
            assert isinstance(_refusal(one, mint()), DenylistStale)
            with pytest.raises(RuntimeError):
                one.watch(claims(), print)
        assert isinstance(_refusal(one, mint()), TokenRevoked)


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_policy_without_a_limit_is_refused() -> None:
    """A policy's limit is above 0."""
    with pytest.raises(InvalidSettings):
        Policy("mine", 0)
    with pytest.raises(InvalidSettings):
        Policy("mine", math.nan)


def test_the_first_verify_waits_for_the_denylist_from_every_thread(feed: MemoryFeed) -> None:
    """Requests that come in at the start wait for the snapshot, all of them, and none is refused for it."""
    gate = threading.Event()
    feed.before_snapshot = lambda: _pass(gate)
    refused: list[TokenRefused | None] = []
    with verifier(feed, start_wait_seconds=20.0) as one:
        token = mint()
        threads = [threading.Thread(target=lambda: refused.append(_refusal(one, token))) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: feed.reads > 0)
        gate.set()
        for thread in threads:
            thread.join()
    assert refused == [None] * 4


def _pass(gate: threading.Event) -> None:
    assert gate.wait(20)


# ---- processes


def test_a_forked_child_verifies_with_its_own_replica(feed: MemoryFeed) -> None:
    """A verifier that runs in the parent works in a forked child, which follows the denylist by itself."""
    with verifier(feed) as one:
        assert one.verify(mint())
        child = os.fork()
        if child == 0:
            try:
                # The feed is in memory, so the child's copy is the child's: only a thread of its own can see this.
                feed._changed = threading.Condition()
                alone = threading.active_count() == 1 and one.staleness_seconds == math.inf
                accepted = one.verify(mint()) == claims()
                feed.revoke(revocation("token", "j1", now=NOW))
                refused = eventually(lambda: isinstance(_refusal(one, mint()), TokenRevoked))
                os._exit(0 if alone and accepted and refused else 1)
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert one.verify(mint())


def test_importing_the_verifier_loads_no_broker_and_no_database() -> None:
    """`import knell.verifier`, and making one, loads neither Celery, kombu, SQLAlchemy nor redis."""
    program = (
        "import sys; from knell import Verifier\n"
        f"Verifier({SECRET!r}, algorithms=['HS256'], issuer='a', audience=None)\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'celery', 'kombu', 'sqlalchemy', 'redis'}))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_watching_needs_claims_of_a_token(make: Callable[..., Verifier]) -> None:
    """watch refuses claims that name no token."""
    with pytest.raises(InvalidClaims):
        make().watch({"iss": ISS}, print)


def test_jwk_sets_work_as_a_mapping(make: Callable[..., Verifier]) -> None:
    """The keys of a JWK Set, by kid, are a mapping of PyJWKs."""
    exported: Any = jwk.KeySet([key("EdDSA"), key("ES256")]).as_dict(private=False)
    keys = {one.key_id: one for one in jwt.PyJWKSet.from_dict(exported)}
    one = make(keys=keys, algorithms=["EdDSA", "ES256"])
    assert one.verify(mint(algorithm="ES256", kid=key("ES256").kid))
