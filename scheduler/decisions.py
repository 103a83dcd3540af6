"""What each message, and the passing of time, does to the fleet. No I/O of its own: it works on a `Unit`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from deskfleet.scheduler.fleet import Fleet
from deskfleet.scheduler.intake import refuse_launch, rejection, requested, stop_before_launch
from deskfleet.scheduler.outlook import never_fits, outlook, supposed
from deskfleet.scheduler.policy import Policy
from deskfleet.scheduler.reconcile import Action, LetRun, Step, StopGuest, on_guest, on_report
from deskfleet.scheduler.stats import Stats
from deskfleet.scheduler.unit import Limits, Unit
from deskfleet.scheduler.waiting import Queue
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import HostBeat, HostReport, Phase
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import (
    DrainRequested,
    ExtendRequested,
    HostDeclaredDead,
    HostFence,
    HostImages,
    HostInventory,
    HostTemplates,
    LaunchRequested,
    Message,
    PlacementAnswered,
    PlacementAsked,
    StopRequested,
    TemplateOrdered,
    VmReport,
    VmStop,
)
from deskfleet.schemas.session import Event, Outcome, Session, State
from deskfleet.schemas.verdict import Outlook, Verdict

log = logging.getLogger(__name__)

Machines = Callable[[], Mapping[str, Machine]]


@dataclass(frozen=True, slots=True)
class Settings:
    """How the scheduler behaves; all times in seconds.

    `reissue_s`: a command without an echo is sent again. `explain_s`: how often the figures behind a wait are written
    down. `settle_s`: after a start, how long living hosts have to report before anything is called impossible.
    """

    policy: Policy = field(default_factory=Policy)
    limits: Limits = field(default_factory=Limits)
    reissue_s: float = 10.0
    explain_s: float = 5.0
    settle_s: float = 30.0
    max_attempts: int = 3
    max_lifetime_s: int = 30 * 24 * 3600


class Decisions:
    """Applies messages and sweeps to the fleet. `now` is monotonic seconds, `wall` UNIX seconds for display."""

    def __init__(self, fleet: Fleet, machines: Machines, settings: Settings, started: float) -> None:
        self._fleet = fleet
        self._machines = machines
        self._settings = settings
        self._started = started
        self.stats = Stats()
        self.queue = Queue(fleet, machines, settings.policy, settings.explain_s, self.stats)
        #: Not yet stored, by host, with the time of arrival: full reports, and what small ones changed.
        self.reports: dict[str, tuple[HostReport, float]] = {}
        self.figures: dict[str, tuple[HostReport, float]] = {}
        self.commanded: dict[str, float] = {}  # sid -> when its host was last told something
        self._swept: float | None = None

    def load(self, failed: Iterable[tuple[str, Verdict]]) -> None:
        """The cache was rebuilt: take the failed starts of those who wait again from the ledger, too."""
        self.queue.failures.clear()
        for sid, verdict in failed:
            self._failed(sid, verdict.host, verdict.reason, verdict.detail)
        self.queue.soon = True

    def handle(self, unit: Unit, message: Message, now: float, wall: float) -> None:
        """Apply one message."""
        match message:
            case HostBeat():
                self._beat(unit, message, now, wall)
            case HostReport():
                self._heartbeat(unit, message, now, wall)
            case VmReport():
                session = self._fleet.sessions.get(message.guest.sid)
                action = on_guest(session, message.host, message.guest, self._settings.max_attempts)
                if action:
                    self._act(unit, message.host, action, now)
            case LaunchRequested():
                self._launch(unit, message, now, wall)
            case StopRequested():
                self._stop(unit, message, wall)
            case ExtendRequested():
                self._extend(unit, message, now)
            case DrainRequested():
                self._drain(unit, message)
            case HostDeclaredDead():
                self._declare_dead(unit, message, now)
            case TemplateOrdered():
                self._order_template(unit, message)
            case PlacementAsked():
                self._answer(unit, message, now)
            case _:
                log.warning("the scheduler takes no %s", type(message).__name__)

    # --- what people and administrators want ----------------------------------------------------------------

    def _settled(self, now: float) -> bool:
        return now - self._started >= self._settings.settle_s

    def _launch(self, unit: Unit, request: LaunchRequested, now: float, wall: float) -> None:
        policy = self._settings.policy
        session = requested(request, wall, policy)
        if not unit.add(session):
            return  # a repeat of a request that is known: the first answer stands
        machines = self._machines()
        step = refuse_launch(session, machines, self._settings.max_lifetime_s)
        if step is None:
            machine = machines[session.machine]
            want = self.queue.want(session, machine)
            never = never_fits(session, want, machine, self._fleet, policy, self._settled(now))
            if never:
                verdict = never.verdicts[0]
                step = rejection(session, Reason.NEVER_FITS, verdict.detail)
                self.stats.refused[verdict.reason] += 1
        if step:
            unit.step(step)
        else:
            self.queue.soon = True

    def _answer(self, unit: Unit, asked: PlacementAsked, now: float) -> None:
        settings = self._settings
        self.stats.asked += 1
        forecast = outlook(
            supposed(asked, settings.policy),
            self._fleet,
            self.queue,
            self._machines(),
            settings.policy,
            settings.max_lifetime_s,
            now,
            self._settled(now),
        )
        if forecast.outlook is Outlook.NEVER:
            log.info("%s asked for what never fits: %s", asked.user, forecast.why)
        unit.answer(asked.replica, PlacementAnswered(asked.question, forecast))

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
        self.queue.soon = True

    def _extend(self, unit: Unit, request: ExtendRequested, now: float) -> None:
        session = self._fleet.sessions.get(request.sid)
        if session is None or session.state is not State.RUNNING:
            log.info("%s wants more time for %s, which does not run", request.actor, request.sid)
            return
        if request.actor != session.user and not request.admin:
            log.warning("%s may not extend session %s", request.actor, session.sid)
            return
        lifetime_s = min(request.lifetime_s, self._settings.max_lifetime_s)
        if lifetime_s > session.lifetime_s:
            ends_at = self._fleet.ends_at(session, now)
            longer = unit.extend(session, lifetime_s)
            self._fleet.ends(longer.sid, ends_at + lifetime_s - session.lifetime_s)

    def _drain(self, unit: Unit, request: DrainRequested) -> None:
        state = self._fleet.hosts.get(request.host)
        if state is None or not unit.tx.drain(request.host, request.draining, request.text):
            log.warning("%s wants to drain %s, which is not known", request.actor, request.host)
            return
        state.draining = request.draining
        self.queue.soon = True

    def _order_template(self, unit: Unit, request: TemplateOrdered) -> None:
        state = self._fleet.hosts.get(request.host)
        if state is None or request.key not in (state.templates or {}):
            log.warning("%s wants to %s a template that %s lacks", request.actor, request.order, request.host)
            return
        unit.send_host(request.host, request)

    def _declare_dead(self, unit: Unit, request: HostDeclaredDead, now: float) -> None:
        state = self._fleet.hosts.get(request.host)
        if state is None:
            log.warning("%s declares %s dead, which is not known", request.actor, request.host)
            return
        if state.is_fresh(now, self._settings.policy.fresh_s):
            # Its guests run and its people work: an administrator can drain it and stop them, one by one.
            log.warning("%s declares %s dead, which answers: nothing is done", request.actor, request.host)
            return
        lost = list(self._fleet.on(state.name).values())
        log.warning("%s declares %s dead: %d sessions are lost", request.actor, state.name, len(lost))
        state.dead = True
        unit.tx.set_dead(state.name, True)
        unit.burn(state.name)
        for session in lost:
            self._leave(unit, Step(session, Event.GONE, Outcome.LOST, Reason.HOST_DEAD))

    # --- what hosts say -------------------------------------------------------------------------------------

    def _beat(self, unit: Unit, beat: HostBeat, now: float, wall: float) -> None:
        report = self._fleet.beaten(beat, now)
        if report is None:
            self._ask_inventory(unit, beat, now)
            return
        self.figures[beat.host] = (report, wall)
        self._reconcile(unit, report, now)

    def _ask_inventory(self, unit: Unit, beat: HostBeat, now: float) -> None:
        """A small heartbeat refers to a report that was lost, or came before this process: ask for it, now and then."""
        state = self._fleet.host(beat.host)
        if state.asked is None or now - state.asked >= self._settings.explain_s:
            state.asked = now
            unit.send_host(beat.host, HostInventory(beat.host))

    def _heartbeat(self, unit: Unit, report: HostReport, now: float, wall: float) -> None:
        if self._fleet.host(report.host).report is None:
            unit.tx.add_host(report.host)  # small heartbeats alone make no row
        if not self._fleet.heard(report, now):
            return
        self.figures.pop(report.host, None)
        self.reports[report.host] = (report, wall)
        self._reconcile(unit, report, now)
        self.queue.soon = True

    def _reconcile(self, unit: Unit, report: HostReport, now: float) -> None:
        state = self._fleet.hosts[report.host]
        if state.distrust:
            log.warning("the report of %s is not believed: %s", report.host, state.distrust)
            return
        if report.last_generation > state.generation:
            # The ledger was restored from an older copy: never hand out a number that the host has seen.
            unit.tx.raise_generation(report.host, report.last_generation)
            state.generation = report.last_generation
        if report.fenced:
            unit.send_host(report.host, HostFence(report.host, state.generation))
            return
        here, attempts = self._fleet.on(report.host), self._settings.max_attempts
        for action in list(on_report(self._fleet.sessions, here, report, attempts)):
            self._act(unit, report.host, action, now)
        if state.dead:
            self._back_from_the_dead(unit, report)

    def _back_from_the_dead(self, unit: Unit, report: HostReport) -> None:
        """A host that was declared dead reports. It is used again once it has passed the number that was burnt, so
        that no old command can come true, and runs nothing that was given up."""
        state = self._fleet.hosts[report.host]
        if report.last_generation < state.generation:
            unit.send_host(report.host, HostFence(report.host, state.generation))
        elif all(guest.phase is Phase.ENDED for guest in report.guests):
            log.warning("%s is back, and clean", report.host)
            state.dead = False
            unit.tx.set_dead(report.host, False)
            self.queue.soon = True

    def _act(self, unit: Unit, host: str, action: Action, now: float) -> None:
        if isinstance(action, StopGuest):
            log.warning("%s runs %s, which no record wants there: stopping it", host, action.sid)
            unit.send_host(host, VmStop(action.sid, action.generation, action.outcome, action.reason))
            return
        if isinstance(action, LetRun):
            told = self.commanded.get(action.session.sid)
            if told is None or now - told >= self._settings.reissue_s:
                unit.tell_lifetime(action.session)
            return
        session = action.session
        state, image = self._fleet.host(host), self._image(session)
        if action.counted:
            self.stats.failed[host] += 1
            self._failed(session.sid, host, action.reason or Reason.ABSENT, action.detail)
            # Commands that a former leader decided and did not live to send are nobody's failure.
            lost = action.reason is Reason.ABSENT and not self._settled(now)
            if not lost and state.resting.failed(image, session.sid, now, self._settings.policy.rest):
                log.warning("%s failed several launches of %s and rests", host, session.machine)
        elif action.event is Event.READY:
            state.resting.worked(image)
            if action.birth and session.sid in self.commanded:
                self.stats.started[action.birth].add(now - self.commanded[session.sid])
            self._fleet.ends(session.sid, now + session.lifetime_s)
        self._leave(unit, action)

    def _leave(self, unit: Unit, step: Step) -> None:
        """Take a step, and let others in when it frees the host."""
        after = unit.step(step, self.queue.failures.get(step.session.sid, ()))
        if not after.on_host:
            self._fleet.host(step.session.host).resting.over(after.sid)
            self.queue.soon = True

    def _image(self, session: Session) -> str:
        machine = self._machines().get(session.machine)
        return machine.sha256 if machine else session.machine

    def _failed(self, sid: str, host: str, reason: Reason, detail: str) -> None:
        words = f"could not start it: {detail}" if detail else ""
        self.queue.failures[sid] = (*self.queue.failures.get(sid, ()), Verdict(host, reason, words[:400]))

    # --- time -----------------------------------------------------------------------------------------------

    def overdue(self, now: float) -> list[Callable[[Unit], object]]:
        """What only time brings, as work for a transaction each: commands without an echo, waits that are over."""
        self.queue.forget()
        for sid in self.commanded.keys() - self._fleet.sessions.keys():
            del self.commanded[sid]
        elapsed = now - self._swept if self._swept is not None else 0.0
        self._swept = now
        work: list[Callable[[Unit], object]] = []
        waited = self.queue.waited
        for session in self._fleet.waiting():
            known = waited.get(session.sid)
            # Who came since the last look has not waited since then: a leader may have been paused for long.
            waited[session.sid] = session.waited_s if known is None else known + elapsed
            if waited[session.sid] > session.wait_s:
                work.append(self._give_up(session))
        for host, state in self._fleet.hosts.items():
            if state.is_fresh(now, self._settings.policy.fresh_s):  # else it would only expire in the queue
                work += [self._repeat(s, now) for s in self._fleet.on(host).values() if self._needs_command(s, now)]
        if self._fleet.waiting():
            work.append(lambda unit: self.queue.run(unit, now))
        fresh_s = self._settings.policy.fresh_s
        told: list[HostImages | HostTemplates] = []
        told += self.queue.images.due(now, fresh_s)
        told += self.queue.templates.due(now, fresh_s)
        for message in told:
            work.append(partial(Unit.send_host, host=message.host, message=message))
        return work

    def _give_up(self, session: Session) -> Callable[[Unit], object]:
        step = Step(session, Event.GIVE_UP, Outcome.NO_CAPACITY, Reason.WAITED_TOO_LONG)
        return lambda unit: unit.step(step)

    def _needs_command(self, session: Session, now: float) -> bool:
        """Whether its host should have answered by now: a start without an echo, or a stop that is not done."""
        if session.state not in (State.ASSIGNED, State.STOPPING):
            return False
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
