"""docker-compose.yml: what can be said of it without a Docker engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml  # type: ignore[import-untyped]

import flowerconfig
from knell import topology
from knell.keys import SigningKey
from knell.settings import Rules, Settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "knell"}
ONCE = {"keys", "setup"}
# What the shell of a script does by itself, or has beside it.
SHELL = {"umask", "mkdir", "printf"}
REFERENCE = re.compile(r"(?<!\$)\$\{(\w+)([^}]*)\}")


def example() -> dict[str, str]:
    """deploy/env.example, as names and values."""
    lines = (ROOT / "deploy/env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def environ(service: dict[str, Any], directory: Path) -> dict[str, str]:
    """A service's environment, with a made-up value for each variable of .env and a real key."""
    key = directory / "issuer.pem"
    key.write_bytes(SigningKey.generate().pem())
    values = dict.fromkeys(example(), "x1") | {
        "AUTH_ISSUER": "https://auth.example",
        "PARTNER_WEBHOOK_URL": "https://partner.example/hook",
        "PARTNER_WEBHOOK_SECRET": "whsec_" + "A" * 43 + "=",
    }
    given = {
        name: REFERENCE.sub(lambda found: values[found[1]], str(value))
        for name, value in (service.get("environment") or {}).items()
    }
    if "AUTH_PUBLIC_KEY" in given:
        given["AUTH_PUBLIC_KEY"] = str(key)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return kept | given


def commands(service: dict[str, Any]) -> list[list[str]]:
    """What a service runs, as lists of words; a shell script is taken line by line."""
    command = service["command"]
    if command[0] != "sh":
        return [[str(word) for word in command]]
    return [shlex.split(line) for line in command[-1].splitlines() if line.strip()]


COMMANDS = [(name, words) for name, service in OURS.items() for words in commands(service)]


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[" ".join(words[:4]) for _, words in COMMANDS])
def test_every_command_can_be_started(name: str, words: list[str], tmp_path: Path) -> None:
    """The program exists, knows the options, and finds the app, with the environment that the service has."""
    if words[0] in SHELL:
        return
    program = Path(sys.executable).parent / words[0]
    assert program.exists(), f"{words[0]} is no program of the environment"
    done = subprocess.run(
        [str(program), *words[1:], "--help"],
        cwd=ROOT,
        env=environ(OURS[name], tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout or "Options" in done.stdout


@pytest.mark.parametrize("name", [name for name in OURS if name.endswith("-web")])
def test_every_web_can_be_imported(name: str, tmp_path: Path) -> None:
    """uvicorn finds the ASGI app that a command names."""
    app = OURS[name]["command"][1]
    script = f"from uvicorn.importer import import_from_string as find; assert callable(find({app!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environ(OURS[name], tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# A server's side of an ASGI lifespan; between its two halves, an error while a password is in a variable.
LIFESPAN = """
import asyncio, structlog, sys
from uvicorn.importer import import_from_string

app = import_from_string(sys.argv[1])
assert not structlog.is_configured(), "whoever only imports it keeps a log of his own"

def log_in(password):
    try:
        1 / 0
    except ZeroDivisionError:
        structlog.get_logger("a library").exception("login_failed")

async def answer(message):
    assert message["type"].endswith(".complete"), message
    log_in(sys.argv[2])

told = asyncio.Queue()
for half in ("startup", "shutdown"):
    told.put_nowait({"type": f"lifespan.{half}"})
asyncio.run(app({"type": "lifespan", "state": {}}, told.get, answer))
"""


@pytest.mark.parametrize("name", [name for name in OURS if name.endswith("-web")])
def test_no_web_logs_variables(name: str, tmp_path: Path) -> None:
    """A traceback in a web's log has no variables in it: left to itself, structlog shows them."""
    done = subprocess.run(
        [sys.executable, "-c", LIFESPAN, OURS[name]["command"][1], "hunter2"],
        cwd=ROOT,
        env=environ(OURS[name], tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines() if "login_failed" in line]
    assert ["ZeroDivisionError" in line["exception"] for line in lines] == [True, True]


@pytest.mark.parametrize("name", OURS)
def test_settings_can_be_read(name: str, tmp_path: Path) -> None:
    """Every KNELL_ variable is a setting, and together they make Settings that are not embedded."""
    given = environ(OURS[name], tmp_path)
    known = {f"KNELL_{field.name.upper()}" for kind in (Settings, Rules) for field in fields(kind)}
    assert {variable for variable in given if variable.startswith("KNELL_")} <= known
    if name != "keys":
        assert not Settings.from_environ(given).embedded


@pytest.mark.parametrize("name", ["shop", "shop-web", "gateway", "gateway-web", "partner"])
def test_services_use_their_own_account(name: str, tmp_path: Path) -> None:
    """A service logs in to the broker as itself, in Knell's virtual host, and has no private key."""
    given = environ(OURS[name], tmp_path)
    url = urlsplit(given["KNELL_BROKER_URL"])
    assert (url.username, url.path) == (f"knell.service.{name.removesuffix('-web')}", "/knell")
    assert "KNELL_BROKER_API_URL" not in given
    assert "KNELL_NOTICE_KEY" not in given
    assert not any(volume.startswith("keys:") for volume in OURS[name]["volumes"])


@pytest.mark.parametrize("name", ["notifier", "beat", "flower"])
def test_only_setup_has_the_administrators_account(name: str, tmp_path: Path) -> None:
    """What runs on logs in to the broker as itself, and cannot reach its management API."""
    given = environ(OURS[name], tmp_path)
    assert urlsplit(given["KNELL_BROKER_URL"]).username == f"knell.{name}"
    assert "KNELL_BROKER_API_URL" not in given
    assert ("KNELL_NOTICE_KEY" in given) is (name == "notifier")
    assert ("KNELL_STORE_URL" in given) is (name == "notifier")


def test_every_service_is_registered() -> None:
    """setup registers each service that has a worker, and gives each process that runs on a password of its own."""
    named = {name for name, service in OURS.items() if "services." in " ".join(map(str, service["command"]))}
    workers = {name.removesuffix("-web") for name in named}
    script = commands(OURS["setup"])
    assert {words[3] for words in script if words[:3] == ["knell", "services", "add"]} == workers
    accounts = {each.name for each in topology.accounts("knell", workers, ["auth"])}
    given = {words[-1].rpartition("/")[2]: words[2] for words in script if words[0] == "printf"}
    assert set(given) == accounts
    for account, variable in given.items():
        assert variable == f"$${account.rpartition('.')[2].upper()}_BROKER_PASSWORD"
    assert script[-1][:5] == ["knell", "topology", "apply", "--passwords", "/tmp/passwords"]


def test_nothing_secret_has_a_default() -> None:
    """Each variable is required: without .env, compose refuses to start. Nothing secret stands in the file."""
    found = REFERENCE.findall(TEXT)
    assert found
    assert all(rest.startswith(":?") for _, rest in found)
    assert "guest" not in TEXT
    for service in SERVICES.values():
        for variable, value in (service.get("environment") or {}).items():
            if re.search("PASS|SECRET|AUTH|URL", variable) and "/keys/" not in str(value):
                assert REFERENCE.search(str(value)), f"{variable} is written into the file"


def test_the_example_names_every_variable() -> None:
    """deploy/env.example has exactly the variables that are used, each without a value."""
    assert set(example()) == {name for name, _ in REFERENCE.findall(TEXT)}
    assert not any(example().values())


def test_services_read_their_variables() -> None:
    """What is passed to the services beside KNELL_ variables is something that they read."""
    source = "".join(path.read_text() for path in (ROOT / "services").glob("*.py"))
    for name in ("shop", "gateway", "partner"):
        for variable in OURS[name]["environment"]:
            assert variable.startswith("KNELL_") or f'"{variable}"' in source


@pytest.mark.parametrize("name", SERVICES)
def test_every_process_is_looked_after(name: str) -> None:
    """What runs on has a health check and is started again; what runs once is repeated until it has worked."""
    service = SERVICES[name]
    if name in ONCE:
        assert service["restart"] == "on-failure"
        return
    assert service["restart"] == "unless-stopped"
    assert set(service["healthcheck"]) >= {"test", "interval", "timeout", "retries", "start_period"}


@pytest.mark.parametrize("name", OURS)
def test_nothing_starts_too_early(name: str) -> None:
    """A process waits for healthy servers, and for what runs once to have worked."""
    waits = OURS[name].get("depends_on") or {}
    assert name == "keys" or {"rabbitmq", "redis"} <= set(waits)
    for other, how in waits.items():
        wanted = "service_completed_successfully" if other in ONCE else "service_healthy"
        assert how["condition"] == wanted


def test_nothing_is_published_to_the_world() -> None:
    """Every port is published on the loopback interface only."""
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_data_lives_in_named_volumes() -> None:
    """Every volume is named and declared, and keys are mounted read-only but where they are made."""
    declared = set(yaml.safe_load(TEXT)["volumes"])
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = REFERENCE.sub("./file", volume).partition(":")[0]
            assert source in declared or source == "./file"
            assert "/keys/" not in volume or name == "keys" or volume.endswith(":ro")
    assert {volume.partition(":")[0] for name in SERVICES for volume in SERVICES[name].get("volumes", [])} >= declared


def test_redis_keeps_what_it_confirms() -> None:
    """Redis appends to a file, flushed every second, evicts nothing, and asks for a password."""
    script = SERVICES["redis"]["command"][-1]
    for line in ("appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction", "requirepass "):
        assert line in script


def test_flower_asks_for_a_password() -> None:
    """Flower has basic auth, changes nothing, and keeps nothing. Each option is one that Flower has."""
    from flower.options import default_options  # type: ignore[import-untyped]

    given = {name: value for name, value in OURS["flower"]["environment"].items() if name.startswith("FLOWER_")}
    assert given["FLOWER_BASIC_AUTH"].startswith("${FLOWER_BASIC_AUTH:?")
    assert (flowerconfig.read_only, flowerconfig.persistent) == (True, False)
    configured = {name for name in vars(flowerconfig) if not name.startswith("_")} - {"annotations"}
    assert {name.removeprefix("FLOWER_").lower() for name in given} | configured <= set(default_options)


def test_the_image_holds_no_secret() -> None:
    """The build context is what the image is made of, and the image runs as a user of its own."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        word
        for line in dockerfile.splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert re.search(r"^USER knell$", dockerfile, re.MULTILINE)


def test_compose_itself_accepts_it(tmp_path: Path) -> None:
    """`docker compose config` reads the file and fills it in, where there is a compose to ask."""
    program = shutil.which("docker")
    if program is None or subprocess.run([program, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("there is no `docker compose` here")
    filled = tmp_path / "filled.env"
    filled.write_text("".join(f"{name}={'./issuer.pem' if 'FILE' in name else 'x1'}\n" for name in example()))
    asked = [program, "compose", "--env-file", str(filled), "config", "--quiet"]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
