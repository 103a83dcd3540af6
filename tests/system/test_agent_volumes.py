"""Folders of the host in real guests: what they read, what they can't, and what they leave for the next one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import linux_guest
from support.guests import ROOT, Host, build_tiny, scenario, short_folder, with_options

from deskfleet.agent import share
from deskfleet.agent.processes import Spawn, spawn
from deskfleet.agent.volumes import component
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import GuestReport, Phase
from deskfleet.schemas.machine import Machine, Os

SID, OTHER = "5" * 32, "6" * 32
USER = "Zoë/../o"
#: Mounts all that it was told of, and writable, whatever it was told.
MOUNT = """
while read -r tag kind mode target; do
    mkdir -p $target
    [ $kind = virtiofs ] || options=trans=virtio,version=9p2000.L,
    mount -t $kind -o ${options}rw $tag $target && echo "$tag $kind $mode $target"
    options=
done </sys/firmware/qemu_fw_cfg/by_name/opt/deskfleet/mounts/raw
"""
READ_AND_WRITE = """
cat /mnt/course/note /mnt/tools/note
for file in /mnt/course/new /mnt/tools/new; do echo x >$file || echo "refused $file"; done
rm /mnt/course/note || echo "refused rm course"
chmod 700 /mnt/tools/note || echo "refused chmod tools"
mkdir /home && mount -o move /mnt/home /home
echo mine >/home/first && chown 1000:1000 /home/first
ln -s ../../secret /home/link && ln -s /etc/shadow /home/shadow
cat /home/link /home/shadow || echo "leads nowhere"
mknod /home/disk b 8 0 || echo "refused mknod"
"""
#: What mounts them in the desktop that comes with Deskfleet.
DESKTOP = ROOT / "machines/desktop/files/usr/local/lib/desktop/mount-volumes"
READ_AGAIN = """
cat /mnt/course/note /mnt/tools/note /mnt/home/first
stat -c '%u %a' /mnt/home /mnt/home/first
awk '$1 ~ /course|tools|home/ {print $1, $3, substr($4, 1, 2)}' /proc/mounts
"""


@pytest.fixture(scope="module")
def images(linux: Path) -> Iterator[tuple[Path, Machine, Path]]:
    with short_folder() as folder:
        machine = build_tiny(folder)
        yield folder / "images", machine, linux


@pytest.fixture
def host(images: tuple[Path, Machine, Path]) -> Iterator[Host]:
    with short_folder() as folder:
        for name in ("course", "tools", "home"):
            (folder / name).mkdir()
            (folder / name / "note").write_text(f"from {name}\n")
        for name in ("course", "tools"):  # so that nothing but read-only keeps guests from writing
            for path in (folder / name, folder / name / "note"):
                path.chmod(0o777)
                os.chown(path, 300_000, 300_000)
        (folder / "secret").write_text("not for guests\n")
        yield Host(
            folder,
            images[1],
            images[0],
            volumes=[
                {"tag": "course", "path": str(folder / "course")},
                {"tag": "tools", "path": str(folder / "tools"), "kind": "virtiofs"},
                {
                    "tag": "home",
                    "path": str(folder / "home/{user}"),
                    "kind": "virtiofs",
                    "read_only": False,
                    "create": True,
                },
            ],
        )


def servers(sid: str) -> list[int]:
    lines = ((process.pid, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [pid for pid, line in lines if share.serves(sid, line)]


def test_a_guest_reads_shared_folders_and_keeps_its_person_s_own_one(
    host: Host, images: tuple[Path, Machine, Path]
) -> None:
    """Two launches of one person, one after the other, as different users of the host."""
    out = [host.folder / name for name in ("first", "second")]
    users: list[int] = []

    scripts = zip((MOUNT + READ_AND_WRITE, DESKTOP.read_text() + READ_AGAIN), out, strict=True)

    def spawner(argv: Sequence[str], **how: Any) -> int:
        if "qemu-system" not in argv[0]:
            return spawn(argv, **how)
        users.append(how["uid"])
        script, output = next(scripts)
        return linux_guest.running(images[2], script, output)(argv, **how)

    async def work() -> None:
        async with await host.start(spawner):
            for number, sid in enumerate((SID, OTHER)):
                host.launch(sid, os=Os.LINUX, user=USER)
                await host.phase(sid, Phase.ENDED)
                await host.until(lambda sid=sid: not servers(sid), "the file servers' end")
                assert (host.run / sid).exists() is False
                # From now on somebody else has the user id that this guest had.
                (host.run / str(number)).mkdir()
                os.chown(host.run / str(number), host.settings.uids[number], 0)

    scenario(work)
    uids = host.settings.uids
    assert users == list(uids[:2])

    first, second = ("\n".join(linux_guest.said(output)) for output in out)
    told = ["course 9p ro /mnt/course", "tools virtiofs ro /mnt/tools", "home virtiofs rw /mnt/home"]
    assert first.splitlines()[:5] == [*told, "from course", "from tools"]
    refusals = ["/mnt/course/new", "/mnt/tools/new", "rm course", "chmod tools", "mknod"]
    assert [line for line in first.splitlines() if line.startswith("refused")] == [f"refused {r}" for r in refusals]
    assert "leads nowhere" in first and "not for guests" not in first and "root:" not in first
    assert second.splitlines() == [
        "from course",
        "from tools",
        "mine",
        "1000 700",
        "1000 644",
        "course 9p ro",
        "tools virtiofs ro",
        "home virtiofs rw",
        "== end",
    ]

    own = host.folder / "home" / component(USER)
    assert sorted(path.name for path in own.iterdir()) == ["first", "link", "shadow"]
    assert (own / "first").stat().st_uid == 301_000, "the guest's user 1000"
    assert sorted(path.name for path in (host.folder / "home").iterdir()) == sorted([component(USER), "note"])
    for name in ("course", "tools"):
        assert [path.name for path in (host.folder / name).iterdir()] == ["note"]
        assert (host.folder / name / "note").stat().st_mode & 0o777 == 0o777


def ended(host: Host, spawner: Spawn, before: Callable[[], object] = lambda: None) -> GuestReport:
    """How a launch ends that is not to succeed, and that nothing stays behind."""
    found: list[GuestReport] = []

    async def work() -> None:
        async with await host.start(spawner):
            before()
            host.launch(SID, os=Os.LINUX, user="ann")
            found.append(await host.phase(SID, Phase.ENDED))
            await host.until(lambda: not servers(SID), "the file servers' end")
            assert host.leftovers() == []

    scenario(work)
    return found[0]


def test_a_start_that_fails_leaves_no_file_server(host: Host) -> None:
    report = ended(host, with_options("-device", "no-such-device"))
    assert report.reason is Reason.QEMU_EXITED and "no-such-device" in report.detail


def test_a_server_that_waits_for_a_qemu_that_never_came_is_ended(host: Host) -> None:
    """As after an agent that was killed between the two."""

    async def work() -> None:
        async with await host.start(_stopped_before_qemu()):
            host.launch(SID, os=Os.LINUX, user="ann")
            await host.phase(SID, Phase.ENDED)
            await host.until(lambda: not servers(SID), "the file servers' end")
            assert host.leftovers() == []

    scenario(work)


def _stopped_before_qemu() -> Spawn:
    normal = with_options()

    def wrapped(argv: Sequence[str], **how: Any) -> int:
        if "qemu-system" in argv[0]:
            assert len(servers(SID)) == 2
            raise OSError(12, os.strerror(12))
        return normal(argv, **how)

    return wrapped


def test_c26_a_link_in_the_place_of_a_person_s_folder_is_refused(host: Host) -> None:
    report = ended(host, with_options(), lambda: (host.folder / "home/ann").symlink_to(host.folder))
    assert report.reason is Reason.VOLUME_UNAVAILABLE
    assert report.detail.startswith("volume home: ") and report.detail.endswith("Not a directory")


def test_a_folder_that_is_not_there_is_said(host: Host) -> None:
    report = ended(host, with_options(), lambda: os.rename(host.folder / "course", host.folder / "gone"))
    assert report.reason is Reason.VOLUME_UNAVAILABLE and "volume course" in report.detail


def test_a_file_server_is_nobody_and_sees_nothing_but_its_volume(host: Host) -> None:
    async def work() -> None:
        async with await host.start():
            host.launch(SID, os=Os.LINUX, user="ann")
            await host.phase(SID, Phase.RUNNING)
            assert len(servers(SID)) == 2
            for pid in servers(SID):
                status = Path(f"/proc/{pid}/status").read_text()
                assert psutil.Process(pid).uids().real == 300_000
                assert "Seccomp:\t2" in status
                assert {path.name for path in Path(f"/proc/{pid}/root").iterdir()} <= {"note"}
                assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
            os.kill(servers(SID)[0], signal.SIGKILL)  # a desktop lives on without its volume
            host.stop(SID)
            await host.phase(SID, Phase.ENDED)
            await host.until(lambda: not servers(SID), "the file servers' end")

    scenario(work)
