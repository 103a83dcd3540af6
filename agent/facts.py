"""What a host says about itself: CPUs, memory, disk and load from psutil."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Facts:
    """A reading. Units: MiB; `load1` is the one-minute load average."""

    cpus: int
    memory_mib: int
    load1: float
    memory_free_mib: int
    disk_mib: int
    disk_free_mib: int


def read_facts(disk_folder: Path, offer_cpus: int = 0, offer_memory_mib: int = 0) -> Facts:
    """Read the host. `offer_*` cut down what is offered to guests (0 offers everything)."""
    memory = psutil.virtual_memory()
    disk = os.statvfs(disk_folder)
    cpus = psutil.cpu_count() or 1
    total = memory.total // _MIB
    offered = min(total, offer_memory_mib) if offer_memory_mib else total
    return Facts(
        cpus=min(cpus, offer_cpus) if offer_cpus else cpus,
        memory_mib=offered,
        load1=psutil.getloadavg()[0],
        memory_free_mib=min(offered, memory.available // _MIB),
        disk_mib=disk.f_frsize * disk.f_blocks // _MIB,
        disk_free_mib=disk.f_frsize * disk.f_bavail // _MIB,
    )


def boot_id() -> str:
    """The kernel's name for this boot (proc(5), random/boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
