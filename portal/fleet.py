"""What an administrator sees of the fleet: hosts from the ledger, queues from the broker.

A figure that is not fresh is unknown; an old one is never shown as if it were true.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy.exc import DBAPIError

from deskfleet.ledger.reader import Reader
from deskfleet.portal.errors import Problem, Refused
from deskfleet.runtime.bus import AccessRefused, Bus, BusDown, BusError, Outgoing, QueueDepth, QueueMissing
from deskfleet.runtime.service import Clock
from deskfleet.schemas.host import Host, HostReport, Phase
from deskfleet.schemas.messages import DrainRequested, encode
from deskfleet.schemas.topology import COMMANDS, DEAD, SCHEDULER_COMMANDS, core, host_queue

_PATIENCE_S = 2.0

PURPOSES = {
    SCHEDULER_COMMANDS: "Launches and stops for the scheduler",
    "scheduler.reports": "What guests report to the scheduler",
    "scheduler.heartbeats": "Heartbeats of the hosts",
    DEAD: "Messages that nobody could take",
}


_PROBLEMS = {
    BusDown.reason: "The broker can't be reached.",
    QueueMissing.reason: "There is no such queue: the host is not enrolled, or the scheduler has not been started yet.",
    AccessRefused.reason: "The portal's login may not ask about it.",
}


@dataclass(frozen=True, slots=True)
class HostView:
    """A host; `report` is None unless it is fresh. `seen_s` is how long ago it was heard, None when never."""

    name: str
    draining: bool
    message: str
    seen_s: float | None
    report: HostReport | None

    @property
    def guests(self) -> int:
        """How many guests it runs."""
        return sum(1 for guest in self.report.guests if guest.phase is not Phase.ENDED) if self.report else 0


@dataclass(frozen=True, slots=True)
class QueueView:
    """A queue; `messages` and `consumers` are None while they are unknown, `problem` says why."""

    name: str
    purpose: str
    messages: int | None
    consumers: int | None
    problem: str = ""
    needs_consumer: bool = True

    @property
    def alarm(self) -> bool:
        """Whether an administrator should look: nobody reads it, or it is the queue of dead letters and not empty."""
        if self.name == DEAD:
            return bool(self.messages)
        return self.needs_consumer and self.consumers == 0

    @property
    def trouble(self) -> str:
        """What is wrong with it, in words; empty when nothing is."""
        if self.problem:
            return _PROBLEMS.get(self.problem, self.problem)
        if not self.alarm:
            return ""
        return "Look into what is in it." if self.name == DEAD else "Nobody reads it."


class Fleet:
    """Reads the fleet, and asks for changes to it."""

    def __init__(self, reader: Reader, bus: Bus, clock: Clock, silent_s: float) -> None:
        self._reader = reader
        self._bus = bus
        self._clock = clock
        self._silent_s = silent_s

    def readable(self) -> bool:
        """Whether the ledger answers."""
        try:
            self._reader.hosts()
        except DBAPIError:
            return False
        return True

    def hosts(self) -> list[HostView]:
        """Every host by name. Raises Problem when the ledger can't be read."""
        now = self._clock.wall()
        return [self._view(host, now) for host in self._hosts()]

    def host(self, name: str) -> HostView:
        """One host. Raises Problem when it has never reported."""
        for view in self.hosts():
            if view.name == name:
                return view
        raise Problem(Refused.NO_SUCH_HOST)

    def _hosts(self) -> Sequence[Host]:
        try:
            return self._reader.hosts()
        except DBAPIError:
            raise Problem(Refused.RECORDS_AWAY) from None

    def _view(self, host: Host, now: float) -> HostView:
        seen_s = max(0.0, now - host.seen_at) if host.seen_at else None
        fresh = seen_s is not None and seen_s <= self._silent_s
        return HostView(host.name, host.draining, host.message, seen_s, host.report if fresh else None)

    def queues(self) -> list[QueueView]:
        """Every queue that the portal knows of, asked at once. Never raises: what does not answer is unknown."""
        names = [queue.name for queue in core().queues]
        with suppress(DBAPIError):  # the page says elsewhere that the ledger is away
            names += [host_queue(host.name) for host in self._reader.hosts()]
        asked = [(name, self._bus.depth(name)) for name in names]
        until = self._clock.monotonic() + _PATIENCE_S
        return [self._queue(name, depth, until) for name, depth in asked]

    def _queue(self, name: str, depth: Future[QueueDepth], until: float) -> QueueView:
        purpose = PURPOSES.get(name, f"Commands for host {name.removeprefix('host.')}")
        try:
            found = depth.result(max(0.0, until - self._clock.monotonic()))
        except (BusError, FutureTimeout) as error:
            reason = error.reason if isinstance(error, BusError) else "no answer in time"
            return QueueView(name, purpose, None, None, reason)
        return QueueView(name, purpose, found.messages, found.consumers, needs_consumer=name != DEAD)

    def drain(self, host: str, draining: bool, actor: str) -> None:
        """Ask the scheduler to take a host out of placement, or to put it back.

        Raises:
            Problem: the host has never reported, or the queue did not take the message.
        """
        self.host(host)
        kind, body = encode(DrainRequested(host, draining, actor))
        try:
            self._bus.publish(Outgoing(COMMANDS, "scheduler", kind, body)).result(_PATIENCE_S)
        except (BusError, FutureTimeout):
            raise Problem(Refused.QUEUE_AWAY) from None
