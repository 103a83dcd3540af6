"""When those who wait can start, if every lease ends on time and nothing else happens. Pure.

The queue is played forward over the ends of the leases, by the rules of the real one. So an estimate is the
latest that the leases allow: desktops may be stopped earlier. Who needs what no known lease end frees has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush

from deskfleet.scheduler.filters import Moment, Reservation, Want, matching_gpus, objection
from deskfleet.scheduler.hosts import HostState
from deskfleet.scheduler.policy import Policy
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.session import Session

#: What time alone mends; with any other objection nobody can tell when a host will do.
_PASSES = frozenset({Reason.SESSIONS_FULL, Reason.CPUS_SHORT, Reason.MEMORY_SHORT, Reason.GPU_BUSY, Reason.RESERVED})
#: So many lease ends are looked at; whoever has not started by then has no estimate.
MOST_EVENTS = 5_000


@dataclass(frozen=True, slots=True)
class Lease:
    """What a session holds on a host, and when it ends at the latest (monotonic seconds). None: its host has not said
    yet, so it may last its whole lifetime from now on."""

    host: str
    ends_at: float | None
    lifetime_s: float
    cpus: int
    memory_mib: int
    gpu: frozenset[str] = frozenset()

    def end(self, now: float) -> float:
        """Its end as seen from `now`; one that is overdue ends any moment."""
        return max(now, now + self.lifetime_s if self.ends_at is None else self.ends_at)


@dataclass(frozen=True, slots=True)
class Start:
    """Where and when (monotonic seconds) somebody who waits is expected to start."""

    host: str
    at: float
    gpu: frozenset[str] = frozenset()


def lease(session: Session, ends_at: float | None, overhead_mib: int) -> Lease:
    """The lease of a session on its host."""
    want, gpu = session.resources, frozenset(session.gpu_addresses)
    return Lease(session.host, ends_at, session.lifetime_s, want.cpus, want.memory_mib + overhead_mib, gpu)


@dataclass(slots=True)
class Room:
    """What is free on one host at some moment of the plan."""

    host: HostState
    sessions: int
    cpus: float
    memory_mib: float
    held: frozenset[str]

    @classmethod
    def of(cls, host: HostState, most_sessions: int) -> Room:
        """What is free now."""
        return cls(
            host,
            most_sessions - host.usage.sessions,
            host.cpus_offered - host.usage.cpus,
            host.memory_offered - host.usage.memory_mib,
            host.gpus_held,
        )

    def free(self, ended: Lease) -> None:
        """A lease has ended."""
        self.sessions += 1
        self.cpus += ended.cpus
        self.memory_mib += ended.memory_mib
        self.held -= ended.gpu

    def fits(self, want: Want, overhead_mib: int) -> frozenset[str] | None:
        """The PCI functions with which a session would start here (none without a GPU); None when it can't."""
        size = want.resources
        if self.sessions < 1 or size.cpus > self.cpus or size.memory_mib + overhead_mib > self.memory_mib:
            return None
        if not size.gpus:
            return frozenset()
        for gpu in matching_gpus(want, self.host):
            if not self.held.intersection(gpu.functions):
                return frozenset(gpu.functions)
        return None

    def take(self, want: Want, gpu: frozenset[str], overhead_mib: int) -> None:
        """A session starts here."""
        self.sessions -= 1
        self.cpus -= want.resources.cpus
        self.memory_mib -= want.resources.memory_mib + overhead_mib
        self.held |= gpu


def reserve(
    want: Want, hosts: Mapping[str, HostState], leases: Sequence[Lease], now: float, policy: Policy
) -> Reservation | None:
    """Room for `want` on the host that frees first for it, so that no stream of small requests keeps it out; None when
    nobody can tell where it will fit."""
    start = _play([want], hosts, leases, Moment(now, policy)).get(want.sid)
    if start is None:
        return None
    room = Room.of(hosts[start.host], policy.max_sessions)
    for entry in leases:
        if entry.host == start.host and entry.end(now) <= start.at:
            room.free(entry)
    room.take(want, start.gpu, policy.guest_overhead_mib)
    spare = (room.sessions, room.cpus, room.memory_mib)
    return Reservation(want.sid, start.host, start.at, *spare, start.gpu, for_gpu=bool(want.resources.gpus))


def starts(
    queue: Sequence[Want], hosts: Mapping[str, HostState], leases: Sequence[Lease], at: Moment
) -> dict[str, Start]:
    """When and where each of `queue` (in the order of their turns; none fits now) is expected to start."""
    spent = {host: tuple(replace(entry) for entry in kept) for host, kept in at.reservations.items()}
    return _play(queue, hosts, leases, Moment(at.now, at.policy, spent))


def _play(
    queue: Sequence[Want], hosts: Mapping[str, HostState], leases: Sequence[Lease], at: Moment
) -> dict[str, Start]:
    """The queue over the ends of the leases: at each end, who fits into what is free there then starts."""
    overhead = at.policy.guest_overhead_mib
    bare = Moment(at.now, at.policy)
    ends = [(entry.end(at.now), number, entry) for number, entry in enumerate(leases)]
    heapify(ends)
    rooms: dict[str, Room] = {}
    usable: dict[tuple[str, tuple[object, ...]], bool] = {}
    pending = {want.sid: want for want in queue}
    starts: dict[str, Start] = {}
    for number in range(len(ends), len(ends) + MOST_EVENTS):
        if not ends or not pending:
            break
        now, _, ended = heappop(ends)
        host = hosts.get(ended.host)
        if host is None:
            continue
        room = rooms.setdefault(host.name, Room.of(host, at.policy.max_sessions))
        room.free(ended)
        here = Moment(now, at.policy, {host.name: at.reservations.get(host.name, ())})
        refused: set[tuple[object, ...]] = set()
        for want in list(pending.values()):
            shape = here.shape(want)
            if shape in refused:
                continue
            if (host.name, want.shape) not in usable:
                reason = objection(want, host, bare)
                usable[host.name, want.shape] = reason is None or reason in _PASSES
            gpu = room.fits(want, overhead) if usable[host.name, want.shape] else None
            # Who has started needs no room kept: it holds it.
            kept = [entry for entry in at.reservations.get(host.name, ()) if entry.sid not in starts]
            if gpu is None or not all(entry.spares(want, now, overhead) for entry in kept):
                refused.add(shape)
                continue
            for entry in kept:
                entry.spend(want, now, overhead)
            starts[want.sid] = Start(host.name, now, gpu)
            room.take(want, gpu, overhead)
            del pending[want.sid]
            size, until = want.resources, now + want.lifetime_s
            again = Lease(host.name, until, want.lifetime_s, size.cpus, size.memory_mib + overhead, gpu)
            heappush(ends, (until, number * len(queue) + len(starts), again))
    return starts
