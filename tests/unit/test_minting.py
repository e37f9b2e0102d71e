"""The claims of a new token, of a refreshed one, and of one that somebody else minted."""

from __future__ import annotations

import math
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knell.errors import InvalidClaims
from knell.keyring import KeyRing
from knell.keys import SigningKey
from knell.minting import check_foreign, new_claims, read_foreign, refreshed_claims
from knell.settings import Rules
from knell.tokens import TokenRef
from tests.unit.strategies import json_values

ISS = "https://auth.example"
NOW = 1_000_000.1234567
RULES = Rules(max_token_seconds=3_600, max_session_seconds=86_400)
NAMES = ["iss", "jti", "exp", "iat", "sid", "sub", "client_id", "kid", "auth_time", "session_exp", "aud", "nbf"]


def new(claims: Any = None, *, ttl_seconds: Any = 900, now: float = NOW, rules: Rules = RULES) -> dict[str, Any]:
    """The claims of a new token, made at NOW."""
    return new_claims({"sub": "alice"} if claims is None else claims, iss=ISS, now=now, ttl_seconds=ttl_seconds,
                      rules=rules)  # fmt: skip


def refreshed(old: dict[str, Any], changes: Any = None, *, now: float, ttl_seconds: Any = 900) -> dict[str, Any]:
    """The claims of a token that carries the session of `old` on."""
    return refreshed_claims(old, changes, iss=ISS, now=now, ttl_seconds=ttl_seconds, rules=RULES)


# ---- new tokens


def test_what_a_new_token_gets() -> None:
    """iss, jti, iat and exp are added, times in milliseconds; what the caller said stays."""
    made = new({"sub": "alice", "aud": ["shop"], "role": {"admin": True}})
    assert made["iss"] == ISS
    assert made["iat"] == 1_000_000.123
    assert made["exp"] == 1_000_900.123
    assert made["sub"], made["role"] == ("alice", {"admin": True})
    assert made["jti"] != new()["jti"]
    assert "auth_time" not in made


def test_a_new_session_gets_its_start() -> None:
    """With a sid, auth_time with milliseconds is added, unless it is given."""
    assert new({"sid": "s"})["auth_time"] == 1_000_000.123
    assert new({"sid": "s", "auth_time": 999_000})["auth_time"] == 999_000


def test_the_caller_s_own_jti_is_kept() -> None:
    """A jti that is given names the token."""
    assert new({"jti": "mine"})["jti"] == "mine"


def test_a_token_ends_no_later_than_its_session() -> None:
    """session_exp cuts the lifetime short."""
    assert new({"sid": "s", "session_exp": 1_000_060})["exp"] == 1_000_060


def test_the_callers_mapping_is_left_alone() -> None:
    """Neither call changes what it was given."""
    claims = {"sub": "alice", "sid": "s"}
    made = new(claims)
    refreshed(made, {"role": "x"}, now=NOW + 1)
    assert claims == {"sub": "alice", "sid": "s"}
    assert "role" not in made


@pytest.mark.parametrize(
    ("claims", "ttl_seconds", "said"),
    [
        ("text", 900, "must be a mapping, not str"),
        ({"exp": NOW + 5}, 900, "have 'exp', which issue() sets"),
        ({"iat": NOW}, 900, "have 'iat', which issue() sets"),
        ({"iss": "https://other.example"}, 900, "this issuer is"),
        ({"jti": ""}, 900, "'jti' is empty"),
        ({"jti": None}, 900, "no 'jti'"),
        ({"sub": "x" * 300}, 900, "'sub' is 300 bytes long"),
        ({"sid": 7}, 900, "'sid' must be a string"),
        ({}, 0, "must be above 0"),
        ({}, -1, "must be above 0"),
        ({}, math.nan, "finite number"),
        ({}, math.inf, "finite number"),
        ({}, True, "finite number"),
        ({}, "900", "finite number"),
        ({}, None, "finite number"),
        ({}, 10**400, "at most 3600"),
        ({}, 3_601, "KNELL_MAX_TOKEN_SECONDS"),
        ({"sid": "s", "auth_time": NOW + 60}, 900, "in the future"),
        ({"sid": "s", "auth_time": NOW - 90_000}, 900, "KNELL_MAX_SESSION_SECONDS"),
        ({"sid": "s", "auth_time": math.nan}, 900, "'auth_time' is nan"),
        ({"sid": "s", "session_exp": NOW - 1}, 900, "the session ended"),
        ({"sid": "s", "session_exp": NOW}, 900, "the session ended"),
        ({"sid": "s", "session_exp": NOW + 90_000}, 900, "'session_exp' is"),
    ],
)
def test_what_no_token_is_minted_from(claims: Any, ttl_seconds: Any, said: str) -> None:
    """Claims and lifetimes that cannot be used are refused, with what was found and what to do."""
    with pytest.raises(InvalidClaims) as caught:
        new(claims, ttl_seconds=ttl_seconds)
    assert said in str(caught.value)


@given(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=5), st.floats() | st.integers() | json_values)
def test_only_invalid_claims_comes_out_of_new(claims: dict[str, Any], ttl_seconds: Any) -> None:
    """Whatever is given, the answer is the claims of a token that Knell can track, or InvalidClaims."""
    try:
        made = new(claims, ttl_seconds=ttl_seconds)
    except InvalidClaims:
        return
    ref = TokenRef.from_claims(made)
    assert NOW - 0.001 <= ref.exp <= NOW + RULES.max_token_seconds + 0.001


# ---- refreshed tokens


def test_a_refresh_carries_the_session_on() -> None:
    """sid, auth_time and other claims stay; jti, iat and exp are new."""
    old = new({"sub": "alice", "sid": "s", "aud": "shop", "session_exp": 1_010_000})
    later = refreshed(old, {"role": "admin"}, now=NOW + 600)
    assert {name: later[name] for name in ("sub", "sid", "aud", "auth_time", "session_exp", "role")} == {
        "sub": "alice",
        "sid": "s",
        "aud": "shop",
        "auth_time": old["auth_time"],
        "session_exp": 1_010_000,
        "role": "admin",
    }
    assert later["jti"] != old["jti"]
    assert later["iat"] == 1_000_600.123
    assert later["exp"] == 1_001_500.123


def test_a_refresh_ends_with_its_session() -> None:
    """A refreshed token does not outlive session_exp either."""
    old = new({"sid": "s", "session_exp": 1_001_000})
    assert refreshed(old, now=NOW + 600)["exp"] == 1_001_000
    with pytest.raises(InvalidClaims, match="log in again"):
        refreshed(old, now=NOW + 1_000)


def test_without_auth_time_the_session_began_at_the_token() -> None:
    """A foreign token without auth_time hands on its own iat as the start, so that a cut-off still reaches it."""
    old = {"iss": ISS, "jti": "t", "sid": "s", "iat": 999_000, "exp": 999_900}
    assert refreshed(old, now=NOW)["auth_time"] == 999_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"iss": "https://other.example"}, "'iss' stays the same"),
        ({"sid": "other"}, "'sid' stays the same"),
        ({"auth_time": NOW}, "'auth_time' stays the same"),
        ({"session_exp": NOW + 10}, "'session_exp' stays the same"),
        ({"client_id": "other"}, "'client_id' stays the same"),
        ({"exp": NOW + 10}, "have 'exp'"),
    ],
)
def test_what_a_refresh_cannot_change(changes: dict[str, Any], said: str) -> None:
    """What makes a session the same session stays."""
    with pytest.raises(InvalidClaims) as caught:
        refreshed(new({"sid": "s", "client_id": "web"}), changes, now=NOW + 1)
    assert said in str(caught.value)


def test_no_session_no_refresh() -> None:
    """A token without sid has nothing to carry on."""
    with pytest.raises(InvalidClaims, match="no 'sid'"):
        refreshed(new(), now=NOW + 1)


def test_a_session_ends_with_its_longest_lifetime() -> None:
    """However often it is refreshed, a session ends at the maximum."""
    old = new({"sid": "s"})
    refreshed(old, now=NOW + RULES.max_session_seconds - 1)
    with pytest.raises(InvalidClaims, match="log in again"):
        refreshed(old, now=NOW + RULES.max_session_seconds + 1)


@given(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=5), st.none() | st.just({"role": 1}) | json_values)
def test_only_invalid_claims_comes_out_of_refreshed(old: dict[str, Any], changes: Any) -> None:
    """Whatever the old claims and the changes are, the answer is new claims or InvalidClaims."""
    for given_old in (old, new({"sid": "s"}) | old):
        try:
            TokenRef.from_claims(refreshed(given_old, changes, now=NOW))
        except InvalidClaims:
            continue


# ---- foreign tokens


FOREIGN = {"iss": "https://idp.example", "jti": "t", "exp": NOW + 60, "iat": NOW - 60}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"jti": None}, "no 'jti'"),
        ({"exp": None}, "no 'exp'"),
        ({"exp": NOW}, "the token ended"),
        ({"exp": NOW - 100}, "the token ended 100 s ago"),
        ({"exp": math.nan}, "nan"),
        ({"exp": math.inf}, "inf"),
        ({"exp": True}, "not bool"),
        ({"exp": NOW + 3_600}, "KNELL_MAX_TOKEN_SECONDS"),
        ({"iat": None, "exp": NOW + 3_601}, "KNELL_MAX_TOKEN_SECONDS"),
        ({"iat": NOW + 60}, "in the future"),
        ({"sid": "s", "auth_time": NOW - 90_000}, "KNELL_MAX_SESSION_SECONDS"),
        ({"sid": "s", "session_exp": NOW + 90_000}, "KNELL_MAX_SESSION_SECONDS"),
        ({"sub": "x" * 300}, "300 bytes"),
    ],
)
def test_foreign_tokens_that_cannot_be_tracked(change: dict[str, Any], said: str) -> None:
    """A token that has ended, lives too long, or cannot be named is refused before anything is changed."""
    with pytest.raises(InvalidClaims) as caught:
        check_foreign(TokenRef.from_claims(FOREIGN | change), now=NOW, rules=RULES)
    assert said in str(caught.value)


def test_an_old_login_without_a_session_is_no_matter() -> None:
    """A token of no session may say that its user authenticated long ago."""
    check_foreign(TokenRef.from_claims(FOREIGN | {"auth_time": 5}), now=NOW, rules=RULES)


@given(st.dictionaries(st.sampled_from(NAMES), json_values, max_size=5))
def test_only_invalid_claims_comes_out_of_foreign_claims(change: dict[str, Any]) -> None:
    """Whatever somebody else's claims are, the answer is a TokenRef that is alive, or InvalidClaims."""
    try:
        ref = TokenRef.from_claims(FOREIGN | change)
        check_foreign(ref, now=NOW, rules=RULES)
    except InvalidClaims:
        return
    assert NOW < ref.exp <= NOW + RULES.max_token_seconds + 5


KEY = SigningKey.generate()
KEYS = {"https://idp.example": KeyRing(KEY.verifying_key, ["EdDSA"])}


def test_a_foreign_token_is_read_even_after_its_end() -> None:
    """The signature is checked, the times are left to the rules; the header's kid is kept."""
    token = KEY.sign(FOREIGN | {"exp": 5, "aud": "shop"}, typ="JWT")
    claims = read_foreign(token, KEYS)
    assert claims == FOREIGN | {"exp": 5, "aud": "shop"}
    assert claims.kid == KEY.kid


@pytest.mark.filterwarnings("ignore:The HMAC key")
@pytest.mark.parametrize(
    "token",
    [
        "",
        "a.b.c",
        "é.é.é",
        SigningKey.generate().sign(FOREIGN, typ="JWT"),
        KEY.sign(FOREIGN | {"iss": "https://other.example"}, typ="JWT"),
        KEY.sign({"jti": "t", "exp": 5}, typ="JWT"),
        KEY.sign(FOREIGN, typ="JWT").rpartition(".")[0] + ".",
        jwt.encode(FOREIGN, "", algorithm="none"),
        jwt.encode(FOREIGN, "s" * 32, algorithm="HS256"),
    ],
)
def test_a_foreign_token_that_does_not_verify(token: str) -> None:
    """No key for its iss, or a signature by another key: refused, and the text has no token in it."""
    with pytest.raises(InvalidClaims) as caught:
        read_foreign(token, KEYS)
    assert len(token) < 20 or token not in str(caught.value)


@given(st.text() | st.binary() | json_values)
def test_only_invalid_claims_comes_out_of_a_foreign_token(token: Any) -> None:
    """Whatever is given in place of a token, the answer is InvalidClaims."""
    with pytest.raises(InvalidClaims):
        read_foreign(token, KEYS)
