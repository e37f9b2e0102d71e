"""A service's worker on the embedded default: nothing to install, nothing to declare."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from knell import Notice, Settings, messages, topology
from knell.connection import connect, queue_depth
from knell.keys import NOTICE_TYPE, NOTIFIER, notice_key
from knell.notices import Cause, NoticeBatch, new_batch_id
from knell.publisher import Publisher
from knell.revocations import Scope
from knell.store import open_store
from tests.deployment import ROOT, environ_of, until


def test_a_worker_registers_itself_and_handles_and_retries(tmp_path: Path, settings: Callable[..., Settings]) -> None:
    """`celery -A services.shop worker` and nothing else: a notice is handled, and what fails is tried to the end."""
    here = settings()
    record, log = tmp_path / "record", tmp_path / "worker.log"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KNELL_")}
    environ |= environ_of(here) | {"CLERK_NAME": "shop", "CLERK_RECORD": str(record)}
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tests.apps.clerk", "worker", "-l", "info", "-n", "shop@embedded"],
            cwd=ROOT, env=environ, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    publisher = Publisher(here)
    try:
        until(lambda: b" ready." in log.read_bytes() or worker.poll(), seconds=60, what="the worker is ready")
        assert worker.poll() is None, log.read_text()
        store = open_store(here.store_url, namespace=here.namespace)
        assert [service.name for service in store.services()] == ["shop"]
        store.close()
        publisher.send([messages.notice(_signed(here, ["ok", "fail"]), shown="expired 2 sessions")]).result(10)
        until(lambda: _calls(record) == [0, 1, 1, 1], seconds=40, what="one call, and three tries of the other")
        with connect(here) as connection:
            # Three receipts and one parked entry.
            until(lambda: queue_depth(connection, topology.RECEIPTS) == 4, what="the answers")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    finally:
        publisher.close()
        if worker.poll() is None:
            worker.kill()
            worker.wait(10)


def _signed(settings: Settings, orders: list[str]) -> str:
    now, batch_id = time.time(), new_batch_id("e")
    entries = [
        Notice(batch_id=batch_id, n=n, cause=Cause.EXPIRED, ends=frozenset({"session"}), scope=Scope.SESSION,
               at=now, iss="https://auth.example", sid=f"s{n}", sub=sub)
        for n, sub in enumerate(orders)
    ]  # fmt: skip
    batch = NoticeBatch(id=batch_id, entries=entries, issued_at=now, expires_at=now + 600)
    key = notice_key(settings)
    assert key is not None
    return key.sign(batch.as_payload(signer=NOTIFIER, audience=settings.audience), typ=NOTICE_TYPE)


def _calls(record: Path) -> list[int]:
    return [json.loads(line)["n"] for line in record.read_text().splitlines()] if record.exists() else []
