"""The URLs of Redis stores: what they say, and what is refused without being shown."""

from __future__ import annotations

import pytest

from knell.errors import InvalidSettings
from knell.handlers.redis import RedisSessions
from knell.settings import Rules, check_store_url
from knell.stores.redis_url import DEFAULT_WAIT_MS, parse_redis_url


def test_a_server_is_as_redis_py_reads_it() -> None:
    """One server's URL stays as it is, but for what Knell reads by itself."""
    parsed = parse_redis_url("X", "rediss://u:p%40@h:6380/3?min_replicas=2&client_name=a%26b&wait_ms=50")
    assert (parsed.kind, parsed.hosts, parsed.where) == ("one", (("h", 6380),), "h:6380")
    assert (parsed.min_replicas, parsed.wait_ms) == (2, 50)
    assert parsed.server(*parsed.hosts[0]) == "rediss://u:p%40@h:6380/3?client_name=a%26b"


def test_a_socket_is_named_by_its_path() -> None:
    """A socket has no host."""
    parsed = parse_redis_url("X", "unix:///run/redis.sock?db=2&min_replicas=1")
    assert (parsed.where, parsed.server()) == ("/run/redis.sock", "unix:///run/redis.sock?db=2")
    assert (parsed.min_replicas, parsed.wait_ms) == (1, DEFAULT_WAIT_MS)


def test_sentinels_and_the_primary_have_accounts_of_their_own() -> None:
    """User and password are the servers', sentinel_ ones the sentinels'; certificates are for both."""
    url = (
        "rediss+sentinel://u:p@s1,s2:1,[::1]:2/my%20master/4"
        "?sentinel_username=a%3Ab&sentinel_password=c%40d&ssl_ca_certs=/ca.pem&socket_timeout=1"
    )
    parsed = parse_redis_url("X", url)
    assert parsed.hosts == (("s1", 26379), ("s2", 1), ("::1", 2))
    assert (parsed.service, parsed.where) == ("my master", "s1:26379,s2:1,[::1]:2")
    assert parsed.sentinel("s1", 26379) == "rediss://a%3Ab:c%40d@s1:26379?ssl_ca_certs=/ca.pem"
    assert parsed.server("::1", 9) == "rediss://u:p@[::1]:9/4?ssl_ca_certs=/ca.pem&socket_timeout=1"


def test_a_cluster_is_named_by_some_nodes() -> None:
    """Each node is reached with the same account."""
    parsed = parse_redis_url("X", "redis+cluster://u:p@h1:7000,h2/0")
    assert (parsed.kind, parsed.hosts) == ("cluster", (("h1", 7000), ("h2", 6379)))
    assert parsed.server("h3", 7002) == "redis://u:p@h3:7002"


@pytest.mark.parametrize(
    ("url", "verified"),
    [
        ("rediss://h", True),
        ("rediss://h?ssl_check_hostname=yes&ssl_cert_reqs=required", True),
        ("rediss://h?ssl_cert_reqs=none", False),
        ("rediss://h?ssl_check_hostname=False", False),
    ],
)
def test_whether_certificates_are_checked_is_known(url: str, verified: bool) -> None:
    """They are, unless the URL says otherwise by name."""
    assert parse_redis_url("X", url).verified is verified


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis+sentinel://u:hunter2@s1,s2", "which primary"),
        ("redis+sentinel://u:hunter2@s1,s2/", "which primary"),
        ("redis+sentinel://u:hunter2@s1/mymaster/hunter2", "no number"),
        ("redis+sentinel://u:hunter2@s1/mymaster?bogus=hunter2", "unknown option 'bogus'"),
        ("redis+sentinel://u:hunter2@s1,:1/mymaster", "no host"),
        ("redis+sentinel://u:hunter2@s1:x,s2/mymaster", "cannot be read"),
        ("redis+sentinel://u:hun/ter2@s1,s2/mymaster", "cannot be read"),
        ("redis+sentinel://u:hun?ter2@s1,s2/mymaster", "cannot be read"),
        ("redis+sentinel://u:1/hunter2@s1,s2/mymaster", "cannot be read"),
        ("redis+sentinel://u:1#hunter2@s1,s2/mymaster", "cannot be read"),
        ("redis+sentinel://u:hunter2@s1/m?ssl_ca_certs=/ca", "does not have"),
        ("redis+cluster://u:hunter2@h1,h2/1", "only database 0"),
        ("redis+cluster://u:hunter2@h1,h2?db=1", "only database 0"),
        ("redis+cluster://u:hunter2@h1?sentinel_password=hunter2", "unknown option 'sentinel_password'"),
        ("redis+cluster://u:hunter2@h1,h2:123456", "cannot be read"),
        ("redis://u:hunter2@h?min_replicas=hunter2", "use 0 to 100"),
        ("redis://u:hunter2@h?min_replicas=-1", "use 0 to 100"),
        ("redis://u:hunter2@h?wait_ms=500", "use 1 to 400"),
        ("redis://u:hunter2@h?wait_ms=", "use 1 to 400"),
        ("redis+other://u:hunter2@h", "scheme 'redis.other'"),
        ("redis+cluster:", "cannot be read|scheme|no host"),
        ("redis+sentinel://", "which primary|no host"),
    ],
)
def test_what_cannot_be_used_is_refused_without_being_shown(url: str, text: str) -> None:
    """The text names the setting and what to do; a password may stand anywhere in the rest."""
    with pytest.raises(InvalidSettings, match=text) as caught:
        check_store_url("KNELL_STORE_URL", url)
    assert str(caught.value).startswith("KNELL_STORE_URL ")
    assert "hunter2" not in str(caught.value)
    assert "ter2" not in str(caught.value)


def test_what_is_parsed_does_not_show_secrets() -> None:
    """It may be logged."""
    parsed = parse_redis_url("X", "redis+sentinel://u:hunter2@s1/m?sentinel_password=hunter2&password=hunter2")
    assert "hunter2" not in repr(parsed)


def test_sessions_are_kept_on_one_server() -> None:
    """The ready-made sessions follow no sentinels, and say what to do; what is for the store alone is left out."""
    for url in ("redis+sentinel://h/m", "redis+cluster://h"):
        with pytest.raises(InvalidSettings, match="give RedisSessions a client"):
            RedisSessions(url, prefix="t:shop", rules=Rules())
    RedisSessions("redis://h?min_replicas=1&wait_ms=50", prefix="t:shop", rules=Rules()).close()
