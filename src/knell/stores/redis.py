"""The store on Redis 7 or later, or Valkey."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from knell.errors import InvalidSettings
from knell.settings import Rules
from knell.stores.redis_count import RedisCount
from knell.stores.redis_denylist import ClaimNames
from knell.stores.redis_feed import Identity, RedisFeed
from knell.stores.redis_keeping import RedisAudit, RedisDedupe, RedisKeeping, RedisParked
from knell.stores.redis_link import Link
from knell.stores.redis_tracking import RedisTracking
from knell.stores.redis_url import RedisUrl

OLDEST_VERSION = 7


class RedisStore(RedisTracking, RedisCount, RedisFeed, RedisKeeping, RedisAudit, RedisParked, RedisDedupe):
    """The whole `knell.store.Store`. Threads may share it, and it survives a fork.

    Args:
        url: one server, sentinels or a cluster; see KNELL_STORE_URL in docs/settings.md.
        namespace: keeps two environments on one server apart.
        rules: the deployment's lifetimes and limits.
        partitions: how many hash slots the tokens are spread over; the same for every process, for ever. On one
            server 1 is best; on a cluster a few for each node. With more than one, `track` takes a round trip more, and
            a jti that is tracked again has to have the sid that it had (another one may lie in another slot, and
            nothing looks for it there).
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
        return _name(info)

    def warnings(self) -> list[str]:
        """What an operator should change about the server, or about each node of a cluster that is used."""
        sections = [("INFO", name) for name in ("server", "persistence", "memory", "cluster", "replication")]
        found = [] if self._link.url.verified else ["the store's URL switches off the check of certificates"]
        nodes = self._link.each([self._feed, *self._tags], *sections)
        for where, answers in nodes.items():
            of_it = _warnings(self._link.url, *answers)
            found += of_it if len(nodes) == 1 else [f"{where}: {warning}" for warning in of_it]
        return found

    def close(self) -> None:
        """Give back connections. The store can not be used afterwards."""
        self._link.close()


def _warnings(
    url: RedisUrl,
    server: Mapping[str, Any],
    persistence: Mapping[str, Any],
    memory: Mapping[str, Any],
    cluster: Mapping[str, Any],
    replication: Mapping[str, Any],
) -> list[str]:
    found = []
    if int(str(server["redis_version"]).split(".")[0]) < OLDEST_VERSION:
        found.append(f"{_name(server)} is too old: use Redis {OLDEST_VERSION} or later, or Valkey")
    if cluster.get("cluster_enabled") and url.kind != "cluster":
        found.append("cluster_enabled is 1: use redis+cluster:// in the store's URL")
    if not persistence.get("aof_enabled", True):
        found.append("appendonly is off: a restart loses revocations; set 'appendonly yes'")
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        found.append(f"maxmemory-policy is {policy}: revocations may be evicted; set 'maxmemory-policy noeviction'")
    replicas = int(replication.get("connected_slaves", 0))
    if replicas and not url.min_replicas:
        found.append(
            "replicas follow, but what is acknowledged is not waited for on any: a failover may lose it; "
            "put min_replicas=1 into the store's URL"
        )
    if replicas < url.min_replicas:
        found.append(f"{replicas} replicas follow, and min_replicas is {url.min_replicas}: nothing can be recorded")
    return found


def _name(server: Mapping[str, Any]) -> str:
    if "valkey_version" in server:
        return f"Valkey {server['valkey_version']}"
    return f"Redis {server['redis_version']}"
