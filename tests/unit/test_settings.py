"""Settings: read once, refused with the variable's name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knell.errors import InvalidSettings
from knell.settings import Rules, Settings, check_service_name

VARIABLES = [f"KNELL_{field.name.upper()}" for kind in (Settings, Rules) for field in fields(kind)]


def test_the_default_is_embedded() -> None:
    """Without a variable, everything lies under .knell/ and no server is needed."""
    settings = Settings.from_environ({})
    assert settings.embedded
    assert settings.broker_url == "knell+sqlite:///.knell/broker.db"
    assert settings.store_url == settings.dedupe_url == "sqlite:///.knell/store.db"
    assert settings.notice_key == Path(".knell/notice-key.pem")
    assert settings.trust == Path(".knell/trust.json")
    assert settings.audience == "knell:knell"


def test_a_server_deployment() -> None:
    """Each variable goes where its name says; nothing is made up beside a real broker."""
    settings = Settings.from_environ(
        {
            "KNELL_NAMESPACE": "staging",
            "KNELL_BROKER_URL": "amqps://a/knell;amqps://b/knell",
            "KNELL_BROKER_API_URL": "https://a:15671",
            "KNELL_STORE_URL": "rediss://store",
            "KNELL_DEDUPE_URL": "redis://mine",
            "KNELL_SWEEP_INTERVAL_SECONDS": "2.5",
            "KNELL_PARTITIONS": "16",
            "KNELL_MAX_TOKEN_SECONDS": "3600",
            "KNELL_LEEWAY_SECONDS": "0",
            "KNELL_LOG_MAX_BYTES": "1000000",
            "PATH": "/bin",
        }
    )
    assert not settings.embedded
    assert settings.notice_key is None
    assert settings.trust is None
    assert settings.audience == "knell:staging"
    assert settings.dedupe_url == "redis://mine"
    assert settings.partitions == 16
    assert settings.sweep_interval_seconds == 2.5
    assert settings.rules == Rules(max_token_seconds=3600, leeway_seconds=0, log_max_bytes=1_000_000)


def test_an_empty_variable_counts_as_not_set() -> None:
    """Compose files and shells pass on empty variables; they change nothing."""
    assert Settings.from_environ(dict.fromkeys(VARIABLES, "")) == Settings.from_environ({})


@pytest.mark.parametrize("variable", VARIABLES)
def test_every_setting_has_a_variable(variable: str) -> None:
    """Each field of Settings and Rules can be set from the environment."""
    if variable in ("KNELL_RULES",):
        return
    value = {"KNELL_NAMESPACE": "other", "KNELL_BROKER_URL": "amqp://x/y"}.get(variable, "77")
    assert Settings.from_environ({variable: value}) != Settings.from_environ({})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KNELL_NAMESPACE", "Knell"),
        ("KNELL_NAMESPACE", "knell\n"),
        ("KNELL_NAMESPACE", "a b"),
        ("KNELL_BROKER_URL", "redis://broker"),
        ("KNELL_BROKER_URL", "broker"),
        ("KNELL_SWEEP_INTERVAL_SECONDS", "0"),
        ("KNELL_SWEEP_INTERVAL_SECONDS", "nan"),
        ("KNELL_SWEEP_INTERVAL_SECONDS", "soon"),
        ("KNELL_PARTITIONS", "0"),
        ("KNELL_PARTITIONS", "1.5"),
        ("KNELL_PARTITIONS", "9" * 400),
        ("KNELL_MAX_TOKEN_SECONDS", "0"),
        ("KNELL_MAX_TOKEN_SECONDS", "inf"),
        ("KNELL_MAX_SESSION_SECONDS", "-1"),
        ("KNELL_LEEWAY_SECONDS", "-0.1"),
        ("KNELL_SESSION_GRACE_SECONDS", "nan"),
        ("KNELL_RETENTION_SECONDS", "0"),
        ("KNELL_LOG_MAX_BYTES", "1e9"),
        ("KNELL_LOG_MAX_BYTES", "9" * 400),
    ],
)
def test_what_cannot_be_used_is_named(variable: str, value: str) -> None:
    """A value that cannot be used is refused; the text names the variable that it came from."""
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environ({variable: value})
    assert variable in str(caught.value)


# Also what a URL parser or a number parser stumbles over.
values = st.text() | st.sampled_from(
    ["nan", "inf", "-1", "0", "1", "9" * 400, "amqp://[", "amqp://x/y", "redis://x", "a"]
)


@given(st.dictionaries(st.sampled_from(VARIABLES), values, max_size=4))
def test_only_invalid_settings_comes_out(environ: dict[str, str]) -> None:
    """Whatever the environment holds, the answer is Settings or InvalidSettings."""
    try:
        Settings.from_environ(environ)
    except InvalidSettings:
        return


@pytest.mark.parametrize("name", ["shop", "a", "partner-2", "x_y", "a" * 63])
def test_service_names(name: str) -> None:
    """A lower-case letter, then letters, digits, "_" and "-", 63 at most."""
    assert check_service_name(name) == name


@pytest.mark.parametrize("name", ["", "Shop", "1st", "-x", "shop.eu", "shop\n", "é", "a" * 64, "#", None, 7])
def test_what_is_no_service_name(name: str) -> None:
    """A name that could mean something else in a routing key, or on a terminal, is refused."""
    with pytest.raises(InvalidSettings):
        check_service_name(name)
