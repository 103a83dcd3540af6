"""What pages and mails ask the ledger again and again: small questions that read no host's whole report."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Engine, select

from deskfleet.ledger import tables
from deskfleet.runtime.service import Clock
from deskfleet.schemas.session import Event, State


@dataclass(frozen=True, slots=True)
class HostState:
    """What concerns the people on a host. `silent`: it was not heard lately, so what it runs is unknown; `dead`: an
    administrator declared it so; `message` is the administrator's, while it is being drained."""

    silent: bool
    dead: bool
    message: str


@dataclass(frozen=True, slots=True)
class Started:
    """A desktop that runs after a wait."""

    sid: str
    user: str
    machine: str


@dataclass(frozen=True, slots=True)
class Ending:
    """A running desktop that has `left_s` seconds of its `lifetime_s` left."""

    sid: str
    user: str
    machine: str
    lifetime_s: int
    left_s: float


class Records:
    """Small questions to the ledger. `silent_s` is after how many seconds a host that says nothing counts as silent.

    Every method raises SQLAlchemy's DBAPIError when the ledger can't be read.
    """

    def __init__(self, engine: Engine, clock: Clock, silent_s: float) -> None:
        self._engine = engine
        self._clock = clock
        self._silent_s = silent_s

    def silent(self, seen_at: float) -> bool:
        """Whether a host that was heard last at this time (UNIX seconds; 0 = never) is silent now."""
        return not seen_at or self._clock.wall() - seen_at > self._silent_s

    def hosts(self, names: Collection[str]) -> dict[str, HostState]:
        """The state of these hosts by name."""
        wanted = {name for name in names if name}
        if not wanted:
            return {}
        host = tables.host.c
        query = select(host.name, host.seen_at, host.dead, host.draining, host.message).where(host.name.in_(wanted))
        with self._engine.connect() as connection:
            return {
                row.name: HostState(
                    bool(row.dead) or self.silent(row.seen_at), bool(row.dead), row.message if row.draining else ""
                )
                for row in connection.execute(query)
            }

    def left_s(self, sid: str) -> float | None:
        """How many seconds of its lifetime a desktop has left; None when it does not run."""
        session = tables.session.c
        query = select(session.changed_at + session.lifetime_s).where(
            session.sid == sid, session.state == State.RUNNING.value
        )
        with self._engine.connect() as connection:
            ends_at = connection.scalar(query)
        return None if ends_at is None else max(0.0, ends_at - self._clock.wall())

    def ending(self, within_s: float) -> list[Ending]:
        """The running desktops whose lifetime is over in `within_s` seconds."""
        session, now = tables.session.c, self._clock.wall()
        ends_at = session.changed_at + session.lifetime_s
        query = select(session.sid, session.user, session.machine, session.lifetime_s, ends_at.label("ends_at")).where(
            session.state == State.RUNNING.value, ends_at > now, ends_at <= now + within_s
        )
        with self._engine.connect() as connection:
            return [
                Ending(row.sid, row.user, row.machine, row.lifetime_s, row.ends_at - now)
                for row in connection.execute(query)
            ]

    def started_late(self, after_s: float, within_s: float) -> list[Started]:
        """The desktops that came to run in the last `within_s` seconds after a wait of at least `after_s`."""
        session, step = tables.session.c, tables.session_event.c
        query = (
            select(session.sid, session.user, session.machine)
            .join(tables.session_event, session.sid == step.sid)
            .where(
                session.state == State.RUNNING.value,
                session.changed_at >= self._clock.wall() - within_s,
                step.event == Event.PLACE.value,
                step.at - session.created_at >= after_s,
            )
            .distinct()
        )
        with self._engine.connect() as connection:
            return [Started(row.sid, row.user, row.machine) for row in connection.execute(query)]
