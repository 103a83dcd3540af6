"""What people asked for, stored before it is answered and sent until the scheduler is seen to know it.

A request goes stored -> sent (the broker confirmed it) -> known (the ledger shows its effect), or it expires, or it
is cancelled. Sending twice is harmless: the scheduler knows a request by its session id.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from sqlalchemy import ColumnElement, RowMapping, bindparam, delete, func, or_, select, update
from sqlalchemy.exc import DBAPIError

from deskfleet.ledger.reader import Reader
from deskfleet.portal import tables
from deskfleet.portal.store import Store, upsert
from deskfleet.runtime.bus import Bus, Outgoing
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DecodeError
from deskfleet.schemas.messages import LaunchRequested, StopRequested
from deskfleet.schemas.session import State
from deskfleet.schemas.topology import COMMANDS
from deskfleet.schemas.wire import decode_as, encode

log = logging.getLogger(__name__)

#: A stop that nobody takes up for a day is told to the log and given up; the page offers it again.
STOP_DEADLINE_S = 24 * 3600.0
_KEEP_S = 30 * 24 * 3600.0
_BATCH = 500
_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 60.0


class Kind(StrEnum):
    """What is asked for."""

    LAUNCH = "launch"
    STOP = "stop"


class Stage(StrEnum):
    """How far a request has come."""

    STORED = "stored"
    SENT = "sent"
    KNOWN = "known"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


OPEN = (Stage.STORED, Stage.SENT)


@dataclass(frozen=True, slots=True)
class Request:
    """A stored request; `launch` is what a launch asks for. Times are UNIX seconds."""

    sid: str
    kind: Kind
    user: str
    stage: Stage
    created_at: float
    deadline: float
    launch: LaunchRequested | None


def _is_open() -> ColumnElement[bool]:
    # Not IN: SQLAlchemy expands that anew at each execution.
    return or_(*(tables.request.c.state == stage for stage in OPEN))


# Made once: the pages that poll ask these hundreds of times a second.
_LAUNCH = select(tables.request).where(
    tables.request.c.sid == bindparam("of_sid"), tables.request.c.kind == Kind.LAUNCH
)
_OPEN_STOP = select(tables.request.c.sid).where(tables.request.c.kind == Kind.STOP, _is_open())
_STOPPING = _OPEN_STOP.where(tables.request.c.sid.in_(bindparam("of_sids", expanding=True)))
_STOP_ASKED = _OPEN_STOP.where(tables.request.c.sid == bindparam("of_sid"))


class Outbox:
    """Requests on their way. `defer` runs an action soon on the portal's own thread; `bus` may be down at any time."""

    def __init__(
        self, store: Store, reader: Reader, bus: Bus, clock: Clock, defer: Callable[[Callable[[], None]], None]
    ) -> None:
        self._store = store
        self._reader = reader
        self._bus = bus
        self._clock = clock
        self._defer = defer
        # When this process first saw an open request (monotonic seconds). How long one has waited is counted so: by
        # dates, a clock that is set forward would give up what was stored a moment ago.
        self._seen: dict[tuple[str, str], float] = {}

    # What people ask for; any thread.

    def launch(self, message: LaunchRequested) -> bool:
        """Store a launch and begin to send it; False when this sid was asked for before (nothing happens then)."""
        return self._store_and_send(Kind.LAUNCH, message.sid, message.user, message, float(message.wait_s))

    def stop(self, sid: str, actor: str, admin: bool) -> bool:
        """Store a stop and begin to send it. A launch that is still on its way is not sent any more."""
        with self._store.writing() as connection:
            table = tables.request
            mine = (table.c.sid == sid, table.c.kind == Kind.LAUNCH, table.c.state.in_(OPEN))
            connection.execute(update(table).where(*mine).values(state=Stage.CANCELLED))
            # One that was given up may be asked for again.
            connection.execute(delete(table).where(table.c.sid == sid, table.c.kind == Kind.STOP, ~_is_open()))
        return self._store_and_send(Kind.STOP, sid, actor, StopRequested(sid, actor, admin), STOP_DEADLINE_S)

    def find(self, sid: str) -> Request | None:
        """The launch of this sid, when this portal took it."""
        with self._store.reading() as connection:
            row = connection.execute(_LAUNCH, {"of_sid": sid}).mappings().first()
            return _request(row) if row else None

    def stopping(self, sids: Sequence[str]) -> set[str]:
        """Which of these have a stop on its way."""
        with self._store.reading() as connection:
            return set(connection.scalars(_STOPPING, {"of_sids": list(sids)}))

    def stop_asked(self, sid: str) -> bool:
        """Whether this one has a stop on its way."""
        with self._store.reading() as connection:
            return connection.execute(_STOP_ASKED, {"of_sid": sid}).first() is not None

    def launches_of(self, user: str, limit: int = 100) -> list[Request]:
        """A person's launches, newest first."""
        table = tables.request
        query = select(table).where(table.c.user == user, table.c.kind == Kind.LAUNCH)
        with self._store.reading() as connection:
            rows = connection.execute(query.order_by(table.c.created_at.desc()).limit(limit)).mappings()
            return [_request(row) for row in rows]

    def waiting(self, user: str = "") -> int:
        """How many requests (of one person, or of all) the scheduler has not been seen to know."""
        query = select(func.count()).where(_is_open())
        with self._store.reading() as connection:
            return int(connection.scalar(query.where(tables.request.c.user == user) if user else query) or 0)

    def _store_and_send(
        self, kind: Kind, sid: str, user: str, message: LaunchRequested | StopRequested, patience_s: float
    ) -> bool:
        now = self._clock.wall()
        name, body = encode(message)
        row = {
            "sid": sid,
            "kind": kind.value,
            "user": user,
            "type": name,
            "body": body.decode(),
            "created_at": now,
            "deadline": now + patience_s,
            "next_try_at": now + _FIRST_PAUSE_S,
            "tries": 1,
            "state": Stage.STORED.value,
        }
        with self._store.writing() as connection:
            insertion = upsert(connection, tables.request).values(row)
            once = insertion.on_conflict_do_nothing(index_elements=["sid", "kind"]).returning(tables.request.c.sid)
            if connection.execute(once).first() is None:
                return False
        self._seen[sid, kind.value] = self._clock.monotonic()
        self._publish(sid, kind, name, body, patience_s)
        return True

    # Sending; the bus answers on its own thread, which must not wait for the database.

    def _publish(self, sid: str, kind: Kind, name: str, body: bytes, left_s: float) -> None:
        # It dies in the queue when its time is over, so that no desktop starts that nobody waits for any more.
        message = Outgoing(COMMANDS, "scheduler", name, body, correlation_id=sid, ttl_seconds=max(0.0, left_s))
        self._bus.publish(message).add_done_callback(partial(self._answered, sid, kind))

    def _answered(self, sid: str, kind: Kind, done: Future[None]) -> None:
        error = done.exception()
        if error is None:
            self._defer(partial(self._mark, sid, kind, Stage.SENT))
        else:
            log.warning("a %s of session %s is stored and will be sent again: %s", kind, sid, error)

    def _mark(self, sid: str, kind: Kind, stage: Stage) -> None:
        mine = (tables.request.c.sid == sid, tables.request.c.kind == kind, _is_open())
        with self._store.writing() as connection:
            connection.execute(update(tables.request).where(*mine).values(state=stage))

    def sweep(self) -> None:
        """Close what the ledger knows, give up what is too late, send the rest again. Repeated every second or two."""
        table = tables.request
        query = select(table).where(_is_open()).order_by(table.c.created_at).limit(_BATCH)
        with self._store.reading() as connection:
            rows = list(connection.execute(query).mappings())
        now = self._clock.monotonic()
        seen = dict(self._seen)
        still_open = {key: seen.get(key, now) for row in rows for key in [(row["sid"], row["kind"])]}
        # A full batch may not be all that are open: nothing is forgotten then.
        self._seen = {**seen, **still_open} if len(rows) == _BATCH else still_open
        if not rows:
            return
        known = self._known(rows)
        for row in rows:
            kind = Kind(row["kind"])
            # Not from self._seen: a sweep on another thread that no longer found this one open may have replaced it.
            left_s = float(row["deadline"] - row["created_at"]) - (now - still_open[row["sid"], row["kind"]])
            if known is not None and (row["sid"], kind) in known:
                self._mark(row["sid"], kind, Stage.KNOWN)
            elif known is not None and left_s <= 0:
                log.warning("the %s of session %s was not taken up in time", kind, row["sid"])
                self._mark(row["sid"], kind, Stage.EXPIRED)
            elif self._bus.connected and self._claim(row):
                self._publish(row["sid"], kind, row["type"], row["body"].encode(), left_s)

    def _known(self, rows: Sequence[RowMapping]) -> set[tuple[str, Kind]] | None:
        """Which requests show their effect in the ledger; None while it can't be read."""
        try:
            launched = self._reader.known(row["sid"] for row in rows if row["kind"] == Kind.LAUNCH)
            known = {(sid, Kind.LAUNCH) for sid in launched}
            for row in rows:
                if row["kind"] == Kind.STOP:
                    session = self._reader.session(row["sid"])
                    if session and session.state in (State.STOPPING, State.ENDED):
                        known.add((session.sid, Kind.STOP))
        except DBAPIError as error:
            log.warning("the ledger can't be read: %s", type(error.orig).__name__)
            return None
        return known

    def _claim(self, row: RowMapping) -> bool:
        """Take the next try, which several portals may want; also settles when the one after is due."""
        now = self._clock.wall()
        # What the broker never confirmed is urgent. What it did confirm is most likely waiting there.
        pause = _FIRST_PAUSE_S if row["state"] == Stage.STORED else min(_LONGEST_PAUSE_S, 5.0 * 2.0 ** row["tries"])
        table = tables.request
        query = (
            update(table)
            .where(
                table.c.sid == row["sid"],
                table.c.kind == row["kind"],
                _is_open(),
                table.c.tries == row["tries"],
                # A date that lies far ahead comes from a clock that was set back since.
                or_(table.c.next_try_at <= now, table.c.next_try_at > now + 2 * _LONGEST_PAUSE_S),
            )
            .values(tries=row["tries"] + 1, next_try_at=now + pause)
        )
        with self._store.writing() as connection:
            return connection.execute(query).rowcount == 1

    def prune(self) -> None:
        """Forget requests that were closed long ago; the ledger keeps their history."""
        old = tables.request.c.created_at < self._clock.wall() - _KEEP_S
        with self._store.writing() as connection:
            connection.execute(delete(tables.request).where(old, ~_is_open()))


def _request(row: RowMapping) -> Request:
    launch = None
    if row["kind"] == Kind.LAUNCH:
        try:
            launch = decode_as(LaunchRequested, row["type"], row["body"].encode())
        except DecodeError as error:
            log.error("a stored request can't be read: %s", error)
    return Request(
        row["sid"], Kind(row["kind"]), row["user"], Stage(row["state"]), row["created_at"], row["deadline"], launch
    )
