"""The queue at work: who can start is started, who can't is told why, how far in front, and until when. No I/O of its
own: it works on a `Unit`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from operator import itemgetter

from deskfleet.ledger.reader import Wait
from deskfleet.scheduler.filters import Moment, Reservation, Want
from deskfleet.scheduler.fleet import Fleet
from deskfleet.scheduler.images import Images
from deskfleet.scheduler.placement import NoFit, choose, explain
from deskfleet.scheduler.plan import reserve, starts
from deskfleet.scheduler.policy import Policy
from deskfleet.scheduler.stats import Stats
from deskfleet.scheduler.templates import Templates
from deskfleet.scheduler.turns import capped, in_order
from deskfleet.scheduler.unit import Unit
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.session import Session
from deskfleet.schemas.template import fitting
from deskfleet.schemas.verdict import Verdict

#: So many of the queue get an estimate; for those behind them too much can happen.
MOST_ESTIMATES = 200
#: A pass is one transaction, and nobody else may lead meanwhile: so many rows are written in one, the rest in the next.
MOST_TOLD = 1_000
#: For so many of a kind, in one pass, a place is looked for that frees in time.
MOST_PLANS = 3
#: Seconds for which a reservation is good, and for which estimates are.
_REPLAN_S = 1.0
#: So few who wait get an estimate at once.
_FEW = 20


@dataclass(frozen=True, slots=True)
class Blocked:
    """Somebody who can't start now: what is wanted (None when a rule of the queue stands before any host), and why."""

    session: Session
    want: Want | None
    rule: Verdict | None = None


class Queue:
    """The waiting sessions of a fleet. `now` is monotonic seconds."""

    def __init__(
        self,
        fleet: Fleet,
        machines: Callable[[], Mapping[str, Machine]],
        policy: Policy,
        explain_s: float,
        stats: Stats,
    ) -> None:
        self._fleet = fleet
        self._machines = machines
        self._policy = policy
        self._explain_s = explain_s
        self._stats = stats
        self.images = Images(fleet, machines, explain_s)
        self.templates = Templates(fleet, machines, policy.templates_min, policy.templates_share, explain_s)
        #: Set by whatever may let somebody start.
        self.soon = True
        self.waited: dict[str, float] = {}  # sid -> seconds in the queue
        self.failures: dict[str, tuple[Verdict, ...]] = {}  # sid -> the failed starts so far
        self._reserved: dict[str | None, tuple[Reservation | None, float]] = {}  # kind -> reservation, made at
        self._estimates: dict[str, float] = {}  # sid -> monotonic seconds
        self._estimated = float("-inf")
        self._estimated_for: set[str] = set()
        self._hopeless: dict[tuple[object, ...], float] = {}  # shapes that no lease end helps, and when that was seen
        self._told: dict[str, tuple[float, tuple[object, ...]]] = {}  # sid -> when something was written down, and what

    def forget(self) -> None:
        """Drop what is known of sessions that have ended."""
        known: tuple[dict[str, object], ...] = (self.waited, self.failures, self._told, self._estimates)  # type: ignore[assignment]
        for entries in known:
            for sid in entries.keys() - self._fleet.sessions.keys():
                del entries[sid]

    def want(self, session: Session, machine: Machine) -> Want:
        """What a session needs from a host."""
        blueprint = fitting(machine, session.resources, session.groups)
        failed_on = frozenset(verdict.host for verdict in self.failures.get(session.sid, ()))
        return Want(
            sid=session.sid,
            resources=session.resources,
            sha256=machine.sha256,
            lifetime_s=session.lifetime_s,
            labels=frozenset(machine.labels),
            admitted=self._policy.admitted(session.groups),
            confined=self._policy.confined(session.groups),
            avoid=failed_on,
            template=blueprint.key if blueprint else "",
        )

    def in_order(self, more: Iterable[Session] = ()) -> list[Session]:
        """The queue in the order of turns, with `more` as if they had asked now."""
        fleet = self._fleet
        return list(in_order([*fleet.waiting(), *more], fleet.used, fleet.total(), self._policy))

    def rule(self, session: Session) -> Verdict | None:
        """The rule of the queue that keeps somebody waiting whatever the hosts say; None when there is none."""
        fleet = self._fleet
        return capped(session.user, session.groups, session.resources, fleet.used, fleet.grouped, self._policy)

    def moment(self, now: float) -> Moment:
        """The present, with the room that is kept."""
        kept: dict[str, tuple[Reservation, ...]] = {}
        for entry, _ in self._reserved.values():
            if entry and entry.sid in self._fleet.sessions and not self._fleet.sessions[entry.sid].on_host:
                kept[entry.host] = (*kept.get(entry.host, ()), entry)
        return Moment(now, self._policy, kept)

    def run(self, unit: Unit, now: float) -> None:
        """Give everybody a turn, in order. Who fits nowhere does not hold up those behind who do."""
        self.soon = False
        order = self.in_order()
        if not order:
            self._reserved.clear()
            self._seek((), self.moment(now))
            return
        machines = self._machines()
        owners = {entry.sid for entry, made in self._reserved.values() if entry and now - made < _REPLAN_S}
        self._reserved = {
            kind: (entry, made) for kind, (entry, made) in self._reserved.items() if entry and entry.sid in owners
        }
        self._hopeless = {shape: seen for shape, seen in self._hopeless.items() if now - seen < self._explain_s}
        plans: Counter[str | None] = Counter()
        at = self.moment(now)
        refused: set[tuple[object, ...]] = set()
        blocked: list[Blocked] = []
        for session in order:
            machine = machines.get(session.machine)
            rule = self.rule(session) if machine else Verdict("", Reason.UNKNOWN_MACHINE)
            if rule or machine is None:
                blocked.append(Blocked(session, None, rule))
                continue
            want = self.want(session, machine)
            # Within one pass room only shrinks: what did not fit once does not fit later.
            if at.shape(want) not in refused or want.sid in owners:
                choice = choose(want, self._fleet.index.walk(want), at)
                if not isinstance(choice, NoFit):
                    unit.start(session, choice, machine)
                    self._fleet.ends(session.sid, now + session.lifetime_s)
                    self._fleet.hosts[choice.host].resting.tries(machine.sha256, session.sid, now)
                    for kept in at.reservations.get(choice.host, ()):
                        kept.spend(want, now, self._policy.guest_overhead_mib)
                    self._stats.placed += 1
                    self._stats.waited.add(self.waited.get(session.sid, session.waited_s))
                    continue
                refused.add(at.shape(want))
                at = self._keep_room(want, at, plans)
            blocked.append(Blocked(session, want))
        self._seek([entry.want for entry in blocked if entry.want], at)
        self._tell(unit, blocked, at)

    def _seek(self, wants: Sequence[Want], at: Moment) -> None:
        self.images.seek(wants, at)
        self.templates.seek(wants, at)

    def _keep_room(self, want: Want, at: Moment, plans: Counter[str | None]) -> Moment:
        """Keep room for the first of its kind that can't start now and that some lease end will let start."""
        kind, shape = want.resources.gpu_model if want.resources.gpus else None, at.shape(want)
        held, _ = self._reserved.get(kind, (None, 0.0))
        if held or shape in self._hopeless or plans[kind] >= MOST_PLANS:
            return at
        plans[kind] += 1
        made = reserve(want, self._fleet.hosts, self._fleet.leases(), at.now, self._policy)
        if made is None:
            self._hopeless[shape] = at.now
            return at
        self._reserved[kind] = (made, at.now)
        return self.moment(at.now)

    def _tell(self, unit: Unit, blocked: list[Blocked], at: Moment) -> None:
        """Write down place, estimate and reasons: when they change, else now and then, since figures always do."""
        self._estimate(blocked, at)
        shared: dict[tuple[object, ...], tuple[Verdict, ...]] = {}
        due = []
        for place, entry in enumerate(blocked, 1):
            sid = entry.session.sid
            verdicts = self._verdicts(entry, at, shared)
            news = (place, sid in self._estimates, tuple((verdict.host, verdict.reason) for verdict in verdicts))
            told_at, told = self._told.get(sid, (float("-inf"), ()))
            if told == news and at.now - told_at < self._explain_s:
                continue
            due.append((told_at, place, entry.session, verdicts, news))
        rows = []
        # Whoever was told longest ago comes first.
        for _, place, session, verdicts, news in nsmallest(MOST_TOLD, due, key=itemgetter(0)):
            if self._told.get(session.sid, (0.0, ()))[1] != news:
                self._stats.refused.update(verdict.reason for verdict in verdicts)
            self._told[session.sid] = at.now, news
            estimate = self._estimates.get(session.sid)
            wait = Wait(place, None if estimate is None else max(0.0, estimate - at.now), verdicts)
            rows.append((session.sid, wait, self.waited.get(session.sid, session.waited_s)))
        unit.tx.explain(rows)

    def _verdicts(
        self, entry: Blocked, at: Moment, shared: dict[tuple[object, ...], tuple[Verdict, ...]]
    ) -> tuple[Verdict, ...]:
        if entry.want is None:
            return (entry.rule,) if entry.rule else ()
        shape = at.shape(entry.want)
        if shape not in shared:
            shared[shape] = explain(entry.want, self._fleet.hosts.values(), at)
        return (*shared[shape], *self.failures.get(entry.session.sid, ()))

    def _estimate(self, blocked: list[Blocked], at: Moment) -> None:
        wants = [entry.want for entry in blocked[:MOST_ESTIMATES] if entry.want]
        new = any(want.sid not in self._estimated_for for want in wants)
        age = at.now - self._estimated
        soon = new and (age >= _REPLAN_S or len(wants) <= _FEW)
        if not wants or not (soon or age >= self._explain_s):
            return
        self._estimated, self._estimated_for = at.now, {want.sid for want in wants}
        expected = starts(wants, self._fleet.hosts, self._fleet.leases(), at)
        self._estimates = {sid: start.at for sid, start in expected.items()}
