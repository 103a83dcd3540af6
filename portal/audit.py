"""Who did what to whom: one row for every change, and for every reach for what is another person's.

Refused logins are in the log alone: a row for each would let a stranger fill the database.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sqlalchemy import delete, insert, select

from deskfleet.portal import tables
from deskfleet.portal.store import Store
from deskfleet.runtime.service import Clock

log = logging.getLogger(__name__)

_KEEP_S = 400 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the audit; `at` is UNIX seconds."""

    at: float
    actor: str
    address: str
    action: str
    target: str
    detail: str


class Audit:
    """The audit trail."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def note(self, actor: str, address: str, action: str, target: str = "", detail: str = "") -> None:
        """Write one line."""
        row = {"actor": actor[:320], "address": address[:64], "action": action, "target": target[:320]}
        log.info("audit: %s by %s from %s on %s %s", action, row["actor"], row["address"], row["target"], detail)
        with self._store.writing() as connection:
            connection.execute(insert(tables.audit).values(at=self._clock.wall(), detail=detail[:1000], **row))

    def newest(self, limit: int = 200) -> list[Entry]:
        """The newest lines, newest first."""
        query = select(tables.audit).order_by(tables.audit.c.id.desc()).limit(limit)
        with self._store.reading() as connection:
            return [
                Entry(row["at"], row["actor"], row["address"], row["action"], row["target"], row["detail"])
                for row in connection.execute(query).mappings()
            ]

    def prune(self) -> None:
        """Forget lines that are older than a year and a month."""
        old = tables.audit.c.at < self._clock.wall() - _KEEP_S
        with self._store.writing() as connection:
            connection.execute(delete(tables.audit).where(old))
