"""`knell import`: the blacklists of other systems."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import typer

from knell import checkup, imports
from knell.cli.output import Exit, finish, output_of
from knell.cli.revocations import user
from knell.errors import InvalidInput
from knell.issuer import Issuer
from knell.keys import notice_key
from knell.notices import Cause
from knell.settings import Settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Revoke what another system's blacklist refuses.")

Iss = Annotated[str, typer.Option("--iss", metavar="ISSUER", help="The iss of the tokens.")]
From = Annotated[
    str,
    typer.Option("--from", metavar="URL", envvar="KNELL_IMPORT_FROM", help="Where the blacklist is.", show_envvar=True),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Count, and change nothing.")]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; shown to whoever is refused.")]
REASON = "imported from a blacklist"
# Of a long list of bad entries these tell what is wrong with it.
SHOWN = 20


@app.command(short_help="The tables of djangorestframework-simplejwt's blacklist app.")
def simplejwt(
    context: typer.Context,
    iss: Iss,
    source: From,
    after: Annotated[int, typer.Option(min=0, metavar="ID", help="Go on after this id of a blacklisted token.")] = 0,
    timezone: Annotated[str, typer.Option(metavar="NAME", help="Django's TIME_ZONE, where USE_TZ is False.")] = "UTC",
    dry_run: DryRun = False,
    reason: Reason = REASON,
) -> None:
    """Revoke what djangorestframework-simplejwt has blacklisted; what has expired is left out.

    URL is the database's, as SQLAlchemy has it: postgresql+psycopg://..., sqlite:///db.sqlite3. Running it again
    revokes nothing twice. Exits with 1 if an entry cannot be imported, with 3 if it was stopped.
    """
    try:
        zone = ZoneInfo(timezone)
    except (ValueError, OSError, LookupError):
        raise InvalidInput(f"{timezone!r} is no time zone; use a name such as Europe/Berlin") from None
    _run(context, iss, imports.from_simplejwt(source, after=after, timezone=zone), dry_run, reason)


@app.command(name="redis", short_help="Keys of a Redis, or the members of a set.")
def redis_(
    context: typer.Context,
    iss: Iss,
    source: From,
    prefix: Annotated[
        str, typer.Option(metavar="TEXT", help="What stands before the jti in each key; may be empty.")
    ] = "blacklist:",
    of_set: Annotated[
        str | None, typer.Option("--set", metavar="KEY", help="The key of a set of jtis, in place of --prefix.")
    ] = None,
    dry_run: DryRun = False,
    reason: Reason = REASON,
) -> None:
    """Revoke what a plain Redis blacklist refuses: keys whose time to live is what is left of the token's life.

    Running it again revokes nothing twice. Exits with 1 if an entry cannot be imported, with 3 if it was stopped.
    """
    entries = (
        imports.from_redis(source, prefix=prefix) if of_set is None else imports.from_redis_set(source, key=of_set)
    )
    _run(context, iss, entries, dry_run, reason)


def _run(
    context: typer.Context, iss: str, entries: Iterable[imports.Listed | imports.Bad], dry_run: bool, reason: str
) -> None:
    out, settings = output_of(context), Settings.from_environ()
    key = notice_key(settings)
    if key is not None and (distrust := checkup.distrust(settings, key, iss, Cause.REVOKED)) is not None:
        out.note(distrust)
    with Issuer(iss, notice_key=key, settings=settings) as issuer:
        report = imports.import_blacklist(
            issuer,
            entries,
            leeway_seconds=settings.rules.leeway_seconds,
            dry_run=dry_run,
            reason=reason,
            actor=user(),
        )
    document: dict[str, Any] = {
        "dry_run": dry_run,
        "revoked": report.revoked,
        "known": report.known,
        "expired": report.expired,
        "bad": [{"position": bad.position, "why": bad.why} for bad in report.bad],
        "position": report.position,
        "stopped": report.stopped,
    }
    for bad in report.bad[:SHOWN]:
        out.note(f"{bad.position}: {bad.why}")
    if len(report.bad) > SHOWN:
        out.note(f"and {len(report.bad) - SHOWN} more that cannot be imported; --json has all of them")
    verb = "would be revoked" if dry_run else "revoked"
    out.answer(
        document,
        f"{report.revoked} {verb}, {report.known} known, {report.expired} expired, {len(report.bad)} bad",
    )
    if report.stopped is not None:
        out.error(f"stopped after {report.position or 'nothing'}: {report.stopped}; run it again, no harm is done")
        finish(Exit.UNAVAILABLE)
    if report.bad:
        finish(Exit.FAILED)
