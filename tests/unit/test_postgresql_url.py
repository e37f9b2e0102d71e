"""`postgresql://` URLs: what is understood, and what is refused without showing a password."""

from __future__ import annotations

import pytest

from knell.errors import InvalidSettings
from knell.postgresql_url import POOL_SIZE, read_postgresql_url
from knell.settings import Settings, check_store_url

SECRET = "hunter2"


def test_hosts_fail_over_in_order() -> None:
    """Several hosts, each with its port or 5432; what may be shown has no account in it."""
    url = read_postgresql_url("X", f"postgresql://me:{SECRET}%40%2F@one:5433,two,[::1]:5434/db?sslmode=verify-full")
    assert url.hosts == (("one", 5433), ("two", 5432), ("::1", 5434))
    assert url.options == {"user": "me", "password": f"{SECRET}@/", "dbname": "db", "sslmode": "verify-full"}
    assert url.where == "one:5433,two:5432,::1:5434/db"
    assert url.pool_size == POOL_SIZE
    assert SECRET not in repr(url)


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("postgresql://h/db?pool_size=9&port=5", (("h", 5),)),
        ("postgresql:///db?host=/run/postgresql&pool_size=9", (("/run/postgresql", 5432),)),
        ("postgresql://%2Frun%2Fpg:6/db?pool_size=9&application_name=a%20b", (("/run/pg", 6),)),
    ],
)
def test_options_are_understood(url: str, hosts: tuple[tuple[str, int], ...]) -> None:
    """Sockets, a port as an option, and Knell's own pool_size, which libpq never sees."""
    found = read_postgresql_url("X", url)
    assert (found.hosts, found.pool_size) == (hosts, 9)
    assert "pool_size" not in found.options


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:hunter2@h/db?options=-csearch_path%3Dx", "unknown option 'options'"),
        ("postgresql://u:hunter2@h/db?connect_timeout=90", "unknown option 'connect_timeout'"),
        ("postgresql://u:hunter2@h/db?sslmode=hunter", "sslmode='hunter'; use disable or "),
        ("postgresql://u:hunter2@h/db?target_session_attrs=any", "use read-write or primary"),
        ("postgresql://u:hunter2@h/db?pool_size=0", "pool_size '0'"),
        ("postgresql://u:hunter2@h/db?pool_size=²", "pool_size"),
        ("postgresql://u:hunter2@h/db?pool_size", "cannot be read"),
        ("postgresql://u:hunter2@h/", "names no database"),
        ("postgresql:///db", "names no host"),
        ("postgresql://u:hunter2@h,,k/db", "names no host"),
        ("postgresql://u:hunter2@h:0/db", "a port that is none"),
        ("postgresql://u:hunter2@h:1,k:2,l/db?port=1,2", "a port that is none"),
        ("postgresql://u:hun/ter2@h/db", "a port that is none"),
        ("postgresql://u:hun@ter2@h/db", "cannot be read"),
        ("postgresql://u:hun?ter2@h/db", "cannot be read"),
        ("postgresql://u:hun%ter2@h/db", "cannot be read"),
        ("postgresql:u:hunter2@h/db", "cannot be read"),
        ("postgresql://[u:hunter2@h:9:9/db", "a port that is none"),
    ],
)
def test_what_cannot_be_used_is_refused(url: str, said: str) -> None:
    """By the store's setting and by a service's; with what to do, and without what may be a password."""
    for name, setting in (("KNELL_STORE_URL", "store_url"), ("KNELL_DEDUPE_URL", "dedupe_url")):
        with pytest.raises(InvalidSettings) as refused:
            Settings(**{setting: url})
        assert said in str(refused.value)
        assert name in str(refused.value)
        assert "ter2" not in str(refused.value)
        assert refused.value.__cause__ is None
    with pytest.raises(InvalidSettings):
        check_store_url("X", url)
