"""Knell in web frameworks, each in a module of its own that loads with its framework alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needs"]


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the import of a framework: an ImportError that says what to install.

    Args:
        extra: the name of Knell's extra that brings it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this module needs {error.name}, which is not installed; run: pip install 'knell[{extra}]'",
            name=error.name,
        ) from error
