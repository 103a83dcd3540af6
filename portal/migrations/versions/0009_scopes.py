"""what access tokens are good for; those that there are keep what they could do"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("portal_token") as table:
        table.add_column(sa.Column("scopes", sa.String(length=80), nullable=False, server_default="fleet"))
    with op.batch_alter_table("portal_token") as table:
        table.alter_column("scopes", server_default=None)
