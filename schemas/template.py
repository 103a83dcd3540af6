"""Memory templates: a machine that was booted once on a host and frozen, from which desktops are forked.

What a template is made of stands in its Blueprint; the same blueprint has the same key everywhere. Whether one made
some time ago still is that (qemu, devices, CPU) is the host's to know: agent/seal.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum

from deskfleet.schemas.machine import Drivers, Firmware, Format, Machine, Os, ReadyBy, Share, Video
from deskfleet.schemas.session import Birth, Resources

KEY = re.compile(r"[0-9a-f]{16}")

#: Memory is added to a running guest in blocks of this many MiB: Linux's on x86 (Documentation/admin-guide/mm/
#: memory-hotplug), and a multiple of what Windows takes.
MEMORY_BLOCK_MIB = 128


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a template is made of. MiB, and GiB of disk; `most_*` is what a fork of it can grow to. With `copied` forks
    get a copy of the memory and share no page with each other. `tenant` is the group that its forks are for; "" for
    everybody who may use the machine."""

    machine: str
    os: Os
    sha256: str
    format: Format
    video: Video
    firmware: Firmware
    drivers: Drivers
    cpus: int
    memory_mib: int
    disk_gib: int
    most_cpus: int
    most_memory_mib: int
    ready: ReadyBy
    copied: bool = False
    tenant: str = ""

    @property
    def key(self) -> str:
        """What names it: 16 hex digits over everything."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def grows_to(self, want: Resources) -> bool:
        """Whether a fork can have this size: a guest that runs can be given more, and never be taken anything."""
        more_mib = want.memory_mib - self.memory_mib
        return (
            not want.gpus
            and self.cpus <= want.cpus <= self.most_cpus
            and self.disk_gib <= want.disk_gib
            and 0 <= more_mib <= self.most_memory_mib - self.memory_mib
            and more_mib % MEMORY_BLOCK_MIB == 0
        )


def tenants(machine: Machine) -> tuple[str, ...]:
    """Whom templates of a machine are for, each for one."""
    if machine.instant is None:
        return ()
    return machine.groups if machine.instant.share is Share.GROUP else ("",)


def tenant(machine: Machine, groups: Iterable[str]) -> str | None:
    """Of those, who a person with these groups belongs to; None: there is no template for such a person."""
    known = tenants(machine)
    return "" if "" in known else min(set(groups) & set(known), default=None)


def blueprints(machine: Machine, tenant: str = "") -> tuple[Blueprint, ...]:
    """The templates of a machine, smallest first; none when it is not instant."""
    if machine.instant is None:
        return ()
    sizes = sorted(machine.instant.sizes, key=lambda size: (size.memory_mib, size.cpus))
    return tuple(
        Blueprint(
            machine=machine.name,
            os=machine.os,
            sha256=machine.sha256,
            format=machine.format,
            video=machine.video,
            firmware=machine.firmware,
            drivers=machine.drivers,
            cpus=size.cpus,
            memory_mib=size.memory_mib,
            disk_gib=machine.disk_gib.default,
            most_cpus=machine.cpus.max,
            most_memory_mib=machine.memory_mib.max,
            ready=machine.instant.ready,
            copied=machine.instant.share is Share.NEVER,
            tenant=tenant,
        )
        for size in sizes
    )


def fitting(machine: Machine, want: Resources, groups: Iterable[str]) -> Blueprint | None:
    """The template to fork for this size: the largest that can grow to it. None: boot it."""
    mine = tenant(machine, groups)
    found = [each for each in blueprints(machine, mine) if each.grows_to(want)] if mine is not None else []
    return found[-1] if found else None


class TemplateState(StrEnum):
    """How far a host is with a template."""

    WAITING = "waiting"
    BUILDING = "building"
    TESTING = "testing"
    READY = "ready"
    RESTING = "resting"
    FAILED = "failed"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """A template as its host sees it. `mib` is the memory it takes now; `made_at` is UNIX seconds for display (0: not
    made), `forks` how many desktops run on it, `hits` and `misses` how many launches wanted it and were forked or had
    to boot. A new one that is in the making does not keep the one before from serving: `serving`."""

    key: str
    machine: str
    tenant: str
    cpus: int
    memory_mib: int
    state: TemplateState
    serving: bool = False
    mib: int = 0
    made_at: int = 0
    forks: int = 0
    hits: int = 0
    misses: int = 0
    detail: str = ""


#: How many templates stand in one report, and how many a host is told to keep.
MOST_TEMPLATES = 200


class TemplateOrder(StrEnum):
    """What an administrator wants of a host's template."""

    REBUILD = "rebuild"
    DROP = "drop"


BIRTHS: dict[Birth, str] = {
    Birth.FORKED: "Forked from a machine that was ready.",
    Birth.BOOTED: "Booted.",
    Birth.NO_TEMPLATE: "Booted: no ready copy of this machine was on the host yet.",
    Birth.TEMPLATE_RESTS: "Booted: the ready copy of this machine failed several times and is being looked at.",
    Birth.FORK_FAILED: "Booted: the ready copy of this machine could not be used this time.",
}
