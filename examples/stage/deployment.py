"""The processes of a deployment as children of one program, none of which outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

START_SECONDS = 30.0
# What a worker gets to end in good order.
STOP_SECONDS = 4.0
KEPT_LINES = 25
LINE_BYTES = 2**20


class ChildFailed(Exception):
    """A child ended by itself, or was not ready in time. The text has the end of its log."""

    def __init__(self, name: str, what: str, log: Sequence[str]) -> None:
        super().__init__(f"{name} {what}; the end of its log:\n" + "\n".join(f"  | {line}" for line in log))


class Child:
    """One process, in a session of its own: a Ctrl-C at the terminal reaches the parent alone."""

    def __init__(self, name: str, command: Sequence[str], *, directory: Path, environ: Mapping[str, str]) -> None:
        self.name = name
        self.log: deque[str] = deque(maxlen=KEPT_LINES)
        self.ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stopping = False
        self.process = subprocess.Popen(
            command, cwd=directory, env=environ, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child and to what it has started."""
        self.stopping = True
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self.process.pid, number)

    async def ended(self, deadline: float) -> bool:
        """Wait for its end until `deadline`, by the monotonic clock."""
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    async def lines(self) -> asyncio.StreamReader:
        """What it writes."""
        assert self.process.stdout is not None
        reader = asyncio.StreamReader(limit=LINE_BYTES)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self.process.stdout
        )
        return reader


class Deployment:
    """Starts children, hands on each line that they write, and ends them all when it is left, however it is left.

    Args:
        directory: where they run.
        environ: their environment.
        on_line: called with a child's name and each line of its log.
    """

    def __init__(self, *, directory: Path, environ: Mapping[str, str], on_line: Callable[[str, str], None]) -> None:
        self._directory = directory
        self._environ = dict(environ)
        self._on_line = on_line
        self._children: dict[str, Child] = {}
        self._readers = asyncio.TaskGroup()

    async def __aenter__(self) -> Deployment:
        await self._readers.__aenter__()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            await self._stop_all()
        finally:
            for child in self._children.values():
                child.signal(signal.SIGKILL)
                child.process.wait()
        await self._readers.__aexit__(kind, error, None)

    async def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        ready: Callable[[str], str | None],
        environ: Mapping[str, str] | None = None,
    ) -> str:
        """Start a child and wait until one of its lines says that it is ready.

        Args:
            ready: given each line; what it returns, unless None, is returned here.

        Raises:
            ChildFailed: it could not be started, or is not ready in time. One that ends by itself, now or later, makes
                the whole deployment fail.
        """
        try:
            child = Child(name, command, directory=self._directory, environ=self._environ | dict(environ or {}))
        except OSError as error:
            raise ChildFailed(name, f"could not be started ({error})", ()) from None
        self._children[name] = child
        self._readers.create_task(self._read(child, ready))
        try:
            async with asyncio.timeout(START_SECONDS):
                return await asyncio.shield(child.ready)
        except TimeoutError:
            raise ChildFailed(name, f"was not ready after {START_SECONDS:g} s", child.log) from None

    async def kill(self, name: str) -> None:
        """End a child with SIGKILL, as a crash would."""
        child = self._children.pop(name)
        child.signal(signal.SIGKILL)
        await child.ended(time.monotonic() + STOP_SECONDS)

    async def _read(self, child: Child, ready: Callable[[str], str | None]) -> None:
        lines = await child.lines()
        while raw := await lines.readline():
            line = raw.decode(errors="replace").rstrip()
            child.log.append(line)
            if not child.ready.done() and (found := ready(line)) is not None:
                child.ready.set_result(found)
            self._on_line(child.name, line)
        await child.ended(time.monotonic() + STOP_SECONDS)
        if not child.stopping:
            raise ChildFailed(child.name, f"ended by itself with status {child.process.returncode}", child.log)

    async def _stop_all(self) -> None:
        for child in self._children.values():
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for child in self._children.values():
            await child.ended(deadline)
