"""`knell parked`: what services gave up on, to be looked at, replayed, or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any

import typer
from rich.table import Table

from knell import commands
from knell import replay as replaying
from knell.cli.opened import check_registered, opened_store
from knell.cli.output import Exit, NotFound, Output, confirm, finish, moment, output_of, printable, table
from knell.cli.revocations import user
from knell.errors import InvalidInput, MessageRefused
from knell.publisher import Publisher
from knell.settings import Settings
from knell.store import Parked, Store

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What services gave up on, kept with its error.")

# Each may hold a signed notice of 500 entries, and all of an answer is in memory.
MOST_LISTED = 10_000
# A command to track has up to 500 tokens, and a terminal has 50 lines.
MOST_SHOWN = 5

Ids = Annotated[list[str], typer.Argument(metavar="ID", help="As `knell parked list` prints them.")]
ServiceName = Annotated[
    str | None, typer.Option("--service", metavar="NAME", help="Only what this service gave up on.")
]


@app.command(name="list", short_help="List what is parked.")
def list_(
    context: typer.Context,
    service: ServiceName = None,
    after: Annotated[
        str, typer.Option(metavar="ID", help="Only entries behind this one: where the list before has ended.")
    ] = "",
    limit: Annotated[int, typer.Option(metavar="NUMBER", help=f"How many at most, 1 to {MOST_LISTED}.")] = 100,
) -> None:
    """List parked entries, in the order of their ids."""
    out = output_of(context)
    if not 1 <= limit <= MOST_LISTED:
        raise InvalidInput(f"--limit is {limit}; use 1 to {MOST_LISTED}, and --after for what follows")
    with opened_store(Settings.from_environ()) as store:
        if service is not None:
            check_registered(store, service)
        found = list(islice(replaying.all_parked(store, service=service, after=after), limit + 1))
    shown = found[:limit]
    more = len(found) > limit
    out.answer({"parked": [_document(each) for each in shown], "more": more}, _table(shown) if shown else "none")
    if more:
        out.note(f"there are more: --after {shown[-1].id}")


@app.command(short_help="Show one entry.")
def show(
    context: typer.Context,
    parked_id: Annotated[str, typer.Argument(metavar="ID", help="As `knell parked list` prints it.")],
) -> None:
    """Show one parked entry: its error, and the notice, the command or the message that it is."""
    with opened_store(Settings.from_environ()) as store:
        parked = _found(store, parked_id)
    document = _document(parked) | {"notice": _notice(parked), "command": _command(parked), "body": _body(parked)}
    fields = Table(box=None, show_header=False, pad_edge=False)
    fields.add_column(style="bold")
    fields.add_column(overflow="fold")
    for name, value in document.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                fields.add_row(f"{name}.{key}", printable(_in_short(inner)))
        elif value is not None:
            fields.add_row(name, moment(value) if name == "at" else printable(str(value)))
    output_of(context).answer(document, fields)


@app.command(short_help="Send entries to their service once more.")
def replay(
    context: typer.Context,
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="As `knell parked list` prints them.")] = None,
    service: ServiceName = None,
    every: Annotated[bool, typer.Option("--all", help="All that the service of --service gave up on.")] = False,
) -> None:
    """Send parked entries to their service once more: those named, or with --service NAME --all, all of one service's.

    Entries leave the list once the broker has confirmed them. Of named ones, none is sent if one cannot be replayed;
    with --all, such entries are left out and named, and the exit code is 1.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    if bool(ids) == every or every != (service is not None):
        raise InvalidInput("name the entries to replay, or pass --service NAME --all")
    with opened_store(settings) as store:
        parked = _chosen(store, ids or (), service)
        plan = replaying.plan(parked, services=[each.name for each in store.services()], now=store.time())
        if plan.refused and not every:
            first, why = next(iter(plan.refused.items()))
            raise InvalidInput(f"{first} cannot be replayed: {why}; nothing was replayed")
        sent = _send(settings, store, plan.replays)
    _tell(out, sent, plan)


@app.command(short_help="Remove entries for good.")
def drop(
    context: typer.Context,
    ids: Ids,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove parked entries for good. What they told of has then not been handled by that service."""
    out = output_of(context)
    with opened_store(Settings.from_environ()) as store:
        parked = _chosen(store, ids, None)
        if not yes:
            confirm(f"Remove {len(parked)} parked entries for good?", out)
        dropped = store.unpark([each.id for each in parked])
    out.answer({"dropped": dropped}, f"dropped {dropped}")


def _chosen(store: Store, ids: Sequence[str], service: str | None) -> list[Parked]:
    if service is not None:
        check_registered(store, service)
        return list(replaying.all_parked(store, service=service))
    return [_found(store, each) for each in dict.fromkeys(ids)]


def _found(store: Store, parked_id: str) -> Parked:
    found = replaying.find_parked(store, parked_id)
    if found is None:
        raise NotFound(f"nothing is parked under {parked_id!r}; `knell parked list` shows what is")
    return found


def _send(settings: Settings, store: Store, replays: Sequence[replaying.Replay]) -> int:
    if not replays:
        return 0
    publisher = Publisher(settings)
    try:
        return replaying.send(replays, store=store, publisher=publisher, actor=user())
    finally:
        publisher.close()


def _tell(out: Output, sent: int, plan: replaying.Plan) -> None:
    document = {"replayed": sent, "messages": len(plan.replays), "refused": dict(plan.refused)}
    out.answer(document, f"replayed {sent} in {len(plan.replays)} messages")
    for parked_id, why in plan.refused.items():
        out.note(f"{parked_id} was left out: {why}")
    if plan.refused:
        finish(Exit.FAILED)


def _document(parked: Parked) -> dict[str, Any]:
    return {
        "id": parked.id,
        "service": parked.service,
        "queue": parked.queue,
        "notice_id": parked.notice_id,
        "error": parked.error,
        "attempts": parked.attempts,
        "at": parked.at,
    }


def _notice(parked: Parked) -> dict[str, Any] | None:
    if parked.jws is None or parked.notice_id is None:
        return None
    try:
        entries = replaying.read_batch(parked.jws).entries
    except MessageRefused as error:
        return {"unreadable": str(error)}
    return next((each.as_json() for each in entries if each.n == replaying.number_of(parked)), None)


def _command(parked: Parked) -> dict[str, Any] | None:
    if parked.jws is None or parked.notice_id is not None:
        return None
    try:
        return commands.as_said(parked.jws)
    except MessageRefused as error:
        return {"unreadable": str(error)}


def _in_short(value: Any) -> str:
    if isinstance(value, list) and len(value) > MOST_SHOWN:
        return f"{value[:MOST_SHOWN]} and {len(value) - MOST_SHOWN} more (--json shows them)"
    return str(value)


def _body(parked: Parked) -> str | None:
    return None if parked.body is None else parked.body.decode(errors="backslashreplace")


def _table(found: Sequence[Parked]) -> Table:
    rows = [(each.id, each.queue, str(each.attempts), moment(each.at), each.error) for each in found]
    return table(("ID", "QUEUE", "ATTEMPTS", "AT", "ERROR"), rows)
