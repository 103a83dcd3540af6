"""A made-up machine's PCI devices: the part of sysfs and of /dev/vfio that GPUs are found by."""

from __future__ import annotations

from pathlib import Path

VGA, AUDIO, NIC, BRIDGE = "0x030000", "0x040300", "0x020000", "0x060400"
CARD = ("0000:01:00.0", "0000:01:00.1")


class Pci:
    """Below `root`: sys, as the kernel shows it, and dev."""

    def __init__(self, root: Path) -> None:
        self.sys = root / "sys"
        self.dev = root / "dev"
        (self.sys / "bus/pci/devices").mkdir(parents=True)
        (self.dev / "vfio").mkdir(parents=True)

    def add(
        self,
        address: str,
        kind: str,
        group: int | None,
        driver: str = "vfio-pci",
        ids: str = "10de:20b0",
        *,
        bridge: str = "0000:00:01.0",
        reset: bool = True,
    ) -> None:
        """A function below `bridge` (on the root bus when empty); `reset`: the kernel can reset it by itself."""
        folder = self.sys / "devices/pci0000:00" / bridge / address
        folder.mkdir(parents=True)
        vendor, product = ids.split(":")
        (folder / "class").write_text(f"{kind}\n")
        (folder / "vendor").write_text(f"0x{vendor}\n")
        (folder / "device").write_text(f"0x{product}\n")
        (folder / "config").write_bytes(int(vendor, 16).to_bytes(2, "little") + bytes(62))
        if reset:
            (folder / "reset").write_text("")
        if group is not None:
            (self.sys / f"kernel/iommu_groups/{group}").mkdir(parents=True, exist_ok=True)
            (folder / "iommu_group").symlink_to(self.sys / f"kernel/iommu_groups/{group}")
            (self.dev / f"vfio/{group}").touch()
        if driver:
            self.bind(address, driver, folder)
        (self.sys / "bus/pci/devices" / address).symlink_to(folder)

    def card(self, group: int = 7, *, reset: bool = True) -> None:
        """A graphics card with its audio function, all on vfio-pci, below a root port of the same group."""
        self.add("0000:00:01.0", BRIDGE, group, "pcieport", "8086:1901", bridge="")
        self.add(CARD[0], VGA, group, reset=reset)
        self.add(CARD[1], AUDIO, group, ids="10de:1aef", reset=reset)

    def bind(self, address: str, driver: str, folder: Path | None = None) -> None:
        """Bind a function to a driver; to none when that is empty."""
        link = (folder or self.function(address)) / "driver"
        link.unlink(missing_ok=True)
        if driver:
            (self.sys / f"bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
            link.symlink_to(self.sys / f"bus/pci/drivers/{driver}")

    def function(self, address: str) -> Path:
        """The folder of a function."""
        return (self.sys / "bus/pci/devices" / address).resolve()

    def remove(self, address: str) -> None:
        """Let a function fall off its bus."""
        (self.sys / "bus/pci/devices" / address).unlink()
