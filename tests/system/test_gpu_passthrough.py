"""A GPU from sysfs to a guest and back, through a kernel's own IOMMU and VFIO code, on hardware that qemu emulates.

One outer guest with our agent in it (support/nested_gpu.py), and one story in it: each step needs the one before.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.guests import short_folder
from support.nested_gpu import ROOT, OuterGuest, outer_guest

CARD = ("0000:01:00.0", "0000:01:00.1")
BRIDGE = "0000:00:01.0"
SID, OTHER, THIRD = "1" * 32, "2" * 32, "3" * 32
PAINTED = ((320, 200), (255, 204, 0))


@pytest.fixture(scope="module")
def outer() -> Iterator[OuterGuest]:
    with short_folder() as folder, outer_guest(folder) as guest:
        yield guest


def bind(outer: OuterGuest, address: str) -> None:
    """As docs/operations.md says."""
    outer.shell(f"echo vfio-pci >/sys/bus/pci/devices/{address}/driver_override")
    outer.shell(f"echo {address} >/sys/bus/pci/drivers_probe")


def test_a_card_is_found_in_its_group_and_offered_once_all_of_it_is_bound(outer: OuterGuest) -> None:
    (gpu,) = outer.order()["gpus"]
    assert (gpu["address"], gpu["model"], tuple(gpu["functions"])) == (CARD[0], "1234:1111", CARD)
    assert not gpu["offered"]
    bind(outer, CARD[0])
    (gpu,) = outer.order(look=True)["gpus"]
    assert not gpu["offered"] and gpu["problem"] == f"not bound to vfio-pci: {CARD[1]} has driver none"
    bind(outer, CARD[1])
    (gpu,) = outer.order(look=True)["gpus"]
    assert gpu["offered"] and gpu["problem"] == ""


def test_the_reset_needs_no_more_than_the_agents_unit_gives_it(outer: OuterGuest) -> None:
    unit = (ROOT / "deploy/systemd/deskfleet-agent.service").read_text()
    (line,) = [line for line in unit.splitlines() if line.startswith("CapabilityBoundingSet=")]
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in line.partition("=")[2].split())
    outer.shell(
        f"/usr/bin/setpriv --bounding-set=-all,{kept} --no-new-privs "
        f"python3 -m deskfleet.agent.vfio /dev {group(outer)} {' '.join(CARD)}"
    )


def test_without_enough_huge_pages_it_says_so(outer: OuterGuest) -> None:
    refused = outer.order(launch="6" * 32, gpu=CARD)["said"][-1]
    assert (refused["reason"], refused["detail"]) == (
        "memory_short", "16 huge pages of 2 MiB are needed, 0 are free",
    )  # fmt: skip
    assert outer.order()["gpus"][0]["offered"]
    outer.shell("echo 16 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def test_the_guest_paints_on_the_card_and_everything_comes_back(outer: OuterGuest) -> None:
    assert outer.screen("gpu0") != PAINTED
    launched = outer.order(launch=SID, gpu=CARD)["said"][-1]
    assert launched["phase"] == "running", launched["detail"]
    assert owner(outer) == "50000000"
    outer.until_painted(PAINTED)
    assert outer.shell("cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") != "16"
    stopped = outer.order(stop=SID)
    assert stopped["said"][-1]["outcome"] == "stopped"
    assert owner(outer) == "0"
    assert [gpu["offered"] for gpu in stopped["gpus"]] == [True], "checked before its end was told"


def group(outer: OuterGuest) -> str:
    """The card's IOMMU group."""
    return outer.shell(f"basename $(readlink /sys/bus/pci/devices/{CARD[0]}/iommu_group)")


def owner(outer: OuterGuest) -> str:
    """Whose the group's device node is."""
    return outer.shell(f"stat -c %u /dev/vfio/{group(outer)}")


def test_the_next_guest_gets_it_and_nobody_else_at_the_same_time_over_a_restart(outer: OuterGuest) -> None:
    assert outer.order(launch=SID[:-1] + "4", gpu=CARD)["said"][-1]["phase"] == "running"
    refused = outer.order(launch=OTHER, gpu=CARD)["said"][-1]
    assert (refused["reason"], refused["ran"]) == ("gpu_unavailable", False)
    outer.until_painted(PAINTED)
    outer.order(restart=True)
    assert owner(outer) == "50000000", "a guest outlives its agent, and keeps its card"
    assert outer.screen("gpu0") == PAINTED
    (gpu,) = outer.order(stop=SID[:-1] + "4")["gpus"]
    assert (gpu["offered"], owner(outer)) == (True, "0"), "the next agent takes it back, and checks it"


def test_a_card_that_falls_off_its_bus_is_quarantined_over_a_restart_until_it_is_released(outer: OuterGuest) -> None:
    assert outer.order(launch=THIRD, gpu=CARD)["said"][-1]["phase"] == "running"
    outer.shell(
        f"printf '\\0' | dd of=/sys/bus/pci/devices/{BRIDGE}/config bs=1 seek=25 conv=notrunc"
    )  # its bus number
    (gpu,) = outer.order(stop=THIRD)["gpus"]
    assert (
        not gpu["offered"] and f"in quarantine: {CARD[0]} does not answer, {CARD[1]} does not answer" in gpu["problem"]
    )
    assert outer.order(launch=OTHER[:-1] + "5", gpu=CARD)["said"][-1]["reason"] == "gpu_unavailable"
    outer.shell(f"printf '\\1' | dd of=/sys/bus/pci/devices/{BRIDGE}/config bs=1 seek=25 conv=notrunc")
    (gpu,) = outer.order(restart=True)["gpus"]
    assert not gpu["offered"] and "does not answer" in gpu["problem"], "neither its return nor a restart lifts it"
    outer.shell(f"rm /tmp/df*/s/quarantine/{CARD[0]}.json")  # what `deskfleet-agent gpu release` does
    (gpu,) = outer.order(look=True)["gpus"]
    assert gpu["offered"], gpu["problem"]
