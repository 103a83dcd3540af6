"""GPUs from sysfs: what there is, by IOMMU group, and whether a whole group may be given to a guest.

sysfs facts (kernel documentation, ABI/testing/sysfs-bus-pci): `class` 0x03xxxx is a display controller, `driver` and
`iommu_group` are links; functions of one group can't be separated. `reset` is there when the kernel can reset the
function by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from deskfleet.schemas.host import Gpu
from deskfleet.schemas.messages import PCI_ADDRESS

_DISPLAY = "0x03"
_BRIDGE = "0x0604"
_VFIO = "vfio-pci"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def driver_of(device: Path) -> str:
    """The name of the driver that a function is bound to; empty when there is none."""
    link = device / "driver"
    return link.readlink().name if link.is_symlink() else ""


def _model(device: Path) -> str:
    label = _read(device / "label")
    vendor, product = _read(device / "vendor"), _read(device / "device")
    return label or f"{vendor.removeprefix('0x')}:{product.removeprefix('0x')}"


def resettable(device: Path, group: Iterable[str]) -> bool:
    """Whether what a guest left in a function can be cleared away.

    Either the kernel resets the function by itself, or vfio-pci resets the bus below the bridge that it sits on, which
    it does whenever a guest takes or leaves the last function there, if nobody else has a function on that bus
    (kernel: vfio_pci_dev_set_resettable). The latter is the way of most graphics cards with an audio function.
    """
    if (device / "reset").exists():
        return True
    bus = device.name.rpartition(":")[0]
    neighbours = {other.name for other in device.parent.iterdir() if other.name.rpartition(":")[0] == bus}
    return bool(PCI_ADDRESS.fullmatch(device.resolve().parent.name)) and neighbours <= set(group)


def find_gpus(root: Path = Path("/sys"), names: dict[str, str] | None = None) -> tuple[Gpu, ...]:
    """Every GPU under `root` that stands in an IOMMU group; one entry a group.

    `names` gives models to vendor:device ids, so that a request can say "A100". A GPU is offered only when every
    function of its group (bridges aside) is bound to vfio-pci, as giving part of a group would give the rest with it,
    and when it can be reset, as else the next guest would find what this one left in it.
    """
    devices = root / "bus/pci/devices"
    groups: dict[int, list[Path]] = {}
    for device in sorted(devices.iterdir()) if devices.is_dir() else []:
        group = device / "iommu_group"
        if PCI_ADDRESS.fullmatch(device.name) and group.is_symlink():
            groups.setdefault(int(group.readlink().name), []).append(device)
    found = []
    for number, members in sorted(groups.items()):
        displays = [member for member in members if _read(member / "class").startswith(_DISPLAY)]
        if displays:
            found.append(_gpu(number, displays, members, names or {}))
    return tuple(found)


def _gpu(number: int, displays: list[Path], members: Sequence[Path], names: dict[str, str]) -> Gpu:
    functions = [member for member in members if not _read(member / "class").startswith(_BRIDGE)]
    foreign = [f"{f.name} has driver {driver_of(f) or 'none'}" for f in functions if driver_of(f) != _VFIO]
    slots = {function.name[:-2] for function in functions}
    problem = ""
    if foreign:
        problem = "not bound to vfio-pci: " + ", ".join(foreign)
    elif len(displays) > 1:
        problem = f"{len(displays)} GPUs share IOMMU group {number}"
    elif len(slots) > 1:
        problem = f"IOMMU group {number} also holds {', '.join(sorted(slots - {displays[0].name[:-2]}))}"
    elif fixed := [f.name for f in functions if not resettable(f, [member.name for member in members])]:
        problem = f"no way to reset {', '.join(fixed)}, so the next guest would find what this one left"
    model = _model(displays[0])
    return Gpu(
        address=displays[0].name,
        model=names.get(model, model),
        group=number,
        functions=tuple(function.name for function in functions),
        offered=not problem,
        problem=problem[:400],
    )
