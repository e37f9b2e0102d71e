"""Keys that change while they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class KeySource:
    """Where a KeyRing takes keys from that change while they are used: `knell.JwksUrl`, `knell.KeyFile`."""

    def keys(self) -> Mapping[str, Any]:
        """By kid, the keys as they are now: each a SigningKey, or a public JWK. The same object until they change.

        Raises:
            KeysUnavailable: there are none now.
        """
        raise NotImplementedError

    def check(self) -> None:
        """InvalidSettings if it can be said now that no key will come from there."""

    def look_again(self) -> None:
        """A token has named a key that is not there: see, for a bounded time, whether it is new.

        Raises:
            KeysUnavailable: that is being looked up, and not known yet.
        """

    def start(self) -> None:
        """Begin to follow the keys in this process, and return at once."""

    def wait_ready(self, timeout_seconds: float) -> bool:
        """Wait until keys are there. False if they were not after `timeout_seconds`."""
        return True

    def close(self) -> None:
        """Stop to follow the keys; the next use begins anew."""
