"""The commands that a deployment runs, and how each of them says that it is ready."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from stage.deployment import Deployment

EXAMPLES = Path(__file__).resolve().parent.parent
SERVICES = ("shop", "gateway", "partner")


@dataclass(frozen=True)
class Addresses:
    """Where the deployment's web faces are."""

    shop: str
    gateway: str
    receiver: str


async def start_company(deployment: Deployment) -> Addresses:
    """Start the notifier, the services, their web faces and the partner's receiving end."""
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    environ = {"PARTNER_WEBHOOK_SECRET": secret, "PORT": "0"}
    receiver = await deployment.start("receiver", receiver_command(), ready=_port_of_receiver, environ=environ)
    environ["PARTNER_WEBHOOK_URL"] = f"http://127.0.0.1:{receiver}/hooks"
    notifier = ["worker", "-B", "--loglevel", "INFO"]
    shop, gateway, *_ = await asyncio.gather(
        deployment.start("shop-web", _web("shop"), ready=_port_of_web),
        deployment.start("gateway-web", _web("gateway"), ready=_port_of_web),
        deployment.start("notifier", _celery("tasks", *notifier), ready=_worker_is_ready),
        *(start_worker(deployment, name, environ if name == "partner" else {}) for name in SERVICES),
    )
    return Addresses(f"http://127.0.0.1:{shop}", f"ws://127.0.0.1:{gateway}", environ["PARTNER_WEBHOOK_URL"])


async def start_worker(deployment: Deployment, name: str, environ: dict[str, str] | None = None) -> None:
    """Start a service's worker."""
    command = _celery(f"services.{name}", "worker", "--loglevel", "INFO", "--hostname", f"{name}@demo")
    await deployment.start(name, command, ready=_worker_is_ready, environ=environ)


def receiver_command() -> list[str]:
    """Node where it is installed; else a few lines of Python."""
    node = shutil.which("node")
    if node:
        return [node, str(EXAMPLES / "partner-receiver.mjs")]
    return [sys.executable, str(EXAMPLES / "stage" / "receiver.py")]


def _celery(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "celery", "-A", module, *arguments]


def _web(name: str) -> list[str]:
    return [sys.executable, "-m", "uvicorn", f"services.{name}:web", "--port", "0", "--no-access-log"]


def _worker_is_ready(line: str) -> str | None:
    return line if re.search(r"\S+@\S+ ready\.", line) else None


def _port_of_web(line: str) -> str | None:
    found = re.search(r"running on http://127\.0\.0\.1:(\d+)", line)
    return found[1] if found else None


def _port_of_receiver(line: str) -> str | None:
    return str(json.loads(line)["port"]) if '"listening"' in line else None
