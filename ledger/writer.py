"""Changes to the ledger. Imported by the scheduler alone (an import contract says so).

Every change of an exclusive thing is a compare-and-set: it names the state that it was decided on, and `Conflict`
means that somebody else was there first, so the decision must be taken again on fresh rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from sqlalchemy import Connection, Engine, bindparam, delete, insert, select, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import IntegrityError

from deskfleet.ledger import tables
from deskfleet.ledger.lease import Lease
from deskfleet.ledger.reader import Wait, all_hosts, live_sessions
from deskfleet.ledger.rows import figures_text, session_values, to_session, verdicts_text
from deskfleet.schemas.errors import DeskfleetError, Reason
from deskfleet.schemas.host import Host, HostReport
from deskfleet.schemas.session import Event, Session, State
from deskfleet.schemas.verdict import Verdict
from deskfleet.schemas.wire import encode


class Conflict(DeskfleetError):
    """Raised when a row is no longer as the decision found it. Nothing of the transaction is kept."""


# What every launch runs through, built once: building a statement costs several times what running it does.
_SESSION, _HOST = tables.session.c, tables.host.c
_ADD = {
    name: make(tables.session).on_conflict_do_nothing(index_elements=["sid"]).returning(_SESSION.sid)
    for name, make in (("sqlite", sqlite_insert), ("postgresql", postgresql_insert))
}
_SAVE = update(tables.session).where(
    _SESSION.sid == bindparam("of_sid"),
    _SESSION.state == bindparam("from_state"),
    _SESSION.generation == bindparam("from_generation"),
)
_NOTE = insert(tables.session_event)
_CLAIM = update(tables.host).where(_HOST.name == bindparam("of_host"), _HOST.generation == bindparam("from_generation"))
_EXPLAIN = update(tables.session).where(_SESSION.sid == bindparam("of_sid"), _SESSION.state == State.QUEUED.value)


class Transaction:
    """Changes that are committed together. Made by `Writer.begin`.

    It begins at the first question or change: most of what hosts say changes nothing, and must not cost a commit.
    """

    def __init__(self, engine: Engine, begin: Callable[[], Connection]) -> None:
        self._begin = begin
        self._begun: Connection | None = None
        self._insert = postgresql_insert if engine.dialect.name == "postgresql" else sqlite_insert
        self._add = _ADD[engine.dialect.name]

    @property
    def _connection(self) -> Connection:
        if self._begun is None:
            self._begun = self._begin()
        return self._begun

    def prove(self) -> None:
        """Begin, if it has not: what goes out to hosts must come from who leads, even when nothing is stored.

        Raises:
            Demoted: somebody else leads.
        """
        _ = self._connection

    def add(self, session: Session) -> bool:
        """Record a new request; False when its sid is already known (a repeat of the same request)."""
        resources = session.resources
        row = {
            "sid": session.sid,
            "user": session.user,
            "machine": session.machine,
            "cpus": resources.cpus,
            "memory_mib": resources.memory_mib,
            "disk_gib": resources.disk_gib,
            "gpus": resources.gpus,
            "gpu_model": resources.gpu_model,
            "persistent": session.persistent,
            "wait_s": session.wait_s,
            "groups": json.dumps(session.groups),
            "queue_class": session.queue_class,
            "created_at": session.created_at,
            "verdicts": "[]",
            **session_values(session),
        }
        # RETURNING, not rowcount: psycopg reports -1 rows for an insert that returns its identity.
        return self._connection.execute(self._add, row).first() is not None

    def session(self, sid: str) -> Session | None:
        """One session as this transaction sees it."""
        query = select(tables.session).where(tables.session.c.sid == sid)
        row = self._connection.execute(query).mappings().first()
        return to_session(row) if row else None

    def live_sessions(self) -> list[Session]:
        """Every session that has not ended, oldest request first."""
        return live_sessions(self._connection)

    def hosts(self) -> list[Host]:
        """Every host that ever reported, without its report: only what hosts say now decides."""
        return all_hosts(self._connection, with_reports=False)

    def save(self, before: Session, after: Session, event: Event, verdicts: Sequence[Verdict] = ()) -> None:
        """Move a session from `before` to `after` and write the step to its timeline.

        Raises:
            Conflict: the row is not in `before`'s state and generation any more, or a GPU is held by another session.
        """
        row = {
            "of_sid": before.sid,
            "from_state": before.state.value,
            "from_generation": before.generation,
            "verdicts": verdicts_text(verdicts),
            **session_values(after),
        }
        if self._connection.execute(_SAVE, row).rowcount != 1:
            raise Conflict(f"session {before.sid} is no longer {before.state} under {before.generation}")
        held = (before.host, before.gpu_addresses) if before.on_host else ("", ())
        holds = (after.host, after.gpu_addresses) if after.on_host else ("", ())
        if held != holds and (held[1] or holds[1]):
            self._hold_gpus(after)
        # A failed start takes the host from the session; the timeline keeps on which it was.
        self.note(after, event, after.host or before.host)

    def _hold_gpus(self, session: Session) -> None:
        self._connection.execute(delete(tables.gpu_hold).where(tables.gpu_hold.c.sid == session.sid))
        if not (session.on_host and session.gpu_addresses):
            return
        rows = [{"host": session.host, "address": a, "sid": session.sid} for a in session.gpu_addresses]
        try:
            self._connection.execute(insert(tables.gpu_hold), rows)
        except IntegrityError as error:
            raise Conflict(f"a GPU of {session.host} is held by another session") from error

    def note(self, session: Session, event: Event, host: str) -> None:
        """Write a step to a session's timeline; `host` is where it happened, "" for none."""
        row = {
            "sid": session.sid,
            "at": session.changed_at,
            "event": event.value,
            "state": session.state.value,
            "host": host,
            "reason": session.reason.value if session.reason else None,
            "detail": session.detail,
        }
        self._connection.execute(_NOTE, row)

    def explain(self, rows: Sequence[tuple[str, Wait, float]]) -> None:
        """Store what keeps waiting sessions (by sid) from starting, and how many seconds each has waited."""
        if not rows:
            return
        self._connection.execute(
            _EXPLAIN,
            [
                {
                    "of_sid": sid,
                    "verdicts": verdicts_text(wait.verdicts),
                    "place": wait.place,
                    "estimate_s": wait.estimate_s,
                    "waited_s": waited_s,
                }
                for sid, wait, waited_s in rows
            ],
        )

    def failed_starts(self) -> list[tuple[str, Verdict]]:
        """The failed starts of those who wait again: sid, and what happened on which host, oldest first."""
        event, session = tables.session_event, tables.session
        query = (
            select(event.c.sid, event.c.host, event.c.reason, event.c.detail)
            .join(session, session.c.sid == event.c.sid)
            .where(event.c.event == Event.RETRY.value, session.c.state != State.ENDED.value)
            .order_by(event.c.id)
        )
        return [
            (row.sid, Verdict(row.host, Reason(row.reason), row.detail))
            for row in self._connection.execute(query)
            if row.reason
        ]

    def claim(self, host: str, generation: int) -> int:
        """Take the next command number of a host: placement lock, order of commands and fencing token in one.

        Raises:
            Conflict: the host's number is not `generation` any more.
        """
        row = {"of_host": host, "from_generation": generation, "generation": generation + 1}
        if self._connection.execute(_CLAIM, row).rowcount != 1:
            raise Conflict(f"host {host} is no longer at generation {generation}")
        return generation + 1

    def add_host(self, name: str) -> None:
        """Record a host at its first report."""
        query = self._insert(tables.host).values(
            name=name, generation=0, draining=False, dead=False, message="", seen_at=0.0, report="", figures=""
        )
        self._connection.execute(query.on_conflict_do_nothing(index_elements=["name"]))

    def drain(self, host: str, draining: bool, message: str = "") -> bool:
        """Take a host out of placement, or put it back; False when no such host is known."""
        query = update(tables.host).where(tables.host.c.name == host)
        return self._connection.execute(query.values(draining=draining, message=message)).rowcount == 1

    def set_dead(self, host: str, dead: bool) -> None:
        """Mark a host as declared dead, or as back."""
        self._connection.execute(update(tables.host).where(tables.host.c.name == host).values(dead=dead))

    def raise_generation(self, host: str, generation: int) -> None:
        """Never hand out a number that a host has already seen (a restored ledger may be behind)."""
        self._connection.execute(
            update(tables.host)
            .where(tables.host.c.name == host, tables.host.c.generation < generation)
            .values(generation=generation)
        )

    def save_reports(self, reports: Sequence[tuple[HostReport, float]]) -> None:
        """Store the full report of several hosts with the time of arrival (UNIX seconds)."""
        if reports:
            query = update(tables.host).where(tables.host.c.name == bindparam("host_name"))
            rows = [
                {"host_name": report.host, "report": encode(report)[1].decode(), "figures": "", "seen_at": seen_at}
                for report, seen_at in reports
            ]
            self._connection.execute(query, rows)

    def save_figures(self, reports: Sequence[tuple[HostReport, float]]) -> None:
        """Store what small heartbeats have changed of several hosts' reports, and the time of arrival."""
        if reports:
            query = update(tables.host).where(tables.host.c.name == bindparam("host_name"))
            rows = [
                {"host_name": report.host, "figures": figures_text(report), "seen_at": seen_at}
                for report, seen_at in reports
            ]
            self._connection.execute(query, rows)


class Writer:
    """The one writer of the ledger. With a `lease`, each transaction begins by proving it."""

    def __init__(self, engine: Engine, lease: Lease | None = None) -> None:
        self._engine = engine
        self._lease = lease

    @contextmanager
    def begin(self) -> Iterator[Transaction]:
        """A transaction: committed when the block ends, rolled back when it raises.

        Raises:
            Demoted: somebody else leads.
        """
        with ExitStack() as stack:

            def open_it() -> Connection:
                connection = stack.enter_context(self._engine.begin())
                if self._lease:
                    self._lease.prove(connection)
                return connection

            yield Transaction(self._engine, open_it)
