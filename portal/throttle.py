"""Slowing down those who guess passwords, without locking out those who don't.

A try is counted before the password is looked at and given back when it was right, so that many tries at once gain
nothing. Three counters apply: for this name from this address, for the address, and for the name from everywhere; the
last one delays only those who have failed before, since a flood would else keep out the name's owner.
A browser that has logged in to the name before has a counter of its own, so nobody can keep its owner out. A refused
try counts nothing: whoever waits as told gets in.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select, update

from deskfleet.portal import tables
from deskfleet.portal.store import Store, upsert
from deskfleet.runtime.service import Clock

_FORGET_S = 900.0


@dataclass(frozen=True, slots=True)
class Counter:
    """One thing that is counted: free up to `free` failures, then `first`, twice as many, … seconds between tries, at
    most `cap`. A `shared` one delays only those who have failed before, by the counters that are not."""

    key: str
    free: int
    cap: float
    first: float = 1.0
    shared: bool = False

    def delay(self, failures: int) -> float:
        """Seconds that must lie between the last try and the next."""
        return 0.0 if failures < self.free else min(self.cap, self.first * 2.0 ** min(failures - self.free, 16))


def counters(user: str, address: str, known_browser: str) -> tuple[Counter, ...]:
    """What a try counts against. `known_browser` is the id of a browser that has logged in as `user`, or empty."""
    if known_browser:
        return (Counter(_key("browser", user, known_browser), 5, 60.0),)
    return (
        Counter(_key("pair", user, _network(address, 64)), 3, 60.0),
        # Many people may share an address, so this only slows a flood down.
        Counter(_key("address", _network(address, 48)), 30, 5.0),
        # A flood from everywhere would take each place that comes free: the owner, who did not fail, needs none.
        Counter(_key("name", user), 50, 5.0, shared=True),
    )


def code_counters(address: str, client: str, known_browser: str) -> tuple[Counter, ...]:
    """What asking for a code by mail counts against: `address` is where it would go, `client` who asks; a browser that
    has logged in by this address has a counter of its own."""
    whose = _key("code browser", address, known_browser) if known_browser else _key("code address", address)
    return (
        Counter(whose, 1, 600.0, first=60.0),
        Counter(_key("code client", _network(client, 48)), 10, 300.0, first=5.0),
    )


def folded(user: str, realms: Collection[str]) -> str:
    """One text for all the ways to type one name, so that none of them gains further tries."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", user).casefold())
    inner, at, domain = text.rpartition("@")
    return inner if at and domain in realms else text


def _network(address: str, bits: int) -> str:
    """Who has one address of IPv6 has a whole network of them: a computer /64, a site mostly /48."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed.packed, bits), strict=False))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


class Throttle:
    """The counters in the database, so that they hold across processes and restarts."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def begin(self, against: Sequence[Counter]) -> int:
        """Count one try; 0 when it may go on, else the seconds to wait (and nothing is counted)."""
        now = self._clock.wall()
        table = tables.throttle
        keys = sorted(counter.key for counter in against)
        with self._store.writing() as connection:
            # The rows must exist before they can be locked; in one order, so that two tries can't block each other.
            for key in keys:
                fresh = upsert(connection, table).values(key=key, failures=0, last_at=0.0)
                connection.execute(fresh.on_conflict_do_nothing(index_elements=["key"]))
            query = select(table).where(table.c.key.in_(keys)).order_by(table.c.key).with_for_update()
            rows = {row["key"]: row for row in connection.execute(query).mappings()}
            failures: dict[str, int] = {}
            waits = []
            for counter in against:
                # A clock that was set back must not make anybody wait for it.
                age = max(0.0, now - rows[counter.key]["last_at"])
                failures[counter.key] = rows[counter.key]["failures"] if age < _FORGET_S else 0
                waits.append(counter.delay(failures[counter.key]) - age)
            clean = not any(failures[counter.key] for counter in against if not counter.shared)
            wait = max(
                (w for w, counter in zip(waits, against, strict=True) if not (counter.shared and clean)), default=0
            )
            if wait > 0:
                return math.ceil(wait)
            for key, count in failures.items():
                connection.execute(update(table).where(table.c.key == key).values(failures=count + 1, last_at=now))
        return 0

    def forgive(self, against: Sequence[Counter], all_of_it: bool) -> None:
        """The try was no wrong guess. With `all_of_it` the first counter, which is the person's own, starts afresh."""
        table = tables.throttle
        with self._store.writing() as connection:
            for index, counter in enumerate(against):
                mine = table.c.key == counter.key
                if all_of_it and index == 0:
                    connection.execute(delete(table).where(mine))
                else:
                    less = update(table).where(mine, table.c.failures > 0)
                    connection.execute(less.values(failures=table.c.failures - 1))

    def prune(self) -> None:
        """Forget counters that delay nobody any more."""
        old = tables.throttle.c.last_at < self._clock.wall() - _FORGET_S
        with self._store.writing() as connection:
            connection.execute(delete(tables.throttle).where(old))
