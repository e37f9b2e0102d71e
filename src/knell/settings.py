"""Settings, read once from `KNELL_*` variables. Nothing else in the library reads the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from knell.errors import InvalidSettings

EMBEDDED_BROKER = "knell+sqlite"
# RabbitMQ's delay ladder has 28 levels: 2**28 s and more come out at a wrong time.
LONGEST_TIMER_SECONDS = 2.0**28 - 1
# Beyond what a float counts exactly, a lifetime or a size is a slip of the finger.
_TOO_MUCH = 2.0**53
# In their URLs the path is what counts.
_OF_FILES = ("unix", "sqlite", EMBEDDED_BROKER)
# What a Redis Cluster has.
_SLOTS = 16_384
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
    """

    max_token_seconds: float = 86_400.0
    max_session_seconds: float = 30 * 86_400.0
    leeway_seconds: float = 10.0
    session_grace_seconds: float = 0.0
    retention_seconds: float = 7 * 86_400.0
    log_max_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name in ("max_token_seconds", "max_session_seconds", "retention_seconds", "log_max_bytes"):
            value = getattr(self, name)
            if not 0 < value < _TOO_MUCH:
                raise InvalidSettings(f"KNELL_{name.upper()} is {value}; it must be a finite number above 0")
        for name in ("leeway_seconds", "session_grace_seconds"):
            value = getattr(self, name)
            if not 0 <= value < _TOO_MUCH:
                raise InvalidSettings(f"KNELL_{name.upper()} is {value}; it must be a finite number, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One deployment's settings. `Settings.from_environ()` reads them from `KNELL_*`.

    Attributes:
        namespace: keeps two environments on one server apart. KNELL_NAMESPACE, default "knell".
        home: where the embedded default keeps its files. KNELL_HOME, default ".knell".
        broker_url: `amqp://`, `amqps://` (several separated by ";" fail over), or `knell+sqlite:///path`, the embedded
            broker. KNELL_BROKER_URL, default the embedded one under `home`.
        broker_api_url: RabbitMQ's management API, with credentials; used by `knell topology apply` and `doctor`.
            KNELL_BROKER_API_URL.
        store_url: `redis://`, `rediss://`, `unix://` or `sqlite:///path`. KNELL_STORE_URL, default SQLite under `home`.
        dedupe_url: where a service keeps what it has handled. KNELL_DEDUPE_URL, default the store's URL.
        trust: path of the trust list (a JWK Set whose keys also have `iss` and `causes`). KNELL_TRUST.
        notice_key: path of the PEM private key that signs notices. KNELL_NOTICE_KEY.
        health_file: a file that a worker, or beat, touches every few seconds while it is connected to the broker: its
            age tells a health check how it is. KNELL_HEALTH_FILE, default none.
        sweep_interval_seconds: KNELL_SWEEP_INTERVAL_SECONDS, default 10.
        partitions: how many hash slots the tokens are spread over. KNELL_PARTITIONS, default 1.
        rules: KNELL_MAX_TOKEN_SECONDS, KNELL_MAX_SESSION_SECONDS, KNELL_LEEWAY_SECONDS, KNELL_SESSION_GRACE_SECONDS,
            KNELL_RETENTION_SECONDS, KNELL_LOG_MAX_BYTES.
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
        for name in ("broker_url", "broker_api_url", "store_url", "dedupe_url"):
            given = getattr(self, name) or ""
            for url in given.split(";") if name == "broker_url" else [given]:
                _check_url(f"KNELL_{name.upper()}", url)
        scheme = self.broker_url.partition(":")[0]
        if scheme not in ("amqp", "amqps", "pyamqp", EMBEDDED_BROKER):
            raise InvalidSettings(
                f"KNELL_BROKER_URL has scheme {scheme!r}; use amqp://, amqps:// or {EMBEDDED_BROKER}:///path"
            )
        if self.embedded:
            for name, file in (("notice_key", "notice-key.pem"), ("trust", "trust.json")):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, self.home / file)
        if not 0.1 <= self.sweep_interval_seconds < _TOO_MUCH:
            raise InvalidSettings(
                f"KNELL_SWEEP_INTERVAL_SECONDS is {self.sweep_interval_seconds}; use 0.1 or more (10 is usual)"
            )
        if not 1 <= self.partitions <= _SLOTS:
            raise InvalidSettings(
                f"KNELL_PARTITIONS is {self.partitions}; use 1, or on a Redis Cluster up to {_SLOTS}, one for each slot"
            )

    @property
    def embedded(self) -> bool:
        """True on the embedded default, where no broker server is needed."""
        return self.broker_url.startswith(f"{EMBEDDED_BROKER}:")

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
        for into, names in (
            (values, {"namespace": str, "home": Path, "broker_url": str, "broker_api_url": str, "store_url": str,
                      "dedupe_url": str, "trust": Path, "notice_key": Path, "health_file": Path,
                      "sweep_interval_seconds": float, "partitions": int}),
            (rules, {"max_token_seconds": float, "max_session_seconds": float, "leeway_seconds": float,
                     "session_grace_seconds": float, "retention_seconds": float, "log_max_bytes": int}),
        ):  # fmt: skip
            for name, kind in names.items():
                variable = f"KNELL_{name.upper()}"
                if variable in found:
                    try:
                        into[name] = kind(found[variable])
                    except ValueError:
                        raise InvalidSettings(f"{variable} is {found[variable]!r}; it must be a number") from None
        return cls(**values, rules=Rules(**rules))


def _check_url(variable: str, url: str) -> None:
    # What reads it takes the first "/", "?" or "#" for the end of the host, so that the rest of a password would be a
    # path, which errors show.
    try:
        parts = urlsplit(url)
        _ = parts.port
        misread = parts.scheme not in _OF_FILES and "@" in url and "@" not in parts.netloc
    except ValueError:
        misread = True
    if misread:
        raise InvalidSettings(
            f"{variable} cannot be read as a URL (it is not shown here: it may hold a password); "
            "in a password, write / ? # @ ; and % as %2F %3F %23 %40 %3B %25"
        )


def check_service_name(name: str) -> str:
    """A service's name: `^[a-z][a-z0-9_-]{0,62}$`; InvalidSettings otherwise."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidSettings(
            f"{name!r} is no service name; use a lower-case letter, then letters, digits, '_' or '-', 63 at most"
        )
    return name
