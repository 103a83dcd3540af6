"""Questions about the ledger. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, bindparam, select

from deskfleet.ledger import tables
from deskfleet.ledger.rows import to_host, to_session, to_verdicts
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Host
from deskfleet.schemas.session import Event, Session, State
from deskfleet.schemas.verdict import Verdict


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """One step in a session's life, for its timeline; `at` is UNIX seconds."""

    at: float
    event: Event
    state: State
    host: str
    reason: Reason | None
    detail: str


@dataclass(frozen=True, slots=True)
class Wait:
    """A waiting session: its `place` (1 = next; None before the first look), in how many seconds it starts at the
    latest as far as lease ends tell (None: unknown), and what kept it from starting."""

    place: int | None
    estimate_s: float | None
    verdicts: tuple[Verdict, ...]


# Made once: what pages poll is asked hundreds of times a second, and making a statement takes as long as running it.
_SESSION = select(tables.session).where(tables.session.c.sid == bindparam("of_sid"))
_TIMELINE = (
    select(tables.session_event)
    .where(tables.session_event.c.sid == bindparam("of_sid"))
    .order_by(tables.session_event.c.id)
)


def live_sessions(connection: Connection) -> list[Session]:
    """Every session that has not ended, oldest request first."""
    query = select(tables.session).where(tables.session.c.state != State.ENDED.value)
    return [to_session(row) for row in connection.execute(query.order_by(tables.session.c.ordinal)).mappings()]


def all_hosts(connection: Connection, *, with_reports: bool = True) -> list[Host]:
    """Every host that ever reported, by name. Reports take long to read: leave them out where nobody looks at them."""
    rows = connection.execute(select(tables.host).order_by(tables.host.c.name)).mappings()
    return [to_host(row, with_report=with_reports) for row in rows]


class Reader:
    """The ledger as portal and CLI see it. Each call is one short read transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def session(self, sid: str) -> Session | None:
        """One session, or None when the scheduler has not recorded it."""
        with self._engine.connect() as connection:
            row = connection.execute(_SESSION, {"of_sid": sid}).mappings().first()
            return to_session(row) if row else None

    def watched(self, sid: str) -> tuple[Session, Wait | None] | None:
        """The same, with what the scheduler found out at its last look while the session waits."""
        with self._engine.connect() as connection:
            row = connection.execute(_SESSION, {"of_sid": sid}).mappings().first()
        if row is None:
            return None
        session = to_session(row)
        waits = session.state is State.QUEUED
        return session, Wait(row["place"], row["estimate_s"], to_verdicts(row)) if waits else None

    def known(self, sids: Iterable[str]) -> set[str]:
        """Which of these requests the ledger holds."""
        query = select(tables.session.c.sid).where(tables.session.c.sid.in_(list(sids)))
        with self._engine.connect() as connection:
            return set(connection.scalars(query))

    def live(self) -> list[Session]:
        """Every session that has not ended, oldest request first."""
        with self._engine.connect() as connection:
            return live_sessions(connection)

    def of_user(self, user: str, limit: int = 100) -> list[Session]:
        """A person's sessions, newest request first."""
        query = select(tables.session).where(tables.session.c.user == user)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(tables.session.c.ordinal.desc()).limit(limit)).mappings()
            return [to_session(row) for row in rows]

    def recent(self, limit: int = 200) -> list[Session]:
        """The newest requests of everybody, newest first."""
        query = select(tables.session).order_by(tables.session.c.ordinal.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [to_session(row) for row in connection.execute(query).mappings()]

    def hosts(self) -> list[Host]:
        """Every host that ever reported, by name."""
        with self._engine.connect() as connection:
            return all_hosts(connection)

    def host(self, name: str) -> Host | None:
        """One host; None when it never reported."""
        with self._engine.connect() as connection:
            row = connection.execute(select(tables.host).where(tables.host.c.name == name)).mappings().first()
            return to_host(row) if row else None

    def host_names(self) -> list[str]:
        """The names of all hosts, without reading their reports."""
        with self._engine.connect() as connection:
            return list(connection.scalars(select(tables.host.c.name).order_by(tables.host.c.name)))

    def timeline(self, sid: str) -> list[SessionEvent]:
        """What happened to a session, oldest first."""
        with self._engine.connect() as connection:
            rows = connection.execute(_TIMELINE, {"of_sid": sid}).mappings()
            return [
                SessionEvent(
                    row["at"],
                    Event(row["event"]),
                    State(row["state"]),
                    row["host"],
                    Reason(row["reason"]) if row["reason"] else None,
                    row["detail"],
                )
                for row in rows
            ]

    def waits(self, sids: Iterable[str]) -> dict[str, Wait]:
        """What the scheduler found out about these sessions at its last look; those that do not wait are left out."""
        session = tables.session.c
        query = select(session.sid, session.place, session.estimate_s, session.verdicts).where(
            session.sid.in_(list(sids)), session.state == State.QUEUED.value
        )
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings()
            return {row["sid"]: Wait(row["place"], row["estimate_s"], to_verdicts(row)) for row in rows}

    def wait(self, sid: str) -> Wait | None:
        """The same for one session; None when it does not wait."""
        found = self.watched(sid)
        return found[1] if found else None
