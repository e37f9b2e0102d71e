"""Knell tells every service that a token's life has ended, and makes it end the sessions that hung on it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knell.async_issuer import AsyncIssuer
    from knell.errors import (
        BatchFailed,
        BrokerUnavailable,
        ConfirmationNeeded,
        DenylistStale,
        GiveUp,
        InvalidClaims,
        InvalidInput,
        InvalidRevocation,
        InvalidSettings,
        KeptOut,
        KeyRevoked,
        KeysUnavailable,
        KnellError,
        NotDecided,
        SessionEnded,
        SessionRevoked,
        StoreUnavailable,
        TokenExpired,
        TokenInvalid,
        TokenRefused,
        TokenRevoked,
        TryLater,
        Unavailable,
        UnknownService,
    )
    from knell.issuer import Issuer
    from knell.jwks import JwksUrl
    from knell.keyset import KeyFile
    from knell.notices import Cause, Notice
    from knell.results import Issued, Revoked, Tracking, Undone
    from knell.revocations import InitiatingEntity, Revocation, Scope
    from knell.service import Service
    from knell.settings import Rules, Settings
    from knell.tokens import TokenRef
    from knell.verifier import AVAILABLE, STRICT, Policy, TokenEnd, Verifier, Watch

__all__ = [
    # the three faces
    "AsyncIssuer",
    "Issuer",
    "Service",
    "Verifier",
    # what they answer
    "Issued",
    "Revoked",
    "TokenEnd",
    "Tracking",
    "Undone",
    "Watch",
    # keys that change
    "JwksUrl",
    "KeyFile",
    # the words
    "Cause",
    "InitiatingEntity",
    "Notice",
    "Revocation",
    "Scope",
    "TokenRef",
    # settings
    "AVAILABLE",
    "STRICT",
    "Policy",
    "Rules",
    "Settings",
    # errors
    "BatchFailed",
    "BrokerUnavailable",
    "ConfirmationNeeded",
    "DenylistStale",
    "GiveUp",
    "InvalidClaims",
    "InvalidInput",
    "InvalidRevocation",
    "InvalidSettings",
    "KeptOut",
    "KeyRevoked",
    "KeysUnavailable",
    "KnellError",
    "NotDecided",
    "SessionEnded",
    "SessionRevoked",
    "StoreUnavailable",
    "TokenExpired",
    "TokenInvalid",
    "TokenRefused",
    "TokenRevoked",
    "TryLater",
    "Unavailable",
    "UnknownService",
]  # fmt: skip

# Where each public name lives. They are imported when first used, so that a verifier loads no Celery.
_HOMES = {
    "knell.async_issuer": ("AsyncIssuer",),
    "knell.issuer": ("Issuer",),
    "knell.jwks": ("JwksUrl",),
    "knell.keyset": ("KeyFile",),
    "knell.notices": ("Cause", "Notice"),
    "knell.results": ("Issued", "Revoked", "Tracking", "Undone"),
    "knell.revocations": ("InitiatingEntity", "Revocation", "Scope"),
    "knell.service": ("Service",),
    "knell.settings": ("Rules", "Settings"),
    "knell.tokens": ("TokenRef",),
    "knell.verifier": ("AVAILABLE", "STRICT", "Policy", "TokenEnd", "Verifier", "Watch"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'knell' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF.get(name, "knell.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
