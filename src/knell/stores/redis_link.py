"""The connection to Redis or Valkey: bounded in time, with scripts, and with one kind of error."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.retry import Retry

from knell.errors import InvalidSettings, StoreUnavailable

# A request path waits for this: one attempt to connect and one to read, each twice, stays within 2 s.
TIMEOUT_SECONDS = 0.5
# A second attempt begins only this soon after the first one did, so that both together stay within 2 s.
RETRY_WITHIN_SECONDS = 1.1
# A connection that was idle for so long is tried with a PING first.
HEALTH_CHECK_SECONDS = 30
# How long one XREAD may block: between two, the server's identity is looked at.
BLOCK_SECONDS = 1.0
# Loading brings all scripts at once; twice for those that are flushed, or fail over, right then.
MOST_LOADS = 2
# The parts that a script begins with, beside common.lua.
_PRELUDES = {
    "track": ("tokens", "feed"),
    "armed": ("tokens",),
    "due": ("tokens",),
    "session": ("tokens",),
    "detach": ("tokens",),
    "attach": ("tokens",),
    "claim": ("tokens", "log"),
    "revoke": ("log", "feed", "audit"),
    "undo": ("log", "feed", "audit", "missing"),
    "note": ("audit",),
    "list_audit": (),
    "live_in_session": ("tokens",),
    "refusals": ("feed",),
    "snapshot": ("feed",),
    "revocation": ("feed",),
    "prune_feed": ("feed",),
    "read_feed": (),
    "epoch": (),
    "settle": ("log",),
    "waiting": (),
    "take": ("log",),
    "resend": (),
    "receive": ("log",),
    "forget": ("log",),
    "missed": ("log", "missing"),
    "services": ("log",),
    "add_service": (),
    "remove_service": (),
    "outdated": ("log",),
    "drop": ("log",),
    "lease": (),
    "begin": ("dedupe",),
    "mark": ("dedupe",),
    "park": ("parked",),
    "list_parked": ("parked",),
    "unpark": ("parked",),
    "prune_kept": ("parked",),
}

# Scripts whose answer tells what this very run did. It is kept for a while: the same call, sent again because its first
# answer was lost, is then answered as it was.
_ANSWERED_ONCE = frozenset(
    {"revoke", "undo", "claim", "begin", "add_service", "remove_service", "unpark", "drop", "prune_feed", "prune_kept"}
)

T = TypeVar("T")

Argument = str | bytes | int | float
# One command: either ("EVALSHA", sha, number of keys, tag, ...), made by `script`, or any other.
Command = tuple[Argument, ...]


@cache
def _sources() -> Mapping[str, tuple[str, str]]:
    """Each script's digest and text, by its name."""
    folder = files("knell.stores") / "lua"

    def read(name: str) -> str:
        return (folder / f"{name}.lua").read_text("utf-8")

    found = {}
    for name, preludes in _PRELUDES.items():
        own = read(name)
        if name in _ANSWERED_ONCE:
            own = f"local function run()\n{own}end\n{read('once')}"
        text = "\n".join([*(read(part) for part in ("common", *preludes)), own])
        found[name] = (hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), text)
    return found


def script(name: str, tag: str, *arguments: Argument) -> Command:
    """The command that runs a script in the slot of `tag`. Make one for each call: sent again, it is that same call."""
    keys = (tag, f"{tag}:a:{secrets.token_hex(8)}") if name in _ANSWERED_ONCE else (tag,)
    return ("EVALSHA", _sources()[name][0], len(keys), *keys, *arguments)


class Link:
    """Runs commands. Threads may share one; after a fork each process opens connections of its own.

    Args:
        url: `redis://`, `rediss://` or `unix://`. Nothing is contacted here.
    """

    def __init__(self, url: str) -> None:
        self.where = _where(url)
        self._opened = 0
        self._lock = threading.Lock()
        try:
            self._client = self._open(url, TIMEOUT_SECONDS)
            self._reader = self._open(url, BLOCK_SECONDS + TIMEOUT_SECONDS)
        except (ValueError, TypeError) as error:
            raise InvalidSettings(f"KNELL_STORE_URL for {self.where} cannot be used: {error}") from None

    @property
    def opened(self) -> int:
        """How many connections were opened so far; when it grows, the server may be another one."""
        return self._opened

    def run(self, *commands: Command) -> list[Any]:
        """Run commands in one round trip, in order, and return their answers.

        They may run a second time, when the answers of the first were lost.

        Raises:
            StoreUnavailable: the server did not answer in time, or refused one of them.
        """
        answers: list[Any] = []
        loads = 0
        while len(answers) < len(commands):
            found = self._guarded(partial(self._pipeline, commands[len(answers) :]))
            missing = next((n for n, one in enumerate(found) if isinstance(one, NoScriptError)), None)
            if missing is not None:
                if loads == MOST_LOADS:
                    raise StoreUnavailable(
                        f"the store at {self.where} keeps no scripts; is it one server, all the time?"
                    )
                loads += 1
                self._guarded(self._load)
                found = found[:missing]
            answers += found
        for answer in answers:
            if isinstance(answer, RedisError):
                raise self._refused(answer)
        return answers

    def call(self, name: str, tag: str, *arguments: Argument) -> Any:
        """Run one script."""
        return self.run(script(name, tag, *arguments))[0]

    def block(self, stream: str, after: int, seconds: float) -> None:
        """Wait until a stream has an entry after `<after>-0`, at most BLOCK_SECONDS."""
        milliseconds = max(1, round(min(seconds, BLOCK_SECONDS) * 1000))
        self._guarded(lambda: self._reader.xread({stream: f"{after}-0"}, count=1, block=milliseconds))

    def close(self) -> None:
        """Close the idle connections."""
        self._client.close()
        self._reader.close()

    def _open(self, url: str, timeout_seconds: float) -> redis.Redis:
        return redis.Redis.from_url(
            url,
            decode_responses=False,
            protocol=2,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=TIMEOUT_SECONDS,
            health_check_interval=HEALTH_CHECK_SECONDS,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=self._connected,
        )

    def _connected(self, connection: Any) -> None:
        connection.on_connect()
        with self._lock:
            self._opened += 1

    def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        with self._client.pipeline(transaction=False) as pipe:
            queue: Callable[..., Any] = pipe.execute_command
            for command in commands:
                queue(*command)
            answers = list(pipe.execute(raise_on_error=False))
        if refused := next((one for one in answers if isinstance(one, ReadOnlyError)), None):
            raise refused
        return answers

    def _load(self) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            for _, text in _sources().values():
                pipe.script_load(text)
            pipe.execute()

    def _guarded(self, action: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            return action()
        except (redis.ConnectionError, redis.TimeoutError, ReadOnlyError) as error:
            if time.monotonic() - began > RETRY_WITHIN_SECONDS:
                raise self._refused(error) from error
        except (RedisError, OSError) as error:
            raise self._refused(error) from error
        # After a restart every idle connection is dead, not only the one that was just tried; after a failover each may
        # lead to what has become a replica.
        for client in (self._client, self._reader):
            client.connection_pool.disconnect(inuse_connections=False)
        try:
            return action()
        except (RedisError, OSError) as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> Exception:
        # redis-py puts the command before the server's text: arguments do not belong into an error.
        text = " ".join(str(error).rpartition(" of pipeline caused error: ")[2].split())
        if isinstance(error, ResponseError) and "KNELLLAYOUT" in text:
            found = text.split("KNELLLAYOUT")[1].split()[0]
            return InvalidSettings(
                f"the store at {self.where} was laid out with KNELL_PARTITIONS={found}; set every process to that"
            )
        return StoreUnavailable(f"the store at {self.where} did not answer or refused: {type(error).__name__}: {text}")


def _where(url: str) -> str:
    """The URL's host and port, or its socket's path: what may be shown to anybody."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    try:
        return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    except ValueError:
        # Python's own text has the port in it: of a password with a "/" that is a part of the password.
        raise InvalidSettings(
            "KNELL_STORE_URL has a port that is none; write / ? # @ of a password as %2F ..."
        ) from None
