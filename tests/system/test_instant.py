"""Machines that are kept ready, on a real agent with real qemu: made, forked, adopted, given up, and nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.guests import PATIENCE, Host, build_tiny, scenario, short_folder
from support.qmp import Qmp
from support.screen import TINY_TEXT, look, region_hash
from support.uefi import COLOUR, painter

from deskfleet.agent.argv import OVMF_VARS
from deskfleet.agent.journal import Entry
from deskfleet.agent.processes import arguments, pids, spawn
from deskfleet.agent.qmp import monitor
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import Drivers, Firmware, Format, Instant, Machine, ReadyBy, Share, Size
from deskfleet.schemas.messages import HostTemplates, TemplateOrdered
from deskfleet.schemas.session import Birth, Resources
from deskfleet.schemas.template import Blueprint, TemplateOrder, TemplateReport, TemplateState, blueprints

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"template_still_s": 0.4, "template_load": 1000.0}


@pytest.fixture(scope="module")
def images() -> Iterator[tuple[Path, Machine]]:
    with short_folder() as folder:
        machine = build_tiny(folder)
        yield folder / "images", replace(machine, instant=Instant(ReadyBy.STILL, Share.MACHINE, (Size(1, 128),)))


def sid(number: int) -> str:
    return f"{number:032x}"


def host(folder: Path, images: tuple[Path, Machine], **settings: object) -> Host:
    return Host(folder, images[1], images[0], **{**SETTINGS, **settings})


def blueprint(images: tuple[Path, Machine]) -> Blueprint:
    return blueprints(images[1])[0]


async def keep(one: Host, *wanted: Blueprint) -> None:
    """Have these kept ready, and wait until they are."""
    one.send(HostTemplates("h1", f"{len(wanted):016x}", wanted))
    await one.until(lambda: len(ready(one)) == len(wanted), "the templates")


def ready(one: Host) -> list[TemplateReport]:
    return [each for each in one.heartbeats[-1].templates or () if each.serving]


async def fork(one: Host, number: int, key: str, **changes: object) -> Birth | None:
    one.launch(sid(number), template=key, **changes)
    return (await one.phase(sid(number), Phase.RUNNING)).birth


def process(number: int) -> psutil.Process:
    """The qemu of a guest."""
    uuid = re.sub("(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", sid(number))
    return next(
        psutil.Process(pid) for pid in pids() if "qemu" in "".join(arguments(pid)[:1]) and uuid in arguments(pid)
    )


def keepers() -> set[int]:
    return {pid for pid in pids() if arguments(pid) == ["sleep", "infinity"]}


def ours(folder: Path) -> list[list[str]]:
    """The programs that run for this folder's agent."""
    return [line for pid in pids() if (line := arguments(pid)) and str(folder) in " ".join(line)]


async def peripherals(one: Host, number: int) -> dict[str, str]:
    async with monitor(one.run / sid(number) / "rescue.sock") as qemu:
        found = await qemu.command("qom-list", {"path": "/machine/peripheral"})
        return {child["name"]: child["type"] for child in found}


def test_a_machine_is_booted_once_and_forked(images: tuple[Path, Machine]) -> None:
    async def work() -> None:
        before = keepers()
        with short_folder() as folder:
            async with await host(folder, images).start() as one:
                key = blueprint(images).key
                assert await fork(one, 1, key) is Birth.NO_TEMPLATE, "nobody waits for a template"
                await keep(one, blueprint(images))
                (kept,) = ready(one)
                assert 0 < kept.mib <= 128 and kept.machine == "tiny"
                assert len(keepers() - before) == 1
                for number in (2, 3):
                    assert await fork(one, number, key) is Birth.FORKED
                await one.until(lambda: ready(one) and ready(one)[0].forks == 2, "the forks to be counted")
                # Each shows the picture of the template, reacts by itself, and has a card of its own.
                seen = {}
                for number in (2, 3):
                    qmp = Qmp(one.run / sid(number) / "rescue.sock")
                    seen[number] = region_hash(look(qmp), TINY_TEXT)
                    qmp.close()
                assert seen[2] == seen[3]
                with contextlib.closing(Qmp(one.run / sid(2) / "rescue.sock")) as qmp:
                    qmp.type("mine")
                    deadline = time.monotonic() + PATIENCE
                    while region_hash(look(qmp), TINY_TEXT) == seen[2]:
                        assert time.monotonic() < deadline
                        await asyncio.sleep(0.05)
                with contextlib.closing(Qmp(one.run / sid(3) / "rescue.sock")) as qmp:
                    assert region_hash(look(qmp), TINY_TEXT) == seen[3]
                macs = set()
                for number in (2, 3):
                    await until_plugged(one, number)
                    async with monitor(one.run / sid(number) / "rescue.sock") as qemu:
                        macs.add(await qemu.command("qom-get", {"path": "/machine/peripheral/card", "property": "mac"}))
                assert len(macs) == 2
                for number in (1, 2, 3):
                    one.stop(sid(number))
                    await one.phase(sid(number), Phase.ENDED)
                assert not one.leftovers()
                await keep(one)
                assert keepers() == before and not list((folder / "s/instant").iterdir())

    scenario(work)


async def until_plugged(one: Host, number: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while "card" not in await peripherals(one, number):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def test_a_fork_grows_to_the_size_that_was_asked_for(images: tuple[Path, Machine]) -> None:
    async def work() -> None:
        with short_folder() as folder:
            async with await host(folder, images).start() as one:
                await keep(one, blueprint(images))
                assert await fork(one, 1, blueprint(images).key, resources=Resources(2, 384, 3)) is Birth.FORKED
                async with monitor(one.run / sid(1) / "rescue.sock") as qemu:
                    cpus = await qemu.command("query-cpus-fast")
                    memory = await qemu.command("query-memory-size-summary")
                    (disk,) = [d for d in await qemu.command("query-named-block-nodes") if d["node-name"] == "disk"]
                assert len(cpus) == 2
                assert memory["base-memory"] + memory["plugged-memory"] == 384 << 20
                assert disk["image"]["virtual-size"] == 3 << 30
                # What can't be forked boots: a smaller size, and one that memory can't be added up to.
                assert await fork(one, 2, blueprint(images).key, resources=Resources(1, 64, 1)) is Birth.NO_TEMPLATE
                assert await fork(one, 3, blueprint(images).key, resources=Resources(1, 200, 1)) is Birth.NO_TEMPLATE

    scenario(work)


def test_eight_forks_and_their_template_are_adopted(images: tuple[Path, Machine]) -> None:
    async def work() -> None:
        with short_folder() as folder:
            one = await host(folder, images).start()
            await keep(one, blueprint(images))
            key = blueprint(images).key
            for number in range(8):
                assert await fork(one, number, key) is Birth.FORKED
            running = {number: process(number).pid for number in range(8)}
            await one.end()
            async with await host(folder, images).start() as again:
                again.generation = one.generation
                await again.until(lambda: len(ready(again)) == 1, "the template")
                assert {number: process(number).pid for number in range(8)} == running
                reports = {guest.sid: guest for guest in again.service.agent.guests()}
                assert {reports[sid(n)].birth for n in range(8)} == {Birth.FORKED}
                assert {reports[sid(n)].phase for n in range(8)} == {Phase.RUNNING}
                assert await fork(again, 8, key) is Birth.FORKED, "the old template serves"
                for number in range(9):
                    again.stop(sid(number))
                for number in range(9):
                    await again.phase(sid(number), Phase.ENDED)
                assert not again.leftovers()

    scenario(work)


def failing(*, on: str, times: int) -> Any:
    """A spawner whose qemu has an option that it can't take, so often, when its line has the word `on`."""
    left = [times]

    def start(argv: Sequence[str], **how: Any) -> int:
        line = list(argv)
        if on in line and left[0]:
            left[0] -= 1
            line.append("-no-such-option")
        return spawn(line, **how)

    return start


def test_a_machine_with_uefi_is_forked_with_variables_of_its_own(images: tuple[Path, Machine]) -> None:
    async def work() -> None:
        with short_folder() as folder:
            place = folder / "i"
            place.mkdir()
            painter(folder, folder / "disk.raw")
            line = [
                "qemu-img",
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                str(folder / "disk.raw"),
                str(place / "disk.qcow2"),
            ]
            subprocess.run(line, check=True)
            (place / "disk.qcow2").chmod(0o644)
            digest = hashlib.sha256((place / "disk.qcow2").read_bytes()).hexdigest()
            machine = replace(
                images[1],
                file="disk.qcow2",
                format=Format.QCOW2,
                sha256=digest,
                firmware=Firmware.UEFI,
                drivers=Drivers.VIRTIO,
            )
            (wanted,) = blueprints(machine)
            # The firmware's own screens stand still for a while as well.
            async with await host(folder, (place, machine), template_still_s=8.0).start() as one:
                await keep(one, wanted)
                for number in (1, 2):
                    assert await fork(one, number, wanted.key) is Birth.FORKED
                    with contextlib.closing(Qmp(one.run / sid(number) / "rescue.sock")) as qmp:
                        assert look(qmp).getpixel((400, 300)) == COLOUR
                first, second = (one.run / sid(number) / "vars.fd" for number in (1, 2))
                assert first.read_bytes() == second.read_bytes() != OVMF_VARS.read_bytes(), "as the template left them"
                assert first.stat().st_uid != second.stat().st_uid and first.stat().st_mode & 0o777 == 0o600

    scenario(work)


def test_whatever_is_wrong_with_a_template_the_launch_is_booted(images: tuple[Path, Machine]) -> None:
    async def work() -> None:
        with short_folder() as folder:
            one = await host(folder, images).start()
            await keep(one, blueprint(images))
            await one.end()
            async with await host(folder, images).start(spawner=failing(on="-incoming", times=3)) as again:
                again.generation = one.generation
                key = blueprint(images).key
                await again.until(lambda: len(ready(again)) == 1, "the template")
                for number in range(3):
                    assert await fork(again, number, key) is Birth.FORK_FAILED
                assert await fork(again, 3, key) is Birth.TEMPLATE_RESTS
                (said,) = again.heartbeats[-1].templates or ()
                assert said.state is TemplateState.RESTING and "qemu ended" in said.detail
                again.send(TemplateOrdered("h1", key, TemplateOrder.REBUILD, "root"))
                await again.until(lambda: len(ready(again)) == 1, "a new template")
                assert await fork(again, 4, key) is Birth.FORKED

    scenario(work)


@pytest.mark.parametrize("damage", ["state", "blank.qcow2", "disk.qcow2"])
def test_a_damaged_template_costs_nobody_the_launch(images: tuple[Path, Machine], damage: str) -> None:
    async def work() -> None:
        with short_folder() as folder:
            async with await host(folder, images).start() as one:
                await keep(one, blueprint(images))
                (file,) = (folder / "s/instant").glob(f"*/{damage}")
                file.unlink()
                file.write_bytes(b"nonsense")
                assert await fork(one, 1, blueprint(images).key) is Birth.FORK_FAILED
                one.stop(sid(1))
                await one.phase(sid(1), Phase.ENDED)
                assert not one.leftovers()

    scenario(work)


def test_a_template_that_can_not_be_made_leaves_nothing(images: tuple[Path, Machine]) -> None:
    async def work() -> None:
        before = keepers()
        with short_folder() as folder:
            async with await host(folder, images).start(spawner=failing(on="-incoming", times=99)) as one:
                one.send(HostTemplates("h1", "1" * 16, (blueprint(images),)))
                failed = TemplateState.FAILED
                await one.until(
                    lambda: [t.state for t in one.heartbeats[-1].templates or ()] == [failed], "the template to fail"
                )
                assert keepers() == before and not one.leftovers()
                assert not list((folder / "s/instant").iterdir())
                assert await fork(one, 1, blueprint(images).key) is Birth.NO_TEMPLATE

    scenario(work)


def memory_holds(pid: int, words: bytes) -> bool:
    """Whether the private and shared memory of a process holds these bytes, in the pages that it has at all."""
    with (
        open(f"/proc/{pid}/maps") as maps,
        open(f"/proc/{pid}/mem", "rb") as memory,
        open(f"/proc/{pid}/pagemap", "rb") as pages,
    ):
        for line in maps:
            place, rights, *rest = line.split(maxsplit=5)
            if not rights.startswith("rw") or "[v" in rest[-1]:
                continue
            first, last = (int(part, 16) // mmap.PAGESIZE for part in place.split("-"))
            pages.seek(8 * first)
            entries = array("Q", pages.read(8 * (last - first)))
            for there, run in groupby(range(len(entries)), lambda at: bool(entries[at] >> 62)):  # noqa: B023
                if not there:  # neither in memory nor swapped out: Documentation/admin-guide/mm/pagemap.rst
                    continue
                held = list(run)
                with contextlib.suppress(OSError):
                    memory.seek((first + held[0]) * mmap.PAGESIZE)
                    if words in memory.read(len(held) * mmap.PAGESIZE):
                        return True
    return False


def test_nothing_of_one_fork_is_in_another_or_in_the_template(images: tuple[Path, Machine]) -> None:
    async def work() -> None:
        with short_folder() as folder:
            async with await host(folder, images).start() as one:
                await keep(one, blueprint(images))
                key, canary = blueprint(images).key, "canaryofoneperson"
                await fork(one, 0, key)
                with contextlib.closing(Qmp(one.run / sid(0) / "rescue.sock")) as qmp:
                    qmp.type(canary)
                deadline = time.monotonic() + PATIENCE
                while not memory_holds(process(0).pid, canary.encode()):
                    assert time.monotonic() < deadline, "the canary is nowhere: this test would find nothing"
                    await asyncio.sleep(0.2)
                for number in range(1, 21):
                    assert await fork(one, number, key) is Birth.FORKED
                others = [number for number in range(1, 21) if memory_holds(process(number).pid, canary.encode())]
                assert not others
                template = one.service._templates.slots[key].template  # type: ignore[union-attr]
                assert template
                with mmap.mmap(template.memory, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as whole:
                    assert whole.find(canary.encode()) < 0
                for path in [*template.files.folder.iterdir(), *(folder / "s/disks").iterdir()]:
                    if path.name != f"{sid(0)}.qcow2":
                        assert canary.encode() not in path.read_bytes()

    scenario(work)


def test_forks_that_share_nothing_have_memory_of_their_own(images: tuple[Path, Machine]) -> None:
    async def work() -> None:
        machine = replace(images[1], instant=Instant(ReadyBy.STILL, Share.NEVER, (Size(1, 128),)))
        with short_folder() as folder:
            async with await host(folder, (images[0], machine)).start() as one:
                (wanted,) = blueprints(machine)
                await keep(one, wanted)
                files = set()
                for number in (1, 2):
                    assert await fork(one, number, wanted.key) is Birth.FORKED
                    maps = Path(f"/proc/{process(number).pid}/maps").read_text()
                    (line,) = [line for line in maps.splitlines() if "memfd:deskfleet" in line]
                    assert line.split()[1] == "rw-s"
                    files.add(line.split()[4])
                template = one.service._templates.slots[wanted.key].template  # type: ignore[union-attr]
                assert template and str(os.fstat(template.memory).st_ino) not in files and len(files) == 2

    scenario(work)


def test_fifty_forks_one_after_another_leave_no_trace(images: tuple[Path, Machine]) -> None:
    async def work() -> None:
        with short_folder() as folder:
            async with await host(folder, images, powerdown_s=0.0).start() as one:
                await keep(one, blueprint(images))
                agent, key = psutil.Process(), blueprint(images).key

                def figures() -> tuple[int, int, int]:
                    return agent.num_fds(), len(agent.children()), len(asyncio.all_tasks())

                begun = figures()
                for number in range(50):
                    assert await fork(one, number, key) is Birth.FORKED
                    one.stop(sid(number))
                    await one.phase(sid(number), Phase.ENDED)
                await one.until(lambda: figures() == begun, "descriptors, children and tasks as before the first")
                assert not one.leftovers() and len(ready(one)) == 1
                assert len(list((folder / "s/instant").iterdir())) == 1

    scenario(work)


def runs(entry: Entry) -> bool:
    return entry.phase is Phase.RUNNING or not entry.live


AGENT = """
import asyncio, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from test_instant import blueprint, fork, host, images_of, keep
async def main():
    images = images_of(Path({images!r}))
    one = await host(Path({folder!r}), images).start()
    print("started", flush=True)
    await keep(one, blueprint(images))
    print("kept", flush=True)
    for number in range(1000):
        await fork(one, number, blueprint(images).key)
        print("forked", flush=True)
asyncio.run(main())
"""


def images_of(folder: Path) -> tuple[Path, Machine]:
    """What the fixture has built, for another process."""
    from deskfleet.schemas.machine import parse_machine

    machine = parse_machine("tiny", (folder.parent / "catalogue/tiny.toml").read_text())
    return folder, replace(machine, instant=Instant(ReadyBy.STILL, Share.MACHINE, (Size(1, 128),)))


@pytest.mark.parametrize(
    ("after", "seconds"),
    [("started", 0.3), ("started", 1.2), ("started", 2.4), ("kept", 0.02), ("kept", 0.06), ("forked", 0.05)],
)
def test_an_agent_that_is_killed_while_it_makes_or_forks_leaves_nothing(
    images: tuple[Path, Machine], after: str, seconds: float
) -> None:
    async def work() -> None:
        before = keepers()
        with short_folder() as folder:
            paths = [str(ROOT / "tests"), str(ROOT / "tests/system"), str(ROOT / "deploy"), str(ROOT)]
            code = AGENT.format(paths=paths, images=str(images[0]), folder=str(folder))
            first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            assert first.stdout
            for line in first.stdout:
                if line.strip() == after:
                    break
            time.sleep(seconds)
            first.send_signal(signal.SIGKILL)
            first.wait()
            first.stdout.close()
            async with await host(folder, images).start() as again:
                again.generation = 2000
                # What was being forked runs in the end, forked or booted.
                await again.until(lambda: all(runs(entry) for entry in again.service.agent.entries), "all to run")
                await keep(again, blueprint(images))
                assert await fork(again, 900, blueprint(images).key) is Birth.FORKED
                for entry in again.service.agent.entries:
                    if entry.live:
                        again.stop(entry.sid)
                        await again.phase(entry.sid, Phase.ENDED)
                assert not again.leftovers()
                assert len(list((folder / "s/instant").iterdir())) == 1 and len(keepers() - before) == 1
                await keep(again)
            assert keepers() == before
            assert not [line for line in ours(folder) if "qemu" in line[0]]

    scenario(work)


assert shutil.which("qemu-system-x86_64"), "the system tests need qemu"
