"""Images of every format through the real agent: started and looked at, and the base is the same afterwards.

Cases C24 and C25 of the known ones at launch: what points outside is refused there again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.guests import Host, build_tiny, scenario, short_folder
from support.rfb import Rfb, UnixStream
from support.screen import TINY_TEXT, identity, picture, read_identity, region_hash
from support.uefi import COLOUR, painter

from deskfleet.agent.argv import OVMF_VARS, uuid_of
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import Drivers, Firmware, Format, Machine, Os
from deskfleet.schemas.session import Outcome

SID, OTHER = "1" * 32, "2" * 32
PIXELS = 1280 * 800


@pytest.fixture(scope="module")
def tiny() -> Iterator[tuple[Path, Machine]]:
    """The tiny machine's ISO, which starts as a disk as well."""
    with short_folder() as folder:
        machine = build_tiny(folder)
        yield folder / "images/tiny.iso", machine


@pytest.fixture
def host(tiny: tuple[Path, Machine]) -> Iterator[Host]:
    with short_folder() as folder:
        images = folder / "i"
        images.mkdir()
        yield Host(folder, tiny[1], images)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install(host: Host, path: Path) -> str:
    """Make an image of the host's folder one that guests can read; its digest. The host waits for it at its start."""
    path.chmod(0o644)
    digest = sha256(path)
    host.machine = Machine(**{**{n: getattr(host.machine, n) for n in Machine.__slots__}, "sha256": digest})  # type: ignore[arg-type]
    return digest


def convert(source: Path, target: Path, kind: Format, *options: str) -> None:
    line = ["qemu-img", "convert", "-f", "raw", "-O", kind.value, *options, str(source), str(target)]
    subprocess.run(line, check=True)


def opened_for_writing(sid: str, path: Path) -> list[bool]:
    """How a guest's qemu has a file open."""
    (process,) = [
        p
        for p in psutil.process_iter(["cmdline"])
        if uuid_of(sid) in (line := p.info["cmdline"] or []) and "qemu-system" in line[0]
    ]
    found = []
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # others come and go
            if os.readlink(entry) == str(path):
                info = Path(f"/proc/{process.pid}/fdinfo/{entry.name}").read_text()
                (flags,) = [int(row.split()[1], 8) for row in info.splitlines() if row.startswith("flags:")]
                found.append(flags & os.O_ACCMODE != os.O_RDONLY)
    return found


@pytest.mark.parametrize(
    ("kind", "drivers", "options"),
    [
        (Format.ISO, Drivers.COMPATIBLE, []),
        (Format.ISO, Drivers.VIRTIO, []),
        (Format.QCOW2, Drivers.COMPATIBLE, []),
        (Format.QCOW2, Drivers.VIRTIO, ["-c", "-o", "compression_type=zstd"]),
        (Format.VDI, Drivers.VIRTIO, []),
        (Format.VMDK, Drivers.VIRTIO, []),
        (Format.VMDK, Drivers.COMPATIBLE, ["-o", "subformat=streamOptimized"]),
        (Format.RAW, Drivers.VIRTIO, []),
        (Format.RAW, Drivers.COMPATIBLE, []),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_a_guest_of_each_format(
    host: Host, tiny: tuple[Path, Machine], kind: Format, drivers: Drivers, options: list[str]
) -> None:
    image = host.folder / f"i/disk.{kind}"
    convert(tiny[0], image, Format.RAW if kind is Format.ISO else kind, *options)
    digest = install(host, image)

    async def work() -> None:
        async with await host.start():
            host.launch(SID, sha256=digest, format=kind, drivers=drivers)
            await host.phase(SID, Phase.RUNNING)
            viewer = Rfb(UnixStream(host.run / SID / "vnc.sock"))
            await host.until(lambda: read_identity(viewer.picture()) == identity(SID), "the guest's picture")
            before = region_hash(viewer.picture(), TINY_TEXT)
            viewer.type("works")
            await host.until(lambda: region_hash(viewer.picture(), TINY_TEXT) != before, "the typed text")
            viewer.close()
            assert opened_for_writing(SID, image) == [False]
            assert opened_for_writing(SID, host.folder / f"s/disks/{SID}.qcow2") == [True]
            host.stop(SID)
            await host.phase(SID, Phase.ENDED)
            assert host.leftovers() == []

    scenario(work)
    assert sha256(image) == digest


def test_guests_start_by_uefi_with_their_own_variables_and_those_go_with_them(host: Host) -> None:
    work_folder = host.folder / "w"
    work_folder.mkdir()
    painter(work_folder, work_folder / "disk.raw")
    image = host.folder / "i/disk.qcow2"
    convert(work_folder / "disk.raw", image, Format.QCOW2)
    digest, original = install(host, image), sha256(OVMF_VARS)

    async def work() -> None:
        async with await host.start():
            for sid, drivers in ((SID, Drivers.VIRTIO), (OTHER, Drivers.COMPATIBLE)):
                host.launch(sid, sha256=digest, format=Format.QCOW2, firmware=Firmware.UEFI, drivers=drivers)
                await host.phase(sid, Phase.RUNNING)
            stores = [host.run / sid / "vars.fd" for sid in (SID, OTHER)]
            assert [store.stat().st_uid for store in stores] == [50_000_000, 50_000_001]
            assert all(store.stat().st_mode & 0o777 == 0o600 for store in stores)
            for sid, store in zip((SID, OTHER), stores, strict=True):
                viewer = Rfb(UnixStream(host.run / sid / "vnc.sock"))
                await host.until(lambda v=viewer: v.picture().getcolors(1) == [(PIXELS, COLOUR)], "the painted screen")
                viewer.close()
                assert sha256(store) != original, "the firmware keeps its variables"
            host.stop(SID)
            await host.phase(SID, Phase.ENDED)
            assert not stores[0].exists() and stores[1].exists()
            host.stop(OTHER)
            await host.phase(OTHER, Phase.ENDED)
            assert host.leftovers() == []

    scenario(work)
    assert sha256(OVMF_VARS) == original and sha256(image) == digest


# --- deskfleet machine import, then test ------------------------------------------------------------------------


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """deskfleet machine …, on the catalogue and the images of a folder."""
    line = [
        str(Path(sys.executable).with_name("deskfleet")),
        "machine",
        *map(str, arguments),
        "--config",
        str(folder / "d.toml"),
    ]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder)


def test_an_imported_machine_is_started_once_and_looked_at(tiny: tuple[Path, Machine]) -> None:
    with short_folder() as folder:
        for part in ("catalogue", "images"):
            (folder / part).mkdir()
        (folder / "d.toml").write_text(f'[machines]\ncatalogue = "{folder}/catalogue"\nimages = "{folder}/images"\n')
        convert(tiny[0], folder / "mine.vdi", Format.VDI)
        size = ["--memory-mib", "64:128:256", "--os", "other"]
        done = run(folder, "import", folder / "mine.vdi", "--name", "mine", "--convert", "qcow2", *size)
        assert done.returncode == 0, done.stderr
        image = folder / "images/mine.qcow2"
        before = sha256(image)
        done = run(folder, "test", "mine", "--seconds", "10")
        assert done.returncode == 0, done.stderr
        assert read_identity(picture((folder / "mine.png").read_bytes())) is not None
        assert sha256(image) == before and run(folder, "check").returncode == 0
        again = run(folder, "test", "mine", "--seconds", "1")
        assert again.returncode == 1 and "exists already" in again.stderr

        line = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "/etc/hostname", "-F", "raw", str(image)]
        subprocess.run(line, check=True)
        entry = folder / "catalogue/mine.toml"
        entry.write_text(entry.read_text().replace(before, sha256(image)))
        refused = run(folder, "test", "mine", "--screenshot", folder / "x.png")
        assert refused.returncode == 1 and "image_bad" in refused.stderr and "backing_file" in refused.stderr
        image.unlink()
        refused = run(folder, "test", "mine", "--screenshot", folder / "x.png")
        assert refused.returncode == 1 and "image_missing" in refused.stderr
        assert not (folder / "x.png").exists()


# --- what is refused --------------------------------------------------------------------------------------------

CANARY = "canary-of-the-host"


def hostile(folder: Path, name: str) -> tuple[Path, Format]:
    """An image that would show the canary, or is not what its entry says; and what the entry says."""
    canary = folder / "canary"
    canary.write_text(CANARY * 30_000)
    canary.chmod(0o644)
    create = ["qemu-img", "create", "-q", "-f"]
    image = folder / f"i/{name}"
    lines = {
        "backing.qcow2": [*create, "qcow2", "-b", str(canary), "-F", "raw", str(image), "1M"],
        "data.qcow2": [*create, "qcow2", "-o", f"data_file={canary},data_file_raw=on", str(image), "512k"],
        "backing.vmdk": [*create, "vmdk", str(image), "1M"],
        "flat.vmdk": [*create, "vmdk", str(image), "1M"],
        "qcow2.raw": [*create, "qcow2", str(image), "1M"],
        "qcow2.iso": [*create, "qcow2", str(image), "2M"],
        "qcow2.vdi": [*create, "qcow2", str(image), "3M"],
        "huge.qcow2": [*create, "qcow2", "-o", "cluster_size=2M", str(image), "1P"],
        "short.vdi": [*create, "vdi", "-o", "static=on", str(image), "8M"],
    }
    if name in lines:
        subprocess.run(lines[name], check=True)
    data = image.read_bytes() if image.exists() else b""
    if name == "data.qcow2":
        canary.write_text(CANARY * 30_000)
    elif name == "backing.vmdk":
        hint = b'parentFileNameHint="%s"' % os.fsencode(canary)
        image.write_bytes(data[:6000] + hint + data[6000 + len(hint) :])
    elif name == "flat.vmdk":
        text = '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        image.write_text(f'{text}RW 1024 FLAT "{canary}" 0\n')
    elif name == "short.vdi":
        image.write_bytes(data[:-1_000_000])
    elif name == "empty.raw":
        image.touch()
    return image, Format(image.suffix[1:])


NAMES = {
    "backing.qcow2": "backing_file",
    "data.qcow2": "data_file",
    "backing.vmdk": "backing_file",
    "flat.vmdk": "extent",
    "qcow2.raw": "mismatch",
    "qcow2.iso": "mismatch",
    "qcow2.vdi": "mismatch",
    "huge.qcow2": "too_large",
    "short.vdi": "truncated",
    "empty.raw": "empty",
}


def test_c24_hostile_images_are_refused_at_launch_and_others_go_on(host: Host, tiny: tuple[Path, Machine]) -> None:
    made = {name: hostile(host.folder, name) for name in NAMES}
    digests = {name: install(host, path) for name, (path, _) in made.items()}
    image = host.folder / "i/tiny.iso"
    image.write_bytes(tiny[0].read_bytes())
    good = install(host, image)

    async def work() -> None:
        async with await host.start():
            sids = {name: f"{number:032x}" for number, name in enumerate(NAMES, 0xA0)}
            for name, sid in sids.items():
                host.launch(sid, sha256=digests[name], format=made[name][1], os=Os.LINUX)
            host.launch(SID, sha256=good)
            await host.phase(SID, Phase.RUNNING)
            for name, sid in sids.items():
                ended = await host.phase(sid, Phase.ENDED)
                assert (ended.outcome, ended.reason, ended.ran) == (Outcome.FAILED, Reason.IMAGE_BAD, False), name
                assert ended.detail.startswith(f"{name}: {NAMES[name]}: "), ended.detail
                assert CANARY not in ended.detail
            host.stop(SID)
            await host.phase(SID, Phase.ENDED)
            assert host.leftovers() == []

    scenario(work)
    assert not [path for path in (host.folder / "s/templates").iterdir() if not path.name.startswith("blank-")]
