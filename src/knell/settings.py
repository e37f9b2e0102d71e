"""Settings, read once from `KNELL_*` variables. Nothing else in the library reads the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from knell.errors import InvalidSettings
from knell.postgresql_url import read_postgresql_url

EMBEDDED_BROKER = "knell+sqlite"
# RabbitMQ's delay ladder has 28 levels: 2**28 s and more come out at a wrong time.
LONGEST_TIMER_SECONDS = 2.0**28 - 1
# Beyond what a float counts exactly, a lifetime or a size is a slip of the finger.
_TOO_MUCH = 2.0**53
# In their URLs the path is what counts.
_OF_FILES = ("unix", "sqlite", EMBEDDED_BROKER)
# What a store's URL may begin with, as an error says it.
STORE_SCHEMES = (
    "redis://, rediss://, redis+sentinel://, redis+cluster://, unix:///path, postgresql:// or sqlite:///path"
)
_OF_BROKERS = ("amqp", "amqps", "pyamqp", EMBEDDED_BROKER)
REDIS_SCHEMES = (
    "redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster",
)  # fmt: skip
_HEARTBEAT = re.compile(r"[0-9]{1,4}")
# What a Redis Cluster has.
_SLOTS = 16_384
# A claim's name; a URL is one too (OpenID Connect Core 1.0, section 5.1.2).
_CLAIM = re.compile(r"[^\s,\x00-\x1f\x7f]{1,256}")
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,62}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The lifetimes and limits that bound everything Knell keeps. Every process of a deployment must use the same.

    Attributes:
        max_token_seconds: the longest lifetime of a token. Longer ones are refused. Default one day.
        max_session_seconds: the longest lifetime of a session. Default 30 days.
        leeway_seconds: the most clock skew that a verifier may forgive. Default 10.
        session_grace_seconds: how long after its last token's exp a session without session_exp lives on. Default 0:
            the token is the session.
        retention_seconds: how long notices, receipts, parked entries and dedupe records are kept. Default 7 days.
        log_max_bytes: how large the open part of the notice log may grow. Default 1 GiB.
        audit_seconds: how long the audit log keeps an entry. Default 400 days.
        tracked_claims: claims that are kept with every token, so that the store knows whom a revocation by claims ends.
            They may be personal data: none by default.
    """

    max_token_seconds: float = 86_400.0
    max_session_seconds: float = 30 * 86_400.0
    leeway_seconds: float = 10.0
    session_grace_seconds: float = 0.0
    retention_seconds: float = 7 * 86_400.0
    log_max_bytes: int = 2**30
    audit_seconds: float = 400 * 86_400.0
    tracked_claims: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.tracked_claims, str) or not all(_CLAIM.fullmatch(name) for name in self.tracked_claims):
            raise InvalidSettings(
                f"KNELL_TRACKED_CLAIMS is {self.tracked_claims!r}; use names of claims with a comma between them"
            )
        for name in ("max_token_seconds", "max_session_seconds", "retention_seconds", "log_max_bytes", "audit_seconds"):
            value = getattr(self, name)
            if not 0 < value < _TOO_MUCH:
                raise InvalidSettings(f"KNELL_{name.upper()} is {value}; it must be a finite number above 0")
        for name in ("leeway_seconds", "session_grace_seconds"):
            value = getattr(self, name)
            if not 0 <= value < _TOO_MUCH:
                raise InvalidSettings(f"KNELL_{name.upper()} is {value}; it must be a finite number, 0 or more")


# What the embedded default has under its home, by the setting that names it.
_OWN_KEYS = {"notice_key": "notice-key.pem", "trust": "trust.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One deployment's settings. `Settings.from_environ()` reads them from `KNELL_*`.

    Attributes:
        namespace: keeps two environments on one server apart. KNELL_NAMESPACE, default "knell".
        home: where the embedded default keeps its files. KNELL_HOME, default ".knell".
        broker_url: `amqp://`, `amqps://` (several of one scheme, separated by ";", fail over), or
            `knell+sqlite:///path`, the embedded broker. KNELL_BROKER_URL, default the embedded one under `home`.
        broker_api_url: RabbitMQ's management API, with credentials; used by `knell topology apply` and `doctor`.
            KNELL_BROKER_API_URL.
        store_url: `redis://`, `rediss://`, either with `+sentinel` or `+cluster`, `unix:///path`,
            `postgresql://` or `sqlite:///path`; docs/settings.md has examples. KNELL_STORE_URL, default SQLite under
            `home`.
        dedupe_url: where a service keeps what it has handled. KNELL_DEDUPE_URL, default the store's URL.
        trust: path of the trust list (a JWK Set whose keys also have `iss` and `causes`). KNELL_TRUST.
        notice_key: path of the PEM private key that signs notices. KNELL_NOTICE_KEY.
        health_file: a file that a worker, or beat, touches every few seconds while it is connected to the broker: its
            age tells a health check how it is. KNELL_HEALTH_FILE, default none.
        sweep_interval_seconds: KNELL_SWEEP_INTERVAL_SECONDS, default 10.
        partitions: how many hash slots the tokens are spread over. KNELL_PARTITIONS, default 1.
        confirm_sessions: a revocation of a client, a key, claims or an issuer that would end more sessions than this
            has to be confirmed by name. KNELL_CONFIRM_SESSIONS, default 1000.
        rules: KNELL_MAX_TOKEN_SECONDS, KNELL_MAX_SESSION_SECONDS, KNELL_LEEWAY_SECONDS, KNELL_SESSION_GRACE_SECONDS,
            KNELL_RETENTION_SECONDS, KNELL_LOG_MAX_BYTES, KNELL_AUDIT_SECONDS, KNELL_TRACKED_CLAIMS.
    """

    namespace: str = "knell"
    home: Path = Path(".knell")
    # Passwords stand in them.
    broker_url: str = field(default="", repr=False)
    broker_api_url: str | None = field(default=None, repr=False)
    store_url: str = field(default="", repr=False)
    dedupe_url: str = field(default="", repr=False)
    trust: Path | None = None
    notice_key: Path | None = None
    health_file: Path | None = None
    sweep_interval_seconds: float = 10.0
    partitions: int = 1
    confirm_sessions: int = 1000
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.namespace):
            raise InvalidSettings(f"KNELL_NAMESPACE is {self.namespace!r}; use a name like 'knell' or 'knell-staging'")
        defaults = {
            "broker_url": f"{EMBEDDED_BROKER}:///{self.home / 'broker.db'}",
            "store_url": f"sqlite:///{self.home / 'store.db'}",
        }
        for name, default in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, default)
        if not self.dedupe_url:
            object.__setattr__(self, "dedupe_url", self.store_url)
        _check_broker_url(self.broker_url)
        check_url("KNELL_BROKER_API_URL", self.broker_api_url or "")
        check_store_url("KNELL_STORE_URL", self.store_url)
        check_store_url("KNELL_DEDUPE_URL", self.dedupe_url)
        if self.embedded:
            for name, file in _OWN_KEYS.items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, self.home / file)
        if not 0.1 <= self.sweep_interval_seconds < _TOO_MUCH:
            raise InvalidSettings(
                f"KNELL_SWEEP_INTERVAL_SECONDS is {self.sweep_interval_seconds}; use 0.1 or more (10 is usual)"
            )
        if not 0 <= self.confirm_sessions < _TOO_MUCH:
            raise InvalidSettings(f"KNELL_CONFIRM_SESSIONS is {self.confirm_sessions}; use 0 or more (1000 is usual)")
        if not 1 <= self.partitions <= _SLOTS:
            raise InvalidSettings(
                f"KNELL_PARTITIONS is {self.partitions}; use 1, or on a Redis Cluster up to {_SLOTS}, one for each slot"
            )

    @property
    def embedded(self) -> bool:
        """True on the embedded default, where no broker server is needed."""
        return self.broker_url.startswith(f"{EMBEDDED_BROKER}:")

    @property
    def own_keys(self) -> bool:
        """True if the notice key and the trust list are those under `home`, which are made when they are missing."""
        return all(getattr(self, name) == self.home / file for name, file in _OWN_KEYS.items())

    @property
    def audience(self) -> str:
        """The `aud` of this deployment's notices and commands."""
        return f"knell:{self.namespace}"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read `KNELL_*`. A variable that is set but empty counts as not set.

        Raises:
            InvalidSettings: a value cannot be used; the text names the variable.
        """
        source = os.environ if environ is None else environ
        found = {name: value for name, value in source.items() if name.startswith("KNELL_") and value}
        values: dict[str, Any] = {}
        rules: dict[str, Any] = {}
        names: Mapping[str, Callable[[str], Any]]
        for into, names in ((values, _VALUES), (rules, _RULES)):
            for name, kind in names.items():
                variable = f"KNELL_{name.upper()}"
                if variable in found:
                    try:
                        into[name] = kind(found[variable])
                    except ValueError:
                        raise InvalidSettings(f"{variable} is {found[variable]!r}; it must be a number") from None
        settings = cls(**values, rules=Rules(**rules))
        _check_paths(settings)
        return settings


def _names_in(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


# How the text of each variable is read.
_VALUES: Mapping[str, Callable[[str], Any]] = {
    "namespace": str,
    "home": Path,
    "broker_url": str,
    "broker_api_url": str,
    "store_url": str,
    "dedupe_url": str,
    "trust": Path,
    "notice_key": Path,
    "health_file": Path,
    "sweep_interval_seconds": float,
    "partitions": int,
    "confirm_sessions": int,
}
_RULES: Mapping[str, Callable[[str], Any]] = {
    "max_token_seconds": float,
    "max_session_seconds": float,
    "leeway_seconds": float,
    "session_grace_seconds": float,
    "retention_seconds": float,
    "log_max_bytes": int,
    "audit_seconds": float,
    "tracked_claims": _names_in,
}


def check_store_url(name: str, url: str) -> None:
    """Refuse a store's URL that cannot be used. The text never shows it: a password may stand anywhere in it.

    Args:
        name: what the text calls it, such as "KNELL_STORE_URL".
        url: `redis://`, `rediss://`, either with `+sentinel` or `+cluster`, `unix:///path`,
            `postgresql://` or `sqlite:///path`.

    Raises:
        InvalidSettings: another scheme, no path, an unknown option, a value that cannot be read. Nothing is contacted.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in REDIS_SCHEMES:
        from knell.stores.redis_url import parse_redis_url  # loads redis-py, which who has another store does without

        parse_redis_url(name, url)
        return
    if scheme == "postgresql":
        read_postgresql_url(name, url)
        return
    check_url(name, url)
    scheme = urlsplit(url).scheme
    if scheme == "sqlite":
        _check_file_url(name, url, scheme)
    else:
        raise InvalidSettings(f"{name} has scheme {scheme!r}; use {STORE_SCHEMES}")


def _check_broker_url(url: str) -> None:
    name, urls = "KNELL_BROKER_URL", url.split(";")
    for each in urls:
        check_url(name, each)
        parts = urlsplit(each)
        if parts.scheme not in _OF_BROKERS:
            raise InvalidSettings(
                f"{name} has scheme {parts.scheme!r}; use amqp://, amqps:// or {EMBEDDED_BROKER}:///path"
            )
        if parts.scheme == EMBEDDED_BROKER:
            _check_file_url(name, each, EMBEDDED_BROKER)
        for option, value in parse_qsl(parts.query):
            if option != "heartbeat" or not _HEARTBEAT.fullmatch(value):
                raise InvalidSettings(
                    f"{name} has an option {option!r} that cannot be used; the only one is heartbeat=SECONDS, 0 to 9999"
                )
    schemes = sorted({urlsplit(each).scheme for each in urls})
    if len(schemes) > 1:
        raise InvalidSettings(f"{name} mixes {':// and '.join(schemes)}://; use one scheme for every server")
    if schemes == [EMBEDDED_BROKER] and len(urls) > 1:
        raise InvalidSettings(f"{name} names several files; only servers, amqp:// or amqps://, fail over")


def _check_file_url(name: str, url: str, scheme: str) -> None:
    path = url.removeprefix(f"{scheme}:///").partition("?")[0]
    if path in ("", ":memory:") or not url.startswith(f"{scheme}:///"):
        raise InvalidSettings(f"{name} names no file, which several processes could share; use {scheme}:///path")


def check_url(name: str, url: str) -> None:
    """Refuse what cannot be read as a URL, without showing it."""
    # What reads it takes the first "/", "?" or "#" for the end of the host, so that the rest of a password would be a
    # path, which errors show.
    try:
        parts = urlsplit(url)
        _ = parts.port
        (parts.hostname or "").encode("idna")  # as the look-up of the address will
        misread = parts.scheme not in _OF_FILES and "@" in url and "@" not in parts.netloc
    except ValueError:
        misread = True
    if misread:
        raise InvalidSettings(
            f"{name} cannot be read as a URL (it is not shown here: it may hold a password); "
            "in a password, write / ? # @ ; and % as %2F %3F %23 %40 %3B %25"
        )


def _check_paths(settings: Settings) -> None:
    # Here and not where the values are made: this is what is there now, and may be otherwise tomorrow.
    if settings.embedded and os.path.exists(settings.home) and not os.path.isdir(settings.home):
        raise InvalidSettings(f"KNELL_HOME {settings.home} is a file; it must be a folder, or the name of a new one")
    for name in ("trust", "notice_key", "health_file"):
        path = getattr(settings, name)
        if path is not None and os.path.isdir(path):
            raise InvalidSettings(f"KNELL_{name.upper()} {path} is a folder; it must be a file")


def check_service_name(name: str) -> str:
    """A service's name: `^[a-z][a-z0-9_-]{0,62}$`; InvalidSettings otherwise."""
    if not is_service_name(name):
        raise InvalidSettings(
            f"{name!r} is no service name; use a lower-case letter, then letters, digits, '_' or '-', 63 at most"
        )
    return name


def is_service_name(name: object) -> bool:
    """Whether a service may be called that."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None
