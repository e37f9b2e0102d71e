"""What the denylist in Redis says of tokens: under which keys it is asked, and which of the answers refuses a token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knell.revocations import Revocation, Scope, claims_of, named_by
from knell.stores.denied import values_by_claims
from knell.stores.redis_codec import deny_key, deny_key_by_claims, read_names, read_revocation
from knell.tokens import TokenRef


@dataclass(frozen=True, slots=True)
class ClaimNames:
    """Which claims revocations are by, for each issuer; and the mark by which the store knows whether that is all."""

    mark: bytes = b""
    by_issuer: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    @classmethod
    def read(cls, mark: bytes, fields: Iterable[bytes]) -> ClaimNames:
        """Take them from a script's answer."""
        found: dict[str, list[Sequence[str]]] = defaultdict(list)
        for iss, names in map(read_names, fields):
            found[iss].append(names)
        return cls(mark, found)


@dataclass(frozen=True, slots=True)
class Asked:
    """One token, and what the denylist is asked about it.

    Attributes:
        claims: its claims set, as far as it is known.
        predecessor: what names the token that it carries a session on from: what is on these refuses it.
    """

    ref: TokenRef
    claims: Mapping[str, Any]
    predecessor: Sequence[tuple[Scope, str]]

    @classmethod
    def all(
        cls,
        refs: Sequence[TokenRef],
        claims: Sequence[Mapping[str, Any]] | None,
        predecessor: Sequence[tuple[Scope, str]] = (),
    ) -> list[Asked]:
        """Each of some tokens; without their claims sets, with what is tracked of these."""
        known = map(claims_of, refs) if claims is None else claims
        return [cls(ref, its, predecessor) for ref, its in zip(refs, known, strict=True)]

    def deny_keys(self, names: ClaimNames) -> Iterator[bytes]:
        """The keys to look under."""
        for scope, value in self.predecessor:
            yield deny_key(scope, self.ref.iss, value)
        for scope, value in named_by(self.ref):
            yield deny_key(scope, self.ref.iss, value)
        for some in names.by_issuer.get(self.ref.iss, ()):
            for value in values_by_claims(self.claims, [some]):
                yield deny_key_by_claims(self.ref.iss, some, value)

    def depends_on_start(self, denied: Mapping[bytes, Revocation], names: ClaimNames) -> bool:
        """Whether the start of its session, which only the store knows, decides."""
        return self.ref.auth_time is None and any(
            denied[key].issued_before is not None for key in self.deny_keys(names) if key in denied
        )

    def refusal(
        self, started: float | None, denied: Mapping[bytes, Revocation], names: ClaimNames
    ) -> Revocation | None:
        """The revocation that refuses it; None if none does."""
        stolen = [deny_key(scope, self.ref.iss, value) for scope, value in self.predecessor]
        for key in self.deny_keys(names):
            found = denied.get(key)
            if found is not None and (key in stolen or found.refuses(self.ref, started=started, claims=self.claims)):
                return found
        return None


def read_hits(deny_keys: Sequence[bytes], hits: Iterable[tuple[int, bytes]]) -> dict[bytes, Revocation]:
    """What a script found under the keys that it was given."""
    return {deny_keys[number]: read_revocation(packed) for number, packed in hits}


def all_keys(asked: Iterable[Asked], names: ClaimNames) -> list[bytes]:
    """The keys of several tokens, each once."""
    return list(dict.fromkeys(key for each in asked for key in each.deny_keys(names)))
