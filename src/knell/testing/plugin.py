"""The pytest plugin: the fixtures `knell` and `knell_rules`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from knell.settings import Rules
    from knell.testing.inprocess import Knell


@pytest.fixture
def knell_rules() -> Rules:
    """The lifetimes and limits that the fixture `knell` has. Override it, in a module or a conftest.py, for others."""
    from knell.settings import Rules

    return Rules()


@pytest.fixture
def knell(tmp_path_factory: pytest.TempPathFactory, knell_rules: Rules) -> Iterator[Knell]:
    """All of Knell in this process, for one test, with a clock that stands until the test moves it."""
    from knell.testing.inprocess import Knell

    with Knell(tmp_path_factory.mktemp("knell"), rules=knell_rules) as made:
        yield made
