"""Questions about the ledger. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, func, select

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


def live_sessions(connection: Connection) -> list[Session]:
    """Every session that has not ended, oldest request first."""
    query = select(tables.session).where(tables.session.c.state != State.ENDED.value)
    return [to_session(row) for row in connection.execute(query.order_by(tables.session.c.ordinal)).mappings()]


def all_hosts(connection: Connection) -> list[Host]:
    """Every host that ever reported, by name."""
    return [to_host(row) for row in connection.execute(select(tables.host).order_by(tables.host.c.name)).mappings()]


class Reader:
    """The ledger as portal and CLI see it. Each call is one short read transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def session(self, sid: str) -> Session | None:
        """One session, or None when the scheduler has not recorded it."""
        with self._engine.connect() as connection:
            row = connection.execute(select(tables.session).where(tables.session.c.sid == sid)).mappings().first()
            return to_session(row) if row else None

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

    def timeline(self, sid: str) -> list[SessionEvent]:
        """What happened to a session, oldest first."""
        query = select(tables.session_event).where(tables.session_event.c.sid == sid)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(tables.session_event.c.id)).mappings()
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

    def verdicts(self, sid: str) -> tuple[Verdict, ...]:
        """Why each host refused a session at the last try."""
        with self._engine.connect() as connection:
            row = connection.execute(select(tables.session.c.verdicts).where(tables.session.c.sid == sid)).first()
            return to_verdicts({"verdicts": row[0]}) if row else ()

    def place_in_queue(self, sid: str) -> int | None:
        """1 for the next to be placed; None when the session does not wait."""
        waiting = tables.session.alias()
        mine = select(tables.session.c.ordinal).where(
            tables.session.c.sid == sid, tables.session.c.state == State.QUEUED.value
        )
        with self._engine.connect() as connection:
            ordinal = connection.scalar(mine)
            if ordinal is None:
                return None
            query = select(func.count()).where(waiting.c.state == State.QUEUED.value, waiting.c.ordinal <= ordinal)
            return int(connection.scalar(query) or 0)
