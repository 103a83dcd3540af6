"""Starts, watches, adopts and ends the qemu processes of a host, on the agent's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deskfleet.agent import argv as build
from deskfleet.agent import devices, stalls
from deskfleet.agent.display import until_it_greets
from deskfleet.agent.forks import Forks
from deskfleet.agent.guest_agent import GuestAgent, GuestAgentError, guest_agent
from deskfleet.agent.images import DiskError, Disks, ImageIndex
from deskfleet.agent.journal import Entry
from deskfleet.agent.lending import GpuLending
from deskfleet.agent.processes import Process, Spawn, arguments, end_tasks, find, option, pids
from deskfleet.agent.qmp import Monitor, MonitorError, monitor
from deskfleet.agent.starter import Config, LaunchError, Starter, last_words
from deskfleet.schemas.errors import DeskfleetError, Reason
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import Os
from deskfleet.schemas.messages import VmStart
from deskfleet.schemas.session import Birth

log = logging.getLogger(__name__)


class News(Protocol):
    """Who hears of the guests (agent/core.py)."""

    def ready(self, sid: str, birth: Birth) -> None: ...

    def failed(self, sid: str, reason: Reason, detail: str) -> None: ...

    def exited(self, sid: str, detail: str = "") -> None: ...

    def viewers(self, sid: str, count: int) -> None: ...

    def says(self, sid: str, text: str) -> None: ...


@dataclass(slots=True)
class _Guest:
    """A guest in this life of the agent."""

    paths: build.Paths
    process: Process | None = None
    launching: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    stopping: bool = False
    gpu: tuple[str, ...] = ()
    returning: asyncio.Task[None] | None = None
    monitor: Monitor | None = None
    inside: GuestAgent | None = None
    start: VmStart | None = None
    #: A fork that is not one of its own yet.
    unfinished: bool = False


class QemuHypervisor:
    """The hypervisor of agent/core.py, for real. `news` must be set before the first call; all guests are booted
    unless `forks` was given templates."""

    news: News

    def __init__(
        self, config: Config, images: ImageIndex, disks: Disks, spawn: Spawn, lending: GpuLending | None = None
    ) -> None:
        self._config = config
        self._lending = lending
        self._disks = disks
        self.starter = Starter(config, images, disks, spawn)
        self.forks = Forks(self.starter, disks, config)
        self._loop = asyncio.get_running_loop()
        self._guests: dict[str, _Guest] = {}

    # --- start ----------------------------------------------------------------------------------------------

    def launch(self, entry: Entry) -> None:
        """Start a guest; the answer is `ready` or `failed`."""
        assert entry.start is not None
        guest = self._guests[entry.sid] = _Guest(self.starter.paths(entry.sid), launching=True, start=entry.start)
        self._note_gpu(guest, entry.start)
        self._task(guest, self._launch(guest, entry.start))

    def _task(self, guest: _Guest, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        guest.tasks.add(task)
        task.add_done_callback(guest.tasks.discard)

    async def _launch(self, guest: _Guest, start: VmStart) -> None:
        sid = start.sid
        try:
            birth = await self._bring_up(sid, guest, start)
        except (DiskError, LaunchError) as error:
            await self._give_up(sid, guest, error)
        except OSError as error:
            detail = f"{error.filename or ''}: {error.strerror}"
            self._over(sid, guest, lambda: self.news.failed(sid, Reason.SPAWN_FAILED, detail))
        else:
            guest.launching = False
            self.news.ready(sid, birth)
            await self._attend(sid, guest)

    async def _bring_up(self, sid: str, guest: _Guest, start: VmStart) -> Birth:
        """Fork it from a template, or boot it; whatever is wrong with a template, it is booted then."""
        template, birth = self.forks.lend(start)
        if template:
            try:
                self._hold(sid, guest, await self.starter.fork(start, template))
                guest.unfinished = True
                await self.forks.wake(start, template, guest.ended)
            except (DeskfleetError, OSError) as error:
                self.forks.failed(start, error)
                await self._undo(sid, guest)
                birth = Birth.FORK_FAILED
            else:
                return birth
        self._hold(sid, guest, await self.starter.start(start))
        await self._until_ready(guest)
        return birth

    async def _undo(self, sid: str, guest: _Guest) -> None:
        """Remove what was begun of a guest, so that it can begin again."""
        if guest.process:
            guest.process.kill()
            await guest.ended.wait()
        self.starter.clear(sid)
        shutil.rmtree(guest.paths.run, ignore_errors=True)
        self._disks.remove(sid)
        guest.process, guest.ended, guest.unfinished = None, asyncio.Event(), False

    def _hold(self, sid: str, guest: _Guest, process: Process) -> None:
        guest.process = process
        process.watch(self._loop, lambda: self._gone(sid, guest))

    def _gone(self, sid: str, guest: _Guest) -> None:
        guest.ended.set()
        if not guest.launching:  # a launch under way sees it by itself, and says why it failed
            detail = last_words(guest.paths)
            self._over(sid, guest, lambda: self.news.exited(sid, detail))

    def _note_gpu(self, guest: _Guest, start: VmStart) -> None:
        if start.gpu_addresses and self._lending:
            guest.gpu = start.gpu_addresses
            self._lending.lent(guest.gpu)

    def _over(self, sid: str, guest: _Guest, tell: Callable[[], None]) -> None:
        """Tell of a guest's end, once: with a GPU only when that is back and checked, for then it goes to the next."""
        if not guest.gpu:
            tell()
        elif guest.returning is None:
            guest.returning = self._loop.create_task(self._hand_back(sid, guest, tell))

    async def _hand_back(self, sid: str, guest: _Guest, tell: Callable[[], None]) -> None:
        assert self._lending
        try:
            self._take_back(sid)
            await self._lending.returned(guest.gpu)
        except OSError as error:
            log.error("%s: its GPU was not checked: %s", sid, error)  # so it is not offered before it was
        tell()

    def _take_back(self, sid: str) -> None:
        folder = self._config.run / sid
        if self._config.uids is not None and folder.exists():
            devices.take_back({folder.stat().st_uid}, self._config.dev)

    async def _until_ready(self, guest: _Guest) -> None:
        try:
            if await until_it_greets(guest.paths.vnc, guest.ended, self._config.ready_s):
                return
        except TimeoutError:
            raise LaunchError(Reason.START_TIMEOUT, f"no display within {self._config.ready_s:g} s") from None
        raise LaunchError(Reason.QEMU_EXITED, last_words(guest.paths))

    # --- while it runs --------------------------------------------------------------------------------------

    async def _attend(self, sid: str, guest: _Guest) -> None:
        """Follow who is connected, for as long as the guest runs. Holds the guest agent's channel open."""
        while not guest.ended.is_set():
            try:
                async with guest_agent(guest.paths.guest_agent) as inside, monitor(guest.paths.qmp) as qemu:
                    guest.monitor, guest.inside = qemu, inside
                    with qemu.events("VNC_CONNECTED", "VNC_INITIALIZED", "VNC_DISCONNECTED", "STOP") as events:
                        await self._count(sid, qemu)
                        self._task(guest, self._see_through(sid, guest, qemu))
                        if guest.unfinished and guest.start:
                            self._task(guest, self._introduce(guest, guest.start, qemu, inside))
                        async for name in events:
                            await self._count(sid, qemu)
                            if name == "STOP":
                                self._task(guest, self._see_through(sid, guest, qemu))
            except MonitorError as error:
                log.info("%s: %s", sid, error)
            finally:
                guest.monitor = guest.inside = None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(guest.ended.wait(), 1.0)

    async def _see_through(self, sid: str, guest: _Guest, qemu: Monitor) -> None:
        """See a pause of the guest through, for as long as this connection lasts: a qemu that waits for its disk may
        answer late."""
        while guest.monitor is qemu:
            try:
                await stalls.watch(qemu, self._disks.free, lambda text: self.news.says(sid, text))
                break
            except MonitorError as error:
                log.info("%s: %s", sid, error)
                await asyncio.sleep(1.0)

    async def _introduce(self, guest: _Guest, start: VmStart, qemu: Monitor, inside: GuestAgent | None) -> None:
        """Make a fork one of its own."""
        here = lambda: guest.monitor is qemu  # noqa: E731  else it is done at the next connection
        guest.unfinished = not await self.forks.introduce(start, qemu, inside, here, self.news.says)

    async def _count(self, sid: str, qemu: Monitor) -> None:
        self.news.viewers(sid, await qemu.viewers())

    async def dump(self, sid: str) -> Path:
        """Let qemu write a guest's screen into the guest's folder, where alone it may write (QMP screendump).

        Raises:
            MonitorError: the guest does not run, or its qemu does not answer.
        """
        guest = self._guests.get(sid)
        if guest is None or guest.monitor is None:
            raise MonitorError("not running")
        path = guest.paths.run / "screen.ppm"
        await guest.monitor.command("screendump", {"filename": str(path), "format": "ppm"})
        return path

    def warn(self, entry: Entry, text: str) -> None:
        """Show a text to the person in a guest, as far as the guest's own agent listens."""
        guest = self._guests.get(entry.sid)
        if guest and guest.inside and entry.start:
            self._task(guest, self._warn(entry.sid, guest.inside, entry.start.os, text))

    async def _warn(self, sid: str, inside: GuestAgent, system: Os, text: str) -> None:
        try:
            await inside.show(text, system)
        except GuestAgentError as error:
            log.info("%s was not warned: %s", sid, error)

    # --- end ------------------------------------------------------------------------------------------------

    def shutdown(self, entry: Entry) -> None:
        """Power down, then quit, then kill; the answer is `exited`."""
        guest = self._guests.get(entry.sid)
        if guest is None or (guest.process is None and not guest.tasks) or guest.ended.is_set():
            tell = lambda: self.news.exited(entry.sid)  # noqa: E731
            self._loop.call_soon(self._over, entry.sid, guest, tell) if guest else self._loop.call_soon(tell)
        elif not guest.stopping:
            guest.stopping, guest.launching = True, False
            attending = list(guest.tasks)
            self._task(guest, self._shutdown(entry.sid, guest, attending, powerdown=entry.ran))

    async def _shutdown(self, sid: str, guest: _Guest, attending: list[asyncio.Task[None]], *, powerdown: bool) -> None:
        await end_tasks(attending)  # the launch, or the one that holds the QMP socket, which serves one client only
        if guest.process is None:
            self._over(sid, guest, lambda: self.news.exited(sid))
            return
        try:
            async with monitor(guest.paths.qmp) as qemu:
                if powerdown and await self._powers_down(guest, qemu):
                    return
                await qemu.command("quit")
        except MonitorError as error:
            log.info("%s: %s", sid, error)
        if not await self._ends_within(guest, self._config.quit_s):
            log.warning("%s does not quit: killing it", sid)
            guest.process.kill()

    async def _powers_down(self, guest: _Guest, qemu: Monitor) -> bool:
        """Press the power button until the guest obeys or its time is over: while it boots, a press is lost."""
        deadline = self._loop.time() + self._config.powerdown_s
        while (left := deadline - self._loop.time()) > 0:
            await qemu.command("system_powerdown")
            if await self._ends_within(guest, min(2.0, left)):
                return True
        return False

    async def _ends_within(self, guest: _Guest, seconds: float) -> bool:
        try:
            await asyncio.wait_for(guest.ended.wait(), seconds)
        except TimeoutError:
            return False
        return True

    # --- after the agent's own death ------------------------------------------------------------------------

    def adopt(self, entry: Entry) -> bool:
        """Take over a guest of a former agent."""
        paths = self.starter.paths(entry.sid)
        process = find(lambda _, line: self._sid_of(line) == entry.sid)
        if process is None:
            return False
        guest = self._guests[entry.sid] = _Guest(paths, launching=not entry.ran, start=entry.start)
        guest.unfinished = "-incoming" in arguments(process.pid)
        if entry.start:
            self._note_gpu(guest, entry.start)
        self._hold(entry.sid, guest, process)
        work = self._attend(entry.sid, guest) if entry.ran else self._resume(entry.sid, guest)
        if entry.phase is not Phase.STOPPING:
            self._task(guest, work)
        else:
            work.close()
        return True

    async def _resume(self, sid: str, guest: _Guest) -> None:
        start = guest.start
        if guest.unfinished and start and not await self.forks.woke(start):
            await self._undo(sid, guest)
            await self._launch(guest, start)
            return
        try:
            await self._until_ready(guest)
        except LaunchError as error:
            await self._give_up(sid, guest, error)
        else:
            guest.launching = False
            self.news.ready(sid, Birth.FORKED if guest.unfinished else Birth.BOOTED)
            await self._attend(sid, guest)

    async def _give_up(self, sid: str, guest: _Guest, error: LaunchError | DiskError) -> None:
        if guest.process:
            guest.process.kill()
            await guest.ended.wait()
        self._over(sid, guest, lambda: self.news.failed(sid, error.reason, error.detail))

    def _sid_of(self, line: list[str]) -> str:
        """The session of a qemu command line of this very agent; empty for any other process."""
        if not line or "qemu-system" not in line[0]:
            return ""
        sid = option(line, "-uuid").replace("-", "")
        mine = option(line, "-qmp").startswith(f"unix:{build.plain(self._config.run)}/{sid}/")
        return sid if mine else ""

    def running(self) -> set[str]:
        """The sids of every qemu of this agent that runs now, known or not."""
        return {sid for pid in pids() if (sid := self._sid_of(arguments(pid)))}

    def cpu_s(self, sid: str) -> float | None:
        """CPU seconds that a guest's qemu has used; None when it does not run."""
        guest = self._guests.get(sid)
        return guest.process.cpu_s() if guest and guest.process else None

    def touched(self, sid: str) -> int:
        """A number that changes when a person types or points in a guest."""
        try:
            return (self._config.inputs / sid).stat().st_mtime_ns if self._config.inputs else 0
        except OSError:
            return 0

    def clean(self, sid: str) -> None:
        """Remove everything of an ended guest."""
        guest = self._guests.pop(sid, None)
        if guest:
            for task in guest.tasks:
                if task is not asyncio.current_task(self._loop):
                    task.cancel()
            if guest.returning and guest.returning is not asyncio.current_task(self._loop):
                guest.returning.cancel()
            if guest.process and not guest.ended.is_set():
                guest.process.kill()
        else:
            stray = find(lambda _, line: self._sid_of(line) == sid)
            if stray:
                stray.kill()
                os.close(stray.pidfd)
        self.starter.clear(sid)
        self._take_back(sid)
        shutil.rmtree(self._config.run / sid, ignore_errors=True)
        if self._config.inputs:
            (self._config.inputs / sid).unlink(missing_ok=True)
        self._disks.remove(sid)

    def take_back_strays(self) -> None:
        """Take back the devices of guests that are no more, not even by their folder. Called once, at the start."""
        if self._config.uids is not None:
            living = {folder.stat().st_uid for folder in self._config.run.iterdir()}
            devices.take_back(set(self._config.uids) - living, self._config.dev)

    async def close(self) -> None:
        """Let go of every guest; they run on."""
        guests = self._guests.values()
        await end_tasks([task for guest in guests for task in guest.tasks])
        await end_tasks([guest.returning for guest in guests if guest.returning])

    def leftovers(self) -> set[str]:
        """The sids that have files here."""
        return {path.name for path in self._config.run.iterdir()} | self._disks.present() | self.starter.left()
