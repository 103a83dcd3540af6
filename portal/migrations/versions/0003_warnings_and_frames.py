"""mails before the end, and the last pictures of desktops that failed"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("portal_notice", schema=None) as batch_op:
        batch_op.add_column(sa.Column("kind", sa.String(length=24), nullable=False, server_default="ready"))
        batch_op.drop_constraint("pk_portal_notice", type_="primary")
        batch_op.create_primary_key("pk_portal_notice", ["sid", "kind"])
    with op.batch_alter_table("portal_notice", schema=None) as batch_op:
        batch_op.alter_column("kind", server_default=None)
    op.create_table(
        "portal_frame",
        sa.Column("sid", sa.String(length=32), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("png", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sid", name=op.f("pk_portal_frame")),
    )
