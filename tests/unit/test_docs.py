"""What the documents say of the settings is what the settings are."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from knell.settings import Rules, Settings
from tests.deployment import ROOT

TEXT = (ROOT / "docs" / "settings.md").read_text()
RULES = list(fields(Rules))
NAMES = [f"KNELL_{field.name.upper()}" for field in (*fields(Settings), *RULES) if field.name != "rules"]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_documented(name: str) -> None:
    """Each variable has a row of its own."""
    assert re.search(rf"^\| `{name}` \|", TEXT, re.MULTILINE)


@pytest.mark.parametrize("field", RULES, ids=lambda field: field.name)
def test_the_documented_default_of_a_limit_is_its_default(field: object) -> None:
    """The number in the table is the one in the code."""
    name, default = getattr(field, "name"), getattr(field, "default")  # noqa: B009
    shown = "none" if default == () else f"{default:.0f}"
    assert re.search(rf"^\| `KNELL_{name.upper()}` \| {shown}[ |(]", TEXT, re.MULTILINE)


def test_no_other_variable_is_promised() -> None:
    """A name that no code reads would be set in vain."""
    assert set(re.findall(r"KNELL_[A-Z_]+", TEXT)) - {"KNELL_"} == set(NAMES)
