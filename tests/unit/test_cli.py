"""The `knell` command on the embedded default: what it answers, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from knell import checkup, commands
from knell.cli.revocations import read_match
from knell.errors import InvalidSettings, StoreUnavailable
from knell.keys import COMMAND_TYPE, NOTICE_TYPE, SigningKey, TrustList
from knell.notices import Cause, Receipt, batch_id_of_revocation
from knell.revocations import Scope
from knell.settings import Settings
from knell.store import Parked, Store, open_store
from knell.tokens import TokenRef
from knell.topology import COMMANDS
from tests.commandline import ISS, Knell, park
from tests.deployment import environ_of, until


@pytest.fixture
def place(settings: Callable[..., Settings]) -> Settings:
    """The embedded default, under the test's own folder."""
    return settings()


@pytest.fixture
def knell(place: Settings) -> Knell:
    """The command, with the KNELL_* variables of `place`."""
    return Knell(place)


@pytest.fixture
def store(place: Settings) -> Iterator[Store]:
    place.home.mkdir(parents=True, exist_ok=True)
    opened = open_store(place.store_url, namespace=place.namespace, rules=place.rules)
    yield opened
    opened.close()


# ---- how it answers


def test_help_documents_the_exit_codes(knell: Knell) -> None:
    """`knell --help` lists what each exit code means."""
    result = knell.run("--help")
    assert result.exit_code == 0
    for line in ("  1  a check failed", "  3  the store or the broker", "  4  there is no such"):
        assert line in result.stdout


@pytest.mark.parametrize("arguments", [("nonsense",), ("revoke", "token"), ("revoke", "tokn", "x", "--iss", "i")])
def test_wrong_usage_exits_with_2(knell: Knell, arguments: tuple[str, ...]) -> None:
    """A command line that cannot be read exits with 2, and says so on stderr alone."""
    result = knell.run(*arguments)
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr


def test_an_error_is_one_line_on_stderr(knell: Knell) -> None:
    """An expected error is one line on stderr: no traceback, nothing on stdout."""
    result = knell.run("services", "add", "Not A Name", "--json")
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr.startswith("error: 'Not A Name' is no service name")
    assert result.stderr.count("\n") == 1


def test_a_setting_that_cannot_be_used_exits_with_2(knell: Knell) -> None:
    """A wrong KNELL_* variable is named, with exit code 2."""
    result = knell.run("services", "list", KNELL_STORE_URL="mysql://x")
    assert result.exit_code == 2
    assert "KNELL_STORE_URL has scheme 'mysql'" in result.stderr


def test_a_store_that_is_away_exits_with_3(knell: Knell) -> None:
    """A store that does not answer is exit code 3."""
    result = knell.run("services", "list", KNELL_STORE_URL="redis://127.0.0.1:1/0")
    assert result.exit_code == 3, result.output
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KNELL_STORE_URL", "redis://:hunter2@127.0.0.1:1/0?bogus=1"),
        ("KNELL_STORE_URL", "rediss://:hunter2@127.0.0.1:1/0?ssl_cert_reqs=hunter2"),
        ("KNELL_STORE_URL", "sqlite://u:hunter2@h/db"),
        ("KNELL_DEDUPE_URL", "mysql://u:hunter2@h/db"),
        ("KNELL_BROKER_URL", "amqp://u:hunter2@127.0.0.1:1/v?heartbeat=x"),
        ("KNELL_BROKER_URL", "amqp://u:hunter2@127.0.0.1:1/v;redis://:hunter2@127.0.0.1:1/"),
        ("KNELL_HOME", "{file}"),
        ("KNELL_TRUST", "{folder}"),
        ("KNELL_NOTICE_KEY", "{folder}"),
    ],
)
@pytest.mark.parametrize("arguments", [("services", "add", "shop"), ("revoke", "session", "s1", "--iss", ISS)])
def test_a_setting_that_cannot_be_used_is_one_line(
    knell: Knell, tmp_path: Path, variable: str, value: str, arguments: tuple[str, ...]
) -> None:
    """Whatever a variable holds, the answer is one line that names it, shows no password, and exit code 2."""
    file = tmp_path / "file"
    file.touch()
    result = knell.run(*arguments, **{variable: value.format(file=file, folder=tmp_path)})
    assert result.exit_code == 2, result.output
    assert re.fullmatch(f"error: {variable} .*\n", result.stderr)
    assert "hunter2" not in result.output


@pytest.mark.parametrize(("where", "exit_code"), [("KNELL_HOME", 2), ("KNELL_STORE_URL", 3), ("KNELL_BROKER_URL", 3)])
def test_a_folder_that_cannot_be_made_is_one_line(
    knell: Knell, tmp_path: Path, where: str, exit_code: int, place: Settings
) -> None:
    """Where a key, a store or an embedded broker cannot be made, the path is told without a traceback."""
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    scheme = {"KNELL_HOME": "", "KNELL_STORE_URL": "sqlite:///", "KNELL_BROKER_URL": "knell+sqlite:///"}[where]
    files = {"KNELL_NOTICE_KEY": "", "KNELL_TRUST": ""} if where == "KNELL_HOME" else {}
    arguments = ("revoke", "session", "s1", "--iss", ISS) if where == "KNELL_HOME" else ("services", "add", "shop")
    result = knell.run(*arguments, **files, **{where: f"{scheme}{below / 'knell'}"})
    assert result.exit_code == exit_code, result.output
    assert str(below) in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "\udcff"),
        ("parked", "list", "--after", "\udcff"),
        ("parked", "show", "x\udcff"),
        ("parked", "list", "--limit", "99999999999999999999"),
        ("parked", "list", "--limit", "0"),
    ],
)
def test_an_argument_that_cannot_be_used_is_one_line(knell: Knell, arguments: tuple[str, ...]) -> None:
    """Bytes that are no text, and numbers that no list has, are refused before anything is asked for."""
    result = knell.run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_the_installed_command_logs_nothing_to_stdout(place: Settings) -> None:
    """The command as a process: what the library logs on the way is not on stdout, and an error is no traceback."""
    environ = {**environ_of(place), "KNELL_BROKER_URL": "amqp://127.0.0.1:1//"}
    command = [sys.executable, "-c", "from knell.cli import main; main()", "revoke", "session", "s1", "--iss", ISS]
    done = subprocess.run(
        [*command, "--json"],
        env={**os.environ, **environ, "KNELL_NOTICE_KEY": str(place.home / "none.pem")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: KNELL_NOTICE_KEY")
    assert done.stderr.count("\n") == 1


def test_json_is_taken_before_and_after_the_command(knell: Knell) -> None:
    """--json means the same at the front and at the end."""
    assert json.loads(knell.run("--json", "services", "list").stdout) == {"services": []}
    assert json.loads(knell.run("services", "list", "--json").stdout) == {"services": []}


def test_there_is_no_colour_in_a_pipe(knell: Knell) -> None:
    """Where nobody looks, there are no escape sequences."""
    knell("services", "add", "shop")
    assert "\x1b" not in knell.run("doctor", NO_COLOR="").output


# ---- services and topology


def test_services_are_added_listed_and_removed(knell: Knell, store: Store) -> None:
    """A service is registered once, has a queue, is listed, and can be removed with its queue."""
    assert knell("services", "add", "shop")["added"] is True
    assert knell("services", "add", "shop")["added"] is False
    assert [service.name for service in store.services()] == ["shop"]
    listed = knell("services", "list")["services"]
    assert [(each["name"], each["waiting"], each["missed_since"]) for each in listed] == [("shop", 0, None)]
    knell("services", "remove", "shop", exit_code=2)
    assert knell("services", "remove", "shop", "--yes", "--delete-queue")["queue_deleted"] is True
    assert store.services() == []
    knell("services", "remove", "shop", "--yes", exit_code=4)


def test_services_add_says_what_the_account_may_do(knell: Knell) -> None:
    """Adding a service says which permissions its account on the broker needs."""
    assert knell("services", "add", "shop")["permissions"]


def test_topology_apply_needs_no_policies_when_embedded(knell: Knell) -> None:
    """On the embedded broker, applying the topology is all there is to do, and it can be repeated."""
    knell("services", "add", "shop")
    assert knell("topology", "apply", "--dry-run")["applied"] is False
    for _ in range(2):
        applied = knell("topology", "apply")
        assert applied["applied"] is True
        assert applied["services"] == ["shop"]
        assert applied["policies"] == "not needed"


# ---- revocations


def test_revoke_is_recorded_and_its_status_told(knell: Knell, store: Store) -> None:
    """A revocation is on the denylist and in the notice log; status says who has applied it."""
    knell("services", "add", "shop")
    cut_off = float(int(time.time()) - 3600)
    written = datetime.fromtimestamp(cut_off, UTC).isoformat()
    revoked = knell("revoke", "subject", "alice", "--iss", ISS, "--reason", "left", "--issued-before", written)
    assert revoked["recorded"] == "store"
    assert revoked["published"] is True
    assert revoked["services"]["shop"]["state"] == "waiting"
    kept = store.revocation(revoked["id"])
    assert kept is not None
    assert (kept.value, kept.reason, kept.issued_before) == ("alice", "left", cut_off)
    assert knell("status", revoked["id"], exit_code=1)["services"]["shop"] == {"state": "waiting", "at": None}
    receipt = Receipt(batch_id=batch_id_of_revocation(revoked["id"]), at=store.time(), done=(0,))
    store.receive([("shop", receipt)])
    assert knell("status", revoked["id"])["services"]["shop"]["state"] == "done"


def test_revoke_fails_when_a_service_does_not_answer_in_time(knell: Knell) -> None:
    """A waited-for service that has not applied it in time is exit code 1; the revocation stands."""
    knell("services", "add", "shop")
    arguments = ("revoke", "session", "s1", "--iss", ISS, "--wait-for", "shop", "--timeout-seconds", "0.05")
    revoked = knell(*arguments, exit_code=1)
    assert revoked["created"] is True


def test_revoke_waits_for_a_service(knell: Knell, store: Store) -> None:
    """With --wait-for, the answer comes when the service has applied it, and says when that was."""
    knell("services", "add", "shop")

    def answer() -> None:
        until(lambda: store.status("ticket-8") is not None, what="the revocation is recorded")
        store.receive([("shop", Receipt(batch_id=batch_id_of_revocation("ticket-8"), at=store.time(), done=(0,)))])

    shop = threading.Thread(target=answer)
    shop.start()
    arguments = ("revoke", "session", "s1", "--iss", ISS, "--idempotency-key", "ticket-8")
    revoked = knell(*arguments, "--wait-for", "shop", "--timeout-seconds", "30")
    shop.join()
    assert revoked["services"]["shop"]["state"] == "done"
    assert revoked["services"]["shop"]["at"] is not None


def test_revoke_twice_under_one_key_is_one_revocation(knell: Knell) -> None:
    """The idempotency key is the revocation's id."""
    arguments = ("revoke", "session", "s1", "--iss", ISS, "--idempotency-key", "ticket-7")
    assert knell(*arguments)["created"] is True
    again = knell(*arguments)
    assert (again["id"], again["created"]) == ("ticket-7", False)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("session", "s", "--issued-before", "now"), 2, "is no time"),
        (("session", "s", "--issued-before", "1"), 2, "has no issued_before"),
        (("subject", "a", "--issued-before", "2026-01-01T00:00:00"), 2, "add Z, or an offset"),
        (("subject", ""), 2, "'sub' is empty"),
        (("session", "s", "--wait-for", "nobody"), 4, "no service 'nobody' is registered"),
    ],
)
def test_revoke_refuses_what_cannot_be_recorded(
    knell: Knell, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    """What cannot be recorded is refused with a reason."""
    result = knell.run("revoke", *arguments, "--iss", ISS)
    assert result.exit_code == exit_code
    assert said in result.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("client", "web"), {"client_id": "web"}),
        (("key", "k-1"), {"kid": "k-1"}),
        (("claims", "sub=alice", "client_id=web"), {"sub": "alice", "client_id": "web"}),
        (("issuer",), {"iss": ISS}),
    ],
)
def test_revoke_takes_every_scope_and_undo_takes_it_back(
    knell: Knell, store: Store, arguments: tuple[str, ...], match: dict[str, str]
) -> None:
    """What is wide is revoked, undone and found in the audit log, with who did it and how many it named."""
    assert knell("revoke", *arguments, "--iss", ISS, "--dry-run")["recorded"] == "dry_run"
    made = knell("revoke", *arguments, "--iss", ISS, "--actor", "alice", "--reason", "leaked")
    assert (made["revocation"]["match"], made["tokens"], made["sessions"]) == (match, 0, 0)
    assert knell("undo", made["id"], "--actor", "bob")["created"] is True
    assert store.revocation(made["id"]) is None
    [undone, revoked] = knell("audit")["entries"]
    assert (undone["action"], undone["actor"]) == ("undone", "bob")
    assert (revoked["actor"], revoked["reason"], revoked["counts"]) == ("alice", "leaked", {"tokens": 0, "sessions": 0})
    assert "revoked" in knell.run("audit").stdout
    assert knell.run("undo", "unknown").exit_code == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("claims", "tenant"), "write NAME=VALUE"),
        (("claims", "tenant=acme", "tenant=globex"), "'tenant' is given 2 times"),
        (("client",), "takes one VALUE, its client_id; there are 0"),
        (("client", "a", "b"), "there are 2"),
        (("client", "web", "--confirm", "app"), "it has to be 'web'"),
        (("claims", "department=sales"), "pass confirm='department=sales'"),
    ],
)
def test_revoke_says_what_a_wide_scope_lacks(knell: Knell, arguments: tuple[str, ...], said: str) -> None:
    """Exit code 2, and one line that says what to pass."""
    result = knell.run("revoke", *arguments, "--iss", ISS)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_the_values_of_claims_are_read_as_json_has_them() -> None:
    """Numbers, true and false are such; in quotes, or of any other kind, they are text."""
    values = ["level=3", "beta=true", 'code="3"', "tenant=acme", "ratio=1.5", "note=", "a=b=c"]
    assert read_match(Scope.CLAIMS, values, ISS) == {
        "level": 3,
        "beta": True,
        "code": "3",
        "tenant": "acme",
        "ratio": "1.5",
        "note": "",
        "a": "b=c",
    }


def test_status_of_an_unknown_revocation_exits_with_4(knell: Knell) -> None:
    """There is nothing to tell of a revocation that nobody has made."""
    result = knell.run("status", "nothing")
    assert result.exit_code == 4
    assert not result.stdout


# ---- parked entries


def test_parked_entries_are_listed_and_shown(knell: Knell, place: Settings, store: Store) -> None:
    """Parked entries are listed in pages and shown with their notice."""
    knell("services", "add", "shop")
    park(place, store, 1, 2, 10)
    ids = ["shop/e0-b.1", "shop/e0-b.2", "shop/e0-b.10"]
    page = knell("parked", "list", "--limit", "2")
    assert [each["id"] for each in page["parked"]] == sorted(ids)[:2]
    assert page["more"] is True
    rest = knell("parked", "list", "--service", "shop", "--after", page["parked"][-1]["id"])
    assert [each["id"] for each in rest["parked"]] == sorted(ids)[2:]
    shown = knell("parked", "show", "shop/e0-b.10")
    assert (shown["notice"]["jti"], shown["attempts"]) == ("t10", 8)
    knell("parked", "show", "shop/e0-b.3", exit_code=4)
    knell("parked", "list", "--service", "nobody", exit_code=4)


def test_a_parked_command_shows_what_it_asks_for(knell: Knell, place: Settings, store: Store) -> None:
    """To track or to revoke what, and who signed it; a message that only looks like one is said to be unreadable."""
    key = SigningKey.generate()
    now = store.time()
    refs = [TokenRef(iss=ISS, jti=f"t{n}", exp=now + 60) for n in range(9)]
    jwss = {
        "/1": commands.sign_track(refs, key=key, signer=ISS, audience=place.audience, now=now),
        "/2": key.sign({"do": "revoke", "revocation": {"match": {"sub": "alice\x1b"}}}, typ=COMMAND_TYPE),
        "/3": key.sign({"do": "dance"}, typ=COMMAND_TYPE),
    }
    store.park(
        [Parked(id=id, service="", queue=COMMANDS, error="rejected", at=now, jws=jws) for id, jws in jwss.items()]
    )
    asked = {id: knell("parked", "show", id)["command"] for id in jwss}
    assert (asked["/1"]["do"], asked["/1"]["iss"]) == ("track", ISS)
    assert [each["jti"] for each in asked["/1"]["tokens"]] == [f"t{n}" for n in range(9)]
    assert asked["/2"]["revocation"]["match"] == {"sub": "alice\x1b"}
    assert "neither to track nor to revoke" in asked["/3"]["unreadable"]
    shown = knell.run("parked", "show", "/1").stdout
    assert "and 4 more" in shown
    assert "t8" not in shown
    assert "\x1b" not in knell.run("parked", "show", "/2").stdout
    assert knell("parked", "show", "/1")["notice"] is None


def test_parked_entries_of_one_batch_are_replayed_in_one_message(knell: Knell, place: Settings, store: Store) -> None:
    """A replay publishes once for each batch, and takes what it sent off the list."""
    knell("services", "add", "shop")
    park(place, store, 0, 1, 2)
    ids = ["shop/e0-b.0", "shop/e0-b.1", "shop/e0-b.2"]
    replayed = knell("parked", "replay", *ids[:2])
    [entry] = store.audit()
    assert (entry.action, entry.what, entry.counts) == ("replayed", {"services": ["shop"]}, {"entries": 2})
    assert (replayed["replayed"], replayed["messages"]) == (2, 1)
    assert [each.id for each in store.parked()] == ids[2:]
    assert knell("services", "list")["services"][0]["waiting"] == 1
    assert knell("parked", "replay", "--service", "shop", "--all")["replayed"] == 1
    assert store.parked() == []


def test_what_is_no_notice_cannot_be_replayed(knell: Knell, place: Settings, store: Store) -> None:
    """An entry that is no notice is refused by name, and left out of --all with exit code 1."""
    knell("services", "add", "shop")
    park(place, store, 0)
    ids = ["shop/e0-b.0"]
    store.park(
        [Parked(id="shop/x-1", service="shop", queue="knell.service.shop", error="bad", at=1.0, body=b"\x1b[2J")]
    )
    refused = knell.run("parked", "replay", ids[0], "shop/x-1")
    assert refused.exit_code == 2
    assert "shop/x-1 cannot be replayed: it is no notice" in refused.stderr
    assert len(store.parked()) == 2
    assert "\x1b" not in knell.run("parked", "show", "shop/x-1").stdout
    answer = knell("parked", "replay", "--service", "shop", "--all", exit_code=1)
    assert answer["replayed"] == 1
    assert list(answer["refused"]) == ["shop/x-1"]


def test_a_notice_that_is_too_old_cannot_be_replayed(knell: Knell, place: Settings, store: Store) -> None:
    """What a service would refuse for its age is not sent."""
    knell("services", "add", "shop")
    park(place, store, 0, expires_in=-1.0)
    ids = ["shop/e0-b.0"]
    result = knell.run("parked", "replay", *ids)
    assert result.exit_code == 2
    assert "expired" in result.stderr


def test_parked_entries_are_dropped_only_when_that_is_meant(knell: Knell, place: Settings, store: Store) -> None:
    """Dropping needs --yes where nobody can be asked."""
    park(place, store, 0, 1)
    ids = ["shop/e0-b.0", "shop/e0-b.1"]
    knell("parked", "drop", *ids, exit_code=2)
    knell("parked", "drop", *ids, "shop/none", "--yes", exit_code=4)
    assert len(store.parked()) == 2
    assert knell("parked", "drop", *ids, "--yes") == {"dropped": 2}


# ---- keys


def test_keys_new_makes_a_private_key_and_trusts_it(knell: Knell, tmp_path: Path, place: Settings) -> None:
    """The private key is readable by its owner alone, and the trust list has its public half, as asked for."""
    private, trust = tmp_path / "new" / "key.pem", tmp_path / "new" / "trust.json"
    files = ("--private", str(private), "--trust", str(trust))
    made = knell("keys", "new", *files, "--iss", ISS, "--cause", "revoked")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    key = SigningKey.load(private.read_bytes(), algorithm="EdDSA")
    assert made["kid"] == key.kid
    jws = key.sign({"aud": place.audience, "iat": 1}, typ=NOTICE_TYPE)
    _, trusted = TrustList.load(trust).verify(jws, typ=NOTICE_TYPE, audience=place.audience)
    assert (trusted.issuers, trusted.causes) == (frozenset({ISS}), frozenset({Cause.REVOKED}))
    assert [path.name for path in sorted(trust.parent.iterdir())] == ["key.pem", "trust.json"]


def test_keys_new_never_overwrites(knell: Knell, tmp_path: Path) -> None:
    """A private key that is there stays; with --if-missing that is no error, and it is trusted."""
    private, trust = tmp_path / "key.pem", tmp_path / "trust.json"
    files = ("--private", str(private), "--trust", str(trust))
    kid = knell("keys", "new", *files)["kid"]
    before = private.read_bytes()
    assert knell.run("keys", "new", *files).exit_code == 2
    trust.unlink()
    again = knell("keys", "new", *files, "--if-missing")
    assert (again["kid"], again["made"]) == (kid, False)
    assert private.read_bytes() == before
    assert [key["kid"] for key in json.loads(trust.read_text())["keys"]] == [kid]


def test_keys_new_leaves_nothing_behind_when_the_trust_list_is_broken(knell: Knell, tmp_path: Path) -> None:
    """A trust list that cannot be read is left as it is, and no private key stays."""
    private, trust = tmp_path / "key.pem", tmp_path / "trust.json"
    trust.write_text("nonsense")
    result = knell.run("keys", "new", "--private", str(private), "--trust", str(trust))
    assert result.exit_code == 2
    assert "is no JWK Set" in result.stderr
    assert trust.read_text() == "nonsense"
    assert not private.exists()


def test_keys_trust_adds_the_public_key_of_an_issuer(knell: Knell, tmp_path: Path) -> None:
    """A public key, as a JWK or in PEM, joins those that are trusted already; a private one is refused."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    trust = tmp_path / "trust.json"
    kid = knell("keys", "new", "--private", str(tmp_path / "key.pem"), "--trust", str(trust))["kid"]
    jwk = tmp_path / "jwk.json"
    other = SigningKey.generate()
    jwk.write_text(json.dumps(other.public_jwk()))
    arguments = ("keys", "trust", "--trust", str(trust), "--iss", ISS)
    assert knell(*arguments, "--public", str(jwk))["causes"] == ["revoked", "undone"]
    pem = tmp_path / "public.pem"
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem.write_bytes(public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    knell(*arguments, "--public", str(pem), exit_code=2)
    named = knell(*arguments, "--public", str(pem), "--algorithm", "ES256", "--kid", "es-1")["kid"]
    assert [key["kid"] for key in json.loads(trust.read_text())["keys"]] == [kid, other.kid, named]
    knell(*arguments, "--public", str(tmp_path / "key.pem"), "--algorithm", "EdDSA", exit_code=2)


def test_keys_trust_says_what_a_key_may_tell_by_default(knell: Knell) -> None:
    """The help of --cause is that of the command: an issuer's key may not tell everything."""
    shown = " ".join(knell.run("keys", "trust", "--help").stdout.split())
    assert "Default revoked and undone." in shown
    assert "Default everything" not in shown


# ---- doctor


def checks(document: Any, start: str) -> list[bool]:
    """Whether the checks that begin with `start` are OK."""
    return [each["ok"] for each in document["checks"] if each["what"].startswith(start)]


def test_doctor_is_content_with_a_sound_deployment(knell: Knell, store: Store) -> None:
    """With a service registered and its queue declared, everything is OK."""
    knell("services", "add", "shop")
    knell("topology", "apply")
    assert knell("doctor")["ok"] is True


def test_doctor_names_what_is_wrong(knell: Knell, place: Settings, store: Store) -> None:
    """No service, parked entries, missed notices, an open key file: each has a row with what to do, and exit code 1."""
    found = knell("doctor", exit_code=1)
    assert checks(found, "services: none") == [False]
    knell("services", "add", "shop")
    park(place, store, 0)
    store.mark_missed("shop", store.time() - 60)
    assert place.notice_key is not None
    place.notice_key.chmod(0o644)
    found = knell("doctor", exit_code=1)
    assert checks(found, "parked: 1") == [False]
    assert checks(found, "service shop: notices since") == [False]
    assert checks(found, "notice key: everybody") == [False]
    assert all(each["todo"] for each in found["checks"] if not each["ok"])


def test_doctor_changes_nothing(knell: Knell, place: Settings, tmp_path: Path) -> None:
    """On a default that was never used it says so, and makes no file; in a used one it makes no tables."""
    found = knell("doctor", exit_code=1)
    assert list(tmp_path.iterdir()) == []
    assert checks(found, f"store: nothing is in {place.home / 'store.db'} yet") == [True]
    assert checks(found, f"broker: there is no {place.home / 'broker.db'} yet") == [False]
    assert checks(found, "services: none") == [False]
    knell("services", "add", "shop")
    assert sorted(each.name for each in place.home.iterdir()) == ["broker.db", "store.db"]
    tables = _tables(place)
    assert checks(knell("doctor"), "store: SQLite") == [True]
    assert checks(knell("doctor", exit_code=1, KNELL_NAMESPACE="other"), "services: none") == [False]
    assert _tables(place) == tables
    assert sorted(each.name for each in place.home.iterdir()) == ["broker.db", "store.db"]
    knell("revoke", "session", "s1", "--iss", ISS)
    assert place.trust is not None
    place.trust.unlink()
    assert checks(knell("doctor"), f"keys: {place.trust} is made") == [True]
    assert not place.trust.exists()


def _tables(place: Settings) -> list[str]:
    with closing(sqlite3.connect(place.home / "store.db")) as database:
        return [name for (name,) in database.execute("SELECT name FROM sqlite_master ORDER BY name")]


@pytest.mark.parametrize(
    "error", [InvalidSettings("laid out otherwise"), StoreUnavailable("away"), OSError("not yours")]
)
def test_doctor_goes_on_past_a_store_that_cannot_be_used(
    knell: Knell, store: Store, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Whatever is wrong with the store is a row of its own, and the rows after it are there."""

    def fail(*_: object, **__: object) -> Store:
        raise error

    knell("topology", "apply")
    monkeypatch.setattr(checkup, "open_store", fail)
    found = knell("doctor", exit_code=1)
    assert checks(found, f"store: {error}") == [False]
    assert checks(found, "broker: every exchange and queue is there") == [True]


def test_doctor_sees_a_service_without_a_queue(knell: Knell, store: Store) -> None:
    """A service that is registered and has no queue is not told."""
    knell("topology", "apply")
    store.add_service("shop")
    assert checks(knell("doctor", exit_code=1), "broker: queue knell.service.shop is missing") == [False]


def test_doctor_sees_an_expiry_that_nobody_told(knell: Knell, store: Store) -> None:
    """A second that stays overdue says that no notifier is at work."""
    from knell.tokens import TokenRef

    knell("services", "add", "shop")
    store.track([TokenRef(iss=ISS, jti="t", exp=time.time() - 3600)])
    assert checks(knell("doctor", exit_code=1), "expiries: one is overdue") == [False]


@pytest.mark.parametrize(
    ("variable", "value", "row"),
    [
        ("KNELL_PARTITIONS", "many", "settings: "),
        ("KNELL_STORE_URL", "redis://127.0.0.1:1/0", "store: "),
        ("KNELL_STORE_URL", "redis://127.0.0.1:1/0?bogus=1", "settings: "),
        ("KNELL_STORE_URL", "sqlite:////dev/null/store.db", "store: "),
        ("KNELL_TRUST", "/dev", "settings: "),
        ("KNELL_BROKER_URL", "amqp://127.0.0.1:1//", "broker: "),
    ],
)
def test_doctor_reports_what_cannot_be_reached(knell: Knell, variable: str, value: str, row: str) -> None:
    """Wrong settings, a store or a broker that is away are rows too, never a traceback."""
    assert False in checks(knell("doctor", exit_code=1, **{variable: value}), row)
