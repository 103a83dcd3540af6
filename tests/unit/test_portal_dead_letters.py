"""Dead letters: kept before they are acknowledged, sent again only where the portal may, and never lost in between."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError
from support.portals import World

from deskfleet.portal import dead_letters
from deskfleet.portal.dead_letters import Letter
from deskfleet.portal.errors import Problem, Refused
from deskfleet.runtime.bus import Delivery, Outgoing
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.messages import (
    DrainRequested,
    HostDeclaredDead,
    LaunchRequested,
    Message,
    StopRequested,
    VmStop,
)
from deskfleet.schemas.session import Outcome, Resources
from deskfleet.schemas.topology import COMMANDS, DEAD, EVENTS, SCHEDULER_COMMANDS, host_queue, report_key
from deskfleet.schemas.wire import decode, encode

A = "a" * 32
LAUNCH = LaunchRequested(A, "alice", (), "desktop", Resources(2, 1024, 4), True, 3600, 600)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def die(world: World, login: str, exchange: str, key: str, kind: str, body: bytes, queue: str) -> None:
    """A message of this login that its reader refuses."""
    bus = world.broker.connect(login, lambda action: action())
    reader = world.broker.connect("reader", lambda action: action())
    reader.consume(queue, lambda delivery: delivery.reject())
    for each in (bus, reader):
        each.start()
    bus.publish(Outgoing(exchange, key, kind, body, correlation_id=A)).result(0)
    assert world.broker.deliver_one(queue)
    for each in (bus, reader):
        each.stop()


def die_as(world: World, message: Message, login: str = "portal") -> None:
    die(world, login, COMMANDS, "scheduler", *encode(message), SCHEDULER_COMMANDS)


def keep(world: World) -> list[Letter]:
    while world.broker.deliver_one(DEAD):
        pass
    return world.portal.letters.newest()


def refused(world: World, letter: Letter) -> str:
    with pytest.raises(Problem) as caught:
        world.portal.letters.replay(letter.name)
    assert caught.value.reason is Refused.NOT_REPLAYABLE
    assert world.portal.letters.find(letter.name) == letter and world.sent() == []
    return caught.value.message


def test_what_died_is_kept_with_where_and_why_and_whose_it_is(world: World) -> None:
    die_as(world, LAUNCH)
    (letter,) = keep(world)
    assert (letter.queue, letter.cause, letter.sender, letter.sid) == (SCHEDULER_COMMANDS, "rejected", "portal", A)
    assert decode(letter.type, letter.body) == LAUNCH and letter.died_at == pytest.approx(world.clock.wall(), abs=1)
    assert f'"sid": "{A}"' in letter.text
    assert world.broker.pending(DEAD) == ()


def test_a_launch_is_sent_again_as_it_was_and_then_forgotten(world: World) -> None:
    die_as(world, LAUNCH)
    (letter,) = keep(world)
    assert world.portal.letters.replay(letter.name) == letter
    assert world.sent() == [LAUNCH] and world.portal.letters.newest() == []
    (again,) = world.broker.pending(SCHEDULER_COMMANDS)
    assert (again.sender, again.correlation_id, again.death) == ("portal", A, None)
    with pytest.raises(Problem) as caught:
        world.portal.letters.replay(letter.name)
    assert caught.value.reason is Refused.NO_SUCH_LETTER


def test_nothing_is_lost_when_the_queue_does_not_take_it(world: World) -> None:
    die_as(world, StopRequested(A, "alice", False))
    (letter,) = keep(world)
    world.broker.blocked = True
    with pytest.raises(Problem) as caught:
        world.portal.letters.replay(letter.name)
    assert caught.value.reason is Refused.QUEUE_AWAY and world.portal.letters.newest() == [letter]


def test_it_is_forgotten_only_after_the_broker_has_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A portal that dies in between leaves the message in both places."""
    die_as(world, LAUNCH)
    (letter,) = keep(world)
    with monkeypatch.context() as patch:
        patch.setattr(world.portal.letters, "_drop", lambda _: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            world.portal.letters.replay(letter.name)
    assert world.sent() == [LAUNCH] and world.portal.letters.newest() == [letter]


def test_what_the_database_does_not_take_stays_with_the_broker(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    die_as(world, LAUNCH)
    away = OperationalError("INSERT", {}, sqlite3.OperationalError("disk I/O error"))
    with monkeypatch.context() as patch:
        patch.setattr(world.portal.store, "writing", lambda: (_ for _ in ()).throw(away))
        assert keep(world) == [] and world.broker.depth(DEAD).messages == 0, "it is handed out, and not settled"
    world.bus.disconnect()
    assert world.broker.depth(DEAD).messages == 1, "a portal that dies now loses nothing"
    world.bus.reconnect()
    assert len(keep(world)) == 1
    world.portal.sweep()
    assert len(world.portal.letters.newest()) == 1, "the first copy is the same row"


def test_a_letter_that_waits_for_the_database_is_kept_by_the_next_sweep(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_as(world, LAUNCH)
    away = OperationalError("INSERT", {}, sqlite3.OperationalError("disk I/O error"))
    with monkeypatch.context() as patch:
        patch.setattr(world.portal.store, "writing", lambda: (_ for _ in ()).throw(away))
        keep(world)
    world.portal.sweep()
    assert len(world.portal.letters.newest()) == 1
    world.bus.disconnect()
    assert world.broker.depth(DEAD).messages == 0, "it was acknowledged"


def test_a_host_is_not_spoken_for(world: World) -> None:
    """Whatever a host sends, the portal does not put its own login under it."""
    for kind, body in (("vm.report.v1", b"{}"), encode(LAUNCH)):
        die(world, "agent-h1", EVENTS, report_key("h1"), kind, body, "scheduler.reports")
    letters = keep(world)
    assert len(letters) == 2
    for letter in letters:
        assert "Only the host itself" in refused(world, letter)


def test_a_command_of_the_scheduler_is_not_sent_again(world: World) -> None:
    die(
        world,
        "scheduler",
        COMMANDS,
        host_queue("h1"),
        *encode(VmStop(A, 7, Outcome.STOPPED, Reason.STOPPED_BY_USER)),
        host_queue("h1"),
    )
    (letter,) = keep(world)
    assert "Only the scheduler" in refused(world, letter)


@pytest.mark.parametrize(
    "message", [DrainRequested("h1", True, "boss", ""), HostDeclaredDead("h1", "boss")], ids=["drain", "dead"]
)
def test_what_was_decided_about_a_host_is_not_decided_again(world: World, message: Message) -> None:
    die_as(world, message)
    (letter,) = keep(world)
    assert "that moment" in refused(world, letter)


def test_only_the_portals_own_login_is_repeated(world: World) -> None:
    die_as(world, LAUNCH, "somebody")
    (letter,) = keep(world)
    refused(world, letter)


def test_a_launch_that_was_taken_back_is_not_started(world: World) -> None:
    world.portal.outbox.launch(LAUNCH)
    world.broker.drop(SCHEDULER_COMMANDS)
    die_as(world, LAUNCH)
    (letter,) = keep(world)
    assert world.portal.letters.obstacle(letter) == ""
    world.portal.outbox.stop(A, "alice", False)
    world.broker.drop(SCHEDULER_COMMANDS)
    assert "taken it back" in refused(world, letter)


@pytest.mark.parametrize(
    "body",
    [b"", b"\x00\xff not json", b"[" * 60_000, b'{"sid": 7}', b'{"sid": "<b>"}', b"x" * 200_000],
    ids=["empty", "bytes", "deep", "number", "markup", "long"],
)
def test_anything_may_be_in_a_dead_letter(world: World, body: bytes) -> None:
    die(world, "portal", COMMANDS, "scheduler", "ty\0pe", body, SCHEDULER_COMMANDS)
    (letter,) = keep(world)
    assert letter.size == len(body) and len(letter.body) <= dead_letters.LONGEST_BODY and len(letter.text) <= 20_001
    assert letter.sid == "" and "\0" not in letter.type
    refused(world, letter)


def test_a_message_that_comes_twice_is_one(world: World) -> None:
    die_as(world, LAUNCH)
    world.broker.duplicate(DEAD)
    assert len(keep(world)) == 1


def test_a_host_that_floods_drives_out_nothing_but_its_like(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "MOST", 3)
    die_as(world, LAUNCH)
    for number in range(6):
        body = str(number).encode()
        die(world, "agent-h1", EVENTS, report_key("h1"), "vm.report.v1", body, "scheduler.reports")
    assert [letter.body for letter in keep(world)][:3] == [b"5", b"4", b"3"]
    assert [letter.sender for letter in world.portal.letters.newest()] == ["agent-h1"] * 3 + ["portal"]


def test_discarding_all_spares_what_came_after_the_look(world: World) -> None:
    die_as(world, LAUNCH)
    seen = keep(world)[0].number
    die_as(world, StopRequested(A, "alice", False))
    keep(world)
    assert world.portal.letters.discard_all(seen) == 1
    (left,) = world.portal.letters.newest()
    assert left.number > seen
    world.portal.letters.discard(left.name)
    die_as(world, LAUNCH)
    assert keep(world)[0].number > left.number, "a number means one letter for ever"


def test_old_ones_are_forgotten(world: World) -> None:
    die_as(world, LAUNCH)
    keep(world)
    world.clock.now += 13 * 24 * 3600
    world.portal.prune()
    assert world.portal.letters.count() == 1
    world.clock.now += 2 * 24 * 3600
    world.portal.prune()
    assert world.portal.letters.count() == 0


def test_a_delivery_says_nothing_of_a_death_that_was_none(world: World) -> None:
    seen: list[Delivery] = []
    world.bus.consume(host_queue("h1"), seen.append)
    world.bus.publish(Outgoing(COMMANDS, host_queue("h1"), "x", b"")).result(0)
    world.broker.deliver_one(host_queue("h1"))
    assert seen[0].death is None
