"""A real HTTP server on the loopback interface that publishes a JWK Set, or misbehaves in a way that a test names."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = Callable[[BaseHTTPRequestHandler], None]


class JwksServer:
    """Attributes: `requests` are the paths that were asked for; `gate`, while it is cleared, holds every answer up."""

    def __init__(
        self, document: Mapping[str, Any] | Callable[[], Mapping[str, Any]], *, tls: Tls | None = None
    ) -> None:
        self.requests: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = 0
        self._answer: Answer = publish(document)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                outer.waiting += 1
                outer.gate.wait(30)
                outer.waiting -= 1
                try:
                    outer._answer(self)
                except OSError:
                    self.close_connection = True  # the client has had enough, which is what some tests are about

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.server.wrap_socket(self._server.socket, server_side=True)
            self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that distrusts us
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._server.server_port}/jwks.json"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def does(self, answer: Answer) -> None:
        """Answer like this from now on."""
        self._answer = answer

    def publishes(self, *keys: Mapping[str, Any]) -> None:
        """Publish these JWKs from now on."""
        self._answer = publish({"keys": list(keys)})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def publish(document: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> Answer:
    """The document as JSON; a function is asked each time."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        send(json.dumps(document() if callable(document) else document).encode())(request)

    return answer


def send(body: bytes, status: int = 200, **headers: str) -> Answer:
    """This body, whatever it is."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


def drip(part: bytes, pause: threading.Event, *, seconds: float = 0.05, in_header: bool = False) -> Answer:
    """A part of an answer again and again, each within any time-out for one read, until the client has had enough."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"" if in_header else b"\r\n"))
        while not pause.wait(seconds):
            request.wfile.write(part)

    return answer


class Tls:
    """A test authority, and the certificate of 127.0.0.1 that it has signed."""

    def __init__(self, directory: Path) -> None:
        authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "knell test authority")])
        root = _certificate(name, name, authority.public_key(), authority, is_authority=True)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
        leaf = _certificate(subject, name, server.public_key(), authority, is_authority=False)
        pem = directory / "server.pem"
        pem.write_bytes(
            server.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + leaf.public_bytes(serialization.Encoding.PEM)
        )
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.server.load_cert_chain(pem)
        self.client = ssl.create_default_context(cadata=root.public_bytes(serialization.Encoding.PEM).decode())


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePrivateKey,
    *,
    is_authority: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    key_usage = x509.KeyUsage(
        digital_signature=not is_authority, key_cert_sign=is_authority, crl_sign=is_authority, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(key_usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(signer, hashes.SHA256())
    )
