"""dead letters, as an administrator looks at them"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "portal_dead_letter",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("kept_at", sa.Float(), nullable=False),
        sa.Column("died_at", sa.Float(), nullable=False),
        sa.Column("queue", sa.String(length=255), nullable=False),
        sa.Column("cause", sa.String(length=255), nullable=False),
        sa.Column("type", sa.String(length=255), nullable=False),
        sa.Column("sender", sa.String(length=255), nullable=False),
        sa.Column("sid", sa.String(length=32), nullable=False),
        sa.Column("correlation_id", sa.String(length=255), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_portal_dead_letter")),
        sa.UniqueConstraint("name", name=op.f("uq_portal_dead_letter_name")),
        sqlite_autoincrement=True,
    )
