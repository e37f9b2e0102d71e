"""`knell services`: who is told."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from knell import topology
from knell.cli.opened import check_registered, opened_store
from knell.cli.output import Output, confirm, moment, output_of, table
from knell.cli.rabbitmqctl import commands
from knell.connection import connect, queue_depth
from knell.errors import BrokerUnavailable
from knell.settings import Settings, check_service_name
from knell.store import ServiceInfo

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Who is told that a token or session has ended.")

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A lower-case letter, then letters, digits, '_' or '-'; 63 at most.")
]


@app.command(short_help="Register a service and declare its queue.")
def add(context: typer.Context, name: Name) -> None:
    """Register a service and declare its queue. It is told what ends from now on. Doing it again is harmless."""
    settings = Settings.from_environ()
    check_service_name(name)
    with opened_store(settings) as store:
        # The queue first: whatever is recorded for the service from its registration on finds it there.
        with connect(settings) as connection:
            topology.declare(connection, [name], settings=settings)
        added = store.add_service(name)
    [account] = (each for each in topology.accounts(settings.namespace, [name]) if each.whose == name)
    document = {
        "service": name,
        "added": added,
        "queue": topology.service_queue(name),
        "account": account.name,
        "permissions": asdict(account.permissions),
    }
    output_of(context).answer(
        document,
        f"service {name} {'is registered' if added else 'was registered before'}; its queue {document['queue']} exists",
        *([] if settings.embedded else _about(account, topology.vhost_of(settings))),
    )


@app.command(short_help="Remove a service.")
def remove(
    context: typer.Context,
    name: Name,
    delete_queue: Annotated[
        bool, typer.Option("--delete-queue", help="Delete its queue as well, with every message in it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a service: no notice waits for it any more. Without --delete-queue its queue stays, and fills.

    Its account on the broker loses its rights and its connections, if KNELL_BROKER_API_URL is an administrator's.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    with opened_store(settings) as store:
        check_registered(store, name)
        if not yes:
            more = ", with its queue and every message in it" if delete_queue else ""
            confirm(f"Remove service {name}{more}?", out)
        store.remove_service(name)
    withdrawn = _withdraw(settings, name, out)
    if delete_queue:
        with connect(settings) as connection:
            topology.remove_service(connection, name)
    left = "" if delete_queue else f"; its queue {topology.service_queue(name)} is still there"
    document = {"service": name, "removed": True, "queue_deleted": delete_queue, "account_withdrawn": withdrawn}
    out.answer(document, f"service {name} is removed{left}")


@app.command(name="list", short_help="List the services and what waits for them.")
def list_(context: typer.Context) -> None:
    """List the registered services, what waits in their queues, and whether they have missed notices."""
    out = output_of(context)
    settings = Settings.from_environ()
    with opened_store(settings) as store:
        services = store.services()
    try:
        depths = _depths(settings, services)
    except BrokerUnavailable as error:
        depths = {}
        out.note(f"what waits in the queues is unknown: {error}")
    document = {
        "services": [
            {
                "name": each.name,
                "added_at": each.added_at,
                "queue": topology.service_queue(each.name),
                "waiting": depths.get(each.name),
                "missed_since": each.missed_since,
            }
            for each in services
        ]
    }
    rows = [(each.name, moment(each.added_at), _depth(each, depths), moment(each.missed_since)) for each in services]
    out.answer(document, table(("SERVICE", "SINCE", "WAITING", "MISSED SINCE"), rows) if rows else "none")


def _about(account: topology.Account, vhost: str) -> list[str]:
    return [
        f"its account {account.name} on the broker needs no more than what `knell topology apply --passwords FOLDER`",
        "gives it; so do these, run on the broker:",
        *(f"  {command}" for command in commands(account, vhost)),
    ]


def _withdraw(settings: Settings, name: str, out: Output) -> bool:
    """Take the rights of a removed service's account away; whether that was done."""
    if settings.embedded:
        return False
    account, vhost = topology.account_name(settings.namespace, "service", name), topology.vhost_of(settings)
    command = f"rabbitmqctl clear_permissions -p {vhost} {account}"
    left = f"its account on the broker, if it has one, keeps its rights: {command}"
    if settings.broker_api_url is None:
        out.note(left)
        return False
    if account in topology.in_use(settings):
        out.note(f"{account} is the account that this command runs on, and keeps its rights")
        return False
    try:
        topology.withdraw(settings.broker_api_url, vhost, account)
    except BrokerUnavailable as error:
        out.note(f"{left} ({error})")
        return False
    return True


def _depths(settings: Settings, services: list[ServiceInfo]) -> dict[str, int | None]:
    if not services:
        return {}
    with connect(settings) as connection:
        return {each.name: queue_depth(connection, topology.service_queue(each.name)) for each in services}


def _depth(service: ServiceInfo, depths: dict[str, int | None]) -> str:
    if service.name not in depths:
        return "unknown"
    depth = depths[service.name]
    return "no queue" if depth is None else str(depth)
