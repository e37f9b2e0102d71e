"""What somebody with ill will could try, and what must not leak."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from knell import InvalidSettings, Issuer, Notice, Service, Settings, topology
from knell.answers import in_one_line
from knell.cli.output import Output, moment
from knell.errors import InvalidClaims, InvalidRevocation, MessageRefused
from knell.handlers.webhook import Webhook
from knell.keyring import KeyRing
from knell.keys import NOTICE_TYPE, SigningKey, TrustList, make_embedded_keys, trust_entry
from knell.logs import configure
from knell.minting import read_foreign
from knell.notices import Cause, NoticeBatch, batch_id_of_revocation, new_batch_id
from knell.publisher import connect
from knell.redaction import bytes_without_tokens, without_tokens
from knell.revocations import Revocation, Scope, make_revocation
from knell.settings import Rules
from knell.worker import shown
from tests.commandline import Knell
from tests.unit.memory_feed import MemoryFeed
from tests.unit.tokens_for_tests import verifier

MINE, THEIRS = "https://mine.example", "https://theirs.example"
TOKEN = SigningKey.generate().sign({"iss": MINE, "sub": "alice", "jti": "j"}, typ="JWT")
BOTH = frozenset({"token", "session"})


class Shop:
    """A service that trusts the notifier for all, and one key for each of two issuers; it writes down what it ends."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.notifier, self.mine, self.theirs = (SigningKey.generate() for _ in range(3))
        causes = [Cause.EXPIRED, Cause.REVOKED, Cause.UNDONE]
        entries = [
            trust_entry(self.notifier, issuers=["*"], causes=list(Cause)),
            trust_entry(self.mine, issuers=[MINE], causes=causes),
            trust_entry(self.theirs, issuers=[THEIRS], causes=causes),
        ]
        make_embedded_keys(settings)
        assert settings.trust is not None
        settings.trust.write_text(json.dumps({"keys": entries}))
        with connect(settings) as connection:
            topology.declare(connection, ["shop"], settings=settings)
        self.ended: list[str | None] = []
        self.service = Service("shop", settings=settings)
        self.service.on_session_end(lambda notice: self.ended.append(notice.sid))

    def revoked(self, iss: str, sid: str, *, id: str) -> Revocation:
        return make_revocation("session", {"sid": sid}, iss=iss, now=time.time(), rules=Rules(), id=id)

    def tell(self, key: SigningKey, *notices: Notice, batch_id: str | None = None) -> None:
        now = time.time()
        batch = NoticeBatch(id=batch_id or notices[0].batch_id, entries=notices, issued_at=now, expires_at=now + 600)
        payload = batch.as_payload(signer="whoever", audience=self.settings.audience)
        self.service.handle(key.sign(payload, typ=NOTICE_TYPE))


@pytest.fixture
def shop(settings: Callable[..., Settings]) -> Iterator[Shop]:
    shop = Shop(settings())
    yield shop
    shop.service.close()


@pytest.fixture
def logged() -> Iterator[Callable[..., io.StringIO]]:
    """Sets logging up as a process of Knell does, on a stream of the test's own; put back afterwards."""
    root, before, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level
    client = logging.getLogger("httpx").level

    def start(*, terminal: bool) -> io.StringIO:
        class Stream(io.StringIO):
            def isatty(self) -> bool:
                return terminal

        stream = Stream()
        configure(stream=stream)
        return stream

    yield start
    structlog.reset_defaults()
    root.handlers = before
    root.setLevel(level)
    logging.getLogger("httpx").setLevel(client)


# ---- an issuer that is trusted for itself, and wants to touch what is another's


def test_an_issuer_cannot_silence_anothers_revocation_by_using_up_its_id(shop: Shop) -> None:
    """A notice of one's own under the other's batch id marks nothing of the other's as done."""
    theirs = Notice.of_revocation(shop.revoked(THEIRS, "s-theirs", id="log-out-alice"))
    mine = Notice.of_revocation(shop.revoked(MINE, "s-mine", id="log-out-alice"))
    shop.tell(shop.mine, mine)
    shop.tell(shop.theirs, theirs)
    assert shop.ended == ["s-mine", "s-theirs"]
    shop.tell(shop.theirs, theirs)
    assert shop.ended == ["s-mine", "s-theirs"]


def test_an_issuer_cannot_take_back_anothers_revocation(shop: Shop) -> None:
    """`undone` with the other's revocation id is about one's own, whatever it names."""
    theirs = Notice.of_revocation(shop.revoked(THEIRS, "s-theirs", id="r1"))
    undone = replace(
        Notice.of_revocation(shop.revoked(MINE, "s", id="r1")), cause=Cause.UNDONE, batch_id=batch_id_of_revocation("u")
    )
    shop.tell(shop.mine, undone)
    shop.tell(shop.theirs, theirs)
    assert shop.ended == ["s-theirs"]


def test_only_the_notifier_names_records_that_are_no_revocations(shop: Shop) -> None:
    """A record of expiries holds many issuers' tokens: whoever speaks for one of them cannot use up its id."""
    entry = Notice(
        batch_id="", cause=Cause.EXPIRED, ends=BOTH, scope=Scope.TOKEN, at=time.time(), iss=MINE, jti="j", sid="s"
    )
    for kind in ("e", "m"):
        with pytest.raises(MessageRefused, match="not the notifier's"):
            shop.tell(shop.mine, entry, batch_id=new_batch_id(kind))
    with pytest.raises(MessageRefused, match="no id"):
        shop.tell(shop.notifier, entry, batch_id="x-1")
    with pytest.raises(MessageRefused, match="more than one"):
        shop.tell(shop.mine, entry, replace(entry, n=1), batch_id=batch_id_of_revocation("r"))
    shop.tell(shop.notifier, entry, batch_id=new_batch_id("e"))
    assert shop.ended == ["s"]


def test_an_idempotency_key_of_another_issuer_is_an_error_and_never_a_silent_no(
    settings: Callable[..., Settings],
) -> None:
    """Whoever is told nothing believes that the session was revoked."""
    key, shared = SigningKey.generate(), settings()
    with Issuer(MINE, key, settings=shared) as mine, Issuer(THEIRS, key, settings=shared) as theirs:
        assert mine.revoke("session", {"sid": "s"}, idempotency_key="log-out-alice").created
        for scope, match in (("session", {"sid": "s"}), ("token", {"jti": "j"})):
            with pytest.raises(InvalidRevocation, match="another issuer"):
                theirs.revoke(scope, match, idempotency_key="log-out-alice")
        assert not mine.revoke("session", {"sid": "s"}, idempotency_key="log-out-alice").created


def test_a_key_that_is_made_for_one_issuer_is_no_notifiers(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """Without --cause it may tell of revocations, and neither of expiries nor of missed notices."""
    trust = tmp_path / "trust.json"
    Knell(settings())("keys", "new", "--private", str(tmp_path / "key.pem"), "--trust", str(trust), "--iss", MINE)
    assert json.loads(trust.read_text())["keys"][0]["causes"] == ["revoked", "undone"]


def test_a_token_cannot_be_minted_to_look_like_a_notice(settings: Callable[..., Settings]) -> None:
    """Claims may come from anywhere; with a notice's typ, a token of the same key would be one."""
    with Issuer(MINE, SigningKey.generate(), settings=settings()) as issuer:
        for typ in (NOTICE_TYPE, "application/Knell-Command+JWT"):
            with pytest.raises(InvalidClaims, match="typ"):
                issuer.issue({"aud": "a"}, ttl_seconds=60, headers={"typ": typ})
        issuer.issue({"aud": "a"}, ttl_seconds=60, headers={"typ": "at+jwt"})


# ---- what arrives in place of a message


@pytest.mark.parametrize("text", ["\ud800", "\ud800.e30.c2ln", "e30.\udfff.c2ln"])
def test_half_a_character_is_no_message_and_no_token(text: str) -> None:
    """JSON can write it and no text can hold it: it is refused like all else, and stops nobody."""
    with pytest.raises(MessageRefused):
        TrustList([]).verify(text, typ=NOTICE_TYPE, audience="knell:x")
    with pytest.raises(InvalidClaims):
        read_foreign(text, {})


@pytest.mark.parametrize("reason", ["x" * 2000, "\ud800", 7])
def test_a_notices_reason_is_held_to_the_limits_of_a_revocations(reason: Any) -> None:
    """Handlers and the command line write it down."""
    found = {"n": 0, "cause": "revoked", "ends": ["session"], "scope": "session", "at": 1.0, "iss": MINE, "sid": "s"}
    assert Notice.from_json("r-1", found | {"reason": "lost phone"}).reason == "lost phone"
    with pytest.raises(MessageRefused):
        Notice.from_json("r-1", found | {"reason": reason})


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["eyJ", "eyJ.", "ey-", "ew", "e", "a-", ".", "eyJaaaaaaaaaaa.-"])
def test_striking_tokens_out_takes_time_in_proportion_to_the_text(piece: str) -> None:
    """Two megabytes of what almost is a token: a service could otherwise stop the receipts of all."""
    text = piece * (2_000_000 // len(piece))
    assert len(in_one_line(text)) <= 500
    bytes_without_tokens(text.encode())


# ---- what must not be shown


@pytest.mark.parametrize(
    "text",
    [TOKEN, f"Bearer {TOKEN}", f"a={TOKEN}&b", TOKEN.rpartition(".")[0], TOKEN[:40]],
    ids=["whole", "in a header", "in a query", "unsigned", "its beginning"],
)
def test_a_token_or_half_of_one_is_struck_out(text: str) -> None:
    """Wherever it stands in a text, in bytes, or in what a sender wants to have shown."""
    assert "eyJ" not in without_tokens(text)
    assert b"eyJ" not in bytes_without_tokens(b"\xff\x00" + text.encode())
    assert "eyJ" not in shown(text)


def test_words_are_no_tokens() -> None:
    """What stands in names and sentences stays readable."""
    text = "keyed by e.g. eyelashes.example, ewe.farm, services.shop.log_in and 01893a.b-c"
    assert without_tokens(text) == text


def test_white_space_in_the_header_hides_no_token() -> None:
    """`{ "alg"...` and a line end after the brace begin otherwise in base64url."""
    for token in ("eyAiYWxnIjogIkhTMjU2IiB9.eyJzdWIiOiJhIn0.c2ln", "ewogImFsZyI6ICJIUzI1NiIKfQ.eyJzdWIiOiJhIn0.c2ln"):
        assert without_tokens(f"x {token} y") == "x [token] y"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_traceback_in_the_log_shows_no_variable_and_no_token(
    logged: Callable[..., io.StringIO], terminal: bool
) -> None:
    """On a terminal, rich would print the variables of every frame."""
    stream = logged(terminal=terminal)

    def fail(secret: str) -> None:
        raise ValueError(f"401 for {TOKEN}")

    password = "-".join(["hunter2"] * 2)
    try:
        fail(password)
    except ValueError:
        structlog.get_logger("knell").exception("failed", authorization=f"Bearer {TOKEN}")
        logging.getLogger("other").exception("GET /?access_token=%s", TOKEN)
    text = stream.getvalue()
    assert "Traceback" in text
    assert "hunter2-hunter2" not in text
    assert not any(part in text for part in TOKEN.split("."))


async def _post(webhook: Webhook) -> None:
    notice = Notice(batch_id="r-1", cause=Cause.REVOKED, ends=BOTH, scope=Scope.SESSION, at=1.0, iss=MINE, sid="s")
    await webhook(notice)
    await webhook.close()


def test_what_a_library_logs_by_itself_shows_no_variable(capsys: pytest.CaptureFixture[str]) -> None:
    """In an application that sets up no logging, structlog's own defaults write down what a thread of Knell says."""
    structlog.reset_defaults()
    feed = MemoryFeed(clock=time.time)
    with verifier(feed, clock=time.time) as one:
        assert one.wait_ready(20)

        def fail(end: object) -> None:
            password = "hunter2"  # a variable of the frame that fails
            raise ValueError(f"{len(password)} characters for {TOKEN}")

        one.watch({"iss": MINE, "jti": "j", "exp": time.time() + 0.05}, fail)
        told = threading.Event()
        one.watch({"iss": MINE, "jti": "k", "exp": time.time() + 0.1}, lambda end: told.set())
        assert told.wait(20)
    said = "".join(capsys.readouterr())
    assert "watch_callback_failed" in said
    assert "characters for [token]" in said
    assert "hunter2" not in said.replace('password = "hunter2"', "")
    assert TOKEN not in said


def test_the_log_has_no_webhook_url(logged: Callable[..., io.StringIO]) -> None:
    """Its path and its query are often all that a receiver asks for."""
    stream = logged(terminal=False)

    async def empty() -> AsyncIterator[bytes]:
        yield b""

    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=empty()))
    url = "https://user:hunter2@partner.example/hooks/T0P53CR3T?key=s3cr3t"
    asyncio.run(_post(Webhook(url, "whsec_" + "A" * 32, transport=transport)))
    for secret in ("hunter2", "T0P53CR3T", "s3cr3t"):
        assert secret not in stream.getvalue()


def test_no_password_is_in_a_repr() -> None:
    """Neither the settings' URLs nor an HMAC secret: a repr ends up in tracebacks and logs."""
    settings = Settings(
        broker_url="amqp://u:hunter2@h/v", broker_api_url="http://u:hunter2@h:1", store_url="redis://:hunter2@h"
    )
    assert "hunter2" not in repr(settings)
    secret = b"hunter2-hunter2-hunter2-hunter2-hunter2"
    assert "hunter2" not in repr(vars(KeyRing(secret, ["HS256"])))


@pytest.mark.parametrize(
    "changes",
    [
        {"broker_url": "amqp://u:pa/hunter2@h/v"},
        {"broker_url": "amqp://u:12/hunter2@h/v"},
        {"broker_url": "amqp://u:pa;hunter2@h/v"},
        {"broker_url": "amqp://u:12;hunter2@h/v"},
        {"broker_api_url": "http://u:1/hunter2@h:15672"},
        {"store_url": "redis://:a#hunter2@h"},
        {"dedupe_url": "redis://:a?hunter2@h:1"},
    ],
)
def test_a_password_that_breaks_its_url_is_not_shown(changes: dict[str, str]) -> None:
    """Read as a path, it would stand in every error about a connection."""
    with pytest.raises(InvalidSettings, match="%2F") as caught:
        Settings(**{"broker_url": "amqp://h", **changes})  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


def test_urls_that_can_be_read_are_not_refused() -> None:
    """Failover lists, IPv6, sockets, files with an @ in their path, escaped passwords."""
    for changes in (
        {"broker_url": "amqp://a:b%2F%40@h1:5672/v;amqp://a:b@h2/v"},
        {"broker_url": "amqp://guest:guest@127.0.0.1:5672//"},
        {"store_url": "rediss://u:p@[::1]:6379/0"},
        {"store_url": "unix://u:p@/run/redis@1.sock?db=1"},
        {"store_url": "sqlite:////srv/a@b/store.db"},
    ):
        Settings(**{"broker_url": "amqp://h", **changes})  # type: ignore[arg-type]


# ---- what others wrote, on an operator's terminal


def test_a_time_that_no_calendar_has_is_shown_all_the_same() -> None:
    """A service writes the time of its receipts: it must not make `knell status` fail."""
    assert moment(2.0**39) == f"{2**39} s"


@pytest.mark.parametrize("as_json", [True, False])
def test_nothing_that_others_wrote_steers_a_terminal(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither escape sequences, 8-bit ones, nor text that runs backwards; JSON has escapes for all of them."""
    strange = "\x1b[2J \x9b2J \u202e \ud800 é"
    Output(as_json=as_json).answer({"reason": strange}, strange)
    text = capsys.readouterr().out
    assert all(each.isprintable() or each == "\n" for each in text)
    assert "é" in text
    if as_json:
        assert json.loads(text) == {"reason": strange}


# ---- files


def test_keys_are_never_written_into_what_somebody_else_has_put_there(settings: Callable[..., Settings]) -> None:
    """A link where the key is made would send it elsewhere."""
    made = settings()
    made.home.mkdir(parents=True)
    elsewhere = made.home.parent / "elsewhere"
    for name in ("notice-key", "trust"):
        (made.home / f"{name}.{os.getpid()}").symlink_to(elsewhere)
    make_embedded_keys(made)
    assert not elsewhere.exists()
    assert made.notice_key is not None
    assert made.notice_key.stat().st_mode & 0o777 == 0o600


def test_the_embedded_defaults_folder_is_its_owners_alone(settings: Callable[..., Settings]) -> None:
    """It holds a private key, sessions and subjects."""
    made = settings()
    make_embedded_keys(made)
    assert made.home.stat().st_mode & 0o777 == 0o700
