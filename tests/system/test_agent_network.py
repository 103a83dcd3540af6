"""C27: what a real guest reaches from inside, by passt and on a bridge. The same probes reach what they may reach, and
everything where nothing guards, so they could fail."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import psutil
import pytest
from demo.broker import free_port
from support import linux_guest
from support.guests import Host, build_tiny, scenario, short_folder
from support.neighbours import Listener, Neighbour, sh

from deskfleet.agent import guard, lan
from deskfleet.agent.argv import mac_of
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import Drivers, Machine, Os

SID, OTHER = "8" * 32, "9" * 32
MAY = ("10.97.0.2", "fd97::2")
#: This host by other addresses than the guest's own, metadata services, link-local, and what the site has blocked.
MAY_NOT = ("10.97.0.1", "fd97::1", "169.254.169.254", "169.254.7.7", "fd00:ec2::254", "10.96.0.2")
ADDRESSES = ("10.97.0.2/24", "fd97::2/64", "169.254.169.254/32", "169.254.7.7/32", "fd00:ec2::254/128", "10.96.0.2/32")
BY_PASST = """
ip link set eth0 up
udhcpc -q -n -i eth0 -s /lease >/dev/null 2>&1 || echo "no address"
for wait in 1 2 3 4 5 6 7 8 9 10; do ip -6 route | grep -q default && break; sleep 1; done
for to in {targets}; do
    (if nc -w 4 $to {port} </dev/null >/dev/null 2>&1; then echo "reached $to"; else echo "refused $to"; fi) &
done
wait
"""


@pytest.fixture(scope="module")
def images(linux: Path) -> Iterator[tuple[Path, Machine, Path]]:
    with short_folder() as folder:
        machine = build_tiny(folder)
        yield folder / "images", machine, linux


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture
def beside() -> Iterator[Neighbour]:
    with Neighbour("df-beside", "dfbeside", ADDRESSES) as neighbour:
        sh("address add 10.97.0.1/24 dev dfbeside", "address add fd97::1/64 dev dfbeside nodad")
        for address in ("169.254.169.254", "169.254.7.7", "10.96.0.2"):
            sh(f"route add {address} via 10.97.0.2")
        sh("route add fd00:ec2::254 via fd97::2")
        yield neighbour


def probed(
    images: tuple[Path, Machine, Path], folder: Path, beside: Neighbour, *, guarded: bool
) -> tuple[list[str], list[str], list[str]]:
    """What a guest says, and who came to this host and to the machine beside it."""
    port = free_port()
    here, there = Listener(port, folder / "here"), Listener(port, folder / "there", beside.name)
    host = Host(folder, images[1], images[0], blocked_networks=["169.254.0.0/16", "fd00:ec2::254/128", "10.96.0.0/16"])
    script = BY_PASST.format(targets=" ".join(MAY + MAY_NOT), port=port)
    probe = linux_guest.running(images[2], script, folder / "out")

    def spawner(argv: Sequence[str], **how: Any) -> int:
        if argv[0] == "passt":
            sockets = [c for p in psutil.process_iter() if p.uids().real in host.settings.uids for c in _listening(p)]
            assert sockets == [], "programs of guests listen where other guests could find them"
            if not guarded:
                how["uid"] = 65534
        return probe(argv, **how)

    async def work() -> None:
        async with await host.start(spawner):
            host.launch(SID, os=Os.LINUX, drivers=Drivers.VIRTIO)
            await host.phase(SID, Phase.RUNNING)
            await host.phase(SID, Phase.ENDED)
            if guarded:
                rules = subprocess.run(
                    ["nft", "list", "table", "inet", guard.table("h1")], check=True, capture_output=True, text=True
                ).stdout
                counters = [int(part.split()[0]) for part in rules.split("counter packets ")[1:]]
                assert len(counters) == 3 and all(counters), f"the guest did not even try: {rules}"

    scenario(work)
    here.close()
    there.close()
    said = [line for line in linux_guest.said(folder / "out") if line.startswith(("reached", "refused", "no "))]
    return said, here.visits(), there.visits()


def _listening(process: psutil.Process) -> list[object]:
    return [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]


def test_c27_by_passt_a_guest_reaches_neither_this_host_nor_what_is_blocked(
    images: tuple[Path, Machine, Path], folder: Path, beside: Neighbour
) -> None:
    said, here, there = probed(images, folder, beside, guarded=True)
    assert sorted(said) == sorted([*(f"reached {to}" for to in MAY), *(f"refused {to}" for to in MAY_NOT)])
    assert here == []
    assert sorted(line.split()[1] for line in there) == sorted(MAY)


def test_c27_the_same_probes_reach_all_of_it_where_nothing_guards(
    images: tuple[Path, Machine, Path], folder: Path, beside: Neighbour
) -> None:
    said, here, there = probed(images, folder, beside, guarded=False)
    assert sorted(said) == sorted(f"reached {to}" for to in MAY + MAY_NOT)
    assert len(here) == 2 and len(there) == len(MAY + MAY_NOT) - 2


# --- on a bridge --------------------------------------------------------------------------------------------

#: Waits to be visited, and says when it does.
WAITING = """
ip link set eth0 up && ip addr add 10.95.0.12/24 dev eth0
nc -ll -p {port} -e /bin/true &
nc -w 5 10.95.0.2 {port} </dev/null && echo "waiting"
sleep 600
"""
PROBING = """
ip link set eth0 up && ip addr add 10.95.0.11/24 dev eth0
ip route add 10.96.0.2 via 10.95.0.2
for to in 10.95.0.2 10.95.0.1 10.95.0.12 10.96.0.2; do
    (if nc -w 4 $to {port} </dev/null >/dev/null 2>&1; then echo "reached $to"; else echo "refused $to"; fi) &
done
wait
mac=$(cat /sys/class/net/eth0/address)
ip link set eth0 down && ip link set eth0 address 52:54:00:00:00:01 && ip link set eth0 up
nc -w 2 10.95.0.2 {port} </dev/null >/dev/null 2>&1 && echo "reached as another"
ip link set eth0 down && ip link set eth0 address $mac && ip link set eth0 up
sleep 1
nc -w 5 10.95.0.2 {port} </dev/null && echo "reached as itself"
"""


@pytest.fixture
def bridge() -> Iterator[str]:
    sh("link add dfbr type bridge", "address add 10.95.0.1/24 dev dfbr", "link set dfbr up")
    with Neighbour("df-lan", "dflan", ("10.95.0.2/24", "10.96.0.2/32")) as neighbour:
        sh("link set dflan master dfbr")
        yield neighbour.name
    sh("link delete dfbr")


def on_a_bridge(
    images: tuple[Path, Machine, Path], folder: Path, network: str
) -> tuple[list[str], list[str], list[str]]:
    port = free_port()
    (folder / "b").touch()
    here, there = Listener(port, folder / "here"), Listener(port, folder / "there", network)
    host = Host(
        folder,
        images[1],
        images[0],
        network="bridge",
        bridge="dfbr",
        blocked_networks=["10.96.0.0/16"],
        powerdown_s=0,
    )

    def spawner(argv: Sequence[str], **how: Any) -> int:
        name, script = ("b", WAITING) if any(OTHER in word for word in argv) else ("a", PROBING)
        return linux_guest.running(images[2], script.format(port=port), folder / name)(argv, **how)

    async def work() -> None:
        async with await host.start(spawner):
            assert "guests get no network" not in " ".join(host.heartbeats[-1].problems)
            host.launch(OTHER, os=Os.LINUX, drivers=Drivers.VIRTIO)
            await host.until(lambda: "waiting" in (folder / "b").read_text(), "the other guest")
            host.launch(SID, os=Os.LINUX, drivers=Drivers.VIRTIO)
            await host.phase(SID, Phase.RUNNING)
            assert Path(f"/sys/class/net/{lan.port(mac_of(SID))}/master").resolve().name == "dfbr"
            await host.phase(SID, Phase.ENDED)
            assert not Path(f"/sys/class/net/{lan.port(mac_of(SID))}").exists()
            host.stop(OTHER)
            await host.phase(OTHER, Phase.ENDED)
            ports = subprocess.run(
                ["nft", "list", "set", "bridge", guard.table("h1"), "ports"], check=True, capture_output=True, text=True
            ).stdout
            assert "df-" not in ports, "both were forgotten"

    try:
        scenario(work)
    finally:
        here.close()
        there.close()
    said = [line for line in linux_guest.said(folder / "a") if line.startswith(("reached", "refused"))]
    return said, here.visits(), there.visits()


def test_c27_on_a_bridge_a_guest_reaches_the_network_as_itself_and_neither_host_nor_other_guests(
    images: tuple[Path, Machine, Path], folder: Path, bridge: str
) -> None:
    said, here, there = on_a_bridge(images, folder, bridge)
    assert sorted(said[:4]) == [
        "reached 10.95.0.2",
        "refused 10.95.0.1",
        "refused 10.95.0.12",
        "refused 10.96.0.2",
    ]
    assert said[4:] == ["reached as itself"]
    assert here == []
    assert there == [
        "tcp 10.95.0.2 10.95.0.12",
        "tcp 10.95.0.2 10.95.0.11",
        "tcp 10.95.0.2 10.95.0.11",
    ]


ME, OTHER_MAC, ALL = "52:54:00:01:02:03", "52:54:00:0a:0b:0c", "ff:ff:ff:ff:ff:ff"


def frame(kind: int, payload: bytes, source: str = ME) -> bytes:
    return bytes.fromhex(ALL.replace(":", "") + source.replace(":", "")) + struct.pack(">H", kind) + payload


def arp(sender: str) -> bytes:
    return struct.pack(">HHBBH", 1, 0x800, 6, 4, 2) + bytes.fromhex(sender.replace(":", "")) + bytes(14)


def ip4(protocol: int, payload: bytes, target: str = "255.255.255.255") -> bytes:
    ends = socket.inet_aton("10.95.0.11") + socket.inet_aton(target)
    head = struct.pack(">BBHHHBB", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol)
    total = sum(struct.unpack(">9H", head + ends))
    return head + struct.pack(">H", 0xFFFF - (total + (total >> 16) & 0xFFFF)) + ends + payload


def ip6(following: int, payload: bytes) -> bytes:
    head = struct.pack(">IHBB", 6 << 28, len(payload), following, 255)
    return head + socket.inet_pton(socket.AF_INET6, "fe80::1") + socket.inet_pton(socket.AF_INET6, "ff02::1") + payload


def udp(source: int, target: int) -> bytes:
    return struct.pack(">HHHH", source, target, 8, 0)


PASS = {
    "arp": frame(0x0806, arp(ME)),
    "dhcp question": frame(0x0800, ip4(17, udp(68, 67))),
    "router solicitation": frame(0x86DD, ip6(58, bytes([133, 0]) + bytes(6))),
}
DROPPED = {
    "address of another": frame(0x0806, arp(ME), OTHER_MAC),
    "arp for another": frame(0x0806, arp(OTHER_MAC)),
    "dhcp answer": frame(0x0800, ip4(17, udp(67, 68))),
    "dhcp6 answer": frame(0x86DD, ip6(17, udp(547, 546))),
    "router advertisement": frame(0x86DD, ip6(58, bytes([134, 0]) + bytes(14))),
    "redirect": frame(0x86DD, ip6(58, bytes([137, 0]) + bytes(38))),
    "blocked": frame(0x0800, ip4(17, udp(68, 99), "10.96.3.4")),
    "tagged": frame(0x8100, struct.pack(">HH", 5, 0x0806) + arp(ME)),
    "tagged blocked": frame(0x8100, struct.pack(">HH", 0, 0x0800) + ip4(17, udp(68, 99), "10.96.3.4")),
    "spanning tree": frame(0x0026, b"\x42\x42\x03" + bytes(35)),
}


def test_c27_what_may_leave_a_guest_s_card(bridge: str) -> None:
    """Frames written to its tap, and what comes out of another port of the bridge."""
    wire = lan.Lan("h1", "dfbr", (ip_network("10.96.0.0/16"),), isolated=True)
    wire.guard()
    guest = wire.plug(ME)
    far = _tap("df-far")
    try:
        got = {name: _arrives(guest, far, content) for name, content in (PASS | DROPPED).items()}
        assert got == dict.fromkeys(PASS, True) | dict.fromkeys(DROPPED, False)
        wire.guard()
        assert _arrives(guest, far, PASS["arp"]), "an agent that starts again cuts nobody off"
        wire.remove()
        got = {name: _arrives(guest, far, content) for name, content in DROPPED.items()}
        assert all(got.values()), "without the rules all of it passes, so they are what stops it"
    finally:
        os.close(guest)
        os.close(far)
        wire.remove()


def _tap(name: str) -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))
    sh(f"link set dev {name} master dfbr", f"link set dev {name} up")
    return tap


def _arrives(guest: int, far: int, content: bytes) -> bool:
    """Whether a frame comes out. A second one that always does tells when to stop waiting."""
    last = frame(0x0806, arp(ME) + b"last")
    os.write(guest, bytes(10) + content)
    os.write(guest, bytes(10) + last)
    seen = False
    while True:
        select.select([far], [], [], 30)
        came = os.read(far, 2000)
        if came.startswith(last):
            return seen
        seen = seen or came.startswith(content)


@pytest.mark.parametrize("isolated", [True, False])
def test_c27_guests_on_a_bridge_reach_each_other_only_where_that_is_wished(bridge: str, isolated: bool) -> None:
    wire = lan.Lan("h1", "dfbr", (), isolated=isolated)
    wire.guard()
    taps = [wire.plug(mac) for mac in (ME, OTHER_MAC)]
    far = _tap("df-far")
    try:
        assert _arrives(taps[0], far, PASS["arp"])  # so whatever was to come to the other guest has come
        frames = []
        with suppress(BlockingIOError):
            while True:
                frames.append(os.read(taps[1], 2000)[10:])
        assert any(content.startswith(PASS["arp"]) for content in frames) is not isolated
    finally:
        for tap in (*taps, far):
            os.close(tap)
        wire.remove()
