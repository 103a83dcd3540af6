"""The agent's event loop: commands in, reports and heartbeats out, and what must be done now and then."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from deskfleet.agent import guard
from deskfleet.agent.accel import Accel
from deskfleet.agent.bridge import Bridge
from deskfleet.agent.cgroups import GroupError, Groups
from deskfleet.agent.console import UsedNonces
from deskfleet.agent.core import Agent
from deskfleet.agent.devices import kvm_groups
from deskfleet.agent.facts import Facts, boot_id, read_facts
from deskfleet.agent.fetch import Fetcher
from deskfleet.agent.fetch_store import Store
from deskfleet.agent.hypervisor import QemuHypervisor
from deskfleet.agent.images import Disks, ImageIndex
from deskfleet.agent.journal import FileJournal
from deskfleet.agent.lan import Lan
from deskfleet.agent.lending import GpuLending, Reset, reset
from deskfleet.agent.link import Link
from deskfleet.agent.pictures import Pictures
from deskfleet.agent.processes import Spawn, spawn
from deskfleet.agent.quarantine import QUARANTINE
from deskfleet.agent.settings import AgentSettings
from deskfleet.agent.starter import Config
from deskfleet.agent.templates import Room
from deskfleet.agent.templates_here import templates_of
from deskfleet.runtime.bus import Bus, run_callback
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.host import Gpu, GuestReport, HostReport, Phase
from deskfleet.schemas.messages import HostTemplates, TemplateOrdered, VmLook
from deskfleet.schemas.session import Birth, Outcome

log = logging.getLogger(__name__)

_NONCE_S = 600.0
_MOST_SHOWS = 50


class AgentError(DeskfleetError):
    """Raised when an agent can't run here; the text says what to do."""


def lock(state: Path) -> IO[str]:
    """Make this the one agent of a state folder, for as long as the returned file is open.

    Raises:
        AgentError: another agent runs on it.
    """
    state.mkdir(parents=True, exist_ok=True, mode=0o711)
    file = (state / "agent.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise AgentError(f"another agent runs on {state}; stop it first, or give this one a state folder") from None
    os.set_inheritable(file.fileno(), False)
    return file


class Service:
    """One host's agent. `bus` dispatches to this event loop."""

    def __init__(
        self,
        settings: AgentSettings,
        accel: Accel,
        bus: Bus,
        clock: Clock,
        version: str,
        *,
        spawn: Spawn = spawn,
        sysfs: Path = Path("/sys"),
        dev: Path = Path("/dev"),
        reset: Reset = reset,
    ) -> None:
        self._settings = settings
        self._accel = accel
        self._clock = clock
        self._version = version
        self._incarnation = secrets.token_hex(8)
        self._boot_id = boot_id()
        self._problems: list[str] = [accel.why] if accel.why else []
        state = settings.state
        self._nonces, inputs = state / "nonces", state / "inputs"
        for folder in (state / "disks", state / "templates", self._nonces, inputs, settings.run, settings.images):
            folder.mkdir(parents=True, exist_ok=True)
            # Guests reach their own files by their full path, and can list nothing on the way.
            folder.chmod(0o711 if folder in (state / "disks", settings.run) else folder.stat().st_mode & 0o7777)
        self._nonces.chmod(0o700)
        self._images = ImageIndex(settings.images, state / "images.json")
        self._uids = settings.uids if os.geteuid() == 0 else None
        self._lan = (
            Lan(settings.host, settings.bridge, settings.blocked_networks, isolated=settings.bridge_isolated)
            if settings.network == "bridge"
            else None
        )
        config = Config(
            run=settings.run,
            accel=accel.name,
            network=self._guarded_network(),
            uids=self._uids,
            groups=kvm_groups() if accel.name == "kvm" else (),
            sysfs=sysfs,
            dev=dev,
            hugepages=settings.hugepages,
            gpu_roms=settings.gpu_roms,
            inputs=inputs,
            lan=self._lan,
            limits=self._limits(),
            volumes=settings.volumes,
            floor_mib=settings.disk_floor_mib,
            ready_s=settings.ready_s,
            powerdown_s=settings.powerdown_s,
        )
        self.lending = GpuLending(
            state / QUARANTINE, self._boot_id, settings.gpu_names, sysfs=sysfs, dev=dev,
            changed=lambda: self.link.beat(), reset=reset,  # noqa: PLW0108  link comes later
        )  # fmt: skip
        self._disks = Disks(state / "disks", state / "templates")
        self.hypervisor = QemuHypervisor(config, self._images, self._disks, spawn, self.lending)
        self.agent = Agent(
            boot_id=self._boot_id,
            journal=FileJournal(state / "journal"),
            hypervisor=self.hypervisor,
            report=self._report,
            now=clock.monotonic,
            images=self._images.digests,
            gpus=self._gpus,
        )
        self.hypervisor.news = self.agent
        self._templates = templates_of(
            settings, accel.name, self._boot_id, self.hypervisor, self._images, self._disks, spawn, clock,
            room=self._room, forks=self._forks, changed=lambda: self.link.beat(),  # noqa: PLW0108  link comes later
        )  # fmt: skip
        self._pictures = Pictures(self.hypervisor.dump, clock.monotonic)
        self._shows: set[asyncio.Task[None]] = set()
        self._fetcher = Fetcher(
            settings.source,
            Store(settings.images),
            self._images,
            self._disks,
            self._images_in_use,
            clock.monotonic,
            changed=lambda: self.link.beat(),  # noqa: PLW0108  link comes later
        )
        self.link = Link(
            settings.host, bus, self.agent, self._describe, clock.monotonic, self._look, self._fetcher.told,
            self._order_templates,
        )  # fmt: skip

        self.bridge = Bridge(
            settings.console_listen,
            settings.run,
            self._nonces,
            inputs,
            state / "console.log",
            settings.console_tls,
            spawn,
        )

    def _room(self) -> Room:
        facts = self._facts()
        return Room(facts.load1, facts.cpus, facts.memory_free_mib)

    def _forks(self) -> Counter[str]:
        entries = self.agent.entries
        return Counter(e.start.template for e in entries if e.live and e.start and e.birth is Birth.FORKED)

    def _order_templates(self, wish: HostTemplates | TemplateOrdered) -> None:
        if self._templates is None:
            log.warning("no templates are kept here (settings: templates, hugepages)")
        elif isinstance(wish, HostTemplates):
            self._templates.told(wish)
        else:
            self._templates.ordered(wish)

    def _guarded_network(self) -> str:
        """The network that guests get: none where they can't be kept from this host's own services."""
        if self._settings.network == "none":
            return "none"
        try:
            if self._uids is None:
                raise guard.GuardError("the agent is not root, so guests can't be told apart from it")
            guard.apply(self._settings.host, self._uids.start, self._uids.stop - 1, self._settings.blocked_networks)
            if self._lan:
                self._lan.guard()
            elif shutil.which("passt") is None:
                raise guard.GuardError("passt is not installed")
        except guard.GuardError as error:
            log.error("guests get no network: %s", error)
            self._problems.append(f"guests get no network: {error}"[:400])
            return "none"
        return self._settings.network

    def _limits(self) -> Groups | None:
        """The guests' control groups; what they can't limit is told."""
        if self._uids is None:
            return None
        groups = Groups(self._settings.cgroup, self._settings.host)
        try:
            groups.prepare()
        except GroupError as error:
            log.warning("guests are not fully limited: %s", error)
            self._problems.append(f"guests are not fully limited: {error}"[:400])
        return groups

    def _gpus(self) -> tuple[Gpu, ...]:
        return self.lending.gpus(self._held())

    def _held(self) -> set[str]:
        """The PCI functions that guests have."""
        starts = [entry.start for entry in self.agent.entries if entry.live and entry.start]
        return {address for start in starts for address in start.gpu_addresses}

    def _images_in_use(self) -> set[str] | None:
        live = {entry.sid: entry.start for entry in self.agent.entries if entry.live}
        if self._disks.present() - live.keys():
            return None  # a disk of which nobody knows what it is on top of
        templates = self._templates.images_in_use() if self._templates else set()
        return templates | {start.sha256 for start in live.values() if start}

    def remark(self, problems: Sequence[str]) -> None:
        """Add to what administrators are told about this host."""
        known = set(self._problems)
        self._problems += [problem[:400] for problem in problems if problem[:400] not in known]

    def recover(self) -> None:
        """Take over what runs from a former life, and remove what it left behind.

        Raises:
            JournalError: the journal is damaged.
            AgentError: guests run that the journal does not know: it was lost, or its disk is not mounted yet.
        """
        if self._templates:
            self._templates.recover(self.hypervisor.clean)
        known = {path.stem for path in (self._settings.state / "journal").glob("*.json")}
        strangers = self.hypervisor.running() - known
        if strangers and not known:
            raise AgentError(
                f"{len(strangers)} guests run here, but the journal in {self._settings.state} is empty. Is its disk "
                "mounted? To give these guests up: deskfleet-agent --purge"
            )
        self.agent.recover()
        live = {entry.sid for entry in self.agent.entries if entry.live}
        for sid in (self.hypervisor.running() | self.hypervisor.leftovers()) - live:
            log.warning("removing what is left of %s", sid)
            self.hypervisor.clean(sid)
        self.hypervisor.take_back_strays()

    def purge(self) -> int:
        """End every guest of this host and the console bridge, and remove their files; how many guests ended."""
        if self._templates:
            self._templates.recover(self.hypervisor.clean)
            self._templates.purge()
        running = self.hypervisor.running()
        for sid in running | self.hypervisor.leftovers():
            self.hypervisor.clean(sid)
        self.bridge.stop()
        guard.remove(self._settings.host)
        if self._lan:
            self._lan.remove()
        return len(running)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop`. Guests and consoles go on when it returns."""
        await asyncio.to_thread(self._images.refresh)
        self.link.start()
        work = [
            asyncio.create_task(self.bridge.keep()),
            asyncio.create_task(self._every(self._settings.heartbeat_s, self.link.beat)),
            asyncio.create_task(self._every(1.0, self._tick)),
            asyncio.create_task(self._look_around()),
            asyncio.create_task(self._take_pictures()),
            asyncio.create_task(self._fetcher.keep()),
        ]
        if self._templates:
            work.append(asyncio.create_task(self._templates.keep()))
        await stop.wait()
        for task in [*work, *self._shows]:
            task.cancel()
        await asyncio.gather(*work, *self._shows, return_exceptions=True)
        await self.hypervisor.close()

    def _report(self, guest: GuestReport) -> None:
        """Say what happened to a guest. Of one that ended without having been told to, the last picture is shown."""
        self.link.report(guest)
        if guest.phase is Phase.ENDED:
            png = self._pictures.last(guest.sid)
            if png and guest.outcome in (Outcome.FAILED, Outcome.GUEST_OFF):
                self.link.show(guest.sid, png)

    def _look(self, wish: VmLook) -> None:
        if len(self._shows) < _MOST_SHOWS:
            task = asyncio.get_running_loop().create_task(self._show(wish))
            self._shows.add(task)
            task.add_done_callback(self._shows.discard)

    async def _show(self, wish: VmLook) -> None:
        with contextlib.suppress(DeskfleetError):  # it may have ended meanwhile; the portal asks again
            self.link.show(wish.sid, await self._pictures.look(wish.sid), wish.replica)

    async def _take_pictures(self) -> None:
        while True:
            await asyncio.sleep(self._settings.picture_s)
            running = [entry.sid for entry in self.agent.entries if entry.phase is Phase.RUNNING]
            await self._pictures.sweep(running)

    def _tick(self) -> None:
        self.agent.tick()
        if self.agent.fenced:
            self.link.beat()  # nothing can be placed here before the scheduler has answered

    async def _every(self, seconds: float, action: Callable[[], None]) -> None:
        while True:
            run_callback(action, "periodic work")
            await asyncio.sleep(seconds)

    async def _look_around(self) -> None:
        """New images, other GPUs, old nonces: slow looks, off the loop."""
        nonces = UsedNonces(self._nonces)
        while True:
            with contextlib.suppress(OSError):
                await self.lending.refresh(self._held)
            await asyncio.sleep(5.0)
            with contextlib.suppress(OSError):
                before = self._images.digests()
                await asyncio.to_thread(self._images.refresh)
                await asyncio.to_thread(nonces.expire, _NONCE_S, self._clock.monotonic())
                if self._images.digests() != before:
                    self.link.beat()

    def _facts(self) -> Facts:
        settings = self._settings
        return read_facts(settings.state / "disks", settings.offer_cpus, settings.offer_memory_mib)

    def _describe(self, seq: int) -> HostReport:
        settings = self._settings
        facts = self._facts()
        return HostReport(
            host=settings.host,
            incarnation=self._incarnation,
            seq=seq,
            boot_id=self._boot_id,
            last_generation=self.agent.last_generation,
            fenced=self.agent.fenced,
            console=settings.console_address if self.bridge.up else "",
            accel=self._accel.name,
            cpus=facts.cpus,
            memory_mib=facts.memory_mib,
            load1=facts.load1,
            memory_free_mib=facts.memory_free_mib,
            disk_mib=facts.disk_mib,
            disk_free_mib=facts.disk_free_mib,
            images=tuple(sorted(self._images.digests())),
            gpus=self._gpus(),
            guests=self.agent.guests(),
            problems=(*self._problems, *self._fetcher.problems())[:100],
            version=self._version,
            catalogue=self._fetcher.catalogue,
            fetches=self._fetcher.report(),
            templates=self._templates.report() if self._templates else None,
            blueprints=self._templates.told_digest if self._templates else "",
        )
