"""Accepted means stored, then sent until the scheduler is seen to know it - and nothing is lost or doubled."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select
from support.portals import World

from deskfleet.portal import tables
from deskfleet.portal.outbox import Stage
from deskfleet.schemas.messages import LaunchRequested, StopRequested
from deskfleet.schemas.session import Event, Resources, State
from deskfleet.schemas.topology import SCHEDULER_COMMANDS


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def sid(n: int = 1) -> str:
    return f"{n:032x}"


def want(n: int = 1, user: str = "alice", wait_s: int = 600) -> LaunchRequested:
    return LaunchRequested(sid(n), user, ("lab",), "desktop", Resources(2, 1024, 4), False, 3600, wait_s)


def stage(world: World, n: int = 1) -> Stage | None:
    request = world.portal.outbox.find(sid(n))
    return request.stage if request else None


def test_a_launch_is_on_disk_before_it_is_sent(world: World) -> None:
    seen: list[int] = []
    publish = world.bus.publish

    def looking(message):  # type: ignore[no-untyped-def]
        with world.portal.store.reading() as connection:
            seen.append(connection.scalar(select(func.count()).select_from(tables.request)) or 0)
        return publish(message)

    world.bus.publish = looking  # type: ignore[method-assign]
    assert world.portal.outbox.launch(want())
    assert seen == [1] and world.sent() == [want()]


def test_stored_then_sent_then_known(world: World) -> None:
    world.portal.outbox.launch(want())
    assert stage(world) is Stage.STORED
    world.run_deferred()
    assert stage(world) is Stage.SENT
    world.take_up()
    world.tick()
    assert stage(world) is Stage.KNOWN
    world.tick(3600)
    assert world.sent() == [], "what is known is never sent again"


def test_twenty_equal_launches_are_one(world: World) -> None:
    assert [world.portal.outbox.launch(want()) for _ in range(20)] == [True] + [False] * 19
    assert world.sent() == [want()]


def test_a_sid_is_one_persons_whatever_the_body(world: World) -> None:
    assert world.portal.outbox.launch(want())
    assert not world.portal.outbox.launch(want(user="mallory"))
    request = world.portal.outbox.find(sid())
    assert request and request.user == "alice" and request.launch == want()


def test_a_broker_that_is_down_loses_nothing(world: World) -> None:
    world.broker.crash()
    assert world.portal.outbox.launch(want())
    for _ in range(30):
        world.tick(1)
    assert stage(world) is Stage.STORED
    world.broker.recover()
    world.tick(2)
    assert world.sent() == [want()] and stage(world) is Stage.SENT


def test_a_portal_that_dies_before_it_sent_sends_after_it_is_back(world: World) -> None:
    world.broker.crash()
    world.portal.outbox.launch(want())
    world.portal.store.close()
    world.portal = world.build()
    world.broker.recover()
    world.tick(5)
    assert world.sent() == [want()]


def test_a_blocked_broker_holds_nobody_up(world: World) -> None:
    world.broker.blocked = True
    world.portal.outbox.launch(want())
    world.tick(5)
    assert stage(world) is Stage.STORED
    world.broker.blocked = False
    world.tick(5)
    assert world.sent() == [want()]


def test_a_broker_that_was_wiped_gets_it_again(world: World) -> None:
    world.portal.outbox.launch(want())
    world.run_deferred()
    world.broker.drop(SCHEDULER_COMMANDS)
    for _ in range(30):
        world.tick(1)
    assert want() in world.sent()


def test_a_scheduler_that_is_down_finds_no_pile_of_copies(world: World) -> None:
    world.portal.outbox.launch(want(wait_s=7200))
    for _ in range(600):
        world.tick(1)
    assert 1 <= len(world.sent()) <= 15


def test_two_portals_share_the_tries(world: World) -> None:
    world.broker.crash()
    for n in range(50):
        world.portal.outbox.launch(want(n))
    other = world.build()
    world.broker.recover()
    world.clock.now += 5
    other.outbox.sweep()
    world.portal.outbox.sweep()
    assert sorted(message.sid for message in world.sent()) == sorted(sid(n) for n in range(50))
    other.store.close()


def test_too_late_is_told_and_not_sent_any_more(world: World) -> None:
    world.broker.crash()
    world.portal.outbox.launch(want(wait_s=60))
    world.tick(61)
    assert stage(world) is Stage.EXPIRED
    world.broker.recover()
    world.tick(60)
    assert world.sent() == []
    desktop = world.portal.desktops.find(sid())
    assert desktop and desktop.over and desktop.reason == "not_taken_up" and "Start it again" in desktop.sentence


@pytest.mark.parametrize("shift", [-86_400.0, 3600.0, 20 * 365 * 86_400.0])
def test_c39_a_date_that_jumps_gives_nothing_up_and_keeps_nothing_for_ever(world: World, shift: float) -> None:
    world.broker.crash()
    world.portal.outbox.launch(want(wait_s=60))
    world.tick(5)
    world.clock.shift = shift
    world.tick(5)
    assert stage(world) is Stage.STORED
    world.broker.recover()
    world.tick(30)
    world.tick(15)
    assert world.sent()[:1] == [want(wait_s=60)]
    world.tick(30)
    assert stage(world) is Stage.EXPIRED


def test_a_message_that_waits_in_the_queue_dies_at_the_deadline(world: World) -> None:
    world.portal.outbox.launch(want(1, wait_s=60))
    world.portal.outbox.launch(want(2, wait_s=600))
    world.clock.now += 61
    taken: list[str] = []
    scheduler = world.broker.connect("scheduler", lambda action: action())
    scheduler.consume(SCHEDULER_COMMANDS, lambda delivery: taken.append(delivery.correlation_id))
    scheduler.start()
    world.broker.run()
    assert taken == [sid(2)]


def test_the_ledger_wins_over_an_expiry(world: World) -> None:
    world.broker.crash()
    world.portal.outbox.launch(want(wait_s=60))
    world.tick(61)
    world.session(sid(), "alice", State.RUNNING)
    desktop = world.portal.desktops.find(sid())
    assert desktop and desktop.running


def test_an_unreadable_ledger_expires_nothing_and_stops_no_sending(world: World) -> None:
    world.broker.crash()
    world.portal.outbox.launch(want(wait_s=60))
    hide = world.ledger_url.removeprefix("sqlite:///")
    world.ledger.dispose()
    world._reading.dispose()
    for path in Path(hide).parent.glob("ledger.db*"):
        path.rename(path.with_name("hidden-" + path.name))
    world.tick(30)
    world.broker.recover()
    world.tick(3)
    assert world.sent() == [want(wait_s=60)]
    world.tick(300)
    assert stage(world) is Stage.SENT


def test_a_stop_is_held_until_its_effect_shows(world: World) -> None:
    session = world.session(sid(), "alice", State.RUNNING)
    world.broker.crash()
    assert world.portal.outbox.stop(sid(), "alice", False)
    assert world.portal.outbox.stopping([sid()]) == {sid()}
    desktop = world.portal.desktops.find(sid())
    assert desktop and desktop.stop_asked
    world.broker.recover()
    world.tick(3)
    assert world.sent() == [StopRequested(sid(), "alice", False)]
    world.step(session, Event.STOP)
    world.tick(1)
    assert world.portal.outbox.stopping([sid()]) == set() and world.portal.outbox.waiting() == 0


def test_stops_in_a_row_are_one(world: World) -> None:
    world.session(sid(), "alice", State.RUNNING)
    assert [world.portal.outbox.stop(sid(), "alice", False) for _ in range(5)] == [True, False, False, False, False]
    assert len(world.sent()) == 1


def test_a_launch_that_is_stopped_before_it_went_out_never_goes_out(world: World) -> None:
    world.broker.crash()
    world.portal.outbox.launch(want())
    world.portal.outbox.stop(sid(), "alice", False)
    world.broker.recover()
    for _ in range(60):
        world.tick(1)
    assert {type(message) for message in world.sent()} == {StopRequested}
    desktop = world.portal.desktops.find(sid())
    assert desktop and desktop.over and desktop.outcome == "cancelled"


def test_a_confirm_that_comes_after_the_stop_changes_nothing(world: World) -> None:
    world.portal.outbox.launch(want())
    world.portal.outbox.stop(sid(), "alice", False)
    world.run_deferred()
    assert stage(world) is Stage.CANCELLED


def test_a_clock_that_was_set_back_does_not_stall_sending(world: World) -> None:
    world.broker.crash()
    world.portal.outbox.launch(want(wait_s=7200))
    world.clock.now -= 3600
    world.broker.recover()
    world.tick(3)
    assert world.sent() == [want(wait_s=7200)]


def test_old_closed_requests_are_forgotten_open_ones_never(world: World) -> None:
    world.portal.outbox.launch(want(1))
    world.take_up()
    world.tick()
    world.broker.crash()
    world.portal.outbox.launch(want(2, wait_s=365 * 86_400))
    world.clock.now += 40 * 86_400
    world.portal.prune()
    assert stage(world, 1) is None and stage(world, 2) is Stage.STORED


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_on_the_way_every_launch_arrives(world: World, seed: int) -> None:
    rng = random.Random(seed)
    asked: set[str] = set()
    for step in range(60):
        match rng.randrange(7):
            case 0 if world.broker.up:
                world.broker.crash()
            case 1:
                world.broker.recover()
            case 2:
                world.broker.blocked = rng.random() < 0.5
            case 3 if world.broker.pending(SCHEDULER_COMMANDS):
                world.broker.drop(SCHEDULER_COMMANDS)
            case 4:
                world.take_up()
            case _:
                world.portal.outbox.launch(want(step, wait_s=86_400))
                asked.add(sid(step))
        world.tick(rng.choice([0.1, 1, 5]))
    world.broker.blocked = False
    world.broker.recover()
    for _ in range(20):
        world.tick(30)
        world.take_up()
    world.tick()
    assert world.reader.known(asked) == asked
    assert world.portal.outbox.waiting() == 0
