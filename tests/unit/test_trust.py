"""The trust list's file, as it changes under a process that runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from knell import InvalidSettings, Settings
from knell.errors import MessageRefused
from knell.keys import ANY_ISSUER, NOTICE_TYPE, SigningKey, trust_entry
from knell.notices import Cause
from knell.trust import TrustFile

OLD, NEW = SigningKey.generate(), SigningKey.generate()


def _write(path: Path, *keys: SigningKey) -> None:
    entries = [trust_entry(key, issuers=[ANY_ISSUER], causes=list(Cause)) for key in keys]
    half = path.with_suffix(".half")
    half.write_text(json.dumps({"keys": entries}))
    half.replace(path)


def _accepted(trust: TrustFile, key: SigningKey) -> bool:
    jws = key.sign({"iss": "x", "aud": "knell:t", "iat": 0}, typ=NOTICE_TYPE)
    try:
        trust.verify(jws, typ=NOTICE_TYPE, audience="knell:t")
    except MessageRefused:
        return False
    return True


def test_a_change_of_the_file_counts_at_once(tmp_path: Path) -> None:
    """A key that is added is trusted, one that is taken out is not, without a restart."""
    path = tmp_path / "trust.json"
    _write(path, OLD)
    trust = TrustFile(Settings(broker_url="amqp://h", trust=path))
    assert (_accepted(trust, OLD), _accepted(trust, NEW)) == (True, False)
    _write(path, OLD, NEW)
    assert (_accepted(trust, OLD), _accepted(trust, NEW)) == (True, True)
    _write(path, NEW)
    assert (_accepted(trust, OLD), _accepted(trust, NEW)) == (False, True)
    assert trust.may_tell(NEW.kid, "any", Cause.REVOKED)


def test_a_file_that_was_closed_and_opened_again_is_read(tmp_path: Path) -> None:
    """What could not be read for want of a right is read once it may be, though nobody has written to it."""
    path = tmp_path / "trust" / "trust.json"
    path.parent.mkdir()
    _write(path, OLD)
    trust = TrustFile(Settings(broker_url="amqp://h", trust=path))
    assert _accepted(trust, OLD)
    _write(path, NEW)
    away = path.parent.rename(tmp_path / "away")
    assert (_accepted(trust, OLD), _accepted(trust, NEW)) == (True, False)
    away.rename(path.parent)
    assert (_accepted(trust, OLD), _accepted(trust, NEW)) == (False, True)


@pytest.mark.parametrize("broken", ["{", None], ids=["half written", "gone"])
def test_a_file_that_cannot_be_read_leaves_the_list_as_it_was(tmp_path: Path, broken: str | None) -> None:
    """A broken file makes no message look forged, and the next good one counts."""
    path = tmp_path / "trust.json"
    _write(path, OLD)
    trust = TrustFile(Settings(broker_url="amqp://h", trust=path))
    assert _accepted(trust, OLD)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
        os.utime(path, ns=(1, 1))
    assert _accepted(trust, OLD)
    _write(path, NEW)
    assert (_accepted(trust, OLD), _accepted(trust, NEW)) == (False, True)


def test_a_file_that_never_could_be_read_is_an_error(tmp_path: Path) -> None:
    """The first use says which file it is."""
    with pytest.raises(InvalidSettings, match="nothing-here"):
        _ = TrustFile(Settings(broker_url="amqp://h", trust=tmp_path / "nothing-here.json")).current
