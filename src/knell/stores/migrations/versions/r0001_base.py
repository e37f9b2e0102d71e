"""Everything that the store began with."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
step = "expand"

TABLES = """
CREATE TABLE meta (name text COLLATE "C" PRIMARY KEY, value text COLLATE "C" NOT NULL);
CREATE TABLE counters (name text COLLATE "C" PRIMARY KEY, value bigint NOT NULL) WITH (fillfactor = 50);

CREATE TABLE tokens (
    key bytea PRIMARY KEY,
    second bigint NOT NULL,
    session bytea,
    life bigint,
    detached text COLLATE "C",
    closed boolean NOT NULL,
    ref text COLLATE "C" NOT NULL
);
CREATE INDEX ix_tokens_second ON tokens (second);

CREATE TABLE sessions (
    key bytea PRIMARY KEY,
    ref text COLLATE "C" NOT NULL,
    started double precision,
    live integer NOT NULL,
    last_exp double precision NOT NULL,
    session_exp double precision,
    due bigint,
    life bigint NOT NULL,
    closed_by text COLLATE "C"
);
CREATE INDEX ix_sessions_due ON sessions (due);

CREATE TABLE seconds (second bigint PRIMARY KEY, armed boolean NOT NULL, leased_at double precision NOT NULL);

CREATE TABLE denylist (
    id text COLLATE "C" PRIMARY KEY,
    target bytea NOT NULL,
    position bigint NOT NULL,
    expires_at double precision NOT NULL,
    strength double precision NOT NULL,
    body text COLLATE "C" NOT NULL
);
CREATE INDEX ix_denylist_target_strength_id ON denylist (target, strength, id);
CREATE INDEX ix_denylist_position ON denylist (position);
CREATE INDEX ix_denylist_expires_at ON denylist (expires_at);

CREATE TABLE feed (
    position bigint PRIMARY KEY,
    kind text COLLATE "C" NOT NULL,
    revocation_id text COLLATE "C" NOT NULL,
    body text COLLATE "C" NOT NULL
);

CREATE TABLE notices (
    batch_id text COLLATE "C" PRIMARY KEY,
    kind text COLLATE "C" NOT NULL,
    created_at double precision NOT NULL,
    jws text COLLATE "C",
    entries text COLLATE "C",
    settled boolean NOT NULL,
    since double precision,
    attempts integer NOT NULL,
    resend_at double precision,
    size bigint NOT NULL,
    position bigint
);
CREATE INDEX ix_notices_resend_at_created_at_batch_id ON notices (resend_at, created_at, batch_id);
CREATE INDEX ix_notices_kind_created_at ON notices (kind, created_at);

CREATE TABLE waiting (
    batch_id text COLLATE "C" NOT NULL,
    service text COLLATE "C" NOT NULL,
    todo text COLLATE "C" NOT NULL,
    state text COLLATE "C" NOT NULL,
    at double precision,
    hold_until double precision NOT NULL,
    PRIMARY KEY (batch_id, service)
);
CREATE INDEX ix_waiting_service ON waiting (service);

CREATE TABLE services (
    name text COLLATE "C" PRIMARY KEY,
    added_at double precision NOT NULL,
    removed boolean NOT NULL
);

CREATE TABLE dedupe (
    service text COLLATE "C" NOT NULL,
    batch_id text COLLATE "C" NOT NULL,
    done text COLLATE "C" NOT NULL,
    parked text COLLATE "C" NOT NULL,
    holder text COLLATE "C",
    leased_until double precision NOT NULL,
    expires_at double precision NOT NULL,
    PRIMARY KEY (service, batch_id)
);
CREATE INDEX ix_dedupe_expires_at ON dedupe (expires_at);

CREATE TABLE parked (
    id text COLLATE "C" PRIMARY KEY,
    service text COLLATE "C" NOT NULL,
    queue text COLLATE "C" NOT NULL,
    error text COLLATE "C" NOT NULL,
    at double precision NOT NULL,
    attempts integer NOT NULL,
    notice_id text COLLATE "C",
    jws_key bytea,
    body bytea
);
CREATE INDEX ix_parked_service_id ON parked (service, id);
CREATE INDEX ix_parked_at ON parked (at);
CREATE INDEX ix_parked_jws_key ON parked (jws_key);

CREATE TABLE parked_jws (key bytea PRIMARY KEY, jws text COLLATE "C" NOT NULL);

CREATE TABLE leases (
    name text COLLATE "C" PRIMARY KEY,
    holder text COLLATE "C" NOT NULL,
    leased_until double precision NOT NULL
);

-- 122 random bits: it names this data, whichever server it is on.
INSERT INTO meta VALUES ('schema', '1'), ('epoch', replace(gen_random_uuid()::text, '-', ''));
INSERT INTO counters VALUES ('head', 0), ('trimmed', 0), ('log_bytes', 0);
"""


def upgrade() -> None:
    """Make the tables."""
    op.execute(TABLES)
