"""Settings: read once, refused with the variable's name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
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
    odd = {"KNELL_NAMESPACE": "other", "KNELL_BROKER_URL": "amqp://x/y"}
    odd |= {"KNELL_STORE_URL": "redis://x", "KNELL_DEDUPE_URL": "redis://x"}
    value = odd.get(variable, "77")
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


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("KNELL_BROKER_URL", "amqp://u:hunter2@h/v?heartbeat=x"),
        ("KNELL_BROKER_URL", "amqp://u:hunter2@h/v?heartbeat=99999"),
        ("KNELL_BROKER_URL", "amqp://u:hunter2@h/v?bogus=hunter2"),
        ("KNELL_BROKER_URL", "amqp://u:hunter2@h/v;redis://u:hunter2@h/"),
        ("KNELL_BROKER_URL", "amqp://u:hunter2@h/v;amqps://u:hunter2@h/v"),
        ("KNELL_BROKER_URL", "amqp://u:hunter2@h/v;"),
        ("KNELL_BROKER_URL", "amqp://u:hunter2@h..example/v"),
        ("KNELL_BROKER_URL", "knell+sqlite://u:hunter2@h/broker.db"),
        ("KNELL_BROKER_URL", "knell+sqlite:///a;knell+sqlite:///hunter2"),
        ("KNELL_STORE_URL", "mysql://u:hunter2@h/db"),
        ("KNELL_STORE_URL", "redis://:hunter2@h/0?bogus=hunter2"),
        ("KNELL_STORE_URL", "redis://:hunter2@h/0?decode_responses=1"),
        ("KNELL_STORE_URL", "redis://:hunter2@h/0?socket_timeout=hunter2"),
        ("KNELL_STORE_URL", "redis://:hunter2@h/0?ssl_cert_reqs=none"),
        ("KNELL_STORE_URL", "redis://:hunter2@h..example/0"),
        ("KNELL_STORE_URL", "rediss://:hunter2@h/0?ssl_cert_reqs=hunter2"),
        ("KNELL_STORE_URL", "unix://:hunter2@h/socket"),
        ("KNELL_STORE_URL", "sqlite://u:hunter2@h/db"),
        ("KNELL_STORE_URL", "sqlite:hunter2"),
        ("KNELL_STORE_URL", "sqlite:///"),
        ("KNELL_STORE_URL", "sqlite:///:memory:"),
        ("KNELL_DEDUPE_URL", "postgresql://u:hunter2@h"),
        ("KNELL_DEDUPE_URL", "redis://:hunter2@h/0?bogus=1"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_and_not_shown(variable: str, url: str) -> None:
    """A scheme, an option or a path that nothing answers to is found at the edge, and no password is in the text."""
    with pytest.raises(InvalidSettings, match=variable) as caught:
        Settings.from_environ({variable: url})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("KNELL_BROKER_URL", "amqp://u:p%40ss@h/v?heartbeat=30"),
        ("KNELL_BROKER_URL", "amqps://a/v;amqps://b/v;amqps://[::1]:5671/v"),
        ("KNELL_BROKER_URL", "knell+sqlite:////var/lib/knell/broker.db"),
        ("KNELL_STORE_URL", "redis://u:p%3Fss@h:6380/3?health_check_interval=5&socket_keepalive=yes&client_name=shop"),
        ("KNELL_STORE_URL", "rediss://h/0?ssl_cert_reqs=none"),
        ("KNELL_STORE_URL", "rediss://h/0?ssl_ca_certs=/etc/ca.pem&ssl_certfile=/c&ssl_keyfile=/k&ssl_password=p"),
        ("KNELL_STORE_URL", "unix:///run/redis.sock?db=2&password=secret"),
        ("KNELL_DEDUPE_URL", "sqlite:////var/lib/shop/dedupe.db"),
    ],
)
def test_urls_of_every_production_kind_are_taken(variable: str, url: str) -> None:
    """Failover lists, TLS with certificates of one's own, sockets, options."""
    assert getattr(Settings.from_environ({variable: url}), variable.removeprefix("KNELL_").lower()) == url


def test_a_file_where_a_folder_has_to_be_is_named(tmp_path: Path) -> None:
    """KNELL_HOME is a folder, and what names a file names no folder; both are found at the edge."""
    file = tmp_path / "file"
    file.touch()
    for variable, path in [
        ("KNELL_HOME", file),
        ("KNELL_TRUST", tmp_path),
        ("KNELL_NOTICE_KEY", tmp_path),
        ("KNELL_HEALTH_FILE", tmp_path),
    ]:
        with pytest.raises(InvalidSettings, match=f"{variable} .* is a f"):
            Settings.from_environ({variable: str(path)})
    servers = {"KNELL_BROKER_URL": "amqp://x/y", "KNELL_STORE_URL": "redis://x"}
    assert Settings.from_environ({**servers, "KNELL_HOME": str(file)}).home == file  # nothing is kept there


# Also what a URL parser or a number parser stumbles over.
values = st.text() | st.sampled_from(
    [
        "nan",
        "inf",
        "-1",
        "0",
        "1",
        "9" * 400,
        "amqp://[",
        "amqp://x/y",
        "amqp://x/y?a=b",
        "redis://x",
        "redis://x?db=y",
        "rediss://x?ssl_cert_reqs=y",
        "sqlite:///",
        "sqlite://x/y",
        "unix://x",
        "a",
    ]
)


@settings(deadline=None)  # the first redis:// loads redis-py
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
