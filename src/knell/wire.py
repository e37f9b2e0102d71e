"""What a task message must look like before any part of Celery touches it.

Celery trusts its messages: a body that is not a list of three kills the worker, a callback in a body is run, and a
header decides which task is dispatched. `refusal` is the gate in front of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from celery.utils.time import maybe_iso8601

from knell.connection import UNDECODABLE
from knell.messages import TERMINATE

# A signed batch of 500 entries stays below 2 MiB with the longest identifiers allowed.
MAX_BODY_BYTES = 4 * 1024 * 1024
# A Knell task's arguments are two levels deep; parsers of all kinds recurse.
MAX_DEPTH = 16
# Celery's are UUIDs. They are shown: a token has full stops, and is longer.
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
# What Celery would act on beyond running the one task. Headers and the embedded dictionary alike end up in the
# task's context, so each name is refused in both, unless it is empty.
_NOT_HERE = (
    "callbacks",
    "errbacks",
    "chain",
    "chord",
    "group",
    "group_index",
    "shadow",
    "compression",
    "stamps",
    "stamped_headers",
    "replaced_task_nesting",
    "args",
    "kwargs",
    "is_eager",
    "called_directly",
    "reply_to",
    "delivery_info",
    "properties",
    "hostname",
    "logfile",
    "loglevel",
    "children",
)
_EMBEDDED = frozenset({"callbacks", "errbacks", "chain", "chord"})


class _Refused(Exception):
    """Carries the reason from where it was found."""


def refusal(
    headers: Mapping[str, Any] | None,
    properties: Mapping[str, Any] | None,
    body: bytes | str,
    *,
    allowed: Collection[str],
) -> str | None:
    """Why a task message must not be run; None if it may.

    Args:
        headers: the message's headers, as Celery's protocol 2 has them.
        properties: the message's properties, with its `content_type` and `content_encoding`.
        body: the body as it came.
        allowed: names of the tasks that may come through this queue.

    Returns:
        One line that holds nothing of the body, fit for a log. Never raises.
    """
    try:
        if not isinstance(headers, Mapping) or not isinstance(properties or {}, Mapping):
            raise _Refused("the message has no headers")
        _check_headers(headers, allowed)
        _check_properties(properties or {})
        _check_body(_parsed(body))
    except _Refused as reason:
        return str(reason)
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        return f"the message cannot be read: {type(error).__name__}"
    return None


def _check_headers(headers: Mapping[str, Any], allowed: Collection[str]) -> None:
    if UNDECODABLE in headers:
        raise _Refused(f"the message's properties cannot be decoded: {str(headers[UNDECODABLE])[:64]!a}")
    task = headers.get("task")
    if not isinstance(task, str):
        raise _Refused("the message names no task")
    if task not in allowed:
        raise _Refused(f"task {task[:64]!a} does not belong in this queue")
    if not _is_id(headers.get("id")):
        raise _Refused("the message has no usable id")
    for name in ("root_id", "parent_id"):
        if headers.get(name) is not None and not _is_id(headers[name]):
            raise _Refused(f"header {name} is no id")
    for name in _NOT_HERE:
        if headers.get(name):
            raise _Refused(f"header {name} is not accepted")
    if headers.get("timelimit") is not None and list(headers["timelimit"]) != [None, None]:
        raise _Refused("header timelimit is not accepted")
    retries = headers.get("retries")
    if retries is not None and (isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries < 2**31):
        raise _Refused("header retries is no small number")
    for name in ("argsrepr", "kwargsrepr"):
        if not isinstance(headers.get(name), str | None):
            raise _Refused(f"header {name} is no text")
    for name in ("eta", "expires"):
        _check_time(name, headers.get(name))
    # beat's messages expire; what expires is acknowledged and gone, and a notice never is (see its own expires_at).
    if task == TERMINATE and headers.get("expires") is not None:
        raise _Refused("header expires is not accepted for a notice")


def _check_time(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str) or len(value) > 64:
        raise _Refused(f"header {name} is no time")
    try:
        datetime.fromisoformat(value).astimezone(UTC)
        maybe_iso8601(value)
    except (ValueError, TypeError, AttributeError, OverflowError, OSError):
        raise _Refused(f"header {name} is no time") from None


def _check_properties(properties: Mapping[str, Any]) -> None:
    if properties.get("content_type") != "application/json":
        raise _Refused(f"the content type is {str(properties.get('content_type'))[:64]!a}, not application/json")
    encoding = properties.get("content_encoding")
    if not isinstance(encoding, str) or encoding.lower() not in ("utf-8", "utf8"):
        raise _Refused(f"the content encoding is {str(encoding)[:64]!a}, not utf-8")
    # Celery's own senders set it; without a result backend nobody answers to it.
    if not isinstance(properties.get("reply_to") or "", str):
        raise _Refused("property reply_to is no text")


def _parsed(body: bytes | str) -> Any:
    if not isinstance(body, bytes | str):
        raise _Refused("the body is neither bytes nor text")
    if len(body) > MAX_BODY_BYTES:
        raise _Refused(f"the body has {len(body)} bytes; the limit is {MAX_BODY_BYTES}")
    try:
        text = body if isinstance(body, str) else body.decode("utf-8")
        return json.loads(text, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise _Refused("the body is not UTF-8") from None
    except RecursionError:
        raise _Refused(f"the body is nested more than {MAX_DEPTH} deep") from None
    except ValueError:
        raise _Refused("the body is not JSON") from None


def _check_body(parsed: Any) -> None:
    if not isinstance(parsed, list) or len(parsed) != 3:
        raise _Refused("the body is not a list of three: arguments, keyword arguments, options")
    args, kwargs, embed = parsed
    if not isinstance(args, list) or not isinstance(kwargs, dict) or not isinstance(embed, dict):
        raise _Refused("the body is not a list of three: arguments, keyword arguments, options")
    for name, value in embed.items():
        if name not in _EMBEDDED:
            raise _Refused("the body has an unknown option")
        if value:
            raise _Refused(f"the body has {name}, which is not accepted")
    _check_values(parsed)


def _check_values(parsed: Any) -> None:
    level, depth = [parsed], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _Refused(f"the body is nested more than {MAX_DEPTH} deep")
        level = [inner for value in level for inner in _inside(value)]


def _inside(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        # kombu turns such a dictionary into an object of that type.
        if "__type__" in value:
            raise _Refused("the body has a typed value")
        return value.values()
    if isinstance(value, list):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise _Refused("the body has a number that is not finite")
    return ()


def _no_constant(name: str) -> None:
    raise _Refused(f"the body has {name}, which is not JSON")


def _is_id(value: object) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None and not value.startswith("eyJ")
