"""The agent with real qemu guests: their life and end, refusals with their reason, and what stays behind: nothing."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from support.guests import Host, build_tiny, scenario, short_folder, with_options
from support.rfb import Rfb, UnixStream
from support.screen import TINY_TEXT, identity, read_identity, region_hash

from deskfleet.agent import guard
from deskfleet.agent.argv import uuid_of
from deskfleet.agent.qmp import Monitor
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import Firmware, Format, Machine, Os
from deskfleet.schemas.session import Outcome

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


def qemu_of(sid: str) -> psutil.Process:
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if uuid_of(sid) in line and "qemu-system" in line[0]:
            return process
    raise AssertionError(f"no qemu of {sid}")


def test_a_guest_from_start_to_stop(host: Host) -> None:
    async def work() -> None:
        async with await host.start():
            host.launch(SID)
            await host.phase(SID, Phase.RUNNING)
            viewer = Rfb(UnixStream(host.run / SID / "vnc.sock"))
            await host.until(lambda: read_identity(viewer.picture()) == identity(SID), "the guest's picture")
            before = region_hash(viewer.picture(), TINY_TEXT)
            viewer.type("hello")
            await host.until(lambda: region_hash(viewer.picture(), TINY_TEXT) != before, "the typed text")
            await host.until(lambda: viewers(host, SID) == 1, "the viewer to be counted")
            viewer.close()
            await host.until(lambda: viewers(host, SID) == 0, "the viewer to be gone")
            _check_confinement(host)
            host.stop(SID)
            ended = await host.phase(SID, Phase.ENDED)
            assert (ended.outcome, ended.reason, ended.ran) == (Outcome.STOPPED, Reason.STOPPED_BY_USER, True)
            assert host.leftovers() == []
            children = psutil.Process().children
            dead = lambda: [child for child in children() if child.status() == psutil.STATUS_ZOMBIE]  # noqa: E731
            await host.until(lambda: not dead(), "passt to have ended as well")

    scenario(work)


def viewers(host: Host, sid: str) -> int | None:
    """How many viewers of a guest a new heartbeat tells."""
    host.service.link.beat()
    return next((guest.viewers for guest in host.heartbeats[-1].guests if guest.sid == sid), None)


def _check_confinement(host: Host) -> None:
    """C21 and the sandbox, seen from outside."""
    process = qemu_of(SID)
    assert process.uids().real == 50_000_000
    assert not process.net_connections("inet"), "qemu has a port"
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":" in line
    )
    assert status["Seccomp"].strip() == "2" and status["NoNewPrivs"].strip() == "1"
    assert int(status["CapEff"], 16) == 0
    folder = host.run / SID
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == 50_000_000
    for name in ("vnc.sock", "qmp.sock", "rescue.sock"):
        assert (folder / name).is_socket()


def test_c42_a_viewer_who_comes_while_they_are_counted_is_counted(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a single-shot desktop ends as "never connected" under the hands of its user."""
    real = Monitor.viewers
    came: list[Rfb] = []

    async def viewers_then_one_comes(monitor: Monitor) -> int:
        count = await real(monitor)
        if not came:
            came.append(await asyncio.to_thread(lambda: Rfb(UnixStream(host.run / SID / "vnc.sock"))))
            await asyncio.to_thread(came[0].picture)
        return count

    monkeypatch.setattr(Monitor, "viewers", viewers_then_one_comes)

    async def work() -> None:
        async with await host.start():
            host.launch(SID)
            await host.phase(SID, Phase.RUNNING)
            await host.until(lambda: viewers(host, SID) == 1, "the viewer to be counted")
            came[0].close()
            await host.until(lambda: viewers(host, SID) == 0, "the viewer to be gone")

    scenario(work)


def test_a_screen_is_shown_while_it_runs_and_its_last_picture_when_it_ends_by_itself(host: Host) -> None:
    async def work() -> None:
        host.settings = replace(host.settings, picture_s=1.0)
        async with await host.start():
            for sid in (SID, OTHER):
                host.launch(sid)
            for sid in (SID, OTHER):
                await host.phase(sid, Phase.RUNNING)
                viewer = Rfb(UnixStream(host.run / sid / "vnc.sock"))
                await host.until(lambda: read_identity(viewer.picture()) == identity(sid), "the guest's picture")  # noqa: B023
                viewer.close()
            host.look(SID)
            await host.until(lambda: host.pictures, "a picture")
            (shown,) = host.pictures
            assert (shown.sid, shown.last) == (SID, False)
            image = Image.open(io.BytesIO(shown.png))
            assert image.size[0] <= 320 and len(image.convert("RGB").getcolors() or ()) > 2, (
                "a screen with something on it"
            )
            await host.until(lambda: not list((host.run / SID).glob("*.ppm")), "the large picture to go")

            qemu_of(SID).kill()
            host.stop(OTHER)
            await host.phase(SID, Phase.ENDED)
            await host.phase(OTHER, Phase.ENDED)
            await host.until(lambda: len(host.pictures) > 1, "the last picture")
            assert [(picture.sid, picture.last) for picture in host.pictures[1:]] == [(SID, True)]

    scenario(work)


def test_two_guests_have_two_users(host: Host) -> None:
    async def work() -> None:
        async with await host.start():
            host.launch(SID)
            host.launch(OTHER)
            await host.phase(SID, Phase.RUNNING)
            await host.phase(OTHER, Phase.RUNNING)
            assert qemu_of(SID).uids().real != qemu_of(OTHER).uids().real
            host.stop(SID)
            await host.phase(SID, Phase.ENDED)
            assert host.service.hypervisor.running() == {OTHER}

    scenario(work)


def test_a_guest_that_shuts_itself_down_is_told_apart_from_a_stop(host: Host) -> None:
    async def work() -> None:
        async with await host.start():
            host.launch(SID)
            await host.phase(SID, Phase.RUNNING)
            qemu_of(SID).terminate()
            ended = await host.phase(SID, Phase.ENDED)
            assert (ended.outcome, ended.reason) == (Outcome.GUEST_OFF, Reason.GUEST_OFF)
            assert host.leftovers() == []

    scenario(work)


def test_a_guest_that_obeys_nothing_is_killed_in_the_end(host: Host) -> None:
    host.settings = replace(host.settings, powerdown_s=0.5)

    async def work() -> None:
        async with await host.start():
            host.launch(SID)
            await host.phase(SID, Phase.RUNNING)
            qemu_of(SID).suspend()
            host.stop(SID)
            ended = await host.phase(SID, Phase.ENDED)
            assert ended.outcome is Outcome.STOPPED
            assert host.leftovers() == []

    scenario(work)


def test_lifetime_and_single_shot_end_by_themselves(host: Host) -> None:
    async def work() -> None:
        async with await host.start():
            host.launch(SID, lifetime_s=2)
            host.launch(OTHER, persistent=False, grace_s=1)
            await host.phase(OTHER, Phase.RUNNING)
            viewer = Rfb(UnixStream(host.run / OTHER / "vnc.sock"))
            await host.until(lambda: viewers(host, OTHER) == 1, "the viewer to be counted")
            viewer.close()
            assert (await host.phase(SID, Phase.ENDED)).outcome is Outcome.EXPIRED
            assert (await host.phase(OTHER, Phase.ENDED)).outcome is Outcome.DISCONNECTED
            assert host.leftovers() == []

    scenario(work)


def test_qemu_that_exits_at_once_leaves_its_last_words_and_nothing_else(host: Host) -> None:
    async def work() -> None:
        async with await host.start(with_options("-device", "no-such-device")):
            host.launch(SID)
            ended = await host.phase(SID, Phase.ENDED)
            assert (ended.outcome, ended.reason, ended.ran) == (Outcome.FAILED, Reason.QEMU_EXITED, False)
            assert "no-such-device" in ended.detail
            assert host.leftovers() == []

    scenario(work)


def test_c24_an_image_that_refers_to_another_file_is_refused(host: Host, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    canary = tmp_path / "canary"
    canary.write_text("secret")
    line = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(canary), "-F", "raw", str(images / "evil.qcow2"), "1M"]
    subprocess.run(line, check=True)
    digest = subprocess.run(["sha256sum", images / "evil.qcow2"], check=True, capture_output=True, text=True).stdout
    machine = replace(host.machine, sha256=digest.split()[0], format=Format.QCOW2, file="evil.qcow2")
    host.machine = machine
    host.settings = replace(host.settings, images=images)

    async def work() -> None:
        async with await host.start():
            host.launch(SID)
            ended = await host.phase(SID, Phase.ENDED)
            assert (ended.reason, ended.ran) == (Reason.IMAGE_BAD, False)
            assert "refers to another file" in ended.detail
            assert host.leftovers() == []

    scenario(work)


def test_an_image_that_changed_after_it_was_read_is_not_used(
    host: Host, tmp_path: Path, images: tuple[Path, Machine]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "tiny.iso").write_bytes((images[0] / "tiny.iso").read_bytes())
    host.settings = replace(host.settings, images=folder)

    async def work() -> None:
        async with await host.start():
            (folder / "tiny.iso").write_bytes(b"something else")
            host.launch(SID)
            ended = await host.phase(SID, Phase.ENDED)
            assert ended.reason is Reason.IMAGE_MISSING

    scenario(work)


@pytest.mark.parametrize(
    ("place", "trouble", "reasons"),
    [
        ("s/disks", "size=64k", {Reason.NO_SPACE}),
        ("s/disks", "nr_inodes=1", {Reason.NO_SPACE}),
        ("s/disks", "remount,ro", {Reason.SPAWN_FAILED}),
        ("r", "nr_inodes=2", {Reason.NETWORK_FAILED, Reason.SPAWN_FAILED}),
        ("s/journal", "size=4k", {Reason.STATE_UNWRITABLE}),
        ("s/journal", "remount,ro", {Reason.STATE_UNWRITABLE}),
    ],
)
def test_c28_trouble_with_a_disk_is_a_refusal_and_leaves_no_trace(
    host: Host, place: str, trouble: str, reasons: set[Reason]
) -> None:
    """Full, without inodes or read-only: it is told as a reason, and when it is over, guests start as before."""
    host.settings = replace(host.settings, disk_floor_mib=0)
    folder = host.folder / place
    folder.mkdir(parents=True)

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{options},mode=711", "tmpfs", str(folder)], check=True)

    mount("size=8m,nr_inodes=100")
    try:

        async def work() -> None:
            async with await host.start():
                mount(f"remount,size=8m,{trouble}" if "remount" not in trouble else trouble)
                if "size" in trouble:
                    with suppress(OSError):
                        (folder / "ballast").write_bytes(bytes(8 << 20))
                host.launch(SID)
                ended = await host.phase(SID, Phase.ENDED)
                assert ended.outcome is Outcome.FAILED and ended.reason in reasons, ended
                mount("remount,rw,size=8m,nr_inodes=100")
                (folder / "ballast").unlink(missing_ok=True)
                assert host.leftovers() == []
                host.launch(OTHER)
                await host.phase(OTHER, Phase.RUNNING)

        scenario(work)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_host_without_qemu_says_so(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def work() -> None:
        async with await host.start():
            with monkeypatch.context() as patched:
                patched.setenv("PATH", str(tmp_path))
                host.launch(SID)
                ended = await host.phase(SID, Phase.ENDED)
            assert (ended.outcome, ended.reason) == (Outcome.FAILED, Reason.SPAWN_FAILED)
            assert "qemu" in ended.detail and host.leftovers() == []

    scenario(work)


def test_an_agent_at_its_limit_of_files_refuses_and_goes_on_when_there_is_room(host: Host) -> None:
    async def work() -> None:
        async with await host.start():
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            highest = max(int(number) for number in os.listdir("/proc/self/fd"))
            held: list[int] = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
            try:
                with suppress(OSError):
                    while True:
                        held.append(os.open("/dev/null", os.O_RDONLY))
                host.launch(SID)
                ended = await host.phase(SID, Phase.ENDED)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for fd in held:
                    os.close(fd)
            assert ended.outcome is Outcome.FAILED and ended.reason in (Reason.STATE_UNWRITABLE, Reason.SPAWN_FAILED)
            host.launch(OTHER)
            await host.phase(OTHER, Phase.RUNNING)
            host.stop(OTHER)
            await host.phase(OTHER, Phase.ENDED)
            assert host.leftovers() == []

    scenario(work)


def test_uefi_firmware_comes_up(host: Host) -> None:
    async def work() -> None:
        async with await host.start():
            host.launch(SID, firmware=Firmware.UEFI)
            await host.phase(SID, Phase.RUNNING)
            assert (host.run / SID / "vars.fd").stat().st_uid == 50_000_000
            host.stop(SID)
            await host.phase(SID, Phase.ENDED)

    scenario(work)


def test_c37_a_second_agent_on_the_same_state_refuses_to_start(host: Host) -> None:
    from deskfleet.agent.service import AgentError, lock

    with lock(host.settings.state), pytest.raises(AgentError, match="another agent runs"):
        lock(host.settings.state)


# --- C27: what a guest can reach ----------------------------------------------------------------------------


class Listener:
    """A service of the host on every address; it counts who comes."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("0.0.0.0", 0))
        self.port = self._socket.getsockname()[1]
        self.visits: list[str] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, address = self._socket.accept()
            except OSError:
                return
            self.visits.append(address[0])
            client.close()

    def close(self) -> None:
        self._socket.close()


def probe_script(port: int) -> str:
    """What the boot ROM does: get an address, try to fetch a page from the host, then reset (which ends qemu)."""
    fetch = "imgfetch --timeout 3000 http://{}:{}/probe || echo refused"
    tries = "\n".join(fetch.format(target, port) for target in ("127.0.0.1", "${net0/gateway}", "${net0/dhcp-server}"))
    return f"#!ipxe\ndhcp || reboot\n{tries}\nreboot\n"


def ipxe(folder: Path, port: int) -> tuple[str, ...]:
    script = folder / "probe.ipxe"
    script.write_text(probe_script(port))
    script.chmod(0o644)
    return ("-no-reboot", "-kernel", "/usr/lib/ipxe/ipxe.lkrn", "-initrd", str(script))


def test_c27_the_boot_rom_of_a_guest_can_t_fetch_a_page_from_the_host(host: Host) -> None:
    listener = Listener()

    async def work() -> None:
        async with await host.start(with_options(*ipxe(host.folder, listener.port))):
            assert not host.heartbeats[-1].problems or "network" not in " ".join(host.heartbeats[-1].problems)
            host.launch(SID, os=Os.LINUX)
            await host.phase(SID, Phase.ENDED)
            rules = subprocess.run(
                ["nft", "list", "table", "inet", guard.table("h1")], check=True, capture_output=True, text=True
            ).stdout
            refused = int(rules.split("counter packets ")[1].split()[0])
            assert refused > 0, "the guest did not even try, so this shows nothing"

    scenario(work)
    listener.close()
    assert listener.visits == []


def test_c27_the_probe_itself_works_where_nothing_guards(host: Host) -> None:
    """The same ROM, the same passt, no guard: the page is reached. Without this the test above could not fail."""
    listener = Listener()

    probing = with_options(*ipxe(host.folder, listener.port))

    def unguarded(argv: Sequence[str], **how: Any) -> int:
        if argv[0] == "passt":
            argv, how["uid"] = [word for word in argv if word != "--no-map-gw"], 65534
        return probing(argv, **how)

    async def work() -> None:
        async with await host.start(unguarded):
            host.launch(SID, os=Os.LINUX)
            await host.phase(SID, Phase.ENDED)

    scenario(work)
    listener.close()
    assert listener.visits, "the boot ROM's requests did not arrive"
