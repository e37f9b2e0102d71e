"""`knell doctor`: is this deployment well, and if not, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import typer
from rich.text import Text

from knell import checkup
from knell.cli.output import Exit, finish, output_of, table
from knell.errors import InvalidSettings
from knell.settings import Settings
from knell.topology import Finding


def doctor(context: typer.Context) -> None:
    """Check settings, keys, store, clocks, broker, topology and services; say what to do about what is wrong.

    Exits with 1 if anything is wrong. Changes nothing.
    """
    found = _look()
    fine = all(each.ok for each in found)
    document = {"ok": fine, "checks": [{"ok": each.ok, "what": each.what, "todo": each.todo or None} for each in found]}
    output_of(context).answer(document, table(("CHECK", "FOUND"), _rows(found)))
    if not fine:
        finish(Exit.FAILED)


def _rows(found: Iterable[Finding]) -> Iterator[tuple[str | Text, str]]:
    for todo, alike in groupby(found, key=lambda each: each.todo):
        for each in alike:
            yield Text("OK", "green") if each.ok else Text("NOT OK", "bold red"), each.what
        if todo:
            # A row of its own: beside what was found, both would be too narrow to read on a terminal.
            yield "", f"to do: {todo}"


def _look() -> list[Finding]:
    try:
        settings = Settings.from_environ()
    except InvalidSettings as error:
        return [Finding(False, f"settings: {error}", "correct it; nothing else can be checked before")]
    return list(checkup.look(settings))
