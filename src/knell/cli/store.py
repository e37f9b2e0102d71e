"""`knell store`: the store, and who may do what there."""

from __future__ import annotations

from typing import Annotated

import typer

from knell.cli.opened import opened_store
from knell.cli.output import output_of
from knell.errors import InvalidSettings
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
