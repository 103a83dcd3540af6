"""The command lines of a guest's programs, as a pure function of what was ordered. No shell ever sees them.

No value that a person typed reaches these lists: sizes are numbers, names are ids of ours, PCI addresses and paths
are checked by pattern before they come here. Block devices are JSON and commas in other paths are doubled, so nothing
in a path can become an option.

The device list depends on machine, size and volumes alone, because a guest can only be restored from saved memory with
the very devices that it was saved with. Facts about qemu 7.2 behind the choices:
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
from deskfleet.agent.volumes import Kind, Mount, told
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


def uuid_of(sid: str) -> str:
    """A session's id as the UUID on its qemu's command line; a process is only ever killed after it matched."""
    return str(UUID(sid))


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
    binary: str = "qemu-system-x86_64",
) -> list[str]:
    """qemu's argument list. `network_fd` is qemu's end of the socket pair to passt, or a tap device's; None for no
    network. `huge` takes the memory from huge pages; `roms` are files for functions of the GPU, by address, and ""
    hides a function's own."""
    want = start.resources
    shared = any(mount.volume.kind is Kind.VIRTIOFS for mount in mounts)
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
        "-smp",
        f"cpus={want.cpus}",
        *_memory(want.memory_mib, huge=huge, shared=shared),
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
        f"name=opt/deskfleet/hostname,string=desk-{start.sid[:8]}",
        *_firmware(start, paths),
        *_disks(start, paths),
        *_devices(start, paths),
        *_network(start, network_fd, tap=tap),
        *_volumes(paths, mounts),
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


def _memory(wanted: int, *, huge: bool, shared: bool) -> list[str]:
    # Pages of a memfd are promised when it is mapped, so a guest that lacks some fails at its start and never later.
    kind = "memory-backend-memfd" if huge or shared else "memory-backend-ram"
    if huge:
        kind += f",hugetlb=on,hugetlbsize={HUGE_PAGE_MIB}M"
    if shared:
        kind += ",share=on"
    size = memory_mib(wanted, huge=huge)
    return ["-m", f"size={size}M", "-object", f"{kind},id=ram,size={size}M"]


def _blockdev(**options: object) -> list[str]:
    return ["-blockdev", json.dumps(options, separators=(",", ":"))]


def _firmware(start: VmStart, paths: Paths) -> list[str]:
    if start.firmware is Firmware.BIOS:
        return []
    pflash = "if=pflash,format=raw,unit="
    return ["-drive", f"{pflash}0,readonly=on,file={OVMF_CODE}", "-drive", f"{pflash}1,file={plain(paths.vars)}"]


def _disks(start: VmStart, paths: Paths) -> list[str]:
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
    fast = start.drivers is Drivers.VIRTIO
    device = "virtio-blk-pci,drive=disk" if fast else "ide-hd,drive=disk,bus=ide.0"  # the AHCI of the board
    return [*_blockdev(**disk), "-device", f"{device},bootindex=1,werror=enospc,rerror=report", *cd]


def _driver(image: Format) -> str:
    return {Format.VDI: "vdi", Format.VMDK: "vmdk", Format.RAW: "raw"}.get(image, "qcow2")


def _devices(start: VmStart, paths: Paths) -> list[str]:
    devices = ["-device", _VIDEO[start.video], "-device", "virtio-balloon-pci", "-device", "vmgenid,guid=auto"]
    if start.os is Os.OTHER:
        return devices  # PS/2 keyboard and the VMware mouse port are on the board, and say where the pointer is
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
        "-chardev",
        "qemu-vdagent,id=vdagent,name=vdagent,clipboard=on,mouse=off",
        "-device",
        "virtserialport,chardev=vdagent,name=com.redhat.spice.0",
    ]


def _network(start: VmStart, network_fd: int | None, *, tap: bool) -> list[str]:
    if network_fd is None:
        return []
    stream = f"stream,id=net,server=off,addr.type=fd,addr.str={network_fd}"
    card = "virtio-net-pci" if start.drivers is Drivers.VIRTIO else "e1000e"
    return [
        "-netdev",
        f"tap,id=net,fd={network_fd}" if tap else stream,
        "-device",
        # No option ROM: nobody boots from the network, and loading it costs boot time.
        f"{card},netdev=net,mac={mac_of(start.sid)},romfile=",
    ]


def _volumes(paths: Paths, mounts: Sequence[Mount]) -> list[str]:
    if not mounts:
        return []
    arguments = ["-fw_cfg", f"name=opt/deskfleet/mounts,string={told(mounts).replace(',', ',,')}"]
    for number, mount in enumerate(mounts):
        tag = mount.volume.tag
        if mount.volume.kind is Kind.NINE_P:
            # Modes and owners as they are, for a guest that can change none of them.
            local = f"local,id=fs{number},path={plain(mount.path)},security_model=none,multidevs=remap,readonly=on"
            arguments += ["-fsdev", local, "-device", f"virtio-9p-pci,fsdev=fs{number},mount_tag={tag}"]
        else:
            arguments += ["-chardev", f"socket,id=fs{number},path={plain(paths.share(tag))}"]
            arguments += ["-device", f"vhost-user-fs-pci,chardev=fs{number},tag={tag}"]
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
