"""A handler that kills its process: the entries beside it are handled, and it is parked by itself."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from knell import Notice, Service, Settings
from knell.keys import NOTICE_TYPE, NOTIFIER, notice_key
from knell.messages import Message
from knell.notices import Cause, NoticeBatch, new_batch_id
from knell.revocations import Scope
from knell.store import Store, open_store
from knell.topology import RECEIPTS

ISS = "https://auth.example"


class Killed(BaseException):
    """The process ends here: what is behind it, the giving back of a lease too, does not happen."""


class Site:
    """A service whose messages are kept, on a store whose clock is moved past every lease."""

    def __init__(self, settings: Settings, clock: Callable[[], float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings = settings
        self.store: Store = open_store(settings.store_url, namespace=settings.namespace, clock=clock)
        self.sent: deque[Message] = deque()
        self.calls: Counter[int] = Counter()
        self.killer: int | None = None
        self.service = Service("shop", settings=settings, max_attempts=3, dedupe="each", lease_seconds=5, clock=clock)
        self.service.on_session_end(self.handle)
        monkeypatch.setattr(type(self.service.resources), "dedupe", property(lambda _: self.store))
        monkeypatch.setattr(type(self.service.resources), "publish", lambda _, messages: self.sent.extend(messages))
        monkeypatch.setattr("knell.marks.Marks.__exit__", _stay_unless_killed)

    def handle(self, notice: Notice) -> None:
        self.calls[notice.n] += 1
        if notice.n == self.killer:
            raise Killed

    def jws(self, count: int) -> str:
        now, batch_id = time.time(), new_batch_id("e")
        entries = [
            Notice(batch_id=batch_id, n=n, cause=Cause.EXPIRED, ends=frozenset({"session"}), scope=Scope.SESSION,
                   at=now, iss=ISS, sid=f"s{n}")
            for n in range(count)
        ]  # fmt: skip
        batch = NoticeBatch(id=batch_id, entries=entries, issued_at=now, expires_at=now + 86_400)
        key = notice_key(self.settings)
        assert key is not None
        return key.sign(batch.as_payload(signer=NOTIFIER, audience=self.settings.audience), typ=NOTICE_TYPE)


_leave = __import__("knell.marks", fromlist=["Marks"]).Marks.__exit__


def _stay_unless_killed(marks: Any, kind: type[BaseException] | None, error: Any, tb: Any) -> None:
    if kind is Killed:
        marks._ended.set()
        marks._thread.join()
    else:
        _leave(marks, kind, error, tb)


@pytest.fixture
def now() -> list[float]:
    return [time.time()]


@pytest.fixture
def site(settings: Callable[..., Settings], now: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(settings(), lambda: now[0], monkeypatch)
    yield site
    site.store.close()


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_the_one_that_kills_is_parked_and_the_others_are_done(site: Site, now: list[float], count: int) -> None:
    """Each is called once, and the killer as often as it may be tried."""
    site.killer = count // 2
    todo: deque[tuple[Any, ...]] = deque([(site.jws(count),)])
    receipts: list[dict[str, Any]] = []
    parked: list[dict[str, Any]] = []
    for _ in range(1000):
        if not todo:
            break
        arguments = todo.popleft()
        try:
            site.service.handle(*arguments)
        except Killed:
            todo.append(arguments)  # never acknowledged, so it is delivered again
        now[0] += 10.0
        while site.sent:
            message = site.sent.popleft()
            body = json.loads(message.body)
            if message.exchange != RECEIPTS:
                todo.append(tuple(body[0]))
            elif message.routing_key.startswith("parked."):
                parked.append(body)
            else:
                receipts.append(body)
    assert not todo
    assert {n for n, calls in site.calls.items() if calls != 1} <= {site.killer}
    assert set(site.calls) == set(range(count))
    [given_up] = parked
    assert list(given_up["errors"]) == [str(site.killer)]
    assert "ProcessDied" in given_up["errors"][str(site.killer)]
    assert {n for receipt in receipts for n in receipt["done"]} == set(range(count)) - {site.killer}
    assert [n for receipt in receipts for n in receipt["parked"]] == [site.killer]
