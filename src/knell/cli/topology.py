"""`knell topology`: what Knell has on its broker, and who may do what there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from knell import topology
from knell.cli.opened import opened_store
from knell.cli.output import Exit, Output, finish, output_of, table
from knell.cli.rabbitmqctl import commands
from knell.connection import connect
from knell.errors import InvalidInput
from knell.settings import Settings
from knell.topology.accounts import UNDONE
from knell.topology.compare import WRONG

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The exchanges, queues, policies and accounts on the broker."
)

Issuers = Annotated[
    list[str] | None, typer.Option("--issuer", metavar="NAME", help="An issuer that has an account. May be repeated.")
]
Accounts = list[str] | None


@app.command(short_help="Declare everything, and set policies and accounts.")
def apply(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is missing, and change nothing.")] = False,
    without_policies: Annotated[
        bool, typer.Option("--without-policies", help="Leave the policies to somebody else.")
    ] = False,
    without_accounts: Annotated[
        bool, typer.Option("--without-accounts", help="Leave the accounts to somebody else.")
    ] = False,
    passwords: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Make the accounts that are missing. The password of each is in the file of its name there: given, "
            "or made now, for its owner alone.",
        ),
    ] = None,
    issuer: Issuers = None,
    rotate: Annotated[
        Accounts, typer.Option("--rotate", metavar="ACCOUNT", help="Give an account a new password. May be repeated.")
    ] = None,
    include: Annotated[
        Accounts,
        typer.Option(
            "--include",
            metavar="ACCOUNT",
            help="Change an account although the notifier, or this command, runs on it. May be repeated.",
        ),
    ] = None,
    remove: Annotated[
        Accounts, typer.Option("--remove", metavar="ACCOUNT", help="Take an account's rights away. May be repeated.")
    ] = None,
) -> None:
    """Declare every exchange, queue and binding, those of all registered services included; set policies and accounts.

    Policies and accounts go through RabbitMQ's management API (KNELL_BROKER_API_URL), accounts as an administrator.
    Without it, the command that sets the policy is printed and the exit code is 1, unless --without-policies; `knell
    topology permissions --rabbitmqctl` prints those for accounts. All of it can be repeated.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    asked = topology.Asked(
        issuers=issuer or (),
        passwords=None if passwords is None else topology.Passwords(passwords),
        rotate=rotate or (),
        include=include or (),
        remove=remove or (),
    )
    _check(settings, asked, without_accounts=without_accounts)
    with opened_store(settings) as store:
        services = [service.name for service in store.services()]
    # First: of all that is asked for, a name or a file that cannot be used ends it with nothing changed.
    make_accounts = _accounts(settings, services, asked, out) if not (dry_run or without_accounts) else None
    with connect(settings) as connection:
        missing = topology.missing(connection, services, settings=settings)
        if not dry_run:
            topology.declare(connection, services, settings=settings)
    policies, command = ("not set", None) if dry_run else _policies(settings, without_policies)
    outcomes = _made(make_accounts(), out) if make_accounts is not None else []
    document = {
        "applied": not dry_run,
        "services": services,
        "missing": missing,
        "policies": policies,
        "command": command,
        "accounts": [_outcome(each) for each in outcomes],
    }
    _tell(out, document, missing, outcomes, dry_run=dry_run)
    if command is not None and not without_policies:
        out.error(f"policies are not set, for want of KNELL_BROKER_API_URL; run on the broker: {command}")
    if (command is not None and not without_policies) or any(each.state == "left alone" for each in outcomes):
        finish(Exit.FAILED)


@app.command(short_help="Compare the broker with what should be there.")
def show(context: typer.Context) -> None:
    """Compare the broker with what should be there; changes nothing. Exits with 1 if something is missing or different.

    What is there beside it is told too: a queue of a service that is not registered, an account with rights.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    with opened_store(settings) as store:
        services = [service.name for service in store.services()]
    rows = _rows(settings, services, out)
    document = {
        "rows": [{"kind": each.kind, "name": each.name, "state": each.state, "detail": each.detail} for each in rows]
    }
    shown = [each for each in rows if each.state != "as it should be" or not each.name.startswith("celery_delayed_")]
    out.answer(document, table(("KIND", "NAME", "STATE", "DETAIL"), map(_as_row, shown)) if shown else "all is there")
    if any(each.state in WRONG for each in rows):
        finish(Exit.FAILED)


@app.command(short_help="Say what each account on the broker may do.")
def permissions(
    context: typer.Context,
    issuer: Issuers = None,
    rabbitmqctl: Annotated[
        bool, typer.Option("--rabbitmqctl", help="As commands to run on the broker, where there is no management API.")
    ] = False,
) -> None:
    """Say what each process needs an account for, and what that account may do. Looks at no broker.

    A verifier needs none: it reads the store.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    with opened_store(settings) as store:
        services = [service.name for service in store.services()]
    found = topology.accounts(settings.namespace, services, issuer or ["name"])
    document = {"accounts": [_account(each) for each in found], "without_account": ["verifier"]}
    if rabbitmqctl:
        vhost = topology.vhost_of(settings)
        out.answer(document, *(line for each in found for line in commands(each, vhost)))
        return
    out.answer(document, table(("ACCOUNT", "MAY", "WHAT"), [row for each in found for row in _rights(each)]))
    if not issuer:
        out.note("an issuer's account is called what you call the issuer: --issuer NAME")


def _check(settings: Settings, asked: topology.Asked, *, without_accounts: bool) -> None:
    """InvalidInput, before anything is done, for accounts that are asked for and cannot be made."""
    if not (asked.named or asked.issuers or asked.passwords):
        return
    if settings.embedded:
        raise InvalidInput("the embedded broker has no accounts: whoever may read its file may do everything")
    if without_accounts:
        raise InvalidInput("--without-accounts leaves no account to ask for")
    if settings.broker_api_url is None:
        raise InvalidInput(
            "accounts are made through RabbitMQ's management API: set KNELL_BROKER_API_URL, with an administrator's "
            "account; or run what `knell topology permissions --rabbitmqctl` prints"
        )


def _policies(settings: Settings, without: bool) -> tuple[str, str | None]:
    """What became of the policies, and the command to run if they are not set."""
    if settings.embedded:
        return "not needed", None
    api_url = None if without else settings.broker_api_url
    command = topology.apply_policies(api_url, topology.vhost_of(settings))
    return ("not set" if command else "set"), command


def _accounts(
    settings: Settings, services: Collection[str], asked: topology.Asked, out: Output
) -> Callable[[], list[topology.Outcome]] | None:
    if settings.embedded or settings.broker_api_url is None:
        return None
    try:
        return topology.prepare_accounts(settings, services, asked)
    except topology.ApiRefused as error:
        if asked.named or asked.issuers or asked.passwords:
            raise
        out.note(f"accounts were not looked at: {error}")
        return None


def _made(outcomes: Sequence[topology.Outcome], out: Output) -> list[topology.Outcome]:
    """Those that were not left out, which a note tells, for want of a folder."""
    absent = [each.account for each in outcomes if each.state == "not made"]
    if absent:
        out.note(f"--passwords FOLDER would make {len(absent)} accounts: {', '.join(absent)}")
    return [each for each in outcomes if each.state != "not made"]


def _outcome(outcome: topology.Outcome) -> dict[str, Any]:
    return {
        "account": outcome.account,
        "state": outcome.state,
        "why": outcome.why or None,
        "password": None if outcome.password is None else str(outcome.password),
    }


def _tell(
    out: Output,
    document: dict[str, Any],
    missing: list[str],
    outcomes: Sequence[topology.Outcome],
    *,
    dry_run: bool,
) -> None:
    done = "would be declared" if dry_run else "declared"
    shown = [f"{done}: {each}" for each in topology.in_short(missing)] or ["every exchange and queue was there already"]
    if not dry_run:
        shown.append(f"policies: {document['policies']}")
    shown += [_told(each) for each in outcomes if each.state not in UNDONE]
    out.answer(document, *shown)
    for each in outcomes:
        if each.state in UNDONE:
            out.error(_told(each))


def _told(outcome: topology.Outcome) -> str:
    file = f"; its password is in {outcome.password}" if outcome.state == "made" else ""
    return f"account {outcome.account}: {outcome.state}{f' ({outcome.why})' if outcome.why else ''}{file}"


def _rows(settings: Settings, services: Collection[str], out: Output) -> list[topology.Row]:
    if settings.broker_api_url is not None and not settings.embedded:
        return topology.compare(settings, services)
    if not settings.embedded:
        out.note("without KNELL_BROKER_API_URL, bindings, policies and accounts cannot be seen")
    with connect(settings) as connection:
        absent = topology.missing(connection, services, settings=settings)
    return [topology.Row(kind, name, "missing") for kind, _, name in (each.partition(" ") for each in absent)]


def _as_row(row: topology.Row) -> tuple[str, str, str | Text, str]:
    state = Text(row.state, "bold red") if row.state in WRONG else row.state
    return row.kind, row.name, state, row.detail


def _account(account: topology.Account) -> dict[str, Any]:
    rights = account.permissions
    return {
        "account": account.name,
        "role": account.role,
        "tags": list(account.tags),
        "configure": rights.configure,
        "write": rights.write,
        "read": rights.read,
        "topics": {name: {"write": write, "read": read} for name, (write, read) in rights.topics.items()},
    }


def _rights(account: topology.Account) -> list[tuple[str, str, str]]:
    rights = account.permissions
    rows = [("tags", ", ".join(account.tags))] if account.tags else []
    rows += [(name, getattr(rights, name)) for name in ("configure", "write", "read")]
    ladder = [name for name in rights.topics if name.startswith("celery_delayed_")]
    for name, (write, read) in rights.topics.items():
        if name not in ladder:
            rows.append((f"topics of {name}", f"write {write}, read {read}"))
    if ladder:
        rows.append((f"topics of {ladder[0]} to {len(ladder) - 1}", f"write {rights.topics[ladder[0]][0]}"))
    return [(account.name if n == 0 else "", *row) for n, row in enumerate(rows)]
