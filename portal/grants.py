"""What rights to consoles come from, and how they end: each proxy is told, and tells who is there.

A right that ended is announced until the broker has taken the announcement, and for a while after that, since a proxy
that has just come back missed the first one. Consoles are cut within a second or two.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection, delete, or_, select, update

from deskfleet.portal import tables
from deskfleet.portal.store import Store, digest, upsert
from deskfleet.runtime.bus import Bus, Delivery, Outgoing
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DecodeError
from deskfleet.schemas.messages import Console, ConsolesAsked, ConsolesListed, GrantRevoked
from deskfleet.schemas.topology import CONSOLES, QUESTION_TTL_MS, viewers_queue
from deskfleet.schemas.wire import decode_as, encode

log = logging.getLogger(__name__)

#: A revocation is repeated so often, for so long after the broker took the first (seconds), and kept so long.
_AGAIN_S = 3.0
_REPEAT_S = 60.0
_KEEP_S = 24 * 3600.0
#: Proxies are asked again when what they said is older than this; what is older than that is not shown.
_FRESH_S = 2.0
_SHOWN_S = 10.0
_MOST_HELD = 500
_PROXY = "proxy"
_NO_SID = "0" * 32


def login_grant(secret: str) -> str:
    """The grant of a login or an access token, by its secret."""
    return grant_of(digest(secret))


def grant_of(digest_: str) -> str:
    """The same, by what is kept of the secret."""
    return f"login-{digest_[:16]}"


def end(connection: Connection, grants: Iterable[str], now: float) -> None:
    """End these rights within a transaction that changes what they come from; the next sweep announces it."""
    rows = [{"grant": grant, "at": now, "told_at": None, "next_at": now} for grant in grants]
    if rows:
        insertion = upsert(connection, tables.revocation)
        again = {name: insertion.excluded[name] for name in ("at", "told_at", "next_at")}
        connection.execute(insertion.on_conflict_do_update(index_elements=["grant"], set_=again), rows)


@dataclass(frozen=True, slots=True)
class _Said:
    consoles: tuple[Console, ...]
    at: float


class Grants:
    """Ends rights, and knows who has a desktop open. Any thread may call; `replica` names this process on the bus."""

    def __init__(self, store: Store, bus: Bus, replica: str, clock: Clock) -> None:
        self._store = store
        self._bus = bus
        self._replica = replica
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: dict[str, float] = {}
        self._said: dict[str, dict[str, _Said]] = {}
        bus.consume(viewers_queue(replica), self._take)

    def revoke(self, grants: Iterable[str]) -> None:
        """End these rights, now and for good."""
        ended = list(grants)
        if not ended:
            return
        with self._store.writing() as connection:
            end(connection, ended, self._clock.wall())
        self.sweep()

    def sweep(self) -> None:
        """Announce what is due. Repeated every second; several portals may announce the same."""
        now, row = self._clock.wall(), tables.revocation.c
        fresh = or_(row.told_at.is_(None), row.told_at > now - _REPEAT_S)
        query = select(row.grant).where(fresh, or_(row.next_at <= now, row.next_at > now + 2 * _AGAIN_S))
        if not self._bus.connected:
            return
        with self._store.reading() as connection:
            due = list(connection.scalars(query))
        for grant in due:
            with self._store.writing() as connection:
                connection.execute(update(tables.revocation).where(row.grant == grant).values(next_at=now + _AGAIN_S))
            kind, body = encode(GrantRevoked(grant))
            sent = self._bus.publish(Outgoing(CONSOLES, "", kind, body, durable=False, mandatory=False))
            sent.add_done_callback(partial(self._told, grant))

    def _told(self, grant: str, sent: Future[None]) -> None:
        if sent.exception() is None:
            row = tables.revocation.c
            with self._store.writing() as connection:
                connection.execute(
                    update(tables.revocation)
                    .where(row.grant == grant, row.told_at.is_(None))
                    .values(told_at=self._clock.wall())
                )

    def prune(self) -> None:
        """Forget revocations of long ago."""
        with self._store.writing() as connection:
            connection.execute(delete(tables.revocation).where(tables.revocation.c.at < self._clock.wall() - _KEEP_S))

    def consoles(self, sid: str) -> list[Console]:
        """Who has a desktop open, the longest first; what proxies have said a moment ago. They are asked again, so
        that a page which asks again is up to date."""
        now = self._clock.monotonic()
        with self._lock:
            ask = now - self._asked.get(sid, float("-inf")) > _FRESH_S
            if ask:
                if len(self._asked) >= _MOST_HELD:
                    self._asked.clear()
                    self._said.clear()
                self._asked[sid] = now
            known = [said for said in self._said.get(sid, {}).values() if now - said.at < _SHOWN_S]
        if ask:
            kind, body = encode(ConsolesAsked(sid, self._replica))
            ttl_s = QUESTION_TTL_MS / 1000
            self._bus.publish(Outgoing(CONSOLES, "", kind, body, durable=False, mandatory=False, ttl_seconds=ttl_s))
        return sorted((console for said in known for console in said.consoles), key=lambda console: -console.open_s)

    def proxies(self) -> Future[None]:
        """Ask whether any proxy listens: it fails with Unroutable when none does, and with BusError when nobody can
        tell. What proxies answer is nothing, for nobody has this desktop open."""
        kind, body = encode(ConsolesAsked(_NO_SID, self._replica))
        return self._bus.publish(Outgoing(CONSOLES, "", kind, body, durable=False, ttl_seconds=QUESTION_TTL_MS / 1000))

    def _take(self, delivery: Delivery) -> None:
        delivery.ack()
        try:
            listed = decode_as(ConsolesListed, delivery.type, delivery.body)
        except DecodeError as error:
            log.warning("a list of consoles can't be read: %s", error)
            return
        if delivery.sender != _PROXY:
            log.warning("a list of consoles that %r sent is not believed", delivery.sender)
            return
        with self._lock:
            if listed.sid in self._asked:
                said = self._said.setdefault(listed.sid, {})
                if len(said) < _MOST_HELD:
                    said[listed.proxy] = _Said(listed.consoles, self._clock.monotonic())
