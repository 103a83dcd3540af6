"""how a desktop came to be: forked from a template, or booted"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("session") as table:
        table.add_column(sa.Column("birth", sa.String(length=16), nullable=False, server_default=""))
