"""What guests' programs can't exceed, by a kernel that has all controllers: a small machine runs the agent's own code
from this one's disk, since control groups of version 2 may have none left here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import linux_guest
from support.guests import short_folder

#: In the small machine: this one's root, read-only, with a kernel's file systems of its own.
_ENTER = """
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 root /mnt
for name in dev proc sys; do mount --bind /$name /mnt/$name; done
mount -t cgroup2 none /mnt/sys/fs/cgroup
cat >/dev/work.py <<'PYTHON'
{code}
PYTHON
cd /mnt && chroot /mnt {python} /dev/work.py
"""
#: /dev is the one place there that can be written to.
_CODE = """
import sys, time
from pathlib import Path
from deskfleet.agent.cgroups import Groups, GroupError, Size
from deskfleet.agent.processes import Limits, Process, spawn

top = Path("/sys/fs/cgroup")
root = top / "guests"
root.mkdir()
groups = Groups(root, "h1")
try:
    groups.prepare()
except GroupError as error:
    print("lacks", str(error).split(" in ")[0])
(top / "cgroup.subtree_control").write_text("+cpu +memory +pids")
groups.prepare()
print("ready", sorted((root / "h1/cgroup.controllers").read_text().split()))

def start(code, group):
    how = Limits(group=group)
    pid = spawn([sys.executable, "-S", "-E", "-c", code], uid=None, cwd=Path("/"), log=Path("/dev/words"), fds=[], limits=how)
    return Process.hold(pid)

group = groups.create("a" * 32, Size(1, 16, emulated=False))
print("memory", (group / "memory.max").read_text().strip(), "cpu", (group / "cpu.max").read_text().strip())
helper = start("import time; time.sleep(600)", group)
hog = start("x = b'x' * (700 << 20); print('held')", group)
hog.reap()
helper.reap()  # its qemu is gone, so it goes as well
events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
print("oom", int(events["oom_group_kill"]), "held" in Path("/dev/words").read_text())

Path("/dev/words").write_text("")
code = "import threading, time\\nfor n in range(400): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
start(code, group).reap()
print("threads", "can't start new thread" in Path("/dev/words").read_text(), (group / "pids.events").read_text().split()[1] > "0")

helper = start("import time; time.sleep(600)", group)
before = groups.remove("a" * 32)
helper.reap()
while not groups.remove("a" * 32):
    time.sleep(0.01)
print("removed", not group.exists(), groups.present())
"""


@pytest.fixture(scope="module")
def linux() -> Iterator[Path]:
    with short_folder() as folder:
        yield linux_guest.build(folder)


def test_memory_and_threads_end_at_the_limit_and_a_group_goes_with_its_guest(linux: Path) -> None:
    code = f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n{_CODE}"
    with short_folder() as folder:
        script = _ENTER.format(code=code, python=sys.executable)
        out = folder / "out"
        options = linux_guest.options(linux, script, out)
        line = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "pc-q35-7.2", "-cpu", "max"]
        share = "local,id=root,path=/,security_model=none,multidevs=remap,readonly=on"
        line += ["-m", "1536", "-fsdev", share, "-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]
        subprocess.run([*line, *options], check=True, timeout=300)
        said = linux_guest.said(out)
    assert said == [
        "lacks no control of cpu, memory, pids",
        "ready ['cpu', 'memory', 'pids']",
        f"memory {528 << 20} cpu 200000 100000",
        "oom 1 False",
        "threads True True",
        "removed True set()",
        "== end",
    ]
