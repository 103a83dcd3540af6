"""Messages that nobody could take: kept where an administrator can look at them, send them again or drop them.

A queue can only be read by taking from it, and giving back costs order and, on newer brokers, a limited number of
tries. So each portal takes what arrives in `dead`, writes it down, and acknowledges after that; what is looked at is a
row. A message that comes twice is the same row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass

from sqlalchemy import ColumnElement, RowMapping, delete, func, select
from sqlalchemy.exc import DBAPIError

from deskfleet.portal import tables
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.languages import N_, gettext
from deskfleet.portal.outbox import Outbox, Stage
from deskfleet.portal.store import Store, upsert
from deskfleet.runtime.bus import Bus, BusError, Delivery, Outgoing
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DecodeError
from deskfleet.schemas.messages import (
    DrainRequested,
    ExtendRequested,
    HostDeclaredDead,
    LaunchRequested,
    StopRequested,
)
from deskfleet.schemas.topology import COMMANDS, DEAD, DEAD_TTL_MS
from deskfleet.schemas.wire import decode

log = logging.getLogger(__name__)

#: So many are kept of all hosts together, and as many of everybody else, so that no host drives out what people asked.
MOST = 1000
#: Longer bodies are kept cut, in bytes: none of ours comes near.
LONGEST_BODY = 64 * 1024
#: What a page shows of a body, in characters.
_LONGEST_SHOWN = 20_000
_AT_ONCE = 50
_PATIENCE_S = 2.0
_AGENT = "agent-"
_NAME = _SID = re.compile(r"[0-9a-f]{32}")

_OF_A_HOST = N_("Only the host itself may say this, and its next heartbeat says what is still true. Discard it.")
_OF_THE_SCHEDULER = N_(
    "Only the scheduler may send this. It sends what still matters again by itself, under a new number. Discard it."
)
_UNREADABLE = N_("It can't be read, so nobody could take it again either. Look at what sent it, and discard it.")
_CUT = N_("It was too long to be kept whole. Look at what sent it, and discard it.")
_DECIDED_THEN = N_(
    "It was decided for that moment. If it still holds, do it again on the host's page; discard this one."
)
_CANCELLED = N_("Whoever asked for it has taken it back since. Discard it.")


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead message. `queue` is where it died, by the broker's word ("" when it did not say), `cause` why: rejected,
    expired, delivery_limit or maxlen. `sender` is the login that the broker vouches for, `sid` the desktop that it is
    about. `size` is the length of the whole body in bytes, of which `body` may be the beginning. `died_at` is UNIX
    seconds.
    """

    number: int
    name: str
    died_at: float
    queue: str
    cause: str
    type: str
    sender: str
    sid: str
    correlation_id: str
    size: int
    body: bytes

    @property
    def text(self) -> str:
        """The body for people: as indented JSON when it is any, bounded."""
        try:
            shown = json.dumps(json.loads(self.body), indent=2, ensure_ascii=False)
        except (ValueError, RecursionError):
            shown = self.body.decode(errors="backslashreplace")
        return shown if len(shown) <= _LONGEST_SHOWN else shown[:_LONGEST_SHOWN] + "…"


class DeadLetters:
    """The dead letters. `login` is the portal's own at the broker; pages may call from any thread."""

    def __init__(self, store: Store, bus: Bus, outbox: Outbox, login: str, clock: Clock) -> None:
        self._store = store
        self._bus = bus
        self._outbox = outbox
        self._login = login
        self._clock = clock
        self._held: list[Delivery] = []
        bus.consume(DEAD, self._arrived, prefetch=_AT_ONCE)

    # Keeping; the portal's own thread.

    def _arrived(self, delivery: Delivery) -> None:
        self._held.append(delivery)
        self.sweep()

    def sweep(self) -> None:
        """Write down what has arrived. What the database does not take now stays unacknowledged, and is tried again
        every second; a broker that lost us meanwhile delivers it again."""
        while self._held:
            row = self._row(self._held[0])
            try:
                with self._store.writing() as connection:
                    insertion = upsert(connection, tables.dead_letter).values(row)
                    connection.execute(insertion.on_conflict_do_nothing(index_elements=["name"]))
            except DBAPIError as error:
                log.error("a dead letter can't be kept and waits: %s", type(error.orig).__name__)
                return
            log.warning("dead letter %s: %s of %s died in %s: %s", *(row[k] for k in _LOGGED))
            self._held.pop(0).ack()
            self._bound()

    def _row(self, delivery: Delivery) -> dict[str, object]:
        death = delivery.death
        parts = [delivery.message_id, delivery.sender, delivery.type, death.queue if death else ""]
        parts += [str(death.at) if death else "", hashlib.sha256(delivery.body).hexdigest()]
        return {
            "name": hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32],
            "kept_at": self._clock.wall(),
            "died_at": death.at if death and death.at else self._clock.wall(),
            "queue": _clean(death.queue if death else ""),
            "cause": _clean(death.reason if death else ""),
            "type": _clean(delivery.type),
            "sender": _clean(delivery.sender),
            "sid": _sid(delivery.body),
            "correlation_id": _clean(delivery.correlation_id),
            "size": len(delivery.body),
            "body": delivery.body[:LONGEST_BODY],
        }

    def _bound(self) -> None:
        letter = tables.dead_letter
        for mine in (letter.c.sender.startswith(_AGENT), ~letter.c.sender.startswith(_AGENT)):
            query = select(letter.c.number).where(mine).order_by(letter.c.number.desc()).offset(MOST).limit(1)
            with self._store.writing() as connection:
                last = connection.scalar(query)
                if last is not None:
                    connection.execute(delete(letter).where(mine, letter.c.number <= last))
                    log.warning("there are too many dead letters: the oldest were dropped")

    def prune(self) -> None:
        """Forget what is as old as the broker would let it become."""
        old = tables.dead_letter.c.kept_at < self._clock.wall() - DEAD_TTL_MS / 1000
        with self._store.writing() as connection:
            connection.execute(delete(tables.dead_letter).where(old))

    # Looking; any thread.

    def count(self, up_to: int | None = None) -> int:
        """How many are kept; with `up_to`, those up to that number."""
        query = select(func.count()).select_from(tables.dead_letter)
        if up_to is not None:
            query = query.where(tables.dead_letter.c.number <= up_to)
        with self._store.reading() as connection:
            return int(connection.scalar(query) or 0)

    def newest(self, limit: int = 100, before: int = 0) -> list[Letter]:
        """The newest first; with `before`, those older than that number."""
        letter = tables.dead_letter
        query = select(letter).order_by(letter.c.number.desc()).limit(limit)
        with self._store.reading() as connection:
            rows = connection.execute(query.where(letter.c.number < before) if before else query).mappings()
            return [_letter(row) for row in rows]

    def find(self, name: str) -> Letter:
        """One of them. Raises Problem."""
        query = select(tables.dead_letter).where(tables.dead_letter.c.name == name)
        row = None
        if _NAME.fullmatch(name):
            with self._store.reading() as connection:
                row = connection.execute(query).mappings().first()
        if row is None:
            raise Problem(Refused.NO_SUCH_LETTER)
        return _letter(row)

    def obstacle(self, letter: Letter) -> str:
        """Why it can't be sent again, in words; "" when it can.

        A message that the portal sends carries the portal's login, so it may only repeat what it sent itself.
        """
        if letter.sender.startswith(_AGENT):
            return gettext(_OF_A_HOST)
        if letter.size > len(letter.body):
            return gettext(_CUT)
        try:
            message = decode(letter.type, letter.body)
        except DecodeError:
            return gettext(_UNREADABLE)
        if isinstance(message, DrainRequested | HostDeclaredDead):
            return gettext(_DECIDED_THEN)
        if letter.sender != self._login or not isinstance(message, LaunchRequested | StopRequested | ExtendRequested):
            return gettext(_OF_THE_SCHEDULER)
        if isinstance(message, LaunchRequested):
            request = self._outbox.find(message.sid)
            if request is not None and request.stage is Stage.CANCELLED:
                return gettext(_CANCELLED)
        return ""

    # Changing; any thread.

    def replay(self, name: str) -> Letter:
        """Send one again to where it was on its way to, and forget it once the broker has it. A crash in between
        leaves it here as well: sent twice is harmless, lost is not.

        Raises:
            Problem: it is gone, may not be sent again, or the queue did not take it.
        """
        letter = self.find(name)
        obstacle = self.obstacle(letter)
        if obstacle:
            raise Problem(Refused.NOT_REPLAYABLE, obstacle)
        message = Outgoing(COMMANDS, "scheduler", letter.type, letter.body, correlation_id=letter.correlation_id)
        try:
            self._bus.publish(message).result(_PATIENCE_S)
        except (BusError, FutureTimeout):
            raise Problem(Refused.QUEUE_AWAY) from None
        self._drop(tables.dead_letter.c.name == name)
        return letter

    def discard(self, name: str) -> Letter:
        """Forget one. Raises Problem when it is gone."""
        letter = self.find(name)
        self._drop(tables.dead_letter.c.name == name)
        return letter

    def discard_all(self, up_to: int) -> int:
        """Forget all up to a number, which is the newest that was looked at; how many they were."""
        return self._drop(tables.dead_letter.c.number <= up_to)

    def _drop(self, which: ColumnElement[bool]) -> int:
        with self._store.writing() as connection:
            return connection.execute(delete(tables.dead_letter).where(which)).rowcount


_LOGGED = ("name", "type", "sender", "queue", "cause")


def _clean(text: str) -> str:
    """What the sender chose, as every database takes it."""
    return text.replace("\0", "\ufffd")[:255]


def _sid(body: bytes) -> str:
    try:
        content = json.loads(body[:LONGEST_BODY])
    except (ValueError, RecursionError):
        return ""
    sid = content.get("sid") if isinstance(content, dict) else None
    return sid if isinstance(sid, str) and _SID.fullmatch(sid) else ""


def _letter(row: RowMapping) -> Letter:
    return Letter(
        row["number"],
        row["name"],
        row["died_at"],
        row["queue"],
        row["cause"],
        row["type"],
        row["sender"],
        row["sid"],
        row["correlation_id"],
        row["size"],
        bytes(row["body"]),
    )
