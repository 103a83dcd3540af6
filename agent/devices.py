"""The devices of this host that guests are lent: KVM, and the VFIO groups of their GPUs.

Guests run as user ids that own nothing. KVM's device is opened by its group, which their qemu gets as its only
supplementary one. A VFIO group belongs to the guest that holds it for as long as it runs, and to root before and
after (kernel documentation, driver-api/vfio: whoever may open /dev/vfio/N drives every device of group N).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Container, Iterable
from pathlib import Path


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
