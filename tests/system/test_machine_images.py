"""Real images, built by the real command and started in qemu without KVM: tiny guest, and Linux desktop (slow)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import struct
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support import screen
from support.guests import Host, short_folder
from support.qmp import Qmp, running, wait_for
from support.rfb import Rfb, UnixStream

from deskfleet.agent.guest_agent import guest_agent
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import Os, parse_machine
from deskfleet.schemas.messages import HostTemplates
from deskfleet.schemas.session import Birth, Resources
from deskfleet.schemas.template import blueprints

ROOT = Path(__file__).resolve().parents[2]
SID = "0f3a9c21-77e4-4b1d-9c55-2f6f0a1b7c3d"
SLOW = 900.0
"""Seconds for a Linux boot by emulation on a busy machine."""

PC = ("-machine", "pc-i440fx-7.2")
Q35 = ("-machine", "pc-q35-7.2")


def build(name: str, out: Path) -> dict[str, Any]:
    """Run deploy/build-machine and return the catalogue entry."""
    argv = ["bash", str(ROOT / "deploy/build-machine"), name, "--out", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    entry: dict[str, Any] = tomllib.loads((out / "catalogue" / f"{name}.toml").read_text())
    return entry


def overlay(image: Path, kind: str, folder: Path, size: str) -> Path:
    """A guest's own disk on top of an image, as a host makes it."""
    path = folder / "disk.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", kind, str(path), size]
    subprocess.run(argv, check=True)
    return path


# ---- The tiny guest


@pytest.fixture(scope="module")
def iso(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image of the tiny guest, freshly built."""
    out = tmp_path_factory.mktemp("tiny")
    entry = build("tiny", out)
    image = out / "images" / str(entry["image"]["file"])
    assert hashlib.sha256(image.read_bytes()).hexdigest() == entry["image"]["sha256"]
    return image


@contextmanager
def tiny(
    folder: Path, iso: Path, machine: tuple[str, ...] = Q35, *more: str, video: str = "VGA", sid: str | None = SID
) -> Iterator[tuple[subprocess.Popen[bytes], Qmp]]:
    """A running tiny guest, started as a host starts it; by default from its CD."""
    cd = ("-drive", f"file={iso},if=none,id=cd,format=raw,readonly=on", "-device", "ide-cd,drive=cd")
    argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", *machine, "-accel", "tcg", "-m", "64"]
    argv += ["-display", "none", "-vnc", f"unix:{folder}/vnc.sock", "-device", video]
    argv += ["-fw_cfg", f"name=opt/deskfleet/sid,string={sid}"] if sid else []
    with running([*argv, *(more or cd)], folder) as both:
        yield both


def is_up(image: Image.Image) -> bool:
    """Whether the tiny guest has painted its desktop: the caret's line and the clock's digits are there."""
    return image.size == screen.TINY_SIZE and screen.colours(image, screen.TINY_CLOCK) > 2


def up(qmp: Qmp, sid: str = SID) -> Image.Image:
    """Wait until the guest shows this session's identity; its screen then."""

    def look() -> Image.Image | None:
        image = screen.look(qmp)
        return image if is_up(image) and screen.read_identity(image) == screen.identity(sid) else None

    return wait_for(look, "the guest's identity on its screen")


def shows(qmp: Qmp, x: int, y: int, colour: tuple[int, int, int]) -> bool:
    return screen.look(qmp).getpixel((x, y)) == colour


def ended(process: subprocess.Popen[bytes], qmp: Qmp) -> bool:
    """Wait until qemu has ended, and whether the guest itself powered off."""
    event = qmp.wait_event("SHUTDOWN")
    assert process.wait(120) == 0
    return bool(event["data"]["guest"] and event["data"]["reason"] == "guest-shutdown")


# No usb-kbd: qemu gives it all keys from its creation on, and a guest without a USB driver hears nothing.
INPUT_DEVICES = {
    "none": (),
    "usb": ("-device", "qemu-xhci", "-device", "usb-tablet"),
    "virtio": ("-device", "virtio-tablet-pci", "-device", "virtio-keyboard-pci"),
}


@pytest.mark.parametrize("devices", INPUT_DEVICES)
@pytest.mark.parametrize("machine", [PC, Q35], ids=["pc", "q35"])
def test_it_shows_itself_and_reacts(iso: Path, tmp_path: Path, machine: tuple[str, ...], devices: str) -> None:
    """Picture, identity, typing, pointing, an orderly end by the power button; whatever tablets there are."""
    cd = ("-drive", f"file={iso},if=none,id=cd,format=raw,readonly=on", "-device", "ide-cd,drive=cd")
    with tiny(tmp_path, iso, machine, *cd, *INPUT_DEVICES[devices]) as (process, qmp):
        before = up(qmp)
        empty = screen.region_hash(before, screen.TINY_TEXT)
        assert screen.colours(before) > 100
        qmp.type("Hi!")
        wait_for(lambda: screen.region_hash(screen.look(qmp), screen.TINY_TEXT) != empty, "the typed text")
        for _ in "Hi!":
            qmp.press("backspace")
        wait_for(lambda: screen.region_hash(screen.look(qmp), screen.TINY_TEXT) == empty, "the text to go")
        x, y = screen.TINY_FREE[0] + 20, screen.TINY_FREE[1] + 50
        qmp.click(x, y, screen.TINY_SIZE)
        wait_for(lambda: shows(qmp, x - 3, y, screen.TINY_CLICK), "the dot of the click")
        qmp.execute("system_powerdown")
        assert ended(process, qmp)


@pytest.mark.parametrize("video", ["VGA", "virtio-vga", "qxl-vga"])
def test_it_runs_on_every_display_adapter(iso: Path, tmp_path: Path, video: str) -> None:
    with tiny(tmp_path, iso, video=video) as (_, qmp):
        up(qmp)


def test_it_starts_from_a_disk_too(iso: Path, tmp_path: Path) -> None:
    disk = overlay(iso, "raw", tmp_path, "1G")
    with tiny(tmp_path, iso, PC, "-drive", f"file={disk},if=virtio,format=qcow2") as (_, qmp):
        up(qmp)


def test_its_clock_goes_on(iso: Path, tmp_path: Path) -> None:
    with tiny(tmp_path, iso) as (_, qmp):
        seen = {screen.region_hash(up(qmp), screen.TINY_CLOCK)}

        def three_times() -> bool:
            seen.add(screen.region_hash(screen.look(qmp), screen.TINY_CLOCK))
            return len(seen) >= 3

        wait_for(three_times, "two more seconds on the guest's clock")


def test_its_own_button_powers_it_off(iso: Path, tmp_path: Path) -> None:
    with tiny(tmp_path, iso, PC) as (process, qmp):
        up(qmp)
        qmp.click(*screen.TINY_POWER_OFF, screen.TINY_SIZE)
        assert ended(process, qmp)


def test_control_alt_delete_restarts_it(iso: Path, tmp_path: Path) -> None:
    with tiny(tmp_path, iso) as (process, qmp):
        empty = screen.region_hash(up(qmp), screen.TINY_TEXT)
        qmp.type("gone soon")
        wait_for(lambda: screen.region_hash(screen.look(qmp), screen.TINY_TEXT) != empty, "the typed text")
        qmp.press("ctrl", "alt", "delete")
        assert qmp.wait_event("RESET")["data"]["guest"]
        wait_for(lambda: screen.region_hash(up(qmp), screen.TINY_TEXT) == empty, "an empty text again")
        assert process.poll() is None


def test_without_an_id_it_says_so(iso: Path, tmp_path: Path) -> None:
    with tiny(tmp_path, iso, sid=None) as (_, qmp):
        wait_for(lambda: is_up(screen.look(qmp)), "the guest's desktop")
        assert screen.read_identity(screen.look(qmp)) is None


def test_a_resumed_guest_takes_its_new_id(iso: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with tiny(tmp_path, iso, sid="first-id") as (_, qmp):
        up(qmp, "first-id")
        qmp.execute("migrate", uri=f"exec:cat >{state}")
        wait_for(lambda: qmp.execute("query-migrate").get("status") == "completed", "the saved state")
    incoming = ("-incoming", f"exec:cat {state}")
    cd = ("-drive", f"file={iso},if=none,id=cd,format=raw,readonly=on", "-device", "ide-cd,drive=cd")
    with tiny(tmp_path, iso, Q35, *cd, *incoming, sid="second-id") as (_, qmp):
        up(qmp, "second-id")


def test_a_scaled_picture_tells_the_identity(iso: Path, tmp_path: Path) -> None:
    with tiny(tmp_path, iso) as (_, qmp):
        image = up(qmp)
    for size in ((1200, 900), (1003, 752), (800, 600)):
        assert screen.read_identity(image.resize(size)) == screen.identity(SID)


def test_a_vnc_client_types_and_clicks(iso: Path, tmp_path: Path) -> None:
    """The way of a browser: absolute pointer and keys through qemu's VNC server."""
    with tiny(tmp_path, iso) as (_, qmp):
        empty = screen.region_hash(up(qmp), screen.TINY_TEXT)
        viewer = Rfb(UnixStream(tmp_path / "vnc.sock"))
        assert (viewer.width, viewer.height) == screen.TINY_SIZE
        viewer.type("typed")
        wait_for(lambda: screen.region_hash(screen.look(qmp), screen.TINY_TEXT) != empty, "the typed text")
        viewer.click(30, 250)
        wait_for(lambda: shows(qmp, 27, 250, screen.TINY_CLICK), "the dot of the click")
        viewer.close()


# ---- The Linux desktop


class GuestAgent:
    """The client's side of qemu-guest-agent."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SLOW)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rwb")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        message = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()
        answer = json.loads(self._file.readline())
        assert "return" in answer, answer
        return answer["return"]

    def shell(self, script: str) -> str:
        """What a shell script prints, run by root in the guest."""
        pid = self.execute("guest-exec", path="/bin/sh", arg=["-c", script], capture_output=True)["pid"]

        def done() -> dict[str, Any] | None:
            status: dict[str, Any] = self.execute("guest-exec-status", pid=pid)
            return status if status["exited"] else None

        return base64.b64decode(wait_for(done, script, SLOW, 0.3).get("out-data", "")).decode()


def cut_text(text: str) -> bytes:
    """ClientCutText (RFC 6143, 7.5.6): the viewer's clipboard."""
    return struct.pack("!BxxxI", 6, len(text)) + text.encode("latin-1")


def desktop_size(width: int, height: int) -> bytes:
    """SetEncodings with ExtendedDesktopSize, then SetDesktopSize for one screen: the viewer's window has this size."""
    encodings = struct.pack("!BxHi", 2, 1, -308)
    return encodings + struct.pack("!BxHHBxIHHHHI", 251, width, height, 1, 0, 0, 0, width, height, 0)


async def tell(channel: Path, text: str) -> None:
    """Show a text as the host's agent does."""
    async with guest_agent(channel) as inside:
        assert inside
        await inside.show(text, Os.LINUX)


#: SetEncodings with the QEMU extended key event: from then on the guest is told which physical key was pressed, and its
#: own layout decides what it means. That is how noVNC sends keys.
QEMU_KEYS = struct.pack("!BxHi", 2, 1, -258)
_CTRL, _ALTGR, _ENTER, _SPACE = 0x1D, 0xB8, 0x1C, 0x39
_T, _E, _O, _D = 0x14, 0x12, 0x18, 0x20
#: "tee odd", then on a German layout ß, é (a dead accent, then e), € (AltGr and e), and the end of the file.
LINE_OF_ODD_LETTERS = (
    *[(key,) for key in (_T, _E, _E, _SPACE, _O, _D, _D, _ENTER)],
    (0x0C,),
    (0x0D,),
    (_E,),
    (_ALTGR, _E),
    (_ENTER,),
    (_CTRL, _D),
)


def typed(*chords: tuple[int, ...]) -> bytes:
    """Keys pressed together, one chord after the other, by their scan codes (rfbproto: QEMU Extended Key Event)."""

    def event(key: int, down: bool) -> bytes:
        return struct.pack("!BBHII", 255, 0, down, 0, key)

    return b"".join(
        b"".join([*(event(key, True) for key in chord), *(event(key, False) for key in reversed(chord))])
        for chord in chords
    )


AMBER = (255, 183, 3)
PANEL = (24, 36, 47)


def terminal(image: Image.Image) -> screen.Box | None:
    """Where the terminal is, by its amber title bar, when the panel is there as well."""
    if image.height < 400 or image.getpixel((image.width // 2, image.height - 3)) != PANEL:
        return None
    title = image.crop((0, 0, image.width, image.height - 40)).split()
    red, _, blue = (channel.point(list(range(256))) for channel in title)
    mask = Image.composite(
        red.point([255 if value == AMBER[0] else 0 for value in range(256)]),
        Image.new("L", red.size),
        blue.point([255 if value == AMBER[2] else 0 for value in range(256)]),
    )
    box = mask.getbbox()
    return (box[0], box[3], box[2], box[3] + 300) if box and box[2] - box[0] > 300 else None


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """The Linux desktop's image and entry, freshly built."""
    with short_folder() as folder:
        build("desktop", folder)
        yield folder


@pytest.mark.slow_image
def test_the_desktop(built: Path, tmp_path: Path) -> None:
    """Started, used by keyboard, agent, clipboard and window size, and ended by the power button."""
    entry = tomllib.loads((built / "catalogue/desktop.toml").read_text())
    image = built / "images" / entry["image"]["file"]
    disk = overlay(image, entry["image"]["format"], tmp_path, "3G")
    argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", *Q35, "-accel", "tcg,thread=multi", "-cpu", "max"]
    argv += ["-smp", "2", "-m", "1024", "-display", "none", "-vnc", f"unix:{tmp_path}/vnc.sock"]
    argv += ["-drive", f"file={disk},if=virtio,format=qcow2", "-device", "virtio-vga"]
    argv += ["-device", "virtio-tablet-pci", "-device", "virtio-keyboard-pci", "-device", "virtio-serial-pci"]
    argv += ["-device", "virtio-balloon-pci", "-device", "virtio-rng-pci", "-device", "vmgenid,guid=auto"]
    argv += ["-chardev", f"socket,id=agent,path={tmp_path}/agent.sock,server=on,wait=off"]
    argv += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    argv += ["-chardev", "qemu-vdagent,id=vdagent,name=vdagent,clipboard=on,mouse=off"]
    argv += ["-device", "virtserialport,chardev=vdagent,name=com.redhat.spice.0"]
    argv += ["-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net"]
    argv += ["-fw_cfg", "name=opt/deskfleet/hostname,string=desk-7"]
    with running(argv, tmp_path) as (process, qmp), closing(GuestAgent(tmp_path / "agent.sock")) as agent:

        def settled() -> screen.Box | None:
            """The terminal, once its prompt (light ink on dark) stands still."""
            now = screen.look(qmp)
            where = terminal(now)
            if where is None or screen.colours(now, where) < 20:
                return None
            time.sleep(2)
            return where if screen.region_hash(screen.look(qmp), where) == screen.region_hash(now, where) else None

        where = wait_for(settled, "panel and terminal", SLOW, 1)
        before = screen.region_hash(screen.look(qmp), where)
        qmp.type("echo typed-by-a-person >proof\n")
        wait_for(lambda: screen.region_hash(screen.look(qmp), where) != before, "the typed text", SLOW)

        assert agent.execute("guest-sync", id=41) == 41
        wait_for(lambda: agent.shell("cat /home/user/proof") == "typed-by-a-person\n", "the typed command", SLOW, 1)
        assert agent.shell("hostname").strip() == "desk-7"
        assert agent.shell("systemctl --failed --plain --no-legend") == ""
        assert agent.shell("awk -F: '$2 !~ /^[!*]/ { print $1 }' /etc/shadow") == "", "an account has a password"
        assert len(agent.shell("cat /etc/machine-id").strip()) == 32
        wait_for(lambda: int(agent.shell("df --output=size -m / | tail -1")) > 2500, "the disk to grow", SLOW, 2)
        wait_for(lambda: "10.0.2.15" in agent.shell("ip -4 -br address"), "an address by DHCP", SLOW, 2)

        stream = UnixStream(tmp_path / "vnc.sock")
        Rfb(stream)
        stream.write(cut_text("from the browser"))
        paste = "runuser -u user -- env DISPLAY=:0 timeout 20 xclip -o -selection clipboard"
        wait_for(lambda: agent.shell(paste) == "from the browser", "the clipboard", SLOW, 1)
        agent.shell("runuser -u user -- env DISPLAY=:0 setxkbmap de")
        stream.write(QEMU_KEYS + typed(*LINE_OF_ODD_LETTERS))
        wait_for(lambda: agent.shell("cat /home/user/odd") == "ßé€\n", "letters that are on no US keyboard", SLOW, 1)
        agent.shell("runuser -u user -- env DISPLAY=:0 setxkbmap us")
        stream.write(desktop_size(1100, 640))
        current = "runuser -u user -- env DISPLAY=:0 xrandr --current"
        wait_for(lambda: "current 1100 x 640" in agent.shell(current), "the new size", SLOW, 1)
        stream.close()

        agent.close()
        asyncio.run(tell(tmp_path / "agent.sock", "This desktop ends in 5 min. Save your work."))
        with closing(GuestAgent(tmp_path / "agent.sock")) as again:
            shown = "pgrep -u user -a xmessage"
            wait_for(lambda: "ends in 5 min" in again.shell(shown), "the warning on the screen", SLOW, 1)

        qmp.execute("system_powerdown")
        assert qmp.wait_event("SHUTDOWN")["data"]["reason"] == "guest-shutdown"
        assert process.wait(SLOW) == 0


# ---- The Linux desktop, kept ready


async def inside(host: Host, sid: str, command: str) -> str:
    """What a shell command prints in a guest, by the channel that the agent holds."""
    channel = host.service.hypervisor._guests[sid].inside
    assert channel
    began = await channel.command("guest-exec", {"path": "/bin/sh", "arg": ["-c", command], "capture-output": True})
    assert isinstance(began, dict)
    while True:
        status = await channel.command("guest-exec-status", {"pid": began["pid"]})
        assert isinstance(status, dict)
        if status["exited"]:
            return base64.b64decode(status.get("out-data", "")).decode()
        await asyncio.sleep(0.05)


async def becomes(host: Host, sid: str, command: str, good: Callable[[str], bool]) -> str:
    """Wait until a command in a guest prints what is wanted."""
    deadline = time.monotonic() + 240.0
    while not good(said := await inside(host, sid, command)):
        assert time.monotonic() < deadline, f"{command}: {said}"
        await asyncio.sleep(0.2)
    return said


@pytest.mark.slow_image
def test_the_desktop_is_instant(built: Path) -> None:
    """Booted once, and forked: each fork is somebody of its own, of its own size, and is used like one that booted."""
    machine = parse_machine("desktop", (built / "catalogue/desktop.toml").read_text())
    (blueprint,) = blueprints(machine)
    small, large = "1" * 32, "2" * 32

    async def work() -> None:
        with short_folder() as folder:
            (folder / "course").mkdir()
            (folder / "course/note").write_text("from the host")
            (folder / "home").mkdir()
            volumes = [
                {"tag": "course", "path": str(folder / "course"), "users": ["ann"]},
                {
                    "tag": "mine",
                    "path": str(folder / "home/{user}"),
                    "kind": "virtiofs",
                    "read_only": False,
                    "create": True,
                    "users": ["bo"],
                },
            ]
            settings = {"template_load": 1000.0, "volumes": volumes}
            async with await Host(folder, machine, built / "images", **settings).start() as host:
                host.send(HostTemplates("h1", "0" * 16, (blueprint,)))
                await host.until(lambda: any(t.serving for t in host.heartbeats[-1].templates or ()), "it", SLOW)
                grown = Resources(3, machine.memory_mib.default + 512, machine.disk_gib.default + 2)
                for sid, user, size in ((small, "ann", machine.defaults), (large, "bo", grown)):
                    host.launch(sid, user=user, template=blueprint.key, resources=size)
                    assert (await host.phase(sid, Phase.RUNNING)).birth is Birth.FORKED
                facts = {}
                for sid in (small, large):
                    await host.until(lambda: not host.service.hypervisor._guests[sid].unfinished, "it", SLOW)  # noqa: B023
                    assert (await inside(host, sid, "hostname")).strip() == f"desk-{sid[:8]}"
                    await becomes(host, sid, "ip -4 -br address show scope global", bool)
                    assert abs(float(await inside(host, sid, "date +%s")) - time.time()) < 5
                    own = "cat /etc/machine-id; cat /sys/class/net/e*/address; head -c 16 /dev/urandom | od -An -tx1"
                    facts[sid] = (await inside(host, sid, own)).splitlines()
                assert not set(facts[small]) & set(facts[large]) and len(facts[small]) == 3
                await becomes(host, large, "nproc", lambda said: said.strip() == "3")
                memory = "awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo"
                more = int(await inside(host, large, memory)) - int(await inside(host, small, memory))
                assert more == 512
                await becomes(host, large, "df --output=size -BG / | tail -1", lambda said: said.strip() == "6G")

                # Folders of the host, by 9p and by virtiofs (for which this fork has memory of its own).
                await becomes(host, small, "cat /mnt/course/note", lambda said: said == "from the host")
                assert "refused" in await inside(host, small, "echo x >/mnt/course/note || echo refused")
                await becomes(host, large, "findmnt -no FSTYPE /mnt/mine", lambda said: said == "virtiofs\n")
                assert not await inside(host, large, "cat /mnt/course/note")
                await inside(host, large, "echo kept >/mnt/mine/work")
                (kept,) = (folder / "home").glob("*/work")
                assert kept.read_text() == "kept\n"

                # Used as a person does: keys, clipboard, window.
                stream = UnixStream(host.run / large / "vnc.sock")
                Rfb(stream)
                stream.write(QEMU_KEYS + typed(*((key,) for key in (_T, _E, _E, _SPACE, _O, _D, _D, _ENTER))))
                await becomes(host, large, "ls /home/user/odd", bool)  # what comes before is the shell's
                stream.write(typed((_E,), (_ENTER,), (_CTRL, _D)))
                await becomes(host, large, "cat /home/user/odd", lambda said: said == "e\n")
                assert "odd" not in await inside(host, small, "ls /home/user")
                paste = "runuser -u user -- env DISPLAY=:0 timeout 20 xclip -o -selection clipboard"

                def clipped(said: str) -> bool:
                    stream.write(cut_text("from the browser"))
                    return said == "from the browser"

                await becomes(host, large, paste, clipped)
                stream.write(desktop_size(1100, 640))
                current = "runuser -u user -- env DISPLAY=:0 xrandr --current"
                await becomes(host, large, current, lambda said: "current 1100 x 640" in said)
                stream.close()
                for sid in (small, large):
                    host.stop(sid)
                    await host.phase(sid, Phase.ENDED)
                assert not host.leftovers()

    asyncio.run(work())
