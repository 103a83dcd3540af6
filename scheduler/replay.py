"""Recorded requests played again under some policy, to compare policies. Pure: time is that of the record.

The queue, the filters, the order of hosts and the room that is kept are the scheduler's own, on a fleet without ledger
and without messages. Every start works and takes no time, hosts are always heard and idle but for what is promised on
them, and a desktop runs as long as it really did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from heapq import heapify, heappop, heappush
from math import ceil

from deskfleet.ledger.writer import Transaction
from deskfleet.scheduler.filters import Moment
from deskfleet.scheduler.fleet import Fleet
from deskfleet.scheduler.hosts import Usage
from deskfleet.scheduler.outlook import never_fits
from deskfleet.scheduler.policy import Policy
from deskfleet.scheduler.stats import Stats
from deskfleet.scheduler.unit import Limits, Unit
from deskfleet.scheduler.waiting import Blocked, Queue
from deskfleet.schemas.host import HostReport
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.session import Event, Outcome, Session, State
from deskfleet.schemas.verdict import Verdict


class Fate(StrEnum):
    """What becomes of a request."""

    PLACED = "placed"
    REFUSED = "refused"  # no host could ever give it
    GAVE_UP = "gave_up"  # nothing was free for as long as it waits


@dataclass(frozen=True, slots=True)
class Request:
    """A recorded request: what was asked for, when (seconds since the first), how long it holds a host once placed, and
    how long it waits for one. Times in seconds."""

    session: Session
    at: float
    holds_s: float
    patience_s: float


@dataclass(slots=True)
class Use:
    """How much of something is in use: the share of it, over time."""

    now: float = 0.0
    peak: float = 0.0
    area: float = 0.0

    def passes(self, seconds: float) -> None:
        """Time passes."""
        self.area += self.now * seconds

    def becomes(self, value: float) -> None:
        """From now on."""
        self.now = value
        self.peak = max(self.peak, value)

    def mean(self, seconds: float) -> float:
        """Over all the time; over no time, what it is now."""
        return self.area / seconds if seconds > 0 else self.now


@dataclass(slots=True)
class Result:
    """What came of a replay, by sid: `fates`, and of those who were placed the `waits` in seconds and the `hosts`.
    Shares are of what all hosts offer, `busy` counts hosts that run something; means are over `span_s`, from the first
    request to the last."""

    fates: dict[str, Fate] = field(default_factory=dict)
    waits: dict[str, float] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    cpus: Use = field(default_factory=Use)
    memory: Use = field(default_factory=Use)
    busy: Use = field(default_factory=Use)
    span_s: float = 0.0

    def figures(self) -> dict[str, float]:
        """All that is compared, under names for scripts."""
        fates = list(self.fates.values())
        return {
            **{fate.value: fates.count(fate) for fate in Fate},
            "wait_p50_s": round(percentile(self.waits.values(), 0.50), 1),
            "wait_p99_s": round(percentile(self.waits.values(), 0.99), 1),
            "cpus_mean": round(self.cpus.mean(self.span_s), 4),
            "cpus_peak": round(self.cpus.peak, 4),
            "memory_mean": round(self.memory.mean(self.span_s), 4),
            "memory_peak": round(self.memory.peak, 4),
            "hosts_used": len(set(self.hosts.values())),
            "hosts_mean": round(self.busy.mean(self.span_s), 2),
            "hosts_peak": int(self.busy.peak),
        }


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, ceil(share * len(ordered)) - 1)] if ordered else 0.0


class _NoLedger(Transaction):
    """What a replay writes to: it remembers who was placed since it was last asked."""

    def __init__(self) -> None:
        self.placed: list[Session] = []

    def claim(self, host: str, generation: int) -> int:  # noqa: ARG002  nobody competes for numbers
        return generation + 1

    def save(
        self,
        before: Session,  # noqa: ARG002
        after: Session,
        event: Event,  # noqa: ARG002
        verdicts: Sequence[Verdict] = (),  # noqa: ARG002
    ) -> None:
        self.placed.append(after)


class _Queue(Queue):
    """The queue, but nobody is told place, estimate and reasons: it changes no decision, and takes most of the time."""

    def _tell(self, unit: Unit, blocked: list[Blocked], at: Moment) -> None:
        pass


class _Kind(StrEnum):
    """What happens at some moment; of one moment in this order, so that nobody gives up while something frees."""

    END = "1"
    REQUEST = "2"
    DEADLINE = "3"


def replay(
    requests: Sequence[Request], hosts: Sequence[HostReport], machines: Mapping[str, Machine], policy: Policy
) -> Result:
    """Play `requests` on `hosts`. Each machine that is asked for must be in `machines`."""
    return _Replay(requests, hosts, machines, policy).run()


class _Replay:
    def __init__(
        self, requests: Sequence[Request], hosts: Sequence[HostReport], machines: Mapping[str, Machine], policy: Policy
    ) -> None:
        # Hosts of a record send no heartbeats.
        self._policy = replace(policy, fresh_s=float("inf"))
        self._machines = machines
        self._fleet = Fleet(self._policy)
        for report in hosts:
            self._fleet.heard(replace(report, load1=0.0, memory_free_mib=report.memory_mib, guests=()), 0.0)
        self._queue = _Queue(self._fleet, lambda: machines, self._policy, 0.0, Stats())
        self._requests = {request.session.sid: request for request in requests}
        self._events = [(request.at, _Kind.REQUEST, request.session.sid) for request in requests]
        heapify(self._events)
        self._ledger = _NoLedger()
        self._unit = Unit(self._ledger, self._fleet, 0.0, Limits())
        self._used = Usage()
        self._result = Result(span_s=max((request.at for request in requests), default=0.0))

    def run(self) -> Result:
        then = 0.0
        while self._events:
            now = self._events[0][0]
            self._pass_time(then, now)
            then, deadlines = now, []
            while self._events and self._events[0][0] == now:
                _, kind, sid = heappop(self._events)
                if kind is _Kind.DEADLINE:
                    deadlines.append(sid)
                elif kind is _Kind.END:
                    self._leave(sid, Outcome.STOPPED)
                else:
                    self._ask(self._requests[sid], now)
            if self._queue.soon:
                self._queue.run(self._unit, now)
                self._placed(now)
            for sid in deadlines:
                if sid not in self._result.fates:
                    self._result.fates[sid] = Fate.GAVE_UP
                    self._leave(sid, Outcome.NO_CAPACITY)
            self._measure()
        return self._result

    def _pass_time(self, then: float, now: float) -> None:
        """Counted up to the last request: nobody knows what is asked for later, and the fleet would seem to empty."""
        seconds = max(0.0, min(now, self._result.span_s) - then)
        for use in (self._result.cpus, self._result.memory, self._result.busy):
            use.passes(seconds)

    def _ask(self, request: Request, now: float) -> None:
        policy, asked = self._policy, request.session
        session = replace(asked, queue_class=policy.class_of(asked.user, asked.groups))
        machine = self._machines[session.machine]
        want = self._queue.want(session, machine)
        if never_fits(session, want, machine, self._fleet, policy, settled=True):
            self._result.fates[session.sid] = Fate.REFUSED
            return
        self._fleet.put(session)
        heappush(self._events, (now + request.patience_s, _Kind.DEADLINE, session.sid))
        self._queue.soon = True

    def _leave(self, sid: str, outcome: Outcome) -> None:
        session = self._fleet.sessions[sid]
        if session.on_host:
            self._used = self._used.plus(session, -1, self._policy.guest_overhead_mib)
        self._fleet.put(replace(session, state=State.ENDED, outcome=outcome))
        self._queue.soon = True

    def _placed(self, now: float) -> None:
        for session in self._ledger.placed:
            request, result = self._requests[session.sid], self._result
            self._used = self._used.plus(session, +1, self._policy.guest_overhead_mib)
            result.fates[session.sid] = Fate.PLACED
            result.waits[session.sid] = now - request.at
            result.hosts[session.sid] = session.host
            heappush(self._events, (now + request.holds_s, _Kind.END, session.sid))
        self._ledger.placed.clear()
        self._unit.outbox.clear()

    def _measure(self) -> None:
        total = self._fleet.total()
        self._result.cpus.becomes(self._used.cpus / max(1, total.cpus))
        self._result.memory.becomes(self._used.memory_mib / max(1, total.memory_mib))
        self._result.busy.becomes(sum(1 for host in self._fleet.hosts.values() if host.usage.sessions))
