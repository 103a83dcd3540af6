"""Limits of CPU, memory and processes for each guest, by control groups of version 2 (kernel: admin-guide/cgroup-v2).

A guest's qemu, passt and file servers live in one group, ROOT/HOST/SID. ROOT is not below the agent's own unit: a group
that hands controllers down may hold no process itself, so systemd could not start the agent again beside guests that
outlive it. It belongs to a unit of its own, deskfleet-guests.service, which keeps it delegated and does nothing else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from deskfleet.schemas.errors import DeskfleetError

log = logging.getLogger(__name__)

CONTROLLERS = ("cpu", "memory", "pids")
_PERIOD_US = 100_000
#: What a guest's programs need beside its memory: qemu, its display's pictures and caches; code that emulation has
#: translated, on top. The scheduler's guest_overhead_mib is what they usually take, this is where it is too much.
OVERHEAD_MIB = 512
EMULATION_MIB = 1024
#: Threads beside those of the CPUs: of disk, display, passt and file servers.
_TASKS = 256


class GroupError(DeskfleetError):
    """Raised when guests can't be limited; the text says by what they are not."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a guest was promised, and whether its CPUs are emulated."""

    cpus: int
    memory_mib: int
    emulated: bool


def settings(size: Size) -> dict[str, str]:
    """The files of a guest's group, and what is written into them."""
    overhead = OVERHEAD_MIB + (EMULATION_MIB if size.emulated else 0)
    return {
        # One CPU more than the guest's, for the threads that serve its disk and display.
        "cpu.max": f"{(size.cpus + 1) * _PERIOD_US} {_PERIOD_US}",
        "cpu.weight": str(min(10_000, 100 * size.cpus)),
        "memory.max": str((size.memory_mib + overhead) << 20),
        "memory.swap.max": str(size.memory_mib << 20),
        # passt without its qemu is no use to anybody.
        "memory.oom.group": "1",
        "pids.max": str(_TASKS + 2 * size.cpus),
    }


def missing(root: Path) -> str:
    """Why guests can't be limited, or not by everything; empty when they can. Changes nothing."""
    try:
        there = (root / "cgroup.controllers").read_text().split()
    except OSError as error:
        return f"no control group for guests ({root}: {error.strerror})"
    lacking = [name for name in CONTROLLERS if name not in there]
    return f"no control of {', '.join(lacking)} in {root}" if lacking else ""


class Groups:
    """The groups of one agent's guests: below `root`, in a folder named after its host."""

    def __init__(self, root: Path, host: str) -> None:
        self._root = root
        self._home = root / host
        self._controllers: tuple[str, ...] | None = None

    def prepare(self) -> None:
        """Hand down the controllers that there are.

        Raises:
            GroupError: there is no such group, or not every controller; those that there are work.
        """
        if self._root.is_dir():
            try:
                self._home.mkdir(exist_ok=True)
                there = (self._root / "cgroup.controllers").read_text().split()
                wanted = tuple(name for name in CONTROLLERS if name in there)
                for folder in (self._root, self._home) if wanted else ():
                    (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in wanted))
            except OSError as error:
                raise GroupError(f"{error.filename}: {error.strerror}") from error
            self._controllers = wanted
        why = missing(self._root)
        if why:
            raise GroupError(why)

    def create(self, sid: str, size: Size) -> Path | None:
        """A new group with a guest's limits, as far as there are controllers; None where no groups are. Raises
        OSError."""
        if self._controllers is None:
            return None
        group = self._home / sid
        group.mkdir(exist_ok=True)
        for name, value in settings(size).items():
            file = group / name
            if name == "memory.swap.max" and not file.exists():
                continue  # a kernel that was told not to count swap
            if name.partition(".")[0] in self._controllers:
                file.write_text(value)
        return group

    def remove(self, sid: str) -> bool:
        """End whatever is left in a guest's group, and remove it; False when something has yet to end: ask again."""
        group = self._home / sid
        if not group.is_dir():
            return True
        try:
            (group / "cgroup.kill").write_text("1")
            group.rmdir()
        except OSError as error:
            log.debug("%s: %s", group, error.strerror)
            return False
        return True

    def present(self) -> set[str]:
        """The sids that have a group."""
        try:
            return {path.name for path in self._home.iterdir() if path.is_dir()}
        except OSError:
            return set()
