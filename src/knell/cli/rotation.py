"""`knell keys rotate | retire | revoke | list`: keys in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from knell import rotation
from knell.cli.output import confirm, moment, output_of, table
from knell.errors import InvalidInput, InvalidSettings
from knell.keys import TrustedKey, TrustList, notice_key
from knell.keyset import DatedKey, SigningKeys
from knell.settings import Settings

Kid = Annotated[str, typer.Argument(metavar="KID", help="The key's name, as `knell keys list` shows it.")]
TrustFile = Annotated[Path, typer.Option("--trust", metavar="FILE", help="The trust list.")]
MaybeTrust = Annotated[Path | None, typer.Option("--trust", metavar="FILE", help="The trust list that has the key.")]
MaybePrivate = Annotated[Path | None, typer.Option("--private", metavar="FILE", help="The file of private keys.")]

SIGNS = "signs"


def rotate(
    context: typer.Context,
    private: Annotated[Path, typer.Option("--private", metavar="FILE", help="The file of private keys.")],
    trust: MaybeTrust = None,
    after: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="When the new key begins to sign: time for everybody to know it."),
    ] = rotation.LEAD_SECONDS,
    algorithm: Annotated[str, typer.Option(metavar="NAME", help="Of a FILE in PEM: EdDSA, ES256 or RS256.")] = "EdDSA",
) -> None:
    """Add a new key, which takes over from the one that signs now; the processes that run do it by themselves.

    With --trust the new key may tell what the old one may, and the old one's notices count until the retention has
    passed: copy the trust list to every service before the new key begins to sign. A FILE in PEM becomes a JWK Set.
    Run it again with a smaller --after to bring the moment forward.

    The lifetimes are those of the KNELL_* variables, which have to be the same here as everywhere.
    """
    rules = Settings.from_environ().rules
    made = rotation.rotate(private, trust, rules=rules, now=time.time(), after_seconds=after, algorithm=algorithm)
    document: dict[str, Any] = {
        "kid": made.new.kid,
        "signs_from": made.signs_from,
        "old_kid": made.old.kid,
        "published_until": made.published_until,
        "trusted_until": made.trusted_until if trust else None,
    }
    shown = [
        f"key {made.new.kid} signs from {moment(made.signs_from)} on",
        f"key {made.old.kid} signs until then; its tokens are accepted until {moment(made.published_until)}",
    ]
    if trust is not None:
        shown.append(f"its notices count until {moment(made.trusted_until)}")
        shown.append(f"before {moment(made.signs_from)}: copy {trust} to every process that has KNELL_TRUST")
    output_of(context).answer(document, *shown)


def retire(
    context: typer.Context,
    kid: Kid,
    trust: TrustFile,
    after: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="How long it counts. Default the retention, 7 days."),
    ] = None,
) -> None:
    """Let what a key has signed count for a while longer, and then no more: one that has been replaced elsewhere.

    Notices that it has signed may still be on their way, or be sent again, for the retention.
    """
    seconds = Settings.from_environ().rules.retention_seconds if after is None else after
    until = time.time() + seconds
    rotation.retire(trust, kid, until=until)
    output_of(context).answer(
        {"kid": kid, "trust": str(trust), "trusted_until": until}, f"notices of key {kid} count until {moment(until)}"
    )


def revoke(
    context: typer.Context,
    kid: Kid,
    trust: MaybeTrust = None,
    private: MaybePrivate = None,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Why; it is kept in the files.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Let nothing count any more that a key has signed: one that was stolen.

    With --trust its notices and commands are refused, those that wait in queues and in the notice log as well: revoke
    again what has to stay revoked. With --private it leaves the JWK Set. `knell revoke` refuses its tokens at once.
    """
    if trust is None and private is None:
        raise InvalidInput("name the files that have the key: --trust, --private or both")
    settings, out = Settings.from_environ(), output_of(context)
    if trust is not None and (mine := _notice_kid(settings)) == kid:
        raise InvalidInput(
            f"{mine} is the key that KNELL_NOTICE_KEY signs with; let another one sign first: "
            f"`knell keys rotate --after 0 --private {settings.notice_key} --trust {trust}`"
        )
    if not yes:
        confirm(f"Refuse everything that key {kid} has signed?", out)
    rotation.revoke(trust, private, kid, reason=reason, now=time.time())
    files = [str(path) for path in (trust, private) if path is not None]
    out.answer({"kid": kid, "revoked": True, "files": files}, f"key {kid} is revoked in {' and '.join(files)}")


def list_(context: typer.Context, trust: MaybeTrust = None, private: MaybePrivate = None) -> None:
    """List the keys of a trust list, of a file of private keys, or of both.

    Without either, those of KNELL_TRUST and KNELL_NOTICE_KEY.
    """
    if trust is None and private is None:
        settings = Settings.from_environ()
        trust, private = settings.trust, settings.notice_key
    now = time.time()
    trusted = [] if trust is None else list(TrustList.load(trust))
    own = [] if private is None else list(_states(_load(private), now))
    document = {
        "trusted": [_trusted_json(key) for key in trusted],
        "private": [_private_json(each, state) for each, state in own],
    }
    shown: list[Any] = []
    if trusted:
        rows = [
            (key.kid, key.algorithm, " ".join(sorted(key.issuers)), " ".join(sorted(key.causes)), _counts(key, now))
            for key in trusted
        ]
        shown.append(table(("TRUSTED", "ALG", "ISS", "MAY TELL", "COUNTS"), rows))
    if own:
        signers = [(each.key.kid, each.key.algorithm, moment(each.nbf or None), state) for each, state in own]
        shown.append(table(("PRIVATE", "ALG", "SIGNS FROM", "STATE"), signers))
    output_of(context).answer(document, *(shown or ["none"]))


def _trusted_json(key: TrustedKey) -> dict[str, Any]:
    return {
        "kid": key.kid,
        "alg": key.algorithm,
        "iss": sorted(key.issuers),
        "causes": sorted(key.causes),
        "exp": key.exp,
        "revoked": key.revoked,
    }


def _private_json(each: DatedKey, state: str) -> dict[str, Any]:
    return {
        "kid": each.key.kid,
        "alg": each.key.algorithm,
        "signs_from": each.nbf,
        "exp": each.exp,
        "revoked": each.revoked,
        "active": state == SIGNS,
    }


def _load(private: Path) -> SigningKeys:
    try:
        return SigningKeys.parse(private.read_bytes(), algorithm="EdDSA", name=str(private))
    except OSError as error:
        raise InvalidInput(f"{private} cannot be read: {error.strerror}") from None


def _notice_kid(settings: Settings) -> str | None:
    try:
        key = notice_key(settings)
    except InvalidSettings:
        return None
    return None if key is None else key.kid


def _counts(key: TrustedKey, now: float) -> str:
    if key.revoked:
        return "no: revoked"
    if key.exp is None:
        return "yes"
    return f"until {moment(key.exp)}" if now < key.exp else f"not since {moment(key.exp)}"


def _states(found: SigningKeys, now: float) -> Iterator[tuple[DatedKey, str]]:
    active = found.active(now).kid if any(each.lives(now) for each in found.keys) else None
    for each in found.keys:
        if each.revoked:
            yield each, "revoked"
        elif each.key.kid == active:
            yield each, SIGNS
        elif each.nbf > now:
            yield each, "published, waits to sign"
        else:
            yield each, f"published until {moment(each.exp)}" if each.lives(now) else f"ended {moment(each.exp)}"
