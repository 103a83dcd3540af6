"""Where templates are: sealed memory that outlives the agent, and nothing that is left of a half-made one."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deskfleet.agent.processes import arguments, pids, spawn
from deskfleet.agent.template_store import Files, Template, TemplateStore, copy_memory, new_memory
from deskfleet.schemas.machine import Drivers, Firmware, Format, Os, ReadyBy, Video
from deskfleet.schemas.template import Blueprint

BLUEPRINT = Blueprint(
    "desktop", Os.LINUX, "a" * 64, Format.QCOW2, Video.VIRTIO, Firmware.BIOS, Drivers.VIRTIO, 1, 4, 1, 2, 8,
    ReadyBy.MARK,
)  # fmt: skip
SID = "a" * 32


def store(folder: Path, boot_id: str = "b1") -> TemplateStore:
    return TemplateStore(folder, boot_id, spawn)


def keepers(memory: int) -> list[int]:
    """The processes, other than this one, that have this memory open."""
    inode = os.fstat(memory).st_ino

    def holds(pid: int) -> bool:
        try:
            return any(os.stat(link).st_ino == inode for link in Path(f"/proc/{pid}/fd").iterdir())
        except OSError:
            return False

    return [pid for pid in pids() if pid != os.getpid() and arguments(pid) == ["sleep", "infinity"] and holds(pid)]


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while arguments(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not arguments(pid)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "instant"
    for template in store(tmp_path / "instant").load(lambda _: None).values():
        store(tmp_path / "instant").remove(template)


def made(kept: TemplateStore, *, text: bytes = b"desktop", recorded: bool = True) -> Template:
    files = kept.draft(BLUEPRINT.key)
    kept.begun(files, SID)
    memory = kept.memory(BLUEPRINT.memory_mib)
    os.pwrite(memory, text, 1 << 20)
    template = kept.keep(BLUEPRINT, "seal", 1, 7, files, memory)
    deadline = time.monotonic() + 5
    while arguments(template.keeper) != ["sleep", "infinity"] and time.monotonic() < deadline:
        time.sleep(0.001)  # it is on its way to become that
    if recorded:
        kept.record(template)
    return template


def test_nobody_can_write_to_a_templates_memory_or_change_its_size(folder: Path) -> None:
    memory = made(store(folder)).memory
    again = os.open(f"/proc/self/fd/{memory}", os.O_RDWR)
    for forbidden in (
        lambda: os.pwrite(again, b"x", 0),
        lambda: os.ftruncate(again, 0),
        lambda: os.ftruncate(again, 8 << 20),
        lambda: mmap.mmap(again, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    ):
        with pytest.raises(PermissionError):
            forbidden()
    with mmap.mmap(again, 2 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as own:
        own[1 << 20 : (1 << 20) + 7] = b"changed"
        assert own[1 << 20 : (1 << 20) + 7] == b"changed"
    assert os.pread(memory, 7, 1 << 20) == b"desktop"
    os.close(again)


def test_memory_that_somebody_can_still_write_to_is_no_template(folder: Path) -> None:
    kept = store(folder)
    memory = kept.memory(4)
    with mmap.mmap(memory, 4096), pytest.raises(OSError):
        kept.keep(BLUEPRINT, "seal", 1, 7, kept.draft("0" * 16), memory)
    os.close(memory)


def test_a_template_outlives_the_agent(folder: Path) -> None:
    before = made(store(folder))
    os.close(before.memory)
    cleaned: list[str] = []
    (after,) = store(folder).load(cleaned.append).values()
    assert (after.blueprint, after.seal, after.ports, after.made_at, after.files) == (
        before.blueprint,
        "seal",
        1,
        7,
        before.files,
    )
    assert os.pread(after.memory, 7, 1 << 20) == b"desktop" and after.mib == 0
    assert not cleaned and keepers(after.memory) == [after.keeper]


def test_a_removed_one_leaves_nothing(folder: Path) -> None:
    kept = store(folder)
    template = made(kept)
    kept.remove(template)
    assert gone(template.keeper) and not list(folder.iterdir())


def test_of_one_that_was_in_the_making_nothing_is_left(folder: Path) -> None:
    template = made(store(folder), recorded=False)
    cleaned: list[str] = []
    assert store(folder).load(cleaned.append) == {}
    assert cleaned == [SID] and gone(template.keeper) and not list(folder.iterdir())


def test_when_the_keeper_is_gone_so_is_the_template(folder: Path) -> None:
    template = made(store(folder))
    os.kill(template.keeper, signal.SIGKILL)
    os.waitpid(template.keeper, 0)
    assert store(folder).load(lambda _: None) == {} and not list(folder.iterdir())


def test_after_a_reboot_there_is_none(folder: Path) -> None:
    template = made(store(folder))
    assert store(folder, "b2").load(lambda _: None) == {}
    assert gone(template.keeper) and not list(folder.iterdir())


def test_of_two_the_newer_one_counts(folder: Path) -> None:
    kept = store(folder)
    old = made(kept)
    files = kept.draft(BLUEPRINT.key)
    new = kept.keep(BLUEPRINT, "seal", 1, 8, files, kept.memory(4))
    kept.record(new)
    (found,) = store(folder).load(lambda _: None).values()
    assert found.made_at == 8 and found.files == files and gone(old.keeper)


@pytest.mark.parametrize(
    "record",
    ["", "{}", "[]", "null", '{"boot_id": "b1"}', '{"boot_id": "b1", "blueprint": {"machine": "../x"}}'],
)
def test_a_damaged_record_is_no_template(folder: Path, record: str) -> None:
    template = made(store(folder))
    (template.files.folder / "template.json").write_text(record)
    assert store(folder).load(lambda _: None) == {} and gone(template.keeper)


def test_what_only_looks_like_the_memory_is_not_taken(folder: Path) -> None:
    template = made(store(folder))
    path = template.files.folder / "template.json"
    other = new_memory("deskfleet-x", 4)
    keeper = spawn(["sleep", "infinity"], uid=None, cwd=Path("/"), log=folder / "log", fds=[other])
    text = path.read_text()
    path.write_text(
        text.replace(f'"keeper": {template.keeper}', f'"keeper": {keeper}').replace(
            f'"descriptor": {template.memory}', f'"descriptor": {other}'
        )
    )
    (folder / "log").unlink()
    assert store(folder).load(lambda _: None) == {} and gone(template.keeper)
    assert arguments(keeper), "a stranger's process is left alone"
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)


def test_two_agents_of_one_machine_leave_each_others_alone(folder: Path, tmp_path: Path) -> None:
    mine = made(store(folder))
    other = store(tmp_path / "other")
    theirs = made(other)
    assert len(store(folder).load(lambda _: None)) == 1
    assert arguments(mine.keeper) and arguments(theirs.keeper)
    other.remove(theirs)


def test_a_copy_shares_nothing_and_takes_no_more_than_was_touched() -> None:
    memory = new_memory("deskfleet-test", 64)
    for at in (0, 5 << 20, (64 << 20) - 4):
        os.pwrite(memory, b"page", at)
    copy = copy_memory(memory)
    assert os.fstat(copy).st_size == 64 << 20 and os.fstat(copy).st_blocks == os.fstat(memory).st_blocks
    assert [os.pread(copy, 4, at) for at in (0, 5 << 20, (64 << 20) - 4)] == [b"page"] * 3
    os.pwrite(copy, b"mine", 0)
    assert os.pread(memory, 4, 0) == b"page"
    os.close(copy)
    os.close(memory)


def test_files_are_where_forks_can_reach_and_not_list_them(folder: Path) -> None:
    files = store(folder).draft("0" * 16)
    assert isinstance(files, Files) and files.folder.parent == folder
    assert [path.stat().st_mode & 0o777 for path in (folder, files.folder)] == [0o711, 0o711]
