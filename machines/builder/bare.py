"""The builder of guests without an operating system: C and assembler sources to a BIOS-bootable ISO."""

from __future__ import annotations

import os
from pathlib import Path

from machines.builder.recipe import Recipe, settings
from machines.builder.system import System

TOOLS = {"gcc": "gcc", "ld": "binutils", "objcopy": "binutils", "xorriso": "xorriso"}
SPACE_MIB = 16

COMPILE = [
    *("gcc", "-m32", "-march=i586", "-std=c11", "-Os", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-pic"),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-tree-loop-distribute-patterns", "-c"),
]
PROGRAM_BYTES = 16384
"""What boot.S loads and the linker script allows."""

ISO_BYTES = 1 << 20
"""Below one BIOS cylinder (504 KiB) SeaBIOS refuses to start the file as a hard disk."""

EPOCH = 1700000000
"""One fixed date, so that the same sources and tools give the same bytes, and so the same digest, on every host."""


def build(recipe: Recipe, work: Path, system: System) -> Path:
    """Compile *.c and *.S of the sources, link by link.ld, and write an ISO that starts from a CD and as a disk."""
    settings(recipe, {})
    system.need_space(work, SPACE_MIB)
    system.need_tools(TOOLS)
    system.step("compile")
    objects = []
    for source in sorted([*recipe.sources.glob("*.S"), *recipe.sources.glob("*.c")]):
        objects.append(str(work / f"{source.stem}.o"))
        system.run([*COMPILE, "-o", objects[-1], str(source)])
    script = str(recipe.sources / "link.ld")
    elf, tree, iso = work / "guest.elf", work / "tree", work / "guest.iso"
    link = ["ld", "-m", "elf_i386", "-z", "noexecstack", "--no-warn-rwx-segments", "-T", script]
    system.run([*link, "-o", str(elf), *objects])
    tree.mkdir()
    program = tree / "guest.bin"
    system.run(["objcopy", "-O", "binary", "-j", ".image", str(elf), str(program)])
    os.truncate(program, PROGRAM_BYTES)
    for path in (program, tree):
        os.utime(path, (EPOCH, EPOCH))
    system.step("write the ISO")
    medium = ["-V", recipe.name.upper()[:32], "-G", str(program), "-b", program.name, "-no-emul-boot"]
    loading = ["-boot-load-size", str(PROGRAM_BYTES // 512), "-o", str(iso), str(tree)]
    system.run(["xorriso", "-as", "mkisofs", "-quiet", *medium, *loading], {"SOURCE_DATE_EPOCH": str(EPOCH)})
    os.truncate(iso, ISO_BYTES)
    return iso
