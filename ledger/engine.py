"""Opening the ledger, and bringing it to the revision that this version needs."""

from __future__ import annotations

from pathlib import Path
from sqlite3 import Connection as SqliteConnection
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.pool import StaticPool

from deskfleet.schemas.errors import DeskfleetError

_MIGRATIONS = Path(__file__).parent / "migrations"


#: A writer that stops within a transaction (it was paused, say) must not hold its locks for ever: PostgreSQL ends it.
_IDLE_MS = 2_500
#: A server that answers nothing for so long is gone (libpq's tcp_user_timeout).
_DEAD_MS = 1_500


class LedgerError(DeskfleetError):
    """Raised when the ledger can't be opened, or is of another revision than this version needs."""


def open_engine(url: str, *, read_only: bool = False) -> Engine:
    """An engine for a `sqlite:///PATH` or `postgresql+psycopg://` URL.

    SQLite runs in WAL mode with a full sync at each commit (a commit that was answered survives a power cut) and
    takes its write lock at BEGIN, so that two writers wait for each other instead of failing half-way. Read-only
    means it: SQLite's mode=ro, PostgreSQL's default_transaction_read_only.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed.database or "", read_only)
    options = (
        "-c default_transaction_read_only=on" if read_only else f"-c idle_in_transaction_session_timeout={_IDLE_MS}"
    )
    arguments = {"options": options, "connect_timeout": 2, "tcp_user_timeout": _DEAD_MS, "keepalives_idle": 2}
    return create_engine(parsed, pool_pre_ping=True, connect_args=arguments, pool_size=4)


def _open_sqlite(path: str, read_only: bool) -> Engine:
    arguments: dict[str, Any] = {"timeout": 10, "check_same_thread": False}
    if path in ("", ":memory:"):
        engine = create_engine("sqlite://", poolclass=StaticPool, connect_args=arguments)
    else:
        mode = "ro" if read_only else "rwc"
        engine = create_engine(f"sqlite:///file:{path}?mode={mode}&uri=true", connect_args=arguments)

    @event.listens_for(engine, "connect")
    def _connect(connection: SqliteConnection, _: object) -> None:
        connection.isolation_level = None  # SQLAlchemy's BEGIN below is the only one
        connection.execute("PRAGMA foreign_keys = ON")
        if read_only:
            connection.execute("PRAGMA query_only = ON")
        else:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")

    if not read_only:  # whoever only reads asks single questions, each of which is consistent without a BEGIN

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def migrate(engine: Engine) -> None:
    """Bring the ledger to the newest revision; does nothing when it is there."""
    with engine.begin() as connection:
        command.upgrade(_config(connection), "head")


def check_revision(engine: Engine) -> None:
    """Refuse a ledger of another revision.

    Raises:
        LedgerError: with the command that mends it.
    """
    wanted = ScriptDirectory.from_config(_config()).get_current_head()
    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    if found != wanted:
        raise LedgerError(f"the ledger is at revision {found}, this version needs {wanted}: run 'deskfleet migrate'")
