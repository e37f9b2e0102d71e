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


EXAMPLE = re.compile(r"^<!-- (examples/\S+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = EXAMPLE.findall((ROOT / "docs" / "frameworks.md").read_text())


@pytest.mark.parametrize(("path", "text"), SHOWN, ids=[path for path, _ in SHOWN])
def test_an_example_is_shown_as_it_runs(path: str, text: str) -> None:
    """What docs/frameworks.md shows is the file that the tests run."""
    assert (ROOT / path).read_text() == text


def test_every_example_of_a_framework_is_shown() -> None:
    """None is left out."""
    files = {f"examples/frameworks/{file.name}" for file in (ROOT / "examples" / "frameworks").glob("with_*.py")}
    assert files == {path for path, _ in SHOWN}
