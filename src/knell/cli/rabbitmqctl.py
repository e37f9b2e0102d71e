"""Accounts as commands for a person to run on the broker, where there is no management API."""

from __future__ import annotations

import shlex

from knell.topology import Account


def commands(account: Account, vhost: str) -> list[str]:
    """The rabbitmqctl commands that make an account and give it its rights; add_user asks for the password."""
    host, name, rights = shlex.quote(vhost), shlex.quote(account.name), account.permissions
    alike: dict[tuple[str, str], list[str]] = {}
    for exchange, expressions in rights.topics.items():
        alike.setdefault(expressions, []).append(exchange)
    return [
        f"rabbitmqctl add_user {name}",
        *([f"rabbitmqctl set_user_tags {name} {shlex.join(account.tags)}"] if account.tags else []),
        f"rabbitmqctl set_permissions -p {host} {name} {shlex.join([rights.configure, rights.write, rights.read])}",
        *(
            f"for exchange in {' '.join(exchanges)}; do "
            f'rabbitmqctl set_topic_permissions -p {host} {name} "$exchange" {shlex.join(expressions)}; done'
            for expressions, exchanges in alike.items()
        ),
    ]
