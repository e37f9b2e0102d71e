"""Arrangements of several private Redis servers for tests: sentinels with a primary and a replica, and a cluster."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import redis

from tests.deployment import until
from tests.servers import Process, RedisServer, find_program, free_port, listens, start_redis

# The sentinels' own account among themselves, and the one that a client has.
_SENTINEL_CONFIG = """
port {port}
bind 127.0.0.1
dir {directory}
user default off
user peer on >peer-secret ~* &* +@all
user client on >s%t -@all +sentinel|get-master-addr-by-name
sentinel sentinel-user peer
sentinel sentinel-pass peer-secret
sentinel monitor mymaster 127.0.0.1 {primary} 2
sentinel down-after-milliseconds mymaster 700
sentinel failover-timeout mymaster 3000
"""


def ask(server: RedisServer) -> redis.Redis:
    """A client of one server; close it."""
    return redis.Redis(host="127.0.0.1", port=server.port, protocol=2)


def replicate(directory: Path, primary: RedisServer, *, extra: Sequence[str] = ()) -> RedisServer:
    """Start a replica, and wait until it has everything."""
    with ask(primary) as client:
        client.config_set("repl-diskless-sync-delay", 0)
    replica = start_redis(directory, extra=["--replicaof", "127.0.0.1", str(primary.port), *extra])
    with ask(replica) as client:
        until(lambda: client.info("replication")["master_link_status"] == "up", what="the replica's link")
    return replica


class Sentinels:
    """A primary, a replica, and three sentinels who let the one take the other's place.

    Attributes:
        url: of the store, with the account of the sentinels that clients have.
        primary, replica: the servers as they were at first.
    """

    def __init__(self, directory: Path) -> None:
        self.primary = start_redis(directory / "primary")
        self.replica = replicate(directory / "replica", self.primary)
        self.ports = [free_port() for _ in range(3)]
        self._sentinels = [_sentinel(directory / str(port), port, self.primary.port) for port in self.ports]
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self.url = f"redis+sentinel://{hosts}/mymaster/0?sentinel_username=client&sentinel_password=s%25t"
        for port in self.ports:
            until(partial(self._knows_others, port), what="sentinels that know each other and the replica")

    def suspend_sentinel(self, n: int) -> None:
        """Freeze one sentinel."""
        self._sentinels[n].signal(signal.SIGSTOP)

    def resume_sentinel(self, n: int) -> None:
        """Let it go on."""
        self._sentinels[n].signal(signal.SIGCONT)

    def point(self, port: int, primary: RedisServer) -> None:
        """Make one sentinel take another server for the primary, as after a failover that the old one did not see."""
        with self._peer(port) as client:
            client.execute_command("SENTINEL", "REMOVE", "mymaster")
            client.execute_command("SENTINEL", "MONITOR", "mymaster", "127.0.0.1", primary.port, 2)

    def named(self) -> int:
        """The port of the primary that the last sentinel names."""
        return int(self._state(self.ports[-1])["port"])

    def stop(self) -> None:
        """End everything."""
        for process in self._sentinels:
            process.signal(signal.SIGKILL)
        self.primary.kill()
        self.replica.kill()

    def _knows_others(self, port: int) -> bool:
        state = self._state(port)
        return (state["num-other-sentinels"], state["num-slaves"]) == ("2", "1")

    def _state(self, port: int) -> dict[str, str]:
        with self._peer(port) as client:
            flat: Any = client.execute_command("SENTINEL", "MASTER", "mymaster")
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def _peer(self, port: int) -> redis.Redis:
        return redis.Redis(port=port, username="peer", password="peer-secret", decode_responses=True, protocol=2)


def _sentinel(directory: Path, port: int, primary: int) -> Process:
    directory.mkdir(parents=True)
    config = directory / "sentinel.conf"
    config.write_text(_SENTINEL_CONFIG.format(port=port, directory=directory, primary=primary))
    process = Process(
        [str(find_program("redis-server", "valkey-server")), str(config), "--sentinel"], directory=directory
    )
    process.run(lambda: listens(port))
    return process


class Cluster:
    """Three primaries, each with a third of the slots.

    Attributes:
        nodes: the servers.
        url: of the store. It names one node; the others are found by it.
    """

    def __init__(self, directory: Path) -> None:
        self._bus: dict[int, int] = {}
        self.nodes = [self._start(directory / str(n)) for n in range(3)]
        self.url = f"redis+cluster://127.0.0.1:{self.nodes[0].port}"
        for n, (node, first, last) in enumerate(zip(self.nodes, (0, 5461, 10923), (5460, 10922, 16383), strict=True)):
            with ask(node) as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
                # Two nodes of one epoch would have to settle first whose is the higher.
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", n + 1)
        self._meet(self.nodes[1:])

    def node(self, slot: int) -> RedisServer:
        """The primary that has a slot, as the first node sees it."""
        with ask(self.nodes[0]) as client:
            found: Any = client.execute_command("CLUSTER", "SLOTS")
        [port] = [primary[1] for first, last, primary, *_ in found if first <= slot <= last]
        return next(node for node in self.nodes if node.port == port)

    def id_of(self, node: RedisServer) -> str:
        """The name that a node has in the cluster."""
        with ask(node) as client:
            name: Any = client.execute_command("CLUSTER", "MYID")
        return str(name.decode())

    def add_replica(self, directory: Path, of: RedisServer) -> RedisServer:
        """Start a replica of a node, and wait until it has everything. Nodes are missed after a second from then on."""
        replica = self._start(directory)
        self._meet([replica])
        self.nodes.append(replica)
        for node in self.nodes:
            with ask(node) as client:
                client.config_set("cluster-node-timeout", 1000)
                client.config_set("repl-diskless-sync-delay", 0)
        with ask(replica) as client:
            client.execute_command("CLUSTER", "REPLICATE", self.id_of(of))
            until(lambda: client.info("replication").get("master_link_status") == "up", what="the replica's link")
        return replica

    def stop(self) -> None:
        """End everything."""
        for node in self.nodes:
            node.kill()

    def _start(self, directory: Path) -> RedisServer:
        # By default the cluster's port is 10,000 above the other, which may be no port.
        bus = free_port()
        node = start_redis(
            directory, extra=["--cluster-enabled", "yes", "--cluster-port", str(bus), "--databases", "1"]
        )
        self._bus[node.port] = bus
        return node

    def _meet(self, others: Sequence[RedisServer]) -> None:
        with ask(self.nodes[0]) as client:
            for node in others:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, self._bus[node.port])
        everybody = len({node.port for node in (*self.nodes, *others)})
        for node in (*self.nodes, *others):
            until(partial(_sees, node, everybody), what="a node that sees the whole cluster")


def _sees(node: RedisServer, everybody: int) -> bool:
    with ask(node) as client:
        info: Any = client.execute_command("CLUSTER", "INFO")
    text = info if isinstance(info, str) else info.decode()
    return "cluster_state:ok" in text and f"cluster_known_nodes:{everybody}\r\n" in text
