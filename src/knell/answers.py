"""What a service puts on the broker after a run: one retry at most, what it parks, and a receipt."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from knell import messages
from knell.errors import GiveUp, TryLater
from knell.messages import Message
from knell.notices import Notice, Receipt, describe
from knell.redaction import without_tokens

MAX_ERROR_LENGTH = 500
# RabbitMQ's delays have whole seconds, and a delay below one cannot be asked for.
LEAST_DELAY_SECONDS = 1.0
# What a handler may ask for at most: a notice that waits for ever would never be parked.
LONGEST_ASKED_SECONDS = 3600.0
# 2**40 s is above any limit; it keeps the power of a large attempt number small.
_MOST_DOUBLINGS = 40
_NOT_ONE_LINE = re.compile(r"[\x00-\x20\x7f-\xa0\u2028\u2029\ud800-\udfff]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often an entry is tried, and how long a service waits in between.

    Attributes:
        max_attempts: how often it is tried in all before it is parked.
        first_seconds: the longest wait before the second try; it doubles with each.
        longest_seconds: what the doubling stops at.
        jitter: a number in [0, 1) at each call.
    """

    max_attempts: int
    first_seconds: float
    longest_seconds: float
    jitter: Callable[[], float]

    def delay_seconds(self, attempt: int) -> float:
        """The wait before try number `attempt` (the first retry is 1): anything from 1 s up to the longest now."""
        longest = min(self.longest_seconds, self.first_seconds * 2.0 ** min(attempt - 1, _MOST_DOUBLINGS))
        return max(LEAST_DELAY_SECONDS, self.jitter() * longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """The message that a service was given: what it needs to send it on to itself.

    Attributes:
        service: the service's name.
        jws: the signed notice.
        attempt: how often its entries were tried before.
        root_id: the task id that it goes back to.
    """

    service: str
    jws: str
    attempt: int
    root_id: str | None

    def again(self, notices: Sequence[Notice], *, attempt: int, eta: float, replay: bool = False) -> Message:
        """It again, for these entries alone and this service alone, at `eta` (Unix seconds)."""
        suffix = f", attempt {attempt + 1}" if attempt else ""
        return messages.notice_to(
            self.service,
            self.jws,
            shown=describe(notices) + suffix,
            todo=[notice.n for notice in notices],
            attempt=attempt,
            replay=replay,
            eta=eta,
            root_id=self.root_id,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run comes to: its receipt, and every message that has to be confirmed before the notice is acked."""

    receipt: Receipt
    messages: Sequence[Message]


def answer(
    errand: Errand,
    asked: Sequence[Notice],
    *,
    done: Collection[int],
    parked_before: Collection[int],
    failed: Mapping[int, Exception],
    patience: Patience,
    now: float,
    put_back_at: float,
    in_halves: bool = False,
) -> Answer:
    """Sort the entries of a run into done, parked, retrying, and those that the run did not come to.

    Args:
        asked: the entries of the errand.
        done, parked_before: which of them are done, by now, and which were parked by an earlier run.
        failed: the error of each that failed.
        put_back_at: when entries that are none of these come again, without counting as tried.
        in_halves: let them come in two messages.
    """
    batch_id, tried = asked[0].batch_id, errand.attempt + 1
    last = tried >= patience.max_attempts
    parked = {n: one_line(error) for n, error in failed.items() if last or isinstance(error, GiveUp)}
    again = [notice for notice in asked if notice.n in failed and notice.n not in parked]
    left = [n for n in asked if n.n not in failed and n.n not in done and n.n not in parked_before]
    out: list[Message] = []
    etas: list[float] = []
    asked_for = {n: error.after_seconds for n, error in failed.items() if isinstance(error, TryLater)}
    soon = [notice for notice in again if not asked_for.get(notice.n)]
    late = [notice for notice in again if asked_for.get(notice.n)]
    for part in filter(None, (soon, late)):
        least = min(LONGEST_ASKED_SECONDS, max(asked_for.get(notice.n, 0.0) for notice in part))
        etas.append(now + max(least, patience.delay_seconds(tried)))
        out.append(errand.again(part, attempt=tried, eta=etas[-1]))
    if left:
        etas.append(put_back_at)
        half = len(left) // 2 if in_halves else 0
        parts = [part for part in (left[:half], left[half:]) if part]
        out += [errand.again(part, attempt=errand.attempt, eta=put_back_at) for part in parts]
    if parked:
        out.append(messages.parked(errand.service, errand.jws, parked, attempts=tried))
    receipt = Receipt(
        batch_id=batch_id,
        at=now,
        done=[notice.n for notice in asked if notice.n in done],
        parked=[n.n for n in asked if n.n in parked or (n.n in parked_before and n.n not in done)],
        retrying=[notice.n for notice in (*again, *left)],
        until=max(etas, default=None),
    )
    return Answer(receipt, [*out, messages.receipt(errand.service, receipt)])


def one_line(error: BaseException) -> str:
    """An error's type and text in one line of at most 500 characters, with every token in it struck out."""
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be read)"
    return in_one_line(f"{type(error).__name__}: {text}" if text.strip() else type(error).__name__)


def in_one_line(text: str) -> str:
    """Text in one line of at most 500 characters that any log and store takes, with every token in it struck out."""
    line = _NOT_ONE_LINE.sub(" ", without_tokens(text)).strip()
    return line if len(line) <= MAX_ERROR_LENGTH else line[: MAX_ERROR_LENGTH - 1] + "…"
