"""What the commands open, and close again: the store that the settings name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from knell.errors import UnknownService
from knell.settings import Settings
from knell.store import Store, open_store


@contextmanager
def opened_store(settings: Settings) -> Iterator[Store]:
    """The store of these settings, closed at the end."""
    store = open_store(
        settings.store_url, namespace=settings.namespace, rules=settings.rules, partitions=settings.partitions
    )
    try:
        yield store
    finally:
        store.close()


def check_registered(store: Store, name: str) -> None:
    """UnknownService, with the names that there are, if a service is not registered."""
    known = [service.name for service in store.services()]
    if name not in known:
        raise UnknownService(f"no service {name!r} is registered (known: {', '.join(known) or 'none'})")
