"""A whole cluster in one process on a virtual clock: real scheduler, ledger and agent code; simulated broker, journal
disk and virtual machines. One seed decides everything, so one seed repeats one history exactly."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import Engine, select

from deskfleet.agent.core import Agent
from deskfleet.agent.journal import Entry
from deskfleet.agent.link import Link
from deskfleet.ledger import tables
from deskfleet.ledger.engine import open_engine
from deskfleet.ledger.reader import live_sessions
from deskfleet.ledger.rows import to_session
from deskfleet.ledger.writer import Writer
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker, MemoryBus
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.placement import Policy
from deskfleet.schemas import topology
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu, HostReport
from deskfleet.schemas.machine import Firmware, Format, GpuPolicy, Machine, Os, Range, Video
from deskfleet.schemas.messages import LaunchRequested, StopRequested, encode
from deskfleet.schemas.session import Resources, Session, State

IMAGE = "a" * 64
MACHINE = Machine(
    name="tiny",
    title="Tiny",
    text="A machine of the simulator",
    os=Os.OTHER,
    file="tiny.iso",
    format=Format.ISO,
    sha256=IMAGE,
    video=Video.STD,
    firmware=Firmware.BIOS,
    cpus=Range(1, 1, 8),
    memory_mib=Range(64, 512, 4096),
    disk_gib=Range(1, 1, 8),
    gpu=GpuPolicy.OPTIONAL,
    users=("*",),
)
CPUS, MEMORY_MIB = 2, 4096
POLICY = Policy(cpu_overcommit=2.0, host_reserve_mib=0)


class Violation(AssertionError):
    """Raised when an invariant does not hold; the message names it."""


class Crash(BaseException):
    """A process dies here. Not an Exception, so nothing in the product can catch it."""


@dataclass
class Clock:
    """The virtual clock."""

    now: float = 1000.0
    shift: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1.7e9 + self.now + self.shift


@dataclass
class Vm:
    """A virtual machine that exists, whoever knows of it."""

    sid: str
    gpus: tuple[str, ...]
    ready: bool = False
    going_down: bool = False


@dataclass
class Disk:
    """A journal's disk: what was written stays; `die` names the write at which the agent dies (before or after)."""

    entries: dict[str, Entry] = field(default_factory=dict)
    generation: int | None = None
    die: str = ""

    def load(self) -> tuple[dict[str, Entry], int | None]:
        return dict(self.entries), self.generation

    def _write(self, change: Callable[[], None]) -> None:
        die, self.die = self.die, ""
        if die == "before":
            raise Crash
        change()
        if die == "after":
            raise Crash

    def put(self, entry: Entry) -> None:
        self._write(lambda: self.entries.__setitem__(entry.sid, entry))

    def forget(self, sid: str) -> None:
        self._write(lambda: self.entries.pop(sid, None) and None)

    def set_generation(self, generation: int) -> None:
        def change() -> None:
            self.generation = generation

        self._write(change)


@dataclass(frozen=True)
class Job:
    """Something that a hypervisor does for one guest, a little later."""

    sid: str
    work: Callable[[], None]

    def __call__(self) -> None:
        self.work()


class Node:
    """One host: its machines and its disk live on when the agent dies."""

    def __init__(self, world: World, name: str, gpus: int) -> None:
        self.world = world
        self.name = name
        self.boot = 1
        self.disk = Disk()
        self.vms: dict[str, Vm] = {}
        self.files: set[str] = set()
        #: What the hypervisor of the living agent still has to do or to tell.
        self.todo: list[Job] = []
        self.lives = 0
        addresses = [f"0000:0{n + 1}:00.0" for n in range(gpus)]
        self.gpus = tuple(Gpu(a, "G1", n, (a, a[:-1] + "1"), True) for n, a in enumerate(addresses))
        self.bus: MemoryBus | None = None
        self.agent: Agent
        self.link: Link
        self.start()

    def start(self) -> None:
        """Start the agent's process."""
        self.lives += 1
        self.todo.clear()
        life = self.lives
        self.bus = bus = self.world.broker.connect(f"agent-{self.name}", lambda action: action())
        self.agent = agent = Agent(
            boot_id=f"boot-{self.boot}",
            journal=self.disk,
            hypervisor=self,
            report=lambda guest: self.link.report(guest),  # noqa: PLW0108  link comes later
            now=self.world.clock.monotonic,
            images=lambda: frozenset({IMAGE}),
            gpus=lambda: self.gpus,
        )
        describe = lambda seq: self.describe(f"{self.name}-{life}", seq)  # noqa: E731
        self.link = Link(self.name, bus, agent, describe, self.world.clock.monotonic)
        agent.recover()
        for sid in (set(self.vms) | self.files) - {entry.sid for entry in agent.entries if entry.live}:
            self.clean(sid)
        self.link.start()
        bus.every(5.0, self.link.beat)
        bus.every(1.0, agent.tick)

    def kill(self) -> None:
        """kill -9 of the agent: what it held on the broker goes back, its guests run on."""
        self.todo.clear()
        self.disk.die = ""
        if self.bus:
            self.bus.stop()
            self.bus = None

    def reboot(self) -> None:
        """The machine restarts: agent and guests are gone, files stay."""
        self.kill()
        self.boot += 1
        self.vms.clear()

    def describe(self, incarnation: str, seq: int) -> HostReport:
        used = sum(1 for vm in self.vms.values())
        return HostReport(
            host=self.name,
            incarnation=incarnation,
            seq=seq,
            boot_id=f"boot-{self.boot}",
            last_generation=self.agent.last_generation,
            fenced=self.agent.fenced,
            console="127.0.0.1:6080",
            accel="tcg",
            cpus=CPUS,
            memory_mib=MEMORY_MIB,
            load1=used * 0.1,
            memory_free_mib=MEMORY_MIB,
            disk_mib=1 << 20,
            disk_free_mib=1 << 19,
            images=(IMAGE,),
            gpus=self.gpus,
            guests=self.agent.guests(),
        )

    # --- the hypervisor of agent/core.py --------------------------------------------------------------------

    def launch(self, entry: Entry) -> None:
        assert entry.start
        sid, gpus = entry.sid, entry.start.gpu_addresses
        self.files.add(sid)

        def spawn() -> None:
            if self.world.chance("start_fails"):
                self.agent.failed(sid, Reason.QEMU_EXITED, "simulated")
                return
            self.world.spawned(self, sid, gpus)
            self.vms[sid] = Vm(sid, gpus)
            self.todo.append(Job(sid, come_up))

        def come_up() -> None:
            vm = self.vms.get(sid)
            if vm is None or vm.going_down:
                return
            if self.world.chance("start_fails"):
                del self.vms[sid]
                self.agent.failed(sid, Reason.QEMU_EXITED, "simulated")
                return
            vm.ready = True
            self.agent.ready(sid)
            self.world.readied[sid] = self.name  # only now: until it is in the journal, nobody has been told

        self.todo.append(Job(sid, spawn))

    def shutdown(self, entry: Entry) -> None:
        sid = entry.sid
        vm = self.vms.get(sid)
        if vm:
            vm.going_down = True

        def gone() -> None:
            self.vms.pop(sid, None)
            self.agent.exited(sid)

        # A launch that has not spawned yet is cancelled, as the real one is.
        self.todo = [job for job in self.todo if job.sid != sid]
        self.todo.append(Job(sid, gone))

    def adopt(self, entry: Entry) -> bool:
        vm = self.vms.get(entry.sid)
        if vm is None:
            return False
        if not entry.ran:
            sid = entry.sid

            def come_up() -> None:
                if sid in self.vms:
                    self.vms[sid].ready = True
                    self.agent.ready(sid)
                    self.world.readied[sid] = self.name

            self.todo.append(Job(sid, come_up))
        return True

    def clean(self, sid: str) -> None:
        vm = self.vms.pop(sid, None)
        self.files.discard(sid)
        if vm and vm.ready and not vm.going_down:
            self.world.taken_away(self, sid)

    def power_off(self, sid: str) -> None:
        """The person shuts the guest down from inside."""
        self.vms.pop(sid, None)
        if self.bus:
            self.agent.exited(sid)


class FragileBus:
    """The scheduler's bus, which can die on the way to a publish: after the commit, before the message."""

    def __init__(self, bus: MemoryBus) -> None:
        self._bus = bus
        self.die_at = 0

    def publish(self, message: Outgoing) -> object:
        if self.die_at:
            self.die_at -= 1
            if not self.die_at:
                raise Crash
        return self._bus.publish(message)

    def __getattr__(self, name: str) -> object:
        return getattr(self._bus, name)


class World:
    """The cluster, its people, and what is known about it from outside."""

    def __init__(self, seed: int, faults: frozenset[str], hosts: int = 3) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.clock = Clock()
        self.log = hashlib.sha256()
        self.steps: list[str] = []
        self.engine: Engine = open_engine("sqlite://")
        tables.metadata.create_all(self.engine)
        self.broker = MemoryBroker(random.Random(seed + 1), self.clock)
        names = [f"h{n + 1}" for n in range(hosts)]
        for name in names:
            self.broker.declare(topology.EXCHANGES_ONLY + topology.for_host(name))
        self.deferred: list[Callable[[], None]] = []
        self.scheduler: Scheduler | None = None
        self.scheduler_bus: FragileBus
        self._raw_bus: MemoryBus
        self.start_scheduler()
        self.readied: dict[str, str] = {}  # sid -> the host on which it has run
        self.spawns: list[tuple[str, str]] = []
        self.stopped: set[str] = set()
        self.asked: dict[str, LaunchRequested] = {}
        self.portal = self.broker.connect("portal", lambda action: action())
        self.portal.start()
        self.nodes = {name: Node(self, name, gpus=n % 2) for n, name in enumerate(names)}

    def note(self, text: str) -> None:
        """A line of history."""
        self.steps.append(f"{self.clock.now:.1f} {text}")
        self.log.update(text.encode())

    def chance(self, fault: str, share: float = 0.15) -> bool:
        """Whether an odd thing happens now, if this walk has it on."""
        return fault in self.faults and self.rng.random() < share

    # --- processes ------------------------------------------------------------------------------------------

    def start_scheduler(self) -> None:
        self._raw_bus = self.broker.connect("scheduler", lambda action: action(), declare=topology.core())
        self.scheduler_bus = FragileBus(self._raw_bus)
        self.deferred.clear()
        self.scheduler = Scheduler(
            Writer(self.engine),
            self.scheduler_bus,  # type: ignore[arg-type]
            self.clock,
            lambda: {"tiny": MACHINE},
            Settings(policy=POLICY),
            self.deferred.append,
        )
        self.scheduler.start()
        self._raw_bus.start()

    def kill_scheduler(self) -> None:
        self.deferred.clear()
        self.scheduler = None
        self._raw_bus.stop()

    def flush(self) -> None:
        """Run what the scheduler put off: one batch."""
        work, self.deferred[:] = list(self.deferred), []
        for action in work:
            action()

    # --- people ---------------------------------------------------------------------------------------------

    def ask(self, request: LaunchRequested) -> None:
        """A click on Launch: stored by the portal first, then sent until it is known."""
        self.asked[request.sid] = request
        self._send(request)

    def ask_stop(self, sid: str) -> None:
        self.stopped.add(sid)
        self._send(StopRequested(sid, self.asked[sid].user, False))

    def _send(self, message: LaunchRequested | StopRequested) -> None:
        kind, body = encode(message)
        self.portal.publish(Outgoing(topology.COMMANDS, "scheduler", kind, body, correlation_id=message.sid))

    def portal_sweep(self) -> None:
        """Send again what the ledger does not know, and stops that had no effect."""
        known = {session.sid: session for session in self.sessions()}
        for sid, request in self.asked.items():
            if sid not in known:
                self._send(request)
        for sid in self.stopped:
            session = known.get(sid)
            if session and session.state not in (State.STOPPING, State.ENDED):
                self._send(StopRequested(sid, session.user, False))

    def random_request(self) -> LaunchRequested:
        rng = self.rng
        return LaunchRequested(
            sid=f"{rng.getrandbits(128):032x}",
            user=rng.choice(["ann", "bo", "zoë"]),
            groups=(),
            machine="tiny" if rng.random() > 0.03 else "no-such",
            resources=Resources(
                rng.choice([1, 1, 2, 4]), rng.choice([256, 512, 1024]), 1, int(rng.random() < 0.25), ""
            ),
            persistent=rng.random() < 0.5,
            lifetime_s=rng.choice([60, 600, 36000]),
            wait_s=rng.choice([30, 600, 6000]),
        )

    # --- evidence -------------------------------------------------------------------------------------------

    def sessions(self) -> list[Session]:
        with self.engine.connect() as connection:
            return [to_session(row) for row in connection.execute(select(tables.session)).mappings()]

    def live(self) -> list[Session]:
        with self.engine.connect() as connection:
            return live_sessions(connection)

    def spawned(self, node: Node, sid: str, gpus: tuple[str, ...]) -> None:
        """The wrapper around qemu: it sees every start, whoever ordered it."""
        self.spawns.append((node.name, sid))
        for other in self.nodes.values():
            if sid in other.vms:
                raise Violation(f"I2: {sid} starts on {node.name} and runs on {other.name}")
        if sid in self.readied:
            raise Violation(f"I2: {sid} starts again on {node.name} after it has run")
        for vm in node.vms.values():
            if set(vm.gpus) & set(gpus):
                raise Violation(f"I3: a GPU of {node.name} is given to {sid} and {vm.sid}")

    def taken_away(self, node: Node, sid: str) -> None:
        raise Violation(f"I5: {node.name} killed {sid}, which ran and was not to be stopped")

    def check(self) -> None:
        """What must hold at every instant."""
        held: dict[str, list[Session]] = {}
        for session in self.live():
            if session.on_host:
                held.setdefault(session.host, []).append(session)
        for host, sessions in held.items():
            cpus = sum(s.resources.cpus for s in sessions)
            memory = sum(s.resources.memory_mib + POLICY.guest_overhead_mib for s in sessions)
            if cpus > CPUS * POLICY.cpu_overcommit or memory > MEMORY_MIB:
                raise Violation(f"I10: {host} has promised {cpus} CPUs and {memory} MiB")
            gpus = [a for s in sessions for a in s.gpu_addresses]
            if len(gpus) != len(set(gpus)):
                raise Violation(f"I3: the ledger gives a GPU of {host} twice")

    def settle(self, seconds: int) -> None:
        """No more faults: everything is up, everything is delivered, time passes."""
        self.faults = frozenset()
        self.broker.recover()
        if self.scheduler is None:
            self.start_scheduler()
        self.scheduler_bus.die_at = 0
        for node in self.nodes.values():
            node.disk.die = ""
            if node.bus is None:
                node.start()
            elif not node.bus.connected:
                node.bus.reconnect()
        self._raw_bus.reconnect()
        self.portal.reconnect()
        for _ in range(seconds):
            self.clock.now += 1.0
            self.portal_sweep()
            self.broker.run_ticks()
            self.broker.run()
            self.flush()
            for node in self.nodes.values():
                while node.todo:
                    node.todo.pop(0)()
            self.broker.run()
            self.flush()
            self.check()

    def check_at_rest(self) -> None:
        """What must hold once nothing moves any more: ledger and hosts agree to the last file."""
        sessions = {session.sid: session for session in self.sessions()}
        for sid in self.asked:
            if sid not in sessions:
                raise Violation(f"I1: {sid} was accepted and is unknown")
        running = {sid for sid, s in sessions.items() if s.state is State.RUNNING}
        vms = {sid for node in self.nodes.values() for sid in node.vms}
        files = {sid for node in self.nodes.values() for sid in node.files}
        if vms != running or files != running:
            raise Violation(f"I4/I5: running {sorted(running)}, machines {sorted(vms)}, files {sorted(files)}")
        odd = [s.sid for s in sessions.values() if s.state in (State.ASSIGNED, State.STARTING, State.STOPPING)]
        if odd:
            raise Violation(f"I1: {odd} do not come to rest")
        with self.engine.connect() as connection:
            holds = connection.execute(select(tables.gpu_hold.c.host, tables.gpu_hold.c.address)).all()
        expected = {(s.host, a) for s in sessions.values() if s.on_host for a in s.gpu_addresses}
        if {tuple(row) for row in holds} != expected:
            raise Violation(f"I4: GPU holds {holds}, sessions hold {expected}")

    def stop_everything(self) -> None:
        for sid in self.asked:
            self.stopped.add(sid)
        self.portal_sweep()
