"""`knell topology apply` and a real broker's accounts: made, put right, given new passwords, and nobody locked out."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from amqp.exceptions import AccessRefused, NotAllowed
from kombu import Connection

from knell import topology
from knell.connection import connect
from knell.errors import InvalidInput
from knell.settings import Settings
from knell.topology import Asked, Passwords, apply_accounts
from knell.topology.users import read_users
from tests.commandline import Knell
from tests.servers import RabbitServer

pytestmark = pytest.mark.rabbitmq

EVERYTHING = {"configure": ".*", "write": ".*", "read": ".*"}


class Place:
    """A virtual host and a namespace of a test's own, and a folder for passwords."""

    def __init__(self, settings: Settings, server: RabbitServer, folder: Path) -> None:
        self.settings = settings
        self.server = server
        self.folder = folder
        self.knell = Knell(settings)
        self.vhost = topology.vhost_of(settings)

    def name(self, account: str) -> str:
        return f"{self.settings.namespace}.{account}"

    def password(self, account: str) -> str:
        return (self.folder / self.name(account)).read_text().strip()

    def apply(self, *services: str, passwords: bool = True, **asked: Any) -> dict[str, str]:
        """What became of each account, by its name without the namespace; `asked` as to `Asked`."""
        wanted = Asked(passwords=Passwords(self.folder) if passwords else None, **asked)
        return {
            outcome.account.partition(".")[2]: outcome.state
            for outcome in apply_accounts(self.settings, services, wanted)
        }

    def rights(self, account: str) -> topology.Permissions | None:
        return read_users(self.settings.broker_api_url or "", self.vhost)[self.name(account)].permissions

    def give(self, account: str, rights: dict[str, str]) -> None:
        self.server.api("PUT", f"/api/permissions/{self.vhost}/{self.name(account)}", rights)

    def url(self, account: str, password: str | None = None) -> str:
        parts = urlsplit(self.settings.broker_url)
        login = f"{self.name(account)}:{password or self.password(account)}"
        return f"amqp://{login}@{parts.hostname}:{parts.port}{parts.path}"

    def can_log_in(self, account: str, password: str | None = None) -> bool:
        try:
            with Connection(self.url(account, password)) as connection:
                connection.connect()
        except (AccessRefused, NotAllowed):
            return False
        return True


@pytest.fixture
def place(rabbitmq_server: RabbitServer, settings: Callable[..., Settings], tmp_path: Path) -> Place:
    made = settings(
        broker_url=rabbitmq_server.vhost(),
        broker_api_url=rabbitmq_server.api_url,
        store_url=f"sqlite:///{tmp_path / 'store.db'}",
    )
    return Place(made, rabbitmq_server, tmp_path / "passwords")


def test_an_operator_makes_looks_at_and_puts_right_the_accounts(place: Place) -> None:
    """apply makes them, files alone have the passwords; again it finds nothing to do; show and doctor see a change."""
    knell, folder = place.knell, str(place.folder)
    knell("services", "add", "shop")
    first = knell.run("topology", "apply", "--passwords", folder, "--issuer", "auth")
    assert first.exit_code == 0, first.output
    files = sorted(place.folder.iterdir())
    roles = ("beat", "flower", "issuer.auth", "notifier", "operator", "service.shop")
    assert [file.name for file in files] == [place.name(role) for role in roles]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700
    assert not any(file.read_text().strip() in first.output for file in files)
    assert len({file.read_text() for file in files}) == len(files)
    assert all(place.can_log_in(role) for role in roles)
    before = place.server.api("GET", "/api/users")
    again = knell("topology", "apply", "--passwords", folder)
    assert {each["state"] for each in again["accounts"]} == {"as it was"}
    assert place.server.api("GET", "/api/users") == before
    shown = knell("topology", "show")["rows"]
    assert {each["state"] for each in shown if each["name"] != "guest"} == {"as it should be"}
    assert ("guest", "not planned") in {(each["name"], each["state"]) for each in shown}
    # Somebody means well.
    place.give("service.shop", EVERYTHING)
    [row] = [each for each in knell("topology", "show", exit_code=1)["rows"] if each["state"] == "different"]
    assert (row["name"], "configure '.*'" in row["detail"]) == (place.name("service.shop"), True)
    said = [each["what"] for each in knell("doctor", exit_code=1)["checks"] if not each["ok"]]
    assert any(place.name("service.shop") in each and "'.*'" in each for each in said)
    changed = knell("topology", "apply")["accounts"]
    assert [each["account"] for each in changed if each["state"] == "changed"] == [place.name("service.shop")]
    assert place.rights("service.shop") == topology.permissions("shop")
    checks = knell("doctor", exit_code=1)["checks"]
    assert "accounts: each has the rights that it needs" in [each["what"] for each in checks]


def test_permissions_says_what_each_may_do(place: Place) -> None:
    """For each process, and as commands that rabbitmqctl takes; it asks no broker."""
    place.knell("services", "add", "shop")
    away = {"KNELL_BROKER_URL": "amqp://127.0.0.1:1/v", "KNELL_BROKER_API_URL": ""}
    document = place.knell("topology", "permissions", "--issuer", "auth", **away)
    found = {each["account"].partition(".")[2]: each for each in document["accounts"]}
    assert list(found) == ["notifier", "beat", "flower", "operator", "issuer.auth", "service.shop"]
    assert document["without_account"] == ["verifier"]
    assert found["service.shop"]["read"] == r"^(knell\.service\.shop)$"
    assert found["service.shop"]["topics"][topology.RECEIPTS]["write"] == r"^(receipt\.shop|parked\.shop)$"
    assert [name for name, each in found.items() if each["tags"]] == ["operator"]
    assert "topics of celery_delayed_0 to 27" in place.knell.run("topology", "permissions", **away).stdout
    lines = place.knell.run("topology", "permissions", "--rabbitmqctl", **away).stdout.splitlines()
    assert sum(line.startswith("rabbitmqctl add_user ") for line in lines) == 6
    assert f"rabbitmqctl set_permissions -p v {place.name('beat')} '^$' '^(knell\\.sweep)$' '^$'" in lines


def test_the_account_of_the_management_api_is_left_alone_but_by_name(place: Place) -> None:
    """An administrator who is called like an operator keeps his tag, and so his way in; named, he is what was asked."""
    place.apply()
    place.server.api("PUT", f"/api/users/{place.name('operator')}", {"password": "mine", "tags": "administrator"})
    api_url = f"http://{place.name('operator')}:mine@{str(place.settings.broker_api_url).rpartition('@')[2]}"
    his = Knell(replace(place.settings, broker_api_url=api_url))
    result = his.run("topology", "apply", "--passwords", str(place.folder))
    assert result.exit_code == 1
    assert f"--include {place.name('operator')}" in result.stderr
    assert result.stderr.count("left alone") == 1
    users = read_users(str(place.settings.broker_api_url), place.vhost)
    assert users[place.name("operator")].tags == ("administrator",)
    assert users[place.name("operator")].has_password("mine")
    named = his("topology", "apply", "--passwords", str(place.folder), "--include", place.name("operator"))
    assert {each["account"]: each["state"] for each in named["accounts"]}[place.name("operator")] == "changed"
    assert his.run("topology", "apply", "--passwords", str(place.folder)).exit_code == 3


@pytest.mark.parametrize("account", ["notifier", "service.shop"])
def test_the_account_that_the_notifier_runs_on_is_left_alone_but_by_name(place: Place, account: str) -> None:
    """Whatever KNELL_BROKER_URL names, and the notifier's own: neither its password nor its rights are touched."""
    place.apply("shop")
    old = place.password(account)
    place.settings = replace(place.settings, broker_url=place.url(account))
    place.give(account, EVERYTHING)
    (place.folder / place.name(account)).write_text("another password\n")
    assert place.apply("shop")[account] == "left alone"
    assert place.apply(passwords=False)[account] == "left alone" if account == "notifier" else True
    rights = place.rights(account)
    assert rights is not None
    assert rights.configure == ".*"
    assert place.can_log_in(account, old)
    assert place.apply("shop", include=[place.name(account)])[account] == "changed"
    rights = place.rights(account)
    assert rights is not None
    assert rights.configure == "^$"
    assert place.can_log_in(account, "another%20password")
    assert not place.can_log_in(account, old)


def test_a_removed_service_that_this_command_runs_on_keeps_its_rights(place: Place) -> None:
    """Unless it is named; and nobody loses any while no service at all is registered: the store may be a wrong one."""
    place.apply("shop", "partner")
    place.settings = replace(place.settings, broker_url=place.url("service.shop"))
    assert place.apply("partner")["service.shop"] == "left alone"
    assert place.rights("service.shop") is not None
    place.settings = replace(place.settings, broker_url=place.url("notifier"))
    assert "service.shop" not in place.apply()
    assert place.apply("partner")["service.shop"] == "withdrawn"
    assert place.rights("service.shop") is None
    assert place.apply("partner", remove=[place.name("service.partner")])["service.partner"] == "withdrawn"
    assert not place.can_log_in("service.partner")


def test_no_password_is_overwritten_for_want_of_its_file(place: Place, tmp_path: Path) -> None:
    """On another machine, with an empty folder, the accounts are as they were: whoever runs on them goes on."""
    place.apply("shop")
    before = place.server.api("GET", "/api/users")
    elsewhere = replace(place.settings)
    outcomes = apply_accounts(elsewhere, ["shop"], Asked(passwords=Passwords(tmp_path / "empty")))
    assert {outcome.state for outcome in outcomes} == {"as it was"}
    assert place.server.api("GET", "/api/users") == before
    assert not (tmp_path / "empty").exists()


def test_a_new_password_for_one_account(place: Place) -> None:
    """Its connections go on; the next one needs the new password, which is in its file; the others keep theirs."""
    place.apply("shop", "partner")
    old, others = place.password("service.shop"), place.password("service.partner")
    with connect(place.settings) as admin:
        topology.declare(admin, ["shop", "partner"], settings=place.settings)
    with Connection(place.url("service.shop")) as connection:
        channel: Any = connection.channel()
        rotated = place.apply("shop", "partner", rotate=[place.name("service.shop")])
        assert rotated["service.shop"] == "changed"
        assert place.password("service.shop") != old
        assert place.password("service.partner") == others
        assert channel.basic_get(topology.service_queue("shop")) is None
        assert not place.can_log_in("service.shop", old)
        assert place.can_log_in("service.shop")
    assert {file.name for file in place.folder.iterdir()} & {f"{place.name('service.shop')}.new"} == set()
    assert stat.S_IMODE((place.folder / place.name("service.shop")).stat().st_mode) == 0o600


def test_a_new_password_survives_being_cut_off(place: Place) -> None:
    """Killed before the broker has it, the next try takes the same; killed after, it is found to be in force."""
    place.apply("shop")
    name, passwords = place.name("service.shop"), Passwords(place.folder)
    begun = passwords.begin(name)
    assert place.apply("shop")["service.shop"] == "as it was"
    assert place.can_log_in("service.shop")
    place.apply("shop", rotate=[name])
    assert place.password("service.shop") == begun
    begun = passwords.begin(name)
    place.server.api("PUT", f"/api/users/{name}", {"password": begun, "tags": ""})
    assert place.apply("shop")["service.shop"] == "as it was"
    assert place.password("service.shop") == begun
    assert place.can_log_in("service.shop")


def test_a_given_password_is_used(place: Place) -> None:
    """A file that is there before the account is its password; changed later, the account's is changed."""
    place.folder.mkdir(mode=0o700)
    file = place.folder / place.name("service.shop")
    file.touch(mode=0o600)
    file.write_text("from-the-vault")
    assert place.apply("shop")["service.shop"] == "made"
    assert place.can_log_in("service.shop", "from-the-vault")
    file.write_text("and-another\n")
    assert place.apply("shop")["service.shop"] == "changed"
    assert place.can_log_in("service.shop", "and-another")


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [("secret", 0o644, "chmod o="), ("", 0o600, "no password"), ("two\nlines", 0o600, "no password")],
    ids=["everybody may read it", "empty", "not one line"],
)
def test_a_password_file_that_cannot_be_used_changes_nothing(place: Place, content: str, mode: int, said: str) -> None:
    """It is named, its content is not, and no account was made before."""
    place.folder.mkdir(mode=0o700)
    file = place.folder / place.name("service.shop")
    file.touch()
    file.chmod(mode)
    file.write_text(content)
    with pytest.raises(InvalidInput, match=said) as raised:
        place.apply("shop")
    assert "secret" not in str(raised.value)
    assert not [user for user in place.server.api("GET", "/api/users") if user["name"].startswith(place.name(""))]


def test_an_account_that_another_deployment_uses_is_left_alone(place: Place) -> None:
    """Accounts are the whole broker's: two deployments of one namespace would change each other's passwords."""
    place.apply("shop")
    other = Place(replace(place.settings, broker_url=place.server.vhost()), place.server, place.folder)
    before = place.server.api("GET", "/api/users")
    outcomes = apply_accounts(other.settings, ["shop"], Asked(passwords=Passwords(place.folder)))
    assert {outcome.state for outcome in outcomes} == {"left alone"}
    assert all("KNELL_NAMESPACE" in outcome.why for outcome in outcomes)
    assert place.server.api("GET", "/api/users") == before


def test_a_service_that_goes_loses_its_rights_and_its_connections(place: Place) -> None:
    """At once: what was open is closed, and it comes in no more. The others notice nothing."""
    for name in ("shop", "partner"):
        place.knell("services", "add", name)
    place.knell("topology", "apply", "--passwords", str(place.folder))
    with Connection(place.url("service.shop")) as going, Connection(place.url("service.partner")) as staying:
        channels: list[Any] = [each.channel() for each in (going, staying)]
        removed = place.knell("services", "remove", "shop", "--yes", "--delete-queue")
        assert removed["account_withdrawn"] is True
        with pytest.raises(going.connection_errors):
            channels[0].basic_get(topology.service_queue("shop"))
        assert channels[1].basic_get(topology.service_queue("partner")) is None
        going.collect()
    assert not place.can_log_in("service.shop")
    assert place.rights("service.shop") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--include", "guest"), "'guest' is no account of this deployment"),
        (("--rotate", "x.service.shop"), "is no account of this deployment"),
        (("--remove", "guest"), "the broker has no account 'guest' of this deployment"),
        (("--issuer", "Not A Name"), "is no service name"),
        (("--issuer", "auth", "--without-accounts"), "leaves no account to ask for"),
    ],
)
def test_a_name_that_is_none_of_ours_is_refused(place: Place, words: tuple[str, ...], said: str) -> None:
    """Nothing of somebody else's is touched, whatever is asked for."""
    result = place.knell.run("topology", "apply", *words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "guest" in {user["name"] for user in place.server.api("GET", "/api/users")}


def test_a_new_password_needs_a_place(place: Place) -> None:
    """Without a folder there is nowhere to hand it over."""
    place.apply()
    result = place.knell.run("topology", "apply", "--rotate", place.name("beat"))
    assert result.exit_code == 2
    assert "--passwords names a folder" in result.stderr


def test_accounts_need_a_broker_that_has_some(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """The embedded one has none, and without the management API nobody can make them: one line says what to do."""
    words = ("topology", "apply", "--passwords", str(tmp_path / "p"))
    assert "embedded broker has no accounts" in Knell(settings()).run(*words).stderr
    away = Knell(settings(broker_url="amqp://127.0.0.1:1/v")).run(*words)
    assert (away.exit_code, "--rabbitmqctl" in away.stderr) == (2, True)
