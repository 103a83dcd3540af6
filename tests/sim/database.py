"""The two databases, in memory and real SQLite, with faults: a commit that fails before or after it took effect, and a
time in which nothing answers. They are made once and emptied for each walk."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from sim.process import Process
from sqlalchemy import Connection, Engine, MetaData
from sqlalchemy.exc import OperationalError

from deskfleet.ledger import tables as ledger_tables
from deskfleet.ledger.engine import open_engine
from deskfleet.portal import tables as portal_tables
from deskfleet.portal.store import Store


@cache
def _engine(which: str) -> Engine:
    engine = open_engine("sqlite://")
    _metadata(which).create_all(engine)
    return engine


def _metadata(which: str) -> MetaData:
    return ledger_tables.metadata if which == "ledger" else portal_tables.metadata


class Database:
    """One database: "ledger" or "portal". `fail` is "before" or "after" the next commit."""

    def __init__(self, which: str) -> None:
        self.away = False
        self.fail = ""
        #: Of how many changes a commit must be to fail: most are the beats of who leads, and what hosts report.
        self.least = 1
        #: Grows with each commit that took effect.
        self.commits = 0
        self.engine = _engine(which)
        pooled = self.engine.raw_connection()
        self._raw: sqlite3.Connection = pooled.driver_connection
        for table in reversed(_metadata(which).sorted_tables):
            self._raw.execute(f'DELETE FROM "{table.name}"')
        if which == "ledger":
            self._raw.execute("INSERT INTO leader (id, epoch, beat, owner) VALUES (1, 0, 0, '')")

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Evidence: what is really stored, by a query of the checker's own."""
        return self._raw.execute(query, values).fetchall()

    @property
    def open(self) -> bool:
        """Whether a transaction is open."""
        return self._raw.in_transaction

    @property
    def changes(self) -> int:
        """How many rows were ever changed."""
        return self._raw.total_changes

    def mend(self) -> None:
        """No more faults."""
        self.away, self.fail = False, ""

    def refuse(self) -> OperationalError:
        """What a driver says when there is no answer."""
        return OperationalError("?", {}, sqlite3.OperationalError("simulated"))


class Access:
    """One process's way to a database, in place of an SQLAlchemy engine; the process can die on both sides of a
    commit."""

    def __init__(self, database: Database, process: Process) -> None:
        self._database = database
        self._process = process
        self.dialect = database.engine.dialect

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        database = self._database
        if database.away:
            raise database.refuse()
        with database.engine.begin() as connection:
            before = database.changes
            yield connection
            fail = ""
            if database.changes - before >= database.least:
                fail, database.fail = database.fail, ""
            self._process.point()
            if fail == "before":
                raise database.refuse()
        database.commits += 1
        self._process.point()
        if fail == "after":
            raise database.refuse()

    def connect(self) -> Connection:
        if self._database.away:
            raise self._database.refuse()
        return self._database.engine.connect()

    def dispose(self) -> None:
        """There is nothing to give back."""


class PortalStore(Store):
    """The portal's store over an `Access`."""

    def __init__(self, access: Access) -> None:
        self._writer = self._reader = access
