"""What guests can't take: more memory and threads than they were given, more of a disk than there is, locked memory."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support import linux_guest
from support.guests import Host, build_tiny, scenario, short_folder, with_options

from deskfleet.agent import stalls
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import Drivers, Machine, Os

# A small machine, whose kernel has all controllers, runs the agent's own code from this one's disk: control groups of
# version 2 may have none left here.
#: There: this one's root, read-only, with a kernel's file systems of its own.
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

words = Path("/dev/words")
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
    line = [sys.executable, "-S", "-E", "-c", code]
    how = Limits(group=group)
    return Process.hold(spawn(line, uid=None, cwd=Path("/"), log=words, fds=[], limits=how))

group = groups.create("a" * 32, Size(1, 16, emulated=False))
print("memory", (group / "memory.max").read_text().strip(), "cpu", (group / "cpu.max").read_text().strip())
helper = start("import time; time.sleep(600)", group)
hog = start("x = b'x' * (700 << 20); print('held')", group)
hog.reap()
helper.reap()  # its qemu is gone, so it goes as well
events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
print("oom", int(events["oom_group_kill"]), "held" in words.read_text())

words.write_text("")
code = "from threading import Thread; import time"
code += "\\nfor n in range(400): Thread(target=time.sleep, args=(600,), daemon=True).start()"
start(code, group).reap()
refused = int((group / "pids.events").read_text().split()[1])
print("threads", "can't start new thread" in words.read_text(), refused > 0)

helper = start("import time; time.sleep(600)", group)
before = groups.remove("a" * 32)
helper.reap()
while not groups.remove("a" * 32):
    time.sleep(0.01)
print("removed", not group.exists(), groups.present())
"""


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


# --- disks --------------------------------------------------------------------------------------------------

SID, OTHER = "b" * 32, "c" * 32
#: Writes more than there is room for, reads it again, and writes on for ever.
_FILL = """
yes 0123456789abcde | head -c 40000000 >/dev/vda
sync
echo written
echo 3 >/proc/sys/vm/drop_caches
head -c 40000000 /dev/vda | md5sum
yes 0123456789abcde | head -c 40000000 | md5sum
yes 0123456789abcde >/dev/vda
"""


@pytest.fixture(scope="module")
def images() -> Iterator[tuple[Path, Machine]]:
    with short_folder() as folder:
        machine = build_tiny(folder)
        yield folder / "images", machine


@pytest.fixture
def host(images: tuple[Path, Machine]) -> Iterator[Host]:
    """A host whose disks are on a small file system."""
    with short_folder() as folder:
        disks = folder / "s/disks"
        disks.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M,mode=711", "tmpfs", disks], check=True)
        yield Host(folder, images[1], images[0], disk_floor_mib=0, powerdown_s=0)
        subprocess.run(["umount", "-l", disks], check=True)


def test_c28_a_guest_that_fills_the_disk_pauses_says_so_and_goes_on_when_there_is_room(host: Host, linux: Path) -> None:
    out, disks = host.folder / "out", host.folder / "s/disks"

    async def work() -> None:
        async with await host.start(linux_guest.running(linux, _FILL, out)):
            host.launch(SID, os=Os.LINUX, drivers=Drivers.VIRTIO)
            await host.until(lambda: said(host, SID) == stalls.FULL, "the pause")
            assert linux_guest.said(out) == []
            with suppress(OSError), (disks / "ballast").open("wb", 0) as rest:
                while True:
                    rest.write(bytes(4096))
            host.launch(OTHER, os=Os.LINUX)
            assert (await host.phase(OTHER, Phase.ENDED)).reason is Reason.NO_SPACE
            subprocess.run(["mount", "-o", "remount,size=100M", disks], check=True)
            await host.until(lambda: said(host, SID) == "", "the guest to go on")
            await host.until(lambda: len(linux_guest.said(out)) == 3, "all that it wrote")
            written, read, wanted = linux_guest.said(out)
            assert written == "written" and read == wanted
            await host.until(lambda: said(host, SID) == stalls.FULL, "the next pause")
            host.stop(SID)
            assert (await host.phase(SID, Phase.ENDED)).reason is Reason.STOPPED_BY_USER
            (disks / "ballast").unlink()
            assert host.leftovers() == []

    scenario(work)


def said(host: Host, sid: str) -> str | None:
    """What people are told of a guest, by its last report."""
    return next((report.detail for report in reversed(host.reports) if report.sid == sid), None)


def test_c28_below_the_floor_nothing_starts(images: tuple[Path, Machine]) -> None:
    with short_folder() as folder:
        host = Host(folder, images[1], images[0], disk_floor_mib=1 << 40)

        async def work() -> None:
            async with await host.start():
                host.launch(SID)
                ended = await host.phase(SID, Phase.ENDED)
                assert ended.reason is Reason.NO_SPACE
                assert re.fullmatch(rf"\d+ MiB are free for disks, and {1 << 40} are kept for .*", ended.detail)
                assert host.leftovers() == []

        scenario(work)


def test_qemu_may_write_no_file_beyond_its_disk_and_lock_no_memory(images: tuple[Path, Machine]) -> None:
    with short_folder() as folder:
        host = Host(folder, images[1], images[0])

        async def work() -> None:
            async with await host.start(with_options()):
                host.launch(SID)
                await host.phase(SID, Phase.RUNNING)
                (qemu,) = (p for p in psutil.process_iter(["cmdline"]) if f"guest=deskfleet-{SID}" in str(p.info))
                disk = host.machine.defaults.disk_gib << 30
                limits = Path(f"/proc/{qemu.pid}/limits").read_text()
                most = disk + disk // 1024 + (64 << 20)
                assert re.search(rf"^Max file size +{most} +{most} ", limits, re.MULTILINE), limits
                locked = re.search(r"^Max locked memory +\d+ +(\d+) ", limits, re.MULTILINE)
                assert locked and int(locked[1]) <= 8 << 20

        scenario(work)
