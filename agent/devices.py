"""What this host lends to guests: KVM, the VFIO groups of their GPUs with the ROMs of those, and huge pages.

Guests run as user ids that own nothing. KVM's device is opened by its group, which their qemu gets as its only
supplementary one. A VFIO group belongs to the guest that holds it for as long as it runs, and to root before and
after (kernel documentation, driver-api/vfio: whoever may open /dev/vfio/N drives every device of group N).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

#: MiB in a huge page of x86-64, whatever larger ones there are besides.
HUGE_PAGE_MIB = 2
HUGE_PAGES = Path("kernel/mm/hugepages/hugepages-2048kB")


def kvm_groups(dev: Path = Path("/dev")) -> tuple[int, ...]:
    """The group that may open /dev/kvm, () when there is no such device or its group may not."""
    try:
        found = (dev / "kvm").stat()
    except OSError:
        return ()
    opens = stat.S_IRGRP | stat.S_IWGRP
    return (found.st_gid,) if found.st_mode & opens == opens else ()


def vfio_nodes(addresses: Iterable[str], sysfs: Path = Path("/sys"), dev: Path = Path("/dev")) -> tuple[Path, ...]:
    """The device nodes of the VFIO groups of these PCI functions.

    Raises:
        OSError: a function has no IOMMU group, or is gone.
    """
    groups = {(sysfs / "bus/pci/devices" / address / "iommu_group").readlink().name for address in addresses}
    return tuple(dev / "vfio" / group for group in sorted(groups))


def roms(addresses: Iterable[str], settings: Mapping[str, str], sysfs: Path = Path("/sys")) -> dict[str, str]:
    """The ROM file that each of these functions is to have, "" for none at all; only those that the settings name, by
    address or by vendor:device.

    Raises:
        OSError: a file is missing, can't be read by everybody (guests' qemu must), or is no expansion ROM.
    """
    found = {}
    for address in addresses:
        device = sysfs / "bus/pci/devices" / address
        ids = ":".join((device / name).read_text().strip().removeprefix("0x") for name in ("vendor", "device"))
        rom = settings.get(address, settings.get(ids))
        if rom:
            with Path(rom).open("rb") as file:
                if not os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                    raise OSError(errno.EACCES, "not readable by everybody", rom)
                if file.read(2) != b"\x55\xaa":  # PCI Firmware Specification 3.0, 5.1.1
                    raise OSError(errno.ENOEXEC, "not an expansion ROM", rom)
        if rom is not None:
            found[address] = rom
    return found


def free_huge_pages(sysfs: Path = Path("/sys")) -> int:
    """How many huge pages are neither used nor promised (kernel: admin-guide/mm/hugetlbpage); 0 when there are none."""
    try:
        free, reserved = (int((sysfs / HUGE_PAGES / f"{name}_hugepages").read_text()) for name in ("free", "resv"))
    except (OSError, ValueError):
        return 0
    return max(0, free - reserved)


def lend(nodes: Iterable[Path], uid: int) -> None:
    """Let a guest's user drive these VFIO groups.

    Raises:
        OSError: a node is missing, or another guest has it (EBUSY).
    """
    nodes = tuple(nodes)
    for node in nodes:
        if node.stat().st_uid not in (0, uid):
            raise OSError(errno.EBUSY, "lent to another guest", str(node))
    for node in nodes:
        os.chown(node, uid, 0)


def take_back(uids: Container[int], dev: Path = Path("/dev")) -> None:
    """These users drive no VFIO group any more. Whose guests they were need not be remembered: the nodes tell."""
    folder = dev / "vfio"
    for node in folder.iterdir() if folder.is_dir() else ():
        if node.stat().st_uid in uids:
            os.chown(node, 0, 0)
