"""Every process on an account of its own: all of Knell's work is done, and a stolen account does nobody else's."""

from __future__ import annotations

import base64
import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import amqp
import pytest
from amqp.exceptions import AccessRefused
from kombu import Connection
from kombu.transport.native_delayed_delivery import MAX_NUMBER_OF_BITS_TO_USE, level_name

from knell import Issuer, Settings, topology
from knell.connection import connect, queue_depth
from knell.keys import notice_key
from knell.store import open_store
from knell.topology.api import call_api
from knell.topology.plan import queues
from tests.commandline import Knell
from tests.deployment import ROOT, Deployment, on_servers, until
from tests.servers import Process, RabbitServer, free_port

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

ISS = "https://auth.example"
SERVICES = ("shop", "partner", "attic")
REFUSED = re.compile(r"ACCESS_REFUSED|\(403\)|not_authorised|refused for user")


class Accounts:
    """The accounts that `knell topology apply` has made, and the passwords that it has put into a folder."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder

    def url(self, account: str) -> str:
        """The broker's URL for "notifier", "service.shop" and so on."""
        parts = urlsplit(self._settings.broker_url)
        name = f"{self._settings.namespace}.{account}"
        password = (self._folder / name).read_text().strip()
        return f"amqp://{name}:{password}@{parts.hostname}:{parts.port}{parts.path}"

    def settings(self, account: str) -> Settings:
        """What a process on that account has: its URL, and no management API."""
        return replace(self._settings, broker_url=self.url(account), broker_api_url=None)

    def environ(self, account: str) -> dict[str, str]:
        """The same, as variables."""
        return {"KNELL_BROKER_URL": self.url(account), "KNELL_BROKER_API_URL": ""}


def apply(settings: Settings, folder: Path) -> Accounts:
    """What an operator does, as the administrator of the broker."""
    with closing(open_store(settings.store_url, namespace=settings.namespace, rules=settings.rules)) as store:
        for name in SERVICES:
            store.add_service(name)
    applied = Knell(settings)("topology", "apply", "--passwords", str(folder), "--issuer", "auth")
    assert {each["state"] for each in applied["accounts"]} == {"made"}
    assert len(applied["accounts"]) == 5 + len(SERVICES)
    return Accounts(settings, folder)


# ---- the work


@pytest.fixture(scope="module")
def company(
    tmp_path_factory: pytest.TempPathFactory, rabbitmq_server: RabbitServer, broker_url: str, redis_url: str
) -> Iterator[Company]:
    """A notifier with beat, two services, Flower: each on its own account, none with a management API."""
    directory = tmp_path_factory.mktemp("accounts")
    settings = on_servers(directory, rabbitmq_server, broker_url, redis_url, sweep_interval_seconds=1.0)
    accounts = apply(settings, directory / "passwords")
    deployment = Deployment(directory, settings)
    (directory / "trouble").touch()
    company = Company(deployment, accounts)
    starting: list[Callable[[], None]] = [
        lambda: deployment.start_notifier(**accounts.environ("notifier")),
        lambda: deployment.start_service("shop", **accounts.environ("service.shop")),
        lambda: deployment.start_service(
            "partner", options=("--pool=prefork", "--concurrency=1"), **accounts.environ("service.partner")
        ),
        company.start_flower,
    ]
    try:
        with ThreadPoolExecutor(len(starting)) as pool:
            list(pool.map(lambda start: start(), starting))
        yield company
    finally:
        company.flower.stop()
        deployment.stop()


class Company:
    """Processes, each on its own account."""

    def __init__(self, deployment: Deployment, accounts: Accounts) -> None:
        self.deployment = deployment
        self.accounts = accounts
        self._port = free_port()
        self.flower = Process(
            [sys.executable, "-m", "celery", "-A", "tasks", "flower", f"--port={self._port}", "--address=127.0.0.1",
             f"--conf={ROOT / 'flowerconfig.py'}"],
            directory=deployment.directory / "flower",
            environ={**deployment.inherited, **accounts.environ("flower"), "FLOWER_BASIC_AUTH": "operator:secret",
                     "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start_flower(self) -> None:
        self.flower.run(lambda: self.ask("/healthcheck")[0] == 200)

    def ask(self, path: str, *, body: bytes | None = None, login: str | None = "operator:secret") -> tuple[int, str]:
        """What Flower answers; status 0 while it does not."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", data=body)
        if login is not None:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError:
            return 0, ""

    def issuer(self, **changes: Any) -> Issuer:
        """An issuer on the account of the issuer `auth`."""
        settings = replace(self.accounts.settings("issuer.auth"), **changes)
        return Issuer(ISS, notice_key(settings), settings=settings)

    def knell(self) -> Knell:
        """The command on the operator's account."""
        return Knell(self.accounts.settings("operator"))

    def told(self, service: str, **wanted: Any) -> list[dict[str, Any]]:
        return self.deployment.records(service=service, event="session", **wanted)


def test_all_of_the_work_is_done_on_accounts_of_their_own(company: Company, rabbitmq_server: RabbitServer) -> None:
    """Expiry, revocation, delayed retries, parking, replay, commands, the sweep, Flower; and nobody is ever refused."""
    deployment = company.deployment
    with company.issuer() as issuer:
        expiring = issuer.issue({"sub": "u", "sid": "expiring"}, ttl_seconds=4)
        revoked = issuer.revoke("session", {"sid": "revoked"}, wait_for=("shop", "partner"), timeout_seconds=30)
        assert {revoked.services[name].state for name in ("shop", "partner")} == {"done"}
        issuer.revoke("subject", {"sub": "trouble"})
    # The store is away: a signed command, which the notifier carries out.
    with company.issuer(store_url="redis://127.0.0.1:1/0") as cut_off:
        assert cut_off.revoke("session", {"sid": "commanded"}).recorded == "queued"
    for service in ("shop", "partner"):
        until(lambda name=service: company.told(name, sid="commanded"), what=f"{service} has the command's notice")  # type: ignore[misc]
        [told] = until(lambda name=service: company.told(name, jti=expiring.ref.jti), what=f"{service} has the expiry")  # type: ignore[misc]
        assert told["cause"] == "expired"
    # Two retries through the delay ladder, then it is parked, and replayed by the operator.
    [parked] = until(lambda: deployment.store.parked(service="partner"), what="partner gives up")
    assert len(company.told("partner", sub="trouble")) == 3
    (deployment.directory / "trouble").unlink()
    assert company.knell()("parked", "replay", parked.id)["replayed"] == 1
    until(lambda: len(company.told("partner", sub="trouble")) == 4, what="the replay")
    # Nobody runs the attic: its notice was sent once, and stays open until the sweep sends it once more.
    queue = topology.service_queue("attic")
    before = queue_depth(deployment.settings, queue)
    assert before
    deployment.store.resend_at([f"r-{revoked.revocation.id}"], 0)
    until(lambda: queue_depth(deployment.settings, queue) == before + 1, what="the sweep sends it again")
    until(lambda: not deployment.store.due(before=deployment.store.time(), limit=1), what="nothing is overdue")

    def workers() -> bool:
        found = json.loads(company.ask("/api/tasks")[1]).values()
        seen = {each["worker"].partition("@")[0] for each in found if each["state"] == "SUCCESS"}
        return seen >= {"shop", "partner", "notifier"}

    until(workers, what="Flower has seen tasks of each worker")
    assert_nobody_was_refused(company, rabbitmq_server)


def assert_nobody_was_refused(company: Company, rabbitmq_server: RabbitServer) -> None:
    """Neither the processes nor the broker have a word of it."""
    logs = [*company.deployment.directory.glob("*.log"), company.flower.log]
    assert len(logs) == 4
    for log in logs:
        assert REFUSED.findall(log.read_text()) == [], log
    broker = "".join(log.read_text() for log in Path(rabbitmq_server._environ["RABBITMQ_LOG_BASE"]).glob("*.log"))
    ours = [line for line in broker.splitlines() if f"'{company.deployment.settings.namespace}." in line]
    assert any("authenticated" in line for line in ours)
    assert [line for line in ours if REFUSED.search(line)] == []


def test_flower_is_a_window_and_no_door(company: Company) -> None:
    """Without the password nothing is shown; with it, nothing can be started, stopped or revoked."""
    for page in ("/", "/tasks", "/workers", "/broker", "/api/tasks"):
        assert company.ask(page, login=None)[0] == 401
        assert company.ask(page, login="operator:wrong")[0] == 401
    for path in ("/api/worker/shutdown/x@y", "/api/task/async-apply/knell.sweep", "/api/task/revoke/x"):
        assert company.ask(path, body=b"{}")[0] == 403
    for page in ("/workers", "/broker", "/tasks"):
        assert company.ask(page)[0] == 200


# ---- a stolen account

DELAY = "0." * (MAX_NUMBER_OF_BITS_TO_USE - 3) + "1.0.0."
LEVEL = level_name(2)
# Every place that a message can be sent to, and what it would mean there.
PLACES = {
    "a notice": (topology.NOTICES, ""),
    "a timer": (topology.EXPIRY, topology.EXPIRY),
    "a timer, delayed": (LEVEL, DELAY + topology.EXPIRY),
    "a command": (topology.COMMANDS, topology.COMMANDS),
    "a sweep": (topology.SWEEP, topology.SWEEP),
    "a dead letter": (topology.DEAD, ""),
    "an event": (topology.EVENTS, "task.received"),
    "an event of no kind": (topology.EVENTS, "anything"),
    **{f"to {name}": (topology.RETRY, topology.retry_key(name)) for name in ("shop", "partner")},
    **{f"to {name}, delayed": (LEVEL, DELAY + topology.retry_key(name)) for name in ("shop", "partner")},
    **{f"a receipt of {name}": (topology.RECEIPTS, topology.receipt_key(name)) for name in ("shop", "partner")},
    **{f"parked by {name}": (topology.RECEIPTS, topology.parked_key(name)) for name in ("shop", "partner")},
    "to shop, by a longer key": (LEVEL, f"{DELAY}x.{topology.retry_key('shop')}"),
    "to shop, past the ladder": (topology.DELAYED, topology.retry_key("shop")),
    "to shop's queue itself": ("", topology.service_queue("shop")),
    "to the receipts' queue itself": ("", topology.RECEIPTS),
    "a word to workers": ("celery.pidbox", ""),
}
MAY_SEND = {
    "service.shop": {"an event", "to shop", "to shop, delayed", "a receipt of shop", "parked by shop"},
    "issuer.auth": {"a notice", "a timer", "a timer, delayed", "a command"},
    "notifier": {"a notice", "a timer", "a timer, delayed", "a sweep", "an event", "to shop", "to partner"},
    "beat": {"a sweep"},
    "flower": set(),
}
MAY_READ = {
    "service.shop": {topology.service_queue("shop")},
    "issuer.auth": set(),
    "notifier": {topology.EXPIRY, topology.COMMANDS, topology.SWEEP, topology.RECEIPTS, topology.DEAD},
    "beat": set(),
    "flower": set(),
}


@pytest.fixture(scope="module")
def stolen(tmp_path_factory: pytest.TempPathFactory, rabbitmq_server: RabbitServer, redis_url: str) -> Accounts:
    """The accounts of a deployment that has no process, with the rights that the company's have."""
    directory = tmp_path_factory.mktemp("stolen")
    settings = on_servers(directory, rabbitmq_server, rabbitmq_server.vhost(), redis_url)
    return apply(settings, directory / "passwords")


@contextmanager
def channels(stolen: Accounts, account: str) -> Iterator[Callable[[], Any]]:
    """Makes channels of an account: the broker closes one over each refusal."""
    with Connection(stolen.url(account), transport_options={"confirm_publish": True}) as connection:
        yield connection.channel


def is_refused(channel: Any, method: str, *arguments: Any, **named: Any) -> bool:
    """Whether the broker refuses a call; it is over for the channel then."""
    try:
        getattr(channel, method)(*arguments, **named)
    except AccessRefused:
        return True
    except amqp.exceptions.NotFound:
        return False  # the exchange does not exist, and it may write to it
    channel.close()
    return False


def message(**headers: Any) -> Any:
    return amqp.Message(b"{}", application_headers=headers)


@pytest.mark.parametrize("account", MAY_SEND)
def test_a_stolen_account_sends_what_its_process_sends_and_nothing_else(stolen: Accounts, account: str) -> None:
    """Of every place that a message can be sent to, directly, over the delay ladder, or by the default exchange."""
    with channels(stolen, account) as open_channel:
        sent = {
            what
            for what, (exchange, key) in PLACES.items()
            if not is_refused(open_channel(), "basic_publish", message(), exchange, key)
        }
    assert sent == MAY_SEND[account]


@pytest.mark.parametrize("account", MAY_READ)
def test_a_stolen_account_reads_what_its_process_reads_and_nothing_else(stolen: Accounts, account: str) -> None:
    """It can neither fetch, consume nor purge what waits for others, in the delay ladder too."""
    names = [plan.name for plan in queues(("shop", "partner"), Settings().rules)] + [LEVEL]
    with channels(stolen, account) as open_channel:
        for method in ("basic_get", "basic_consume", "queue_purge"):
            read = {name for name in names if not is_refused(open_channel(), method, name)}
            assert read == MAY_READ[account], method


@pytest.mark.parametrize("account", MAY_READ)
def test_a_stolen_account_makes_and_removes_nothing(stolen: Accounts, account: str) -> None:
    """No queue, no exchange, no binding: nothing that would lead messages elsewhere, or away."""
    other = topology.service_queue("partner")
    mine = [(own, exchange) for own in sorted(MAY_READ[account]) for exchange in (topology.NOTICES, topology.RETRY)]
    # The notifier may bind what it reads to what it reads: its queues and their exchanges have the same names.
    mine += [] if account == "notifier" else [(own, topology.RECEIPTS) for own in sorted(MAY_READ[account])]
    calls: list[tuple[Any, ...]] = [
        *(("queue_bind", own, exchange, "#") for own, exchange in mine),
        *(("queue_declare", own) for own in sorted(MAY_READ[account])),
        *(("queue_delete", own) for own in sorted(MAY_READ[account])),
        ("queue_declare", "evil"),
        ("queue_declare", topology.service_queue("nobody")),
        ("queue_delete", other),
        ("queue_delete", LEVEL),
        ("queue_bind", other, topology.DELAYED, "#"),
        ("queue_bind", topology.RECEIPTS, topology.COMMANDS, topology.COMMANDS),
        ("queue_unbind", other, topology.NOTICES, ""),
        ("exchange_declare", "evil", "topic"),
        ("exchange_declare", topology.NOTICES, "fanout"),
        ("exchange_bind", topology.NOTICES, topology.RETRY, "#"),
        ("exchange_bind", topology.RETRY, topology.NOTICES, ""),
        *(("exchange_delete", name) for name in (topology.NOTICES, topology.EVENTS, LEVEL, topology.DEAD)),
    ]
    with channels(stolen, account) as open_channel:
        allowed = [call for call in calls if not is_refused(open_channel(), *call)]
        assert allowed == []
        assert account == "flower" or is_refused(open_channel(), "queue_declare", "", exclusive=True)


def test_flowers_account_has_queues_of_its_own_for_events_alone(stolen: Accounts) -> None:
    """It makes them and binds them to the events; what it reads it can lead nowhere, neither as it dies nor before."""
    mine = f"{topology.EVENTS}.mine"
    with channels(stolen, "flower") as open_channel:
        channel = open_channel()
        channel.queue_declare(mine, exclusive=True)
        channel.queue_bind(mine, topology.EVENTS, "#")
        for exchange in (topology.NOTICES, topology.RECEIPTS, topology.RETRY, topology.DELAYED, "amq.topic"):
            assert is_refused(open_channel(), "queue_bind", mine, exchange, "#")
        for exchange in ("", topology.NOTICES, topology.RETRY, LEVEL):
            died = {"x-dead-letter-exchange": exchange, "x-dead-letter-routing-key": topology.service_queue("shop")}
            assert is_refused(open_channel(), "queue_declare", f"{mine}.dying", arguments=died)
            around = {"alternate-exchange": exchange}
            assert exchange == "" or is_refused(
                open_channel(), "exchange_declare", f"{mine}.around", "topic", arguments=around
            )
        assert is_refused(open_channel(), "exchange_declare", topology.EVENTS, "topic", durable=True, auto_delete=False)
        channel.queue_delete(mine)


@pytest.mark.parametrize("header", ["CC", "BCC"])
def test_a_second_key_in_a_header_is_no_way_to_the_timers(stolen: Accounts, header: str) -> None:
    """What an older broker lets through, a worker does not take: the message shows under which key it was sent."""
    delayed = DELAY.replace("1", "0")
    with channels(stolen, "service.shop") as open_channel:
        forged = amqp.Message(b"forged", application_headers={header: [delayed + topology.EXPIRY]})
        is_refused(open_channel(), "basic_publish", forged, LEVEL, delayed + topology.retry_key("shop"))
    with connect(stolen.settings("notifier")) as connection:
        channel: Any = connection.channel()
        while (found := channel.basic_get(topology.EXPIRY, no_ack=True)) is not None:
            sent = {name: found.delivery_info[name] for name in ("exchange", "routing_key")}
            assert found.body != "forged" or not topology.belongs(topology.EXPIRY, **sent)


def test_what_everybody_may_ask_is_how_much_waits(stolen: Accounts) -> None:
    """RabbitMQ answers a passive declare to whoever may enter the virtual host: how many messages, and no more."""
    with channels(stolen, "beat") as open_channel:
        assert open_channel().queue_declare(topology.service_queue("shop"), passive=True).message_count >= 0
        open_channel().exchange_declare(topology.NOTICES, "fanout", passive=True)


def test_no_account_but_the_operators_is_known_to_the_management_api(
    stolen: Accounts, rabbitmq_server: RabbitServer
) -> None:
    """And his sets policies in Knell's virtual host; he makes no account."""
    vhost = topology.vhost_of(stolen.settings("operator"))

    def api(account: str) -> str:
        login = stolen.url(account).removeprefix("amqp://").rpartition("@")[0]
        return f"http://{login}@{str(rabbitmq_server.api_url).rpartition('@')[2]}"

    for account in MAY_SEND:
        with pytest.raises(topology.ApiRefused):
            call_api(api(account), "GET", f"/api/queues/{vhost}")
    assert topology.apply_policies(api("operator"), vhost) is None
    for method, path in (("GET", "/api/users"), ("PUT", "/api/users/evil"), ("PUT", f"/api/permissions/{vhost}/x")):
        with pytest.raises(topology.ApiRefused):
            call_api(api("operator"), method, path, {"password": "x", "tags": "administrator"})
    his = Knell(replace(stolen.settings("operator"), broker_api_url=api("operator")))
    document = his("topology", "apply")
    assert (document["policies"], document["accounts"]) == ("set", [])
    assert "not looked at" in {row["state"] for row in his("topology", "show")["rows"]}
    refused = his.run("topology", "apply", "--remove", "x")
    assert (refused.exit_code, "take an administrator's account" in refused.stderr) == (3, True)
