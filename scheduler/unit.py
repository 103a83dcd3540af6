"""One transaction of the scheduler: changes to ledger and cache, and the messages that follow when it is committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deskfleet.ledger.writer import Transaction
from deskfleet.runtime.bus import Outgoing
from deskfleet.scheduler.fleet import Fleet
from deskfleet.scheduler.placement import Placement
from deskfleet.scheduler.reconcile import Step
from deskfleet.schemas import topology
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import (
    HostFence,
    HostImages,
    HostInventory,
    HostTemplates,
    PlacementAnswered,
    SessionChanged,
    TemplateOrdered,
    VmExtend,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import Event, Outcome, Session, State, advance, place
from deskfleet.schemas.template import fitting
from deskfleet.schemas.verdict import Verdict
from deskfleet.schemas.wire import encode


@dataclass(frozen=True, slots=True)
class Limits:
    """What every guest is told, in seconds: how long a single-shot guest outlives its last viewer, how long it waits
    for the first, and after how long without viewers and without work a guest counts as idle and ends (0: never)."""

    grace_s: int = 60
    connect_s: int = 600
    idle_s: int = 0


class Unit:
    """Collects what one transaction does. `outbox` is published only after the commit, so no host hears of a
    decision that the ledger does not hold."""

    def __init__(self, tx: Transaction, fleet: Fleet, wall: float, limits: Limits) -> None:
        self.tx = tx
        self.outbox: list[Outgoing] = []
        self._fleet = fleet
        self._wall = wall
        self._limits = limits

    def add(self, session: Session) -> bool:
        """Record a new request; False when it is a repeat."""
        added = self.tx.add(session)
        if added:
            self._fleet.put(session)
        return added

    def step(self, step: Step, verdicts: Sequence[Verdict] = ()) -> Session:
        """Apply an event to a session.

        Raises:
            IllegalTransition, Conflict: the step was decided on a picture that no longer holds.
        """
        after = advance(step.session, step.event, outcome=step.outcome, reason=step.reason, detail=step.detail)
        after = replace(after, attempt=after.attempt + int(step.counted), birth=step.birth or after.birth)
        return self._save(step.session, after, step.event, verdicts)

    def _save(self, before: Session, after: Session, event: Event, verdicts: Sequence[Verdict] = ()) -> Session:
        # A guest that may run longer, or of which something is told, has begun to run when it did.
        after = after if event in (Event.EXTEND, Event.TELL) else replace(after, changed_at=self._wall)
        self.tx.save(before, after, event, verdicts)
        self._fleet.put(after)
        self._announce(after)
        return after

    def start(self, session: Session, placement: Placement, machine: Machine) -> Session:
        """Assign a queued session under the next command number of the host, and tell the host."""
        generation = self._claim(placement.host)
        placed = place(session, placement.host, generation, placement.gpu_addresses, placement.why)
        return self._command(self._save(session, placed, Event.PLACE), machine)

    def reissue(self, session: Session, machine: Machine) -> Session:
        """Send the start of an assigned session again under a new number; the old command can't come true then."""
        again = replace(session, generation=self._claim(session.host))
        return self._command(self._save(session, again, Event.PLACE), machine)

    def _claim(self, host: str) -> int:
        state = self._fleet.hosts[host]
        state.generation = self.tx.claim(host, state.generation)
        return state.generation

    def burn(self, host: str) -> None:
        """Take a command number of a host that is never used: everything up to it is void."""
        self._claim(host)

    def _command(self, session: Session, machine: Machine) -> Session:
        blueprint = fitting(machine, session.resources, session.groups)
        self.send_host(
            session.host,
            VmStart(
                sid=session.sid,
                generation=session.generation,
                user=session.user,
                machine=session.machine,
                os=machine.os,
                sha256=machine.sha256,
                format=machine.format,
                video=machine.video,
                firmware=machine.firmware,
                resources=session.resources,
                gpu_addresses=session.gpu_addresses,
                persistent=session.persistent,
                lifetime_s=session.lifetime_s,
                grace_s=self._limits.grace_s,
                connect_s=self._limits.connect_s,
                idle_s=self._limits.idle_s,
                drivers=machine.drivers,
                template=blueprint.key if blueprint else "",
            ),
        )
        return session

    def extend(self, session: Session, lifetime_s: int) -> Session:
        """Let a running session last longer, and tell its host."""
        longer = replace(advance(session, Event.EXTEND), lifetime_s=lifetime_s)
        self.tell_lifetime(self._save(session, longer, Event.EXTEND))
        return longer

    def tell_lifetime(self, session: Session) -> None:
        """Tell the host (again) how long a guest may run."""
        self.send_host(session.host, VmExtend(session.sid, session.generation, session.lifetime_s))

    def stop(self, session: Session, outcome: Outcome, reason: Reason) -> Session:
        """End a session: at once while it waits, else by telling its host."""
        if session.state is State.STOPPING:
            stopping = session
        else:
            stopping = self.step(Step(session, Event.STOP, outcome, reason))
        if stopping.state is State.STOPPING:
            self.repeat_stop(stopping)
        return stopping

    def repeat_stop(self, session: Session) -> None:
        """Tell the host (again) to end a stopping session."""
        outcome, reason = session.outcome or Outcome.STOPPED, session.reason or Reason.STOPPED_BY_ADMIN
        self.send_host(session.host, VmStop(session.sid, session.generation, outcome, reason))

    def answer(self, replica: str, answer: PlacementAnswered) -> None:
        """Answer a portal's question. Lost answers are no harm: somebody just is not told beforehand."""
        kind, body = encode(answer)
        key = topology.answer_key(replica)
        self.outbox.append(
            Outgoing(topology.EVENTS, key, kind, body, correlation_id=answer.question, durable=False, mandatory=False)
        )

    def send_host(
        self,
        host: str,
        message: VmStart | VmStop | VmExtend | HostFence | HostImages | HostInventory | HostTemplates | TemplateOrdered,
    ) -> None:
        """Queue a command for a host."""
        kind, body = encode(message)
        sid = message.sid if isinstance(message, VmStart | VmStop | VmExtend) else ""
        self.outbox.append(Outgoing(topology.COMMANDS, topology.host_queue(host), kind, body, correlation_id=sid))

    def _announce(self, session: Session) -> None:
        kind, body = encode(
            SessionChanged(session.sid, session.state, session.outcome, session.host, session.generation)
        )
        # Transient, and nobody need listen: the ledger is the truth, this only saves the listeners a poll.
        self.outbox.append(
            Outgoing(
                topology.EVENTS,
                topology.session_key(session.sid),
                kind,
                body,
                correlation_id=session.sid,
                durable=False,
                mandatory=False,
            )
        )
