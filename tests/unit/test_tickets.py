"""Tickets: only ours, only for half a minute, every key that is still listed."""

from __future__ import annotations

import pytest
from itsdangerous import URLSafeTimedSerializer

from deskfleet.schemas.errors import TicketError
from deskfleet.schemas.tickets import Mode, Ticket, Tickets

OLD, NEW = "o" * 32, "n" * 32
G = "login-" + "c" * 16
TICKET = Ticket("a" * 32, "zoë", G, "h1", 7, Mode.FULL, "b" * 32)


def test_a_ticket_comes_back() -> None:
    assert Tickets([NEW]).verify(Tickets([NEW]).sign(TICKET)) == TICKET


def test_an_old_key_verifies_until_it_is_taken_away() -> None:
    text = Tickets([OLD]).sign(TICKET)
    assert Tickets([OLD, NEW]).verify(text) == TICKET
    with pytest.raises(TicketError):
        Tickets([NEW]).verify(text)


def at(seconds: float) -> Tickets:
    """Somebody whose clock shows so much."""
    return Tickets([NEW], lambda: 1.7e9 + seconds)


def test_c19_a_ticket_dies_and_is_not_revived_by_a_clock_set_back() -> None:
    text = at(0.9).sign(TICKET)
    assert at(30.9).verify(text) == TICKET
    for seconds in (31.0, 3600.0, -3600.0, -6.0):
        with pytest.raises(TicketError):
            at(seconds).verify(text)


@pytest.mark.parametrize("behind", [0.5, 1.0, 2.0, 5.0])
def test_a_clock_that_is_a_little_behind_the_signers_refuses_nothing(behind: float) -> None:
    assert at(-behind).verify(at(0.0).sign(TICKET)) == TICKET


@pytest.mark.parametrize("change", range(0, 60, 7))
def test_a_changed_ticket_is_refused(change: int) -> None:
    text = Tickets([NEW]).sign(TICKET)
    other = "A" if text[change] != "A" else "B"
    with pytest.raises(TicketError):
        Tickets([NEW]).verify(text[:change] + other + text[change + 1 :])


@pytest.mark.parametrize("text", ["", ".", "x" * 5000, "é", "a.b.c", "\0"])
def test_what_is_no_ticket_is_refused(text: str) -> None:
    with pytest.raises(TicketError):
        Tickets([NEW]).verify(text)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        ["x"] * 7,
        ["a" * 32, "u", G, "h1", "7", "full", "b" * 32],
        ["a" * 32, "u", G, "h1", 7, "root", "b" * 32],
        ["a" * 32, "u", G, "H1", 7, "full", "b" * 32],
        ["a" * 32, "u", G, "h1/..", 7, "full", "b" * 32],
        ["a" * 32, "u", G, "", 7, "full", "b" * 32],
        ["a" * 32, "u", G, None, 7, "full", "b" * 32],
        ["a" * 32, "u", G, 7, "full", "b" * 32],
        ["a" * 32, "u", "h1", 7, "full", "b" * 32],
        ["a" * 32, "u", "login", "h1", 7, "full", "b" * 32],
        ["a" * 32, "u", None, "h1", 7, "full", "b" * 32],
    ],
)
def test_a_signed_thing_of_another_shape_is_refused(content: object) -> None:
    text = URLSafeTimedSerializer([NEW], salt="deskfleet.console.3").dumps(content)
    with pytest.raises(TicketError):
        Tickets([NEW]).verify(str(text))


def test_the_shape_test_signs_as_the_portal_does() -> None:
    content = ["a" * 32, "zoë", G, "h1", 7, "full", "b" * 32]
    text = URLSafeTimedSerializer([NEW], salt="deskfleet.console.3").dumps(content)
    assert Tickets([NEW]).verify(str(text)) == TICKET


def test_short_keys_are_refused() -> None:
    for keys in ([], ["short"], [NEW, "short"]):
        with pytest.raises(TicketError):
            Tickets(keys)
