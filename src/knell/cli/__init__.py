"""The command line: `knell --help`."""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from knell import logs
from knell.cli import doctor, imports, keys, parked, revocations, services, store, topology
from knell.cli.output import Exit, Output, exit_code, output_of
from knell.errors import KnellError

__all__ = ["app", "main"]

EPILOG = """
\b
Settings are environment variables. Without any, Knell runs embedded: no
server is needed, and everything is kept in files under .knell/.
  KNELL_BROKER_URL      amqp:// or amqps://, of Knell's own virtual host
  KNELL_BROKER_API_URL  RabbitMQ's management API, with an administrator's
                        credentials: for `topology apply` and `doctor`
  KNELL_STORE_URL       redis://, rediss://, redis+sentinel://,
                        redis+cluster://, unix:///path, postgresql://
                        or sqlite:///path
  KNELL_NOTICE_KEY      the private key that signs notices: for `revoke`,
                        and for the notifier
  KNELL_TRUST           the trust list: whose notices count
  KNELL_NAMESPACE       keeps two environments on one server apart
  KNELL_HOME            where the embedded default keeps its files

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
    """The root command: turns what can go wrong into one line and an exit code, and takes --json anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read --json also where people write it: at the end. What is no text ends the command."""
        for arg in args:
            if not _is_text(arg):
                Output().error(f"the argument {os.fsencode(arg)!r} is no text; give it in UTF-8")
                raise typer.Exit(Exit.WRONG)
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
        except OSError as error:
            if error.filename is None:
                raise  # a pipe that nobody reads any more, which Typer ends quietly, or a bug
            # A folder or a key file that this account may not read, or make.
            output_of(ctx).error(f"{error.filename} cannot be used: {error.strerror}")
            raise typer.Exit(Exit.WRONG) from None


def _is_text(arg: str) -> bool:
    # Bytes of a command line that are no UTF-8 arrive as surrogates, which neither a store nor JSON takes.
    try:
        arg.encode()
    except UnicodeEncodeError:
        return False
    return True


app = typer.Typer(
    name="knell",
    cls=KnellCommand,
    epilog=EPILOG,
    no_args_is_help=True,
    # Plain help and plain usage errors: the same text on a terminal, in a pipe and in a log.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    context: typer.Context,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Answer with one JSON document on stdout. It may stand anywhere in the command line."
        ),
    ] = False,
) -> None:
    """Knell tells every service that a token has expired or was revoked, so that it ends the sessions that hung on it.

    This command sets a deployment up, looks after it, and revokes by hand.
    """
    context.obj = Output(as_json=json)


app.command(name="doctor", short_help="Check the whole deployment, and say what to do.")(doctor.doctor)
app.add_typer(topology.app, name="topology")
app.add_typer(store.app, name="store")
app.add_typer(services.app, name="services")
app.command(name="revoke", short_help="Revoke a token, a session, or all sessions of one kind.")(revocations.revoke)
app.command(name="undo", short_help="Take a revocation back.")(revocations.undo)
app.command(name="status", short_help="Say which services have applied a revocation.")(revocations.status)
app.add_typer(parked.app, name="parked")
app.command(name="audit", short_help="Say who has revoked, undone and replayed what.")(revocations.audit)
app.add_typer(keys.app, name="keys")
app.add_typer(imports.app, name="import")
app.add_typer(store.app, name="store")


def main() -> None:
    """The entry point of the `knell` command."""
    # What the library logs goes to stderr, and only what the command does not say by itself.
    logs.configure(level=logging.ERROR)
    app()
