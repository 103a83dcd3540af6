"""The ledger's tables (SQLAlchemy Core), the same on SQLite and PostgreSQL.

Times are UNIX seconds for display. The two keys that the exclusive rights rest on are plain constraints:
`session.sid` (one row a request) and `gpu_hold (host, address)` (one session a GPU).
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

#: SQLite counts rows by INTEGER only; PostgreSQL gets a 64-bit identity.
_ID = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

host = Table(
    "host",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("generation", BigInteger, nullable=False, default=0),
    Column("draining", Boolean, nullable=False, default=False),
    Column("dead", Boolean, nullable=False, default=False),
    Column("message", Text, nullable=False, default=""),
    Column("seen_at", Float, nullable=False, default=0.0),
    Column("report", Text, nullable=False, default=""),
    Column("figures", Text, nullable=False, default=""),
)

session = Table(
    "session",
    metadata,
    Column("ordinal", _ID, primary_key=True, autoincrement=True),
    Column("sid", String(32), nullable=False, unique=True),
    Column("user", String(320), nullable=False),
    Column("machine", String(48), nullable=False),
    Column("cpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_gib", Integer, nullable=False),
    Column("gpus", Integer, nullable=False),
    Column("gpu_model", String(128), nullable=False),
    Column("persistent", Boolean, nullable=False),
    Column("lifetime_s", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("outcome", String(16)),
    Column("reason", String(32)),
    Column("detail", Text, nullable=False, default=""),
    Column("host", String(63), nullable=False, default=""),
    Column("generation", BigInteger, nullable=False, default=0),
    Column("attempt", Integer, nullable=False, default=0),
    Column("gpu_addresses", Text, nullable=False, default="[]"),
    Column("wait_s", Integer, nullable=False, default=0),
    Column("waited_s", Float, nullable=False, default=0.0),
    Column("groups", Text, nullable=False, default="[]"),
    Column("queue_class", String(48), nullable=False, default=""),
    Column("birth", String(16), nullable=False, default=""),
    Column("place", Integer),
    Column("estimate_s", Float),
    Column("created_at", Float, nullable=False),
    Column("changed_at", Float, nullable=False),
    Column("verdicts", Text, nullable=False, default="[]"),
    CheckConstraint("state <> 'ended' OR outcome IS NOT NULL", name="ended_has_outcome"),
    CheckConstraint("(state IN ('queued', 'ended')) OR host <> ''", name="placed_has_host"),
    Index("ix_session_state", "state", "ordinal"),
    Index("ix_session_user", "user", "ordinal"),
)

gpu_hold = Table(
    "gpu_hold",
    metadata,
    Column("host", String(63), primary_key=True),
    Column("address", String(16), primary_key=True),
    Column("sid", String(32), ForeignKey("session.sid"), nullable=False, index=True),
)

#: The one scheduler that decides. `epoch` is its fencing token, `beat` changes while it lives.
leader = Table(
    "leader",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("beat", BigInteger, nullable=False),
    Column("owner", String(128), nullable=False, default=""),
)

session_event = Table(
    "session_event",
    metadata,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("sid", String(32), nullable=False, index=True),
    Column("at", Float, nullable=False),
    Column("event", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("host", String(63), nullable=False, default=""),
    Column("reason", String(32)),
    Column("detail", Text, nullable=False, default=""),
)
