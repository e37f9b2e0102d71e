"""The partner's receiving end where Node is not installed: the checks of examples/partner-receiver.mjs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOLERANCE_SECONDS = 300
KEY = base64.b64decode(os.environ["PARTNER_WEBHOOK_SECRET"].removeprefix("whsec_"))
seen: set[str] = set()
speaking = threading.Lock()


def say(event: dict[str, object]) -> None:
    """Write one line. Requests are served side by side, and two prints at once can end up in one line."""
    with speaking:
        print(json.dumps(event), flush=True)


class Receiver(BaseHTTPRequestHandler):
    """Checks each POST, and writes one line for each that is new."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Take a notice."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        message_id = self.headers.get("webhook-id", "")
        verified = self._verified(message_id, body)
        if verified and message_id not in seen:
            seen.add(message_id)
            say({"event": "received", **json.loads(body), "at": time.time()})
        self.send_response(204 if verified else 401)
        if not verified:
            self.send_header("content-length", "0")
        self.end_headers()

    def _verified(self, message_id: str, body: bytes) -> bool:
        timestamp = self.headers.get("webhook-timestamp", "")
        if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > TOLERANCE_SECONDS:
            return False
        signed = hmac.digest(KEY, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)
        expected = f"v1,{base64.b64encode(signed).decode()}"
        given = self.headers.get("webhook-signature", "").split()
        return any(hmac.compare_digest(expected.encode(), each.encode()) for each in given)

    def log_message(self, format: str, *args: object) -> None:
        """Its lines are its log."""


server = ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "0"))), Receiver)
say({"event": "listening", "port": server.server_address[1]})
server.serve_forever()
