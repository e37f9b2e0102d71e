"""All of Knell in one process: the real issuer, store, notifier, services and verifiers, with nothing in between."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from kombu.message import Message as KombuMessage

from knell import messages, topology
from knell.errors import InvalidInput, Unavailable
from knell.issuer import Issuer
from knell.keys import SigningKey
from knell.notifier import Notifier
from knell.receipts import ReceiptsConsumer
from knell.resources import Resources
from knell.results import Issued, Revoked, Undone
from knell.service import Service
from knell.settings import Rules, Settings
from knell.store import Dedupe, open_store
from knell.testing.clock import Clock
from knell.testing.courier import Courier, Parcel
from knell.testing.recorder import Recorder
from knell.verifier import Policy, Verifier

ISSUER = "https://auth.example"
# A test that is looked at in a debugger takes its time.
PATIENT = Policy("testing", float("inf"))
# More messages than any test needs; fewer than an endless loop of two handlers makes.
MOST_PARCELS = 100_000


class Knell:
    """A deployment for one test. A context manager: leaving it closes everything, and gives services back.

    The parts are the real ones, on a SQLite file; only the broker and its workers are not there: messages wait until
    `run` (or `advance`, `revoke`) calls whoever they are for, in this thread, one after the other. Handlers that are
    `async def` run on an event loop of their own, as in a worker, and are waited for.

    Args:
        home: a folder for the store and the keys.
        iss: the issuer of its tokens.
        rules: lifetimes and limits. Default `Rules()`.
        now: where the clock stands, Unix seconds. Default the present, cut to the second.

    Attributes:
        clock: the clock of all its parts.
        settings: theirs.
        key: signs its tokens (EdDSA).
        issuer, notifier, store, verifier: the parts. The verifier takes tokens without `aud`; see `make_verifier`.
        courier: in the broker's place; `knell.courier.down = True` is a broker that is away.
    """

    def __init__(
        self, home: str | Path, *, iss: str = ISSUER, rules: Rules | None = None, now: float | None = None
    ) -> None:
        # A whole second: a token of 60 s then ends when the clock is moved by 60 s, and not at the next full one.
        self.clock = Clock(math.floor(time.time()) if now is None else now)
        self.settings = Settings(home=Path(home), rules=rules or Rules())
        self.key = SigningKey.generate()
        self._recorders: dict[str, Recorder] = {}
        self._verifiers: list[Verifier] = []
        self._closing = ExitStack()
        self.store = open_store(self.settings.store_url, rules=self.settings.rules, clock=self.clock)
        self.courier = Courier(self.settings, self.clock)
        self.notifier = Notifier(
            self.settings, store=self.store, publisher=self.courier, clock=self.clock, sleep=self.clock.advance
        )
        self._closing.callback(self.notifier.close)  # and the store with it, after everything else
        self._receipts = ReceiptsConsumer(self.settings, self.store, self.notifier.trust)
        self.issuer = Issuer(
            iss, self.key, settings=self.settings, store=self.store, publisher=self.courier, clock=self.clock
        )
        self._closing.callback(self.issuer.close)
        self.verifier = self.make_verifier(None)

    # ---- what a test does

    def issue(self, claims: Mapping[str, Any], *, ttl_seconds: float = 300.0) -> Issued:
        """Mint a token and track it; see `Issuer.issue`."""
        return self.issuer.issue(claims, ttl_seconds=ttl_seconds)

    def revoke(self, scope: str, match: Mapping[str, Any], **options: Any) -> Revoked:
        """Revoke, and deliver what comes of it; see `Issuer.revoke`. `knell.issuer.revoke` delivers nothing yet."""
        revoked = self.issuer.revoke(scope, match, **options)
        self.run()
        return revoked

    def undo(self, revocation_id: str, **options: Any) -> Undone:
        """Take a revocation back, and deliver what comes of it; see `Issuer.undo`."""
        undone = self.issuer.undo(revocation_id, **options)
        self.run()
        return undone

    def advance(self, seconds: float) -> None:
        """Move the clock on, and let everything happen at its own time: ends, deliveries, retries."""
        until = self.clock.now + seconds
        while (moment := self._next(until)) is not None:
            self.clock.reach(moment)
            self.run()
        self.clock.reach(until)
        self.run()

    def run(self) -> int:
        """Tell what has ended by now, and deliver what is due, until nothing is. Returns how many messages it was."""
        delivered = 0
        while True:
            for second in self.store.due(before=self.clock.now):
                self.notifier.expire(second)
            parcel = self.courier.take()
            if parcel is None:
                break
            self._deliver(parcel)
            delivered += 1
            if delivered > MOST_PARCELS:
                raise RuntimeError(f"{delivered} messages, and still more: do handlers revoke what they are told of?")
        for verifier in self._verifiers:
            verifier.catch_up()
        return delivered

    def record(self, service: Service | str) -> Recorder:
        """Let a service take part, and record its handlers.

        Args:
            service: one of yours, with its handlers registered; until this is closed it works on these settings. Or
                the name of a new one, which does nothing; of that every event is recorded.

        Raises:
            InvalidInput: a service of that name takes part already.
        """
        only_name = isinstance(service, str)
        if isinstance(service, str):
            service = Service(service, settings=self.settings)
        if service.name in self._recorders:
            raise InvalidInput(f"a service {service.name!r} takes part already; make another Knell, or another name")
        recorder = Recorder(service, self.store, self.clock, everything=only_name)
        resources = _InProcess(self)
        self._closing.callback(resources.close)
        self._closing.enter_context(
            service.elsewhere(
                self.settings, resources, clock=self.clock, jitter=_longest_wait, around=recorder.around
            )
        )  # fmt: skip
        self.store.add_service(service.name)
        self.courier.services.append(service.name)
        self._recorders[service.name] = recorder
        return recorder

    def make_verifier(self, audience: str | None, **options: Any) -> Verifier:
        """A verifier of its tokens, for whatever checks them in your application; it always knows the latest.

        Args:
            audience: the `aud` that is accepted; None: only tokens without.
            options: others of `Verifier`, for example `require` or `leeway_seconds`.
        """
        given: dict[str, Any] = {"keys": self.key.verifying_key, "algorithms": [self.key.algorithm]}
        given |= {"issuer": self.issuer.iss, "audience": audience, "policy": PATIENT, "settings": self.settings}
        made = _Latest(**given | {"store": self.store, "clock": self.clock} | options)
        self._closing.callback(made.close)
        self._verifiers.append(made)
        return made

    def miss(self, service: str, *, since: float | None = None) -> None:
        """Let a service have missed notices, as one that was away for longer than they are kept; and tell it.

        Args:
            since: Unix seconds; default now.
        """
        self.store.mark_missed(service, self.clock.now if since is None else since)
        self.sweep()

    def sweep(self) -> None:
        """Let the notifier sweep once: it sends again what stays unanswered. And deliver that."""
        self.notifier.sweep()
        self.run()

    def close(self) -> None:
        """Close everything, and give services back as they were."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- inside

    def _next(self, until: float) -> float | None:
        """The next moment after now, and up to `until`, at which something happens."""
        coming = [float(second) for second in self.store.due(before=until, limit=1)]
        if (next_at := self.courier.next_at) is not None:
            coming.append(next_at)
        return min((moment for moment in coming if self.clock.now < moment <= until), default=None)

    def _deliver(self, parcel: Parcel) -> None:
        message = parcel.message
        if parcel.queue == topology.RECEIPTS:
            self._receipts._write([(parcel.queue, _as_received(message))])
            return
        arguments = json.loads(message.body)[0]
        if parcel.queue == topology.COMMANDS:
            {messages.TRACK: self.notifier.track, messages.REVOKE: self.notifier.revoke}[message.headers["task"]](
                *arguments
            )
            return
        name = topology.service_of_queue(parcel.queue)
        assert name is not None
        root_id = message.headers.get("root_id") or message.correlation_id
        try:
            self._recorders[name].service.handle(*arguments, root_id=root_id)
        except Unavailable:
            # As a worker does: the message comes again, when there is a broker again.
            self.courier.give_back(parcel)
            if not self.courier.down:
                raise


class _Latest(Verifier):
    """A verifier without a thread: it reads the feed whenever it is asked."""

    def start(self) -> None:
        self._follower.catch_up()

    def verify(self, token: str) -> Any:
        self._follower.catch_up()
        return super().verify(token)


class _InProcess(Resources):
    """What a service holds open: the store and the courier of a Knell, and an event loop of its own."""

    def __init__(self, knell: Knell) -> None:
        super().__init__(knell.settings)
        self._knell = knell

    @property
    def dedupe(self) -> Dedupe:
        return self._knell.store

    def publish(self, messages: Any) -> None:
        self._knell.courier.send(messages).result()


def _as_received(message: messages.Message) -> KombuMessage:
    info = {"exchange": message.exchange, "routing_key": message.routing_key}
    received = KombuMessage(delivery_info=info, headers=dict(message.headers))
    received.body = message.body  # type: ignore[assignment]  # the broker hands out bytes
    return received


def _longest_wait() -> float:
    return 1.0
