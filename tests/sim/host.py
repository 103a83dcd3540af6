"""One host: a real agent over a simulated hypervisor, journal disk and device tree. Its machines, its disk and its
console server live on when the agent dies."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from stat import S_IFSOCK
from typing import TYPE_CHECKING

from sim.disk import Disk
from sim.process import Clock, Process
from sim.ready import Kept, Ready

from deskfleet.agent import seal
from deskfleet.agent.console import SOCKET, SessionToken, TokenRefused
from deskfleet.agent.core import Agent
from deskfleet.agent.journal import Entry, JournalError
from deskfleet.agent.link import Link
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu, HostReport
from deskfleet.schemas.session import Birth
from deskfleet.schemas.template import Blueprint

if TYPE_CHECKING:
    from sim.world import World

CPUS, MEMORY_MIB = 2, 4096


@dataclass(eq=False)
class Vm:
    """A virtual machine that exists, whoever knows of it. `known_at` is when its agent heard that it was up."""

    sid: str
    gpus: tuple[str, ...]
    numbers: set[int]
    #: What is in its memory of what people did, its network address, and the key of the template that it is a fork of.
    memory: set[str]
    mac: str
    template: str = ""
    ready: bool = False
    known_at: float | None = None
    going_down: bool = False
    exists: bool = True


@dataclass(eq=False)
class Card:
    """A GPU in a slot."""

    slot: int
    there: bool = True
    bound: bool = True

    def gpu(self) -> Gpu:
        address = f"0000:{self.slot:02x}:00."
        problem = "" if self.bound else "not bound to vfio-pci"
        return Gpu(f"{address}0", "G1", self.slot, (f"{address}0", f"{address}1"), self.bound, problem)


@dataclass(eq=False)
class Job:
    """Something that the hypervisor does for one guest, some time later. `work` is told whether it goes wrong."""

    sid: str
    work: Callable[[bool], None]


class Node(Process):
    """One host and its agent process."""

    def __init__(self, world: World, host: str, cards: int) -> None:
        super().__init__(f"agent-{host}", f"agent-{host}", world.broker, Clock(world.time), world.evidence)
        self.host = host
        self.world = world
        self.boot = 1
        self.disk = Disk(self.point)
        self.vms: dict[str, Vm] = {}
        self.files: set[str] = set()
        #: The installed qemu, and the templates that there are.
        self.qemu = 1
        self.kept: dict[str, Kept] = {}
        self.cards = [Card(n + 1) for n in range(cards)]
        #: The GPUs as the agent saw them when it last looked.
        self.seen: tuple[Gpu, ...] = ()
        #: What the hypervisor of the living agent still has to do or to tell.
        self.todo: list[Job] = []
        self.agent: Agent
        self.link: Link
        self.ready: Ready

    # --- the agent's process --------------------------------------------------------------------------------

    def run(self) -> None:
        self.todo.clear()
        self.look()
        bus = self.connect()
        self.agent = agent = Agent(
            boot_id=f"boot-{self.boot}",
            journal=self.disk,
            hypervisor=self,
            report=lambda guest: self.link.report(guest),  # noqa: PLW0108  link comes later
            now=self.clock.monotonic,
            images=lambda: frozenset({self.world.image}),
            gpus=lambda: self.seen,
        )
        self.ready = Ready(self)
        incarnation = f"{self.host}-{self.lives}"
        self.link = Link(
            self.host, bus, agent, lambda seq: self.describe(incarnation, seq), self.clock.monotonic, lambda _: None,
            lambda _: None, self.ready.told,
        )  # fmt: skip
        try:
            agent.recover()
        except JournalError:
            self.kill()  # it can't start; somebody starts it again
            return
        for sid in sorted((set(self.vms) | self.files) - {entry.sid for entry in agent.entries if entry.live}):
            self.clean(sid)
        self.link.start()
        for vm in self.vms.values():
            self.count_viewers(vm)
        self.world.evidence.recovered(self)
        bus.every(5.0, self._look_and_beat)
        bus.every(2.0, lambda: self.ready.tend())  # noqa: PLW0108  each life has its own
        bus.every(1.0, self._tick)

    def _look_and_beat(self) -> None:
        self.look()
        self.link.beat()

    def _tick(self) -> None:
        self.agent.tick()
        if self.agent.fenced:
            self.link.beat()

    def look(self) -> None:
        """Look at the device tree."""
        self.seen = tuple(card.gpu() for card in self.cards if card.there)

    def seal(self, blueprint: Blueprint) -> str:
        """What a template must be bound to now."""
        return seal.digest(blueprint, f"qemu {self.qemu}", "", "tcg", 1)

    def kill(self) -> None:
        self.todo.clear()
        if self.alive:
            self.ready.end()
        super().kill()

    def reboot(self, power_cut: bool) -> None:
        """The machine restarts: agent and guests are gone, files stay, boot-time clock and addresses start anew."""
        self.kill()
        self.boot += 1
        self.clock.started = self.world.time.now
        if power_cut:
            self.disk.power_cut()
        self.kept.clear()  # it is memory
        for sid in list(self.vms):
            self.gone(sid)

    def describe(self, incarnation: str, seq: int) -> HostReport:
        return HostReport(
            host=self.host,
            incarnation=incarnation,
            seq=seq,
            boot_id=f"boot-{self.boot}",
            last_generation=self.agent.last_generation,
            fenced=self.agent.fenced,
            console=f"{self.host}.test:6080",
            accel="tcg",
            cpus=CPUS,
            memory_mib=MEMORY_MIB,
            load1=len(self.vms) * 0.1,
            memory_free_mib=MEMORY_MIB,
            disk_mib=1 << 20,
            disk_free_mib=1 << 19,
            images=(self.world.image,),
            gpus=self.seen,
            guests=self.agent.guests(),
            templates=self.ready.templates.report(),
            blueprints=self.ready.templates.told_digest,
        )

    # --- the hypervisor of agent/core.py --------------------------------------------------------------------

    def launch(self, entry: Entry) -> None:
        sid = entry.sid
        self.world.evidence.launch_ordered(self, entry)
        self.files.add(sid)

        def spawn(wrong: bool) -> None:
            start = entry.start
            assert start
            kept, birth = self.ready.lend(start)
            if kept and wrong:
                self.ready.templates.failed(start.template, "simulated")
                kept, birth, wrong = None, Birth.FORK_FAILED, False
            usable = {address for card in self.cards if card.there and card.bound for address in card.gpu().functions}
            if wrong or set(start.gpu_addresses) - usable:
                self.agent.failed(sid, Reason.QEMU_EXITED, "simulated")
                return
            self.world.evidence.spawned(self, sid, start.gpu_addresses)
            memory, mac = self.ready.forked(start, kept) if kept else self.ready.booted(start)
            self.vms[sid] = vm = Vm(sid, start.gpu_addresses, {entry.generation}, memory, mac)
            if kept:
                vm.template = start.template
                self.world.evidence.forked(self, start, kept)
            self.world.evidence.born(self, vm)
            self.todo.append(Job(sid, self._come_up(sid, birth)))

        self.todo.append(Job(sid, spawn))

    def _come_up(self, sid: str, birth: Birth = Birth.BOOTED) -> Callable[[bool], None]:
        def come_up(wrong: bool) -> None:
            vm = self.vms.get(sid)
            if vm is None or vm.going_down:
                return
            if wrong:
                self.gone(sid)
                self.agent.failed(sid, Reason.QEMU_EXITED, "simulated")
                return
            vm.ready, vm.known_at = True, self.world.time.now
            vm.memory.add(sid)
            if birth is Birth.FORKED:
                self.ready.templates.worked(vm.template)
            self.agent.ready(sid, birth)
            self.world.evidence.ready(self, sid)

        return come_up

    def shutdown(self, entry: Entry) -> None:
        sid = entry.sid
        vm = self.vms.get(sid)
        if vm:
            self.world.evidence.shutdown_ordered(self, vm, entry)
            vm.going_down = True

        def gone(wrong: bool) -> None:
            if wrong and sid in self.vms:
                self.todo.append(Job(sid, gone))  # it hangs
                return
            self.gone(sid)
            self.agent.exited(sid)

        # A launch that has not spawned yet is cancelled, as the real one is.
        self.todo = [job for job in self.todo if job.sid != sid]
        self.todo.append(Job(sid, gone))

    def adopt(self, entry: Entry) -> bool:
        if entry.sid not in self.vms:
            return False
        if not entry.ran:
            self.todo.append(Job(entry.sid, self._come_up(entry.sid)))
        return True

    def clean(self, sid: str) -> None:
        vm = self.vms.get(sid)
        if vm:
            self.world.evidence.cleaned(self, vm)
            self.gone(sid)
        self.files.discard(sid)

    def gone(self, sid: str) -> None:
        """A machine exists no more, and with it its consoles."""
        vm = self.vms.pop(sid, None)
        if vm:
            vm.exists = False
            self.world.evidence.gone_at[sid] = self.world.time.now
            for proxy in self.world.proxies:
                proxy.guest_gone(vm)

    def dies(self, sid: str) -> None:
        """A guest ends by itself: it is shut down from inside, or qemu fails."""
        self.gone(sid)
        self.do(lambda: self.agent.exited(sid))

    def count_viewers(self, vm: Vm) -> None:
        """qemu says how many look at a guest."""
        count = sum(proxy.looking_at(vm) for proxy in self.world.proxies)
        self.do(lambda: self.agent.viewers(vm.sid, count))

    # --- the console server ---------------------------------------------------------------------------------

    def open_console(self, token: str) -> Vm:
        """What agent/console.py does with a token, on real files. Raises TokenRefused."""
        sid = token.partition(".")[0]
        run, nonces = self.world.folder / self.host / "run", self.world.folder / self.host / "nonces"
        _expose(run / sid, sid in self.vms)
        nonces.mkdir(exist_ok=True)
        kind, path = SessionToken(run, nonces).lookup(token)
        assert kind == "unix_socket"
        os.close(int(Path(path).name))
        return self.vms[sid]


def _expose(folder: Path, exists: bool) -> None:
    """Show a machine's socket, as qemu does while it runs."""
    if exists and not folder.exists():
        folder.mkdir(parents=True)
        os.mknod(folder / SOCKET, S_IFSOCK | 0o600)
    elif not exists:
        folder.parent.mkdir(parents=True, exist_ok=True)
        (folder / SOCKET).unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()


__all__ = ["CPUS", "MEMORY_MIB", "Card", "Job", "Node", "TokenRefused", "Vm"]
