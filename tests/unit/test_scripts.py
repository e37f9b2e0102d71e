"""scripts/servers.sh, with programs in its PATH that only write down how they were called."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "servers.sh"
# What the script may call besides what is put there for it.
TOOLS = ("sh", "tr", "rm", "mv", "chmod")
# Writes down its words and what an installing package would be told about daemons, then "installs".
APT_GET = """#!/bin/sh
PATH=/usr/bin:/bin
echo "$DEBIAN_FRONTEND $*" >>"$STAGE/apt-get.log"
[ "$1" = install ] || exit 0
"$KNELL_POLICY_RC_D" redis-server start; echo "$?" >"$STAGE/policy.log"
[ "$APT_FAILS" = terminated ] && kill -TERM "$PPID"
[ "$APT_FAILS" = yes ] && exit 100
for name in redis-server rabbitmq-server postgres; do cp "$STAGE/id" "$STAGE/bin/$name"; done
"""


class Stage:
    """A PATH with next to nothing in it, and a policy file of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.policy = directory / "policy-rc.d"
        self.program(directory / "id", "#!/bin/sh\n")
        for name in TOOLS:
            found = shutil.which(name)
            assert found is not None
            (self.bin / name).symlink_to(found)

    def program(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *arguments: str, uid: int, apt_fails: str = "no") -> subprocess.CompletedProcess[str]:
        """Run the script as a user of this number."""
        self.program(self.bin / "id", f"#!/bin/sh\necho {uid}\n")
        environ = {
            "PATH": str(self.bin),
            "STAGE": str(self.directory),
            "KNELL_POLICY_RC_D": str(self.policy),
            "APT_FAILS": apt_fails,
        }
        return subprocess.run(
            ["/bin/sh", str(SCRIPT), *arguments], env=environ, capture_output=True, text=True, timeout=60
        )

    def log(self, name: str) -> list[str]:
        """What a program has written down."""
        path = self.directory / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    made = Stage(tmp_path)
    made.program(made.bin / "apt-get", APT_GET)
    return made


def test_root_installs_what_is_missing_and_no_daemon_is_started(stage: Stage) -> None:
    """While packages are installed the policy forbids their daemons; afterwards there is none, as before."""
    done = stage.run(uid=0)
    assert done.returncode == 0, done.stderr
    update, install = stage.log("apt-get")
    assert update.split() == ["update", "-qq"]
    assert install.startswith("noninteractive install -qq -y --no-install-recommends ")
    assert "redis-server" in install
    assert stage.log("policy") == ["101"]
    assert not stage.policy.exists()
    assert str(stage.bin / "redis-server") in done.stdout.splitlines()


@pytest.mark.parametrize("apt_fails", ["no", "yes", "terminated"])
@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_a_policy_that_was_there_is_put_back(stage: Stage, kind: str, apt_fails: str) -> None:
    """Whatever becomes of apt-get, and whatever the policy was: the same file and rights, or the same link."""
    target = stage.directory / "the-policy"
    if kind == "file":
        stage.program(stage.policy, "#!/bin/sh\nexit 104\n")
        stage.policy.chmod(0o744)
    else:
        stage.policy.symlink_to(target)
    if kind == "link":
        stage.program(target, "#!/bin/sh\nexit 104\n")
    done = stage.run(uid=0, apt_fails=apt_fails)
    assert done.returncode == {"no": 0, "yes": 100, "terminated": 143}[apt_fails], done.stderr
    assert stage.log("policy") == ["101"]
    if kind == "file":
        assert not stage.policy.is_symlink()
        assert stat.S_IMODE(stage.policy.stat().st_mode) == 0o744
    else:
        assert stage.policy.readlink() == target
    assert target.exists() is (kind == "link")
    if kind != "dangling link":
        assert stage.policy.read_text() == "#!/bin/sh\nexit 104\n"
    assert [each.name for each in stage.directory.glob("policy-rc.d*")] == ["policy-rc.d"]


def test_a_policy_that_was_saved_before_is_not_overwritten(stage: Stage) -> None:
    """After a run that was killed the saved policy is the only copy: somebody has to look before anything is done."""
    saved = Path(f"{stage.policy}.knell-saved")
    saved.write_text("the real one")
    stage.program(stage.policy, "#!/bin/sh\nexit 101\n")
    done = stage.run(uid=0)
    assert done.returncode == 1
    assert f"move it back to {stage.policy} first" in done.stderr
    assert saved.read_text() == "the real one"
    assert stage.log("apt-get") == []


@pytest.mark.parametrize(("uid", "arguments"), [(1000, ()), (0, ("--check",))])
def test_who_may_not_install_is_told_the_command(stage: Stage, uid: int, arguments: tuple[str, ...]) -> None:
    """Another user than root, and --check: nothing is installed, and the exit status says that something is missing."""
    done = stage.run(*arguments, uid=uid)
    assert done.returncode == 1
    assert "run: sudo apt-get install --no-install-recommends" in done.stderr
    assert "redis-server" in done.stderr
    assert stage.log("apt-get") == []
    assert not stage.policy.exists()


@pytest.mark.parametrize(
    ("manager", "said"),
    [
        ("dnf", "sudo dnf install"),
        ("brew", "brew install"),
        (None, "install RabbitMQ 3.10, Redis 7 (or Valkey) and PostgreSQL 15"),
    ],
)
def test_without_apt_the_command_is_that_of_another_manager(stage: Stage, manager: str | None, said: str) -> None:
    """Where there is no apt-get, root is told as well."""
    (stage.bin / "apt-get").unlink()
    if manager is not None:
        stage.program(stage.bin / manager, "#!/bin/sh\n")
    done = stage.run(uid=0)
    assert done.returncode == 1
    assert said in done.stderr


def test_where_nothing_is_missing_nothing_is_done(stage: Stage) -> None:
    """With all servers there, their paths are all that is said."""
    for name in ("redis-server", "rabbitmq-server", "postgres"):
        stage.program(stage.bin / name, "#!/bin/sh\n")
    done = stage.run(uid=0)
    assert done.returncode == 0
    rabbitmq, redis, postgres = map(Path, done.stdout.splitlines())
    assert (rabbitmq.name, redis) == ("rabbitmq-server", stage.bin / "redis-server")
    assert postgres.name == "postgres"
    assert stage.log("apt-get") == []
