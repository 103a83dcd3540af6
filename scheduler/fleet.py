"""The scheduler's picture of hosts and live sessions: a cache of the ledger, plus what only this process knows.

The ledger is the truth. The cache is rebuilt from it at start and whenever a transaction did not go through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from deskfleet.scheduler.hosts import HostState, Usage
from deskfleet.scheduler.placement import Index
from deskfleet.scheduler.plan import Lease, lease
from deskfleet.scheduler.policy import Policy
from deskfleet.schemas.host import Host, HostBeat, HostReport
from deskfleet.schemas.session import Session, State


class Fleet:
    """Hosts by name, live sessions by sid (oldest request first), what each person and group has in use, and when
    leases end (monotonic seconds)."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.hosts: dict[str, HostState] = {}
        self.sessions: dict[str, Session] = {}
        self.index = Index(policy)
        self.used: dict[str, Usage] = {}
        self.grouped: dict[str, Usage] = {}
        self._on: dict[str, dict[str, Session]] = {}
        self._waiting: dict[str, Session] = {}
        self._age: dict[str, int] = {}
        self._arrived = 0
        self._ends: dict[str, float] = {}
        self._leases: dict[str, Lease] = {}
        self._total: Usage | None = None

    def load(self, hosts: Iterable[Host], sessions: Iterable[Session]) -> None:
        """Rebuild from the ledger. What only this process knows (reports, rests, lease ends) stays."""
        known, self.hosts, self.sessions = self.hosts, {}, {}
        self.index = Index(self._policy)
        self.used, self.grouped, self._on, self._waiting, self._age, self._total = {}, {}, {}, {}, {}, None
        self._leases = {}
        for host in hosts:
            state = known.get(host.name) or self._new(host.name)
            state.generation, state.draining, state.dead = host.generation, host.draining, host.dead
            state.usage, state.gpus_held = Usage(), frozenset()
            self.hosts[host.name] = state
        for session in sessions:
            self.put(session)
        for state in self.hosts.values():
            self.index.put(state)
            state.resting.keep(self.on(state.name))

    def _new(self, name: str) -> HostState:
        state = HostState(name)
        state.belongs(self._policy.pools)
        return state

    def host(self, name: str) -> HostState:
        """A host, which is made when it is new."""
        if name not in self.hosts:
            self.hosts[name] = self._new(name)
            self.index.put(self.hosts[name])
        return self.hosts[name]

    def put(self, session: Session) -> None:
        """Record a session as it now is, and move what it holds."""
        before = self.sessions.get(session.sid)
        if before and before.on_host:
            self._count(before, -1)
        self._waiting.pop(session.sid, None)
        if session.state is State.ENDED:
            self.sessions.pop(session.sid, None)
            self._ends.pop(session.sid, None)
            self._age.pop(session.sid, None)
            return
        self.sessions[session.sid] = session
        if session.sid not in self._age:
            self._arrived += 1
            self._age[session.sid] = self._arrived
        if session.on_host:
            self._count(session, +1)
        else:
            self._waiting[session.sid] = session
            self._ends.pop(session.sid, None)

    def _count(self, session: Session, sign: int) -> None:
        state = self.host(session.host)
        state.usage = state.usage.plus(session, sign, self._policy.guest_overhead_mib)
        held = frozenset(session.gpu_addresses)
        state.gpus_held = state.gpus_held | held if sign > 0 else state.gpus_held - held
        self.index.put(state)
        self.used[session.user] = self.used.get(session.user, Usage()).plus(session, sign, 0)
        for group in session.groups:
            self.grouped[group] = self.grouped.get(group, Usage()).plus(session, sign, 0)
        on = self._on.setdefault(session.host, {})
        if sign > 0:
            on[session.sid] = session
            ends_at = self._ends.get(session.sid)
            self._leases[session.sid] = lease(session, ends_at, self._policy.guest_overhead_mib)
        else:
            on.pop(session.sid, None)
            self._leases.pop(session.sid, None)

    def on(self, host: str) -> dict[str, Session]:
        """The sessions that hold resources on a host, by sid."""
        return self._on.get(host, {})

    def waiting(self) -> list[Session]:
        """Those who wait, oldest request first."""
        # A session that came back from a failed start keeps its age: the order is that of all sessions.
        return sorted(self._waiting.values(), key=lambda session: self._age[session.sid])

    def heard(self, report: HostReport, now: float) -> bool:
        """Take a full report in; False when it is older than the one that is held (same life of the agent)."""
        state = self.host(report.host)
        if state.heard is not None and _is_old(state.report, report):
            return False
        state.take(report, now, self._policy)
        self._total = None
        self.index.put(state)
        for guest in report.guests:
            if guest.left_s is not None:
                self.ends(guest.sid, now + guest.left_s)
        return True

    def beaten(self, beat: HostBeat, now: float) -> HostReport | None:
        """Take a small heartbeat in: the report that it stands for, with its figures; None when that one is not held.

        An old beat changes nothing, and is answered with what is held.
        """
        state = self.host(beat.host)
        last = state.report
        if last is None or last.incarnation != beat.incarnation or last.digest != beat.digest:
            return None
        if beat.seq <= last.seq:
            return last
        report = state.take_beat(beat, last, now, self._policy)
        self.index.put(state)
        return report

    def ends_at(self, session: Session, now: float) -> float:
        """When a session's lease ends at the latest (monotonic seconds), as far as is known."""
        return self._ends.get(session.sid, now + session.lifetime_s)

    def ends(self, sid: str, at: float) -> None:
        """A lease ends at `at` (monotonic seconds) at the latest."""
        self._ends[sid] = at
        if sid in self._leases:
            self._leases[sid] = replace(self._leases[sid], ends_at=at)

    def leases(self) -> list[Lease]:
        """Every lease in the fleet."""
        return list(self._leases.values())

    def total(self) -> Usage:
        """What all hosts that reported offer."""
        if self._total is None:
            hosts = self.hosts.values()
            self._total = Usage(
                0,
                int(sum(host.cpus_offered for host in hosts)),
                int(sum(host.memory_offered for host in hosts)),
                sum(len(host.gpus) for host in hosts),
            )
        return self._total


def _is_old(held: HostReport | None, report: HostReport) -> bool:
    return held is not None and held.incarnation == report.incarnation and report.seq <= held.seq
