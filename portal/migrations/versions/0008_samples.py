"""what hosts had over time"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_FIGURES = (
    "cpus",
    "load1",
    "memory_mib",
    "memory_free_mib",
    "disk_mib",
    "disk_free_mib",
    "guests",
    "gpus",
    "gpus_used",
)


def upgrade() -> None:
    op.create_table(
        "portal_sample",
        sa.Column("host", sa.String(length=63), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        *(sa.Column(name, sa.Float(), nullable=False) for name in _FIGURES),
        sa.PrimaryKeyConstraint("host", "step", "at", name=op.f("pk_portal_sample")),
    )
    op.create_index("ix_portal_sample_step", "portal_sample", ["step", "at"])
