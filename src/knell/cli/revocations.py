"""`knell revoke`, `knell undo`, `knell status` and `knell audit`."""

from __future__ import annotations

import getpass
import json
from collections import Counter
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
from knell.issuer import Issuer
from knell.keys import SigningKey, notice_key
from knell.notices import Cause
from knell.results import Revoked
from knell.revocations import InitiatingEntity, Scope
from knell.settings import Settings
from knell.store import AuditEntry, ServiceStatus
from knell.tokens import ClaimValue

STYLES = {"undone": "dim", "done": "green", "parked": "bold red", "retrying": "yellow", "waiting": "yellow"}


Actor = Annotated[
    str | None, typer.Option(metavar="NAME", help="Who asks for it, for the audit log. Default the user of this shell.")
]
Reason = Annotated[str | None, typer.Option(metavar="TEXT", help="Why. Services are told it, and whoever is refused.")]
Entity = Annotated[InitiatingEntity, typer.Option(help="On whose behalf.")]


def revoke(
    context: typer.Context,
    scope: Annotated[
        Scope,
        typer.Argument(
            metavar="SCOPE", help="What VALUE names: token, session, subject, client, key, claims or issuer."
        ),
    ],
    iss: Annotated[
        str,
        typer.Option("--iss", metavar="ISSUER", help="Whose token, session and so on it is: the iss of its tokens."),
    ],
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VALUE",
            help="The token's jti, the session's sid, the subject's sub, the client's client_id or the key's kid; of "
            "claims NAME=VALUE, once for each claim; of issuer nothing.",
        ),
    ] = None,
    reason: Reason = None,
    initiating_entity: Entity = InitiatingEntity.ADMIN,
    issued_before: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="The cut-off of a subject, client, claims or issuer: sessions that began later live on. ISO 8601 with "
            "an offset, or Unix seconds. Default now.",
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="The revocation's id; the same key twice is one revocation. Default a new one."
        ),
    ] = None,
    actor: Actor = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; say how many live tokens and sessions it would end.")
    ] = False,
    named: Annotated[
        str | None,
        typer.Option(
            "--confirm",
            metavar="NAME",
            help="Of a client, key, claims or issuer: its name once more, if many sessions end "
            "(KNELL_CONFIRM_SESSIONS).",
        ),
    ] = None,
    wait_for: Annotated[
        list[str] | None,
        typer.Option("--wait-for", metavar="SERVICE", help="Wait until this service has applied it. Can be repeated."),
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(min=0, help="How long --wait-for waits, in all.")] = 5.0,
) -> None:
    """Refuse a token, a session, or all sessions of one kind that have begun, and tell every service.

    Signs with the key of KNELL_NOTICE_KEY, and prints the revocation's id, which `knell status` and `knell undo` take.

    Exits with 1 if a service of --wait-for has not applied it within --timeout-seconds.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    cut_off = None if issued_before is None else read_time(issued_before)
    match = read_match(scope, values or [], iss)
    key = _key(settings)
    _warn(out, settings, key, iss, Cause.REVOKED)
    with Issuer(iss, notice_key=key, settings=settings) as issuer:
        revoked = issuer.revoke(
            scope,
            match,
            reason=reason,
            initiating_entity=initiating_entity,
            issued_before=cut_off,
            idempotency_key=idempotency_key,
            actor=actor or user(),
            confirm=named,
            dry_run=dry_run,
            wait_for=wait_for or (),
            timeout_seconds=timeout_seconds,
        )
        if revoked.recorded == "store":
            revoked = replace(revoked, services=issuer.status(revoked.id) or revoked.services)
    _tell(out, revoked)
    if not dry_run and not all(_is_done(revoked, name) for name in wait_for or ()):
        finish(Exit.FAILED)


def _is_done(revoked: Revoked, name: str) -> bool:
    return name in revoked.services and revoked.services[name].state == "done"


def undo(
    context: typer.Context,
    revocation_id: Annotated[str, typer.Argument(metavar="REVOCATION_ID", help="As `knell revoke` has printed it.")],
    reason: Reason = None,
    initiating_entity: Entity = InitiatingEntity.ADMIN,
    actor: Actor = None,
) -> None:
    """Take a revocation back: what it alone refused is accepted again.

    A service that has not applied it yet does not do so any more; sessions that services have ended stay ended.
    """
    out = output_of(context)
    settings = Settings.from_environ()
    key = _key(settings)
    with opened_store(settings) as store:
        revocation = store.revocation(revocation_id)
        if revocation is None and not store.undone(revocation_id):
            raise NotFound(f"no revocation {revocation_id!r} is on the denylist: unknown, or expired")
    # The notice speaks for the revocation's own issuer.
    iss = settings.namespace if revocation is None else revocation.iss
    if revocation is not None:
        _warn(out, settings, key, iss, Cause.UNDONE)
    with Issuer(iss, notice_key=key, settings=settings) as issuer:
        undone = issuer.undo(revocation_id, reason=reason, initiating_entity=initiating_entity, actor=actor or user())
    document = {
        "id": revocation_id,
        "created": undone.created,
        "published": undone.published,
        "untold": list(undone.untold),
    }
    if not undone.created:
        out.note("it was undone before")
    elif not undone.published:
        out.note("the broker has not taken the notice; the notifier's sweep sends it")
    spared = f"; not applied any more by {', '.join(undone.untold)}" if undone.untold else ""
    out.answer(document, f"undone {revocation_id}{spared}")


def audit(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many entries, the latest first.")] = 50,
) -> None:
    """Say who has revoked, undone and replayed what, why, and when."""
    with opened_store(Settings.from_environ()) as store:
        entries = store.audit(limit=limit)
    rows = [
        (moment(each.at), each.action, each.actor or "-", _about(each), _counted(each.counts), each.reason or "-")
        for each in entries
    ]
    shown = table(("AT", "ACTION", "WHO", "WHAT", "COUNT", "WHY"), rows) if rows else "nothing was revoked or replayed"
    output_of(context).answer({"entries": [each.as_json() for each in entries]}, shown)


def _about(entry: AuditEntry) -> str:
    scope = entry.what.get("scope")
    if scope is None:
        return ", ".join(map(str, entry.what.get("services", ())))
    match = " ".join(f"{name}={value}" for name, value in entry.what["match"].items())
    return f"{scope} {match} of {entry.what['iss']}" if scope != Scope.ISSUER else f"issuer {entry.what['iss']}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "-"


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
    if any(each.state not in ("done", "undone") for each in services.values()):
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


def read_match(scope: Scope, values: Sequence[str], iss: str) -> dict[str, ClaimValue]:
    """What a revocation of this scope matches by; InvalidInput if the values are not such."""
    claim = scope.claim
    if claim is None:
        found = [_read_claim(value) for value in values]
        for name, count in Counter(name for name, _ in found).items():
            if count > 1:
                raise InvalidInput(f"claim {name!r} is given {count} times; a token must have all: revoke one by one")
        return dict(found)
    if scope is Scope.ISSUER and not values:
        return {claim: iss}
    if len(values) != 1:
        raise InvalidInput(f"scope {scope} takes one VALUE, its {claim}; there are {len(values)}")
    return {claim: values[0]}


def _read_claim(text: str) -> tuple[str, ClaimValue]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidInput(f"{text!r} is no claim; write NAME=VALUE, for example tenant=acme")
    try:
        found = json.loads(value)
    except ValueError:
        return name, value
    # "3" in quotes is text, 3 is a number: as JSON has them. What is no value of a claim is text as well.
    return name, found if isinstance(found, str | int) else value


def user() -> str | None:
    """Who runs this command; None where the system has no name for them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None


def _warn(out: Output, settings: Settings, key: SigningKey, iss: str, cause: Cause) -> None:
    if (distrust := checkup.distrust(settings, key, iss, cause)) is not None:
        out.note(distrust)


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
        "tokens": revoked.tokens,
        "sessions": revoked.sessions,
    }
    if revoked.recorded == "dry_run":
        found = "it cannot be known how many tokens and sessions, by claims that are not tracked (KNELL_TRACKED_CLAIMS)"
        if revoked.tokens is not None:
            found = f"{revoked.tokens} live tokens of {revoked.sessions} sessions"
        out.answer(document, f"would end: {found}; nothing was changed")
        return
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
