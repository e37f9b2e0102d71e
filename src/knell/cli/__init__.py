"""The command line: `knell --help`."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from knell import logs
from knell.cli import doctor, keys, parked, revocations, services, topology
from knell.cli.output import Output, exit_code, output_of
from knell.errors import KnellError

__all__ = ["app", "main"]

EXIT_CODES = """
Settings come from KNELL_* variables; without any, Knell runs embedded, with its files under .knell/.

\b
Exit codes:
  0  done, and all is well
  1  a check failed, or not everything is done: a service has not
     applied a revocation, an entry was left out of a replay
  2  wrong usage, or an input or setting that cannot be used
  3  the store or the broker cannot be reached; try again
  4  there is no such revocation, service or parked entry
"""


class KnellCommand(TyperGroup):
    """The root command: turns Knell's errors into one line and an exit code, and takes --json anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read --json also where people write it: at the end."""
        end = args.index("--") if "--" in args else len(args)
        if "--json" in args[:end]:
            args = ["--json", *(arg for arg in args[:end] if arg != "--json"), *args[end:]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. What Knell expects to go wrong is told without a traceback."""
        try:
            return super().invoke(ctx)
        except KnellError as error:
            output_of(ctx).error(str(error))
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    name="knell",
    cls=KnellCommand,
    epilog=EXIT_CODES,
    no_args_is_help=True,
    # Plain help and plain usage errors: the same text on a terminal, in a pipe and in a log.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.")] = False,
) -> None:
    """Knell tells every service that a token has expired or was revoked. This command runs a deployment of it."""
    context.obj = Output(as_json=json)


app.command(name="doctor", short_help="Check the whole deployment, and say what to do.")(doctor.doctor)
app.add_typer(topology.app, name="topology")
app.add_typer(services.app, name="services")
app.command(name="revoke", short_help="Revoke a token, a session, or all of a subject's.")(revocations.revoke)
app.command(name="status", short_help="Which services have applied a revocation.")(revocations.status)
app.add_typer(parked.app, name="parked")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """The entry point of the `knell` command."""
    # What the library logs goes to stderr, and only what the command does not say by itself.
    logs.configure(level=logging.ERROR)
    app()
