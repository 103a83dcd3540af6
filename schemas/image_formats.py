"""What a disk image says of itself, read from its header by our own code: bytes in, facts or a refusal out.

A second reader beside qemu's is worth its lines: qemu follows what a header names (a backing file, a data file, the
extents of a VMDK, for which see image_vmdk.py), so a header must be known to be harmless before qemu sees it. Nothing
here opens a file or loops over more than a few kilobytes; whatever the bytes are, the answer is `Facts` or
`ImageRefused`.

Sources, all public: QCOW2: QEMU, docs/interop/qcow2.txt. VDI: VirtualBox, VDICore.h. ISO 9660: ECMA-119. LUKS: LUKS1
and LUKS2 On-Disk Format. VHD, VHDX: Microsoft's specifications.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

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
from deskfleet.schemas.image_vmdk import read_vmdk
from deskfleet.schemas.machine import Format

LARGEST = 2 << 40
"""Default limit of a virtual size, in bytes."""

MOST_SNAPSHOTS = 256
_HEAD = 65_536
_NAMES = {
    "qcow2": "a QCOW2 image",
    "vdi": "a VDI image",
    "vmdk": "a VMDK image",
    "vmdk-text": "a VMDK descriptor, a text that points to other files",
    "iso": "an ISO 9660 image",
    "luks": "an encrypted LUKS volume",
    "qcow": "a QCOW image of version 1",
    "qed": "a QED image",
    "vhd": "a VHD image",
    "vhdx": "a VHDX image",
    "parallels": "a Parallels image",
    "bochs": "a Bochs image",
    "cloop": "a cloop image",
    "dmg": "a DMG image",
    "tar": "a tar archive (an OVA is one)",
    "compressed": "a compressed file",
    "": "of no format that is known here",
}
_MAGICS = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"QED\0", "qed"),
    (0, b"conectix", "vhd"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop"),
    (257, b"ustar", "tar"),
    (0, b"\x1f\x8b\x08", "compressed"),
    (0, b"\xfd7zXZ\0", "compressed"),
    (0, b"\x28\xb5\x2f\xfd", "compressed"),
    (0, b"BZh", "compressed"),
    (0, b"PK\3\4", "compressed"),
    (0, b"7z\xbc\xaf\x27\x1c", "compressed"),
)
# As qemu recognises one: comments and empty lines, then the version.
_DESCRIPTOR = re.compile(rb"(?:#[^\n]*\n|[ \t]*\r?\n)*version=[0-9]")


def detect(read: Read, size: int) -> str:
    """What the content is: the value of a `Format`, another format's name, or nothing.

    Nothing is also the answer for a raw disk: raw has no header, so it can only be claimed, never recognised.
    """
    head = read(0, 2048)
    if head[:4] == b"QFI\xfb":
        return "qcow" if head[4:8] == b"\0\0\0\1" else "qcow2"
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    if _DESCRIPTOR.match(head) or head[:21].lower() == b"# disk descriptorfile":
        return "vmdk-text"
    if read(16 * 2048 + 1, 5) == b"CD001":
        return "iso"
    tail = read(max(0, size - SECTOR), SECTOR)
    return {b"conectix": "vhd", b"koly\0\0\0\4": "dmg"}.get(tail[:8], "")


def inspect(read: Read, size: int, claimed: Format, largest: int = LARGEST) -> Facts:
    """Read an image of `size` bytes that is claimed to be of a format.

    Raises:
        ImageRefused: it is not what is claimed, names other files, is damaged, encrypted or larger than `largest`.
    """
    if size == 0:
        raise ImageRefused(Fault.EMPTY, "The file is empty.")
    seen = detect(read, size)
    if seen == "luks":
        raise ImageRefused(Fault.ENCRYPTED, "It is an encrypted LUKS volume; only its owner can start it.")
    if seen == "vmdk-text":
        raise ImageRefused(Fault.EXTENT, f"It is {_NAMES[seen]}; convert the disk to one file.")
    # A CD image with a boot sector is a disk as well (isohybrid).
    raw = seen == "" or (seen == "iso" and read(510, 2) == b"\x55\xaa")
    if claimed.value != seen and not (claimed is Format.RAW and raw):
        raise ImageRefused(Fault.MISMATCH, f"It is claimed to be {claimed.value}, but the content is {_NAMES[seen]}.")
    facts = _READERS[claimed](read, size)
    _refuse_unsafe(facts, largest)
    return facts


def _refuse_unsafe(facts: Facts, largest: int) -> None:
    if facts.backing_file:
        text = f"It refers to another file, its backing file {facts.backing_file}; merge the two first (flatten it)."
        raise ImageRefused(Fault.BACKING_FILE, text)
    if facts.data_file:
        raise ImageRefused(Fault.DATA_FILE, f"Its data are in another file, {facts.data_file}; convert it to one file.")
    if facts.encrypted:
        raise ImageRefused(Fault.ENCRYPTED, "It is encrypted; decrypt it first.")
    if facts.virtual_size == 0:
        raise ImageRefused(Fault.EMPTY, "The disk in it has a size of 0.")
    if facts.virtual_size > largest:
        text = f"Its virtual size is {facts.virtual_size} bytes; at most {largest} ({largest >> 30} GiB) are allowed."
        raise ImageRefused(Fault.TOO_LARGE, text)
    if facts.snapshots > MOST_SNAPSHOTS:
        text = f"It holds {facts.snapshots} snapshots; at most {MOST_SNAPSHOTS} are allowed."
        raise ImageRefused(Fault.SNAPSHOTS, text)


# --- QCOW2 ------------------------------------------------------------------------------------------------------

_CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_KNOWN_FEATURES = 0b11111
_DATA_FILE_NAME = 0x44415441


def _qcow2(read: Read, size: int) -> Facts:
    head = read(0, _HEAD)
    version, backing, backing_length, cluster_bits, virtual, crypt = unpack(">4xIQIIQI", head)
    l1_entries, l1_at, refcounts_at, refcount_clusters, snapshots, snapshots_at = unpack(">IQQIIQ", head[36:])
    if version not in (2, 3):
        raise unsupported(f"QCOW2 version {version}")
    if not 9 <= cluster_bits <= 21:
        raise damaged(f"clusters of 2^{cluster_bits} bytes")
    cluster = 1 << cluster_bits
    features, length = 0, 72
    if version == 3:
        features, _, _, refcount_order, length = unpack(">QQQII", head[72:])
        if not 104 <= length <= cluster or length % 8 or refcount_order > 6:
            raise damaged("impossible lengths")
    if features & ~_KNOWN_FEATURES:
        raise unsupported(f"QCOW2 features {features & ~_KNOWN_FEATURES:#x}")
    if features & _CORRUPT:
        raise ImageRefused(Fault.DAMAGED, "It is marked as corrupt; repair it with qemu-img check -r.")
    if virtual % SECTOR or crypt > 2:
        raise damaged("an impossible size or encryption")
    named = _qcow2_data_file(head[: min(cluster, backing or cluster)], length)
    facts = Facts(
        Format.QCOW2,
        virtual,
        backing_file=shown(head[backing : backing + backing_length]) if backing else "",
        data_file=shown(named or b"") if named is not None or features & _DATA_FILE else "",
        encrypted=crypt != 0,
        snapshots=snapshots,
    )
    covered = cluster * (cluster // (16 if features & _EXTENDED_L2 else 8))
    if l1_entries < -(-virtual // covered) or l1_at % cluster or refcounts_at % cluster or not refcount_clusters:
        raise damaged("impossible tables")
    if not (facts.backing_file or facts.data_file or facts.encrypted):
        inside(l1_at + 8 * l1_entries, size, "its table of clusters")
        inside(refcounts_at + refcount_clusters * cluster, size, "its reference counts")
        inside(snapshots_at + 40 * snapshots if snapshots <= MOST_SNAPSHOTS else 0, size, "its snapshots")
    return facts


def _qcow2_data_file(area: bytes, offset: int) -> bytes | None:
    """The name in a data file extension; None when there is none."""
    while offset + 8 <= len(area):
        kind, length = struct.unpack_from(">II", area, offset)
        if kind == 0:
            break
        if offset + 8 + length > len(area):
            raise damaged("an extension leads out of it")
        if kind == _DATA_FILE_NAME:
            return area[offset + 8 : offset + 8 + length]
        offset += 8 + (length + 7) // 8 * 8
    return None


# --- VDI --------------------------------------------------------------------------------------------------------

_VDI_NORMAL, _VDI_FIXED, _VDI_DIFFERENCE = 1, 2, 4
_MIB = 1 << 20


def _vdi(read: Read, size: int) -> Facts:
    head = read(0, SECTOR)
    version, _, kind = unpack("<III", head[0x44:])
    map_at, data_at = unpack("<II", head[0x154:])
    sector, _, virtual, block, extra, blocks, allocated = unpack("<IIQIIII", head[0x168:])
    if len(head) < SECTOR:
        raise ImageRefused(Fault.TRUNCATED, "The file ends within its header.")
    if version != 0x0001_0001:
        raise unsupported(f"VDI version {version >> 16}.{version & 0xFFFF}")
    if kind == _VDI_DIFFERENCE or any(head[0x1A8:0x1C8]):
        return Facts(Format.VDI, virtual, backing_file="known by its UUID only")
    if kind not in (_VDI_NORMAL, _VDI_FIXED):
        raise unsupported(f"VDI type {kind}")
    if sector != SECTOR or block != _MIB or extra:
        raise unsupported(f"VDI blocks of {block} + {extra} bytes, sectors of {sector}")
    if virtual > blocks * block or allocated > blocks:
        raise damaged("more content than blocks")
    inside(map_at + 4 * blocks, size, "its table of blocks")
    inside(data_at + allocated * block, size, "its last block")
    return Facts(Format.VDI, -(-virtual // SECTOR) * SECTOR)


# --- ISO 9660, raw ----------------------------------------------------------------------------------------------


def _iso(read: Read, size: int) -> Facts:
    for sector in range(16, 32):
        descriptor = read(sector * 2048, 2048)
        if descriptor[1:6] != b"CD001" or descriptor[:1] == b"\xff":
            break
        if descriptor[:1] == b"\1":
            blocks, blocks_again = unpack("<I", descriptor[80:])[0], unpack(">I", descriptor[84:])[0]
            block, block_again = unpack("<H", descriptor[128:])[0], unpack(">H", descriptor[130:])[0]
            if (blocks, block) != (blocks_again, block_again) or block not in (512, 1024, 2048):
                raise damaged("its two byte orders differ")
            inside(blocks * block, size, "its last block")
            return Facts(Format.ISO, -(-size // SECTOR) * SECTOR)
    raise damaged("it has no primary volume descriptor")


def _raw(_: Read, size: int) -> Facts:
    return Facts(Format.RAW, -(-size // SECTOR) * SECTOR)


_READERS: dict[Format, Callable[[Read, int], Facts]] = {
    Format.QCOW2: _qcow2,
    Format.VDI: _vdi,
    Format.VMDK: read_vmdk,
    Format.ISO: _iso,
    Format.RAW: _raw,
}
