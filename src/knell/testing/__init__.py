"""For the tests of whoever uses Knell: all of it in one process, with a clock that the test moves. See docs/testing.md.

With pytest the fixture `knell` is there once the package is installed; elsewhere, `with Knell(folder) as knell:`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knell.testing.clock import Clock
    from knell.testing.courier import Courier
    from knell.testing.inprocess import Knell
    from knell.testing.recorder import Call, Recorder

__all__ = ["Call", "Clock", "Courier", "Knell", "Recorder"]

# Imported when first used: pytest loads the plugin in every run, also where nobody asks for the fixture.
_HOMES = {"Call": "recorder", "Clock": "clock", "Courier": "courier", "Knell": "inprocess", "Recorder": "recorder"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'knell.testing' has no attribute {name!r}")
    value = getattr(import_module(f"knell.testing.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
