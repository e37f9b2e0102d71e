"""The table of rights on Redis and the scripts: each script has a row, and each command that it runs stands in it."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from knell.settings import Settings
from knell.stores.redis_accounts import service_account, store_accounts
from knell.stores.redis_link import _PRELUDES, READING_SCRIPTS, WRITING_SCRIPTS
from knell.stores.redis_rights import READS, RIGHTS, ROLES

# Parts of which a script that begins with them uses everything.
WHOLE = ("audit", "missing")
_CALL = re.compile(r"redis\.call\('([A-Z]+)'")


def _commands(script: str) -> set[str]:
    return {found.lower() for found in _CALL.findall((files("knell.stores") / "lua" / f"{script}.lua").read_text())}


def _granted(script: str) -> set[str]:
    return {command for row in RIGHTS[script] for command in row.split()[1:]}


@pytest.mark.parametrize("script", sorted(READING_SCRIPTS | WRITING_SCRIPTS))
def test_a_row_has_what_its_script_runs_and_no_more(script: str) -> None:
    """What stands in a script's own file is granted; what is granted stands there, or in a part that it begins with."""
    keyless = {"time"}
    own = _commands(script).union(*(_commands(part) for part in _PRELUDES[script] if part in WHOLE))
    assert own - keyless <= _granted(script)
    assert _granted(script) <= _commands(script).union(*(_commands(part) for part in _PRELUDES[script]))


@pytest.mark.parametrize("script", sorted(READING_SCRIPTS))
def test_a_script_that_reads_is_granted_nothing_that_writes(script: str) -> None:
    """The server would refuse it in EVALSHA_RO."""
    assert _granted(script) <= READS


def test_every_row_belongs_to_a_role() -> None:
    """A row that nobody has is a call that nobody may make."""
    used = {entry.partition("@")[0] for entries in ROLES.values() for entry in entries}
    assert used == set(RIGHTS)


def test_only_what_the_url_needs_is_granted_beside() -> None:
    """A cluster's clients ask for its slots, those that wait for replicas may wait, and a verifier runs no script."""
    settings = Settings(
        namespace="t", broker_url="amqp://x", store_url="redis+cluster://h?min_replicas=1", partitions=4
    )
    issuer, _, verifier, _ = store_accounts(settings)
    assert {"+cluster|slots", "+wait", "+script|load"} <= set(issuer.rules)
    assert "+cluster|slots" in verifier.rules
    assert not {"+wait", "+script|load", "+select"} & set(verifier.rules)
    assert "evalsha" not in verifier.line
    assert "{t:[0-9]*}:t:*" in issuer.line
    assert "[0-9]" not in service_account(settings, "shop").line
