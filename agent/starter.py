"""Starts a guest's programs: its folder, its user id, its disk, passt and qemu."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deskfleet.agent import argv as build
from deskfleet.agent import devices, share
from deskfleet.agent.cgroups import Groups, Size
from deskfleet.agent.images import Disks, ImageIndex
from deskfleet.agent.lan import Lan, LanError
from deskfleet.agent.processes import Limits, Process, Spawn, arguments, pids
from deskfleet.agent.seal import frozen
from deskfleet.agent.template_store import Template, copy_memory
from deskfleet.agent.volumes import Kind, Mount, Volume, VolumeError, mounts, ready, shares_memory
from deskfleet.schemas.errors import DeskfleetError, Reason
from deskfleet.schemas.machine import Firmware
from deskfleet.schemas.messages import VmStart
from deskfleet.schemas.template import Blueprint

_LAST_WORDS = 2000
_TRIES = 200
_FILE_SLACK = 64 << 20
_GPU_SLACK = 1 << 30
_LOCKED = 8 << 20  # what every process may on a Linux of today


class LaunchError(DeskfleetError):
    """Raised when a guest can't be started."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Config:
    """How guests run here; times in seconds. `uids` is the range of user ids that guests get, one each; None lets
    them run as the agent's own user (for an agent that is not root). `groups` are what their qemu may belong to
    besides, `network` is passt, bridge (then `lan` is it) or none, `sysfs` and `dev` are where devices are found,
    `inputs` is where the console bridge tells of input, `hugepages` says whose memory is made of them ("off", "gpu",
    "all"), `gpu_roms` which ROM files GPUs get, by PCI address or ids. Where disks are, `floor_mib` stay free. `limits`
    holds the guests' control groups, `volumes` is what they see of this host."""

    run: Path
    accel: str
    network: str
    uids: range | None
    groups: tuple[int, ...] = ()
    sysfs: Path = Path("/sys")
    dev: Path = Path("/dev")
    inputs: Path | None = None
    hugepages: str = "off"
    gpu_roms: Mapping[str, str] = field(default_factory=dict)
    lan: Lan | None = None
    limits: Groups | None = None
    volumes: tuple[Volume, ...] = ()
    floor_mib: int = 0
    ready_s: float = 30.0
    powerdown_s: float = 10.0
    quit_s: float = 5.0


class Starter:
    """Starts guests; what becomes of them is hypervisor.py's."""

    def __init__(self, config: Config, images: ImageIndex, disks: Disks, spawn: Spawn) -> None:
        self._config = config
        self._images = images
        self._disks = disks
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()

    def paths(self, sid: str, image: Path = Path()) -> build.Paths:
        """Where a guest's files are."""
        return build.Paths(self._config.run / sid, self._disks.path(sid), image)

    def mounts(self, start: VmStart) -> Sequence[Mount]:
        """The volumes that a guest sees."""
        return mounts(self._config.volumes, start.machine, start.user)

    @property
    def ports(self) -> int:
        """How many ports a fork has: for its card, and for as many volumes as a guest can have here."""
        return 1 + len(self._config.volumes)

    async def start(self, start: VmStart) -> Process:
        """Start a guest's qemu, and all that it needs. Nothing waits once qemu runs, so that whoever cancels this
        knows that there is none.

        Raises:
            DiskError: its disk can't be made.
            LaunchError: anything else that has a reason.
            OSError: its folder can't be made, or qemu not be run.
        """
        return await self._boot(start)

    async def make(self, start: VmStart, blueprint: Blueprint, memory: int) -> Process:
        """Start a template in the making: with this memory, without network or volumes, and behind all other work.
        Raises as `start`."""
        return await self._boot(start, frozen(blueprint, memory, self.ports, shared=True))

    async def _boot(self, start: VmStart, form: build.Frozen | None = None) -> Process:
        paths, found, uid = await self._prepare(start, alone=form is not None)
        want = start.resources.disk_gib
        _give(await self._disks.create(start.sid, paths.image, start.sha256, start.format, want), uid)
        if start.firmware is Firmware.UEFI:
            _give(shutil.copyfile(build.OVMF_VARS, paths.vars), uid)
        return self._run(paths, start, uid, found, form, alone=form is not None)

    async def fork(self, start: VmStart, template: Template, *, alone: bool = False) -> Process:
        """Start a qemu that waits for a template's state; `alone` without network or volumes. Raises as `start`."""
        paths, found, uid = await self._prepare(start, alone=alone)
        _give(self._disks.copy(start.sid, template.files.blank), uid)
        if start.firmware is Firmware.UEFI:
            _give(shutil.copyfile(template.files.vars, paths.vars), uid)
        with contextlib.ExitStack() as ends:
            memory, shared = template.memory, False
            if template.blueprint.copied or shares_memory(found):
                memory, shared = await asyncio.to_thread(copy_memory, memory), True
                ends.callback(os.close, memory)
            form = frozen(template.blueprint, memory, template.ports, shared=shared, disk=template.files.disk)
            return self._run(paths, start, uid, found, form, alone=alone)

    async def _prepare(self, start: VmStart, *, alone: bool = False) -> tuple[build.Paths, Sequence[Mount], int | None]:
        """See whether all is there, and make the guest's folder."""
        paths = self.paths(start.sid, self._images.path(start.sha256))
        found = () if alone else self.mounts(start)
        try:
            async with asyncio.timeout(self._config.ready_s):
                await asyncio.to_thread(self._check, found)
        except TimeoutError:
            raise LaunchError(Reason.VOLUME_UNAVAILABLE, "a volume's file system does not answer") from None
        return paths, found, self._make_home(paths)

    def _check(self, found: Sequence[Mount]) -> None:
        """What this host must have before anything is made. Volumes may be on a slow network: not on the event loop."""
        free = self._disks.free()
        if free < self._config.floor_mib << 20:
            text = f"{free >> 20} MiB are free for disks, and {self._config.floor_mib} are kept for desktops that run"
            raise LaunchError(Reason.NO_SPACE, text)
        try:
            for mount in found:
                if mount.volume.kind is Kind.VIRTIOFS and (self._config.uids is None or not share.program()):
                    raise VolumeError(f"volume {mount.volume.tag}: virtiofs needs virtiofsd, and an agent that is root")
                ready(mount)
        except VolumeError as error:
            raise LaunchError(Reason.VOLUME_UNAVAILABLE, str(error)) from None

    def _make_home(self, paths: build.Paths) -> int | None:
        """The guest's folder, of its own user."""
        shutil.rmtree(paths.run, ignore_errors=True)
        paths.run.mkdir(mode=0o700)
        uid = self._free_uid()
        if uid is not None:
            os.chown(paths.run, uid, uid)
        return uid

    def _free_uid(self) -> int | None:
        if self._config.uids is None:
            return None
        taken = {path.stat().st_uid for path in self._config.run.iterdir()}
        for uid in self._config.uids:
            if uid not in taken:
                return uid
        raise LaunchError(Reason.SPAWN_FAILED, "every user id of the guests' range is taken")

    def _run(
        self,
        paths: build.Paths,
        start: VmStart,
        uid: int | None,
        found: Sequence[Mount],
        form: build.Frozen | None = None,
        *,
        alone: bool = False,
    ) -> Process:
        want = start.resources
        size = Size(want.cpus, want.memory_mib, emulated=self._config.accel != "kvm")
        group = self._config.limits.create(start.sid, size) if self._config.limits else None
        with contextlib.ExitStack() as ends:
            network = None if alone else self._connect(start, paths, uid, group, ends)
            for mount in found:
                if mount.volume.kind is Kind.VIRTIOFS:
                    self._start_share(start.sid, paths, mount, uid, group)
            line = build.qemu(
                start,
                paths,
                accel=self._config.accel,
                network_fd=network,
                tap=self._config.network == "bridge",
                mounts=found,
                huge=form is None and self._huge(start),
                roms=self._lend_gpu(start, uid) if start.gpu_addresses else {},
                frozen=form,
            )
            fds = [fd for fd in (network, form.memory if form else None) if fd is not None]
            limits = _limits(start, self._disks.virtual_size(start.sid), group, last=alone)
            pid = self._spawn(
                line, uid=uid, cwd=paths.run, log=paths.log, fds=fds, groups=self._config.groups, limits=limits
            )
        process = Process.hold(pid)
        if process is None:
            raise LaunchError(Reason.QEMU_EXITED, last_words(paths))
        return process

    def _connect(
        self, start: VmStart, paths: build.Paths, uid: int | None, group: Path | None, ends: contextlib.ExitStack
    ) -> int | None:
        """qemu's end of the guest's network, open until `ends`; None when it gets none."""
        if self._config.network == "passt":
            ours, theirs = socket.socketpair()
            ends.enter_context(ours)
            ends.enter_context(theirs)
            self._serve(build.passt(theirs.fileno()), theirs, paths.run / "passt.log", uid, group)
            return ours.fileno()
        if self._config.network == "bridge" and self._config.lan:
            try:
                plug = self._config.lan.plug(build.mac_of(start.sid))
            except LanError as error:
                raise LaunchError(Reason.NETWORK_FAILED, str(error)) from None
            ends.callback(os.close, plug)
            return plug
        return None

    def _huge(self, start: VmStart) -> bool:
        """Whether the guest's memory is made of huge pages; LaunchError when there are too few."""
        if self._config.hugepages == "off" or (self._config.hugepages == "gpu" and not start.gpu_addresses):
            return False
        needed = build.memory_mib(start.resources.memory_mib, huge=True) // devices.HUGE_PAGE_MIB
        free = devices.free_huge_pages(self._config.sysfs)
        if free < needed:
            text = f"{needed} huge pages of {devices.HUGE_PAGE_MIB} MiB are needed, {free} are free"
            raise LaunchError(Reason.MEMORY_SHORT, text)
        return True

    def _lend_gpu(self, start: VmStart, uid: int | None) -> dict[str, str]:
        """Let the guest's user drive its GPU, whoever has ordered it, unless another guest has it on its command line
        or owns its device node. Returns the ROM files that it is to have."""
        wanted = set(start.gpu_addresses)
        for pid in pids():
            if taken := wanted & build.gpus_of(arguments(pid)):
                raise LaunchError(Reason.GPU_UNAVAILABLE, f"process {pid} drives {', '.join(sorted(taken))}")
        try:
            roms = devices.roms(start.gpu_addresses, self._config.gpu_roms, self._config.sysfs)
            nodes = devices.vfio_nodes(start.gpu_addresses, self._config.sysfs, self._config.dev)
            if uid is not None:
                devices.lend(nodes, uid)
            return roms
        except OSError as error:
            raise LaunchError(Reason.GPU_UNAVAILABLE, f"{error.filename}: {error.strerror}") from error

    def _start_share(self, sid: str, paths: build.Paths, mount: Mount, uid: int | None, group: Path | None) -> None:
        """Start the server of a volume; qemu may connect at once, whether it accepts already or not."""
        volume = mount.volume
        with socket.socket(socket.AF_UNIX) as listener:
            path = paths.share(volume.tag)
            listener.bind(str(path))
            listener.listen(1)
            if uid is not None:
                os.chown(path, uid, uid)
            line = share.command(sid, listener.fileno(), mount)
            self._serve(line, listener, paths.run / f"{volume.tag}.log", None, group)

    def clear(self, sid: str) -> None:
        """Remove what is left beside folder and disk of a guest whose qemu is gone or dies. Called before its folder
        is removed."""
        if any(self.paths(sid).run.glob("*.fs")):
            for pid in pids():
                if share.serves(sid, arguments(pid)) and (stray := Process.hold(pid)):
                    stray.kill()
                    os.close(stray.pidfd)
        if self._config.lan:
            self._config.lan.unplug(build.mac_of(sid))
        if self._config.limits:
            self._remove_group(sid, _TRIES)

    def _remove_group(self, sid: str, tries: int) -> None:
        """The kernel ends processes when it gets to it, and keeps their group until then."""
        if self._config.limits and not self._config.limits.remove(sid) and tries:
            self._loop.call_later(0.05, self._remove_group, sid, tries - 1)

    def left(self) -> set[str]:
        """The sids that have control groups."""
        return self._config.limits.present() if self._config.limits else set()

    def _serve(self, line: list[str], end: socket.socket, words: Path, uid: int | None, group: Path | None) -> None:
        """Start a program that serves the guest on this socket, and ends by itself when qemu closes the other end."""
        try:
            pid = self._spawn(line, uid=uid, cwd=Path("/"), log=words, fds=[end.fileno()], limits=Limits(group=group))
        except OSError as error:
            reason = Reason.NETWORK_FAILED if line[0] == "passt" else Reason.SPAWN_FAILED
            raise LaunchError(reason, f"{line[0]}: {error.strerror}") from error
        process = Process.hold(pid)
        if process:  # only to reap it
            process.watch(self._loop, lambda: None)


def _give(path: Path, uid: int | None) -> None:
    """Make a file a guest's own."""
    path.chmod(0o600)
    if uid is not None:
        os.chown(path, uid, uid)


def _limits(start: VmStart, disk: int, group: Path | None, *, last: bool) -> Limits:
    """What qemu may take, whatever the guest makes it do. Its largest file is the overlay: all of the disk, and
    qcow2's tables, which take 10 bytes for each 64 KiB (a sixth of the slack here); or the memory's memfd. Memory is
    locked for a GPU alone, which reads and writes it by itself."""
    memory = start.resources.memory_mib << 20
    locked = memory + _GPU_SLACK if start.gpu_addresses else _LOCKED
    return Limits(max(disk + disk // 1024, memory) + _FILE_SLACK, locked, group, last)


def last_words(paths: build.Paths) -> str:
    """The end of what qemu has said."""
    try:
        with paths.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_WORDS))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
