"""TokenRef: what is kept of a token, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knell.errors import InvalidClaims
from knell.tokens import MAX_ID_BYTES, TokenRef, check_identifier, check_time
from tests.unit.strategies import json_values, token_refs

CLAIMS = {"iss": "https://auth.example", "jti": "t-1", "exp": 2_000.0}


@given(token_refs)
def test_json_round_trip(ref: TokenRef) -> None:
    """What is written as JSON reads back as the same value."""
    assert TokenRef.from_json(json.loads(json.dumps(ref.as_json()))) == ref


@given(st.dictionaries(st.sampled_from([*TokenRef.__dataclass_fields__, "aud"]), json_values) | json_values)
def test_only_invalid_claims_comes_out(claims: Any) -> None:
    """Whatever the claims are, the answer is a TokenRef or InvalidClaims."""
    try:
        ref = TokenRef.from_claims(claims)
    except InvalidClaims:
        return
    assert TokenRef.from_claims(ref.as_json()) == ref


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"jti": None}, "no 'jti'"),
        ({"jti": ""}, "'jti' is empty"),
        ({"jti": 7}, "'jti' must be a string, not int"),
        ({"jti": "x" * 257}, "257 bytes long; the limit is 256"),
        ({"jti": "é" * 129}, "258 bytes long"),
        ({"jti": "a\nb"}, "control character"),
        ({"jti": "\ud800"}, "not valid Unicode"),
        ({"iss": None}, "no 'iss'"),
        ({"exp": None}, "no 'exp'"),
        ({"exp": math.nan}, "nan; it must be a finite number"),
        ({"exp": math.inf}, "inf; it must be a finite number"),
        ({"exp": True}, "not bool"),
        ({"exp": "2000"}, "not str"),
        ({"exp": -1}, "no time in Unix seconds"),
        ({"exp": 10**400}, "no time in Unix seconds"),
        ({"exp": 1_700_000_000_000}, "milliseconds, perhaps"),
        ({"iat": False}, "'iat' must be a number"),
        ({"auth_time": math.nan}, "'auth_time' is nan"),
        ({"session_exp": [1]}, "'session_exp' must be a number"),
        ({"sid": ["s"]}, "'sid' must be a string, not list"),
        ({"sub": "x" * 300}, "'sub' is 300 bytes long"),
        ({"client_id": 0}, "'client_id' must be a string"),
        ({"kid": b"k"}, "'kid' must be a string, not bytes"),
    ],
)
def test_bad_claims_are_named(change: dict[str, Any], said: str) -> None:
    """A claim that cannot be used is refused, with what was found."""
    with pytest.raises(InvalidClaims) as caught:
        TokenRef.from_claims(CLAIMS | change)
    assert said in str(caught.value)


def test_an_error_shows_a_bounded_text() -> None:
    """A hostile claim does not fill the log: the message stays short whatever its size."""
    with pytest.raises(InvalidClaims) as caught:
        TokenRef.from_claims(CLAIMS | {"exp": 10**5_000})
    assert len(str(caught.value)) < 300


def test_claims_must_be_a_mapping() -> None:
    """A token's text in place of its claims is refused."""
    with pytest.raises(InvalidClaims, match="must be a mapping, not str"):
        TokenRef.from_claims("eyJ...")  # type: ignore[arg-type]


def test_the_header_s_kid_counts() -> None:
    """The kid given beside the claims is kept, and wins over one among them."""
    assert TokenRef.from_claims(CLAIMS, kid="k-1").kid == "k-1"
    assert TokenRef.from_claims(CLAIMS | {"kid": "k-2"}).kid == "k-2"
    assert TokenRef.from_claims(CLAIMS | {"kid": "k-2"}, kid="k-1").kid == "k-1"


def test_other_claims_are_not_kept() -> None:
    """Nothing but the named claims is kept of a token."""
    assert TokenRef.from_claims(CLAIMS | {"tenant": "acme", "pi": 3.14}, tracked=("tenant", "pi", "role")).claims == {
        "tenant": "acme"
    }
    with pytest.raises(InvalidClaims, match="track fewer"):
        TokenRef.from_claims(CLAIMS | {"groups": [f"group-{n}" for n in range(200)]}, tracked=("groups",))
    ref = TokenRef.from_claims(CLAIMS | {"email": "alice@example.com", "aud": ["shop"]})
    assert ref.as_json() == CLAIMS


@pytest.mark.parametrize(("exp", "second"), [(2_000.0, 2_000), (2_000.001, 2_001), (2_000.999, 2_001), (0.0, 0)])
def test_second_is_the_first_whole_second_after_the_end(exp: float, second: int) -> None:
    """A token is due in the second ceil(exp): never before its end."""
    assert TokenRef.from_claims(CLAIMS | {"exp": exp}).second == second


@pytest.mark.parametrize(
    ("times", "started"),
    [({}, None), ({"iat": 5}, 5.0), ({"auth_time": 3}, 3.0), ({"auth_time": 3, "iat": 5}, 3.0)],
)
def test_the_start_of_a_session_as_the_token_tells_it(times: dict[str, int], started: float | None) -> None:
    """auth_time, else iat, else unknown."""
    assert TokenRef.from_claims(CLAIMS | times).started == started


def test_the_longest_identifier_is_accepted() -> None:
    """256 bytes of UTF-8 are the limit, and allowed."""
    assert check_identifier("jti", "x" * MAX_ID_BYTES) == "x" * MAX_ID_BYTES
    assert check_identifier("jti", "é" * (MAX_ID_BYTES // 2))


def test_times_become_floats() -> None:
    """A whole number of seconds is a time like any other."""
    assert isinstance(check_time("exp", 7), float)
