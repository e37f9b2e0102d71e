"""Knell's main job, with no server: `make demo`, or `python examples/demo.py`.

An issuer (this process), the notifier and three services run as separate processes on the embedded default, in a folder
that is removed afterwards. Tokens expire and are revoked, a service is killed and comes back, and in the end everything
is looked at: the exit status is 0 only if every service ended every session that it should have, and no other.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rich.console import Console

from knell import Settings
from knell.keys import SigningKey

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the services package, which is part of no wheel

from stage.clients import ClientFailed  # noqa: E402
from stage.company import start_company  # noqa: E402
from stage.deployment import ChildFailed, Deployment  # noqa: E402
from stage.ledger import table  # noqa: E402
from stage.story import ISSUER, Story  # noqa: E402
from stage.timeline import Timeline  # noqa: E402

# A shell's own convention: 128 and the number of the signal.
SIGNALLED = 128


async def perform(console: Console, home: Path, log: TextIO | None) -> bool:
    """Tell the story. Returns whether every service did what it should have."""

    def heard(name: str, line: str) -> None:
        if log is not None:
            print(f"{name:<12}{line}", file=log, flush=True)
        story.heard(name, line)

    key = SigningKey.generate()
    public_key = home / "auth-public-key.pem"
    public_key.write_bytes(key.verifying_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    knell = {"KNELL_HOME": str(home), "AUTH_ISSUER": ISSUER, "AUTH_PUBLIC_KEY": str(public_key)}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("KNELL_")}
    environ = {**outside, **knell, "PYTHONUNBUFFERED": "1"}
    timeline = Timeline(console)
    story = Story(key, Settings.from_environ(knell), timeline)
    async with Deployment(directory=ROOT, environ=environ, on_line=heard) as deployment:
        timeline.say("starting the notifier, three services and their web faces, on the embedded default")
        addresses = await start_company(deployment)
        timeline.say("all are ready")
        rows = await story.tell(deployment, addresses)
    console.print(table(rows), soft_wrap=True)
    return all(row.right for row in rows)


async def run(console: Console, log: TextIO | None, stopped_by: list[int]) -> bool:
    """Perform in a folder that is removed afterwards; a signal cancels it, and is noted in `stopped_by`."""
    me = asyncio.current_task()
    assert me is not None

    def stop(number: int) -> None:
        # Only the first one: a second must not interrupt the ending of the children.
        if not stopped_by:
            stopped_by.append(number)
            me.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    with tempfile.TemporaryDirectory(prefix="knell-demo-") as home:
        return await perform(console, Path(home), log)


def main() -> int:
    """Run the demo. Returns its exit status: 0, 1 if something went wrong, 128 and the signal's number if stopped."""
    parser = argparse.ArgumentParser(description="Knell's main job, with no server.")
    parser.add_argument("--log", type=argparse.FileType("w"), help="a file for what the processes log")
    console = Console(highlight=False)
    stopped_by: list[int] = []
    try:
        right = asyncio.run(run(console, parser.parse_args().log, stopped_by))
    except asyncio.CancelledError:
        console.print("stopped; every process has been ended")
        return SIGNALLED + stopped_by[0]
    except ExceptionGroup as failed:
        known, unknown = failed.split((ChildFailed, ClientFailed))
        for error in _leaves(known):
            console.print(str(error), markup=False, soft_wrap=True)
        if unknown is not None:
            raise unknown from None
        return 1
    if right:
        console.print("[bold green]Every service ended every session that it should have, and no other.[/]")
    else:
        console.print("[bold red]Something was not ended, or ended wrongly: see the table.[/]")
    return 0 if right else 1


def _leaves(group: BaseException | None) -> list[BaseException]:
    if isinstance(group, BaseExceptionGroup):
        return [leaf for inner in group.exceptions for leaf in _leaves(inner)]
    return [] if group is None else [group]


if __name__ == "__main__":
    sys.exit(main())
