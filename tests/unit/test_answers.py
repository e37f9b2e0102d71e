"""What a run comes to: how long it waits before each retry, and what becomes of each entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from knell.answers import Answer, Errand, Patience, answer
from knell.errors import GiveUp, TryLater
from knell.notices import Cause, Notice
from knell.revocations import Scope

NOW = 1_900_000_000.0
BOTH = frozenset({"token", "session"})


def notice(n: int) -> Notice:
    return Notice(batch_id="e0-x", n=n, cause=Cause.EXPIRED, ends=BOTH, scope=Scope.TOKEN, at=NOW, iss="i", jti=f"j{n}")


def patience(jitter: Callable[[], float], **changes: Any) -> Patience:
    given: dict[str, Any] = {"max_attempts": 12, "first_seconds": 2.0, "longest_seconds": 40.0}
    return Patience(**given | changes, jitter=jitter)


def answered(attempt: int, having: Patience, **changes: Any) -> Answer:
    """What is answered when entries 0 to 2 were tried `attempt` times before, and 0 alone has failed once more."""
    errand = Errand(service="shop", jws="a.b.c", attempt=attempt, root_id=None)
    given: dict[str, Any] = {"done": {1, 2}, "parked_before": (), "failed": {0: OSError("away")}}
    given |= {"now": NOW, "put_back_at": NOW + 5}
    return answer(errand, [notice(n) for n in range(3)], patience=having, **given | changes)


def waits(having: Patience, attempts: int) -> list[float]:
    """The wait before each retry, as the message to the service itself says it."""
    found = []
    for attempt in range(attempts):
        eta = answered(attempt, having).messages[0].eta
        assert eta is not None
        found.append(eta - NOW)
    return found


def test_the_wait_doubles_with_each_attempt_up_to_the_longest() -> None:
    """With the jitter held still, the waits are 1, 2, 4 and so on, and then stay where the longest is."""
    assert waits(patience(lambda: 0.5), 8) == [1, 2, 4, 8, 16, 20, 20, 20]
    assert waits(patience(lambda: 0.5, first_seconds=600.0, longest_seconds=600.0), 3) == [300, 300, 300]


def test_two_jitters_give_two_waits() -> None:
    """Services that failed together do not come back together: each wait is drawn anew, from one range."""
    drawn = iter([0.25, 0.75, 0.5])
    having = patience(lambda: next(drawn), first_seconds=32.0)
    assert [answered(0, having).receipt.until for _ in range(3)] == [NOW + 8, NOW + 24, NOW + 16]


@pytest.mark.parametrize("drawn", [0.0, 0.001, 0.49])
def test_no_wait_is_below_a_second(drawn: float) -> None:
    """The broker has whole seconds: whatever is drawn, the first wait is 1 s at least."""
    assert waits(patience(lambda: drawn), 1) == [1.0]
    assert waits(patience(lambda: drawn, first_seconds=0.1), 2) == [1.0, 1.0]


def test_the_receipt_holds_the_sweep_until_the_retry() -> None:
    """What a receipt says of its retry is the time that the retry's message has."""
    found = answered(3, patience(lambda: 0.5))
    assert found.receipt.until == found.messages[0].eta == NOW + 8
    assert (list(found.receipt.done), list(found.receipt.retrying)) == ([1, 2], [0])


def test_what_the_run_did_not_come_to_is_put_back_and_not_counted() -> None:
    """It comes again with the attempts that it had, when the caller says, and the receipt waits for the later one."""
    found = answered(4, patience(lambda: 0.5), done={1})
    retry, put_back, _ = found.messages
    assert (retry.eta, put_back.eta) == (NOW + 16, NOW + 5)
    assert b'"a.b.c",[0],5' in retry.body
    assert b'"a.b.c",[2],4' in put_back.body
    assert (list(found.receipt.retrying), found.receipt.until) == ([0, 2], NOW + 16)
    alone = answered(4, patience(lambda: 0.5), failed={}, done={1}).receipt
    assert (list(alone.retrying), alone.until) == ([0, 2], NOW + 5)


@pytest.mark.parametrize(
    ("asked", "waited"), [(0, 8), (5, 8), (90, 90), (3600, 3600), (86_400, 3600), (float("inf"), 3600), (-9, 8)]
)
def test_a_handler_may_ask_for_a_longer_wait(asked: float, waited: float) -> None:
    """At least what it asks for, within an hour, and never less than the service would wait by itself."""
    found = answered(3, patience(lambda: 0.5), failed={0: TryLater("busy", asked)})
    assert found.messages[0].eta == found.receipt.until == NOW + waited


def test_who_asked_for_a_longer_wait_holds_up_nobody_else() -> None:
    """Those that did not ask come again in a message of their own, and the receipt waits for the later one."""
    failed = {0: TryLater("busy", 60), 1: OSError("away"), 2: TryLater("busy", 90)}
    found = answered(3, patience(lambda: 0.5), failed=failed, done=())
    soon, late, _ = found.messages
    assert (soon.eta, late.eta, found.receipt.until) == (NOW + 8, NOW + 90, NOW + 90)
    assert b'"a.b.c",[1],4' in soon.body
    assert b'"a.b.c",[0,2],4' in late.body


def test_the_last_attempt_parks_and_waits_for_nothing() -> None:
    """After max_attempts tries, or a GiveUp before, there is no retry and no time to wait until."""
    last = answered(11, patience(lambda: 0.5))
    assert (list(last.receipt.parked), last.receipt.until) == ([0], None)
    assert answered(10, patience(lambda: 0.5)).receipt.until is not None
    never = answered(0, patience(lambda: 0.5), failed={0: GiveUp("not here")})
    assert (list(never.receipt.parked), never.receipt.until) == ([0], None)
