"""What is put on the broker: readable for Celery, free of tokens where people look."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from knell import messages, topology
from knell.notices import Receipt

JWS = "eyJhbGciOiJFZERTQSJ9.c2VjcmV0.c2lnbmF0dXJl"


def arguments(message: messages.Message) -> list[Any]:
    """The task's arguments."""
    found: list[Any] = json.loads(message.body)[0]
    return found


TASKS = {
    "expire": messages.expire(2_000, eta=None),
    "expire at": messages.expire(2_000, eta=1_999.5),
    "track": messages.track_command(JWS, shown="3 tokens"),
    "revoke": messages.revoke_command(JWS, shown="revoked 1 token (user)"),
    "notice": messages.notice(JWS, shown="expired 3"),
    "notice to one": messages.notice_to("shop", JWS, shown="expired 3", todo=[2, 0], attempt=4, root_id="root"),
    "replay": messages.notice_to("shop", JWS, shown="replayed", replay=True, eta=5.0),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_what_celery_s_protocol_asks_for(name: str) -> None:
    """Version 2 of the protocol: a body of three, the task's name and id in the headers, no result wanted."""
    message = TASKS[name]
    positional, named, embedded = json.loads(message.body)
    assert isinstance(positional, list)
    assert named == {}
    assert not any(embedded.values())
    assert message.headers["id"] == message.correlation_id
    assert message.headers["ignore_result"] is True
    assert message.headers["task"].startswith("knell.")


@pytest.mark.parametrize("name", TASKS)
def test_no_signed_text_is_shown(name: str) -> None:
    """Flower and the logs show the headers: they hold a description, never the arguments."""
    shown = json.dumps(dict(TASKS[name].headers))
    assert JWS not in shown
    assert "c2VjcmV0" not in shown


@pytest.mark.parametrize(
    ("name", "task", "exchange", "key"),
    [
        ("expire", messages.EXPIRE, topology.EXPIRY, topology.EXPIRY),
        ("track", messages.TRACK, topology.COMMANDS, topology.COMMANDS),
        ("revoke", messages.REVOKE, topology.COMMANDS, topology.COMMANDS),
        ("notice", messages.TERMINATE, topology.NOTICES, ""),
        ("notice to one", messages.TERMINATE, topology.RETRY, "retry.shop"),
        ("replay", messages.TERMINATE, topology.RETRY, "retry.shop"),
    ],
)
def test_where_each_goes(name: str, task: str, exchange: str, key: str) -> None:
    """Each task has one exchange; what is for one service never goes through the fanout."""
    message = TASKS[name]
    assert (message.headers["task"], message.exchange, message.routing_key) == (task, exchange, key)


def test_the_arguments_of_a_notice() -> None:
    """The JWS, the entries still to do, the attempt, and for a replay that it is one."""
    assert arguments(TASKS["notice"]) == [JWS, None, 0]
    assert arguments(TASKS["notice to one"]) == [JWS, [2, 0], 4]
    assert arguments(TASKS["replay"]) == [JWS, None, 0, True]
    assert TASKS["notice to one"].headers["root_id"] == "root"


def test_an_eta_is_told_twice() -> None:
    """The publisher takes the delay from the message, and Celery the moment from its header, in UTC."""
    message = TASKS["expire at"]
    assert message.eta == 1_999.5
    assert datetime.fromisoformat(message.headers["eta"]).timestamp() == 1_999.5
    assert TASKS["expire"].headers["eta"] is None


def test_each_message_has_an_id_of_its_own() -> None:
    """Two timers of one second are two messages."""
    assert messages.expire(1, eta=None).correlation_id != messages.expire(1, eta=None).correlation_id


def test_a_receipt() -> None:
    """A receipt is no task: nothing dispatches it. The service's name is its routing key."""
    answer = Receipt(batch_id="e0-1", at=5.0, done=(0, 2), retrying=(1,), until=9.0)
    message = messages.receipt("shop", answer)
    assert (message.exchange, message.routing_key, message.headers) == (topology.RECEIPTS, "receipt.shop", {})
    assert Receipt.from_json(json.loads(message.body)) == answer


def test_what_was_parked() -> None:
    """The signed notice goes along, so that it can be replayed, and an error for each entry."""
    message = messages.parked("shop", JWS, {3: "ValueError: no"}, attempts=8)
    assert message.routing_key == "parked.shop"
    assert json.loads(message.body) == {"v": 1, "jws": JWS, "errors": {"3": "ValueError: no"}, "attempts": 8}
