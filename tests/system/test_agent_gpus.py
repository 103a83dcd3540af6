"""The agent lends a GPU to real qemu on a machine whose PCI devices are made up: qemu finds no card there, and says so.

With a real card behind a real IOMMU: test_gpu_passthrough.py.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.guests import Host, build_tiny, scenario, short_folder
from support.sysfs import CARD, Pci

from deskfleet.agent.processes import Spawn, spawn
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu, Phase
from deskfleet.schemas.machine import Machine

SID, OTHER = "1" * 32, "2" * 32


@pytest.fixture(scope="module")
def images() -> Iterator[tuple[Path, Machine]]:
    with short_folder() as folder:
        machine = build_tiny(folder)
        yield folder / "images", machine


@pytest.fixture
def host(images: tuple[Path, Machine]) -> Iterator[Host]:
    with short_folder() as folder:
        yield Host(folder, images[1], images[0])


@pytest.fixture
def pci(tmp_path: Path) -> Pci:
    pci = Pci(tmp_path)
    pci.card(group=9)
    return pci


RESETS: list[str] = []


async def reset(gpu: Gpu, _dev: Path) -> str:
    """There is no card to be reset."""
    RESETS.append(gpu.address)
    return ""


async def begin(host: Host, pci: Pci, spawner: Spawn = spawn) -> Host:
    """Start the agent on a machine with this card, and wait until that is offered."""
    await host.start(spawner, pci.sys, pci.dev, reset)
    await host.until(lambda: [gpu.offered for gpu in host.heartbeats[-1].gpus] == [True], "the GPU to be offered")
    RESETS.clear()
    return host


def test_a_gpu_goes_all_the_way_to_qemu_and_back_into_use(host: Host, pci: Pci) -> None:
    async def work() -> None:
        async with await begin(host, pci):
            host.launch(SID, gpu_addresses=CARD)
            ended = await host.phase(SID, Phase.ENDED)
            assert ended.reason is Reason.QEMU_EXITED
            assert f"-device vfio-pci,host={CARD[0]}" in ended.detail
            assert (pci.dev / "vfio/9").stat().st_uid == 0, "taken back"
            assert len(RESETS) == 1
            assert [gpu.offered for gpu in host.service.lending.gpus(())] == [True], "fit again when its end was told"

    scenario(work)


def test_a_stop_while_the_gpu_is_checked_does_not_tell_the_end_before_it_is(host: Host, pci: Pci) -> None:
    async def work() -> None:
        checking, go_on = asyncio.Event(), asyncio.Event()

        async def slow(gpu: Gpu, dev: Path) -> str:
            checking.set()
            await go_on.wait()
            return await reset(gpu, dev)

        async with await begin(host, pci):
            host.service.lending._reset = slow
            host.launch(SID, gpu_addresses=CARD)
            await host.until(checking.is_set, "the check")
            host.stop(SID)
            await host.phase(SID, Phase.STOPPING)
            await asyncio.sleep(0.1)  # whatever would be told now
            assert host.service.agent.guests()[0].phase is Phase.STOPPING
            go_on.set()
            await host.phase(SID, Phase.ENDED)
            assert len(RESETS) == 1

    scenario(work)


def test_a_gpu_that_hangs_after_its_guest_is_given_to_nobody_else(host: Host, pci: Pci) -> None:
    def spoil(argv: Sequence[str], **how: Any) -> int:
        if "qemu-system" in argv[0]:
            (pci.function(CARD[1]) / "config").write_bytes(b"\xff" * 64)
        return spawn(argv, **how)

    async def work() -> None:
        async with await begin(host, pci, spoil):
            host.launch(SID, gpu_addresses=CARD)
            await host.phase(SID, Phase.ENDED)
            (gpu,) = host.heartbeats[-1].gpus
            assert not gpu.offered and f"in quarantine: {CARD[1]} does not answer" in gpu.problem
            host.launch(OTHER, gpu_addresses=CARD)
            assert (await host.phase(OTHER, Phase.ENDED)).reason is Reason.GPU_UNAVAILABLE

    scenario(work)


def test_i3_a_gpu_on_another_command_line_is_not_given_whatever_ledger_and_agent_believe(host: Host, pci: Pci) -> None:
    argv = [sys.executable, "-c", "input()", "-device", f"vfio-pci,host={CARD[1]},bus=gpu,addr=0x0.0x1"]

    async def work() -> None:
        async with await begin(host, pci):
            with subprocess.Popen(argv, stdin=subprocess.PIPE) as stranger:
                host.launch(SID, gpu_addresses=CARD)
                ended = await host.phase(SID, Phase.ENDED)
                assert stranger.stdin
                stranger.stdin.close()
            assert ended.reason is Reason.GPU_UNAVAILABLE
            assert ended.detail == f"process {stranger.pid} drives {CARD[1]}"
            assert [(pci.function(address) / "reset").read_text() for address in CARD] == ["", ""], (
                "not under its hands"
            )

    scenario(work)


def test_i3_a_gpu_whose_device_node_another_guest_owns_is_not_given(host: Host, pci: Pci) -> None:
    node = pci.dev / "vfio/9"

    async def work() -> None:
        async with await begin(host, pci):
            os.chown(node, 60_000_000, 0)
            host.launch(SID, gpu_addresses=CARD)
            ended = await host.phase(SID, Phase.ENDED)
            assert (ended.reason, ended.detail) == (Reason.GPU_UNAVAILABLE, f"{node}: lent to another guest")
            assert node.stat().st_uid == 60_000_000

    scenario(work)
