"""A real scheduler with its ledger in memory, and hosts that do at once what they are told."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from support.hosts import IMAGE, MACHINE, POLICY, ManualClock

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.reader import Reader, Wait
from deskfleet.ledger.writer import Writer
from deskfleet.runtime.bus import Delivery, Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker, MemoryBus
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.policy import Policy
from deskfleet.schemas import topology
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu, GuestReport, HostReport, Phase
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import (
    DrainRequested,
    ExtendRequested,
    HostDeclaredDead,
    HostFence,
    LaunchRequested,
    Message,
    PlacementAnswered,
    PlacementAsked,
    StopRequested,
    VmExtend,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import Outcome, Resources, Session
from deskfleet.schemas.verdict import Forecast
from deskfleet.schemas.wire import decode, encode


class Host:
    """A host; `silent` keeps it from saying and hearing anything, `broken` makes every start fail, `deaf`
    loses the news that a guest may run longer."""

    def __init__(self, control: Control, name: str, cpus: int, memory_mib: int, gpus: tuple[Gpu, ...]) -> None:
        self.name = name
        self.silent = False
        self.broken = False
        self.deaf = False
        self.generation = 0
        self.told: list[Message] = []
        self.guests: dict[str, tuple[GuestReport, float]] = {}
        self._control = control
        self._cpus, self._memory_mib, self._gpus = cpus, memory_mib, gpus
        self._seq = 0
        control.broker.declare(topology.EXCHANGES_ONLY + topology.for_host(name))
        self._bus = control.broker.connect(f"agent-{name}", lambda action: action())
        self._bus.consume(topology.host_queue(name), self._on_delivery)
        self._bus.start()
        self.beat()

    def report(self) -> HostReport:
        """What it says of itself now."""
        now = self._control.clock.now
        guests = [replace(g, left_s=max(0.0, end - now) if end else None) for g, end in self.guests.values()]
        return HostReport(
            self.name, "i", self._seq, "b", self.generation, False, "127.0.0.1:1", "kvm", self._cpus,
            self._memory_mib, 0.0, self._memory_mib, 1 << 20, 1 << 19, (IMAGE,), self._gpus, tuple(guests),
        )  # fmt: skip

    def beat(self) -> None:
        """Send a full heartbeat, if it may."""
        if not self.silent:
            self._seq += 1
            kind, body = encode(self.report())
            self._bus.publish(Outgoing(topology.EVENTS, topology.heartbeat_key(self.name), kind, body, durable=False))

    def cut(self) -> None:
        """Cut it off: what is sent to it waits in its queue."""
        self.silent = True
        self._bus.disconnect()

    def heal(self) -> None:
        """It hears and speaks again."""
        self.silent = False
        self._bus.reconnect()

    def _on_delivery(self, delivery: Delivery) -> None:
        message = decode(delivery.type, delivery.body)
        self.told.append(message)
        now = self._control.clock.now
        if isinstance(message, VmStart):
            late = message.generation <= self.generation
            self.generation = max(self.generation, message.generation)
            if self.broken:
                failed = GuestReport(
                    message.sid, message.generation, Phase.ENDED, outcome=Outcome.FAILED,
                    reason=Reason.QEMU_EXITED, detail="no /dev/kvm",
                )  # fmt: skip
                self.guests[message.sid] = failed, 0.0
            elif not late:
                running = GuestReport(
                    message.sid, message.generation, Phase.RUNNING, True, lifetime_s=message.lifetime_s
                )
                self.guests[message.sid] = running, now + message.lifetime_s
        elif isinstance(message, VmStop):
            ended = GuestReport(message.sid, message.generation, Phase.ENDED, True, outcome=message.outcome)
            self.guests[message.sid] = ended, 0.0
        elif isinstance(message, VmExtend) and not self.deaf:
            guest, end = self.guests[message.sid]
            longer = message.lifetime_s - (guest.lifetime_s or 0)
            self.guests[message.sid] = replace(guest, lifetime_s=message.lifetime_s), end + longer
        elif isinstance(message, HostFence):
            self.generation = max(self.generation, message.generation)
        delivery.ack()
        self.beat()


class Control:
    """The scheduler and whoever speaks to it. Time passes by `wait` alone."""

    def __init__(self, policy: Policy = POLICY, **settings: object) -> None:
        self.clock = ManualClock()
        self.broker = MemoryBroker(random.Random(1), self.clock)
        self.engine = open_engine("sqlite://")
        migrate(self.engine)
        self.reader = Reader(self.engine)
        self.hosts: dict[str, Host] = {}
        self.machines: dict[str, Machine] = {"tiny": MACHINE}
        self._deferred: list[Callable[[], None]] = []
        self._scheduler_bus: MemoryBus | None = None
        self._settings = replace(Settings(policy=policy), **settings)  # type: ignore[arg-type]
        self.start()
        self._portal = self.broker.connect("portal", lambda action: action(), declare=topology.for_portal("w1"))
        self._portal.consume(topology.answers_queue("w1"), self._on_answer)
        self._portal.start()
        self._answers: list[Forecast] = []
        self._sids = 0

    def start(self) -> None:
        """Start the scheduler, or start it anew: the former one is gone."""
        self._deferred.clear()
        if self._scheduler_bus:
            self._scheduler_bus.stop()
        self._scheduler_bus = bus = self.broker.connect("scheduler", lambda action: action(), declare=topology.core())
        self.scheduler = Scheduler(
            Writer(self.engine), bus, self.clock, lambda: self.machines, self._settings, self._deferred.append
        )
        self.scheduler.start()
        bus.start()

    def host(self, name: str = "h1", cpus: int = 4, memory_mib: int = 16384, gpus: tuple[Gpu, ...] = ()) -> Host:
        """Add a host."""
        self.hosts[name] = Host(self, name, cpus, memory_mib, gpus)
        self.work()
        return self.hosts[name]

    def work(self) -> None:
        """Deliver and decide until nothing moves."""
        for _ in range(100):
            moved = self.broker.run()
            while self._deferred:
                moved += 1
                self._deferred.pop(0)()
            if not moved:
                return
        raise AssertionError("it never comes to rest")

    def wait(self, seconds: float) -> None:
        """Time passes, a second at a time: hosts beat every five, leases end."""
        for _ in range(round(seconds)):
            self.clock.now += 1.0
            for host in self.hosts.values():
                for sid, (guest, end) in list(host.guests.items()):
                    if end and self.clock.now >= end:
                        gone = replace(guest, phase=Phase.ENDED, outcome=Outcome.EXPIRED, reason=Reason.EXPIRED)
                        host.guests[sid] = gone, 0.0
                        host.beat()
                if self.clock.now % 5 == 0:
                    host.beat()
            self.broker.run_ticks()
            self.work()

    def send(self, message: Message, key: str = "scheduler") -> None:
        """Say something as the portal does."""
        kind, body = encode(message)
        self._portal.publish(Outgoing(topology.COMMANDS, key, kind, body)).result()
        self.work()

    def launch(
        self,
        user: str = "ann",
        cpus: int = 1,
        memory_mib: int = 64,
        gpus: int = 0,
        lifetime_s: int = 3600,
        groups: tuple[str, ...] = (),
        gpu_model: str = "",
        wait_s: int = 36_000,
    ) -> str:
        """Ask for a desktop; its sid."""
        self._sids += 1
        sid = f"{self._sids:032x}"
        size = Resources(cpus, memory_mib, 1, gpus, gpu_model)
        self.send(LaunchRequested(sid, user, groups, "tiny", size, False, lifetime_s, wait_s))
        return sid

    def ask(self, user: str = "ann", groups: tuple[str, ...] = (), lifetime_s: int = 3600, **size: int) -> Forecast:
        """What would become of a request."""
        wanted = replace(Resources(1, 64, 1), **size)  # type: ignore[arg-type]
        self.send(PlacementAsked("f" * 32, "w1", user, groups, "tiny", wanted, lifetime_s), "questions")
        return self._answers.pop()

    def _on_answer(self, delivery: Delivery) -> None:
        answer = decode(delivery.type, delivery.body)
        assert isinstance(answer, PlacementAnswered)
        self._answers.append(answer.forecast)
        delivery.ack()

    def stop(self, sid: str, actor: str = "ann") -> None:
        """Stop a desktop."""
        self.send(StopRequested(sid, actor, False))

    def extend(self, sid: str, lifetime_s: int, actor: str = "ann") -> None:
        """Ask for more time."""
        self.send(ExtendRequested(sid, actor, False, lifetime_s))

    def drain(self, host: str, draining: bool = True, text: str = "") -> None:
        """Drain a host."""
        self.send(DrainRequested(host, draining, "root", text))

    def declare_dead(self, host: str) -> None:
        """Declare a host dead."""
        self.send(HostDeclaredDead(host, "root"))

    def session(self, sid: str) -> Session:
        """A session as the ledger has it."""
        session = self.reader.session(sid)
        assert session
        return session

    def state(self, sid: str) -> str:
        """Its state, in a word."""
        return self.session(sid).state.value

    def told(self, sid: str) -> Wait:
        """What somebody who waits is told."""
        wait = self.reader.wait(sid)
        assert wait, f"{sid} does not wait"
        return wait
