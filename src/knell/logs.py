"""How a Knell process logs: for people on a terminal, one JSON object a line elsewhere."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog
from structlog.typing import Processor

from knell.redaction import without_tokens


def configure(*, level: int | str = logging.INFO, stream: TextIO | None = None) -> None:
    """Send structlog's events and the standard library's records to one stream, in one form.

    Args:
        level: the least severe that is written.
        stream: default stderr. A terminal gets coloured lines, anything else JSON.
    """
    target = sys.stderr if stream is None else stream
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_ending(target)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    # It would write down each URL that it asks, and the URL of a webhook is often a secret.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def configure_worker(*, loglevel: int | str | None = None, **_: Any) -> None:
    """A receiver for Celery's `setup_logging` signal: with it connected, Celery sets up nothing of its own."""
    configure(level=loglevel or logging.INFO)


def _ending(stream: TextIO) -> list[Processor]:
    if stream.isatty():
        # By default, where rich is installed, it shows the variables of each frame: tokens, keys, URLs with passwords.
        rendering: list[Processor] = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    else:
        rendering = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return [*rendering, _strike_tokens]


def _strike_tokens(_: Any, __: str, line: Any) -> str:
    # Whatever wrote it, a library's record or the text of a handler's exception: the last look before it is written.
    return without_tokens(str(line))
