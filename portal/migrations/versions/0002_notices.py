"""mails about desktops that are ready"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "portal_notice",
        sa.Column("sid", sa.String(length=32), nullable=False),
        sa.Column("user", sa.String(length=320), nullable=False),
        sa.Column("machine", sa.String(length=48), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("next_try_at", sa.Float(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("sid", name=op.f("pk_portal_notice")),
    )
    with op.batch_alter_table("portal_notice", schema=None) as batch_op:
        batch_op.create_index("ix_portal_notice_state", ["state", "next_try_at"], unique=False)
