"""The builder of Debian images in pieces: mirrors, files, kernel modules, ramdisk. A whole image: tests/system."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest
from support.image_builds import Spawner, system

from machines.builder import debian, initrd
from machines.builder.system import BuildError, Failure


def test_mirrors_are_this_machines_debian_mirrors() -> None:
    listed = (
        "http://one/debian/ bookworm main Debian\nhttp://two/debian/ bookworm main Debian\n"
        "http://one/debian-security/ bookworm-security main Debian\nhttp://one/debian/ trixie main Debian\n"
        "http://one/debian/ bookworm contrib Debian\nhttp://other/ bookworm main Elsewhere\n\n"
    )
    spawner = Spawner(indextargets=(0, listed))
    given = system(spawner)
    signed = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    assert debian.mirrors("bookworm", given) == [
        f"deb {signed} http://one/debian/ bookworm main",
        f"deb {signed} http://one/debian-security/ bookworm-security main",
    ]
    assert "update" not in str(spawner.commands)
    with pytest.raises(BuildError, match="knows no Debian mirror for sid") as caught:
        debian.mirrors("sid", given)
    assert caught.value.failure is Failure.MIRROR
    assert ["apt-get", "-q", "update"] in spawner.commands, "fresh lists might have named it"


def test_files_are_copied_with_plain_modes(tmp_path: Path) -> None:
    source, root = tmp_path / "files", tmp_path / "root"
    (source / "etc/app").mkdir(parents=True)
    (root / "etc").mkdir(parents=True)
    (root / "etc").chmod(0o700)
    (source / "etc/app/config").write_text("x")
    (source / "etc/app/config").chmod(0o600)
    (source / "etc/run").write_text("#!/bin/sh\n")
    (source / "etc/run").chmod(0o700)
    debian.copy_files(source, root)
    modes = {name: (root / name).stat().st_mode & 0o777 for name in ("etc", "etc/app", "etc/app/config", "etc/run")}
    assert modes == {"etc": 0o700, "etc/app": 0o755, "etc/app/config": 0o644, "etc/run": 0o755}


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """lib/modules/VERSION of a kernel with five modules, one of them packed."""
    folder = tmp_path / "6.1.0"
    folder.mkdir()
    (folder / "modules.dep").write_text(
        "a.ko: b-c.ko d.ko\nb-c.ko: d.ko\nd.ko:\nkernel/e.ko.xz: a.ko b-c.ko d.ko\nf.ko:\n"
    )
    (folder / "modules.builtin").write_text("kernel/drivers/inside.ko\n")
    return folder


def test_modules_come_after_what_they_need(kernel: Path) -> None:
    assert initrd.loading_order(kernel, ["a", "inside"]) == ["d.ko", "b-c.ko", "a.ko"]
    assert initrd.loading_order(kernel, ["f", "e", "b_c"]) == ["f.ko", "d.ko", "b-c.ko", "a.ko", "kernel/e.ko.xz"]


def test_an_unknown_module_is_refused(kernel: Path) -> None:
    with pytest.raises(BuildError, match=r"kernel 6\.1\.0 has no module x, y"):
        initrd.loading_order(kernel, ["a", "x", "y", "inside"])


def test_the_ramdisk_holds_what_init_needs(kernel: Path, tmp_path: Path) -> None:
    (kernel / "d.ko").write_bytes(b"module d")
    (kernel / "kernel").mkdir()
    (kernel / "kernel/e.ko.xz").write_bytes(lzma.compress(b"module e"))
    (tmp_path / "init").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "busybox").write_bytes(b"\x7fELF")
    target = tmp_path / "initrd.img"
    initrd.write(target, tmp_path / "init", tmp_path / "busybox", kernel, ["d.ko", "kernel/e.ko.xz"])
    found = unpack(gzip.decompress(target.read_bytes()))
    assert found["modules.order"][1] == b"/modules/d.ko\n/modules/e.ko\n"
    assert found["modules/e.ko"][1] == b"module e"
    assert found["init"] == (0o100755, b"#!/bin/sh\n")
    assert found["bin/sh"] == (0o120777, b"busybox")
    assert found["dev/console"][0] == 0o020600
    names = list(found)
    assert all(names.index(str(Path(name).parent)) < names.index(name) for name in names if "/" in name)


def unpack(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content by name of a newc archive, read by its definition: 110-byte heads, all padded to four bytes."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        start = at + (110 + length + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[start : start + size])
        at = start + (size + 3) // 4 * 4
