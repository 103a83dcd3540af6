"""Heartbeats: full when something is new, when asked, at each connect and now and then; small in between."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
from support.consoles import report

from deskfleet.agent.core import Agent
from deskfleet.agent.link import FULL_S, Link
from deskfleet.runtime.bus import Delivery, Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker
from deskfleet.schemas import topology
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import (
    Fetch,
    FetchState,
    Gpu,
    GuestReport,
    HostBeat,
    HostReport,
    Phase,
    beat_of,
    inventory_digest,
)
from deskfleet.schemas.machine import Format
from deskfleet.schemas.messages import (
    CatalogueImage,
    HostFence,
    HostImages,
    HostInventory,
    HostTemplates,
    Message,
    TemplateOrdered,
    VmLook,
    VmPicture,
)
from deskfleet.schemas.session import Birth, Outcome
from deskfleet.schemas.template import TemplateOrder, TemplateReport, TemplateState
from deskfleet.schemas.wire import decode, decode_as, encode

S = "a" * 32
PNG = b"\x89PNG\r\n\x1a\n" + bytes.fromhex("0000000d") + b"IHDR" + bytes.fromhex("0000000400000003")


class FakeAgent:
    """Stands for the rules: what it was told."""

    def __init__(self) -> None:
        self.fences: list[HostFence] = []

    def fence(self, fence: HostFence) -> None:
        self.fences.append(fence)


class Stage:
    """An agent's link on a simulated broker, and what the scheduler hears of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.broker = MemoryBroker(random.Random(1), self)
        self.broker.declare(topology.core() + topology.for_host("h1"))
        self.heard: list[Message] = []
        self.scheduler = self.broker.connect("scheduler", lambda action: action())
        self.scheduler.consume(topology.SCHEDULER_HEARTBEATS, self._hear)
        self.scheduler.start()
        self.truth = report(guests={S: (7, Phase.RUNNING)})
        self.agent = FakeAgent()
        self.looks: list[VmLook] = []
        self.images: list[HostImages] = []
        self.templates: list[HostTemplates | TemplateOrdered] = []
        bus = self.broker.connect("agent-h1", lambda action: action())
        agent: Agent = self.agent  # type: ignore[assignment]
        self.link = Link(
            "h1",
            bus,
            agent,
            lambda seq: replace(self.truth, seq=seq),
            lambda: self.now,
            self.looks.append,
            self.images.append,
            self.templates.append,
        )
        self.link.start()
        self.broker.run()

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def _hear(self, delivery: Delivery) -> None:
        assert (delivery.sender, delivery.routing_key) == ("agent-h1", "host.h1.heartbeat")
        self.heard.append(decode(delivery.type, delivery.body))
        delivery.ack()

    def news(self, act: Callable[[], None]) -> list[Message]:
        """What an act makes the scheduler hear."""
        self.heard.clear()
        act()
        self.broker.run()
        return list(self.heard)

    def command(self, message: Message, sender: str = "scheduler", queue: str = topology.host_queue("h1")) -> None:
        kind, body = encode(message)
        bus = self.scheduler if sender == "scheduler" else self.broker.connect(sender, lambda action: action())
        bus.start()
        sent = bus.publish(Outgoing(topology.COMMANDS, queue, kind, body))
        self.broker.run()
        sent.result(0)


@pytest.fixture
def on() -> Stage:
    return Stage()


def kinds(messages: list[Message]) -> list[type]:
    return [type(message) for message in messages]


def test_the_first_is_full_and_the_next_stand_for_it(on: Stage) -> None:
    first, *more = on.heard
    assert isinstance(first, HostReport) and not more
    assert first.digest == inventory_digest(first)
    on.truth = replace(
        on.truth, load1=9.5, memory_free_mib=7, disk_free_mib=8, last_generation=12, fenced=True, console=""
    )
    (second,) = on.news(on.link.beat)
    assert second == HostBeat("h1", "one", 2, 12, True, "", 9.5, 7, 8, first.digest)


def test_a_changed_inventory_is_told_at_once_and_once(on: Stage) -> None:
    on.truth = replace(on.truth, guests=(*on.truth.guests, GuestReport("b" * 32, 8, Phase.STARTING)))
    (told,) = on.news(on.link.beat)
    assert isinstance(told, HostReport) and len(told.guests) == 2
    assert kinds(on.news(on.link.beat)) == [HostBeat]


def test_a_full_one_comes_every_minute_anyhow(on: Stage) -> None:
    seen = []
    for second in range(5, 131, 5):
        on.now = float(second)
        seen += [(second, kind) for kind in kinds(on.news(on.link.beat))]
    assert [second for second, kind in seen if kind is HostReport] == [FULL_S, 2 * FULL_S]


def test_the_scheduler_gets_a_full_one_when_it_asks(on: Stage) -> None:
    assert kinds(on.news(on.link.beat)) == [HostBeat]
    assert kinds(on.news(lambda: on.command(HostInventory("h1")))) == [HostReport]
    assert kinds(on.news(on.link.beat)) == [HostBeat]
    assert kinds(on.news(lambda: on.command(HostFence("h1", 3)))) == [HostBeat]
    assert on.agent.fences == [HostFence("h1", 3)]


def test_what_the_catalogue_names_is_passed_on(on: Stage) -> None:
    told = HostImages("h1", "0" * 16, (CatalogueImage("1" * 64, "a.iso", Format.ISO),), ("1" * 64,))
    on.command(told)
    assert on.images == [told]


def test_which_templates_are_wanted_is_passed_on(on: Stage) -> None:
    told = (HostTemplates("h1", "0" * 16, ()), TemplateOrdered("h1", "1" * 16, TemplateOrder.DROP, "root"))
    for message in told:
        on.command(message)
    assert tuple(on.templates) == told


def test_each_connect_begins_with_a_full_one_also_when_nothing_changed(on: Stage) -> None:
    on.broker.crash()
    on.link.beat()
    (told,) = on.news(on.broker.recover)
    assert isinstance(told, HostReport)
    assert told.seq == 3, "no number is used twice, also when nobody heard it"
    assert kinds(on.news(on.link.beat)) == [HostBeat]


@pytest.mark.parametrize("sender", ["portal", "proxy", "agent-h2", "schedulerx"])
def test_c42_only_the_scheduler_commands_a_host(on: Stage, sender: str) -> None:
    on.command(HostFence("h1", 7), sender)
    assert not on.agent.fences
    assert len(on.broker.pending(topology.DEAD)) == 1, "it is kept for an administrator to see"
    on.command(HostFence("h1", 7))
    assert on.agent.fences == [HostFence("h1", 7)]


def test_screens_are_shown_to_portals_alone(on: Stage) -> None:
    look = topology.look_queue("h1")
    for sender in ("agent-h2", "proxy", "scheduler"):
        on.command(VmLook(S, "w1"), sender, look)
    on.command(HostFence("h1", 7), "portal", look)
    assert not on.looks and not on.agent.fences
    on.command(VmLook(S, "w1"), "portal", look)
    assert on.looks == [VmLook(S, "w1")]


def test_a_picture_goes_to_the_portal_process_that_asked_and_a_last_one_to_all(on: Stage) -> None:
    heard: dict[str, list[VmPicture]] = {"w1": [], "w2": []}
    for replica, pictures in heard.items():
        on.broker.declare(topology.for_portal(replica))
        portal = on.broker.connect("portal", lambda action: action())

        def hear(delivery: Delivery, into: list[VmPicture] = pictures) -> None:
            assert delivery.sender == "agent-h1"
            into.append(decode_as(VmPicture, delivery.type, delivery.body))
            delivery.ack()

        portal.consume(topology.pictures_queue(replica), hear)
        portal.start()
    on.link.show(S, PNG, "w1")
    on.link.show("b" * 32, PNG)
    on.broker.run()
    last = VmPicture("h1", "b" * 32, PNG, last=True)
    assert heard == {"w1": [VmPicture("h1", S, PNG, last=False), last], "w2": [last]}


def test_all_but_what_beats_tell_is_in_the_digest() -> None:
    base = report(guests={S: (7, Phase.RUNNING)})
    guest = base.guests[0]
    changes: dict[str, object] = {
        "boot_id": "other",
        "accel": "kvm",
        "cpus": 9,
        "memory_mib": 9,
        "disk_mib": 9,
        "images": ("1" * 64,),
        "gpus": (Gpu("0000:01:00.0", "A100", 1, ("0000:01:00.0",), True),),
        "problems": ("no network",),
        "version": "2",
        "catalogue": "0" * 16,
        "fetches": (Fetch("1" * 64, FetchState.FETCHING, 5, 10),),
        "templates": (TemplateReport("1" * 16, "desktop", "", 1, 9, TemplateState.READY),),
        "blueprints": "0" * 16,
    }
    assert set(changes) | {"guests"} == {field.name for field in fields(HostReport)} - {
        field.name for field in fields(HostBeat)
    }
    guests: dict[str, object] = {
        "sid": "b" * 32,
        "generation": 8,
        "phase": Phase.ENDED,
        "ran": False,
        "viewers": 1,
        "outcome": Outcome.FAILED,
        "lifetime_s": 60,
        "reason": Reason.STALE,
        "detail": "x",
        "birth": Birth.FORKED,
    }
    assert set(guests) | {"left_s"} == {field.name for field in fields(GuestReport)}
    others = [replace(base, **{name: value}) for name, value in changes.items()]  # type: ignore[arg-type]
    others += [replace(base, guests=(replace(guest, **{name: value}),)) for name, value in guests.items()]  # type: ignore[arg-type]
    others.append(replace(base, guests=()))
    digests = {inventory_digest(other) for other in (base, *others)}
    assert len(digests) == len(others) + 1
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)


def test_what_beats_tell_and_the_time_left_are_not_in_the_digest() -> None:
    base = report(guests={S: (7, Phase.RUNNING)})
    other = replace(
        base,
        host="h2", incarnation="two", seq=9, last_generation=99, fenced=True, console="", load1=3.0,
        memory_free_mib=1, disk_free_mib=1, guests=(replace(base.guests[0], left_s=5.0),), digest="0" * 16,
    )  # fmt: skip
    assert inventory_digest(other) == inventory_digest(base)
    assert decode(*encode(beat_of(other))) == beat_of(other)
