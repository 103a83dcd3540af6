"""The scheduler's picture of hosts and live sessions: a cache of the ledger, plus when each host was last heard.

The ledger is the truth. The cache is rebuilt from it at start and whenever a transaction did not go through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from deskfleet.scheduler.placement import Candidate, Policy, Usage
from deskfleet.schemas.host import Host, HostReport
from deskfleet.schemas.session import Session, State


@dataclass(slots=True)
class HostState:
    """One host. `heard` is monotonic seconds, None until this process heard it."""

    host: Host
    heard: float | None = None
    distrust: str = ""
    usage: Usage = field(default_factory=Usage)
    gpus_held: frozenset[str] = frozenset()


class Fleet:
    """Hosts by name and live sessions by sid, oldest request first."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.hosts: dict[str, HostState] = {}
        self.sessions: dict[str, Session] = {}

    def load(self, hosts: Iterable[Host], sessions: Iterable[Session]) -> None:
        """Rebuild from the ledger. What only this process knows (when a host was heard, its newest report) stays."""
        known, self.hosts, self.sessions = self.hosts, {}, {}
        for host in hosts:
            old = known.get(host.name)
            newest = (old.host.report if old else None) or host.report
            self.hosts[host.name] = HostState(
                replace(host, report=newest), old.heard if old else None, old.distrust if old else ""
            )
        for session in sessions:
            self.put(session)

    def put(self, session: Session) -> None:
        """Record a session as it now is, and move what it holds."""
        before = self.sessions.get(session.sid)
        if before and before.on_host:
            self._count(before, -1)
        if session.state is State.ENDED:
            self.sessions.pop(session.sid, None)
            return
        self.sessions[session.sid] = session
        if session.on_host:
            self._count(session, +1)

    def _count(self, session: Session, sign: int) -> None:
        state = self.hosts.setdefault(session.host, HostState(Host(session.host)))
        usage, want = state.usage, session.resources
        state.usage = Usage(
            usage.sessions + sign,
            usage.cpus + sign * want.cpus,
            usage.memory_mib + sign * (want.memory_mib + self._policy.guest_overhead_mib),
        )
        held = set(session.gpu_addresses)
        state.gpus_held = state.gpus_held | held if sign > 0 else state.gpus_held - held

    def waiting(self) -> list[Session]:
        """The queue, oldest request first."""
        return [session for session in self.sessions.values() if session.state is State.QUEUED]

    def heard(self, report: HostReport, now: float) -> bool:
        """Take a report in; False when it is older than the one that is held (same life of the agent)."""
        state = self.hosts.setdefault(report.host, HostState(Host(report.host)))
        last = state.host.report
        if last and state.heard is not None and last.incarnation == report.incarnation and report.seq <= last.seq:
            return False
        state.heard = now
        state.host = replace(state.host, report=report)
        return True

    def candidates(self, now: float, fresh_s: float, failed_on: frozenset[str] = frozenset()) -> Iterator[Candidate]:
        """Every host as placement sees it; `failed_on` are the hosts where this session failed before."""
        for name, state in self.hosts.items():
            yield Candidate(
                name=name,
                report=state.host.report,
                usage=state.usage,
                gpus_held=state.gpus_held,
                fresh=self.is_fresh(state, now, fresh_s),
                draining=state.host.draining,
                distrust=state.distrust,
                failed_before=name in failed_on,
            )

    @staticmethod
    def is_fresh(state: HostState, now: float, fresh_s: float) -> bool:
        """Whether this process heard the host within the last `fresh_s` seconds."""
        return state.heard is not None and now - state.heard <= fresh_s
