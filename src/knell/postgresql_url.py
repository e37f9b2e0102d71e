"""Reads `postgresql://` URLs: what libpq understands, less what would break Knell's promises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from knell.errors import InvalidSettings

# A process opens as many connections at most, and one more where it waits for changes. PostgreSQL allows 100 in all by
# default, and there may be a score of processes; a transaction has one for a few milliseconds.
POOL_SIZE = 4
_MOST_CONNECTIONS = 100
_PORT = 5432
# What a URL may tell libpq. Time limits, encodings and server settings are Knell's own.
_OPTIONS = (
    "application_name", "channel_binding", "gssencmode", "host", "passfile", "password", "pool_size", "port",
    "require_auth", "ssl_min_protocol_version", "sslcert", "sslcrl", "sslcrldir", "sslkey", "sslmode", "sslnegotiation",
    "sslpassword", "sslrootcert", "target_session_attrs", "user",
)  # fmt: skip
# A standby lags, and a verifier that read from one would not know how old its denylist is.
_VALUES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("read-write", "primary"),
    "channel_binding": ("disable", "prefer", "require"),
    "gssencmode": ("disable", "prefer", "require"),
}


@dataclass(frozen=True, slots=True)
class PostgresUrl:
    """A URL, taken apart.

    Attributes:
        hosts: where its servers are, in order: (host, or the folder of a socket; port).
        options: everything else, as libpq calls it; the password is among it.
        pool_size: how many connections a process opens at most for transactions.
    """

    hosts: tuple[tuple[str, int], ...]
    options: dict[str, Any] = field(repr=False)
    pool_size: int

    @property
    def where(self) -> str:
        """Hosts, ports and the database: what may be shown to anybody."""
        return ",".join(f"{host}:{port}" for host, port in self.hosts) + f"/{self.options['dbname']}"


def read_postgresql_url(name: str, url: str) -> PostgresUrl:
    """Read `postgresql://USER:PASSWORD@HOST:PORT,HOST:PORT/DATABASE?OPTION=VALUE`. Nothing is contacted.

    Args:
        name: what an error calls it, such as "KNELL_STORE_URL". An error never shows the URL.

    Raises:
        InvalidSettings: it cannot be read, has an unknown option, or names no host or database; or psycopg is missing.
    """
    try:
        from psycopg import ProgrammingError
        from psycopg.conninfo import conninfo_to_dict
    except ImportError as error:
        raise InvalidSettings(
            f"{name} is a postgresql:// URL, which takes psycopg ({error}); pip install 'knell[postgresql]'"
        ) from None
    head, _, query = url.partition("?")
    pairs = [pair.partition("=") for pair in query.split("&")] if query else []
    if not all(equals for _, equals, _ in pairs):
        raise _unreadable(name)
    given = {option: value for option, _, value in pairs}
    _check_options(name, given)
    ours = given.get("pool_size", str(POOL_SIZE))
    if not ours.isascii() or not ours.isdigit() or not 1 <= int(ours) <= _MOST_CONNECTIONS:
        raise InvalidSettings(f"{name} has pool_size {ours!r}; use 1 to {_MOST_CONNECTIONS} ({POOL_SIZE} is usual)")
    theirs = "&".join("".join(pair) for pair in pairs if pair[0] != "pool_size")
    try:
        options = conninfo_to_dict(f"{head}?{theirs}" if theirs else head)
    except ProgrammingError:  # its text may have a part of the password in it
        raise _unreadable(name) from None
    hosts = _hosts(name, str(options.pop("host", "") or ""), str(options.pop("port", "") or ""))
    if not options.get("dbname"):
        raise InvalidSettings(f"{name} names no database; use postgresql://USER:PASSWORD@HOST:{_PORT}/DATABASE")
    return PostgresUrl(hosts, options, int(ours))


def _check_options(name: str, options: dict[str, str]) -> None:
    for option, value in options.items():
        if option not in _OPTIONS:
            raise InvalidSettings(f"{name} has an unknown option {option!r}; use {', '.join(_OPTIONS)}")
        if option in _VALUES and value not in _VALUES[option]:
            raise InvalidSettings(f"{name} has {option}={value!r}; use {' or '.join(_VALUES[option])}")


def _hosts(name: str, hosts: str, ports: str) -> tuple[tuple[str, int], ...]:
    if "@" in hosts:
        raise _unreadable(name)
    found = hosts.split(",")
    if not all(found):
        raise InvalidSettings(f"{name} names no host; use postgresql://USER:PASSWORD@HOST:{_PORT}/DATABASE")
    given = ports.split(",")
    if len(given) == 1:
        given *= len(found)
    if len(given) != len(found) or not all(one == "" or _is_port(one) for one in given):
        raise InvalidSettings(
            f"{name} has a port that is none; write HOST:PORT,HOST:PORT, and / ? # @ of a password as %2F %3F %23 %40"
        )
    return tuple((host, int(port or _PORT)) for host, port in zip(found, given, strict=True))


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text) <= 65_535


def _unreadable(name: str) -> InvalidSettings:
    return InvalidSettings(
        f"{name} cannot be read as a URL (it is not shown here: it may hold a password); "
        "in a password, write / ? # @ ; and % as %2F %3F %23 %40 %3B %25"
    )
