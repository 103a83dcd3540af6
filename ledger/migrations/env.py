"""Alembic's entry point. The caller hands over its connection; there is no alembic.ini."""

from __future__ import annotations

from alembic import context

from deskfleet.ledger.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
