"""Who did what to whom: one row for every change, and for every reach for what is another person's.

Refused logins are in the log alone: a row for each would let a stranger fill the database.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time

from sqlalchemy import ColumnElement, RowMapping, delete, insert, or_, select

from deskfleet.portal import tables
from deskfleet.portal.store import Store
from deskfleet.runtime.service import Clock

log = logging.getLogger(__name__)

_KEEP_S = 400 * 24 * 3600.0
_PAGE = 500
_DAY_S = 24 * 3600.0
#: The most lines of one export.
MOST_EXPORTED = 200_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the audit; `at` is UNIX seconds. `number` grows with each line."""

    at: float
    actor: str
    address: str
    action: str
    target: str
    detail: str
    number: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """Which lines are meant; what is empty matches all. `text` is looked for in target and detail, the others must be
    equal. `since` and `until` are UNIX seconds, the latter left out."""

    actor: str = ""
    action: str = ""
    text: str = ""
    since: float = 0.0
    until: float = 0.0

    @property
    def conditions(self) -> list[ColumnElement[bool]]:
        """The same as SQL."""
        row = tables.audit.c
        found: list[ColumnElement[bool]] = []
        if self.actor:
            found.append(row.actor == self.actor)
        if self.action:
            found.append(row.action == self.action)
        if self.text:
            found.append(or_(row.target.contains(self.text, autoescape=True), _within(self.text)))
        if self.since:
            found.append(row.at >= self.since)
        if self.until:
            found.append(row.at < self.until)
        return found


def _within(text: str) -> ColumnElement[bool]:
    return tables.audit.c.detail.contains(text, autoescape=True)


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

    def newest(self, limit: int = 200, which: Question = Question(), before: int = 0) -> list[Entry]:
        """The newest lines that are meant, newest first; with `before`, those older than that number."""
        query = select(tables.audit).where(*which.conditions).order_by(tables.audit.c.id.desc()).limit(limit)
        if before:
            query = query.where(tables.audit.c.id < before)
        with self._store.reading() as connection:
            return [_entry(row) for row in connection.execute(query).mappings()]

    def every(self, which: Question, most: int) -> Iterator[Entry]:
        """All lines that are meant, newest first, at most so many; read in pages, so that nothing is held for long."""
        before = 0
        while most > 0:
            page = self.newest(min(_PAGE, most), which, before)
            yield from page
            if len(page) < _PAGE:
                return
            before, most = page[-1].number, most - len(page)

    def actions(self) -> list[str]:
        """The names of everything that was done."""
        query = select(tables.audit.c.action).distinct().order_by(tables.audit.c.action)
        with self._store.reading() as connection:
            return list(connection.scalars(query))

    def prune(self) -> None:
        """Forget lines that are older than a year and a month."""
        old = tables.audit.c.at < self._clock.wall() - _KEEP_S
        with self._store.writing() as connection:
            connection.execute(delete(tables.audit).where(old))


def _entry(row: RowMapping) -> Entry:
    return Entry(row["at"], row["actor"], row["address"], row["action"], row["target"], row["detail"], number=row["id"])


def question(given: Mapping[str, str]) -> Question:
    """From a query: actor, action, text, and the days since and until which (YYYY-MM-DD, UTC, both included).

    Raises:
        ValueError: a day is none.
    """
    actor, action, text = (given.get(name, "").replace("\0", "").strip()[:320] for name in ("actor", "action", "text"))
    since, until = (_midnight(given.get(name, "")) for name in ("since", "until"))
    return Question(actor, action, text, since, until + _DAY_S if until else 0.0)


def _midnight(day: str) -> float:
    return datetime.combine(date.fromisoformat(day), time(), UTC).timestamp() if day else 0.0


def as_csv(entries: Iterable[Entry]) -> Iterator[str]:
    """Lines of comma-separated values (RFC 4180), with a head.

    A cell that a spreadsheet would take for a formula gets an apostrophe in front: names and texts are anybody's.
    """
    yield _csv_line(("at", "actor", "address", "action", "target", "detail"))
    for entry in entries:
        at = datetime.fromtimestamp(entry.at, UTC).isoformat(timespec="milliseconds")
        cells = (entry.actor, entry.address, entry.action, entry.target, entry.detail)
        yield _csv_line((at, *(f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in cells)))


def _csv_line(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue()


def as_json_lines(entries: Iterable[Entry]) -> Iterator[str]:
    """A JSON object a line."""
    for entry in entries:
        yield json.dumps(asdict(entry)) + "\n"
