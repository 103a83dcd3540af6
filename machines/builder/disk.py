"""A BIOS-bootable disk image from a folder, without loop mounts, without grub-install and without root."""

from __future__ import annotations

import os
from pathlib import Path

from machines.builder.system import System

TOOLS = {
    "sfdisk": "fdisk",
    "mke2fs": "e2fsprogs",
    "grub-mkimage": "grub-common",
    "/usr/lib/grub/i386-pc/boot.img": "grub-pc-bin",
    "qemu-img": "qemu-utils",
}
GRUB = Path("/usr/lib/grub/i386-pc")
GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux", "normal", "configfile")
SECTOR = 512
FIRST_SECTOR = 2048
"""Where the partition begins; GRUB's core image lies between the boot sector and it."""

GRUB_CONFIG = """\
set timeout=0
linux /boot/vmlinuz root=UUID={uuid} rw {options}
initrd /boot/initrd.img
boot
"""


def write(root: Path, work: Path, mib: int, uuid: str, options: str, system: System) -> Path:
    """Write the tree `root` to a qcow2 of `mib` MiB and return its path; `options` go to the kernel.

    Sector 0 holds GRUB's boot.img and the partition table, sector 1 and on GRUB's core, MiB 1 and on an ext4.
    """
    raw, core, image = work / "disk.raw", work / "core.img", work / "disk.qcow2"
    grub = root / "boot/grub"
    grub.mkdir(parents=True, exist_ok=True)
    (grub / "grub.cfg").write_text(GRUB_CONFIG.format(uuid=uuid, options=options), encoding="utf-8")
    with raw.open("wb") as file:
        file.truncate(mib << 20)
    script = work / "partitions"
    script.write_text(f"label: dos\nstart={FIRST_SECTOR}, type=83, bootable\n", encoding="utf-8")
    system.run(["sh", "-c", 'exec sfdisk -q "$1" < "$2"', "sh", str(raw), str(script)])
    offset = f"offset={FIRST_SECTOR * SECTOR},root_owner=0:0"
    options_ext4 = ["-t", "ext4", "-J", "size=16", "-m", "0", "-U", uuid, "-L", "root", "-E", offset]
    system.run(["mke2fs", "-q", *options_ext4, "-d", str(root), str(raw), f"{mib - 1}M"], as_root=True)
    make_core = ["grub-mkimage", "-O", "i386-pc", "-p", "(hd0,msdos1)/boot/grub", "-o", str(core)]
    system.run([*make_core, *GRUB_MODULES])
    with raw.open("r+b") as file:
        file.write((GRUB / "boot.img").read_bytes()[:440])  # its default for the core's place is sector 1
        file.seek(SECTOR)
        file.write(core.read_bytes())
        file.flush()
        os.fsync(file.fileno())
    system.step("compress")
    compressed = ["-O", "qcow2", "-o", "compression_type=zstd", "-c", "-m", "4"]
    system.run(["qemu-img", "convert", "-f", "raw", *compressed, str(raw), str(image)])
    return image
