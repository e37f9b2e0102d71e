"""A service that writes down what its handlers are told, one JSON line each: `celery -A tests.apps.recorder worker`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from knell import Notice, Service

NAME = os.environ["RECORDER_NAME"]
RECORD = Path(os.environ["RECORDER_FILE"])
# Handlers raise for this subject for as long as the file exists.
TROUBLE = Path(os.environ["RECORDER_TROUBLE"]) if "RECORDER_TROUBLE" in os.environ else None

recorder = Service(NAME, max_attempts=3, first_retry_seconds=1.0, longest_retry_seconds=1.5)


def write(event: str, **fields: object) -> None:
    line = json.dumps({"service": NAME, "event": event, "time": time.time(), **fields}) + "\n"
    with RECORD.open("ab", buffering=0) as file:
        file.write(line.encode())


def write_notice(event: str, notice: Notice) -> None:
    write(
        event,
        id=notice.id,
        cause=notice.cause,
        scope=notice.scope,
        at=notice.at,
        jti=notice.jti,
        sid=notice.sid,
        sub=notice.sub,
        reason=notice.reason,
    )


@recorder.on_token_end
def token_ended(notice: Notice) -> None:
    write_notice("token", notice)


@recorder.on_session_end
def session_ended(notice: Notice) -> None:
    write_notice("session", notice)
    if TROUBLE is not None and TROUBLE.exists() and notice.sub == "trouble":
        raise ConnectionError("the session store of this service is away")


@recorder.on_missed
def missed(since: float) -> None:
    write("missed", since=since)


app = recorder.celery_app()
