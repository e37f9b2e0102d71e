"""Whose tokens the services accept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from knell import InvalidSettings, JwksUrl, Settings, Verifier
from knell.keys import notice_key

EMBEDDED_ISSUER = "https://auth.example"


def open_verifier(audience: str, settings: Settings) -> Verifier:
    """A verifier of the issuer's tokens for one audience.

    AUTH_ISSUER is the `iss`, AUTH_PUBLIC_KEY the path of the PEM public key (Ed25519), or AUTH_JWKS_URL where the
    issuer publishes its keys. On the embedded default all may be left out: the issuer is then https://auth.example, and
    its key the one under KNELL_HOME.

    Raises:
        InvalidSettings: the key is not named, or cannot be read.
    """
    issuer = os.environ.get("AUTH_ISSUER") or (EMBEDDED_ISSUER if settings.embedded else None)
    if issuer is None:
        raise InvalidSettings("AUTH_ISSUER is not set; it is the iss of the tokens to accept")
    return Verifier(
        _public_key(settings),
        algorithms=["EdDSA"],
        issuer=issuer,
        audience=audience,
        settings=settings,
        require=("exp", "iat", "jti", "sid", "sub"),
    )


def _public_key(settings: Settings) -> Any:
    if url := os.environ.get("AUTH_JWKS_URL"):
        return JwksUrl(url)
    path = os.environ.get("AUTH_PUBLIC_KEY")
    if path:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise InvalidSettings(f"AUTH_PUBLIC_KEY {path} cannot be read: {error.strerror}") from None
    key = notice_key(settings) if settings.embedded else None
    if key is None:
        raise InvalidSettings("AUTH_PUBLIC_KEY and AUTH_JWKS_URL are not set; one has to say what its keys are")
    return key
