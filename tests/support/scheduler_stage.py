"""The real scheduler over the in-memory broker and a ledger, with hosts that speak an agent's messages."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from sqlalchemy import Engine
from support.hosts import IMAGE, MACHINE, ManualClock

from deskfleet.ledger.lease import Lease
from deskfleet.ledger.reader import Reader
from deskfleet.ledger.writer import Writer
from deskfleet.runtime.bus import Delivery, Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker, MemoryBus
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.decisions import Settings
from deskfleet.schemas import topology
from deskfleet.schemas.host import GuestReport, HostReport, Phase
from deskfleet.schemas.messages import (
    HostFence,
    HostImages,
    HostTemplates,
    LaunchRequested,
    Message,
    TemplateOrdered,
    VmReport,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import Birth, Outcome, Resources, Session
from deskfleet.schemas.wire import decode, encode

_SCHEDULER_QUEUES = tuple(queue.name for queue in topology.core().queues if queue.name != topology.DEAD)


class FakeHost:
    """One host: it starts what it is told above the highest number it has seen, and lists it.

    `starts`, `stops`, `fences`, `images`, `templates` and `orders` are the commands it was given. `report` is what it
    says about itself; a test may change it. While `deaf` it is cut off: it neither hears nor speaks, and its guests go
    on.
    """

    def __init__(self, stage: Stage, name: str, **changes: object) -> None:
        self.name = name
        self._stage = stage
        usual = HostReport(
            name, "i1", 0, "b1", 0, False, "127.0.0.1:1", "kvm", 8, 16384, 0.0, 16384, 1 << 20, 1 << 19, (IMAGE,)
        )
        self.report = replace(usual, **changes)  # type: ignore[arg-type]
        self.guests: dict[str, GuestReport] = {}
        self.starts: list[VmStart] = []
        self.stops: list[VmStop] = []
        self.fences: list[HostFence] = []
        self.images: list[HostImages] = []
        self.templates: list[HostTemplates] = []
        self.orders: list[TemplateOrdered] = []
        self.born: Birth | None = None
        stage.broker.declare(topology.EXCHANGES_ONLY + topology.for_host(name))
        self.bus = stage.broker.connect(f"agent-{name}", lambda action: action())
        self.bus.consume(topology.host_queue(name), self._on_delivery)
        self.bus.start()

    @property
    def deaf(self) -> bool:
        return not self.bus.connected

    @deaf.setter
    def deaf(self, cut: bool) -> None:
        if cut:
            self.bus.disconnect()
        else:
            self.bus.reconnect()

    def running(self) -> set[str]:
        """The guests that really run here."""
        return {sid for sid, guest in self.guests.items() if guest.phase is not Phase.ENDED}

    def say(self) -> HostReport:
        """Its next full heartbeat."""
        self.report = replace(self.report, seq=self.report.seq + 1, guests=tuple(self.guests.values()))
        return self.report

    def beat(self) -> None:
        """Send it."""
        self.send(topology.heartbeat_key(self.name), self.say())

    def send(self, key: str, message: Message) -> None:
        """Say anything."""
        self.send_raw(key, *encode(message))

    def send_raw(self, key: str, kind: str, body: bytes) -> None:
        """Say anything at all."""
        self.bus.publish(Outgoing(topology.EVENTS, key, kind, body, mandatory=False))

    def _on_delivery(self, delivery: Delivery) -> None:
        message = decode(delivery.type, delivery.body)
        if isinstance(message, HostFence):
            self.fences.append(message)
            self._passed(message.generation)
            self.report = replace(self.report, fenced=False)
            self.beat()
        elif isinstance(message, HostImages):
            self.images.append(message)
            self.report = replace(self.report, catalogue=message.digest)
        elif isinstance(message, HostTemplates):
            self.templates.append(message)
            self.report = replace(self.report, blueprints=message.digest)
        elif isinstance(message, TemplateOrdered):
            self.orders.append(message)
        elif isinstance(message, VmStart):
            self.starts.append(message)
            if message.generation > self.report.last_generation:
                self._passed(message.generation)
                known = self.guests.get(message.sid)
                guest = known or GuestReport(message.sid, message.generation, Phase.RUNNING, True, birth=self.born)
                self.tell(replace(guest, generation=message.generation))
        elif isinstance(message, VmStop):
            self.stops.append(message)
            self._passed(message.generation)  # a start that comes later is void
            if message.sid in self.guests:
                self.end(message.sid, message.outcome)
        delivery.ack()

    def _passed(self, generation: int) -> None:
        self.report = replace(self.report, last_generation=max(self.report.last_generation, generation))

    def tell(self, guest: GuestReport) -> None:
        """A guest is so from now on, and is reported."""
        self.guests[guest.sid] = guest
        self.send(topology.report_key(self.name), VmReport(self.name, guest))

    def end(self, sid: str, outcome: Outcome = Outcome.GUEST_OFF) -> None:
        """A guest ends."""
        self.tell(replace(self.guests[sid], phase=Phase.ENDED, outcome=outcome))


class Control:
    """One scheduler process. It decides when the stage lets it work."""

    def __init__(self, stage: Stage, broker: MemoryBroker, lease: Lease | None) -> None:
        self._deferred: list[Callable[[], None]] = []
        self.bus: MemoryBus = broker.connect("scheduler", lambda action: action(), declare=topology.core())
        self.scheduler = Scheduler(
            Writer(stage.engine, lease), self.bus, stage.clock, lambda: stage.machines, stage.settings,
            self._deferred.append,
        )  # fmt: skip
        self.bus.start()
        self.scheduler.start()

    def flush(self) -> bool:
        """Decide what has come in; False when there was nothing."""
        work, self._deferred[:] = self._deferred[:], []
        for action in work:
            action()
        return bool(work)


class Stage:
    """A broker, a ledger, one scheduler at first, hosts, and somebody who asks. Time passes when it is told to."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.machines = {"tiny": MACHINE}
        self.clock = ManualClock()
        self.broker = MemoryBroker(random.Random(1), self.clock)
        self.broker.declare(topology.core())
        self.reader = Reader(engine)
        self.hosts: dict[str, FakeHost] = {}
        #: How many of the next messages in a queue are lost.
        self.lose: Counter[str] = Counter()
        self._people = self.broker.connect("portal", lambda action: action())
        self._people.start()
        self.control = self.start()

    def start(self, lease: Lease | None = None) -> Control:
        """A scheduler starts."""
        self.control = Control(self, self.broker, lease)
        return self.control

    @property
    def scheduler(self) -> Scheduler:
        return self.control.scheduler

    def host(self, name: str, **changes: object) -> FakeHost:
        """A host that is there from now on, and was heard."""
        made = self.hosts[name] = FakeHost(self, name, **changes)
        made.beat()
        return made

    def ask(self, message: Message) -> None:
        """Somebody wants something."""
        kind, body = encode(message)
        self._people.publish(Outgoing(topology.COMMANDS, "scheduler", kind, body)).result()

    def work(self) -> None:
        """Everything that waits is delivered and decided, until nothing moves."""
        moved = True
        while moved:
            moved = False
            for queue in _SCHEDULER_QUEUES:
                while self._deliver(queue):
                    moved = True
            moved |= self.control.flush()
            for name in self.hosts:
                while self._deliver(topology.host_queue(name)):
                    moved = True

    def _deliver(self, queue: str) -> bool:
        while self.lose[queue] and self.broker.pending(queue):
            self.broker.drop(queue)
            self.lose[queue] -= 1
        return self.broker.deliver_one(queue)

    def pass_time(self, seconds: float, heard: Iterable[FakeHost] | None = None) -> None:
        """Second by second: hosts (or only those that are `heard`) report every five, the scheduler sweeps."""
        for number in range(round(seconds)):
            self.clock.now += 1.0
            if number % 5 == 0:
                for host in self.hosts.values() if heard is None else heard:
                    if not host.deaf:
                        host.beat()
            self.work()
            self.scheduler.sweep()
            self.work()

    def session(self, sid: str) -> Session:
        """What the ledger holds."""
        found = self.reader.session(sid)
        assert found is not None, f"{sid} is not in the ledger"
        return found

    def dead_letters(self) -> int:
        """How many messages were put aside."""
        return len(self.broker.pending(topology.DEAD))


def sid(number: int) -> str:
    """A session id."""
    return f"{number:032x}"


def launch(number: int, user: str = "ann", **changes: object) -> LaunchRequested:
    """A request for one CPU and 256 MiB."""
    request = LaunchRequested(sid(number), user, (), "tiny", Resources(1, 256, 1), False, 3600, 3600)
    return replace(request, **changes)  # type: ignore[arg-type]
