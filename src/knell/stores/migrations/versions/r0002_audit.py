"""The audit log, and which sets of claims revocations are by."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
step = "expand"

TABLES = """
CREATE TABLE audit (
    id text COLLATE "C" PRIMARY KEY,
    at double precision NOT NULL,
    body text COLLATE "C" NOT NULL
);
CREATE INDEX ix_audit_at_id ON audit (at, id);

CREATE TABLE claim_names (
    iss bytea NOT NULL,
    names text COLLATE "C" NOT NULL,
    revocations integer NOT NULL,
    PRIMARY KEY (iss, names)
);
"""


def upgrade() -> None:
    """Make the tables."""
    op.execute(TABLES)
