"""The demo, run as a user runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment import until

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 100.0
# Every process that the demo starts has this folder's prefix in its environment, by KNELL_HOME.
HOME_PREFIX = "knell-demo-"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment whose temporary folder tells this demo's processes from any other's."""
    return {**os.environ, "TMPDIR": str(tmp_path)}


def children(environ: dict[str, str]) -> list[int]:
    """The processes that the demo has started and that still run."""
    marker = f"KNELL_HOME={environ['TMPDIR']}/{HOME_PREFIX}".encode()
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdecimal():
            try:
                if marker in (each / "environ").read_bytes():
                    found.append(int(each.name))
            except OSError:
                continue  # it has ended meanwhile, or is a zombie
    return found


def start(environ: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "examples" / "demo.py")]
    return subprocess.Popen(
        command, env=environ, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def demo(environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with start(environ) as process:
        yield process
        process.kill()
        for pid in children(environ):
            os.kill(pid, signal.SIGKILL)


def read_until(demo: subprocess.Popen[str], pattern: str) -> list[str]:
    """The demo's lines up to the one that has the pattern in it."""
    assert demo.stdout is not None
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    raise AssertionError(f"{pattern!r} is not in the output:\n{''.join(lines)}")


def test_every_service_ends_what_it_should_and_no_other(demo: subprocess.Popen[str], environ: dict[str, str]) -> None:
    """The demo says what each service did, sums it up, and exits with 0; in a pipe its text is plain."""
    output, _ = demo.communicate(timeout=DEADLINE_SECONDS)
    assert demo.returncode == 0, output
    assert "\x1b" not in output
    for service in ("shop: sessions", "gateway: connections", "gateway: resume tickets", "partner: sessions"):
        due, ended, living, wrongly = re.search(rf"{service} +(\d+) +(\d+) +(\d+) +(\d+) ", output).groups()  # type: ignore[union-attr]
        assert int(due) > 20, output
        assert (ended, wrongly) == (due, "0"), output
        assert int(living) > 5, output
    assert re.search(r"shop's worker was killed.*shop's worker is back", output, re.DOTALL)
    assert "Every service ended every session that it should have, and no other." in output
    assert children(environ) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["starting", "is revoked"])
def test_a_signal_leaves_no_process_behind(
    demo: subprocess.Popen[str], environ: dict[str, str], number: signal.Signals, moment: str
) -> None:
    """Stopped by a signal, while it starts its processes or later, the demo ends them all and says so."""
    read_until(demo, moment)
    if moment != "starting":
        assert len(children(environ)) > 5
    demo.send_signal(number)
    output, _ = demo.communicate(timeout=DEADLINE_SECONDS)
    assert demo.returncode == 128 + number, output
    assert "Traceback" not in output
    assert children(environ) == []
    assert not list(Path(environ["TMPDIR"]).glob(f"{HOME_PREFIX}*"))


def test_a_second_signal_does_not_interrupt_the_ending(demo: subprocess.Popen[str], environ: dict[str, str]) -> None:
    """An impatient Ctrl-C, Ctrl-C, Ctrl-C leaves no process behind either."""
    read_until(demo, "all are ready")
    for _ in range(3):
        left = len(children(environ))
        demo.send_signal(signal.SIGINT)
        # The next one comes in the middle of the ending.
        until(lambda left=left: len(children(environ)) < max(left, 1), what="a process of the demo has ended")
    output, _ = demo.communicate(timeout=DEADLINE_SECONDS)
    assert demo.returncode == 128 + signal.SIGINT, output
    assert children(environ) == []


def test_a_process_that_cannot_start_is_shown_with_its_log(environ: dict[str, str], tmp_path: Path) -> None:
    """When a child fails, the demo says which one, shows the end of its log, ends the others and exits with 1."""
    # uvicorn reads its options from the environment too: this one makes the web faces fail, and nothing else.
    with start(environ | {"UVICORN_WORKERS": "none"}) as process:
        output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 1, output
    assert re.search(r"(shop|gateway)-web ended by itself with status 2; the end of its log:", output)
    assert "'none' is not a valid integer" in output
    assert children(environ) == []
