"""Is this machine fit to be a host? Each look ends in a line: good, warn or bad, and what to do about it.

Nothing here changes the machine. What is asked comes in through `Machine`, so that every answer can be tested.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from deskfleet.agent import cgroups, share
from deskfleet.agent.devices import HUGE_PAGE_MIB, HUGE_PAGES, free_huge_pages
from deskfleet.agent.settings import AgentSettings
from deskfleet.agent.volumes import IDS, USER, Kind
from deskfleet.schemas.host import Gpu

_OLDEST_QEMU = (7, 2)
_GIB = 1 << 30


class Level(StrEnum):
    """How serious a finding is: BAD keeps guests, or all of them, from running."""

    GOOD = "good"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do (empty when nothing is to be done)."""

    name: str
    level: Level
    text: str
    advice: str = ""

    @property
    def line(self) -> str:
        """The finding in one line of text."""
        return f"{self.name}: {self.text}" + (f". {self.advice}" if self.advice else "")


@dataclass(frozen=True, slots=True)
class Machine:
    """How to ask this machine. `run` gives exit code and output of a command (127: there is none); `probe` runs the
    guest firmware of accel.py under an accelerator and says what went wrong; `listen` tries to take an address and
    says why not; `broker` connects and returns what is wrong, and how many consumers this host's queue has."""

    settings: AgentSettings
    root: Path
    run: Callable[[Sequence[str]], tuple[int, str]]
    probe: Callable[[str, str], str]
    gpus: Callable[[], tuple[Gpu, ...]]
    listen: Callable[[str], str]
    broker: Callable[[], tuple[str, int]]
    disk: Callable[[Path], tuple[int, int, int]]  # bytes free, bytes in all, inodes free
    memlock: Callable[[], int | None]  # bytes; None is no limit
    is_root: bool = True
    running: bool = field(default=False)  # an agent runs here already, so its ports and its queue are taken


def _good(name: str, text: str) -> list[Finding]:
    return [Finding(name, Level.GOOD, text)]


def _kvm(machine: Machine) -> list[Finding]:
    no_kvm = machine.probe("kvm", "host")
    if not no_kvm:
        return _good("kvm", "a guest runs under KVM")
    no_tcg = machine.probe("tcg", "max")
    if no_tcg:
        return [Finding("kvm", Level.BAD, f"qemu runs no guest at all: {no_tcg}", "Install qemu-system-x86")]
    advice = "Switch virtualisation (VT-x, AMD-V) on in the firmware and load kvm_intel or kvm_amd"
    if "Permission denied" in no_kvm:
        advice = "Let the group kvm open /dev/kvm (root:kvm, mode 0660), by a udev rule"
    return [Finding("kvm", Level.WARN, f"guests run by emulation only, which is slow; KVM: {no_kvm}", advice)]


def _nesting(machine: Machine) -> list[Finding]:
    for module in ("kvm_intel", "kvm_amd"):
        file = machine.root / "sys/module" / module / "parameters/nested"
        if file.is_file():
            on = file.read_text().strip() in ("Y", "1")
            return _good("nesting", f"guests may {'' if on else 'not '}run virtual machines themselves")
    return []


def _iommu(machine: Machine) -> list[Finding]:
    groups = machine.root / "sys/kernel/iommu_groups"
    count = sum(1 for _ in groups.iterdir()) if groups.is_dir() else 0
    if count:
        return _good("iommu", f"{count} groups")
    advice = "For GPUs in guests: switch VT-d or AMD-Vi on in the firmware, and boot with intel_iommu=on iommu=pt"
    return [Finding("iommu", Level.WARN, "no IOMMU groups, so no GPU can be given to a guest", advice)]


def _gpus(machine: Machine) -> list[Finding]:
    found = []
    for gpu in machine.gpus():
        name = f"gpu {gpu.address}"
        if gpu.offered:
            found += _good(name, f"{gpu.model}, group {gpu.group}, offered")
        else:
            advice = 'See "GPUs" in docs/operations.md, or leave it to the host on purpose'
            found.append(Finding(name, Level.WARN, f"{gpu.model} is not offered: {gpu.problem}", advice))
    limit = machine.memlock()
    if any(gpu.offered for gpu in machine.gpus()) and limit is not None and limit < 8 * _GIB:
        advice = "A guest with a GPU locks all its memory: set LimitMEMLOCK=infinity in the agent's unit"
        found.append(Finding("memlock", Level.BAD, f"only {limit >> 20} MiB may be locked", advice))
    return found


def _huge_pages(machine: Machine) -> list[Finding]:
    whose = {"gpu": "guests with a GPU", "all": "guests"}.get(machine.settings.hugepages)
    if whose is None:
        return _good("huge pages", "not used for guests, as it is set")
    sysfs = machine.root / "sys"
    free = free_huge_pages(sysfs)
    if not free:
        advice = f'Set nr_hugepages in {sysfs / HUGE_PAGES} at boot, or hugepages = "off"'
        return [Finding("huge pages", Level.BAD, f"none is free, so {whose} can't start", advice)]
    return _good("huge pages", f"{free * HUGE_PAGE_MIB} MiB free for {whose}")


def _vgpus(machine: Machine) -> list[Finding]:
    """Slices of GPUs that a driver offers (kernel: driver-api/vfio-mediated-device)."""
    found = []
    for parent in sorted((machine.root / "sys/class/mdev_bus").glob("*/mdev_supported_types")):
        kinds = []
        for kind in sorted(parent.iterdir()):
            name, left, api = (_line(kind / file) for file in ("name", "available_instances", "device_api"))
            kinds.append(f"{name or kind.name} ({left or '?'} left, {api or 'unknown interface'})")
        if kinds:
            text = f"{', '.join(kinds[:8])}{' and more' if len(kinds) > 8 else ''}: listed, not offered yet"
            advice = "To give the whole card to one guest, bind it to vfio-pci"
            found.append(Finding(f"vgpu {parent.parent.name}", Level.WARN, text, advice))
    return found


def _line(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()[:80]
    except OSError:
        return ""


def _qemu(machine: Machine) -> list[Finding]:
    code, text = machine.run(["qemu-system-x86_64", "--version"])
    version = re.search(r"version (\d+)\.(\d+)", text)
    if code or not version:
        return [Finding("qemu", Level.BAD, "qemu-system-x86_64 is missing", "Install qemu-system-x86 and qemu-utils")]
    found = (int(version[1]), int(version[2]))
    if found < _OLDEST_QEMU:
        oldest = ".".join(map(str, _OLDEST_QEMU))
        return [Finding("qemu", Level.BAD, f"version {version[1]}.{version[2]}", f"At least {oldest} is needed")]
    code, devices = machine.run(["qemu-system-x86_64", "-device", "help"])
    wanted = ("virtio-vga", "virtio-net-pci", "virtio-blk-pci", "usb-tablet")
    missing = [device for device in wanted if f'name "{device}"' not in devices]
    if code or missing:
        text = f"lacks the devices {', '.join(missing)}" if missing else "does not tell its devices"
        return [Finding("qemu", Level.BAD, text, "Install the full qemu-system-x86 with its modules")]
    if machine.run(["qemu-img", "--version"])[0]:
        return [Finding("qemu", Level.BAD, "qemu-img is missing", "Install qemu-utils")]
    return _good("qemu", f"version {version[1]}.{version[2]}, with what guests need")


def _network(machine: Machine) -> list[Finding]:
    if machine.settings.network == "none":
        return _good("network", "guests get none, as it is set")
    if not machine.is_root:
        return [Finding("network", Level.BAD, "the agent is not root, so guests get no network", "Run it as root")]
    bridged = machine.settings.network == "bridge"
    for program, package in (("ip", "iproute2") if bridged else ("passt", "passt"), ("nft", "nftables")):
        if machine.run([program, "-V" if program == "ip" else "--version"])[0]:
            return [
                Finding("network", Level.BAD, f"{program} is missing, so guests get no network", f"Install {package}")
            ]
    if not bridged:
        return _good("network", "passt and nftables are there")
    name = machine.settings.bridge
    if not (machine.root / "sys/class/net" / name / "bridge").is_dir():
        text = f"there is no bridge {name}, so guests get no network"
        return [Finding("network", Level.BAD, text, "Make it in the host's network settings, or set another")]
    if not (machine.root / "dev/net/tun").exists():
        return [Finding("network", Level.BAD, "no /dev/net/tun, so guests get no network", "Load the module tun")]
    return _good("network", f"the bridge {name}, iproute2 and nftables are there")


def _limits(machine: Machine) -> list[Finding]:
    why = cgroups.missing(machine.root / str(machine.settings.cgroup).lstrip("/"))
    if not why:
        return _good("limits", "CPU, memory and processes of guests are limited by control groups")
    advice = "It takes control groups of version 2 and deskfleet-guests.service, or another delegated group as cgroup"
    return [Finding("limits", Level.WARN, f"guests are not fully limited: {why}", advice)]


def _volumes(machine: Machine) -> list[Finding]:
    found: list[Finding] = []
    for volume in machine.settings.volumes:
        name, path = f"volume {volume.tag}", volume.path.removesuffix(f"/{USER}")
        if not (machine.root / path.lstrip("/")).is_dir():
            advice = "Make it, mount it, or let the agent's unit see it; launches that want it are refused"
            found.append(Finding(name, Level.BAD, f"no folder {path}", advice))
        elif volume.kind is Kind.VIRTIOFS and not any(
            (machine.root / program.lstrip("/")).is_file() for program in share.PROGRAMS
        ):
            text = "virtiofsd is missing, so launches that want it are refused"
            found.append(Finding(name, Level.BAD, text, "Install virtiofsd (on Debian 12: qemu-system-common)"))
        else:
            found += _good(name, f"{volume.path}, by {volume.kind}, {'read-only' if volume.read_only else 'writable'}")
    return found or _good("volumes", "none are set")


def _disk(machine: Machine) -> list[Finding]:
    found = []
    for name, folder in (("disk", machine.settings.state), ("images", machine.settings.images)):
        try:
            free, whole, inodes = machine.disk(folder)
        except OSError as error:
            found.append(Finding(name, Level.BAD, f"{folder}: {error.strerror}", "Make the folder, or mount its disk"))
            continue
        text = f"{free / _GIB:.1f} of {whole / _GIB:.1f} GiB free in {folder}"
        if inodes == 0:
            found.append(Finding(name, Level.BAD, f"no inodes left in {folder}", "Remove files or use another disk"))
        elif name == "disk" and free < 5 * _GIB:
            found.append(Finding(name, Level.WARN, text, "Guests' disks grow here: give it more room"))
        else:
            found += _good(name, text)
    return found


def _clock(machine: Machine) -> list[Finding]:
    code, text = machine.run(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    if code:
        return [
            Finding("clock", Level.WARN, "nobody tells whether it is kept right", "Install chrony or systemd-timesyncd")
        ]
    if text.strip() == "yes":
        return _good("clock", "kept right by NTP")
    return [Finding("clock", Level.WARN, "not kept right by NTP", "Times shown, and tickets, go by it: set NTP up")]


def _broker(machine: Machine) -> list[Finding]:
    problem, consumers = machine.broker()
    if problem:
        return [Finding("broker", Level.BAD, problem, "Check broker_url, the network, and that this host is enrolled")]
    if consumers and not machine.running:
        text = "another agent reads this host's commands"
        return [Finding("broker", Level.BAD, text, f"No two machines may be called {machine.settings.host!r}")]
    return _good("broker", "reached, and this host's queue may be read")


def _tls(machine: Machine) -> list[Finding]:
    files = machine.settings.console_tls
    if files is None:
        text = "consoles go unencrypted from the proxy to this host"
        return [Finding("tls", Level.WARN, text, "Set console_cert, console_key and console_ca")]
    for file in files:
        if not (machine.root / file.lstrip("/")).is_file():
            return [Finding("tls", Level.BAD, f"{file} is missing", "Enrol this host anew, or mend the path")]
    code, text = machine.run(["openssl", "x509", "-in", files[0], "-noout", "-checkend", str(30 * 86400), "-pubkey"])
    key = machine.run(["openssl", "pkey", "-in", files[1], "-pubout"])[1]
    public = re.search(r"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", text, re.DOTALL)
    if public is None or public[0] not in key:
        return [Finding("tls", Level.BAD, "certificate and key do not belong together", "Enrol this host anew")]
    if code:
        return [Finding("tls", Level.WARN, "the certificate ends within 30 days", "Renew it")]
    return _good("tls", "certificate and key belong together and are good for 30 days and more")


def _ports(machine: Machine) -> list[Finding]:
    if machine.running:
        return _good("ports", "in use by the agent that runs here")
    found = []
    for name, where in (
        ("console_listen", machine.settings.console_listen),
        ("ops_listen", machine.settings.ops_listen),
    ):
        problem = machine.listen(where)
        if problem:
            found.append(Finding("ports", Level.BAD, f"{name} {where}: {problem}", "Free it, or set another"))
    return found or _good("ports", "free")


def _uids(machine: Machine) -> list[Finding]:
    uids = machine.settings.uids
    ranges = [("the guests' range", uids)]
    for volume in machine.settings.volumes:
        if volume.kind is Kind.VIRTIOFS:
            ranges.append((f"volume {volume.tag}'s range", range(volume.owner, volume.owner + IDS)))
    try:
        users = (machine.root / "etc/passwd").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split(":") for line in users]
    found = []
    for whose, ids in ranges:
        taken = [entry[0] for entry in fields if len(entry) > 2 and entry[2].isdigit() and int(entry[2]) in ids]
        if taken:
            text = f"{', '.join(taken[:3])} have user ids of {whose} {ids.start}-{ids.stop - 1}"
            advice = "Set first_uid and last_uid, or the volume's owner, to a range that nobody uses"
            found.append(Finding("user ids", Level.BAD, text, advice))
    return found or _good("user ids", f"{uids.start}-{uids.stop - 1} belong to nobody else")


LOOKS: tuple[Callable[[Machine], list[Finding]], ...] = (
    _kvm, _nesting, _qemu, _iommu, _gpus, _huge_pages, _vgpus, _network, _limits, _volumes, _uids, _disk, _clock,
    _broker, _tls, _ports,
)  # fmt: skip


def look(machine: Machine) -> list[Finding]:
    """Everything there is to say about a machine, in a fixed order."""
    return [finding for check in LOOKS for finding in check(machine)]


def as_json(findings: Iterable[Finding]) -> str:
    """The findings for programs: a list of objects with name, level, text and advice."""
    return json.dumps([asdict(finding) for finding in findings], indent=1)


def as_text(findings: Sequence[Finding]) -> str:
    """The findings for people, one a line, advice below."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.value:<5} {finding.name:<{width}}  {finding.text}")
        if finding.advice:
            lines.append(f"{'':<5} {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)
