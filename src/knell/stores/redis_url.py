"""The URL of a Redis store, taken apart: one server, a primary that sentinels name, or the nodes of a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from redis import ConnectionPool, RedisError

from knell.errors import InvalidSettings
from knell.settings import check_url

# What a URL may tell redis-py. Some of what it also takes would change what Knell reads (decode_responses, protocol).
_OPTIONS = (
    "client_name", "db", "health_check_interval", "max_connections", "password", "retry_on_timeout",
    "socket_connect_timeout", "socket_keepalive", "socket_timeout", "ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs",
    "ssl_certfile", "ssl_check_hostname", "ssl_keyfile", "ssl_password", "username",
)  # fmt: skip
_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
# What it tells Knell alone.
_OF_REPLICAS = ("min_replicas", "wait_ms")
_OF_SENTINELS = ("sentinel_username", "sentinel_password")
# What redis-py reads as no.
_FALSE = ("0", "F", "FALSE", "N", "NO")
DEFAULT_WAIT_MS = 200
# An answer is waited for half a second, and the wait for replicas is a part of that.
MOST_WAIT_MS = 400
MOST_REPLICAS = 100
_PORTS = {"one": 6379, "sentinel": 26379, "cluster": 6379}


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """What a store's URL says.

    Attributes:
        kind: one server; or sentinels, which know where the primary is; or some nodes of a cluster.
        hosts: the host and port of each that the URL names; empty for a socket.
        where: what errors call it; no secret is in it.
        service: the name that the sentinels have for the primary.
        min_replicas: how many replicas must have a write before it is acknowledged.
        wait_ms: how long they have for it, in milliseconds.
        verified: False if it switches off the check of certificates, or of the names in them.
        files: the paths that it names, by their options.
    """

    kind: Literal["one", "sentinel", "cluster"]
    hosts: tuple[tuple[str, int], ...]
    where: str
    service: str = ""
    min_replicas: int = 0
    wait_ms: int = DEFAULT_WAIT_MS
    verified: bool = True
    files: Mapping[str, str] = field(default_factory=dict)
    # What stands before and after host and port. Passwords are in it.
    _server: tuple[str, str] = field(default=("", ""), repr=False)
    _sentinel: tuple[str, str] = field(default=("", ""), repr=False)

    def server(self, host: str = "", port: int = 0) -> str:
        """The URL of one server, as redis-py reads it."""
        return _host_and_port(host, port).join(self._server)

    def sentinel(self, host: str, port: int) -> str:
        """The URL of one sentinel, as redis-py reads it."""
        return _host_and_port(host, port).join(self._sentinel)

    def check_files(self, name: str) -> None:
        """InvalidSettings if a file that is named cannot be read: redis-py would not say which."""
        for option, path in self.files.items():
            if not os.access(path, os.R_OK):
                raise InvalidSettings(f"{name}: {option} is {path!r}, which is not there, or may not be read")


def parse_redis_url(name: str, url: str) -> RedisUrl:
    """Take a URL apart, and try on redis-py what it says. Nothing is contacted.

    Args:
        name: what errors call it, such as "KNELL_STORE_URL".
        url: `redis://`, `rediss://`, `unix://`, `redis+sentinel://`, `redis+cluster://` and so on.

    Raises:
        InvalidSettings: it cannot be used. The text never shows it: a password may stand anywhere in it.
    """
    scheme, _, rest = url.partition("://")
    base, _, arrangement = scheme.lower().partition("+")
    kind: Literal["one", "sentinel", "cluster"] = (
        "sentinel" if arrangement == "sentinel" else "cluster" if arrangement else "one"
    )
    before, question_mark, query = rest.partition("?")
    authority, slash, path = before.partition("/")
    userinfo, at, hosts = authority.rpartition("@")
    for host in hosts.split(",") if arrangement else [hosts]:
        check_url(name, f"{base}://{userinfo}{at}{host}{slash}{path}{question_mark}{query}")
    if base == "unix" and (hosts or not path):
        raise InvalidSettings(f"{name} names no socket; use unix:///path")
    options = _options(name, query, kind)
    found = [] if base == "unix" else [_read_host(name, host, _PORTS[kind]) for host in hosts.split(",")]
    service, database = _read_path(name, kind, path)
    server = f"{base}://{userinfo}{at}", database + _kept(query, lambda option: option in _OPTIONS)
    login = ":".join(quote(options.get(option, ""), safe="") for option in _OF_SENTINELS)
    sentinel = f"{base}://{login}@", _kept(query, lambda option: option.startswith("ssl_"))
    parsed = RedisUrl(
        kind=kind,
        hosts=tuple(found),
        where=",".join(_host_and_port(*each) for each in found) or unquote(f"/{path}"),
        service=service,
        min_replicas=_number(name, options, "min_replicas", 0, MOST_REPLICAS, 0),
        wait_ms=_number(name, options, "wait_ms", 1, MOST_WAIT_MS, DEFAULT_WAIT_MS),
        verified=options.get("ssl_cert_reqs") != "none" and options.get("ssl_check_hostname", "").upper() not in _FALSE,
        files={option: path for option, path in options.items() if option in _FILES},
        _server=server,
        _sentinel=sentinel if kind == "sentinel" else ("", ""),
    )
    _try(name, parsed, scheme, options)
    return parsed


def _options(name: str, query: str, kind: str) -> dict[str, str]:
    known = (*_OPTIONS, *_OF_REPLICAS, *(_OF_SENTINELS if kind == "sentinel" else ()))
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in known:
            raise InvalidSettings(f"{name} has an unknown option {option!r}; use {', '.join(sorted(known))}")
    return options


def _read_host(name: str, host: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(f"redis://{host}")
    if not parts.hostname and host:
        raise InvalidSettings(f"{name} names a server with a port and no host; use HOST:PORT, separated by commas")
    return parts.hostname or "localhost", parts.port or default_port


def _read_path(name: str, kind: str, path: str) -> tuple[str, str]:
    """The name of the primary, and what the URL of a server has as its path."""
    if kind == "one":
        return "", f"/{path}" if path else ""
    if kind == "cluster":
        if path not in ("", "0"):
            raise InvalidSettings(f"{name} names a database; a Redis Cluster has only database 0")
        return "", ""
    service, _, database = path.partition("/")
    if not service:
        raise InvalidSettings(
            f"{name} does not say which primary the sentinels are asked for; use redis+sentinel://HOST,HOST/NAME"
        )
    if database and not (database.isascii() and database.isdigit()):
        raise InvalidSettings(f"{name} has a database that is no number; use redis+sentinel://HOST,HOST/NAME/0")
    return unquote(service), f"/{database or 0}"


def _kept(query: str, keeps: Callable[[str], bool]) -> str:
    kept = [pair for pair in query.split("&") if keeps(unquote(pair.partition("=")[0]))]
    return f"?{'&'.join(kept)}" if kept else ""


def _number(name: str, options: Mapping[str, str], option: str, least: int, most: int, default: int) -> int:
    given = options.get(option, str(default))
    if not (given.isascii() and given.isdigit() and len(given) < 10 and least <= int(given) <= most):
        raise InvalidSettings(f"{name} has an option {option!r} that cannot be used; use {least} to {most}")
    return int(given)


def _try(name: str, parsed: RedisUrl, scheme: str, options: Mapping[str, str]) -> None:
    host = parsed.hosts[0] if parsed.hosts else ("", 0)
    urls = [parsed.server(*host)] + ([parsed.sentinel(*host)] if parsed.kind == "sentinel" else [])
    if parsed.kind == "cluster" and options.get("db", "0") != "0":
        raise InvalidSettings(f"{name} names a database; a Redis Cluster has only database 0")
    try:
        for url in urls:
            ConnectionPool.from_url(url).make_connection()  # an object; nothing is contacted
    except (TypeError, ValueError, RedisError):
        raise InvalidSettings(
            f"{name} has an option with a value that cannot be used, or that {scheme}:// does not have; "
            f"look at {', '.join(options) or 'its path'}"
        ) from None


def _host_and_port(host: str, port: int) -> str:
    if not port:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
