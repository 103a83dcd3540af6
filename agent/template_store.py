"""The memory templates that a host holds: their files, and their memory.

The memory is a memfd without a name, sealed when the template is done: from then on nobody can write to it or change
its size, not even a qemu that a guest has taken over (memfd_create(2), F_SEAL_WRITE). A fork maps it privately. A
named file would not do: qemu opens memory for writing, also what it maps privately.

A memfd lives as long as somebody has it open. So that a template outlives the agent, a process that only sleeps holds
it, and the template's record says which. Everything else is in a folder of its own, which counts from when the record
is in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from marshmallow import ValidationError

from deskfleet.agent.processes import Process, Spawn, arguments, pids
from deskfleet.schemas.errors import DeskfleetError
from deskfleet.schemas.template import Blueprint
from deskfleet.schemas.tickets import SID
from deskfleet.schemas.wire import BLUEPRINT

log = logging.getLogger(__name__)

_RECORD = "template.json"
_GUESTS = "guests"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_KEEPER = ["sleep", "infinity"]
_PROC = Path("/proc")


class TemplateError(DeskfleetError):
    """Raised when a template can't be made, kept or used; the text says why."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of one template."""

    folder: Path

    @property
    def disk(self) -> Path:
        """The overlay as it was when the guest was frozen."""
        return self.folder / "disk.qcow2"

    @property
    def blank(self) -> Path:
        """An empty overlay on top of it, to be copied."""
        return self.folder / "blank.qcow2"

    @property
    def state(self) -> Path:
        """The state of the devices (a migration stream without the memory)."""
        return self.folder / "state"

    @property
    def vars(self) -> Path:
        """The UEFI variables of that moment."""
        return self.folder / "vars.fd"

    @property
    def picture(self) -> Path:
        """The screen of that moment (PPM)."""
        return self.folder / "picture.ppm"


@dataclass(frozen=True, slots=True)
class Template:
    """One that can be forked. `memory` is its sealed memory, open in this process; `made_at` UNIX seconds."""

    blueprint: Blueprint
    seal: str
    ports: int
    made_at: int
    files: Files
    memory: int
    keeper: int

    @property
    def mib(self) -> int:
        """The memory that it takes: pages that the guest has never touched take none."""
        return os.fstat(self.memory).st_blocks * 512 >> 20


def new_memory(name: str, mib: int) -> int:
    """A file of memory, to be sealed when it is done. Inherited by nobody who is not given it."""
    memory = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, mib << 20)
    return memory


def copy_memory(memory: int) -> int:
    """A copy of a template's memory, for a fork that shares none. Slow: call it off the event loop."""
    size = os.fstat(memory).st_size
    copy = new_memory("deskfleet-copy", size >> 20)
    try:
        for start, end in _parts(memory, size):
            at = start
            while at < end:
                os.lseek(copy, at, os.SEEK_SET)
                at += os.sendfile(copy, memory, at, end - at)
    except OSError:
        os.close(copy)
        raise
    return copy


def _parts(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data."""
    end = 0
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # ENXIO: none after here
            return
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


class TemplateStore:
    """Templates in a folder, each in one of its own."""

    def __init__(self, folder: Path, boot_id: str, spawn: Spawn) -> None:
        self._folder = folder
        self._boot_id = boot_id
        self._spawn = spawn
        # Another agent of this machine, with a folder of its own, has memory of other names.
        self._name = f"deskfleet-{hashlib.sha256(bytes(folder.resolve())).hexdigest()[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)  # forks reach their frozen disk by its full path, and can list nothing on the way

    def load(self, clean: Callable[[str], None]) -> dict[str, Template]:
        """The templates that a former agent left, by key; what is no template any more is removed. `clean` removes a
        guest by which one was being made."""
        found: dict[str, Template] = {}
        for folder in sorted(self._folder.iterdir()):
            template = self._read(folder)
            if template is None:
                for sid in _lines(folder / _GUESTS):
                    clean(sid)
                shutil.rmtree(folder, ignore_errors=True)
            elif template.blueprint.key in found:  # it died between making the new one and removing the old
                older, newer = sorted((found[template.blueprint.key], template), key=lambda each: each.made_at)
                self.remove(older)
                found[template.blueprint.key] = newer
            else:
                found[template.blueprint.key] = template
        known = {template.keeper for template in found.values()}
        for pid in set(pids()) - known:
            self._end(pid)
        return found

    def draft(self, key: str) -> Files:
        """A new folder for a template in the making."""
        folder = self._folder / f"{key}.{secrets.token_hex(4)}"
        folder.mkdir(mode=0o711)
        return Files(folder)

    def begun(self, files: Files, sid: str) -> None:
        """A guest is about to be started for the template in this folder."""
        with (files.folder / _GUESTS).open("a") as file:
            file.write(f"{sid}\n")

    def memory(self, mib: int) -> int:
        """Memory for a template in the making, not sealed yet."""
        return new_memory(self._name, mib)

    def keep(self, blueprint: Blueprint, seal: str, ports: int, made_at: int, files: Files, memory: int) -> Template:
        """Seal a template's memory, and let it be held. It is not yet on record.

        Raises:
            OSError: the kernel refuses: somebody still has it open for writing; or nobody can be started to hold it.
        """
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
        log_file = files.folder / "keeper.log"
        keeper = self._spawn(_KEEPER, uid=None, cwd=Path("/"), log=log_file, fds=[memory])
        process = Process.hold(keeper)
        if process:
            os.close(process.pidfd)
        return Template(blueprint, seal, ports, made_at, files, memory, keeper)

    def record(self, template: Template) -> None:
        """Put it on record: from now on it counts, also after the agent's death. Raises OSError."""
        status = os.fstat(template.memory)
        facts = {
            "blueprint": BLUEPRINT.dump(template.blueprint),
            "seal": template.seal,
            "ports": template.ports,
            "made_at": template.made_at,
            "boot_id": self._boot_id,
            "keeper": template.keeper,
            "descriptor": template.memory,
            "inode": [status.st_dev, status.st_ino],
        }
        path = template.files.folder / _RECORD
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)

    def remove(self, template: Template) -> None:
        """Remove a template. Forks of it run on: they have open what they need of it."""
        os.close(template.memory)
        shutil.rmtree(template.files.folder, ignore_errors=True)
        self._end(template.keeper)

    def _end(self, pid: int) -> None:
        """End a process that holds memory of ours, and is nothing else."""
        if arguments(pid) != _KEEPER:
            return
        process = Process.hold(pid)
        if process:
            if arguments(pid) == _KEEPER and _opened(pid, f"/memfd:{self._name} "):
                process.kill()
                process.reap()
            else:
                os.close(process.pidfd)

    def _read(self, folder: Path) -> Template | None:
        try:
            facts = json.loads((folder / _RECORD).read_text())
            if facts["boot_id"] != self._boot_id:
                return None  # memory does not outlive the machine
            blueprint = BLUEPRINT.load(facts["blueprint"])
            memory = _held(int(facts["keeper"]), int(facts["descriptor"]), tuple(facts["inode"]))
            template = Template(
                blueprint, str(facts["seal"]), int(facts["ports"]), int(facts["made_at"]), Files(folder), memory,
                int(facts["keeper"]),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            log.warning("%s is no template any more: %s", folder.name, error)
            return None
        return template


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if SID.fullmatch(line)]
    except OSError:
        return []


def _opened(pid: int, name: str) -> bool:
    """Whether a process has open what is called like that."""
    with contextlib.suppress(OSError):
        return any(os.readlink(link).startswith(name) for link in (_PROC / str(pid) / "fd").iterdir())
    return False


def _held(keeper: int, descriptor: int, inode: tuple[int, ...]) -> int:
    """Open the memory that a keeper holds. That it is the one which was sealed is seen by its inode and its seals.

    Raises:
        ValueError: it is something else.
    """
    memory = os.open(_PROC / str(keeper) / "fd" / str(descriptor), os.O_RDWR | os.O_CLOEXEC)
    status = os.fstat(memory)
    if (status.st_dev, status.st_ino) != inode or fcntl.fcntl(memory, fcntl.F_GET_SEALS) != _SEALS:
        os.close(memory)
        raise ValueError("its memory is gone")
    return memory
