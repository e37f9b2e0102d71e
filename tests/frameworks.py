"""Running an example of examples/frameworks on a real server, beside an issuer that shares its embedded store."""

from __future__ import annotations

import asyncio
import contextlib
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4
from wsgiref.simple_server import WSGIRequestHandler, make_server

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from knell import Issuer, Settings, topology
from knell.keys import SigningKey
from knell.publisher import connect
from tests.deployment import ROOT, until

EXAMPLES = ROOT / "examples" / "frameworks"
ISS = "https://auth.example"
AUD = "shop"
# Making one takes longer than a request; it keeps no connection, which would outlive its server.
_client = httpx.Client(trust_env=False, timeout=20, limits=httpx.Limits(max_keepalive_connections=0))


class Home:
    """A folder with the public key of an issuer, whose store the examples share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.key = SigningKey.generate()
        public = self.key.verifying_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (directory / "public.pem").write_bytes(public)
        settings = Settings(home=directory / ".knell")
        with connect(settings) as connection:
            topology.declare(connection, [], settings=settings)
        self.issuer = Issuer(ISS, self.key, settings=settings)

    def token(self, **claims: Any) -> str:
        """A token of alice's for the shop."""
        given = {"sub": "alice", "aud": AUD, "sid": uuid4().hex} | claims
        return self.issuer.issue(given, ttl_seconds=600).token

    def environ(self, **more: str) -> dict[str, str]:
        """The environment of an example."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("KNELL_")}
        return {**others, "KNELL_HOME": str(self.directory / ".knell"), "PYTHONUNBUFFERED": "1", **more}

    @contextlib.contextmanager
    def loaded(self, name: str, **environ: str) -> Iterator[dict[str, Any]]:
        """An example's names, loaded in this process as one that stands in the folder would."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.directory)
            for variable, value in self.environ(**environ).items():
                patch.setenv(variable, value)
            patch.syspath_prepend(str(EXAMPLES))
            names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)
        try:
            yield names
        finally:
            for name in ("verifier", "issuer"):
                if (opened := names.get(name)) is not None:
                    closing = opened.close()
                    if closing is not None:
                        asyncio.run(closing)


@contextlib.contextmanager
def serve_asgi(app: Any) -> Iterator[str]:
    """The URL of an ASGI application on uvicorn."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        thread = threading.Thread(target=lambda: server.run([listener]))
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve_wsgi(app: Any) -> Iterator[str]:
    """The URL of a WSGI application on the standard library's server."""
    with make_server("127.0.0.1", 0, app, handler_class=_Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join(20)


ON_UVICORN = """
import importlib, sys, uvicorn
importlib.import_module(sys.argv[1])
from django.core.asgi import get_asgi_application
uvicorn.run(get_asgi_application(), port=int(sys.argv[2]), lifespan="off")
"""


@contextlib.contextmanager
def run_django(home: Home, name: str, *, asgi: bool = False, **environ: str) -> Iterator[str]:
    """The URL of a Django example, which is a process of its own: settings are there once in a process.

    It is on Django's own server, or with `asgi` on uvicorn.
    """
    port = _free_port()
    arguments = [str(EXAMPLES / f"{name}.py"), "runserver", "--noreload", str(port)]
    if asgi:
        arguments = ["-c", ON_UVICORN, name, str(port)]
    log = home.directory / f"{name}.log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", *arguments],
            cwd=home.directory,
            env=home.environ(PYTHONPATH=str(EXAMPLES), **environ),
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: _answers(process, port), what=log.read_text)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def get(url: str, token: str | None = None, **options: Any) -> httpx.Response:
    """GET with a Bearer token."""
    return send("GET", url, token, **options)


def accepted(url: str, token: str) -> httpx.Response:
    """GET with a good token, once the denylist is there."""
    answer = until(lambda: found if (found := get(url, token)).status_code != 503 else None, what="the denylist")
    return answer.raise_for_status()


def send(method: str, url: str, token: str | None = None, **options: Any) -> httpx.Response:
    """A request with a Bearer token."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    _client.cookies.clear()
    return _client.request(method, url, headers=headers, **options)


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    assert process.poll() is None, "the example has exited"
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
