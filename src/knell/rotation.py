"""Changing keys while processes run: a new key is known before it signs, and an old one after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knell.errors import InvalidInput
from knell.keyfiles import locked, private_entry, read_private, read_trusted, write_keys
from knell.keys import SigningKey
from knell.keyset import SigningKeys
from knell.settings import Rules

# Long enough for every verifier to have fetched the new key (5 min), and for a trust list to be copied by hand.
LEAD_SECONDS = 3600.0
Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a rotation has arranged. Times are Unix seconds.

    Attributes:
        new: the key that takes over.
        signs_from: when it does.
        old: the key that signs until then.
        published_until: until when the old key is in the JWK Set: no token that it signed lives longer.
        trusted_until: until when the notices that the old key has signed count.
    """

    new: SigningKey
    signs_from: float
    old: SigningKey
    published_until: float
    trusted_until: float


def rotate(
    private: Path,
    trust: Path | None,
    *,
    rules: Rules,
    now: float,
    after_seconds: float = LEAD_SECONDS,
    algorithm: str = "EdDSA",
) -> Rotation:
    """Add a new key to a file of private keys, which takes over from the one that signs now.

    Every process that has the file signs with the new key from the same moment on. The old key stays in the file; one
    that was replaced so long ago that no session can be older is taken out.

    Args:
        private: the file. One in PEM becomes a JWK Set that has its key.
        trust: a trust list that has the old key: the new one may tell the same, and the old one is retired.
        rules: how long tokens, sessions and notices live.
        now: Unix seconds.
        after_seconds: when the new key begins to sign. Until then everybody who checks signatures has to know it. While
            a new key waits, a second call only brings its time forward.
        algorithm: of a file in PEM, which does not say it. In a set each key has its own, and its successor has it too.

    Raises:
        InvalidInput: a file cannot be read or written, a rotation is under way, or the trust list does not have the old
            key; nothing was changed.
    """
    with locked(private, trust):
        found, entries = read_private(private, algorithm)
        old, signs_from = found.active(now), round(now + after_seconds, 3)
        plan = Rotation(
            new=_waiting(found, now, signs_from) or SigningKey.generate(old.algorithm),
            signs_from=signs_from,
            old=old,
            published_until=signs_from + rules.max_token_seconds + rules.leeway_seconds,
            trusted_until=signs_from + rules.retention_seconds,
        )
        write_keys(
            None if trust is None else (trust, _succeeded(read_trusted(trust), plan, trust)),
            (private, _with_successor(entries, plan, gone_before=now - rules.max_session_seconds)),
        )
    return plan


def retire(trust: Path, kid: str, *, until: float) -> None:
    """Let what a key has signed count until a time (Unix seconds), and no longer.

    Raises:
        InvalidInput: the list cannot be read or written, or does not have the key; nothing was changed.
    """
    with locked(trust):
        write_keys((trust, _marked(read_trusted(trust), kid, trust, exp=round(until, 3))), None)


def revoke(trust: Path | None, private: Path | None, kid: str, *, reason: str | None, now: float) -> None:
    """Let nothing that a key has signed count any more, in each of these files.

    Raises:
        InvalidInput: a file cannot be read or written or does not have the key, or it is the one that signs; nothing
            was changed.
    """
    mark = {"revoked_at": round(now, 3)} | ({} if reason is None else {"reason": reason})
    with locked(trust, private):
        after_private = None
        if private is not None:
            found, entries = read_private(private)
            if found.active(now).kid == kid:
                todo = f"`knell keys rotate --after 0 --private {private}`"
                raise InvalidInput(f"{kid} is the key that {private} signs with; let another one sign first: {todo}")
            after_private = (private, _marked(entries, kid, private, revoked=mark))
        after_trust = None if trust is None else (trust, _marked(read_trusted(trust), kid, trust, revoked=mark))
        write_keys(after_trust, after_private)


def _waiting(found: SigningKeys, now: float, signs_from: float) -> SigningKey | None:
    """The key that waits to sign, if its time is to be brought forward to `signs_from`."""
    waiting = [each for each in found.keys if each.lives(now) and each.nbf > now]
    if not waiting:
        return None
    last = waiting[-1]
    if signs_from >= last.nbf:
        raise InvalidInput(
            f"a rotation is under way: key {last.key.kid} begins to sign in {last.nbf - now:.0f} s; wait for it, or "
            "bring it forward with a smaller --after"
        )
    return last.key


def _succeeded(keys: Entries, plan: Rotation, trust: Path) -> Entries:
    by_kid = {each["kid"]: each for each in keys}
    if plan.old.kid not in by_kid:
        raise InvalidInput(f"{trust} does not have key {plan.old.kid}, the one that signs now; add it first")
    old = by_kid[plan.old.kid]
    may = {name: old[name] for name in ("iss", "causes")}
    by_kid[plan.old.kid] = {**old, "exp": plan.trusted_until}
    by_kid.setdefault(plan.new.kid, plan.new.public_jwk() | may)
    return list(by_kid.values())


def _with_successor(entries: Entries, plan: Rotation, *, gone_before: float) -> Entries:
    kept = []
    for each in entries:
        ends = min(each.get("exp") or plan.published_until, plan.published_until)
        if each["kid"] != plan.new.kid and ends >= gone_before:
            kept.append({**each, "exp": ends})
    return [*kept, private_entry(plan.new, plan.signs_from)]


def _marked(keys: Entries, kid: str, where: Path, **mark: Any) -> Entries:
    if kid not in {each["kid"] for each in keys}:
        raise InvalidInput(f"{where} has no key {kid!r}; `knell keys list` names those that it has")
    return [{**each, **mark} if each["kid"] == kid else each for each in keys]
