"""A disk that UEFI starts from: one program that paints the whole screen in one colour and stays.

Compiled here; its PE header (Microsoft, PE Format) is written by hand, and qemu's own FAT writer makes the disk.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

COLOUR = (79, 90, 255)
"""Red, green and blue of what it paints."""

# Offsets of the UEFI specification: boot services at 96 of the system table, LocateProtocol at 24 + 37 * 8 of those;
# of the graphics output protocol Blt at 16 and the mode at 24.
_SOURCE = """
typedef unsigned long long u64;
typedef unsigned int u32;
#define EFI __attribute__((ms_abi))
typedef u64 EFI (*locate_t)(const void *, void *, void **);
typedef u64 EFI (*blt_t)(void *, const void *, u32, u64, u64, u64, u64, u64, u64, u64);
static const unsigned char gop_id[16] = {0xde, 0xa9, 0x42, 0x90, 0xdc, 0x23, 0x38, 0x4a,
                                         0x96, 0xfb, 0x7a, 0xde, 0xd0, 0x80, 0x51, 0x6a};
static const unsigned char pixel[4] = {%d, %d, %d, 0};
#define AT(type, base, offset) (*(type *)((char *)(base) + (offset)))
__attribute__((section(".text.start"))) EFI u64 start(void *image, void *system) {
    void *gop, *info;
    (void)image;
    if (AT(locate_t, AT(void *, system, 96), 24 + 37 * 8)(gop_id, 0, &gop) == 0) {
        info = AT(void *, AT(void *, gop, 24), 8);
        AT(blt_t, gop, 16)(gop, pixel, 0, 0, 0, 0, 0, AT(u32, info, 4), AT(u32, info, 8), 0);
    }
    for (;;) __asm__("pause");
}
"""
_SCRIPT = "SECTIONS { . = 0x1000; .all : { *(.text.start) *(.text*) *(.rodata*) *(.data*) } /DISCARD/ : { *(*) } }"
_PAGE = 0x1000


def _pe(code: bytes) -> bytes:
    """An EFI application for x86-64 of one section, which needs no relocation."""
    size = -(-len(code) // _PAGE) * _PAGE
    coff = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, 1, 0, 0, 0, 240, 0x0022)
    optional = struct.pack("<HBBIIIII", 0x20B, 0, 0, size, 0, 0, _PAGE, _PAGE)
    optional += struct.pack("<QIIHHHHHHIIIIHH", 0, _PAGE, 512, 0, 0, 0, 0, 0, 0, 0, _PAGE + size, 512, 0, 10, 0)
    optional += struct.pack("<QQQQII", 0, 0, 0, 0, 0, 16) + bytes(16 * 8)
    section = struct.pack("<8sIIIIIIHHI", b".all", size, _PAGE, size, 512, 0, 0, 0, 0, 0xE0000020)
    head = b"MZ" + bytes(58) + struct.pack("<I", 64) + coff + optional + section
    return head.ljust(512, b"\0") + code.ljust(size, b"\0")


def painter(folder: Path, disk: Path) -> None:
    """Write the disk, raw, with `folder` for what comes between."""
    red, green, blue = COLOUR
    (folder / "painter.c").write_text(_SOURCE % (blue, green, red))
    (folder / "painter.ld").write_text(_SCRIPT)
    gcc = ["gcc", "-Os", "-ffreestanding", "-fpie", "-mno-red-zone", "-fno-stack-protector", "-fcf-protection=none"]
    subprocess.run([*gcc, "-fno-asynchronous-unwind-tables", "-c", "painter.c"], check=True, cwd=folder)
    subprocess.run(
        ["ld", "--no-warn-rwx-segments", "-T", "painter.ld", "-e", "start", "-o", "painter.elf", "painter.o"],
        check=True,
        cwd=folder,
    )
    subprocess.run(["objcopy", "-O", "binary", "painter.elf", "painter.bin"], check=True, cwd=folder)
    boot = folder / "esp/EFI/BOOT"
    boot.mkdir(parents=True)
    (boot / "BOOTX64.EFI").write_bytes(_pe((folder / "painter.bin").read_bytes()))
    subprocess.run(["qemu-img", "convert", "-O", "raw", f"fat:{folder}/esp", str(disk)], check=True)
