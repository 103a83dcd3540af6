"""Admission: origin, address and ticket together."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from itsdangerous import URLSafeTimedSerializer
from support.consoles import KEYS, ORIGIN, head, ticket

from deskfleet.proxy.gate import Gate
from deskfleet.proxy.refusals import Refusal, Refused
from deskfleet.schemas.tickets import Tickets

GATE = Gate(
    path="/console",
    origins=frozenset({ORIGIN}),
    tickets=Tickets(KEYS),
    front_proxies=(ip_network("10.1.0.0/16"), ip_network("fd00::/8")),
    originless=(ip_network("192.0.2.0/24"), ip_network("fe80::/64")),
)


def target(text: str = "") -> str:
    return f"/console?ticket={text or Tickets(KEYS).sign(ticket())}"


def refusal(data: bytes, peer: str = "203.0.113.9", gate: Gate = GATE) -> Refused:
    with pytest.raises(Refusal) as caught:
        gate.admit(data, peer)
    return caught.value.reason


def test_a_signed_ticket_is_admitted_with_the_peers_address() -> None:
    right = ticket(nonce="c" * 32)
    admission = GATE.admit(head(target(Tickets(KEYS).sign(right))), "203.0.113.9")
    assert admission.ticket == right
    assert str(admission.client) == "203.0.113.9"


def test_an_old_key_still_verifies_and_a_strange_one_does_not() -> None:
    rotated = Gate("/console", GATE.origins, Tickets([*KEYS, "n" * 40]))
    rotated.admit(head(target()), "203.0.113.9")
    assert refusal(head(target(Tickets(["z" * 40]).sign(ticket())))) is Refused.BAD_TICKET


def test_forged_and_foreign_tickets_are_refused() -> None:
    good = Tickets(KEYS).sign(ticket())
    other_salt = URLSafeTimedSerializer(list(KEYS), salt="session").dumps(["a" * 32, "u", 1, "full", "b" * 32])
    for text in ("t", good[:-1], good + "A", good[1:], good.replace(".", "", 1), other_salt):
        assert refusal(head(target(str(text)))) is Refused.BAD_TICKET


def test_an_expired_ticket_is_refused() -> None:
    text = Tickets(KEYS, lambda: 1.7e9).sign(ticket())
    assert refusal(head(target(text))) is Refused.BAD_TICKET


def test_the_origin_is_judged_before_the_ticket() -> None:
    assert refusal(head(target("t"), origin="https://evil.example")) is Refused.BAD_ORIGIN


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("203.0.113.9", "198.51.100.7", "203.0.113.9"),  # a browser says what it likes
        ("10.1.2.3", "198.51.100.7", "198.51.100.7"),
        ("10.1.2.3", "1.1.1.1, 198.51.100.7", "198.51.100.7"),  # the front proxy appends
        ("::ffff:10.1.2.3", "198.51.100.7", "198.51.100.7"),
        ("fd00::1", "2001:db8::5", "2001:db8::5"),
        ("10.1.2.3", "::ffff:198.51.100.7", "198.51.100.7"),
        ("10.2.2.3", "198.51.100.7", "10.2.2.3"),
        ("::ffff:203.0.113.9", "", "203.0.113.9"),
    ],
)
def test_the_clients_address(peer: str, forwarded: str, client: str) -> None:
    extra = (f"X-Forwarded-For: {forwarded}",) if forwarded else ()
    assert str(GATE.admit(head(target(), extra=extra), peer).client) == client


@pytest.mark.parametrize("forwarded", ["unknown", "198.51.100.7:80", "198.51.100.7,", "a, "])
def test_a_front_proxy_must_say_an_address(forwarded: str) -> None:
    data = head(target(), extra=(f"X-Forwarded-For: {forwarded}",))
    assert refusal(data, "10.1.2.3") is Refused.BAD_REQUEST


def test_only_listed_programs_may_leave_the_origin_out() -> None:
    bare = head(target(), without=("origin",))
    GATE.admit(bare, "192.0.2.10")
    GATE.admit(bare, "fe80::1%eth0")
    assert refusal(bare, "203.0.113.9") is Refused.BAD_ORIGIN
    assert refusal(head(target(), without=("origin",), extra=("Cookie: a=b",)), "192.0.2.10") is Refused.BAD_ORIGIN
    through = head(target(), without=("origin",), extra=("X-Forwarded-For: 203.0.113.9",))
    assert refusal(through, "10.1.2.3") is Refused.BAD_ORIGIN
