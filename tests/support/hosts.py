"""Hosts and wants for tests of placement: eight CPUs and 16 GiB each, nothing reserved for the host itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from deskfleet.scheduler.filters import Moment, Reservation, Want
from deskfleet.scheduler.hosts import HostState
from deskfleet.scheduler.placement import Index
from deskfleet.scheduler.policy import Policy
from deskfleet.schemas.host import Gpu, HostReport
from deskfleet.schemas.machine import Firmware, Format, GpuPolicy, Machine, Os, Range, Video
from deskfleet.schemas.session import Resources

IMAGE = "a" * 64
NOW = 1000.0
POLICY = Policy(host_reserve_mib=0, guest_overhead_mib=0)
MACHINE = Machine(
    name="tiny",
    title="Tiny",
    text="A machine for tests",
    os=Os.OTHER,
    file="tiny.iso",
    format=Format.ISO,
    sha256=IMAGE,
    video=Video.STD,
    firmware=Firmware.BIOS,
    cpus=Range(1, 1, 8),
    memory_mib=Range(64, 512, 1 << 16),
    disk_gib=Range(1, 1, 64),
    gpu=GpuPolicy.OPTIONAL,
    users=("*",),
)


@dataclass
class ManualClock:
    """A clock that stands still until it is moved."""

    now: float = NOW
    shift: float = 0.0

    def monotonic(self) -> float:
        """See Clock."""
        return self.now

    def wall(self) -> float:
        """See Clock; `shift` is how wrong it goes."""
        return 1.7e9 + self.now + self.shift


def gpu(number: int, model: str = "A100", offered: bool = True) -> Gpu:
    """A GPU with two functions in an IOMMU group of its own."""
    address = f"0000:0{number}:00."
    return Gpu(address + "0", model, number, (address + "0", address + "1"), offered)


def report(name: str = "h1", **changes: object) -> HostReport:
    """A host's report."""
    usual = HostReport(
        name, "i", 1, "b", 0, False, "127.0.0.1:1", "kvm", 8, 16384, 0.0, 16384, 1 << 20, 1 << 19, (IMAGE,)
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def host(name: str = "h1", policy: Policy = POLICY, **changes: object) -> HostState:
    """A host that was just heard; `changes` are of its report, or of what is known about it otherwise."""
    mine = {field.name for field in fields(HostState)} - {field.name for field in fields(HostReport)}
    state = HostState(name)
    state.belongs(policy.pools)
    said = {key: value for key, value in changes.items() if key not in mine}
    state.take(report(name, **said), NOW, policy)
    for key, value in changes.items():
        if key in mine:
            setattr(state, key, value)
    return state


def want(sid: str = "s", **changes: object) -> Want:
    """Two CPUs, 2 GiB, an hour; `changes` are of the size, or of the want."""
    size = {key: value for key, value in changes.items() if key in Resources.__slots__}
    rest = {key: value for key, value in changes.items() if key not in size}
    usual = Want(sid, replace(Resources(2, 2048, 10), **size), IMAGE, 3600.0)  # type: ignore[arg-type]
    return replace(usual, **rest)  # type: ignore[arg-type]


def index(hosts: Iterable[HostState], policy: Policy = POLICY) -> Index:
    """The hosts in order."""
    made = Index(policy)
    for state in hosts:
        made.put(state)
    return made


def moment(policy: Policy = POLICY, now: float = NOW, *kept: Reservation) -> Moment:
    """Now."""
    reservations: dict[str, tuple[Reservation, ...]] = {}
    for entry in kept:
        reservations[entry.host] = (*reservations.get(entry.host, ()), entry)
    return Moment(now, policy, reservations)
