"""The gate in front of Celery: what a task message must look like."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery
from hypothesis import given, settings
from hypothesis import strategies as st

from knell import messages
from knell.messages import SWEEP, TERMINATE
from knell.wire import MAX_BODY_BYTES, refusal

ALLOWED = frozenset({TERMINATE})
PROPERTIES = {"content_type": "application/json", "content_encoding": "utf-8"}
HEADERS = {"task": TERMINATE, "id": "6f1d2c1e-2a5b-4b52-9d53-2f2c6f0f9f10"}
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
BODY = json.dumps([["a.b.c", None, 0], {}, EMBED]).encode()


def _body(*args: Any, **embed: Any) -> bytes:
    return json.dumps([list(args), {}, EMBED | embed]).encode()


@pytest.mark.parametrize(
    "message",
    [
        messages.notice("a.b.c", shown="expired 1 token"),
        messages.notice_to("shop", "a.b.c", shown="x", todo=[1], attempt=2, eta=1.8e9, root_id="r"),
        messages.notice_to("shop", "a.b.c", shown="x", replay=True),
    ],
)
def test_what_knell_sends_is_let_through(message: messages.Message) -> None:
    """The messages that Knell's own code makes pass."""
    assert refusal(message.headers, PROPERTIES, message.body, allowed=ALLOWED) is None


def test_what_beat_sends_is_let_through() -> None:
    """The sweep's message is made by Celery itself: it expires, and names somewhere to reply to."""
    app = Celery("beat", set_as_current=False)
    made = app.amqp.as_task_v2("some-id", SWEEP, (), {}, expires=10.0, reply_to="somewhere", root_id="some-id")
    properties = PROPERTIES | made.properties
    body = json.dumps(made.body).encode()
    assert refusal(made.headers, properties, body, allowed={SWEEP}) is None
    assert refusal(made.headers | {"expires": "soon"}, properties, body, allowed={SWEEP})


def test_broker_and_tracing_headers_are_let_through() -> None:
    """Headers that a broker or a tracer adds do not matter."""
    extra = {"x-death": [{"count": 3}], "x-delivery-count": 4, "traceparent": "00-abc", "lang": "py", "origin": "x"}
    assert refusal(HEADERS | extra, PROPERTIES, BODY, allowed=ALLOWED) is None


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b'{"a":1}', "list of three"),
        (b"[]", "list of three"),
        (b"[1,2,3]", "list of three"),
        (b"[[],{},[]]", "list of three"),
        (b"[[],{},{},{}]", "list of three"),
        (b"null", "list of three"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 10_000 + b"]" * 10_000, "nested"),
        (b"[[" + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"],{},{}]", "nested"),
        (b"[[" + b"[" * 20 + b"]" * 20 + b"],{},{}]", "nested"),
        (b"[[NaN],{},{}]", "NaN"),
        (b"[[-Infinity],{},{}]", "Infinity"),
        (b"[[1e999],{},{}]", "not finite"),
        (b"[[" + b"9" * 5000 + b"],{},{}]", "not JSON"),
        (b'[["' + b"x" * (17 * 1024 * 1024) + b'"],{},{}]', str(MAX_BODY_BYTES)),
        (b'[[{"__type__":"datetime","__value__":"x"}],{},{}]', "typed value"),
        (_body(callbacks=[{"task": TERMINATE}]), "callbacks"),
        (_body(errbacks=[{"task": TERMINATE}]), "errbacks"),
        (_body(chain=[{"task": TERMINATE}]), "chain"),
        (_body(chord={"task": TERMINATE}), "chord"),
        (_body(is_eager=True), "unknown option"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_poisoned_body_is_refused(body: bytes, part: str) -> None:
    """A body that Celery would die of, or act upon, is refused with the reason."""
    reason = refusal(HEADERS, PROPERTIES, body, allowed=ALLOWED)
    assert reason is not None
    assert part in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("task", "celery.chord"),
        ("task", "knell.expire"),
        ("task", None),
        ("task", ["knell.terminate"]),
        ("id", None),
        ("id", ""),
        ("id", 7),
        ("id", "x" * 300),
        ("id", "line\nbreak"),
        ("id", "eyJhbGciOiJIUzI1NiJ9.e30.c2ln"),
        ("root_id", "eyJzdWIiOiJhbGljZSJ9"),
        ("root_id", {"a": 1}),
        ("parent_id", "\ud800"),
        ("eta", "tomorrow"),
        ("eta", 17),
        ("eta", "9" * 100),
        ("eta", "9999-12-31T23:59:59-23:59"),
        ("expires", "2020-01-01T00:00:00+00:00"),
        ("timelimit", [0]),
        ("timelimit", [1, 1]),
        ("timelimit", 5),
        ("timelimit", "ab"),
        ("retries", -1),
        ("retries", "many"),
        ("retries", True),
        ("argsrepr", ["x"]),
        ("compression", "application/x-gzip"),
        ("callbacks", [{"task": TERMINATE}]),
        ("chain", [{"task": TERMINATE}]),
        ("group", "g"),
        ("shadow", "another name"),
        ("stamped_headers", ["x"]),
        ("reply_to", "q"),
        ("is_eager", True),
    ],
)
def test_a_header_that_celery_would_act_on_is_refused(header: str, value: Any) -> None:
    """A header may name the task of this queue, and nothing else may be asked of Celery."""
    assert refusal(HEADERS | {header: value}, PROPERTIES, BODY, allowed=ALLOWED)


@pytest.mark.parametrize(
    "change",
    [
        {"content_type": "application/x-python-serialize"},
        {"content_type": None},
        {"content_encoding": "utf-16"},
        {"content_encoding": "binary"},
        {"content_encoding": None},
        {"reply_to": 5},
    ],
)
def test_only_json_in_utf_8_is_let_through(change: dict[str, Any]) -> None:
    """Another serialisation or encoding is refused before anything is decoded."""
    assert refusal(HEADERS, PROPERTIES | change, BODY, allowed=ALLOWED)


def test_a_queue_without_tasks_lets_nothing_through() -> None:
    """What comes through a queue that nobody allowed is refused."""
    assert refusal(HEADERS, PROPERTIES, BODY, allowed=())


def test_the_reason_holds_nothing_of_the_body() -> None:
    """A token in a refused message does not get into the log with the reason."""
    secret = "eyJhbGciOiJFZERTQSJ9.c2VjcmV0.c2ln"
    for body in (json.dumps({"a": secret}).encode(), _body(secret, callbacks=[secret]), secret.encode()):
        assert secret not in str(refusal(HEADERS, PROPERTIES, body, allowed=ALLOWED))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_names = st.sampled_from([*HEADERS, "eta", "timelimit", "retries", "group", "argsrepr", "chain", "x-death"])


@settings(max_examples=300, deadline=None)
@given(
    headers=st.none() | _json | st.dictionaries(_names, _json),
    properties=st.none() | _json | st.just(PROPERTIES),
    body=st.binary(max_size=64) | _json.map(lambda value: json.dumps(value).encode()) | st.text(max_size=32),
    good=st.booleans(),
)
def test_whatever_comes_the_gate_answers(headers: Any, properties: Any, body: Any, good: bool) -> None:
    """For any message at all the answer is a reason or None; it never raises."""
    if good and isinstance(headers, dict):
        headers = {**headers, **HEADERS}
    reason = refusal(headers, properties, body, allowed=ALLOWED)
    assert reason is None or isinstance(reason, str)
