"""How every command answers: one JSON document or something to read on stdout, one line on stderr, an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import IntEnum
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from knell.errors import InvalidInput, KnellError, Unavailable, UnknownService

# No line is wrapped where nobody looks at it: `grep` and `cut` work on what a pipe gets.
PIPE_WIDTH = 4000


class Exit(IntEnum):
    """What a command's exit code means; `knell --help` has the same list."""

    OK = 0
    FAILED = 1
    WRONG = 2
    UNAVAILABLE = 3
    NOT_FOUND = 4


class NotFound(KnellError):
    """What a command was asked about does not exist."""


def exit_code(error: KnellError) -> Exit:
    """The exit code that goes with an error."""
    if isinstance(error, NotFound | UnknownService):
        return Exit.NOT_FOUND
    if isinstance(error, Unavailable):
        return Exit.UNAVAILABLE
    return Exit.WRONG if isinstance(error, InvalidInput) else Exit.FAILED


class Output:
    """Where a command's answer goes. Colour only on a terminal, and never with NO_COLOR."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json

    def answer(self, document: Mapping[str, Any], *shown: RenderableType) -> None:
        """The whole answer of a command: `document` under --json, else what is `shown`."""
        if self.as_json:
            typer.echo(_json(document))
            return
        console = _console()
        for part in shown:
            # Only tables fit themselves to the terminal; a sentence or a command has to stay in one piece.
            console.print(printable(part) if isinstance(part, str) else part, soft_wrap=not isinstance(part, Table))

    def note(self, text: str) -> None:
        """Something to know that is no error, as one line on stderr."""
        self._line("note: ", "yellow", text)

    def error(self, text: str) -> None:
        """Why a command did not do what was asked, as one line on stderr."""
        self._line("error: ", "bold red", text)

    def _line(self, label: str, style: str, text: str) -> None:
        _console(stderr=True).print(Text.assemble((label, style), printable(text)), soft_wrap=True)


def output_of(context: typer.Context) -> Output:
    """The Output of the command that runs."""
    found: Output = context.find_root().obj
    return found


def finish(code: Exit) -> None:
    """End the command with this exit code."""
    raise typer.Exit(int(code))


def confirm(question: str, out: Output) -> None:
    """Ask on the terminal; ends the command if the answer is no. InvalidInput where nobody can be asked."""
    if out.as_json or not sys.stdin.isatty():
        raise InvalidInput("nobody can be asked here whether that is meant; pass --yes")
    typer.confirm(question, abort=True, err=True)


def table(columns: Iterable[str], rows: Iterable[Iterable[str | Text]]) -> Table:
    """A table of text, with nothing in it that could steer a terminal."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    return made


def printable(text: str) -> str:
    """Text in one line, with control characters written out: what others wrote must not steer a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _json(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, indent=2, ensure_ascii=False)
    # Inside of strings, where JSON has an escape for each; only its own line ends stand outside of them.
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


def moment(at: float | None) -> str:
    """A time (Unix seconds) for people, in UTC; "-" for none."""
    if at is None:
        return "-"
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{at:.0f} s"  # beyond the year 9999, as somebody else wrote it


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    return (
        console
        if console.is_terminal
        else Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=PIPE_WIDTH)
    )
