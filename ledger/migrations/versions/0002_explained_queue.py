"""explained queue, declared-dead hosts, one deciding scheduler"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("host") as table:
        table.add_column(sa.Column("dead", sa.Boolean(), nullable=False, server_default=sa.false()))
        table.add_column(sa.Column("figures", sa.Text(), nullable=False, server_default=""))
    with op.batch_alter_table("session") as table:
        table.add_column(sa.Column("groups", sa.Text(), nullable=False, server_default="[]"))
        table.add_column(sa.Column("queue_class", sa.String(length=48), nullable=False, server_default=""))
        table.add_column(sa.Column("place", sa.Integer(), nullable=True))
        table.add_column(sa.Column("estimate_s", sa.Float(), nullable=True))
    leader = op.create_table(
        "leader",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("beat", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leader")),
    )
    op.bulk_insert(leader, [{"id": 1, "epoch": 0, "beat": 0, "owner": ""}])
