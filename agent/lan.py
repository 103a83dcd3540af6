"""Guests on a bridge of the host: a tap device for each, and what they may send through it.

A guest speaks with the address that it was given and with no other; it answers nobody's DHCP, announces no router, tags
no frame; it reaches neither this host, nor blocked networks, nor (unless that is wished) the other guests here. Which
IP address it may use is not known here, as the site's DHCP gives it: protection of that is the network's.

The rules: table bridge deskfleet_HOST looks at all that comes from a tap before it goes anywhere. What is then handed
to the host itself, to be answered or routed, gets a mark by which table inet deskfleet_HOST_lan knows it. (What is
bridged gets none: where br_netfilter is loaded, it passes through the inet tables as well.)
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from deskfleet.agent import guard
from deskfleet.agent.guard import GuardError, destinations
from deskfleet.runtime.settings import Network
from deskfleet.schemas.errors import DeskfleetError

Run = Callable[[list[str], str], tuple[int, str]]

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_TAP, _NO_PI, _VNET_HDR = 0x2, 0x1000, 0x4000
_MARK = 0x64666C74


class LanError(DeskfleetError):
    """Raised when a guest can't be connected to the bridge."""


def run(argv: list[str], text: str) -> tuple[int, str]:
    """Run ip with `text` as its input; the exit code and what it complained about."""
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stderr


def port(mac: str) -> str:
    """The tap device of the guest with this address. The address is unique on a host, or nothing works."""
    return "df-" + mac.replace(":", "")[-6:]


def rules(host: str, bridge: str, blocked: Sequence[Network], *, isolated: bool) -> str:
    """The ruleset, as `nft -f -` takes it. The sets of who is connected outlive an agent: they are never emptied."""
    name = guard.table(host)
    forward = f'    meta mark {_MARK:#x} oifname "{bridge}" counter drop\n' if isolated else ""
    return (
        f"table bridge {name} {{\n"
        "  set ports { type ifname; }\n"
        "  set ours { type ifname . ether_addr; }\n"
        "  chain prerouting { type filter hook prerouting priority -300; policy accept; }\n"
        "  chain input { type filter hook input priority -300; policy accept; }\n"
        "  chain guest { }\n"
        "}\n"
        f"flush chain bridge {name} prerouting\n"
        f"flush chain bridge {name} input\n"
        f"flush chain bridge {name} guest\n"
        f"table bridge {name} {{\n"
        "  chain prerouting {\n"
        "    iifname @ports jump guest\n"
        "  }\n"
        "  chain input {\n"
        f"    iifname @ports meta mark set {_MARK:#x}\n"
        "  }\n"
        "  chain guest {\n"
        "    iifname . ether saddr != @ours counter drop\n"
        "    ether type != { ip, ip6, arp } counter drop\n"
        "    ether type arp iifname . arp saddr ether != @ours counter drop\n"
        "    udp sport { 67, 547 } counter drop\n"
        "    icmpv6 type { nd-router-advert, nd-redirect } counter drop\n"
        + "".join(f"    {line} counter drop\n" for line in destinations(blocked))
        + "  }\n"
        "}\n"
        f"table inet {name}_lan\n"
        f"delete table inet {name}_lan\n"
        f"table inet {name}_lan {{\n"
        "  chain input {\n"
        "    type filter hook input priority -10; policy accept;\n"
        f"    meta mark != {_MARK:#x} accept\n"
        # The host may well be the one that gives addresses, and the router.
        "    udp dport { 67, 547 } accept\n"
        "    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit } accept\n"
        "    counter drop\n"
        "  }\n"
        "  chain forward {\n"
        "    type filter hook forward priority -10; policy accept;\n"
        f"{forward}"
        "  }\n"
        "}\n"
    )


class Lan:
    """The bridge of a host, for one agent's guests."""

    def __init__(
        self,
        host: str,
        bridge: str,
        blocked: Sequence[Network],
        *,
        isolated: bool,
        run: Run = run,
        tun: Path = Path("/dev/net/tun"),
    ) -> None:
        self._table = guard.table(host)
        self._bridge = bridge
        self._rules = rules(host, bridge, blocked, isolated=isolated)
        self._isolated = isolated
        self._run = run
        self._tun = tun

    def guard(self, sysfs: Path = Path("/sys")) -> None:
        """Put the rules in place.

        Raises:
            GuardError: there is no such bridge, nft is missing, refused, or this is not root.
        """
        if not (sysfs / "class/net" / self._bridge / "bridge").is_dir():
            raise GuardError(f"there is no bridge {self._bridge}")
        guard.load(self._rules, self._run)

    def plug(self, mac: str) -> int:
        """Connect a guest; the descriptor of its tap device, which lasts as long as that is open anywhere.

        Raises:
            LanError: the device can't be made, guarded or connected.
        """
        name = port(mac)
        try:
            tap = os.open(self._tun, os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_PI | _VNET_HDR))
        except OSError as error:
            raise LanError(f"no tap device {name}: {error.strerror}") from error
        try:
            # Guarded first, then connected, and up when all is done.
            guard.load(self._elements("add", name, mac), self._run)
            isolated = "on" if self._isolated else "off"
            code, problem = self._run(
                ["ip", "-batch", "-"],
                f"link set dev {name} addrgenmode none\n"
                f"link set dev {name} master {self._bridge}\n"
                f"link set dev {name} type bridge_slave isolated {isolated} mcast_router 0\n"
                f"link set dev {name} up\n",
            )
            if code:
                raise LanError(f"{name} can't be connected to {self._bridge}: {problem.strip()[-300:]}")
        except (LanError, GuardError) as error:
            os.close(tap)
            raise LanError(str(error)) from error
        return tap

    def _elements(self, verb: str, name: str, mac: str) -> str:
        return (
            f'{verb} element bridge {self._table} ports {{ "{name}" }}\n'
            f'{verb} element bridge {self._table} ours {{ "{name}" . {mac} }}\n'
        )

    def unplug(self, mac: str) -> None:
        """Forget a guest whose device is gone. No error when it was not connected."""
        self._run(["nft", "-f", "-"], self._elements("delete", port(mac), mac))

    def remove(self) -> None:
        """Take the rules away, once no guest is left."""
        for family, name in (("bridge", self._table), ("inet", f"{self._table}_lan")):
            self._run(["nft", "delete", "table", family, name], "")
