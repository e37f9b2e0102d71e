"""A service whose handler does what a notice's `sub` tells it to: `celery -A tests.apps.clerk worker`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from knell import Notice, Service

NAME = os.environ["CLERK_NAME"]
RECORD = Path(os.environ["CLERK_RECORD"])

clerk = Service(NAME, max_attempts=3, longest_retry_seconds=1.0, lease_seconds=2)


@clerk.on_session_end
def end(notice: Notice) -> None:
    order, _, service = (notice.sub or "").partition("@")
    mine = not service or service == NAME
    if order == "slow" and mine:
        time.sleep(0.3)
    with RECORD.open("ab", buffering=0) as file:
        file.write(json.dumps({"service": NAME, "id": notice.id, "n": notice.n, "pid": os.getpid()}).encode() + b"\n")
    if order == "fail" and mine:
        raise ConnectionError("the session store of this service is away")


app = clerk.celery_app()
