"""Commands: what an issuer asks of the notifier when it cannot reach the store. One signed JWS each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jwt
from uuid6 import uuid7

from knell.errors import InvalidInput, MessageRefused
from knell.keys import COMMAND_TYPE, NOTICE_TYPE, SigningKey, TrustedKey
from knell.notices import VERSION, Cause, Notice, NoticeBatch
from knell.revocations import Revocation, Scope
from knell.settings import Rules
from knell.tokens import TokenRef, check_identifier, check_time
from knell.trust import Trust

# What one command carries at most; a larger track_many becomes several.
MAX_TOKENS = 500
# How far the clocks of an issuer and of the store may differ before what it says is a mistake. Generous: the issuer
# had no store to set its clock by.
SKEW_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class TrackCommand:
    """Track these tokens. `id` names the command, so that a copy of it changes nothing."""

    id: str
    refs: tuple[TokenRef, ...]


@dataclass(frozen=True, slots=True)
class RevokeCommand:
    """Record this revocation.

    Attributes:
        id: names the command.
        revocation: what to record.
        notices: its signed notice by what it ends, as "token", "session token": whether a revoked token ends its
            session is known only once the store can be asked, and the notifier cannot sign for the issuer.
        actor: who asked for it, for the audit log.
    """

    id: str
    revocation: Revocation
    notices: Mapping[str, str]
    actor: str | None = None


def sign_track(refs: Sequence[TokenRef], *, key: SigningKey, signer: str, audience: str, now: float) -> str:
    """A signed command to track up to 500 tokens."""
    return _sign({"do": "track", "tokens": [ref.as_json() for ref in refs]}, key, signer, audience, now)


def sign_revoke(
    revocation: Revocation,
    notices: Mapping[str, str],
    *,
    key: SigningKey,
    signer: str,
    audience: str,
    now: float,
    actor: str | None = None,
) -> str:
    """A signed command to record a revocation."""
    asked: dict[str, Any] = {"do": "revoke", "revocation": revocation.as_json(), "notices": dict(notices)}
    if actor is not None:
        asked["actor"] = actor
    return _sign(asked, key, signer, audience, now)


@dataclass(frozen=True, slots=True)
class CommandReader:
    """Checks commands: their signature, whom they are meant for, their age, and whom their signer may speak for.

    Attributes:
        trust: whose commands count.
        audience: the `aud` of this deployment.
        clock: Unix seconds.
        rules: the limits of what a command may ask for; older ones than the retention are refused.
    """

    trust: Trust
    audience: str
    clock: Callable[[], float]
    rules: Rules

    def track(self, jws: str) -> TrackCommand:
        """A command to track; MessageRefused if its signer may not speak for each token's issuer."""
        payload, key = self._verify(jws, "track")
        tokens = payload.get("tokens")
        if not isinstance(tokens, list) or not 0 < len(tokens) <= MAX_TOKENS:
            raise MessageRefused(f"a track command must have 1 to {MAX_TOKENS} tokens")
        try:
            refs = tuple(TokenRef.from_json(token) for token in tokens)
        except InvalidInput as error:
            raise MessageRefused(f"a token of the command cannot be tracked: {error}") from None
        for ref in refs:
            if not key.may_track(ref.iss):
                raise MessageRefused(f"the command's key may not speak for {ref.iss!r}")
            self._check_bounds(ref)
        return TrackCommand(_command_id(payload, key), refs)

    def revoke(self, jws: str) -> RevokeCommand:
        """A command to revoke; MessageRefused if its signer may not revoke for that issuer."""
        payload, key = self._verify(jws, "revoke")
        try:
            revocation = Revocation.from_json(payload["revocation"])
            notices = {check_identifier("ends", ends): notice for ends, notice in payload["notices"].items()}
            actor = None if payload.get("actor") is None else check_identifier("actor", payload["actor"])
        except (InvalidInput, KeyError, AttributeError) as error:
            raise MessageRefused(f"not a revoke command: {error!r}") from None
        if not all(isinstance(notice, str) for notice in notices.values()) or ends_key(revocation.ends) not in notices:
            raise MessageRefused("a revoke command must carry the signed notice of what it ends")
        if not key.may_tell(revocation.iss, Cause.REVOKED):
            raise MessageRefused(f"the command's key may not revoke for {revocation.iss!r}")
        latest = self.clock() + SKEW_SECONDS
        if max(revocation.made_at, revocation.issued_before or 0) > latest:
            raise MessageRefused("the revocation is of the future; it would end what has not begun")
        longest = latest + self.rules.max_session_seconds + self._longest_token_seconds
        if revocation.expires_at > longest and revocation.scope is not Scope.KEY:
            raise MessageRefused("the revocation outlives every token that it could refuse")
        for ends, notice in notices.items():
            self._check_notice(notice, ends, revocation)
        return RevokeCommand(_command_id(payload, key), revocation, notices, actor)

    @property
    def _longest_token_seconds(self) -> float:
        return self.rules.max_token_seconds + self.rules.leeway_seconds

    def _check_bounds(self, ref: TokenRef) -> None:
        # As the issuer checks them before it signs: whoever may sign commands is held to the same limits.
        now = self.clock() + SKEW_SECONDS
        if ref.exp > now + self._longest_token_seconds or (ref.iat or 0) > now or (ref.auth_time or 0) > now:
            raise MessageRefused("a token of the command lives longer than tokens may, or is of the future")
        if ref.session_exp is not None and ref.session_exp > now + self.rules.max_session_seconds:
            raise MessageRefused("a session of the command lives longer than sessions may")

    def _check_notice(self, jws: str, ends: str, revocation: Revocation) -> None:
        # It is recorded and sent to every service as it is: it must be what it is said to be.
        payload, key = self.trust.verify(jws, typ=NOTICE_TYPE, audience=self.audience)
        batch = NoticeBatch.from_payload(payload)
        told = Notice.of_revocation(replace(revocation, ends=frozenset(ends.split())))
        if batch.id != told.batch_id or list(batch.entries) != [told]:
            raise MessageRefused("the notice that the command carries does not tell of its revocation")
        if not key.may_tell(told.iss, told.cause):
            raise MessageRefused(f"the key of the command's notice may not revoke for {told.iss!r}")

    def _verify(self, jws: str, do: str) -> tuple[dict[str, Any], TrustedKey]:
        if not isinstance(jws, str):
            raise MessageRefused("the command is no text")
        payload, key = self.trust.verify(jws, typ=COMMAND_TYPE, audience=self.audience)
        if payload.get("v") != VERSION or payload.get("do") != do:
            raise MessageRefused(f"not a {do} command of version {VERSION}")
        try:
            check_identifier("id", payload.get("id"))
            issued_at = check_time("iat", payload.get("iat"))
        except InvalidInput as error:
            raise MessageRefused(str(error)) from None
        now = self.clock()
        if issued_at < now - self.rules.retention_seconds:
            raise MessageRefused(f"the command is older than the retention ({self.rules.retention_seconds:.0f} s)")
        if issued_at > now + SKEW_SECONDS:
            raise MessageRefused(f"the command is of the future ({issued_at - now:.0f} s); check its issuer's clock")
        return payload, key


def is_command(jws: str) -> bool:
    """Whether a text says of itself that it is a command: nobody has checked it."""
    try:
        return jwt.get_unverified_header(jws).get("typ") == COMMAND_TYPE
    except (jwt.InvalidTokenError, ValueError):
        return False


def what_to_do(jws: str) -> str:
    """What a command says that it asks for, "track" or "revoke"; its signature is not checked: the notifier does that.

    Raises:
        MessageRefused: it is none.
    """
    return str(as_said(jws)["do"])


def as_said(jws: str) -> dict[str, Any]:
    """What a command says, for people to look at: `do`, who signed it, when, and the tokens or the revocation.

    Its signature is not checked, nor are its values: the notifier does that.

    Raises:
        MessageRefused: it is none.
    """
    try:
        payload = jwt.decode(jws, options={"verify_signature": False})
    except (jwt.InvalidTokenError, ValueError) as error:
        raise MessageRefused(f"not a signed command: {error}") from None
    asked = payload.get("do")
    if asked not in ("track", "revoke"):
        raise MessageRefused("the command asks neither to track nor to revoke")
    what = "tokens" if asked == "track" else "revocation"
    return {name: payload.get(name) for name in ("do", "iss", "iat", "id", what)}


def ends_key(ends: frozenset[str]) -> str:
    """How `RevokeCommand.notices` names what a notice ends."""
    return " ".join(sorted(ends))


def _command_id(payload: Mapping[str, Any], key: TrustedKey) -> str:
    # With the signer: the id of somebody else's command is not to be used up.
    named = f"{key.kid} {payload['id']}"
    return f"c-{hashlib.sha256(named.encode()).hexdigest()}"


def _sign(asked: dict[str, Any], key: SigningKey, signer: str, audience: str, now: float) -> str:
    payload = {"v": VERSION, "iss": signer, "aud": audience, "iat": now, "id": f"c-{uuid7()}"} | asked
    return key.sign(payload, typ=COMMAND_TYPE)
