"""Keeps guests from the host's own services, and from networks that are none of theirs.

passt speaks for its guest with ordinary sockets of the host, so a guest that sends a packet to 127.0.0.1 reaches
what listens there (seen with Debian 12's passt, host mapping off). Everything that a host sends to itself, on
loopback or on any address of its own, leaves through the device lo; each guest's passt runs under a user id of its
own; so one rule for these ids on lo closes that door whatever passt does. What a site has blocked besides (by default
link-local addresses and the metadata services of clouds, which hand out the host's own credentials) is refused by the
same ids.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from deskfleet.runtime.settings import Network
from deskfleet.schemas.errors import DeskfleetError

Run = Callable[[list[str], str], tuple[int, str]]


class GuardError(DeskfleetError):
    """Raised when the rule can't be put in place; guests then get no network."""


def run_nft(argv: list[str], text: str) -> tuple[int, str]:
    """Run nft with `text` as its input; the exit code and what it complained about."""
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stderr


def table(host: str) -> str:
    """The nftables table of one agent."""
    return "deskfleet_" + re.sub(r"[^a-z0-9]", "_", host)


def rules(host: str, first_uid: int, last_uid: int, blocked: Sequence[Network] = ()) -> str:
    """The ruleset, as `nft -f -` takes it: replaced as a whole, so applying it twice changes nothing."""
    name = table(host)
    theirs = f"meta skuid {first_uid}-{last_uid}"
    return (
        f"table inet {name}\n"
        f"delete table inet {name}\n"
        f"table inet {name} {{\n"
        "  chain output {\n"
        "    type filter hook output priority 0; policy accept;\n"
        f'    {theirs} oifname "lo" counter reject\n'
        + "".join(f"    {theirs} {line} counter reject\n" for line in destinations(blocked))
        + "  }\n"
        "}\n"
    )


def destinations(blocked: Sequence[Network]) -> list[str]:
    """What matches packets to these networks, in nftables' words, one line a family."""
    four = collapse_addresses(network for network in blocked if isinstance(network, IPv4Network))
    six = collapse_addresses(network for network in blocked if isinstance(network, IPv6Network))
    listed = {"ip": ", ".join(map(str, four)), "ip6": ", ".join(map(str, six))}
    return [f"{family} daddr {{ {networks} }}" for family, networks in listed.items() if networks]


def apply(host: str, first_uid: int, last_uid: int, blocked: Sequence[Network] = (), run: Run = run_nft) -> None:
    """Put the rules in place.

    Raises:
        GuardError: nft is missing, refused, or this is not root.
    """
    load(rules(host, first_uid, last_uid, blocked), run)


def load(ruleset: str, run: Run = run_nft) -> None:
    """Have nftables take a ruleset, all of it or nothing. Raises GuardError as `apply`."""
    code, problem = run(["nft", "-f", "-"], ruleset)
    if code:
        raise GuardError(f"nft could not set the rule that keeps guests from this host: {problem.strip()[-300:]}")


def remove(host: str, run: Run = run_nft) -> None:
    """Take the rule away, once no guest is left."""
    run(["nft", "delete", "table", "inet", table(host)], "")
