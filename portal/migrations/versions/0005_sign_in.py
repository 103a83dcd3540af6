"""codes by mail, and when a login was last used"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("portal_login", schema=None) as batch_op:
        batch_op.add_column(sa.Column("used_at", sa.Float(), nullable=False, server_default="0"))
    # Who is logged in while the portal is upgraded stays so.
    op.execute("UPDATE portal_login SET used_at = extract(epoch FROM now())" if _postgresql() else _SQLITE)
    with op.batch_alter_table("portal_login", schema=None) as batch_op:
        batch_op.alter_column("used_at", server_default=None)
    op.create_table(
        "portal_code",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("address", sa.String(length=320), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("mailed", sa.Boolean(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_portal_code")),
    )
    op.create_index("ix_portal_code_address", "portal_code", ["address", "created_at"])


_SQLITE = "UPDATE portal_login SET used_at = strftime('%s', 'now')"


def _postgresql() -> bool:
    return op.get_context().dialect.name == "postgresql"
