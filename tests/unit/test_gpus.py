"""GPUs on a made-up sysfs tree: a card is offered only when its whole IOMMU group can be given away."""

from __future__ import annotations

from pathlib import Path

from deskfleet.agent.gpus import find_gpus


def device(root: Path, address: str, kind: str, group: int | None, driver: str = "", ids: str = "10de:20b0") -> None:
    folder = root / "bus/pci/devices" / address
    folder.mkdir(parents=True)
    vendor, product = ids.split(":")
    (folder / "class").write_text(f"{kind}\n")
    (folder / "vendor").write_text(f"0x{vendor}\n")
    (folder / "device").write_text(f"0x{product}\n")
    if group is not None:
        (root / f"kernel/iommu_groups/{group}").mkdir(parents=True, exist_ok=True)
        (folder / "iommu_group").symlink_to(root / f"kernel/iommu_groups/{group}")
    if driver:
        (root / f"bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(root / f"bus/pci/drivers/{driver}")


VGA, AUDIO, NIC, BRIDGE = "0x030000", "0x040300", "0x020000", "0x060400"


def test_a_card_with_its_audio_function_is_offered_whole(tmp_path: Path) -> None:
    device(tmp_path, "0000:01:00.0", VGA, 7, "vfio-pci")
    device(tmp_path, "0000:01:00.1", AUDIO, 7, "vfio-pci", "10de:1aef")
    device(tmp_path, "0000:00:01.0", BRIDGE, 7, "pcieport", "8086:1901")
    (gpu,) = find_gpus(tmp_path, {"10de:20b0": "A100"})
    assert (gpu.address, gpu.model, gpu.group, gpu.offered) == ("0000:01:00.0", "A100", 7, True)
    assert gpu.functions == ("0000:01:00.0", "0000:01:00.1")


def test_c36_a_group_that_is_not_all_on_vfio_is_not_offered_and_says_why(tmp_path: Path) -> None:
    device(tmp_path, "0000:01:00.0", VGA, 7, "vfio-pci")
    device(tmp_path, "0000:01:00.1", AUDIO, 7, "snd_hda_intel")
    (gpu,) = find_gpus(tmp_path)
    assert not gpu.offered and "0000:01:00.1 has driver snd_hda_intel" in gpu.problem


def test_c36_a_stranger_in_the_group_is_not_given_away_with_the_card(tmp_path: Path) -> None:
    device(tmp_path, "0000:01:00.0", VGA, 7, "vfio-pci")
    device(tmp_path, "0000:02:00.0", NIC, 7, "vfio-pci", "8086:10d3")
    (gpu,) = find_gpus(tmp_path)
    assert not gpu.offered and "0000:02:00" in gpu.problem


def test_c36_two_gpus_in_one_group_are_not_offered(tmp_path: Path) -> None:
    device(tmp_path, "0000:01:00.0", VGA, 7, "vfio-pci")
    device(tmp_path, "0000:02:00.0", VGA, 7, "vfio-pci")
    (gpu,) = find_gpus(tmp_path)
    assert not gpu.offered and "share IOMMU group 7" in gpu.problem


def test_without_an_iommu_group_or_on_an_odd_name_there_is_no_gpu(tmp_path: Path) -> None:
    device(tmp_path, "0000:01:00.0", VGA, None, "nvidia")
    device(tmp_path, "a,rombar=0", VGA, 3, "vfio-pci")
    assert find_gpus(tmp_path) == ()
    assert find_gpus(tmp_path / "nowhere") == ()


def test_the_same_model_twice_is_two_cards(tmp_path: Path) -> None:
    device(tmp_path, "0000:01:00.0", VGA, 7, "vfio-pci")
    device(tmp_path, "0000:02:00.0", VGA, 8, "vfio-pci")
    assert [gpu.address for gpu in find_gpus(tmp_path) if gpu.offered] == ["0000:01:00.0", "0000:02:00.0"]
