"""What the documents say of the settings is what the settings are, and what they say of keys can be done."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from knell.keyfiles import new_key
from knell.keys import TrustList
from knell.notices import Cause
from knell.settings import Rules, Settings
from tests.commandline import Knell
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


KEYS = (ROOT / "docs" / "keys.md").read_text()


def test_the_commands_of_the_page_on_keys_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Callable[..., Settings]
) -> None:
    """One after the other, in one folder; KID is the key that signed before the rotation."""
    monkeypatch.chdir(tmp_path)
    knell, kid = Knell(settings()), "none"
    knell("keys", "new", "--private", "notice-key.pem", "--trust", "trust.json")
    commands = [
        shlex.split(line, comments=True)[2:]
        for block in re.findall(r"^```console\n(.*?)^```$", KEYS, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(commands) >= 10
    for words in commands:
        asked = ["--yes"] if words[:2] == ["keys", "revoke"] else []  # a person is asked, and says so
        answer = knell(*(kid if word == "KID" else word for word in words), *asked)
        kid = answer.get("old_kid", kid)


def test_the_examples_of_the_page_on_keys_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, with no network: nothing is fetched before it is needed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KNELL_HOME", str(tmp_path / "knell"))
    new_key(tmp_path / "signing-keys.json", None, issuers=[], causes=[])
    examples = re.findall(r"^<!-- example: \w+ -->\n```python\n(.*?)^```$", KEYS, re.MULTILINE | re.DOTALL)
    made: dict[str, Any] = {}
    for example in examples:
        exec(example, made)
    assert len(made["keys"].jwks()["keys"]) == 1
    made["verifier"].close()
    made["issuer"].close()


def test_the_trust_list_of_the_page_on_keys_is_one() -> None:
    """The example is accepted, and says what the page says of it."""
    (text,) = re.findall(r"^```json\n(.*?)^```$", KEYS, re.MULTILINE | re.DOTALL)
    trust = TrustList.parse(text)
    assert trust.may_tell("auth-2026", "https://auth.example", Cause.UNDONE)
    assert not trust.may_tell("auth-2026", "https://other.example", Cause.REVOKED)
