"""`knell revoke` and `knell status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.text import Text

from knell import checkup
from knell.cli.opened import opened_store
from knell.cli.output import Exit, NotFound, Output, finish, moment, output_of, table
from knell.errors import InvalidInput, InvalidSettings
from knell.issuer import Issuer, Revoked
from knell.keys import SigningKey, notice_key
from knell.notices import Cause
from knell.revocations import InitiatingEntity, Scope
from knell.settings import Settings
from knell.store import ServiceStatus

STYLES = {"done": "green", "parked": "bold red", "retrying": "yellow", "waiting": "yellow"}


def revoke(
    context: typer.Context,
    scope: Annotated[Scope, typer.Argument(metavar="SCOPE", help="token, session or subject: what VALUE names.")],
    value: Annotated[
        str, typer.Argument(metavar="VALUE", help="The token's jti, the session's sid, or the subject's sub.")
    ],
    iss: Annotated[
        str,
        typer.Option("--iss", metavar="ISSUER", help="Whose token, session or subject it is: the iss of its tokens."),
    ],
    reason: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Why. Services are told it, and whoever is refused.")
    ] = None,
    initiating_entity: Annotated[InitiatingEntity, typer.Option(help="Who asked for it.")] = InitiatingEntity.ADMIN,
    issued_before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="A subject's cut-off: sessions that began later live on. ISO 8601 with an offset, or Unix seconds. "
            "Default now.",
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="The revocation's id; the same key twice is one revocation. Default a new one."
        ),
    ] = None,
    wait_for: Annotated[
        list[str] | None,
        typer.Option("--wait-for", metavar="SERVICE", help="Wait until this service has applied it. Can be repeated."),
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(min=0, help="How long --wait-for waits, in all.")] = 5.0,
) -> None:
    """Refuse a token, a session, or all sessions of a subject that have begun, and tell every service.

    Signs with the key of KNELL_NOTICE_KEY, and prints the revocation's id, which `knell status` takes.

    Exits with 1 if a service of --wait-for has not applied it within --timeout-seconds.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    cut_off = None if issued_before is None else read_time(issued_before)
    key = _key(settings)
    if (distrust := checkup.distrust(settings, key, iss, Cause.REVOKED)) is not None:
        out.note(distrust)
    with Issuer(iss, notice_key=key, settings=settings) as issuer:
        revoked = issuer.revoke(
            scope,
            {scope.claim: value},
            reason=reason,
            initiating_entity=initiating_entity,
            issued_before=cut_off,
            idempotency_key=idempotency_key,
            wait_for=wait_for or (),
            timeout_seconds=timeout_seconds,
        )
        if revoked.recorded == "store":
            revoked = replace(revoked, services=issuer.status(revoked.id) or revoked.services)
    _tell(out, revoked)
    if not all(name in revoked.services and revoked.services[name].state == "done" for name in wait_for or ()):
        finish(Exit.FAILED)


def status(
    context: typer.Context,
    revocation_id: Annotated[str, typer.Argument(metavar="REVOCATION_ID", help="As `knell revoke` has printed it.")],
) -> None:
    """Say which services have applied a revocation, when, and which have not.

    Exits with 1 if a service has not applied it, with 4 if there is no such revocation (or its record has gone).
    """
    with opened_store(Settings.from_environ()) as store:
        services = store.status(revocation_id)
        revocation = store.revocation(revocation_id)
    if services is None:
        raise NotFound(
            f"no revocation {revocation_id!r} is on record; records go after the retention (KNELL_RETENTION_SECONDS)"
        )
    document = {
        "id": revocation_id,
        "revocation": None if revocation is None else revocation.as_json(),
        "services": _states(services),
    }
    output_of(context).answer(document, *_shown(services))
    if any(each.state != "done" for each in services.values()):
        finish(Exit.FAILED)


def read_time(text: str) -> float:
    """A time from the command line, as Unix seconds; InvalidInput if it is none."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(f"{text!r} is no time; use 2026-01-31T12:00:00Z, or Unix seconds") from None
    if found.tzinfo is None:
        raise InvalidInput(f"{text!r} does not say which clock it is by; add Z, or an offset such as +02:00")
    return found.timestamp()


def _key(settings: Settings) -> SigningKey:
    found = notice_key(settings)
    if found is None:
        raise InvalidSettings(
            "no key signs the notice; set KNELL_NOTICE_KEY to an EdDSA key in PEM (`knell keys new` makes one)"
        )
    return found


def _tell(out: Output, revoked: Revoked) -> None:
    document = {
        "id": revoked.id,
        "recorded": revoked.recorded,
        "published": revoked.published,
        "created": revoked.created,
        "revocation": revoked.revocation.as_json(),
        "services": _states(revoked.services),
    }
    if revoked.recorded == "queued":
        out.answer(document, f"revocation {revoked.id}: queued; the store is away, and the broker keeps it until then")
        return
    if not revoked.created:
        out.note("it was revoked before under this idempotency key; the first revocation counts")
    elif not revoked.published:
        out.note("the broker has not taken the notice; the notifier's sweep sends it")
    out.answer(document, f"revocation {revoked.id}", *_shown(revoked.services))


def _states(services: Mapping[str, ServiceStatus]) -> dict[str, Any]:
    return {name: {"state": each.state, "at": each.at} for name, each in sorted(services.items())}


def _shown(services: Mapping[str, ServiceStatus]) -> Sequence[Any]:
    if not services:
        return ["no service was registered when it was recorded: there was nobody to tell"]
    rows = [(name, Text(each.state, STYLES[each.state]), moment(each.at)) for name, each in sorted(services.items())]
    return [table(("SERVICE", "STATE", "AT"), rows)]
