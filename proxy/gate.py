"""Who may come in: from a request head and the peer's address to a verified ticket, or a refusal. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from deskfleet.proxy.handshake import Upgrade, check_origin, parse_upgrade
from deskfleet.proxy.refusals import Refusal, Refused
from deskfleet.schemas.errors import TicketError
from deskfleet.schemas.tickets import Ticket, Tickets

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that may pass: what it asks for, by which right, from which address."""

    upgrade: Upgrade
    ticket: Ticket
    client: Address


@dataclass(frozen=True, slots=True)
class Gate:
    """The rules of one proxy.

    `origins` are the portal's, as browsers write them. `front_proxies` are the networks whose X-Forwarded-For is
    believed. Clients in `originless` are programs, not browsers, and may leave the Origin out.
    """

    path: str
    origins: frozenset[str]
    tickets: Tickets
    front_proxies: tuple[Network, ...] = ()
    originless: tuple[Network, ...] = ()

    def admit(self, head: bytes, peer: str) -> Admission:
        """Judge a complete request head.

        Raises:
            Refusal: it is malformed, or from a foreign page, or without a valid ticket.
        """
        upgrade = parse_upgrade(head, self.path)
        client = self._client(peer, upgrade.forwarded)
        check_origin(upgrade, self.origins, _within(client, self.originless))
        try:
            return Admission(upgrade, self.tickets.verify(upgrade.ticket), client)
        except TicketError:
            raise Refusal(Refused.BAD_TICKET) from None

    def _client(self, peer: str, forwarded: str) -> Address:
        """The client's address: the peer's, or what a front proxy says. It appends, so only its last word counts."""
        address = _address(peer)
        if not forwarded or not _within(address, self.front_proxies):
            return address
        try:
            return _address(forwarded.rpartition(",")[2].strip())
        except ValueError:
            raise Refusal(Refused.BAD_REQUEST, "x-forwarded-for does not end with an address") from None


def _address(text: str) -> Address:
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def _within(address: Address, networks: tuple[Network, ...]) -> bool:
    # The zone of a link-local address says nothing about who it is.
    bare = ipaddress.ip_address(str(address).partition("%")[0])
    return any(bare in network for network in networks)
