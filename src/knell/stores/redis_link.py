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

import redis
from redis.exceptions import MovedError, NoScriptError, ReadOnlyError, RedisError, ResponseError

from knell.errors import InvalidSettings, StoreUnavailable
from knell.stores.redis_cluster import Cluster
from knell.stores.redis_node import BLOCK_SECONDS, Argument, Command, Replicas
from knell.stores.redis_servers import OneServer, Sentinels, Servers
from knell.stores.redis_url import parse_redis_url

# A second attempt begins only this soon after the first one did, so that both together stay within 2 s.
RETRY_WITHIN_SECONDS = 1.1
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
    "revocation": ("feed",),
    "prune_feed": ("feed",),
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
    "prune_kept": ("parked", "dedupe"),
}

# Scripts whose answer tells what this very run did. It is kept for a while: the same call, sent again because its first
# answer was lost, is then answered as it was.
SCRIPTS_ANSWERED_ONCE = frozenset(
    {"revoke", "undo", "claim", "begin", "add_service", "remove_service", "unpark", "drop", "prune_feed", "prune_kept"}
)

# Scripts that only read: the server holds them to that.
READING_SCRIPTS = frozenset(
    {
        "session", "live_in_session", "refusals", "revocation", "due", "waiting", "services", "outdated", "list_parked",
        "list_audit",
    }
)  # fmt: skip
WRITING_SCRIPTS = frozenset(_PRELUDES) - READING_SCRIPTS

T = TypeVar("T")


@cache
def _sources() -> Mapping[str, tuple[str, str]]:
    """Each script's digest and text, by its name."""
    folder = files("knell.stores") / "lua"

    def read(name: str) -> str:
        return (folder / f"{name}.lua").read_text("utf-8")

    found = {}
    for name, preludes in _PRELUDES.items():
        own = read(name)
        if name in SCRIPTS_ANSWERED_ONCE:
            own = f"local function run()\n{own}end\n{read('once')}"
        text = "\n".join([*(read(part) for part in ("common", *preludes)), own])
        found[name] = (hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), text)
    return found


def script(name: str, tag: str, *arguments: Argument) -> Command:
    """The command that runs a script in the slot of `tag`. Make one for each call: sent again, it is that same call."""
    keys = (tag, f"{tag}:a:{secrets.token_hex(8)}") if name in SCRIPTS_ANSWERED_ONCE else (tag,)
    return ("EVALSHA_RO" if name in READING_SCRIPTS else "EVALSHA", _sources()[name][0], len(keys), *keys, *arguments)


class Link:
    """Runs commands. Threads may share one; after a fork each process opens connections of its own.

    Args:
        url: see `knell.stores.redis_url`. Nothing is contacted here.
        home: a key of the slot where what names no key is asked, on a cluster.
    """

    def __init__(self, url: str, *, home: str) -> None:
        self.url = parsed = parse_redis_url("KNELL_STORE_URL", url)
        parsed.check_files("KNELL_STORE_URL")
        self.where = parsed.where
        self._opened = 0
        self._lock = threading.Lock()
        replicas = Replicas(parsed.min_replicas, parsed.wait_ms) if parsed.min_replicas else None
        self._servers: Servers
        if parsed.kind == "cluster":
            self._servers = Cluster(parsed, replicas, self._changed, home=home)
        elif parsed.kind == "sentinel":
            self._servers = Sentinels(parsed, replicas, self._changed)
        else:
            self._servers = OneServer(parsed, replicas, self._changed)

    @property
    def opened(self) -> int:
        """How many connections were opened, and slots found moved; when it grows, the server may be another one."""
        return self._opened

    def look(self) -> None:
        """Make sure that what is asked is still the server to ask; `opened` grows if it was not."""
        self._guarded(self._servers.look)

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
            missing = [n for n, one in enumerate(found) if isinstance(one, NoScriptError)]
            if missing:
                if loads == MOST_LOADS:
                    raise StoreUnavailable(
                        f"the store at {self.where} keeps no scripts; is it one server, all the time?"
                    )
                loads += 1
                left = commands[len(answers) :]
                self._guarded(partial(self._load, [left[n] for n in missing]))
                found = found[: missing[0]]
            answers += found
        for answer in answers:
            if isinstance(answer, RedisError):
                raise self._refused(answer)
        return answers

    def each(self, keys: Sequence[str], *commands: Command) -> dict[str, list[Any]]:
        """The answers of every server that has one of these keys, by its host and port."""
        answers: dict[str, list[Any]] = self._guarded(partial(self._servers.each, keys, commands))
        for answer in (each for some in answers.values() for each in some):
            if isinstance(answer, RedisError):
                raise self._refused(answer)
        return answers

    def call(self, name: str, tag: str, *arguments: Argument) -> Any:
        """Run one script."""
        return self.run(script(name, tag, *arguments))[0]

    def block(self, stream: str, after: int, seconds: float) -> None:
        """Wait until a stream has an entry after `<after>-0`, at most BLOCK_SECONDS."""
        milliseconds = max(1, round(min(seconds, BLOCK_SECONDS) * 1000))
        self._guarded(partial(self._servers.block, stream, after, milliseconds))

    def close(self) -> None:
        """Close the idle connections."""
        self._servers.close()

    def _changed(self) -> None:
        with self._lock:
            self._opened += 1

    def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        return self._servers.run(commands)

    def _load(self, commands: Sequence[Command]) -> None:
        self._servers.load([text for _, text in _sources().values()], commands)

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
        self._servers.forget()
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
        hint = "; for a Redis Cluster use redis+cluster:// in the URL" if isinstance(error, MovedError) else ""
        return StoreUnavailable(
            f"the store at {self.where} did not answer or refused: {type(error).__name__}: {text}{hint}"
        )
