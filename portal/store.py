"""Opening the portal's own database and bringing it to the revision that this version needs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Table
from sqlalchemy.dialects.postgresql import Insert as PostgresqlInsert
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import Insert as SqliteInsert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from deskfleet.ledger.engine import open_engine
from deskfleet.schemas.errors import DeskfleetError

_MIGRATIONS = Path(__file__).parent / "migrations"
#: Its own, since the ledger's may stand in the same database.
VERSION_TABLE = "portal_version"


class StoreError(DeskfleetError):
    """Raised when the portal's database, or its folder of static files, is not what this version needs."""


class Store:
    """The portal's own database. Reading takes no write lock, so pages do not wait for each other on SQLite."""

    def __init__(self, url: str) -> None:
        self._writer = open_engine(url)
        self._reader = open_engine(url, read_only=True)

    def reading(self) -> Connection:
        """A connection for one short read transaction, which ends with its `with` block."""
        return self._reader.connect()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction: committed, and on the disk, when the block ends; rolled back when it raises."""
        with self._writer.begin() as connection:
            yield connection

    def migrate(self) -> None:
        """Bring the database to the newest revision; does nothing when it is there."""
        with self._writer.begin() as connection:
            command.upgrade(_config(connection), "head")

    def check_revision(self) -> None:
        """Refuse a database of another revision.

        Raises:
            StoreError: with the command that mends it.
        """
        wanted = ScriptDirectory.from_config(_config()).get_current_head()
        with self._writer.connect() as connection:
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            found = context.get_current_revision()
        if found != wanted:
            raise StoreError(
                f"the portal's database is at revision {found}, this version needs {wanted}: run 'deskfleet migrate'"
            )

    def close(self) -> None:
        """Give the connections back."""
        self._writer.dispose()
        self._reader.dispose()


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def upsert(connection: Connection, table: Table) -> SqliteInsert | PostgresqlInsert:
    """An INSERT of the dialect that knows ON CONFLICT."""
    if connection.dialect.name == "postgresql":
        return postgresql_insert(table)
    return sqlite_insert(table)


def digest(secret: str) -> str:
    """How a secret of at least 128 random bits is stored: a plain hash is enough, it can't be guessed."""
    return hashlib.sha256(secret.encode()).hexdigest()
