"""A whole cluster in one process: real portal, scheduler, ledger, agent and proxy code over a broker, databases,
disks, device trees, virtual machines and clocks that are simulated and can fail."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sim.control import Decider, Portal
from sim.database import Database
from sim.doors import Console, Door
from sim.evidence import Evidence
from sim.host import Node
from sim.process import Crash, Process, Time, Violation
from sim.rest import unrest

from deskfleet.proxy import server
from deskfleet.runtime.memory_bus import MemoryBroker
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.policy import Policy, Rest
from deskfleet.scheduler.unit import Limits
from deskfleet.schemas import topology
from deskfleet.schemas.machine import (
    Firmware,
    Format,
    GpuPolicy,
    Instant,
    Machine,
    Os,
    Range,
    ReadyBy,
    Share,
    Size,
    Video,
)

IMAGE = "a" * 64
TINY = Machine(
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
    instant=Instant(ReadyBy.STILL, Share.MACHINE, (Size(1, 128),)),
)
#: After the last fault, everything must have come to rest within so many seconds.
REST_S = 200.0
#: How long the broker keeps a connection on which nothing comes, in seconds.
BROKER_PATIENCE_S = 6.0
_PAUSES = (0.5, 1.0, 2.0, 5.0)


class World:
    """The cluster and its people. `faults` are the kinds that this walk may meet."""

    image = IMAGE
    machines = {"tiny": TINY}  # noqa: RUF012  never changed
    #: The portal's catalogue is newer or older than the scheduler's.
    offered = {"tiny": TINY, "gone": replace(TINY, name="gone")}  # noqa: RUF012

    def __init__(self, seed: int, faults: frozenset[str], wait_s: int = 600) -> None:
        self.faults = faults
        self.wait_s = wait_s
        self.time = Time()
        rest = Rest(first_s=20.0, longest_s=40.0)
        policy = Policy(cpu_overcommit=2.0, host_reserve_mib=0, rest=rest)
        self.settings = Settings(policy=policy, limits=Limits(grace_s=10, connect_s=90))
        self.broker = MemoryBroker(random.Random(seed + 1), self.time)
        self.ledger, self.requests = Database("ledger"), Database("portal")
        self.evidence = Evidence(self)
        self.lines: list[str] = []
        #: The longest time that it took to come to rest, in seconds.
        self.recovery_s = 0.0
        self._folder: Path | None = None
        names = ("h1", "h2", "h3")
        for name in names:
            self.broker.declare(topology.EXCHANGES_ONLY + topology.for_host(name))
        self.proxies: list[Door] = []
        self.nodes = {name: Node(self, name, cards) for cards, name in enumerate(names)}
        self.proxies.append(Door(self, 1))
        self.portal = Portal(self)
        self.deciders = [Decider(self, 1), Decider(self, 2)]
        self.processes: dict[str, Process] = {
            process.name: process for process in (*self.deciders, self.portal, *self.proxies, *self.nodes.values())
        }
        self._tunnel = server.Tunnel
        server.Tunnel = Console
        for process in self.processes.values():
            process.start()

    def close(self) -> None:
        """Take everything down."""
        for process in self.processes.values():
            process.kill()
        server.Tunnel = self._tunnel
        if self._folder:
            shutil.rmtree(self._folder)

    @property
    def folder(self) -> Path:
        """Where the hosts' console servers keep their files."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="sim"))
        return self._folder

    def guard(self, action: Callable[[], object]) -> str:
        """Do something in the course of which a process may die."""
        try:
            return str(action() or "")
        except Crash as crash:
            crash.process.kill()
            return f"{crash.process.name} dies"

    # --- time -----------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> str:
        """Time passes, and timers go off."""
        self.time.now += seconds
        for process in self.processes.values():
            if process.paused_at is not None and self.time.now - process.paused_at > BROKER_PATIENCE_S:
                process.disconnect()
        # Who leads looks first: in real time it looks several times a second, and nobody would succeed it.
        order = sorted(self.processes.values(), key=lambda process: process not in self.deciders or not process.leads)
        deaths = [self.guard(process.tick) for process in order]
        return " ".join(filter(None, deaths))

    def move(self) -> None:
        """Deliver and do everything that waits."""
        for _ in range(20):
            moved = self.broker.run()
            for decider in self.deciders:
                decider.flush()
            self.portal.flush()
            for node in self.nodes.values():
                while node.todo and node.alive:
                    moved += 1
                    node.todo.pop(0).work(False)
            for proxy in self.proxies:
                for viewer in list(proxy.opening):
                    moved += 1
                    proxy.go_on(viewer)
            if not moved:
                return

    def mend(self) -> None:
        """No more faults: everything is up and connected."""
        self.faults = frozenset()
        self.ledger.mend()
        self.requests.mend()
        self.broker.blocked = False
        self.broker.up = True
        for process in self.processes.values():
            process.fuse = 0
            process.clock.mend()
        for node in self.nodes.values():
            node.disk.trouble = ""
            for card in node.cards:
                card.there = card.bound = True
        for process in self.processes.values():
            process.resume()
            process.start()
            process.reconnect()

    def rest(self, least_s: float = 16.0) -> None:
        """Let it come to rest, for so long at least, and raise Violation with what does not."""
        begun = self.time.now
        while True:
            for pause in _PAUSES:
                self.pass_time(pause)
                self.move()
                self.evidence.check()
            problem = next(unrest(self), "") if self.time.now - begun >= least_s else "too early"
            if not problem:
                break
            if self.time.now - begun > REST_S:
                raise Violation(problem)
        self.recovery_s = max(self.recovery_s, self.time.now - begun)
