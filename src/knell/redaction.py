"""Striking raw tokens out of what is written down: texts of errors, logs, bodies that are kept to be looked at."""

from __future__ import annotations

import re
import traceback

STRUCK = "[token]"

# A compact JWS begins with a JSON object in base64url: `{"` makes "eyJ" or "eyI", white space behind `{` makes "ew" or
# "ey". What begins with "eyJ" goes with or without a full stop: it may be half of a token. Possessive, and begun only
# where a word begins, so that a text of any kind is gone through once.
_JWS = r"(?<![\w-])e[wy][\w-]{8,}+\.[\w-]*+(?:\.[\w-]*+)?|eyJ[\w-]{8,}+(?:\.[\w-]*+){0,2}"
_IN_TEXT = re.compile(_JWS, re.ASCII)
_IN_BYTES = re.compile(_JWS.encode())


def without_tokens(text: str) -> str:
    """A text with every JWT, and every half of one that can be told, replaced by "[token]"."""
    return _IN_TEXT.sub(STRUCK, text)


def traceback_of(error: BaseException) -> str:
    """Where an error came from, for a log: no variables, which hold tokens, keys and passwords, and no token.

    A log that is left to structlog's defaults shows the variables of every frame once it is given the error itself, and
    in an application's process nobody but the application sets that up.
    """
    return without_tokens("".join(traceback.format_exception(error)))


def bytes_without_tokens(body: bytes) -> bytes:
    """The same for bytes of any kind."""
    return _IN_BYTES.sub(STRUCK.encode(), body)
