"""Alembic runs this around the migrations; `knell.stores.migrate` gives it a connection and the schema's name."""

from __future__ import annotations

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, version_table_schema=context.config.attributes["schema"])
context.run_migrations()
