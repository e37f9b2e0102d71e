"""Every exchange, queue, binding, policy and permission that Knell has on its broker, in one place."""

from __future__ import annotations

from knell.topology.check import Finding, check, in_short, missing
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
from knell.topology.permissions import Permissions, permissions
from knell.topology.plan import belongs, kombu_queue
from knell.topology.policies import apply_policies, policy_command, vhost_of

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
    "apply_policies",
    "declare",
    "kombu_queue",
    "policy_command",
    "remove_service",
    "vhost_of",
    # looking at it
    "Finding",
    "check",
    "in_short",
    "missing",
    # who may do what
    "Permissions",
    "belongs",
    "permissions",
]  # fmt: skip
