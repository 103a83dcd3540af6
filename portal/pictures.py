"""Pictures of screens: asked for from the hosts while somebody looks at a list of desktops, and the last one of a
desktop that failed, which is kept.

A host is believed about the desktops that the ledger says are on it, and about nothing else. That a picture is one is
checked where it is decoded; what is in it is drawn by the owner's browser alone.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass

from sqlalchemy import delete, select

from deskfleet.ledger.reader import Reader
from deskfleet.portal import tables
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.store import Store, upsert
from deskfleet.runtime.bus import Bus, Delivery, Outgoing, run_callback
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DecodeError
from deskfleet.schemas.messages import VmLook, VmPicture
from deskfleet.schemas.topology import COMMANDS, LOOK_TTL_MS, look_queue, pictures_queue
from deskfleet.schemas.wire import decode_as, encode

log = logging.getLogger(__name__)

#: A picture is asked for again when it is older than this, and shown no longer than that (seconds).
FRESH_S = 5.0
SHOWN_S = 120.0
_ASK_AGAIN_S = 2.0
_MOST_HELD = 500
_KEEP_S = 30 * 24 * 3600.0


@dataclass(slots=True)
class _Seen:
    """What is known of one screen: on which host it was asked for, when, and what came."""

    host: str
    asked_at: float
    png: bytes = b""
    at: float = float("-inf")


class Pictures:
    """Pictures for the pages of this process, `replica`. Any thread may ask; what hosts send comes on the portal's."""

    def __init__(self, store: Store, reader: Reader, bus: Bus, replica: str, clock: Clock) -> None:
        self._store = store
        self._reader = reader
        self._bus = bus
        self._replica = replica
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        bus.consume(pictures_queue(replica), self._take)

    def of(self, desktop: Desktop) -> bytes | None:
        """The newest picture of a running desktop's screen, None when there is none yet. A newer one is asked for, and
        is there when the page asks again."""
        if not desktop.running or desktop.host_silent:
            return None
        now = self._clock.monotonic()
        with self._lock:
            seen = self._seen.get(desktop.sid)
            if seen is None or seen.host != desktop.host:
                seen = self._seen[desktop.sid] = _Seen(desktop.host, float("-inf"))
            self._seen.move_to_end(desktop.sid)
            while len(self._seen) > _MOST_HELD:
                self._seen.popitem(last=False)
            ask = now - seen.at > FRESH_S and now - seen.asked_at > _ASK_AGAIN_S
            if ask:
                seen.asked_at = now
            png = seen.png if now - seen.at < SHOWN_S else b""
        if ask:
            self._ask(desktop)
        return png or None

    def _ask(self, desktop: Desktop) -> None:
        kind, body = encode(VmLook(desktop.sid, self._replica))
        key = look_queue(desktop.host)
        # Nobody waits for it, and a wish that got lost costs nothing: the page asks again.
        ttl_s = LOOK_TTL_MS / 1000
        self._bus.publish(Outgoing(COMMANDS, key, kind, body, durable=False, mandatory=False, ttl_seconds=ttl_s))

    def _take(self, delivery: Delivery) -> None:
        delivery.ack()
        try:
            picture = decode_as(VmPicture, delivery.type, delivery.body)
        except DecodeError as error:
            log.warning("a picture can't be read: %s", error)
            return
        if delivery.sender != f"agent-{picture.host}":
            log.warning("a picture of %s that %r sent is not believed", picture.host, delivery.sender)
        elif picture.last:
            run_callback(lambda: self._keep(picture), "keeping a last picture")
        else:
            with self._lock:
                seen = self._seen.get(picture.sid)
                if seen and seen.host == picture.host:
                    seen.png, seen.at = picture.png, self._clock.monotonic()

    def _keep(self, picture: VmPicture) -> None:
        """Store the last picture of a desktop; several portals hear of it, and one of them is first."""
        session = self._reader.session(picture.sid)
        if session is None or session.host != picture.host:
            log.warning("a last picture from %s, of a desktop that is not there, is not believed", picture.host)
            return
        with self._store.writing() as connection:
            row = upsert(connection, tables.frame).values(sid=picture.sid, at=self._clock.wall(), png=picture.png)
            connection.execute(row.on_conflict_do_nothing(index_elements=["sid"]))

    def last(self, sid: str) -> bytes | None:
        """The last picture of a desktop that failed. Raises DBAPIError."""
        with self._store.reading() as connection:
            return connection.scalar(select(tables.frame.c.png).where(tables.frame.c.sid == sid))

    def has_last(self, sid: str) -> bool:
        """Whether there is one."""
        with self._store.reading() as connection:
            return connection.scalar(select(tables.frame.c.at).where(tables.frame.c.sid == sid)) is not None

    def prune(self) -> None:
        """Forget pictures of long ago."""
        with self._store.writing() as connection:
            connection.execute(delete(tables.frame).where(tables.frame.c.at < self._clock.wall() - _KEEP_S))
