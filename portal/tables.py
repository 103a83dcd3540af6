"""The tables of the portal's own database (SQLAlchemy Core), the same on SQLite and PostgreSQL.

All names begin with portal_, so that they may stand beside the ledger's in one database. Times are UNIX seconds.
Secrets that the portal only has to recognise (cookies, tokens) are stored as SHA-256.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text

#: SQLite counts rows by INTEGER only; PostgreSQL gets a 64-bit identity.
_ID = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

account = Table(
    "portal_account",
    metadata,
    Column("user", String(320), primary_key=True),
    Column("password", Text, nullable=False),
    Column("admin", Boolean, nullable=False),
    Column("groups", Text, nullable=False),
    Column("disabled", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
)

#: What is remembered of people, whether they have an account here or elsewhere.
person = Table(
    "portal_person",
    metadata,
    Column("user", String(320), primary_key=True),
    Column("language", String(8), nullable=False),
)

login = Table(
    "portal_login",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("user", String(320), nullable=False, index=True),
    Column("method", String(16), nullable=False),
    Column("groups", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("used_at", Float, nullable=False),
)

#: Codes that were asked for by mail, each bound to the browser that holds the secret behind `digest`.
code = Table(
    "portal_code",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("address", String(320), nullable=False),
    Column("code", String(64), nullable=False),
    Column("mailed", Boolean, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Index("ix_portal_code_address", "address", "created_at"),
)

token = Table(
    "portal_token",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("name", String(16), nullable=False, unique=True),
    Column("user", String(320), nullable=False, index=True),
    Column("method", String(16), nullable=False),
    Column("groups", Text, nullable=False),
    Column("label", String(80), nullable=False),
    Column("scopes", String(80), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)

throttle = Table(
    "portal_throttle",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("failures", Integer, nullable=False),
    Column("last_at", Float, nullable=False),
)

#: What people asked for and the scheduler has not been seen to know: launches and stops.
request = Table(
    "portal_request",
    metadata,
    Column("sid", String(32), primary_key=True),
    Column("kind", String(8), primary_key=True),
    Column("user", String(320), nullable=False),
    Column("type", String(32), nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deadline", Float, nullable=False),
    Column("next_try_at", Float, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Index("ix_portal_request_state", "state"),
    Index("ix_portal_request_user", "user", "created_at"),
)

#: Mails about desktops: one of a kind for each, whatever becomes of it.
notice = Table(
    "portal_notice",
    metadata,
    Column("sid", String(32), primary_key=True),
    Column("kind", String(24), primary_key=True),
    Column("user", String(320), nullable=False),
    Column("machine", String(48), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("next_try_at", Float, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Index("ix_portal_notice_state", "state", "next_try_at"),
)

#: The last pictures of desktops that failed.
frame = Table(
    "portal_frame",
    metadata,
    Column("sid", String(32), primary_key=True),
    Column("at", Float, nullable=False),
    Column("png", LargeBinary, nullable=False),
)

#: Links by which others open a desktop.
share = Table(
    "portal_share",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("sid", String(32), nullable=False),
    Column("owner", String(320), nullable=False),
    Column("audience", String(16), nullable=False),
    Column("passphrase", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("revoked_at", Float, nullable=True),
    Index("ix_portal_share_sid", "sid"),
    Index("ix_portal_share_expires_at", "expires_at"),
)

#: Rights to consoles that have ended, for as long as proxies are told.
revocation = Table(
    "portal_revocation",
    metadata,
    Column("grant", String(32), primary_key=True),
    Column("at", Float, nullable=False),
    Column("told_at", Float, nullable=True),
    Column("next_at", Float, nullable=False),
)

audit = Table(
    "portal_audit",
    metadata,
    Column("id", _ID, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False, index=True),
    Column("actor", String(320), nullable=False),
    Column("address", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("target", String(320), nullable=False),
    Column("detail", Text, nullable=False),
)

#: Messages that nobody could take. Numbers are never used twice, so that "all up to here" means what was looked at.
dead_letter = Table(
    "portal_dead_letter",
    metadata,
    Column("number", _ID, primary_key=True, autoincrement=True),
    Column("name", String(32), nullable=False, unique=True),
    Column("kept_at", Float, nullable=False),
    Column("died_at", Float, nullable=False),
    Column("queue", String(255), nullable=False),
    Column("cause", String(255), nullable=False),
    Column("type", String(255), nullable=False),
    Column("sender", String(255), nullable=False),
    Column("sid", String(32), nullable=False),
    Column("correlation_id", String(255), nullable=False),
    Column("size", Integer, nullable=False),
    Column("body", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)

#: What a host measures and the portal keeps over time. Memory and disk in MiB; load1 is the one-minute load average.
FIGURES = (
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

#: Figures of hosts over time: a sample for each `step` seconds, at the time when that step began.
sample = Table(
    "portal_sample",
    metadata,
    Column("host", String(63), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("at", BigInteger, primary_key=True),
    *(Column(name, Float, nullable=False) for name in FIGURES),
    Index("ix_portal_sample_step", "step", "at"),
)
