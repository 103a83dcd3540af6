"""What guests are lent of the host's devices, and that it comes back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from support.sysfs import CARD, Pci

from deskfleet.agent.accel import probe
from deskfleet.agent.devices import free_huge_pages, kvm_groups, lend, roms, take_back, vfio_nodes

assert os.geteuid() == 0, "devices are lent by root"
GUEST = 50_000_000


@pytest.fixture
def host(tmp_path: Path) -> Path:
    for address, group in (("0000:01:00.0", 7), ("0000:01:00.1", 7), ("0000:02:00.0", 8)):
        device = tmp_path / "sys/bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "iommu_group").symlink_to(f"../../../../kernel/iommu_groups/{group}")
    (tmp_path / "dev/vfio").mkdir(parents=True)
    for name in ("7", "8", "vfio"):
        (tmp_path / "dev/vfio" / name).touch()
    return tmp_path


def owners(host: Path) -> dict[str, int]:
    return {node.name: node.stat().st_uid for node in sorted((host / "dev/vfio").iterdir())}


def test_a_guest_drives_the_groups_of_its_gpu_and_no_other_and_only_while_it_runs(host: Path) -> None:
    nodes = vfio_nodes(["0000:01:00.0", "0000:01:00.1"], host / "sys", host / "dev")
    lend(nodes, GUEST)
    assert owners(host) == {"7": GUEST, "8": 0, "vfio": 0}
    take_back({GUEST + 1}, host / "dev")
    assert owners(host)["7"] == GUEST, "another guest's end takes nothing from this one"
    take_back({GUEST}, host / "dev")
    assert owners(host) == {"7": 0, "8": 0, "vfio": 0}


def test_what_one_guest_has_is_not_lent_to_another(host: Path) -> None:
    nodes = vfio_nodes(["0000:01:00.0"], host / "sys", host / "dev")
    lend(nodes, GUEST)
    with pytest.raises(OSError, match="lent to another guest"):
        lend(nodes, GUEST + 1)
    assert owners(host)["7"] == GUEST


def test_a_card_that_is_gone_is_an_error_and_nothing_to_take_back_is_none(host: Path) -> None:
    with pytest.raises(OSError):
        vfio_nodes(["0000:03:00.0"], host / "sys", host / "dev")
    (host / "dev/vfio/8").unlink()
    with pytest.raises(OSError):
        lend(vfio_nodes(["0000:02:00.0"], host / "sys", host / "dev"), GUEST)
    take_back({GUEST}, host / "nowhere")


@pytest.mark.parametrize(("mode", "expected"), [(0o660, True), (0o666, True), (0o600, False), (0o640, False)])
def test_kvm_is_opened_by_its_group_where_the_group_may(tmp_path: Path, mode: int, expected: bool) -> None:
    device = tmp_path / "kvm"
    device.touch()
    os.chown(device, 0, 1234)
    device.chmod(mode)
    assert kvm_groups(tmp_path) == ((1234,) if expected else ())
    assert kvm_groups(tmp_path / "nowhere") == ()


def test_the_probe_runs_as_a_guest_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That root may open a device says nothing about guests: here as a user who owns nothing and may not even enter the
    folder of temporary files."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert probe("tcg", "max", uid=GUEST) == ""


def test_huge_pages_that_are_promised_are_not_free(tmp_path: Path) -> None:
    assert free_huge_pages(tmp_path) == 0
    folder = tmp_path / "kernel/mm/hugepages/hugepages-2048kB"
    folder.mkdir(parents=True)
    for free, reserved, expected in ((10, 4, 6), (2, 5, 0)):
        (folder / "free_hugepages").write_text(f"{free}\n")
        (folder / "resv_hugepages").write_text(f"{reserved}\n")
        assert free_huge_pages(tmp_path) == expected


def test_a_rom_goes_by_address_before_model_and_must_be_one(tmp_path: Path) -> None:
    pci = Pci(tmp_path)
    pci.card()
    rom = tmp_path / "a.rom"
    rom.write_bytes(b"\x55\xaa")
    assert roms(CARD, {}, pci.sys) == {}
    assert roms(CARD, {"10de:20b0": str(rom)}, pci.sys) == {CARD[0]: str(rom)}
    assert roms(CARD, {"10de:20b0": str(rom), CARD[0]: "", CARD[1]: ""}, pci.sys) == {CARD[0]: "", CARD[1]: ""}
    rom.chmod(0o640)
    with pytest.raises(OSError, match="not readable by everybody"):
        roms(CARD, {"10de:20b0": str(rom)}, pci.sys)
    rom.chmod(0o644)
    rom.write_bytes(b"MZ")
    with pytest.raises(OSError, match="not an expansion ROM"):
        roms(CARD, {CARD[0]: str(rom)}, pci.sys)
    with pytest.raises(FileNotFoundError):
        roms(CARD, {CARD[0]: str(tmp_path / "none")}, pci.sys)
