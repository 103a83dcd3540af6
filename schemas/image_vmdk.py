"""The header of a VMDK (VMware, Virtual Disk Format 5.0). Only kinds that are one file get past it."""

from __future__ import annotations

import re

from deskfleet.schemas.image_facts import (
    SECTOR,
    Facts,
    Fault,
    ImageRefused,
    Read,
    damaged,
    inside,
    shown,
    unpack,
    unsupported,
)
from deskfleet.schemas.machine import Format

_TEXT_BYTES = 20 * SECTOR
_LONGEST_TEXT = 65_536
_AT_END = 0xFFFF_FFFF_FFFF_FFFF
_REDUNDANT = 1 << 1
_ALONE = ("monolithicSparse", "streamOptimized")
_CREATE_TYPE = re.compile(rb'^[ \t]*createType[ \t]*=[ \t]*"([^"\n]*)"', re.MULTILINE | re.IGNORECASE)
_PARENT = re.compile(rb"^[ \t]*parentCID[ \t]*=[ \t]*([0-9a-f]+)", re.MULTILINE | re.IGNORECASE)
_EXTENT = re.compile(
    rb'^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+[0-9]+[ \t]+([A-Z0-9]+)[ \t]*"?([^"\n]*)"?', re.MULTILINE | re.IGNORECASE
)


def read_vmdk(read: Read, size: int) -> Facts:
    """The facts of a VMDK; it is refused at once when it is not one whole file."""
    head = read(0, SECTOR)
    if head[:4] != b"KDMV":
        raise unsupported("a VMDK of ESX Server (COWD)")
    version, flags, capacity, grain, text_at, text_sectors = unpack("<4xIIQQQQ", head)
    if not 1 <= version <= 3:
        raise unsupported(f"VMDK version {version}")
    if capacity == 0 or text_at == 0 or text_sectors == 0:
        # With no capacity qemu takes the text for a list of files, and opens them.
        raise ImageRefused(Fault.EXTENT, "It is one piece of a disk in several files; convert the disk to one file.")
    if text_at != 1 or text_sectors * SECTOR > _LONGEST_TEXT:
        raise unsupported("a VMDK whose description is not behind its header")
    create_type, extents, parent, encrypted = _vmdk_text(read(SECTOR, max(_TEXT_BYTES, text_sectors * SECTOR)))
    facts = Facts(
        Format.VMDK,
        min(capacity, 1 << 60) * SECTOR,
        backing_file=parent,
        encrypted=encrypted,
        create_type=create_type,
        extents=extents,
    )
    if not parent and not encrypted:
        _vmdk_tables(read, size, head, flags, (capacity, grain))
    return facts


def _vmdk_text(text: bytes) -> tuple[str, tuple[str, ...], str, bool]:
    """Create type, extents, parent and whether it is encrypted.

    qemu looks for some words anywhere in these bytes, comments too; so do we.
    """
    everything = text.lower()
    types, extents, parents = _CREATE_TYPE.findall(text), _EXTENT.findall(text), _PARENT.findall(text)
    names = tuple(shown(name) for _, name in extents)
    kind = types[0].decode("ascii", "replace") if types else ""
    if everything.count(b"createtype") != 1 or kind not in _ALONE:
        found, only = shown(types[0]) if types else "none", " and ".join(_ALONE)
        raise ImageRefused(Fault.EXTENT, f"Its VMDK kind is {found}; only {only} are one file. Convert it.")
    if len(extents) != 1 or extents[0][0].upper() != b"SPARSE" or re.search(rb"[/\\:]", extents[0][1]):
        raise ImageRefused(Fault.EXTENT, f"It names other files: {', '.join(names) or 'none'}. Convert it to one file.")
    if b"parentfilenamehint" in everything or [p.lower() for p in parents] != [b"ffffffff"]:
        return kind, names, "a parent VMDK", False
    return kind, names, "", b"encryption.keysafe" in everything or b"encryptionkeys" in everything


def _vmdk_tables(read: Read, size: int, head: bytes, flags: int, shape: tuple[int, int]) -> None:
    """The grain directories lie within the file; of a stream, its footer (the last but one sector) counts."""
    per_table, redundant_at, directory_at, overhead = unpack("<IQQQ", head[44:])
    capacity, grain = shape
    if not 1 <= per_table <= 512 or not 1 <= grain <= 1 << 21 or grain & (grain - 1):
        raise damaged("impossible grains")
    if directory_at == _AT_END:
        footer = read(size - 2 * SECTOR, SECTOR) if size >= 4 * SECTOR else b""
        if footer[:4] != b"KDMV":
            raise ImageRefused(Fault.TRUNCATED, "The file ends before its footer.")
        if footer[12:28] != head[12:28] or footer[44:48] != head[44:48]:
            raise damaged("header and footer differ")
        redundant_at, directory_at = unpack("<QQ", footer[48:])
    tables = -(-capacity // (grain * per_table))
    inside(overhead * SECTOR, size, "its first grain")
    inside(directory_at * SECTOR + 4 * tables, size, "its grain directory")
    if flags & _REDUNDANT:
        inside(redundant_at * SECTOR + 4 * tables, size, "its second grain directory")
