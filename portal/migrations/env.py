"""Alembic's entry point. The caller hands over its connection; there is no alembic.ini."""

from __future__ import annotations

from alembic import context

from deskfleet.portal.store import VERSION_TABLE
from deskfleet.portal.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,
    include_name=lambda name, kind, _: kind != "table" or str(name).startswith("portal_"),
)
with context.begin_transaction():
    context.run_migrations()
