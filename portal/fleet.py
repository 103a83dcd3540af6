"""What an administrator sees of the fleet: hosts from the ledger, queues from the broker.

A figure that is not fresh is unknown; an old one is never shown as if it were true.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy.exc import DBAPIError

from deskfleet.ledger.reader import Reader
from deskfleet.portal.broker_stats import BrokerStats, QueueStats
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.languages import N_, gettext
from deskfleet.portal.records import Records
from deskfleet.runtime.bus import AccessRefused, Bus, BusDown, BusError, Outgoing, QueueDepth, QueueMissing
from deskfleet.runtime.service import Clock
from deskfleet.schemas.host import Host, HostReport, Phase
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import DrainRequested, ExtendRequested, HostDeclaredDead, TemplateOrdered
from deskfleet.schemas.template import TemplateOrder
from deskfleet.schemas.topology import COMMANDS, DEAD, SCHEDULER_COMMANDS, SCHEDULER_QUESTIONS, core, host_queue
from deskfleet.schemas.wire import encode

_PATIENCE_S = 2.0
#: The longest maintenance message, in characters.
LONGEST_TEXT = 400
_GPUS_S = 5.0
_NO_STATS = QueueStats()

PURPOSES = {
    SCHEDULER_COMMANDS: N_("Launches and stops for the scheduler"),
    SCHEDULER_QUESTIONS: N_("Questions of the launch pages to the scheduler"),
    "scheduler.reports": N_("What guests report to the scheduler"),
    "scheduler.heartbeats": N_("Heartbeats of the hosts"),
    DEAD: N_("Messages that nobody could take"),
}


_PROBLEMS = {
    BusDown.reason: N_("The broker can't be reached."),
    QueueMissing.reason: N_(
        "There is no such queue: the host is not enrolled, or the scheduler has not been started yet."
    ),
    AccessRefused.reason: N_("The portal's login may not ask about it."),
}


@dataclass(frozen=True, slots=True)
class HostView:
    """A host; `report` is None unless it is fresh. `seen_s` is how long ago it was heard, None when never. `dead` was
    declared by an administrator, who also wrote the `message`."""

    name: str
    draining: bool
    dead: bool
    message: str
    seen_s: float | None
    report: HostReport | None

    @property
    def guests(self) -> int:
        """How many guests it runs."""
        return sum(1 for guest in self.report.guests if guest.phase is not Phase.ENDED) if self.report else 0


@dataclass(frozen=True, slots=True)
class ImageView:
    """An image on a host, or on its way there; `machines` are the names under which the catalogue has it. `state` is
    "held" or that of a fetch, whose fields the others are."""

    sha256: str
    machines: tuple[str, ...]
    state: str
    percent: int = 100
    mib: int = 0
    fault: str = ""
    detail: str = ""


def images_on(report: HostReport | None, machines: Mapping[str, Machine]) -> list[ImageView]:
    """The images of a host: what is on its way first, then what it holds, by machine."""
    if report is None:
        return []
    names: dict[str, list[str]] = {}
    for name in sorted(machines):
        names.setdefault(machines[name].sha256, []).append(name)

    def view(sha256: str, state: str, *rest: Any) -> ImageView:
        return ImageView(sha256, tuple(names.get(sha256, ())), state, *rest)

    coming = [
        view(fetch.sha256, fetch.state, fetch.percent, fetch.mib, fetch.fault or "", fetch.detail)
        for fetch in report.fetches or ()
    ]
    held = [view(sha256, "held") for sha256 in report.images]
    return coming + sorted(held, key=lambda image: (not image.machines, image.machines, image.sha256))


def machines_on(hosts: Iterable[HostView], machines: Mapping[str, Machine]) -> dict[str, list[tuple[str, ImageView]]]:
    """Which hosts hold each machine of the catalogue, or are getting it: host and image."""
    where: dict[str, list[tuple[str, ImageView]]] = {name: [] for name in machines}
    for host in hosts:
        for image in images_on(host.report, machines):
            for name in image.machines:
                where[name].append((host.name, image))
    return where


def gpus_held(desktops: Iterable[Desktop]) -> Counter[str]:
    """How many GPUs the desktops of each host have."""
    held: Counter[str] = Counter()
    for desktop in desktops:
        held[desktop.host] += desktop.resources.gpus
    return held


@dataclass(frozen=True, slots=True)
class QueueView:
    """A queue; `messages` and `consumers` are None while they are unknown, `problem` says why. `stats` is what the
    broker's management API tells, where it is asked; `busy_s` is for how many seconds nobody has seen it empty."""

    name: str
    purpose: str
    messages: int | None
    consumers: int | None
    problem: str = ""
    needs_consumer: bool = True
    stats: QueueStats = _NO_STATS
    busy_s: float | None = None

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
            return gettext(_PROBLEMS[self.problem]) if self.problem in _PROBLEMS else self.problem
        if not self.alarm:
            return ""
        return gettext("Look into what is in it.") if self.name == DEAD else gettext("Nobody reads it.")


class Fleet:
    """Reads the fleet, and asks for changes to it."""

    def __init__(
        self, reader: Reader, records: Records, bus: Bus, clock: Clock, stats: BrokerStats | None = None
    ) -> None:
        self._reader = reader
        self._records = records
        self._bus = bus
        self._stats = stats
        self._clock = clock
        self._gpus_at = float("-inf")
        self._free_gpus: dict[str, tuple[int, int]] = {}
        self._busy_since: dict[str, float] = {}

    def readable(self) -> bool:
        """Whether the ledger answers."""
        try:
            self._reader.host_names()
        except DBAPIError:
            return False
        return True

    def hosts(self) -> list[HostView]:
        """Every host by name. Raises Problem when the ledger can't be read."""
        try:
            return [self._view(host) for host in self._reader.hosts()]
        except DBAPIError:
            raise Problem(Refused.RECORDS_AWAY) from None

    def free_gpus(self) -> dict[str, tuple[int, int]]:
        """How many GPUs of each model are free now, and how many there are, on the hosts that take desktops; asked
        at most every few seconds. Empty when the ledger can't be read."""
        now = self._clock.monotonic()
        if now - self._gpus_at > _GPUS_S:
            self._gpus_at = now
            try:
                hosts, live = self._reader.hosts(), self._reader.live()
            except DBAPIError:
                hosts, live = [], []
            taken = {(session.host, address) for session in live for address in session.gpu_addresses}
            found: dict[str, tuple[int, int]] = {}
            for host in hosts:
                report = None if host.draining or host.dead else self._view(host).report
                for gpu in report.gpus if report else ():
                    if gpu.offered:
                        free, there = found.get(gpu.model, (0, 0))
                        busy = any((host.name, address) in taken for address in gpu.functions)
                        found[gpu.model] = (free + (not busy), there + 1)
            self._free_gpus = found
        return self._free_gpus

    def host(self, name: str) -> HostView:
        """One host. Raises Problem when it has never reported."""
        try:
            host = self._reader.host(name)
        except DBAPIError:
            raise Problem(Refused.RECORDS_AWAY) from None
        if host is None:
            raise Problem(Refused.NO_SUCH_HOST)
        return self._view(host)

    def _view(self, host: Host) -> HostView:
        seen_s = max(0.0, self._clock.wall() - host.seen_at) if host.seen_at else None
        report = None if self._records.silent(host.seen_at) else host.report
        return HostView(host.name, host.draining, host.dead, host.message, seen_s, report)

    def queues(self) -> list[QueueView]:
        """Every queue that the portal knows of, asked at once. Never raises: what does not answer is unknown."""
        names = [queue.name for queue in core().queues]
        with suppress(DBAPIError):  # the page says elsewhere that the ledger is away
            names += [host_queue(host) for host in self._reader.host_names()]
        asked = [(name, self._bus.depth(name)) for name in names]
        until = self._clock.monotonic() + _PATIENCE_S
        stats = self._stats.queues() if self._stats else {}
        return [self._queue(name, depth, until, stats.get(name, _NO_STATS)) for name, depth in asked]

    def _queue(self, name: str, depth: Future[QueueDepth], until: float, stats: QueueStats) -> QueueView:
        if name in PURPOSES:
            purpose = gettext(PURPOSES[name])
        else:
            purpose = gettext("Commands for host %(host)s", host=name.removeprefix("host."))
        try:
            found = depth.result(max(0.0, until - self._clock.monotonic()))
        except (BusError, FutureTimeout) as error:
            reason = error.reason if isinstance(error, BusError) else gettext("no answer in time")
            return QueueView(name, purpose, None, None, reason)
        busy_s = self._look_at(name, found.messages)
        read = name != DEAD
        return QueueView(
            name, purpose, found.messages, found.consumers, needs_consumer=read, stats=stats, busy_s=busy_s
        )

    def watch_queues(self) -> None:
        """Look whether the service's own queues are empty. The broker tells the age of the first message of a classic
        queue only, and ours are quorum queues; how long one was never seen empty says as well that something is stuck.
        """
        for queue in core().queues:
            self._bus.depth(queue.name).add_done_callback(partial(self._looked, queue.name))

    def _looked(self, name: str, depth: Future[QueueDepth]) -> None:
        if depth.exception() is None:
            self._look_at(name, depth.result().messages)

    def _look_at(self, name: str, messages: int) -> float | None:
        now = self._clock.monotonic()
        if not messages:
            self._busy_since.pop(name, None)
            return None
        return now - self._busy_since.setdefault(name, now)

    def drain(self, host: str, draining: bool, actor: str, text: str = "") -> None:
        """Ask the scheduler to take a host out of placement, or to put it back; `text` is for the people who use it.

        Raises:
            Problem: the text is too long, the host has never reported, or the queue did not take the message.
        """
        if len(text) > LONGEST_TEXT:
            raise Problem(
                Refused.BAD_FIELDS, details=[gettext("message: at most %(number)s characters", number=LONGEST_TEXT)]
            )
        self._change(DrainRequested(host, draining, actor, " ".join(text.split())))

    def declare_dead(self, host: str, actor: str) -> None:
        """Tell the scheduler that a host does not run: what ran there is given up. Raises Problem as drain() does."""
        self._change(HostDeclaredDead(host, actor))

    def order_template(self, host: str, key: str, order: TemplateOrder, actor: str) -> None:
        """Ask the scheduler to have a host's template made anew or removed. Raises Problem as drain() does, and when
        the host has no such template."""
        report = self.host(host).report
        if report is None or key not in {template.key for template in report.templates or ()}:
            raise Problem(Refused.NOT_FOUND)
        self._send(TemplateOrdered(host, key, order, actor))

    def extend(self, sid: str, actor: str, admin: bool, lifetime_s: int) -> None:
        """Ask the scheduler to let a running desktop last `lifetime_s` seconds in all. Raises Problem when the queue
        did not take the message."""
        self._send(ExtendRequested(sid, actor, admin, lifetime_s))

    def _change(self, message: DrainRequested | HostDeclaredDead) -> None:
        self.host(message.host)
        self._send(message)

    def _send(self, message: DrainRequested | HostDeclaredDead | ExtendRequested | TemplateOrdered) -> None:
        kind, body = encode(message)
        try:
            self._bus.publish(Outgoing(COMMANDS, "scheduler", kind, body)).result(_PATIENCE_S)
        except (BusError, FutureTimeout):
            raise Problem(Refused.QUEUE_AWAY) from None
