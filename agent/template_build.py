"""Making a memory template: boot the machine alone, wait until its desktop is there, freeze it, and try a fork of it.

It is booted from the image and nothing else, so nothing of a person can be in it; no template is ever made from a
guest that somebody has used.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from deskfleet.agent import fork
from deskfleet.agent.guest_agent import GuestAgent, GuestAgentError, guest_agent
from deskfleet.agent.images import Disks, ImageIndex
from deskfleet.agent.pictures import read_screen
from deskfleet.agent.processes import Process
from deskfleet.agent.qmp import Monitor, MonitorError, first_monitor
from deskfleet.agent.seal import order
from deskfleet.agent.starter import Starter, last_words
from deskfleet.agent.template_store import Files, Template, TemplateError, TemplateStore
from deskfleet.schemas.machine import Firmware, ReadyBy
from deskfleet.schemas.template import Blueprint

_MOST_VARS = 16 << 20


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take; seconds. `still_s` is how long a screen has to stand still; a guest whose CPUs did
    less than `quiet` of one CPU's work in the last look has settled, and `settle_s` is how long that is waited for."""

    build_s: float = 900.0
    still_s: float = 10.0
    settle_s: float = 60.0
    quiet: float = 0.2
    qmp_s: float = 15.0

    @property
    def look_s(self) -> float:
        """Between two looks."""
        return min(1.0, self.still_s / 5)


class Builder:
    """Makes templates, one guest at a time. `clean` ends whatever is left of a guest and removes its files; `wall`
    are UNIX seconds."""

    def __init__(
        self,
        starter: Starter,
        images: ImageIndex,
        disks: Disks,
        store: TemplateStore,
        clean: Callable[[str], None],
        wall: Callable[[], float],
        patience: Patience,
    ) -> None:
        self._starter = starter
        self._images = images
        self._disks = disks
        self._store = store
        self._clean = clean
        self._wall = wall
        self._patience = patience
        self._loop = asyncio.get_running_loop()

    async def build(self, blueprint: Blueprint, seal: str, testing: Callable[[], None]) -> Template:
        """Make a template, and try it. It is on record when this returns; nothing is left when it fails.

        Raises:
            DeskfleetError, OSError: it can't be made; the text says why.
        """
        files = self._store.draft(blueprint.key)
        memory = self._store.memory(blueprint.memory_mib)
        try:
            await self._freeze(blueprint, files, memory)
            made_at = int(self._wall())
            template = self._store.keep(blueprint, seal, self._starter.ports, made_at, files, memory)
        except BaseException:
            os.close(memory)
            shutil.rmtree(files.folder, ignore_errors=True)
            raise
        try:
            testing()
            await self._test(template)
            self._store.record(template)
        except BaseException:
            self._store.remove(template)
            raise
        return template

    # --- boot and freeze ------------------------------------------------------------------------------------

    async def _freeze(self, blueprint: Blueprint, files: Files, memory: int) -> None:
        sid = uuid.uuid4().hex
        start = order(blueprint, sid)
        self._store.begun(files, sid)
        async with self._guest(sid, self._starter.make(start, blueprint, memory)) as (process, ended):
            paths = self._starter.paths(sid)
            try:
                async with asyncio.timeout(self._patience.build_s):
                    async with first_monitor(paths.qmp, ended, self._patience.qmp_s) as qemu:
                        async with guest_agent(paths.guest_agent) as inside:
                            await self._until_ready(blueprint, qemu, inside, paths.run, ended)
                            await self._settle(inside, process)
                        await qemu.command("stop")
                        files.picture.write_bytes(await _screen(qemu, paths.run))
                        await _save(qemu, files.state)
                        await qemu.command("quit")
                    await ended.wait()
            except TimeoutError:
                raise TemplateError(f"it was not ready within {self._patience.build_s:g} s") from None
            except MonitorError as error:
                raise TemplateError(f"{error}: {last_words(paths)}"[:400]) from error
            size = self._disks.freeze(sid, self._images.path(blueprint.sha256), files.disk)
            if blueprint.firmware is Firmware.UEFI:
                files.vars.write_bytes(_plain(paths.vars))
        await self._disks.layer(files.disk, files.blank, size)

    @contextlib.asynccontextmanager
    async def _guest(self, sid: str, starting: Awaitable[Process]) -> AsyncIterator[tuple[Process, asyncio.Event]]:
        """A guest for as long as the block runs; nothing is left of it afterwards."""
        ended = asyncio.Event()
        process: Process | None = None
        try:
            process = await starting
            process.watch(self._loop, ended.set)
            yield process, ended
        finally:
            if process:
                process.kill()
                await asyncio.shield(ended.wait())
            self._clean(sid)

    async def _until_ready(
        self, blueprint: Blueprint, qemu: Monitor, inside: GuestAgent | None, run: Path, ended: asyncio.Event
    ) -> None:
        """Wait until the desktop is really there."""
        shown, since = b"", self._loop.time()
        while True:
            if ended.is_set():
                raise MonitorError("it ended while it was starting")
            if blueprint.ready is ReadyBy.MARK:
                if await _marked(blueprint, inside):
                    return
            else:
                seen = await _look(qemu, run)
                if seen != shown:
                    shown, since = seen, self._loop.time()
                elif seen and self._loop.time() - since >= self._patience.still_s and await _answers(blueprint, inside):
                    return
            await asyncio.sleep(self._patience.look_s)

    async def _settle(self, inside: GuestAgent | None, process: Process) -> None:
        """Give back what the guest does not need, and let it finish what it does after its start."""
        if inside:
            with contextlib.suppress(GuestAgentError):
                await inside.command("guest-fstrim")
        deadline = self._loop.time() + self._patience.settle_s
        before = process.cpu_s() or 0.0
        while self._loop.time() < deadline:
            await asyncio.sleep(self._patience.look_s)
            now = process.cpu_s() or 0.0
            if now - before < self._patience.quiet * self._patience.look_s:
                return
            before = now

    # --- try ------------------------------------------------------------------------------------------------

    async def _test(self, template: Template) -> None:
        """Fork a template as for a person, but for network and volumes: it must show the very same picture, and take on
        an identity.

        Raises:
            DeskfleetError, OSError: it is no good.
        """
        sid = uuid.uuid4().hex
        start = order(template.blueprint, sid)
        self._store.begun(template.files, sid)
        async with self._guest(sid, self._starter.fork(start, template, alone=True)) as (_, ended):
            paths = self._starter.paths(sid)
            try:
                async with first_monitor(paths.qmp, ended, self._patience.qmp_s) as qemu:
                    await fork.receive(qemu, template.files.state)
                    if await _screen(qemu, paths.run) != template.files.picture.read_bytes():
                        raise TemplateError("a fork of it does not show the same picture")
                    await qemu.command("cont")
                    async with guest_agent(paths.guest_agent) as inside:
                        await fork.introduce(qemu, inside, start, (), network=False, wall=self._wall)
            except MonitorError as error:
                raise TemplateError(f"{error}: {last_words(paths)}"[:400]) from error


def _plain(path: Path) -> bytes:
    """What is in a file of a guest's folder, which a qemu that was taken over fills as it likes."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_VARS:
            raise TemplateError(f"what lies in {path.name} is not what was put there")
        return file.read(_MOST_VARS)


async def _marked(blueprint: Blueprint, inside: GuestAgent | None) -> bool:
    with contextlib.suppress(GuestAgentError):
        return inside is not None and await inside.holds(fork.MARKS[blueprint.os])
    return False


async def _answers(blueprint: Blueprint, inside: GuestAgent | None) -> bool:
    if blueprint.os is fork.SILENT:
        return True
    with contextlib.suppress(GuestAgentError):
        if inside is not None:
            await inside.command("guest-ping")
            return True
    return False


async def _look(qemu: Monitor, run: Path) -> bytes:
    """What is on the screen, by its digest; nothing while it is of one colour."""
    screen = await _screen(qemu, run)
    pixels = screen[len(screen) % 3 :]
    return b"" if pixels == pixels[:3] * (len(pixels) // 3) else hashlib.sha256(screen).digest()


async def _screen(qemu: Monitor, run: Path) -> bytes:
    """The screen as PPM (QMP screendump: qemu writes into its own folder only)."""
    seen = run / "screen.ppm"
    await qemu.command("screendump", {"filename": str(seen), "format": "ppm"})
    return await asyncio.to_thread(read_screen, seen)


async def _save(qemu: Monitor, target: Path) -> None:
    """Save the state of the devices; the memory is in its own file already (capability x-ignore-shared)."""
    file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        await qemu.give("state", file)
        await qemu.command("migrate-set-capabilities", fork.IGNORE_SHARED)
        await qemu.command("migrate", {"uri": "fd:state"})
        while (done := await qemu.command("query-migrate")).get("status") != "completed":
            if done.get("status") in ("failed", "cancelled"):
                raise TemplateError(f"its state can't be saved: {done.get('error-desc', '')}"[:400])
            await asyncio.sleep(0.01)
    finally:
        os.close(file)
