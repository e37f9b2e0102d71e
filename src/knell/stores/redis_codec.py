"""How values are packed for Redis: small, because a token has many of them and there are many tokens.

The scripts read the head of a packed token (see lua/tokens.lua); the rest of it is known here only.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knell.revocations import Revocation, Scope
from knell.store import AuditEntry, Claimed
from knell.stores.denied import names_of
from knell.tokens import TokenRef

_UUID_JTI, _HAS_SID, _UUID_SID, _HAS_EXP, _HAS_START, _REFUSED = 1, 2, 4, 8, 16, 32
_HAS_SUB, _UUID_SUB = 1, 2
# Where the table of strings is full, a string stands at the end of the token itself.
_LITERAL = 65535
_REF_HEAD = struct.Struct(">BHHH5sddd")
_ENDS = {1: frozenset({"token"}), 2: frozenset({"session"}), 3: frozenset({"token", "session"})}
# How a time is written: not at all, as whole seconds or milliseconds from the expiry second, or as a double.
_ABSENT, _SECONDS, _MILLISECONDS, _DOUBLE = 0, 1, 2, 3
_JTI_KIND_BIT, _UUID_BIT = 2, 1


def pack_id(value: str) -> tuple[int, bytes]:
    """An identifier as (1, its 16 bytes) if it is a UUID in canonical form, else as (0, its text in UTF-8)."""
    if len(value) == 36:
        try:
            found = uuid.UUID(value)
        except ValueError:
            return 0, value.encode()
        if str(found) == value:
            return 1, found.bytes
    return 0, value.encode()


def unpack_id(is_uuid: int, packed: bytes) -> str:
    """What `pack_id` packed."""
    return str(uuid.UUID(bytes=packed)) if is_uuid else packed.decode()


def pack_ref(ref: TokenRef, strings: dict[str, int], *, refused: bool = False) -> bytes:
    """A token as the script `track` takes it.

    Args:
        strings: collects the strings that it refers to, numbered from 1.
        refused: the denylist refuses it: it is not to be recorded.
    """

    def number(value: str | None) -> int:
        return 0 if value is None else strings.setdefault(value, len(strings) + 1)

    jti_is_uuid, jti = pack_id(ref.jti)
    sid_is_uuid, sid = (0, b"") if ref.sid is None else pack_id(ref.sid)
    flags = (
        _UUID_JTI * jti_is_uuid
        | _HAS_SID * (ref.sid is not None)
        | _UUID_SID * sid_is_uuid
        | _HAS_EXP * (ref.session_exp is not None)
        | _HAS_START * (ref.started is not None)
        | _REFUSED * refused
    )
    head = _REF_HEAD.pack(
        flags,
        number(ref.iss),
        number(ref.client_id),
        number(ref.kid),
        ref.second.to_bytes(5),
        ref.exp,
        ref.session_exp or 0.0,
        ref.started or 0.0,
    )
    about = b"" if ref.sid is None else _pack_claims((ref.iat,), ref.sub, second=0)
    rest = _pack_claims((ref.exp, ref.iat, ref.auth_time, ref.session_exp), ref.sub, second=ref.second)
    claims = b"" if ref.claims is None else json.dumps(ref.claims, separators=(",", ":")).encode()
    return head + _item(jti) + _item(sid) + _item(about) + _item(rest) + _item(_item(claims) if claims else b"")


def _pack_claims(times: Sequence[float | None], sub: str | None, *, second: int) -> bytes:
    """Up to four times, small if they are near `second`, and a subject."""
    kinds, packed = 0, b""
    for n, value in enumerate(times):
        kind, time = _pack_time(value, second)
        kinds |= kind << 2 * n
        packed += time
    if sub is None:
        return bytes((kinds, 0)) + packed
    is_uuid, id = pack_id(sub)
    return bytes((kinds, _HAS_SUB | _UUID_SUB * is_uuid)) + packed + (id if is_uuid else _varint(len(id)) + id)


def _pack_time(value: float | None, second: int) -> tuple[int, bytes]:
    if value is None:
        return _ABSENT, b""
    if value == math.floor(value):
        return _SECONDS, _varint(_zigzag(int(value) - second))
    milliseconds = round(value * 1000) - second * 1000
    if second + milliseconds / 1000 == value:
        return _MILLISECONDS, _varint(_zigzag(milliseconds))
    return _DOUBLE, struct.pack(">d", value)


def _zigzag(value: int) -> int:
    return value * 2 if value >= 0 else -value * 2 - 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _item(packed: bytes) -> bytes:
    return len(packed).to_bytes(2) + packed


@dataclass(slots=True)
class Reader:
    """Reads a packed value from its start to its end."""

    packed: bytes
    at: int = 0

    @property
    def at_end(self) -> bool:
        """True if nothing is left."""
        return self.at >= len(self.packed)

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        found = self.packed[self.at : self.at + size]
        self.at += size
        return found

    def integer(self, size: int) -> int:
        """An unsigned number of `size` bytes, the highest first."""
        return int.from_bytes(self.take(size))

    def double(self) -> float:
        """A double of 8 bytes."""
        found: float = struct.unpack(">d", self.take(8))[0]
        return found

    def varint(self) -> int:
        """A number of seven bits a byte, the lowest first."""
        found = shift = 0
        while True:
            byte = self.integer(1)
            found |= (byte & 0x7F) << shift
            if byte < 0x80:
                return found
            shift += 7

    def item(self) -> bytes:
        """Bytes with a length of 2 bytes before them."""
        return self.take(self.integer(2))

    def field(self) -> bytes:
        """Bytes with a length of 1 byte before them, or of 3."""
        size = self.integer(1)
        return self.item() if size == 255 else self.take(size)

    def claims(self, count: int, second: int) -> tuple[list[float | None], str | None]:
        """What `_pack_claims` packed: `count` times, and a subject."""
        kinds, flags = self.integer(1), self.integer(1)
        times = [self._time(kinds >> 2 * n & 3, second) for n in range(count)]
        if not flags & _HAS_SUB:
            return times, None
        is_uuid = flags & _UUID_SUB
        return times, unpack_id(is_uuid, self.take(16 if is_uuid else self.varint()))

    def _time(self, kind: int, second: int) -> float | None:
        """What `_pack_time` packed."""
        if kind == _ABSENT:
            return None
        if kind == _DOUBLE:
            return self.double()
        zigzag = self.varint()
        delta = zigzag // 2 if zigzag % 2 == 0 else -(zigzag + 1) // 2
        return float(second + delta) if kind == _SECONDS else second + delta / 1000


def read_strings(packed: bytes) -> dict[int, str]:
    """The table of strings that came with an answer, by their numbers."""
    reader = Reader(packed)
    found = {}
    while not reader.at_end:
        number = reader.integer(4)
        found[number] = reader.item().decode()
    return found


def _read_name(field: bytes) -> tuple[int, str]:
    """The issuer's number, and the jti or sid."""
    reader = Reader(field)
    number = reader.varint()
    return number // 4, unpack_id(number & _UUID_BIT, reader.packed[reader.at :])


def is_session(field: bytes) -> bool:
    """True if a field names a session, False if it names a token."""
    return field[0] & _JTI_KIND_BIT != 0


def read_ref(field: bytes, packed: bytes, strings: Mapping[int, str]) -> TokenRef:
    """A token, from its field and its record."""
    issuer, jti = _read_name(field)
    reader = Reader(packed, at=1)
    second, _life, client, kid = reader.integer(5), reader.integer(2), reader.integer(2), reader.integer(2)
    sid_field = reader.field()
    (exp, iat, auth_time, session_exp), sub = reader.claims(4, second)
    assert exp is not None
    return TokenRef(
        iss=strings[issuer],
        jti=jti,
        exp=exp,
        iat=iat,
        sid=_read_name(sid_field)[1] if sid_field else None,
        sub=sub,
        auth_time=auth_time,
        session_exp=session_exp,
        **_read_rest(reader, client, kid, strings),
    )


def _read_rest(reader: Reader, client: int, kid: int, strings: Mapping[int, str]) -> dict[str, Any]:
    """The client and the key, by their numbers, and the tracked claims, which stand at the end."""

    def string(number: int) -> str | None:
        if number == _LITERAL:
            return reader.item().decode()
        return strings[number] if number else None

    client_id, key_id = string(client), string(kid)
    claims = None if reader.at_end else json.loads(reader.item())
    return {"client_id": client_id, "kid": key_id, "claims": claims}


def is_detached(packed: bytes) -> bool:
    """Whether a token is about to be revoked, from its record."""
    return packed[0] != 0


def read_start(packed: bytes) -> float | None:
    """The start of a session; None if it is not known."""
    return Reader(packed).double() if packed else None


def read_entries(body: bytes) -> tuple[Claimed, ...]:
    """The entries of an expiry record."""
    reader = Reader(body)
    strings = read_strings(reader.take(reader.integer(4)))
    found = []
    while not reader.at_end:
        found.append(_read_entry(Reader(reader.item()), strings))
    return tuple(found)


def _read_entry(reader: Reader, strings: Mapping[int, str]) -> Claimed:
    n, ends, has_start = reader.integer(2), reader.integer(1), reader.integer(1)
    start: float | None = reader.double()
    if not has_start:
        start = None
    field = reader.field()
    if is_session(field):
        issuer, sid = _read_name(field)
        has_exp, ended = reader.integer(1), reader.double()
        client, kid = reader.integer(2), reader.integer(2)
        (iat,), sub = reader.claims(1, 0)
        session_exp = ended if has_exp else None
        rest = _read_rest(reader, client, kid, strings)
        ref = TokenRef(
            iss=strings[issuer], jti="", exp=ended, iat=iat, sid=sid, sub=sub, session_exp=session_exp, **rest
        )
    else:
        ref = read_ref(field, reader.packed[reader.at :], strings)
        start = ref.started if start is None else start
    return Claimed(n=n, ref=ref, ends=_ENDS[ends], started=start)


_DENY_CODES = {
    Scope.TOKEN: b"to",
    Scope.SESSION: b"se",
    Scope.SUBJECT: b"su",
    Scope.CLIENT: b"cl",
    Scope.KEY: b"ke",
    Scope.ISSUER: b"is",
}


def deny_key(scope: Scope, iss: str, value: str) -> bytes:
    """Under what the denylist keeps revocations of one thing; of claims see `deny_key_by_claims`."""
    return _DENY_CODES[scope] + _item(iss.encode()) + value.encode()


def deny_key_by_claims(iss: str, names: Sequence[str], value: str) -> bytes:
    """Under what the denylist keeps revocations by some claims: the scripts read its head, in which the names stand."""
    head = _item(iss.encode()) + _item(json.dumps(list(names)).encode())
    return b"cs" + head + hashlib.blake2b(value.encode(), digest_size=16).digest()


def deny_key_of(revocation: Revocation) -> bytes:
    """The deny key of a revocation."""
    if revocation.scope is Scope.CLAIMS:
        return deny_key_by_claims(revocation.iss, names_of(revocation), revocation.value)
    return deny_key(revocation.scope, revocation.iss, revocation.value)


def read_names(field: bytes) -> tuple[str, list[str]]:
    """An issuer, and the names of claims that revocations of its tokens are by."""
    reader = Reader(field)
    return reader.item().decode(), json.loads(reader.item())


def pack_audit(entry: AuditEntry) -> tuple[str, str, str]:
    """An entry of the audit log as the scripts take it: id, when, the entry."""
    return entry.id, repr(entry.at), json.dumps(entry.as_json(), separators=(",", ":"), ensure_ascii=False)


def pack_revocation(revocation: Revocation) -> str:
    """A revocation as it is stored."""
    return json.dumps(revocation.as_json(), separators=(",", ":"), ensure_ascii=False)


def read_revocation(packed: bytes) -> Revocation:
    """Read what `pack_revocation` wrote."""
    return Revocation.from_json(json.loads(packed))


def pack_bits(numbers: Iterable[int]) -> bytes:
    """A bitmap of entry numbers."""
    bits = 0
    for n in numbers:
        bits |= 1 << n
    return pack_bitmap(bits)


def pack_bitmap(bits: int) -> bytes:
    """A bitmap as bytes, the lowest first."""
    return bits.to_bytes((bits.bit_length() + 7) // 8, "little")


def read_bitmap(packed: bytes) -> int:
    """What `pack_bitmap` packed."""
    return int.from_bytes(packed, "little")


def open_numbers(live: bytes, closed: bytes) -> tuple[int, ...] | None:
    """The entries that are live and not closed; None if that is all of them."""
    alive, shut = read_bitmap(live), read_bitmap(closed)
    if not alive & shut:
        return None
    left = alive & ~shut
    return tuple(n for n in range(left.bit_length()) if left >> n & 1)


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """A hash, from names and values in turn."""
    return dict(zip(flat[::2], flat[1::2], strict=True))
