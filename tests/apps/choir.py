"""A service of async handlers, all of whose connections are open before its worker forks.

celery -A tests.apps.choir worker --pool=prefork --concurrency=2
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from knell import Notice, Service, messages
from knell.notices import Receipt, new_batch_id

NAME = os.environ["RECORDER_NAME"]
RECORD = Path(os.environ["RECORDER_FILE"])
DUET_SECONDS = 40.0

choir = Service(NAME, lease_seconds=2)


def write(**fields: object) -> None:
    with RECORD.open("ab", buffering=0) as file:
        file.write(json.dumps({"service": NAME, "pid": os.getpid(), **fields}).encode() + b"\n")


def lines(sub: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in RECORD.read_text().splitlines()]
    return [line for line in found if line["service"] == NAME and line.get("sub") == sub]


@choir.on_session_end
async def end(notice: Notice) -> None:
    """Subjects `duet-*` wait for one another in two processes; the first call for `stuck-*` never returns."""
    sub = notice.sub or ""
    write(event="began", id=notice.id, sub=sub, sid=notice.sid)
    if sub.startswith("stuck-") and len(lines(sub)) == 1:
        time.sleep(3600)
    deadline = time.monotonic() + DUET_SECONDS
    while sub.startswith("duet-") and len({line["pid"] for line in lines(sub)}) < 2:
        assert time.monotonic() < deadline, "the other process never came"
        await asyncio.sleep(0.02)
    write(event="session", id=notice.id, sub=sub, sid=notice.sid)


app = choir.celery_app()
if "CHOIR_TIME_LIMIT_SECONDS" in os.environ:
    # In the configuration: it goes before the command line's --time-limit. The hard limit counts from the soft one.
    limit = float(os.environ["CHOIR_TIME_LIMIT_SECONDS"])
    app.conf.update(task_soft_time_limit=limit / 2, task_time_limit=limit)

# Opened in the parent, as an application may that uses the service before its worker forks: what the children inherit
# is the parent's. The receipt is for a batch that does not exist, and the notifier ignores it.
choir.resources.dedupe.begin(NAME, new_batch_id("e"), holder="parent", lease_seconds=1)
choir.resources.publish([messages.receipt(NAME, Receipt(batch_id=new_batch_id("e"), at=time.time(), done=(0,)))])
choir.resources.run(asyncio.sleep(0))
