"""links to desktops, and rights that have ended"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "portal_share",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("sid", sa.String(length=32), nullable=False),
        sa.Column("owner", sa.String(length=320), nullable=False),
        sa.Column("audience", sa.String(length=16), nullable=False),
        sa.Column("passphrase", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_portal_share")),
        sa.UniqueConstraint("digest", name=op.f("uq_portal_share_digest")),
    )
    with op.batch_alter_table("portal_share", schema=None) as batch_op:
        batch_op.create_index("ix_portal_share_sid", ["sid"], unique=False)
        batch_op.create_index("ix_portal_share_expires_at", ["expires_at"], unique=False)
    op.create_table(
        "portal_revocation",
        sa.Column("grant", sa.String(length=32), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("told_at", sa.Float(), nullable=True),
        sa.Column("next_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("grant", name=op.f("pk_portal_revocation")),
    )
