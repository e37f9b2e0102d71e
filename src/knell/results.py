"""What an issuer answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from knell.errors import SessionRevoked
from knell.revocations import Revocation
from knell.store import ServiceStatus
from knell.tokens import TokenRef

Recorded = Literal["store", "queued", "nowhere"]


@dataclass(frozen=True, slots=True)
class Issued:
    """A token that was minted.

    Attributes:
        token: the JWT, in compact form. Knell keeps no copy.
        ref: what Knell keeps of it.
        recorded: "store": its end will be told. "queued": the store was away, the broker has the command. "nowhere":
            both were away, and the policy is to allow; its end will be told to nobody.
    """

    token: str = field(repr=False)
    ref: TokenRef
    recorded: Recorded


@dataclass(frozen=True, slots=True)
class Tracking:
    """A token that somebody else minted, tracked.

    Attributes:
        ref: what Knell keeps of it.
        recorded: as of Issued; None if it was refused.
        refused: SessionRevoked, if it or its session is on the denylist; `track` raises it, `track_many` returns it.
    """

    ref: TokenRef
    recorded: Recorded | None
    refused: SessionRevoked | None = None


@dataclass(frozen=True, slots=True)
class Revoked:
    """What became of a revocation.

    Attributes:
        revocation: what is on the denylist, or will be.
        recorded: "store": verifiers refuse from now on. "queued": the store was away, the broker has the command.
            "dry_run": nothing was changed.
        published: True if the broker has confirmed the notice. If not, the sweep sends it: it is in the notice log.
        created: False if the same idempotency key was used before; the first revocation counts.
        services: how far each service is; empty when queued.
        tokens, sessions: how many live tokens, and sessions of these, it names. None if that was not counted (of a
            wide scope it is), or cannot be known: by claims that are not tracked.
    """

    revocation: Revocation
    recorded: Literal["store", "queued", "dry_run"]
    published: bool
    created: bool
    services: Mapping[str, ServiceStatus] = field(default_factory=dict)
    tokens: int | None = None
    sessions: int | None = None

    @property
    def id(self) -> str:
        """The revocation's id: `knell status` asks by it."""
        return self.revocation.id

    def pending(self, services: Iterable[str]) -> list[str]:
        """Which of these services have not answered yet: neither done nor parked."""
        states = {name: self.services[name].state for name in services if name in self.services}
        return [name for name, state in states.items() if state in ("waiting", "retrying")]


@dataclass(frozen=True, slots=True)
class Undone:
    """What became of an undo.

    Attributes:
        revocation_id: what was taken back: verifiers accept again what it alone refused.
        published: True if the broker has confirmed the notice of it. If not, the sweep sends it.
        created: False if it was undone before.
        untold: the services that had not applied the revocation yet: they do not do so any more.
    """

    revocation_id: str
    published: bool
    created: bool
    untold: tuple[str, ...] = ()


def pauses() -> Iterator[float]:
    """How long to wait between two looks at a revocation, in seconds: 5 ms at first, 100 ms at last."""
    pause = 0.005
    while True:
        yield pause
        pause = min(pause * 1.5, 0.1)
