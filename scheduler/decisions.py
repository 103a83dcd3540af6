"""What each message, and the passing of time, does to the fleet. No I/O of its own: it works on a `Unit`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from deskfleet.ledger.reader import Wait
from deskfleet.scheduler.fleet import Fleet
from deskfleet.scheduler.intake import refuse_launch, requested, stop_before_launch
from deskfleet.scheduler.placement import NoFit, Policy, Want, choose
from deskfleet.scheduler.reconcile import Action, Step, StopGuest, on_guest, on_report
from deskfleet.scheduler.unit import Limits, Unit
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import HostReport, implausible
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import (
    DrainRequested,
    HostFence,
    LaunchRequested,
    Message,
    StopRequested,
    VmReport,
    VmStop,
)
from deskfleet.schemas.session import Event, Outcome, Session, State
from deskfleet.schemas.verdict import Verdict

log = logging.getLogger(__name__)

Machines = Callable[[], Mapping[str, Machine]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the scheduler behaves; all times in seconds.

    `fresh_s`: a host unheard for longer gets no new work. `reissue_s`: a command without an echo is sent again.
    `explain_s`: how often the figures behind a wait are written down.
    """

    policy: Policy = field(default_factory=Policy)
    limits: Limits = field(default_factory=Limits)
    fresh_s: float = 15.0
    reissue_s: float = 10.0
    explain_s: float = 5.0
    max_attempts: int = 3
    max_lifetime_s: int = 30 * 24 * 3600


class Decisions:
    """Applies messages and sweeps to the fleet. `now` is monotonic seconds, `wall` UNIX seconds for display."""

    def __init__(self, fleet: Fleet, machines: Machines, settings: Settings) -> None:
        self._fleet = fleet
        self._machines = machines
        self._settings = settings
        self.reports: dict[str, tuple[HostReport, float]] = {}  # not yet stored, by host
        self.commanded: dict[str, float] = {}  # sid -> when its host was last told something
        self._waited: dict[str, float] = {}  # sid -> seconds in the queue
        self._failed_on: dict[str, frozenset[str]] = {}
        self._explained: dict[str, tuple[tuple[str, Reason], ...]] = {}
        self._swept: float | None = None
        self._wrote_waits = 0.0
        self.place_soon = True

    def handle(self, unit: Unit, message: Message, now: float, wall: float) -> None:
        """Apply one message."""
        match message:
            case LaunchRequested():
                self._launch(unit, message, wall)
            case StopRequested():
                self._stop(unit, message, wall)
            case DrainRequested():
                self._drain(unit, message)
            case VmReport():
                session = self._fleet.sessions.get(message.guest.sid)
                action = on_guest(session, message.host, message.guest, self._settings.max_attempts)
                if action:
                    self._act(unit, message.host, action)
            case HostReport():
                self._heartbeat(unit, message, now, wall)
            case _:
                log.warning("the scheduler takes no %s", type(message).__name__)

    def _launch(self, unit: Unit, request: LaunchRequested, wall: float) -> None:
        session = requested(request, wall)
        if not unit.add(session):
            return  # a repeat of a request that is known: the first answer stands
        step = refuse_launch(session, request, self._machines(), self._settings.max_lifetime_s)
        if step:
            unit.step(step)
        else:
            self.place_soon = True

    def _stop(self, unit: Unit, request: StopRequested, wall: float) -> None:
        session = self._fleet.sessions.get(request.sid)
        if session is None:
            # Ended already, or the stop overtook its launch: then the sid is taken, so that the stop wins.
            unit.tx.add(stop_before_launch(request, wall))
            return
        own = request.actor == session.user
        if not (own or request.admin):
            log.warning("%s may not stop session %s", request.actor, session.sid)
            return
        outcome = Outcome.CANCELLED if session.state is State.QUEUED else Outcome.STOPPED
        unit.stop(session, outcome, Reason.STOPPED_BY_USER if own else Reason.STOPPED_BY_ADMIN)
        self.place_soon = True

    def _drain(self, unit: Unit, request: DrainRequested) -> None:
        state = self._fleet.hosts.get(request.host)
        if state is None or not unit.tx.drain(request.host, request.draining):
            log.warning("%s wants to drain %s, which is not known", request.actor, request.host)
            return
        state.host = replace(state.host, draining=request.draining)
        self.place_soon = True

    def _heartbeat(self, unit: Unit, report: HostReport, now: float, wall: float) -> None:
        if report.host not in self._fleet.hosts:
            unit.tx.add_host(report.host)
        if not self._fleet.heard(report, now):
            return
        state = self._fleet.hosts[report.host]
        state.distrust = implausible(report)
        self.reports[report.host] = (report, wall)
        if state.distrust:
            log.warning("the report of %s is not believed: %s", report.host, state.distrust)
            return
        if report.last_generation > state.host.generation:
            # The ledger was restored from an older copy: never hand out a number that the host has seen.
            unit.tx.raise_generation(report.host, report.last_generation)
            state.host = replace(state.host, generation=report.last_generation)
        if report.fenced:
            unit.send_host(report.host, HostFence(report.host, state.host.generation))
            return
        for action in list(on_report(self._fleet.sessions, report, self._settings.max_attempts)):
            self._act(unit, report.host, action)
        self.place_soon = self.place_soon or bool(self._fleet.waiting())

    def _act(self, unit: Unit, host: str, action: Action) -> None:
        if isinstance(action, StopGuest):
            log.warning("%s runs %s, which no record wants there: stopping it", host, action.sid)
            unit.send_host(host, VmStop(action.sid, action.generation, action.outcome, action.reason))
            return
        after = unit.step(action)
        if action.counted:
            self._failed_on[after.sid] = self._failed_on.get(after.sid, frozenset()) | {host}
        self.place_soon = self.place_soon or not after.on_host

    def place_waiting(self, unit: Unit, now: float) -> None:
        """Try the whole queue in order. A session that fits nowhere does not hold up the ones behind it."""
        self.place_soon = False
        machines = self._machines()
        for session in self._fleet.waiting():
            machine = machines.get(session.machine)
            if machine is None:
                continue  # taken out of the catalogue while it waits; it may come back
            verdicts = self._place(unit, session, machine, now)
            reasons = tuple((verdict.host, verdict.reason) for verdict in verdicts)
            # Written down when the reasons change, else now and then: the figures in them change all the time.
            due = now - self._wrote_waits >= self._settings.explain_s
            if verdicts and (due or self._explained.get(session.sid) != reasons):
                self._explained[session.sid] = reasons
                waited_s = self._waited.get(session.sid, session.waited_s)
                unit.tx.explain(session.sid, Wait(None, None, verdicts), waited_s)

    def _place(self, unit: Unit, session: Session, machine: Machine, now: float) -> tuple[Verdict, ...]:
        failed_on = self._failed_on.get(session.sid, frozenset())
        candidates = self._fleet.candidates(now, self._settings.fresh_s, failed_on)
        choice = choose(Want(session.sid, session.resources, machine.sha256), candidates, self._settings.policy)
        if isinstance(choice, NoFit):
            return choice.verdicts
        unit.start(session, choice, machine)
        return ()

    def overdue(self, now: float) -> list[Callable[[Unit], object]]:
        """What only time brings, as work for a transaction each: commands without an echo, waits that are over."""
        for known in (self.commanded, self._waited, self._failed_on, self._explained):
            for sid in known.keys() - self._fleet.sessions.keys():
                known.pop(sid)
        elapsed = now - self._swept if self._swept is not None else 0.0
        self._swept = now
        work: list[Callable[[Unit], object]] = []
        for session in self._fleet.sessions.values():
            if session.state is State.QUEUED:
                waited = self._waited.get(session.sid, session.waited_s) + elapsed
                self._waited[session.sid] = waited
                if waited > session.wait_s:
                    work.append(self._give_up(session))
            elif self._needs_command(session, now):
                work.append(self._repeat(session, now))
        if now - self._wrote_waits >= self._settings.explain_s and self._fleet.waiting():
            work.append(lambda unit: self._explain_all(unit, now))
        return work

    def _explain_all(self, unit: Unit, now: float) -> None:
        self.place_waiting(unit, now)
        self._wrote_waits = now

    def _give_up(self, session: Session) -> Callable[[Unit], object]:
        step = Step(session, Event.GIVE_UP, Outcome.NO_CAPACITY, Reason.WAITED_TOO_LONG)
        return lambda unit: unit.step(step)

    def _needs_command(self, session: Session, now: float) -> bool:
        """Whether the host should have answered by now: a start without an echo, or a stop that is not done."""
        if session.state not in (State.ASSIGNED, State.STOPPING):
            return False
        state = self._fleet.hosts[session.host]
        if not self._fleet.is_fresh(state, now, self._settings.fresh_s):
            return False  # it would only expire in the queue
        return now - self.commanded.setdefault(session.sid, now) >= self._settings.reissue_s

    def _repeat(self, session: Session, now: float) -> Callable[[Unit], object]:
        def work(unit: Unit) -> None:
            self.commanded[session.sid] = now
            machine = self._machines().get(session.machine)
            if session.state is State.STOPPING:
                unit.repeat_stop(session)
            elif machine is None:
                unit.stop(session, Outcome.REJECTED, Reason.UNKNOWN_MACHINE)
            else:
                unit.reissue(session, machine)

        return work
