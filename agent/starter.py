"""Starts a guest's programs: its folder, its user id, its disk, passt and qemu."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from deskfleet.agent import argv as build
from deskfleet.agent import devices
from deskfleet.agent.images import Disks, ImageIndex
from deskfleet.agent.processes import Process, Spawn, arguments, pids
from deskfleet.schemas.errors import DeskfleetError, Reason
from deskfleet.schemas.machine import Firmware
from deskfleet.schemas.messages import VmStart

_LAST_WORDS = 2000


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
    besides, `network` is passt or none, `sysfs` and `dev` are where devices are found, `inputs` is where
    the console bridge tells of input, `hugepages` says whose memory is made of them ("off", "gpu", "all"), `gpu_roms`
    which ROM files GPUs get, by PCI address or ids."""

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

    async def start(self, start: VmStart) -> Process:
        """Start a guest's qemu, and all that it needs. Nothing waits once qemu runs, so that whoever cancels this
        knows that there is none.

        Raises:
            DiskError: its disk can't be made.
            LaunchError: anything else that has a reason.
            OSError: its folder can't be made, or qemu not be run.
        """
        image = self._images.path(start.sha256)
        paths = self.paths(start.sid, image)
        uid = self._make_home(paths)
        disk = await self._disks.create(start.sid, image, start.sha256, start.format, start.resources.disk_gib)
        if uid is not None:
            os.chown(disk, uid, uid)
        return self._run(paths, start, uid)

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

    def _run(self, paths: build.Paths, start: VmStart, uid: int | None) -> Process:
        if start.firmware is Firmware.UEFI:
            shutil.copyfile(build.OVMF_VARS, paths.vars)
            paths.vars.chmod(0o600)
            if uid is not None:
                os.chown(paths.vars, uid, uid)
        with contextlib.ExitStack() as ends:
            network = None
            if self._config.network == "passt":
                ours, theirs = socket.socketpair()
                ends.enter_context(ours)
                ends.enter_context(theirs)
                network = ours.fileno()
                self._start_passt(paths.run / "passt.log", theirs.fileno(), uid)
            line = build.qemu(
                start,
                paths,
                accel=self._config.accel,
                network_fd=network,
                huge=self._huge(start),
                roms=self._lend_gpu(start, uid) if start.gpu_addresses else {},
            )
            fds = [] if network is None else [network]
            pid = self._spawn(line, uid=uid, cwd=paths.run, log=paths.log, fds=fds, groups=self._config.groups)
        process = Process.hold(pid)
        if process is None:
            raise LaunchError(Reason.QEMU_EXITED, last_words(paths))
        return process

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

    def _start_passt(self, words: Path, fd: int, uid: int | None) -> None:
        try:
            pid = self._spawn(build.passt(fd), uid=uid, cwd=Path("/"), log=words, fds=[fd])
        except OSError as error:
            raise LaunchError(Reason.NETWORK_FAILED, f"passt: {error.strerror}") from error
        process = Process.hold(pid)
        if process:  # it ends by itself when qemu closes the socket; this only reaps it
            process.watch(self._loop, lambda: None)


def last_words(paths: build.Paths) -> str:
    """The end of what qemu has said."""
    try:
        with paths.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_WORDS))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
