"""What a memory template is bound to: a state saved by one qemu can only be taken up by the very same.

Same program, machine type, CPU and devices, on the same image: all of that goes into one digest, which is worked out
again before each use. Whatever differs, the template is made anew; nothing is compared piece by piece.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from deskfleet.agent.argv import Frozen, Paths, qemu
from deskfleet.schemas.messages import VmStart
from deskfleet.schemas.session import Resources
from deskfleet.schemas.template import Blueprint

QEMU = "qemu-system-x86_64"
_CPUINFO = Path("/proc/cpuinfo")
_DAY_S = 24 * 3600


def order(blueprint: Blueprint, sid: str, user: str = "") -> VmStart:
    """The command that starts a guest of exactly this template."""
    return VmStart(
        sid=sid,
        generation=1,
        user=user,
        machine=blueprint.machine,
        os=blueprint.os,
        sha256=blueprint.sha256,
        format=blueprint.format,
        video=blueprint.video,
        firmware=blueprint.firmware,
        resources=Resources(blueprint.cpus, blueprint.memory_mib, blueprint.disk_gib),
        gpu_addresses=(),
        persistent=True,
        lifetime_s=_DAY_S,
        grace_s=0,
        connect_s=_DAY_S,
        drivers=blueprint.drivers,
        template=blueprint.key,
    )


def describes(blueprint: Blueprint, start: VmStart) -> bool:
    """Whether this is what is to be started: nobody is given another machine than the one that was asked for, whatever
    key came with it."""
    same = order(blueprint, start.sid)
    names = ("machine", "os", "sha256", "format", "video", "firmware", "drivers")
    return all(getattr(same, name) == getattr(start, name) for name in names) and blueprint.grows_to(start.resources)


def frozen(blueprint: Blueprint, memory: int, ports: int, *, shared: bool, disk: Path | None = None) -> Frozen:
    """The form in which a template is made, and its forks are started; `memory` is an open file."""
    return Frozen(
        memory=memory,
        shared=shared,
        cpus=blueprint.cpus,
        memory_mib=blueprint.memory_mib,
        most_cpus=blueprint.most_cpus,
        most_memory_mib=blueprint.most_memory_mib,
        ports=ports,
        disk=disk,
    )


def digest(blueprint: Blueprint, program: str, cpu: str, accel: str, ports: int) -> str:
    """The seal. `program` and `cpu` name qemu and the processor."""
    paths = Paths(Path("/run"), Path("/disk"), Path("/image"))
    form = frozen(blueprint, 3, ports, shared=True)
    line = qemu(order(blueprint, "0" * 32), paths, accel=accel, network_fd=None, frozen=form)
    return hashlib.sha256(json.dumps([blueprint.key, program, cpu, line]).encode()).hexdigest()


class Program:
    """Which qemu is installed. It is asked for its version again when its file changes."""

    def __init__(self, name: str = QEMU, run: Callable[[list[str]], bytes] | None = None) -> None:
        self._name = name
        self._run = run or (lambda argv: subprocess.run(argv, capture_output=True, check=True, timeout=30).stdout)
        self._seen: tuple[str, int, int, int] | None = None
        self._version = ""

    def version(self) -> str:
        """Version and file; "" when there is none that works."""
        path = shutil.which(self._name)
        try:
            status = Path(path or self._name).stat()
            seen = path or "", status.st_ino, status.st_size, status.st_mtime_ns
            if seen != self._seen:
                self._version = f"{self._run([self._name, '--version']).decode().strip()} {seen}"
                self._seen = seen
        except (OSError, subprocess.SubprocessError):
            self._seen, self._version = None, ""
        return self._version


def processor(accel: str, cpuinfo: Path = _CPUINFO) -> str:
    """What a guest sees of the processor: all of it under KVM, nothing under emulation."""
    if accel != "kvm":
        return ""
    kept = ("vendor_id", "cpu family", "model", "stepping", "microcode", "flags")
    lines = cpuinfo.read_text().partition("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.partition("\t")[0].strip() in kept)
