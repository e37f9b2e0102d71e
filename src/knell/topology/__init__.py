"""Every exchange, queue, binding, policy and permission that Knell has on its broker, in one place."""

from __future__ import annotations

from knell.topology.accounts import Asked, Outcome, apply_accounts, in_use, prepare_accounts
from knell.topology.api import ApiRefused
from knell.topology.check import Finding, check, in_short, missing
from knell.topology.compare import Row, compare
from knell.topology.declare import declare, remove_service
from knell.topology.names import (
    COMMANDS,
    DEAD,
    DELAYED,
    EVENTS,
    EXPIRY,
    NOTICES,
    QUORUM,
    RECEIPTS,
    RETRY,
    SWEEP,
    UNROUTED_POLICY,
    parked_key,
    receipt_key,
    retry_key,
    service_of_queue,
    service_queue,
)
from knell.topology.passwords import Passwords
from knell.topology.permissions import Account, Permissions, account_name, accounts, permissions
from knell.topology.plan import belongs, kombu_queue
from knell.topology.policies import apply_policies, policy_command, vhost_of
from knell.topology.users import withdraw

__all__ = [
    # names
    "COMMANDS",
    "DEAD",
    "DELAYED",
    "EVENTS",
    "EXPIRY",
    "NOTICES",
    "QUORUM",
    "RECEIPTS",
    "RETRY",
    "SWEEP",
    "UNROUTED_POLICY",
    "parked_key",
    "receipt_key",
    "retry_key",
    "service_of_queue",
    "service_queue",
    # making it
    "apply_accounts",
    "apply_policies",
    "Asked",
    "declare",
    "kombu_queue",
    "Outcome",
    "Passwords",
    "policy_command",
    "prepare_accounts",
    "remove_service",
    "withdraw",
    "vhost_of",
    # looking at it
    "ApiRefused",
    "Finding",
    "Row",
    "check",
    "compare",
    "in_short",
    "missing",
    # who may do what
    "Account",
    "Permissions",
    "account_name",
    "accounts",
    "belongs",
    "in_use",
    "permissions",
]  # fmt: skip
