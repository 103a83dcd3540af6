"""The command lines of a guest's programs, as a pure function of what was ordered. No shell ever sees them.

No value that a person typed reaches these lists: sizes are numbers, names are ids of ours, PCI addresses and paths
are checked by pattern before they come here. Block devices are JSON and commas in other paths are doubled, so nothing
in a path can become an option.

A guest can only be restored from saved memory with the very devices that it was saved with. So a template is made, and
a fork started, with what all forks have in common (Frozen); what is a person's own (network card, clipboard, volumes,
further CPUs and memory) is plugged in later, into ports that are there for it. Facts about qemu 7.2 behind the choices:
- the seccomp sandbox forbids -daemonize and -runas, so qemu runs in the foreground of a session of its own;
- a QMP socket serves one client and lets a second one hang, so there is one for the agent and one for rescue;
- a file server for the guest (vhost-user) must be given the guest's memory, so that is then a shared memfd;
- a full disk pauses the guest (werror=enospc) and any other error is the guest's own;
- the outermost `backing` of a -blockdev replaces what the overlay's header says, and `backing: null` under the
  image cuts a chain that a hostile image might have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from deskfleet.agent.devices import HUGE_PAGE_MIB
from deskfleet.agent.volumes import Kind, Mount, shares_memory, told
from deskfleet.schemas.machine import Drivers, Firmware, Format, Os, Video
from deskfleet.schemas.messages import VmStart

MACHINE_TYPE = "pc-q35-7.2"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
OVMF_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
OVMF_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")

# What Windows uses of a hypervisor that speaks its language (QEMU: docs/system/i386/hyperv.rst): its clocks, timers and
# interrupts then cost a fraction. KVM alone offers them.
_HYPERV = (
    "hv-relaxed,hv-vapic,hv-spinlocks=0x1fff,hv-vpindex,hv-runtime,hv-time,hv-synic,hv-stimer,hv-frequencies,"
    "hv-tlbflush,hv-ipi"
)

_VFIO = "vfio-pci,host="

_VIDEO = {Video.STD: "VGA", Video.VIRTIO: "virtio-vga", Video.QXL: "qxl-vga"}


@dataclass(frozen=True, slots=True)
class Paths:
    """Where one guest's files are. `run` is a 0700 folder of the guest's own user; unix socket paths end at 107
    bytes, so it must not be deep."""

    run: Path
    disk: Path
    image: Path

    @property
    def vnc(self) -> Path:
        """The display's socket; the console bridge connects here."""
        return self.run / "vnc.sock"

    @property
    def qmp(self) -> Path:
        """The agent's QMP socket."""
        return self.run / "qmp.sock"

    @property
    def rescue(self) -> Path:
        """A second QMP socket, for an administrator at the host."""
        return self.run / "rescue.sock"

    @property
    def guest_agent(self) -> Path:
        """The channel of qemu-guest-agent. The agent holds it open: qemu-ga spins while nobody does."""
        return self.run / "qga.sock"

    def share(self, tag: str) -> Path:
        """The socket of the file server of one volume."""
        return self.run / f"{tag}.fs"

    @property
    def vars(self) -> Path:
        """UEFI variables of this guest."""
        return self.run / "vars.fd"

    @property
    def log(self) -> Path:
        """qemu's last words."""
        return self.run / "qemu.log"


@dataclass(frozen=True, slots=True)
class Frozen:
    """That a guest is a template in the making (`disk` is None) or a fork of one. `memory` is the open file that is its
    memory: its own with `shared`, else what it writes is its own. `disk` is the frozen overlay under a fork's. Sizes in
    MiB; `most_*` is what it can grow to, `ports` how many devices can be plugged in."""

    memory: int
    shared: bool
    cpus: int
    memory_mib: int
    most_cpus: int
    most_memory_mib: int
    ports: int
    disk: Path | None = None


#: The ports of a guest that devices are plugged into, the network card's first.
PORT = "port{}"
#: How often memory can be added.
SLOTS = 4


def uuid_of(sid: str) -> str:
    """A session's id as the UUID on its qemu's command line; a process is only ever killed after it matched."""
    return str(UUID(sid))


def hostname(sid: str) -> str:
    """What a guest is called."""
    return f"desk-{sid[:8]}"


def mac_of(sid: str) -> str:
    """A stable address in qemu's locally administered range."""
    digest = hashlib.sha256(sid.encode()).hexdigest()
    return f"52:54:00:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}"


def qemu(
    start: VmStart,
    paths: Paths,
    *,
    accel: str,
    network_fd: int | None,
    tap: bool = False,
    mounts: Sequence[Mount] = (),
    huge: bool = False,
    roms: Mapping[str, str] | None = None,
    frozen: Frozen | None = None,
    binary: str = "qemu-system-x86_64",
) -> list[str]:
    """qemu's argument list. `network_fd` is qemu's end of the socket pair to passt, or a tap device's; None for no
    network. `huge` takes the memory from huge pages; `roms` are files for functions of the GPU, by address, and ""
    hides a function's own. `frozen`: a template, or a fork that waits for its state."""
    want = start.resources
    shared = shares_memory(mounts)
    return [
        binary,
        "-nodefaults",
        "-no-user-config",
        "-name",
        f"guest=deskfleet-{start.sid},process=df-{start.sid[:8]},debug-threads=on",
        "-uuid",
        uuid_of(start.sid),
        "-sandbox",
        SANDBOX,
        "-accel",
        accel,
        "-cpu",
        _cpu(start.os, accel),
        *(_frozen(frozen) if frozen else _size(want.cpus, want.memory_mib, huge=huge, shared=shared)),
        "-machine",
        f"{MACHINE_TYPE},memory-backend=ram",
        "-rtc",
        # Windows counts on the ticks of this clock; those that came late are made up for.
        "base=localtime,driftfix=slew" if start.os is Os.WINDOWS else "base=utc",
        "-msg",
        "timestamp=on",
        "-display",
        "none",
        "-vnc",
        f"unix:{plain(paths.vnc)},share=force-shared",
        "-qmp",
        f"unix:{plain(paths.qmp)},server=on,wait=off",
        "-qmp",
        f"unix:{plain(paths.rescue)},server=on,wait=off",
        "-fw_cfg",
        f"name=opt/deskfleet/sid,string={start.sid}",
        "-fw_cfg",
        f"name=opt/deskfleet/hostname,string={'desktop' if frozen else hostname(start.sid)}",
        *_firmware(start, paths),
        *_disks(start, paths, frozen.disk if frozen else None),
        *_devices(start, paths, frozen),
        *(_ports(frozen) if frozen else []),
        *_network(start, network_fd, tap=tap, plugged=frozen is None),
        *_volumes(paths, mounts, plugged=frozen is None),
        *_gpus(start, roms or {}),
    ]


def plain(path: Path) -> str:
    """A path as qemu's options hold it: a comma in it would begin the next option."""
    return str(path).replace(",", ",,")


def _cpu(system: Os, accel: str) -> str:
    if accel != "kvm":
        return "max"
    return f"host,{_HYPERV}" if system is Os.WINDOWS else "host"


def memory_mib(wanted: int, *, huge: bool) -> int:
    """How much memory a guest gets that wants so much: huge pages are given whole."""
    return -(-wanted // HUGE_PAGE_MIB) * HUGE_PAGE_MIB if huge else wanted


def _frozen(frozen: Frozen) -> list[str]:
    share = "on" if frozen.shared else "off"
    return [
        "-smp",
        f"cpus={frozen.cpus},maxcpus={frozen.most_cpus}",
        "-m",
        f"size={frozen.memory_mib}M,slots={SLOTS},maxmem={frozen.most_memory_mib}M",
        "-object",
        # By the descriptor: the file has no name, and its writers are none (templates.py).
        f"memory-backend-file,id=ram,size={frozen.memory_mib}M,mem-path=/proc/self/fd/{frozen.memory},share={share}",
        *(["-incoming", "defer"] if frozen.disk else []),
    ]


def _ports(frozen: Frozen) -> list[str]:
    ports = (f"pcie-root-port,id={PORT.format(n)},chassis={n + 2}" for n in range(frozen.ports))
    return [word for port in ports for word in ("-device", port)]


def _size(cpus: int, wanted: int, *, huge: bool, shared: bool) -> list[str]:
    # Pages of a memfd are promised when it is mapped, so a guest that lacks some fails at its start and never later.
    kind = "memory-backend-memfd" if huge or shared else "memory-backend-ram"
    if huge:
        kind += f",hugetlb=on,hugetlbsize={HUGE_PAGE_MIB}M"
    if shared:
        kind += ",share=on"
    size = memory_mib(wanted, huge=huge)
    return ["-smp", f"cpus={cpus}", "-m", f"size={size}M", "-object", f"{kind},id=ram,size={size}M"]


def _blockdev(**options: object) -> list[str]:
    return ["-blockdev", json.dumps(options, separators=(",", ":"))]


def _firmware(start: VmStart, paths: Paths) -> list[str]:
    if start.firmware is Firmware.BIOS:
        return []
    pflash = "if=pflash,format=raw,unit="
    return ["-drive", f"{pflash}0,readonly=on,file={OVMF_CODE}", "-drive", f"{pflash}1,file={plain(paths.vars)}"]


def _disks(start: VmStart, paths: Paths, frozen: Path | None) -> list[str]:
    image = {"driver": "file", "filename": str(paths.image)}
    disk: dict[str, object] = {
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(paths.disk)},
    }
    cd: list[str] = []
    if start.format is Format.ISO:
        disk["backing"] = None
        cd = _blockdev(driver="raw", **{"node-name": "cd", "read-only": True, "file": image})
        # Behind the disk, so that an installed system starts; an empty disk falls through at once.
        cd += ["-device", "ide-cd,drive=cd,bus=ide.1,bootindex=2"]
    else:
        backing: dict[str, object] = {"driver": _driver(start.format), "read-only": True, "file": image}
        if start.format in (Format.QCOW2, Format.VMDK):
            backing["backing"] = None
        disk["backing"] = backing
    if frozen:
        layer = {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "filename": str(frozen)}}
        disk["backing"] = {**layer, "backing": disk["backing"]}
    fast = start.drivers is Drivers.VIRTIO
    device = "virtio-blk-pci,drive=disk" if fast else "ide-hd,drive=disk,bus=ide.0"  # the AHCI of the board
    return [*_blockdev(**disk), "-device", f"{device},bootindex=1,werror=enospc,rerror=report", *cd]


def _driver(image: Format) -> str:
    return {Format.VDI: "vdi", Format.VMDK: "vmdk", Format.RAW: "raw"}.get(image, "qcow2")


def _devices(start: VmStart, paths: Paths, frozen: Frozen | None) -> list[str]:
    devices = ["-device", _VIDEO[start.video], "-device", "virtio-balloon-pci", "-device", "vmgenid,guid=auto"]
    if start.os is Os.OTHER:
        return devices  # PS/2 keyboard and the VMware mouse port are on the board, and say where the pointer is
    making = frozen is not None and frozen.disk is None
    # Windows has no driver of its own for a virtio pointer, whatever was installed for disk and network.
    virtio = start.os is Os.LINUX and start.drivers is Drivers.VIRTIO
    tablet = "virtio-tablet-pci" if virtio else "usb-tablet,bus=usb.0"
    return [
        *devices,
        *(["-device", "virtio-keyboard-pci"] if virtio else ["-device", "qemu-xhci,id=usb"]),
        "-device",
        tablet,
        "-device",
        "virtio-rng-pci",
        "-device",
        "virtio-serial-pci",
        "-chardev",
        f"socket,id=qga,path={plain(paths.guest_agent)},server=on,wait=off",
        "-device",
        "virtserialport,chardev=qga,name=org.qemu.guest_agent.0",
        # While it is there, qemu saves no state.
        *(["-chardev", "qemu-vdagent,id=vdagent,name=vdagent,clipboard=on,mouse=off"] if not making else []),
        *(_option(CLIPBOARD) if frozen is None else []),
    ]


Device = dict[str, str]
"""A device by its properties, as QMP's device_add takes them and as the command line does."""

CLIPBOARD: Device = {"driver": "virtserialport", "chardev": "vdagent", "name": "com.redhat.spice.0"}


def _option(device: Device) -> list[str]:
    driver, *properties = (value if key == "driver" else f"{key}={value}" for key, value in device.items())
    return ["-device", ",".join([driver, *properties])]


def card(start: VmStart) -> Device:
    """A guest's network card."""
    driver = "virtio-net-pci" if start.drivers is Drivers.VIRTIO else "e1000e"
    # No option ROM: nobody boots from the network, and loading it costs boot time.
    return {"driver": driver, "netdev": "net", "mac": mac_of(start.sid), "romfile": ""}


def volume(mount: Mount, number: int) -> Device:
    """The device by which a guest sees a volume."""
    if mount.volume.kind is Kind.NINE_P:
        return {"driver": "virtio-9p-pci", "fsdev": f"fs{number}", "mount_tag": mount.volume.tag}
    return {"driver": "vhost-user-fs-pci", "chardev": f"fs{number}", "tag": mount.volume.tag}


def _network(start: VmStart, network_fd: int | None, *, tap: bool, plugged: bool) -> list[str]:
    if network_fd is None:
        return []
    stream = f"stream,id=net,server=off,addr.type=fd,addr.str={network_fd}"
    netdev = f"tap,id=net,fd={network_fd}" if tap else stream
    return ["-netdev", netdev, *(_option(card(start)) if plugged else [])]


def _volumes(paths: Paths, mounts: Sequence[Mount], *, plugged: bool) -> list[str]:
    if not mounts:
        return []
    arguments = ["-fw_cfg", f"name=opt/deskfleet/mounts,string={told(mounts).replace(',', ',,')}"] if plugged else []
    for number, mount in enumerate(mounts):
        if mount.volume.kind is Kind.NINE_P:
            # Modes and owners as they are, for a guest that can change none of them.
            local = f"local,id=fs{number},path={plain(mount.path)},security_model=none,multidevs=remap,readonly=on"
            arguments += ["-fsdev", local]
        else:
            arguments += ["-chardev", f"socket,id=fs{number},path={plain(paths.share(mount.volume.tag))}"]
        arguments += _option(volume(mount, number)) if plugged else []
    return arguments


def _gpus(start: VmStart, roms: Mapping[str, str]) -> list[str]:
    """Every function of the group behind one root port, as on the card that they came from.

    Never the first display (x-vga): people see the virtual one, and the card computes.
    """
    if not start.gpu_addresses:
        return []
    arguments = ["-device", "pcie-root-port,id=gpu,chassis=1"]
    for number, address in enumerate(start.gpu_addresses):
        first = ",multifunction=on" if number == 0 else ""
        rom = roms.get(address)
        last = "" if rom is None else f",romfile={plain(Path(rom))}" if rom else ",rombar=0"
        arguments += ["-device", f"{_VFIO}{address},bus=gpu,addr=0x0.0x{number:x}{first}{last}"]
    return arguments


def gpus_of(line: Iterable[str]) -> set[str]:
    """The PCI functions that a qemu command line takes; none for any other program's."""
    words = [word for word in line if word.startswith(_VFIO)]
    return {word.removeprefix(_VFIO).partition(",")[0] for word in words}


def passt(fd: int, binary: str = "passt") -> list[str]:
    """passt's argument list: user-mode network for one guest on the connected socket `fd`, no port forwarded.

    --no-map-gw keeps the gateway's address from standing for the host's loopback. That is not all: passt (2023)
    still carries a packet sent to 127.0.0.1 to the host's own loopback; the guard of guard.py stops those.
    """
    return [binary, "-f", "-q", "-F", str(fd), "--no-map-gw", "-t", "none", "-u", "none"]
