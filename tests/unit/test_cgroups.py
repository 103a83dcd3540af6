"""The limits of guests, in a folder that stands for the kernel's."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deskfleet.agent.cgroups import GroupError, Groups, Size, missing, settings
from deskfleet.agent.processes import Limits, Process, spawn

SID = "a" * 32
SMALL = Size(2, 1024, emulated=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "deskfleet-guests.service"
    folder.mkdir()
    (folder / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    return folder


def test_what_a_guest_may_take() -> None:
    assert settings(SMALL) == {
        "cpu.max": "300000 100000",
        "cpu.weight": "200",
        "memory.max": str((1024 + 512) << 20),
        "memory.swap.max": str(1024 << 20),
        "memory.oom.group": "1",
        "pids.max": "260",
    }
    assert settings(Size(2, 1024, emulated=True))["memory.max"] == str((1024 + 512 + 1024) << 20)
    assert settings(Size(400, 1, emulated=False))["cpu.weight"] == "10000"


def test_a_group_for_each_guest_below_the_host_s(root: Path) -> None:
    groups = Groups(root, "h1")
    groups.prepare()
    for folder in (root, root / "h1"):
        assert (folder / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    group = groups.create(SID, SMALL)
    assert group == root / "h1" / SID
    assert (group / "memory.max").read_text() == str(1536 << 20)
    assert not (group / "memory.swap.max").exists(), "nothing is made up where the kernel has no such file"
    assert groups.present() == {SID}
    assert Groups(root, "h2").present() == set(), "another agent's guests are none of ours"


def test_without_controllers_nothing_is_limited_and_it_is_said(root: Path, tmp_path: Path) -> None:
    (root / "cgroup.controllers").write_text("cpu hugetlb\n")
    groups = Groups(root, "h1")
    with pytest.raises(GroupError, match="no control of memory, pids"):
        groups.prepare()
    group = groups.create(SID, SMALL)
    assert group and sorted(path.name for path in group.iterdir()) == ["cpu.max", "cpu.weight"]

    nowhere = Groups(tmp_path / "none", "h1")
    with pytest.raises(GroupError, match="no control group for guests"):
        nowhere.prepare()
    assert nowhere.create(SID, SMALL) is None and nowhere.remove(SID) and nowhere.present() == set()
    assert missing(tmp_path / "none").startswith("no control group")


def test_what_is_left_in_a_group_is_ended_before_it_goes(root: Path) -> None:
    groups = Groups(root, "h1")
    groups.prepare()
    assert groups.remove(SID), "there is none"
    group = groups.create(SID, SMALL)
    assert group
    assert not groups.remove(SID), "a folder with files in it stands for one with processes"
    assert (group / "cgroup.kill").read_text() == "1"


def started(tmp_path: Path, code: str, limits: Limits) -> str:
    log = tmp_path / "log"
    pid = spawn([sys.executable, "-c", code], uid=None, cwd=tmp_path, log=log, fds=[], limits=limits)
    process = Process.hold(pid)
    assert process
    process.reap()
    return log.read_text()


def test_a_program_starts_with_its_limits_and_under_its_own_pid(tmp_path: Path) -> None:
    code = "import os, resource as r; print(os.getpid(), r.getrlimit(r.RLIMIT_FSIZE), r.getrlimit(r.RLIMIT_MEMLOCK))"
    (tmp_path / "cgroup.procs").touch()
    said = started(tmp_path, code, Limits(1 << 20, 1 << 16, tmp_path))
    pid = (tmp_path / "cgroup.procs").read_text()
    assert said == f"{pid} {(1 << 20, 1 << 20)} {(1 << 16, 1 << 16)}\n"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1 << 20, "and not ours"


def test_a_file_at_its_limit_is_an_error_and_no_death(tmp_path: Path) -> None:
    code = "f = open('big', 'ab', 0)\nf.write(bytes(8192))\ntry: f.write(b'x')\nexcept OSError as e: print(e)"
    assert "File too large" in started(tmp_path, code, Limits(file_size=8192))
    assert (tmp_path / "big").stat().st_size == 8192
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN


def test_nothing_runs_outside_the_group_that_it_was_meant_for(tmp_path: Path) -> None:
    """The program would write a file after a second; it does not live so long."""
    code = "import time; time.sleep(1); open('lived', 'w')"
    with pytest.raises(OSError, match="gone"):
        spawn(
            [sys.executable, "-c", code],
            uid=None,
            cwd=tmp_path,
            log=tmp_path / "log",
            fds=[],
            limits=Limits(group=tmp_path / "gone"),
        )
    assert subprocess.run(["pgrep", "-f", "open('lived', 'w')"], check=False, capture_output=True).stdout == b""
