"""`knell store`: who may do what on Redis, and the schema on PostgreSQL."""

from __future__ import annotations

from typing import Annotated

import typer

from knell.cli.opened import opened_store
from knell.cli.output import Exit, finish, output_of
from knell.errors import InvalidInput, InvalidSettings
from knell.settings import REDIS_SCHEMES, Settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The store, and who may do what there.")


@app.callback()
def root() -> None:
    """The store, and who may do what there."""


@app.command(short_help="Print the accounts that Redis needs, one for each role.")
def permissions(
    context: typer.Context,
    services: Annotated[
        list[str] | None,
        typer.Argument(help="Services that get an account. Default: the registered ones.", metavar="[SERVICE]..."),
    ] = None,
    dedupe: Annotated[
        bool,
        typer.Option("--dedupe", help="Only the services' accounts: for a KNELL_DEDUPE_URL that is not the store."),
    ] = False,
) -> None:
    """Print what an administrator runs on Redis: one ACL SETUSER for each role, with the rights that it needs.

    On a cluster, or where replicas follow, run it on every server. Passwords are not in it, and an account without one
    lets nobody in: ACL SETUSER <name> on >PASSWORD. Run again, after a new version, it leaves passwords as they are.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    url = settings.dedupe_url if dedupe else settings.store_url
    if url.partition("://")[0].lower() not in REDIS_SCHEMES:
        raise InvalidSettings(
            f"{'KNELL_DEDUPE_URL' if dedupe else 'KNELL_STORE_URL'} is no Redis: this prints accounts on Redis"
        )
    from knell.stores.redis_accounts import service_account, store_accounts  # loads redis-py

    together = settings.dedupe_url == settings.store_url
    accounts = [] if dedupe else store_accounts(settings)
    if dedupe or together:
        accounts += [service_account(settings, name) for name in services or _registered(settings)]
    document = {"accounts": [{"name": each.name, "rules": list(each.rules)} for each in accounts]}
    out.answer(document, *(each.line for each in accounts))
    if not dedupe and not together:
        out.note("services keep what they have handled elsewhere: see --dedupe")


def _registered(settings: Settings) -> list[str]:
    with opened_store(settings) as store:
        return [service.name for service in store.services()]


@app.command(short_help="Bring the schema to what this Knell needs.")
def upgrade(
    context: typer.Context,
    contract: Annotated[
        bool, typer.Option("--contract", help="First take away what only an older Knell used: when none runs any more.")
    ] = False,
) -> None:
    """Run the migrations that are next, all of them or none. It can be repeated.

    Run it before a new version is rolled out: what it adds does not disturb the old one. KNELL_STORE_URL has to name a
    role that owns the schema, or may make it. What only older versions used stays until --contract.
    """
    url, namespace = _on_postgresql()
    from knell.stores import migrate  # loads SQLAlchemy

    done = migrate.upgrade(url, namespace=namespace, contract=contract)
    left = migrate.state(url, namespace=namespace)
    document = {
        "applied": [one.revision for one in done],
        "revision": left.revision,
        "pending": [one.revision for one in left.pending],
    }
    lines = [f"{one.revision} ({one.kind}): {one.what}" for one in done] or ["nothing to do"]
    if left.pending:
        lines.append("when no older Knell runs any more: knell store upgrade --contract")
    output_of(context).answer(document, *lines)


@app.command(short_help="Say where the schema is, and what is to be done.")
def check(context: typer.Context) -> None:
    """Exits with 1 if this Knell cannot work on the schema as it is. Changes nothing."""
    url, namespace = _on_postgresql()
    from knell.stores import migrate  # loads SQLAlchemy

    found = migrate.state(url, namespace=namespace)
    document = {"ok": found.fits, "revision": found.revision, "pending": [one.revision for one in found.pending]}
    lines = [
        f"schema {namespace} is at revision {found.revision}" if found.revision else f"schema {namespace} is empty"
    ]
    lines += [f"pending: {one.revision} ({one.kind}): {one.what}" for one in found.pending]
    if not found.fits:
        lines.append("to do: knell store upgrade")
    output_of(context).answer(document, *lines)
    if not found.fits:
        finish(Exit.FAILED)


def _on_postgresql() -> tuple[str, str]:
    settings = Settings.from_environ()
    if not settings.store_url.startswith("postgresql:"):
        raise InvalidInput("KNELL_STORE_URL is no postgresql:// URL; every other store makes what it needs by itself")
    return settings.store_url, settings.namespace
