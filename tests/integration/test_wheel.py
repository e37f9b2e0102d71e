"""The wheel: what is in it, and that the README's example runs where nothing else is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment import ROOT, until

# Installing takes a minute where nothing is cached yet.
pytestmark = pytest.mark.timeout(600)

EXAMPLE = re.compile(r"^<!-- example: (\w+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What the README's reader would see next, said by the program itself.
AFTER_REVOKING = """
import time

assert claims["sub"] == "alice" and claims["sid"] == "s-1"
deadline = time.monotonic() + 30
while True:
    try:
        verifier.verify(again.token)
    except TokenRevoked as error:
        assert (error.revocation_id, error.reason) == (revoked.id, "logout")
        break
    assert time.monotonic() < deadline, "the token was not refused in time"
    time.sleep(0.01)
verifier.close()
issuer.close()
print("refused")
"""


def examples() -> dict[str, str]:
    """The README's marked blocks, by name."""
    return dict(EXAMPLE.findall((ROOT / "README.md").read_text()))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout."""
    into = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(into), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = into.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, what it depends on, and nothing else."""
    made = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(made, with_pip=True)
    program = made / "bin/python"
    command = [str(program), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    command += ["-c", str(ROOT / "constraints.txt"), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return program


def environ(home: Path) -> dict[str, str]:
    """Nothing of this process's own settings: the embedded default, in a folder of the test's own."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    return kept | {"PATH": "/usr/bin:/bin", "KNELL_HOME": str(home / ".knell"), "PYTHONUNBUFFERED": "1"}


def test_what_the_wheel_has(wheel: Path) -> None:
    """The library with its type marker, Lua scripts and migrations, and no top-level `tasks` or `services` of ours."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"knell"}
    assert "knell/py.typed" in names
    package = ROOT / "src/knell"
    others = [*package.rglob("*.lua"), *(package / "stores/migrations").rglob("*.py")]
    in_source = {path.relative_to(ROOT / "src").as_posix() for path in others}
    assert {Path(name).suffix for name in in_source} == {".lua", ".py"}
    assert in_source <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.endswith((".db", ".pem"))]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def test_pytest_finds_the_fixtures_in_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Where the wheel is, `knell` is a fixture: docs/testing.md's example passes, on the wheel's own code."""
    unpacked, folder = tmp_path / "wheel", tmp_path / "project"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    [(name, text)] = re.findall(
        r"^<!-- example: ([\w.]+) -->\n```python\n(.*?)^```$",
        (ROOT / "docs" / "testing.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    where = (
        f"\n\ndef test_it_is_the_wheel():\n    import knell\n    assert knell.__file__.startswith({str(unpacked)!r})\n"
    )
    (folder / name).write_text(text + where)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"],
        cwd=folder,
        env=environ(tmp_path) | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "4 passed" in done.stdout, done.stdout + done.stderr


def test_the_wheel_brings_no_tools(python: Path) -> None:
    """What only this project's tests and services use is not installed with it."""
    done = subprocess.run([str(python), "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True)
    installed = {line.partition("==")[0].lower() for line in done.stdout.splitlines()}
    assert "knell" in installed
    assert not installed & {"pytest", "hypothesis", "mypy", "ruff", "flower", "starlette", "uvicorn", "hatchling"}


def test_the_command_line_works(python: Path, tmp_path: Path) -> None:
    """`knell --help` runs there, and names its commands."""
    command = [str(python.parent / "knell"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


@pytest.fixture
def shop(python: Path, tmp_path: Path) -> Iterator[Path]:
    """The README's service, running: what it prints."""
    (tmp_path / "shop.py").write_text(examples()["service"])
    output = tmp_path / "shop.log"
    with output.open("wb") as into:
        worker = subprocess.Popen(
            [str(python.parent / "celery"), "-A", "shop", "worker", "--loglevel", "info"],
            cwd=tmp_path,
            env=environ(tmp_path),
            stdout=into,
            stderr=into,
        )
    try:
        until(lambda: " ready." in output.read_text() or worker.poll() is not None, seconds=60, what="shop is ready")
        assert worker.poll() is None, output.read_text()
        yield output
    finally:
        worker.terminate()
        try:
            worker.wait(20)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait(10)


def test_the_readme_s_example_runs(python: Path, shop: Path, tmp_path: Path) -> None:
    """A token is issued, refreshed, verified and revoked; the verifier refuses it and the service ends its session."""
    blocks = examples()
    assert set(blocks) == {"issuer", "verifier", "service", "revoke"}
    script = tmp_path / "readme.py"
    script.write_text(blocks["issuer"] + blocks["verifier"] + blocks["revoke"] + AFTER_REVOKING)
    done = subprocess.run(
        [str(python), str(script)], cwd=tmp_path, env=environ(tmp_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr + shop.read_text()
    assert done.stdout == "refused\n"
    until(lambda: "revoked: end session s-1 of" in shop.read_text(), what="the service has ended the session")
