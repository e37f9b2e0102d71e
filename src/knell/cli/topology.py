"""`knell topology`: what Knell has on its broker."""

from __future__ import annotations

from typing import Annotated

import typer

from knell import topology
from knell.cli.opened import opened_store
from knell.cli.output import Exit, Output, finish, output_of
from knell.connection import connect
from knell.settings import Settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The exchanges, queues and policies on the broker.")


@app.command(short_help="Declare everything, and set the policies.")
def apply(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is missing, and change nothing.")] = False,
    without_policies: Annotated[
        bool, typer.Option("--without-policies", help="Leave the policies to somebody else.")
    ] = False,
) -> None:
    """Declare every exchange, queue and binding, those of all registered services included, and set the policies.

    Policies go through RabbitMQ's management API (KNELL_BROKER_API_URL). Without it, the command to run on the broker
    is printed and the exit code is 1, unless --without-policies. All of it can be repeated.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    with opened_store(settings) as store:
        services = [service.name for service in store.services()]
    with connect(settings) as connection:
        missing = topology.missing(connection, services, settings=settings)
        if not dry_run:
            topology.declare(connection, services, settings=settings)
    if dry_run:
        policies, command = "not set", None
    else:
        policies, command = _policies(settings, without_policies)
    document = {
        "applied": not dry_run,
        "services": services,
        "missing": missing,
        "policies": policies,
        "command": command,
    }
    _tell(out, document, missing, dry_run=dry_run)
    if command is not None and not without_policies:
        out.error(f"policies are not set, for want of KNELL_BROKER_API_URL; run on the broker: {command}")
        finish(Exit.FAILED)


def _policies(settings: Settings, without: bool) -> tuple[str, str | None]:
    """What became of the policies, and the command to run if they are not set."""
    if settings.embedded:
        return "not needed", None
    api_url = None if without else settings.broker_api_url
    command = topology.apply_policies(api_url, topology.vhost_of(settings))
    return ("not set" if command else "set"), command


def _tell(out: Output, document: dict[str, object], missing: list[str], *, dry_run: bool) -> None:
    done = "would be declared" if dry_run else "declared"
    shown = [f"{done}: {each}" for each in topology.in_short(missing)] or ["every exchange and queue was there already"]
    if not dry_run:
        shown.append(f"policies: {document['policies']}")
    out.answer(document, *shown)
