"""`knell keys`: the keys that sign notices, and the trust list that says whose notices count."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from knell import keyfiles
from knell.cli import rotation
from knell.cli.output import output_of
from knell.errors import InvalidInput
from knell.keys import ANY_ISSUER
from knell.notices import Cause

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make and rotate signing keys, and say whose notices count."
)

TrustFile = Annotated[
    Path, typer.Option("--trust", metavar="FILE", help="The trust list, a JWK Set; made if it is missing.")
]


def _issuers(default: str) -> Any:
    return typer.Option(
        "--iss",
        metavar="ISSUER",
        help=f"A token issuer that the key may speak for, to the letter; '*' is any. Can be repeated. {default}",
    )


def _causes(default: str) -> Any:
    return typer.Option(
        "--cause",
        metavar="CAUSE",
        help=f"What it may tell: {', '.join(Cause)}. Can be repeated. Default {default}.",
    )


@app.command(short_help="Make a key and trust it.")
def new(
    context: typer.Context,
    private: Annotated[
        Path, typer.Option("--private", metavar="FILE", help="Where the private key goes; never overwritten.")
    ],
    trust: Annotated[
        Path | None,
        typer.Option("--trust", metavar="FILE", help="The trust list to add it to, a JWK Set; made if it is missing."),
    ] = None,
    iss: Annotated[list[str] | None, _issuers("Default any.")] = None,
    cause: Annotated[list[Cause] | None, _causes("everything; with --iss, revoked and undone")] = None,
    algorithm: Annotated[str, typer.Option(metavar="NAME", help="EdDSA, ES256 or RS256.")] = "EdDSA",
    if_missing: Annotated[
        bool, typer.Option("--if-missing", help="Keep a private key that is there, and see that it is trusted.")
    ] = False,
) -> None:
    """Make a key (file mode 0600) and add its public half to a trust list.

    A FILE that ends with .json is a JWK Set, another one PEM. KNELL_NOTICE_KEY then names the private key where notices
    are signed; KNELL_TRUST names the trust list everywhere. The notifier's key needs the causes expired and missed for
    every issuer; one for `knell revoke` needs revoked. A key that signs tokens only needs no --trust.
    """
    if trust is None and (iss or cause):
        raise InvalidInput("--iss and --cause say what a trust list lets the key tell; name one with --trust")
    # Without a word about it, a key that is held to some issuers is no notifier's.
    told = cause or ([Cause.REVOKED, Cause.UNDONE] if iss else list(Cause))
    key, made = keyfiles.new_key(
        private, trust, issuers=iss or [ANY_ISSUER], causes=told, algorithm=algorithm, if_missing=if_missing
    )
    there = "" if made else " (was there already)"
    shown = [f"KNELL_NOTICE_KEY={private}{there}", f"KNELL_TRUST={trust}"] if trust else [f"in {private}{there}"]
    output_of(context).answer(
        {"kid": key.kid, "private": str(private), "trust": trust and str(trust), "made": made},
        f"key {key.kid}",
        *shown,
    )


@app.command(name="trust", short_help="Trust somebody else's public key.")
def trust_(
    context: typer.Context,
    public: Annotated[Path, typer.Option("--public", metavar="FILE", help="The public key, in PEM or as a JWK.")],
    trust: TrustFile,
    iss: Annotated[list[str], _issuers("Needed.")],
    cause: Annotated[list[Cause] | None, _causes("revoked and undone")] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="EdDSA, ES256 or RS256. Needed for a PEM, which does not say it."),
    ] = None,
    kid: Annotated[
        str | None, typer.Option(metavar="KID", help="The key's name. Default the JWK's, else its thumbprint.")
    ] = None,
) -> None:
    """Trust somebody else's public key: an issuer that signs its revocations with its token-signing key.

    A key that was retired counts again; one that was revoked does not.
    """
    try:
        text = public.read_text()
    except OSError as error:
        raise InvalidInput(f"{public} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{public} is no text; give the public key in PEM or as a JWK") from None
    told = cause or [Cause.REVOKED, Cause.UNDONE]
    entry = keyfiles.public_entry(text, algorithm=algorithm, kid=kid, issuers=iss, causes=told)
    keyfiles.trust_key(trust, entry)
    document: dict[str, Any] = {
        "kid": entry["kid"],
        "trust": str(trust),
        "iss": entry["iss"],
        "causes": entry["causes"],
    }
    output_of(context).answer(
        document, f"key {entry['kid']} may tell {', '.join(entry['causes'])} for {', '.join(entry['iss'])}"
    )


app.command(short_help="Let a new key take over, with no gap.")(rotation.rotate)
app.command(short_help="Let a key's signatures count for a while longer only.")(rotation.retire)
app.command(short_help="Let nothing count that a key has signed.")(rotation.revoke)
app.command(name="list", short_help="List keys: who may tell what, who signs, until when.")(rotation.list_)
