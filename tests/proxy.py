"""A TCP proxy on the loopback interface whose connections can be made half-open."""

from __future__ import annotations

import socket
import threading


class Proxy:
    """Passes TCP connections on to a port of this machine, until they are frozen.

    Attributes:
        port: where it listens, on 127.0.0.1.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._flows: list[_Flow] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def freeze(self) -> int:
        """Make every connection of now half-open: neither end hears of the other again, nor of its close.

        Returns how many there were. Connections that come later pass.
        """
        found = [flow for flow in self._flows if not flow.frozen]
        for flow in found:
            flow.frozen = True
        return len(found)

    def close(self) -> None:
        """Close the listener and every connection."""
        self._listener.close()
        for flow in self._flows:
            flow.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # it was closed
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=10)
            except OSError:
                near.close()  # a server that is away refuses
                continue
            far.settimeout(None)
            self._flows.append(_Flow(near, far))


class _Flow:
    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.frozen = False
        self._ends = (near, far)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, sink), name="proxy-flow", daemon=True).start()

    def close(self) -> None:
        for end in self._ends:
            end.close()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self.frozen:
                    continue  # read and dropped: the sender's TCP has its acknowledgement, and nobody its data
                sink.sendall(data)
            if not self.frozen:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            if not self.frozen:
                self.close()
