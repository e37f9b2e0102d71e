"""The store on Redis 7 or later, or Valkey."""

from __future__ import annotations

from collections.abc import Callable

from knell.errors import InvalidSettings
from knell.settings import Rules
from knell.stores.redis_count import RedisCount
from knell.stores.redis_denylist import ClaimNames
from knell.stores.redis_feed import Identity, RedisFeed
from knell.stores.redis_keeping import RedisAudit, RedisDedupe, RedisKeeping, RedisParked
from knell.stores.redis_link import Link
from knell.stores.redis_tracking import RedisTracking

OLDEST_VERSION = 7


class RedisStore(RedisTracking, RedisCount, RedisFeed, RedisKeeping, RedisAudit, RedisParked, RedisDedupe):
    """The whole `knell.store.Store`. Threads may share it, and it survives a fork.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py reads it.
        namespace: keeps two environments on one server apart.
        rules: the deployment's lifetimes and limits.
        partitions: how many hash slots the tokens are spread over; the same for every process, for ever. On the one
            server that this store runs on, 1 is best: with more, `track` takes a round trip more, and a jti that is
            tracked again has to have the sid that it had (another one may lie in another slot, and nothing looks for it
            there).
        clock: replaces the server's clock, in tests.

    Raises:
        InvalidSettings: the URL or the partitions cannot be used. Nothing is contacted here.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str,
        rules: Rules,
        partitions: int = 1,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if not 1 <= partitions <= 65_536:
            raise InvalidSettings(f"KNELL_PARTITIONS is {partitions}; use 1 to 65536")
        self.rules = rules
        self._clock = clock
        self._namespace = namespace
        self._partitions = partitions
        self._feed = f"{{{namespace}:feed}}"
        self._link = Link(url, home=self._feed)
        self._identity = Identity()
        self._claim_names = ClaimNames()

    def ping(self) -> str:
        """The server and its version, for example "Redis 7.0.15"."""
        [info] = self._link.run(("INFO", "server"))
        if "valkey_version" in info:
            return f"Valkey {info['valkey_version']}"
        return f"Redis {info['redis_version']}"

    def warnings(self) -> list[str]:
        """What an operator should change about the server."""
        server, persistence, memory, cluster = self._link.run(
            ("INFO", "server"), ("INFO", "persistence"), ("INFO", "memory"), ("INFO", "cluster")
        )
        found = []
        if int(str(server["redis_version"]).split(".")[0]) < OLDEST_VERSION:
            found.append(f"{self.ping()} is too old: use Redis {OLDEST_VERSION} or later, or Valkey")
        if cluster.get("cluster_enabled"):
            found.append("cluster_enabled is 1: a Redis Cluster of several nodes does not work yet; use one server")
        if not persistence.get("aof_enabled", True):
            found.append("appendonly is off: a restart loses revocations; set 'appendonly yes'")
        policy = memory.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            found.append(f"maxmemory-policy is {policy}: revocations may be evicted; set 'maxmemory-policy noeviction'")
        return found

    def close(self) -> None:
        """Give back connections. The store can not be used afterwards."""
        self._link.close()
