"""The journal on a real disk: what was stored comes back, and what a crash half-wrote does no harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deskfleet.agent.journal import Entry, FileJournal, JournalError
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import Firmware, Format, Os, Video
from deskfleet.schemas.messages import VmStart
from deskfleet.schemas.session import Outcome, Resources

SID = "1" * 32
START = VmStart(
    SID, 3, "经济", "tiny", Os.LINUX, "a" * 64, Format.QCOW2, Video.VIRTIO, Firmware.UEFI,
    Resources(1, 128, 1, 1, "A100"), ("0000:01:00.0",), True, 3600, 60, 600,
)  # fmt: skip
ENTRY = Entry(SID, 3, "boot", Phase.ENDED, START, True, 12.5, 99.0, Outcome.FAILED, Reason.QEMU_EXITED, "wörds")


def test_what_was_stored_comes_back(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "j")
    assert journal.load() == ({}, None)
    bare = Entry("2" * 32, 1, "boot", Phase.ENDED)
    for entry in (replace(ENTRY, phase=Phase.STARTING), ENTRY, bare):
        journal.put(entry)
    journal.set_generation(7)
    assert FileJournal(tmp_path / "j").load() == ({SID: ENTRY, bare.sid: bare}, 7)
    journal.forget(SID)
    journal.forget(SID)
    assert FileJournal(tmp_path / "j").load() == ({bare.sid: bare}, 7)
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o700


def test_a_half_written_file_of_a_crash_is_removed(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path)
    journal.put(ENTRY)
    (tmp_path / f"{SID}.tmp").write_text('{"sid": "1')
    assert journal.load()[0] == {SID: ENTRY}
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"sid": "x"}', '{"start": {}}', "\x00" * 100])
def test_a_damaged_entry_stops_the_agent_and_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / f"{SID}.json").write_text(content)
    with pytest.raises(JournalError, match="damaged"):
        FileJournal(tmp_path).load()


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("a file where the folder should be")
    with pytest.raises(JournalError, match="can't be"):
        FileJournal(tmp_path / "j").put(ENTRY)
    with pytest.raises(JournalError, match="can't be"):
        FileJournal(tmp_path / "j").load()
