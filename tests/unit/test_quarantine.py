"""A GPU between two guests: looked at, reset, looked at again; and kept out of use when it is not fit."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.sysfs import CARD, Pci

from deskfleet.agent import lending
from deskfleet.agent.__main__ import main
from deskfleet.agent.gpus import find_gpus
from deskfleet.agent.lending import GpuLending
from deskfleet.agent.quarantine import Function, NotKept, Record, Ward, fault, look
from deskfleet.schemas.host import Gpu

FINE = Function(CARD[0], True, "vfio-pci", "7", 0x10DE, 0x10DE, True, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"present": False}, "is gone from its bus"),
        ({"driver": ""}, "is bound to no driver"),
        ({"driver": "nvidia"}, "is bound to nvidia"),
        ({"group": "8"}, "moved to IOMMU group 8"),
        ({"group": ""}, r"moved to IOMMU group (none)"),
        ({"vendor": None}, "can't be read"),
        ({"vendor": 0xFFFF}, "does not answer"),
        ({"vendor": 0xFFFF, "id": 0xFFFF}, "does not answer"),
        ({"vendor": 0x0000}, "does not answer"),
        ({"id": None}, "does not answer"),
        ({"resettable": False}, "can't be reset"),
        ({"node_uid": None}, "has no device node"),
        ({"node_uid": 200_000}, "still belongs to user 200000"),
    ],
)
def test_each_fault_has_its_words_and_names_the_function(change: dict[str, object], said: str) -> None:
    other = replace(FINE, address=CARD[1])
    assert fault([FINE, other], 7) == ""
    found = fault([FINE, replace(other, **change)], 7)  # type: ignore[arg-type]
    assert found.startswith(CARD[1]) and said in found


def test_what_is_looked_at_is_what_sysfs_shows(tmp_path: Path) -> None:
    pci = Pci(tmp_path)
    pci.card()
    assert look(CARD[0], CARD, pci.sys, pci.dev) == FINE
    (pci.dev / "vfio/7").unlink()
    (pci.function(CARD[0]) / "config").write_bytes(b"\xff" * 64)
    assert look(CARD[0], CARD, pci.sys, pci.dev) == replace(FINE, vendor=0xFFFF, node_uid=None)
    pci.remove(CARD[0])
    assert look(CARD[0], CARD, pci.sys, pci.dev) == Function(CARD[0], present=False)


class Bench:
    """One card, and an agent's lending of it."""

    def __init__(self, folder: Path) -> None:
        self.pci = Pci(folder)
        self.pci.card()
        self.ward = folder / "quarantine"
        self.resets = 0
        self.resetting = False
        self.slow_s = 0.0
        self.at_reset: Callable[[], object] = lambda: ""
        self.changes = 0
        self.held: set[str] = set()
        self.driven: set[str] = set()
        self.begin()

    def begin(self, boot_id: str = "boot-1") -> None:
        """A new life of the agent."""

        def changed() -> None:
            self.changes += 1

        async def reset(gpu: Gpu, dev: Path) -> str:
            assert (gpu.functions, dev) == (CARD, self.pci.dev)
            assert not self.resetting, "VFIO gives a group to one process only"
            self.resets += 1
            self.resetting = True
            said = self.at_reset()
            await asyncio.sleep(0)  # a reset takes its time
            self.resetting = False
            return said if isinstance(said, str) else ""

        self.lending = GpuLending(
            self.ward,
            boot_id,
            {},
            sysfs=self.pci.sys,
            dev=self.pci.dev,
            changed=changed,
            reset=reset,
            driven=self._driven,
        )

    def _driven(self) -> set[str]:
        time.sleep(self.slow_s)
        return self.driven

    def refresh(self) -> None:
        asyncio.run(self.lending.refresh(lambda: self.held))

    def use(self, spoil: Callable[[], object] = lambda: None) -> None:
        """A guest takes the card and gives it back."""
        self.lending.lent(CARD)
        self.held = set(CARD)
        assert self.gpu.offered, "in use is not unfit"
        spoil()
        asyncio.run(self.lending.returned(CARD))
        self.held = set()

    @property
    def gpu(self) -> Gpu:
        (gpu,) = self.lending.gpus(self.held)
        return gpu


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_card_is_offered_once_it_was_checked_and_again_after_each_use(bench: Bench) -> None:
    assert not bench.gpu.offered and "being checked" in bench.gpu.problem
    bench.refresh()
    assert bench.gpu.offered and bench.resets == 1 and bench.changes == 1
    bench.refresh()
    assert bench.resets == 1, "once is enough"
    bench.use()
    assert bench.gpu.offered and bench.resets == 2


def test_a_card_is_not_offered_while_it_is_checked(bench: Bench) -> None:
    bench.refresh()
    seen: list[bool] = []

    def reset() -> None:
        bench.held = set()  # as if its end had been told already
        seen.append(bench.gpu.offered)

    bench.at_reset = reset
    bench.use()
    assert seen == [False] and bench.gpu.offered


def test_a_look_around_while_a_card_comes_back_checks_it_no_second_time(bench: Bench) -> None:
    async def both() -> None:
        await asyncio.gather(*(bench.lending.refresh(lambda: ()) for _ in range(2)), bench.lending.returned(CARD))

    bench.refresh()
    bench.lending.lent(CARD)
    bench.slow_s = 0.05  # many processes to look through
    asyncio.run(both())
    assert bench.resets == 2 and bench.gpu.offered and bench.lending.in_quarantine == 0


def test_a_card_that_was_away_is_checked_when_it_is_back(bench: Bench) -> None:
    bench.refresh()
    bench.pci.bind(CARD[1], "snd_hda_intel")
    bench.refresh()
    assert not bench.gpu.offered and bench.lending.in_quarantine == 0
    bench.pci.bind(CARD[1], "vfio-pci")
    bench.refresh()
    assert bench.gpu.offered and bench.resets == 2


def test_a_card_in_use_is_never_reset_by_the_look_around(bench: Bench) -> None:
    bench.held = set(CARD)
    bench.lending.lent(CARD)
    bench.refresh()
    assert bench.resets == 0


def test_a_card_that_a_process_drives_is_neither_reset_nor_offered_nor_given_up(bench: Bench) -> None:
    bench.driven = {CARD[1]}
    bench.refresh()
    assert bench.resets == 0 and not bench.gpu.offered and bench.lending.in_quarantine == 0
    bench.driven = set()
    bench.refresh()
    assert bench.gpu.offered


@pytest.mark.parametrize("when", ["while in use", "by the reset"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda pci: (pci.function(CARD[1]) / "config").write_bytes(b"\xff" * 64), f"{CARD[1]} does not answer"),
        (lambda pci: pci.remove(CARD[1]), f"{CARD[1]} is gone"),
        (lambda pci: [pci.remove(address) for address in CARD], f"{CARD[0]} is gone"),
        (lambda pci: pci.bind(CARD[0], "nouveau"), "is bound to nouveau"),
        (lambda pci: (pci.dev / "vfio/7").unlink(), "has no device node"),
    ],
)
def test_a_card_that_comes_back_spoilt_is_kept_until_it_is_released(
    bench: Bench, spoil: Callable[[Pci], object], said: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench.refresh()
    with caplog.at_level(logging.ERROR):
        if when == "while in use":
            bench.use(lambda: spoil(bench.pci))
            assert bench.resets == 1, "what can be seen to be broken is left alone"
        else:
            bench.at_reset = lambda: spoil(bench.pci)
            bench.use()
    assert not bench.gpu.offered and bench.gpu.address == CARD[0] and said in bench.gpu.problem
    assert "in quarantine" in bench.gpu.problem and "goes into quarantine" in caplog.text
    assert bench.lending.in_quarantine == 1
    bench.refresh()
    bench.begin()
    bench.refresh()
    assert said in bench.gpu.problem, "neither time nor a restart of the agent lifts it"


def test_a_reset_that_fails_is_a_fault(bench: Bench) -> None:
    bench.refresh()
    bench.at_reset = lambda: "can't be reset: Inappropriate ioctl"
    bench.use()
    assert bench.gpu.problem == "in quarantine: can't be reset: Inappropriate ioctl"


def test_a_card_that_was_released_is_checked_before_it_is_offered(bench: Bench) -> None:
    bench.refresh()
    bench.at_reset = lambda: "is broken"
    bench.use()
    Ward(bench.ward).release(CARD[0])
    bench.refresh()
    assert "is broken" in bench.gpu.problem, "it still is"
    bench.at_reset = lambda: ""
    Ward(bench.ward).release(CARD[0])
    assert not bench.gpu.offered, "not before the agent has looked"
    bench.refresh()
    assert bench.gpu.offered and bench.lending.in_quarantine == 0


@pytest.mark.parametrize(("mended", "offered"), [(True, True), (False, False)])
def test_a_restart_of_the_host_lifts_it_but_not_without_a_check(bench: Bench, mended: bool, offered: bool) -> None:
    bench.refresh()
    bench.at_reset = lambda: "is broken"
    bench.use()
    bench.begin("boot-2")
    assert bench.lending.in_quarantine == 0 and not bench.gpu.offered
    if mended:
        bench.at_reset = lambda: ""
    bench.refresh()
    assert bench.gpu.offered is offered


def test_a_quarantine_that_the_disk_does_not_take_holds_for_this_life(bench: Bench) -> None:
    bench.refresh()
    bench.ward.write_text("in the way of the folder")
    bench.at_reset = lambda: "is broken"
    bench.use()
    bench.at_reset = lambda: ""
    bench.refresh()
    assert "is broken" in bench.gpu.problem


def test_a_record_that_can_t_be_read_keeps_its_card_out_of_use(bench: Bench) -> None:
    bench.ward.mkdir()
    (bench.ward / f"{CARD[0]}.json").write_text("{")
    bench.begin("boot-2")
    bench.refresh()
    assert not bench.gpu.offered and "can't be read" in bench.gpu.problem


def test_only_what_is_in_quarantine_can_be_released(tmp_path: Path) -> None:
    ward = Ward(tmp_path / "q")
    with pytest.raises(NotKept, match="no GPU is in quarantine"):
        ward.release(CARD[0])
    record = Record(Gpu(CARD[0], "A100", 7, CARD, False), "is broken", "boot-1")
    ward.put(record)
    assert ward.load() == {CARD[0]: record}
    with pytest.raises(NotKept, match=CARD[0]):
        ward.release("../../etc/passwd")
    ward.release(CARD[0])
    assert ward.load() == {}


# --- the real reset, as far as it goes without a card (test_gpu_passthrough.py has one)


def a_gpu(pci: Pci) -> Gpu:
    (gpu,) = find_gpus(pci.sys)
    return gpu


def test_a_reset_that_is_refused_says_why(tmp_path: Path) -> None:
    pci = Pci(tmp_path)
    pci.card()
    assert asyncio.run(lending.reset(a_gpu(pci), pci.dev)) == "is not given by VFIO: No such file or directory"
    (pci.dev / "vfio/vfio").touch()
    said = asyncio.run(lending.reset(a_gpu(pci), pci.dev))
    assert said == "is not given by VFIO: Inappropriate ioctl for device"


def test_a_reset_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pci = Pci(tmp_path)
    pci.card()
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\nexec sleep 60\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hangs))
    monkeypatch.setattr(lending, "RESET_S", 0.2)
    assert "does not come back from a reset" in asyncio.run(lending.reset(a_gpu(pci), pci.dev))


# --- the administrator's command


def test_an_administrator_lists_and_releases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "deskfleet.toml"
    config.write_text(
        f'[agent]\nhost = "h1"\nbroker_url = "amqp://unused"\nconsole_address = "h1:6080"\nstate = "{tmp_path}"\n'
    )
    config.chmod(0o600)

    def gpu(*words: str) -> tuple[int, str]:
        code = main(["--config", str(config), "gpu", *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    assert gpu("list") == (0, "no GPU is in quarantine\n")
    Ward(tmp_path / "quarantine").put(Record(Gpu(CARD[0], "A100", 7, CARD, False), "is broken", "boot-1"))
    assert gpu("list") == (0, f"{CARD[0]} A100: is broken\n")
    code, said = gpu("release", CARD[1])
    assert code == 2 and f"in quarantine: {CARD[0]}" in said
    code, said = gpu("release", CARD[0])
    assert code == 0 and "is released" in said
    assert gpu("list") == (0, "no GPU is in quarantine\n")
    assert gpu()[0] == gpu("release")[0] == 2
