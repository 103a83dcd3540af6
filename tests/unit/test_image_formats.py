"""Our reader of image headers: what qemu-img makes passes, everything that points outside or lies is refused.

Case C24 of the known ones: the images here are made by qemu-img itself where it can make them.
"""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskfleet.schemas.image_facts import Facts, Fault, ImageRefused, Read
from deskfleet.schemas.image_formats import LARGEST, detect, inspect
from deskfleet.schemas.machine import Format

MIB = 1 << 20


def reader(data: bytes, reads: list[int] | None = None) -> Read:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0 and length >= 0
        if reads is not None:
            reads.append(length)
        return data[offset : offset + length]

    return read


def look(data: bytes, claimed: Format, largest: int = LARGEST) -> Facts:
    return inspect(reader(data), len(data), claimed, largest)


def fault(data: bytes, claimed: Format, largest: int = LARGEST) -> Fault:
    with pytest.raises(ImageRefused) as refused:
        look(data, claimed, largest)
    assert str(refused.value).endswith(".") and str(refused.value).isprintable()
    return refused.value.fault


def made(folder: Path, kind: str, *options: str, size: str = "64M") -> bytes:
    """An image that qemu-img makes."""
    path = folder / "made"
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, *options, str(path), size], check=True, cwd=folder)
    return path.read_bytes()


def patched(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def iso(blocks: int = 20) -> bytes:
    descriptor = bytearray(2048)
    descriptor[:7] = b"\1CD001\1"
    struct.pack_into("<I", descriptor, 80, blocks)
    struct.pack_into(">I", descriptor, 84, blocks)
    struct.pack_into("<H", descriptor, 128, 2048)
    struct.pack_into(">H", descriptor, 130, 2048)
    return bytes(16 * 2048) + bytes(descriptor) + bytes((blocks - 17) * 2048)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[Format, bytes]:
    folder = tmp_path_factory.mktemp("good")
    images = {kind: made(folder, kind.value) for kind in (Format.QCOW2, Format.VDI, Format.VMDK)}
    return {**images, Format.ISO: iso(), Format.RAW: bytes(4096)}


# --- what passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(Format))
def test_a_good_image_passes_and_tells_its_size(good: dict[Format, bytes], kind: Format) -> None:
    facts = look(good[kind], kind)
    sizes = {Format.ISO: 40_960, Format.RAW: 4096}
    assert (facts.format, facts.virtual_size) == (kind, sizes.get(kind, 64 * MIB))
    assert detect(reader(good[kind]), len(good[kind])) == ("" if kind is Format.RAW else kind.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Format.QCOW2, ["-o", "compat=0.10"]),
        (Format.QCOW2, ["-o", "cluster_size=2M"]),
        (Format.QCOW2, ["-o", "cluster_size=512"]),
        (Format.QCOW2, ["-o", "extended_l2=on,cluster_size=128k"]),
        (Format.QCOW2, ["-o", "compression_type=zstd"]),
        (Format.QCOW2, ["-o", "preallocation=metadata"]),
        (Format.VDI, ["-o", "static=on"]),
        (Format.VMDK, ["-o", "subformat=streamOptimized"]),
    ],
    ids=str,
)
def test_every_ordinary_variant_passes(tmp_path: Path, kind: Format, options: list[str]) -> None:
    assert look(made(tmp_path, kind.value, *options), kind).virtual_size == 64 * MIB


def test_snapshots_are_counted(tmp_path: Path) -> None:
    made(tmp_path, "qcow2")
    for name in ("one", "two"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, str(tmp_path / "made")], check=True)
    data = (tmp_path / "made").read_bytes()
    assert look(data, Format.QCOW2).snapshots == 2
    assert fault(patched(data, 60, struct.pack(">I", 5_000_000)), Format.QCOW2) is Fault.SNAPSHOTS


def test_a_vmdk_tells_its_kind_and_extent(good: dict[Format, bytes]) -> None:
    facts = look(good[Format.VMDK], Format.VMDK)
    assert facts.create_type == "monolithicSparse" and facts.extents == ("'made'",)


def test_a_vmdk_stream_with_its_directory_at_the_end(tmp_path: Path) -> None:
    """As VMware writes them: the header says "at the end", the footer says where."""
    data = made(tmp_path, "vmdk", "-o", "subformat=streamOptimized")
    header, marker = data[:512], struct.pack("<QII", 1, 0, 3).ljust(512, b"\0")
    stream = patched(data, 56, b"\xff" * 8) + marker + header + bytes(512)
    assert look(stream, Format.VMDK).virtual_size == 64 * MIB
    assert fault(stream[:-1024], Format.VMDK) is Fault.TRUNCATED
    other = patched(stream, len(stream) - 1024 + 12, struct.pack("<Q", 8))
    assert fault(other, Format.VMDK) is Fault.DAMAGED


def test_a_cd_that_is_a_disk_as_well_may_be_claimed_as_raw() -> None:
    hybrid = patched(iso(), 510, b"\x55\xaa")
    assert look(hybrid, Format.RAW).format is Format.RAW and look(hybrid, Format.ISO).format is Format.ISO
    assert fault(iso(), Format.RAW) is Fault.MISMATCH


# --- C24: what points outside -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/shadow", 'json:{"driver":"raw"}', "nbd://example.org/x", "a,b\nc\x1b[31m"])
def test_c24_a_backing_file_is_refused_whatever_its_name(good: dict[Format, bytes], name: str) -> None:
    data = patched(good[Format.QCOW2], 4096, name.encode())
    data = patched(data, 8, struct.pack(">QI", 4096, len(name)))
    assert fault(data, Format.QCOW2) is Fault.BACKING_FILE


def test_c24_a_backing_file_made_by_qemu_img_is_refused(tmp_path: Path) -> None:
    (tmp_path / "canary").write_bytes(bytes(MIB))
    data = made(tmp_path, "qcow2", "-b", "canary", "-F", "raw")
    assert fault(data, Format.QCOW2) is Fault.BACKING_FILE


def test_c24_an_external_data_file_is_refused(tmp_path: Path) -> None:
    data = made(tmp_path, "qcow2", "-o", "data_file=canary,data_file_raw=on")
    assert fault(data, Format.QCOW2) is Fault.DATA_FILE
    without_bit = patched(data, 72, bytes(8))
    assert fault(without_bit, Format.QCOW2) is Fault.DATA_FILE
    without_name = data.replace(b"DATA\0\0\0\6", b"DATB\0\0\0\6")
    assert without_name != data and fault(without_name, Format.QCOW2) is Fault.DATA_FILE


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_c24_vmdk_kinds_in_several_files_are_refused(tmp_path: Path, kind: str) -> None:
    assert fault(made(tmp_path, "vmdk", "-o", f"subformat={kind}"), Format.VMDK) is Fault.EXTENT


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b'"monolithicSparse"', b'"monolithicFlat"  ', Fault.EXTENT),
        (b'SPARSE "made"', b'FLAT   "made"', Fault.EXTENT),
        (b'SPARSE "made"', b'SPARSE "/a/b"', Fault.EXTENT),
        (b'SPARSE "made"', b'SPARSE "nbd:"', Fault.EXTENT),
        (b"# The Disk Data Base", b'RW 8 FLAT "/etc/hos"', Fault.EXTENT),
        (b"# The Disk Data Base", b'#createType="vmfs"  ', Fault.EXTENT),
        (b"# The Disk Data Base", b"#parentFileNameHint=", Fault.BACKING_FILE),
        (b"parentCID=ffffffff", b"parentCID=00000001", Fault.BACKING_FILE),
        (b"# The Disk Data Base", b"encryption.keySafe=1", Fault.ENCRYPTED),
    ],
)
def test_c24_a_vmdk_text_that_names_anything_else(
    good: dict[Format, bytes], old: bytes, new: bytes, why: Fault
) -> None:
    data = good[Format.VMDK].replace(old, new)
    assert data != good[Format.VMDK] and len(data) == len(good[Format.VMDK])
    assert fault(data, Format.VMDK) is why


def test_c24_a_parent_named_behind_the_text_is_seen(good: dict[Format, bytes]) -> None:
    """qemu reads 20 sectors, whatever the header says of the text's length."""
    data = patched(good[Format.VMDK], 36, struct.pack("<Q", 2))
    hidden = patched(data, 512 + 19 * 512, b'parentFileNameHint="/etc/shadow"')
    assert look(data, Format.VMDK).create_type == "monolithicSparse"
    assert fault(hidden, Format.VMDK) is Fault.BACKING_FILE


def test_c24_a_vmdk_header_without_capacity_is_a_list_of_files_to_qemu(good: dict[Format, bytes]) -> None:
    assert fault(patched(good[Format.VMDK], 12, bytes(8)), Format.VMDK) is Fault.EXTENT


def test_c24_a_vdi_with_a_parent_is_refused(good: dict[Format, bytes]) -> None:
    assert fault(patched(good[Format.VDI], 0x1B8, b"\1" * 16), Format.VDI) is Fault.BACKING_FILE
    assert fault(patched(good[Format.VDI], 0x4C, b"\4"), Format.VDI) is Fault.BACKING_FILE


def test_c24_no_image_passes_under_another_name(good: dict[Format, bytes]) -> None:
    for kind, data in good.items():
        for claimed in Format:
            if claimed is not kind:
                assert fault(data, claimed) is Fault.MISMATCH, (kind, claimed)


def test_c24_a_raw_disk_that_begins_like_another_format_is_refused(tmp_path: Path) -> None:
    """What a guest writes into its first sector must not be followed at the next start."""
    rest = bytes(MIB)
    heads = [made(tmp_path, kind)[:1024] for kind in ("qcow2", "qcow", "qed", "vmdk", "vpc", "vhdx", "parallels")]
    heads += [b"QFI\xfb", b"COWD", b"\x1f\x8b\x08", b"PK\3\4", b"BZh91AY", b"Bochs Virtual HD Image"]
    for head in heads:
        assert fault(head + rest, Format.RAW) is Fault.MISMATCH, head[:16]
    for text in (b"# Disk DescriptorFile\nversion=1\n", b"#x\n  \r\nversion=3\r\n"):
        assert fault(text + rest, Format.RAW) is Fault.EXTENT
    assert fault(rest + b"conectix" + bytes(504), Format.RAW) is Fault.MISMATCH
    assert fault(b"LUKS\xba\xbe" + rest, Format.RAW) is Fault.ENCRYPTED


def test_a_cd_behind_another_format_s_header_is_refused(good: dict[Format, bytes]) -> None:
    assert fault(patched(iso(), 0, good[Format.QCOW2][:512]), Format.ISO) is Fault.MISMATCH


# --- what is damaged, encrypted, too large or cut off -----------------------------------------------------------


@pytest.mark.parametrize("method", [1, 2])
def test_encrypted_images_are_refused(good: dict[Format, bytes], method: int) -> None:
    assert fault(patched(good[Format.QCOW2], 32, struct.pack(">I", method)), Format.QCOW2) is Fault.ENCRYPTED


def test_c25_a_pebibyte_is_refused_and_the_limit_is_a_parameter(tmp_path: Path, good: dict[Format, bytes]) -> None:
    huge = made(tmp_path, "qcow2", "-o", "cluster_size=2M", size="1P")
    assert fault(huge, Format.QCOW2) is Fault.TOO_LARGE
    assert look(huge, Format.QCOW2, largest=1 << 50).virtual_size == 1 << 50
    for kind in (Format.QCOW2, Format.VDI, Format.VMDK, Format.ISO, Format.RAW):
        assert fault(good[kind], kind, largest=1024) is Fault.TOO_LARGE


@pytest.mark.parametrize("kind", list(Format))
def test_c25_an_empty_file_is_refused(kind: Format) -> None:
    assert fault(b"", kind) is Fault.EMPTY


@pytest.mark.parametrize("kind", [Format.QCOW2, Format.VDI, Format.VMDK, Format.ISO])
def test_c25_a_file_that_ends_too_early_is_refused(good: dict[Format, bytes], kind: Format) -> None:
    data = good[kind]
    for length in (8, 100, 600, 40_000, len(data) - 1):
        if length < len(data):
            assert fault(data[:length], kind) in (Fault.TRUNCATED, Fault.MISMATCH, Fault.EXTENT), length
    assert fault(data[: len(data) - 1], kind) in (Fault.TRUNCATED, Fault.EXTENT)


@pytest.mark.parametrize(
    ("kind", "offset", "value", "why"),
    [
        (Format.QCOW2, 4, struct.pack(">I", 4), Fault.UNSUPPORTED),
        (Format.QCOW2, 20, struct.pack(">I", 31), Fault.DAMAGED),
        (Format.QCOW2, 24, struct.pack(">Q", 1 << 62), Fault.DAMAGED),
        (Format.QCOW2, 24, struct.pack(">Q", 0), Fault.EMPTY),
        (Format.QCOW2, 40, struct.pack(">Q", 77), Fault.DAMAGED),
        (Format.QCOW2, 40, struct.pack(">Q", 1 << 40), Fault.TRUNCATED),
        (Format.QCOW2, 72, struct.pack(">Q", 1 << 1), Fault.DAMAGED),
        (Format.QCOW2, 72, struct.pack(">Q", 1 << 9), Fault.UNSUPPORTED),
        (Format.QCOW2, 100, struct.pack(">I", 1 << 30), Fault.DAMAGED),
        (Format.QCOW2, 104, b"\0" * 8 + struct.pack(">II", 7, 1 << 31), Fault.DAMAGED),
        (Format.VDI, 0x44, struct.pack("<I", 2), Fault.UNSUPPORTED),
        (Format.VDI, 0x4C, struct.pack("<I", 3), Fault.UNSUPPORTED),
        (Format.VDI, 0x170, struct.pack("<Q", 1 << 62), Fault.DAMAGED),
        (Format.VDI, 0x178, struct.pack("<I", 4096), Fault.UNSUPPORTED),
        (Format.VDI, 0x180, struct.pack("<I", 1 << 31), Fault.TRUNCATED),
        (Format.VMDK, 4, struct.pack("<I", 9), Fault.UNSUPPORTED),
        (Format.VMDK, 12, struct.pack("<Q", 1 << 62), Fault.TRUNCATED),
        (Format.VMDK, 20, struct.pack("<Q", 3), Fault.DAMAGED),
        (Format.VMDK, 28, struct.pack("<Q", 0), Fault.EXTENT),
        (Format.VMDK, 28, struct.pack("<Q", 9), Fault.UNSUPPORTED),
        (Format.VMDK, 44, struct.pack("<I", 0), Fault.DAMAGED),
        (Format.VMDK, 56, struct.pack("<Q", 1 << 50), Fault.TRUNCATED),
        (Format.ISO, 16 * 2048 + 80, struct.pack("<I", 9), Fault.DAMAGED),
        (Format.ISO, 16 * 2048, b"\2", Fault.DAMAGED),
    ],
)
def test_an_odd_header_is_refused_by_name(
    good: dict[Format, bytes], kind: Format, offset: int, value: bytes, why: Fault
) -> None:
    assert fault(patched(good[kind], offset, value), kind) is why


# --- whatever the bytes are -------------------------------------------------------------------------------------


def survives(data: bytes, claimed: Format) -> None:
    """Facts or a refusal, never anything else, and a bounded number of bytes read."""
    reads: list[int] = []
    try:
        facts = inspect(reader(data, reads), len(data), claimed)
    except ImageRefused as refused:
        assert str(refused).isprintable() and len(str(refused)) < 500
    else:
        assert 0 < facts.virtual_size <= LARGEST and not facts.backing_file and not facts.data_file
    assert sum(reads) < 256 * 1024


@given(st.binary(max_size=4096), st.sampled_from(list(Format)))
def test_random_bytes_never_raise_anything_but_the_refusal(data: bytes, claimed: Format) -> None:
    survives(data, claimed)


@given(st.sampled_from(list(Format)), st.integers(0, 2**32), st.integers(1, 12))
def test_mutated_headers_never_raise_anything_but_the_refusal(
    good: dict[Format, bytes], kind: Format, seed: int, changes: int
) -> None:
    draw = random.Random(seed)
    data = bytearray(good[kind])
    start = 16 * 2048 if kind is Format.ISO else 0
    odd: list[Callable[[], bytes]] = [
        lambda: draw.randbytes(draw.choice([1, 2, 4, 8])),
        lambda: b"\xff" * draw.choice([1, 4, 8]),
        lambda: bytes(draw.choice([1, 4, 8])),
        lambda: b"\x7f" + b"\xff" * 7,
    ]
    for _ in range(changes):
        at = start + draw.randrange(0, 700)
        value = draw.choice(odd)()
        data[at : at + len(value)] = value
    if draw.random() < 0.3:
        del data[draw.randrange(0, len(data)) :]
    survives(bytes(data), kind)
