"""GPUs on a made-up sysfs tree: a card is offered only when its whole IOMMU group can be given away, and taken back."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.sysfs import AUDIO, BRIDGE, CARD, NIC, VGA, Pci

from deskfleet.agent.gpus import find_gpus


@pytest.fixture
def pci(tmp_path: Path) -> Pci:
    return Pci(tmp_path)


@pytest.mark.parametrize("reset", [True, False])
def test_a_card_with_its_audio_function_is_offered_whole_and_without_its_bridge(pci: Pci, reset: bool) -> None:
    """Also when the kernel can reset neither function alone: vfio-pci resets them with their bus."""
    pci.card(reset=reset)
    (gpu,) = find_gpus(pci.sys, {"10de:20b0": "A100"})
    assert (gpu.address, gpu.model, gpu.group, gpu.offered, gpu.problem) == (CARD[0], "A100", 7, True, "")
    assert gpu.functions == CARD


@pytest.mark.parametrize(("driver", "said"), [("snd_hda_intel", "snd_hda_intel"), ("", "none")])
def test_c36_a_group_that_is_not_all_on_vfio_is_not_offered_and_says_why(pci: Pci, driver: str, said: str) -> None:
    pci.card()
    pci.bind(CARD[1], driver)
    (gpu,) = find_gpus(pci.sys)
    assert not gpu.offered and f"{CARD[1]} has driver {said}" in gpu.problem


def test_c36_a_stranger_in_the_group_is_not_given_away_with_the_card(pci: Pci) -> None:
    pci.card()
    pci.add("0000:02:00.0", NIC, 7, ids="8086:10d3")
    (gpu,) = find_gpus(pci.sys)
    assert not gpu.offered and "0000:02:00" in gpu.problem


def test_c36_two_gpus_in_one_group_are_not_offered(pci: Pci) -> None:
    pci.add("0000:01:00.0", VGA, 7)
    pci.add("0000:02:00.0", VGA, 7)
    (gpu,) = find_gpus(pci.sys)
    assert not gpu.offered and "share IOMMU group 7" in gpu.problem


def test_a_card_that_nothing_resets_is_not_offered(pci: Pci) -> None:
    """On the root bus there is no bridge to reset it by."""
    pci.add("0000:00:02.0", VGA, 7, bridge="", reset=False)
    (gpu,) = find_gpus(pci.sys)
    assert not gpu.offered and "no way to reset 0000:00:02.0" in gpu.problem


def test_a_card_that_shares_its_bus_with_another_group_can_t_be_reset_by_the_bus(pci: Pci) -> None:
    pci.add("0000:01:00.0", VGA, 7, reset=False)
    pci.add("0000:01:01.0", NIC, 8, "e1000e", "8086:10d3")
    (gpu,) = find_gpus(pci.sys)
    assert not gpu.offered and "no way to reset" in gpu.problem


def test_each_card_behind_its_own_port_is_offered_by_itself(pci: Pci) -> None:
    pci.card()
    pci.add("0000:00:02.0", BRIDGE, 8, "pcieport", "8086:1901", bridge="")
    pci.add("0000:02:00.0", VGA, 8, bridge="0000:00:02.0", reset=False)
    pci.add("0000:02:00.1", AUDIO, 8, bridge="0000:00:02.0", reset=False)
    assert [(gpu.address, gpu.group) for gpu in find_gpus(pci.sys) if gpu.offered] == [
        (CARD[0], 7),
        ("0000:02:00.0", 8),
    ]


def test_without_an_iommu_group_or_on_an_odd_name_there_is_no_gpu(pci: Pci) -> None:
    pci.add("0000:01:00.0", VGA, None, "nvidia")
    pci.add("a,rombar=0", VGA, 3)
    assert find_gpus(pci.sys) == ()
    assert find_gpus(pci.sys / "nowhere") == ()
