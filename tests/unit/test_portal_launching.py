"""From a filled-in form to a request: sizes, rights, and ids that belong to one person and one machine."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.portals import KEY, MACHINE, settings

from deskfleet.portal.auth import Identity
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.launching import Seals, Wish, lifetimes, offered, prepare
from deskfleet.schemas.machine import Machine, parse_machine
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.wire import decode, encode

ALICE = Identity("alice", "local", ("lab",))
SID = "a" * 32


def machine(name: str = "desktop", **changes: str) -> Machine:
    values = {"title": "Desktop", "gpu": "never", "users": '["*"]', "digest": "ab" * 32} | changes
    return parse_machine(name, MACHINE.format(**values))


def ask(wish: Wish, *machines: Machine, who: Identity = ALICE, **changes: Any) -> LaunchRequested:
    catalogue = {entry.name: entry for entry in machines or (machine(),)}
    return prepare(SID, wish, who, catalogue, settings(**changes))


def test_defaults_come_from_the_machine_and_the_site() -> None:
    request = ask(Wish("desktop"))
    assert (request.resources.cpus, request.resources.memory_mib, request.resources.disk_gib) == (2, 1024, 4)
    assert (request.lifetime_s, request.wait_s, request.persistent) == (8 * 3600, 3600, False)
    assert (request.user, request.groups, request.sid) == ("alice", ("lab",), SID)
    assert decode(*encode(request)) == request


@pytest.mark.parametrize(
    "changes",
    [
        {"cpus": 9},
        {"cpus": 0},
        {"memory_mib": 511},
        {"disk_gib": 65},
        {"gpus": 1},
        {"gpus": -1},
        {"gpu_model": "Tesla"},
        {"lifetime_s": 59},
        {"lifetime_s": 7 * 86_400 + 1},
    ],
)
def test_what_is_outside_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        ask(Wish("desktop", **changes))
    assert caught.value.reason is Refused.BAD_RESOURCES and caught.value.details


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(Problem) as caught:
        ask(Wish("desktop", cpus=9, memory_mib=1, disk_gib=999, lifetime_s=1))
    assert len(caught.value.details) == 4


def test_a_machine_that_is_not_ones_own_looks_like_one_that_is_not_there() -> None:
    closed = machine("closed", users='["bob"]')
    answers = []
    for name in ("closed", "ghost"):
        with pytest.raises(Problem) as caught:
            ask(Wish(name), closed)
        answers.append((caught.value.reason, caught.value.message, caught.value.details))
    assert answers[0] == answers[1]
    assert offered({"closed": closed}, ALICE) == []
    assert offered({"closed": closed}, Identity("bob", "local")) == [closed]


def test_machines_are_offered_by_title() -> None:
    machines = {"b": machine("b", title="alpha"), "a": machine("a", title="Zeta"), "c": machine("c", title="Beta")}
    assert [entry.title for entry in offered(machines, ALICE)] == ["alpha", "Beta", "Zeta"]


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_gpu_where_it_is_optional(gpus: int) -> None:
    assert ask(Wish("desktop", gpus=gpus), machine(gpu="optional")).resources.gpus == gpus


def test_a_machine_that_needs_a_gpu_gets_one_by_default() -> None:
    needs = machine(gpu="required")
    assert ask(Wish("desktop"), needs).resources.gpus == 1
    with pytest.raises(Problem):
        ask(Wish("desktop", gpus=0), needs)


def test_a_seal_opens_for_its_person_and_machine_only() -> None:
    seals = Seals(KEY)
    seal = seals.mint("alice", "desktop")
    sid = seals.open(seal, "alice", "desktop")
    assert re.fullmatch(r"[0-9a-f]{32}", sid) and seals.open(seal, "alice", "desktop") == sid
    assert seals.open(seals.mint("alice", "desktop"), "alice", "desktop") != sid
    for text, user, name in (
        (seal, "bob", "desktop"),
        (seal, "alice", "other"),
        (seal[:-1], "alice", "desktop"),
        ("", "alice", "desktop"),
        ("x.y.z", "alice", "desktop"),
        (Seals("z" * 40).mint("alice", "desktop"), "alice", "desktop"),
    ):
        with pytest.raises(Problem) as caught:
            seals.open(text, user, name)
        assert caught.value.reason is Refused.STALE_FORM


@given(st.text())
def test_no_text_breaks_a_seal(text: str) -> None:
    with pytest.raises(Problem):
        Seals(KEY).open(text, "alice", "desktop")


def test_lifetimes_that_a_form_offers() -> None:
    few = lifetimes(settings(lifetime_default_s=5400, lifetime_max_s=10_000))
    assert few == [1800, 3600, 5400, 7200, 10_000]
