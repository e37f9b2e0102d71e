"""A service whose handler gives raw tokens away wherever it can: `celery -A tests.apps.leaky worker`.

LEAKY_TOKENS names a file with a raw token in each line, of a token that the handler would have got from elsewhere.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import structlog

from knell import GiveUp, Notice, Service

TOKENS = Path(os.environ["LEAKY_TOKENS"])

leaky = Service(os.environ["RECORDER_NAME"], max_attempts=2, first_retry_seconds=1.0, longest_retry_seconds=1.0)


@leaky.on_session_end
def end(notice: Notice) -> None:
    """A session `leak-...` fails with a token in its error, and in logs; `give-up-...` is parked at once."""
    token = TOKENS.read_text().splitlines()[-1]
    sid = notice.sid or ""
    if sid.startswith("leak-"):
        try:
            raise KeyError(token)
        except KeyError as error:
            structlog.get_logger("leaky").exception("look_up_failed", authorization=f"Bearer {token}")
            logging.getLogger("leaky").warning("GET /session?access_token=%s", token)
            raise ConnectionError(f"401 for 'Authorization: Bearer {token}', then {token!r}") from error
    if sid.startswith("give-up-"):
        raise GiveUp(f"unknown session of {token}\n{token}")


app = leaky.celery_app()
