"""What a person sees of a desktop, and what an administrator sees of the fleet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.portals import World

from deskfleet.ledger.reader import Wait
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.errors import Problem, Refused
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import GuestReport, Phase
from deskfleet.schemas.messages import DrainRequested, LaunchRequested
from deskfleet.schemas.session import Resources, State
from deskfleet.schemas.topology import DEAD, SCHEDULER_COMMANDS
from deskfleet.schemas.verdict import Verdict
from deskfleet.schemas.wire import decode

A, B, C = "a" * 32, "b" * 32, "c" * 32


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def launch(world: World, sid: str, user: str = "alice") -> None:
    world.portal.outbox.launch(LaunchRequested(sid, user, (), "desktop", Resources(2, 1024, 4), True, 3600, 600))


def found(world: World, sid: str = A) -> Desktop:
    desktop = world.portal.desktops.find(sid)
    assert desktop is not None
    return desktop


def lose_the_ledger(world: World) -> None:
    world.ledger.dispose()
    world.portal.fleet._reader._engine.dispose()
    for path in Path(world.ledger_url.removeprefix("sqlite:///")).parent.glob("ledger.db*"):
        path.unlink()


def test_nothing_is_nothing(world: World) -> None:
    assert world.portal.desktops.find(A) is None


def test_from_the_click_to_the_end(world: World) -> None:
    launch(world, A)
    assert (found(world).state, found(world).waiting) == ("saved", True)
    world.run_deferred()
    assert found(world).state == "sent"
    for state in (State.QUEUED, State.ASSIGNED, State.STARTING, State.RUNNING, State.STOPPING, State.ENDED):
        sid = f"{list(State).index(state):032x}"
        world.session(sid, "alice", state)
        desktop = found(world, sid)
        assert (desktop.state, desktop.waiting, desktop.running, desktop.over) == (
            state,
            state in (State.QUEUED, State.ASSIGNED, State.STARTING),
            state is State.RUNNING,
            state is State.ENDED,
        )
        assert desktop.title == "Linux desktop" and desktop.sentence.endswith(".")


def test_a_queue_that_is_away_is_only_blamed_when_it_is(world: World) -> None:
    launch(world, A)
    assert "being sent" in found(world).sentence
    world.clock.now += 5
    assert "queue can't be reached" in found(world).sentence


def test_time_left_counts_from_when_it_ran(world: World) -> None:
    world.session(A, "alice", State.RUNNING, lifetime_s=3600)
    world.clock.now += 600
    assert found(world).time_left_s is None, "its host is silent, so nobody knows"
    world.host("h1")
    assert found(world).time_left_s == pytest.approx(3000)
    world.clock.now += 9999
    world.host("h1")
    assert found(world).time_left_s == 0
    world.session(B, "alice", State.QUEUED)
    assert found(world, B).time_left_s is None


def test_a_machine_that_left_the_catalogue_still_has_a_name(world: World) -> None:
    world.session(A, "alice", machine="gone")
    assert found(world).title == "gone"


def test_why_it_waits(world: World) -> None:
    world.session(A, "alice", State.QUEUED)
    world.session(B, "bob", State.QUEUED)
    with world.writer.begin() as tx:
        tx.explain([(B, Wait(2, 90.0, (Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free"),)), 5.0)])
    story = world.portal.desktops.story(found(world, B))
    assert story.place == 2
    assert story.verdicts == (("h1", "memory_short", "h1: 2.1 of 4 GiB free"),)


def test_a_list_shows_what_the_ledger_does_not_know_yet(world: World) -> None:
    world.session(A, "alice", State.RUNNING)
    world.session(C, "bob", State.RUNNING)
    world.clock.now += 10
    launch(world, B)
    desktops, sure = world.portal.desktops.of_user("alice")
    assert [(desktop.sid, desktop.state) for desktop in desktops] == [(B, "saved"), (A, "running")] and sure


def test_without_the_ledger_what_was_asked_for_is_still_shown(world: World) -> None:
    launch(world, A)
    world.session(B, "alice", State.RUNNING)
    lose_the_ledger(world)
    assert found(world).unsure
    desktops, sure = world.portal.desktops.of_user("alice")
    assert [desktop.sid for desktop in desktops] == [A] and not sure
    for ask in (lambda: world.portal.desktops.find(B), world.portal.desktops.live, world.portal.fleet.hosts):
        with pytest.raises(Problem) as caught:
            ask()
        assert caught.value.reason is Refused.RECORDS_AWAY
    assert world.portal.desktops.story(found(world)).desktop.unsure
    assert "the ledger can't be read" in world.portal.health().reasons


def test_health_names_what_is_away(world: World) -> None:
    assert world.portal.health().ready
    world.broker.crash()
    health = world.portal.health()
    assert not health.ready and "broker" in health.reasons[0]


def test_a_host_whose_figures_are_old_is_unknown(world: World) -> None:
    guests = (GuestReport(A, 1, Phase.RUNNING, True), GuestReport(B, 2, Phase.ENDED, True))
    world.host("fresh", seen_ago=3, guests=guests)
    world.host("silent", seen_ago=300)
    with world.writer.begin() as tx:
        tx.add_host("never")
    hosts = {host.name: host for host in world.portal.fleet.hosts()}
    assert hosts["fresh"].report is not None and hosts["fresh"].guests == 1
    assert hosts["silent"].report is None and hosts["silent"].seen_s == pytest.approx(300)
    assert hosts["never"].report is None and hosts["never"].seen_s is None


def test_queues_are_told_or_unknown(world: World) -> None:
    world.host("h1")
    queues = {queue.name: queue for queue in world.portal.fleet.queues()}
    assert queues[SCHEDULER_COMMANDS].alarm, "nobody consumes: launches would wait for ever"
    assert queues["host.h1"].messages == 0 and not queues[DEAD].alarm
    world.broker.crash()
    queues = {queue.name: queue for queue in world.portal.fleet.queues()}
    assert {queue.messages for queue in queues.values()} == {None}
    assert not any(queue.alarm for queue in queues.values()) and all(queue.problem for queue in queues.values())


def test_a_queue_that_never_was_does_not_hide_the_others(world: World) -> None:
    world.host("unenrolled")
    queues = {queue.name: queue for queue in world.portal.fleet.queues()}
    assert queues["host.unenrolled"].problem == "bus_queue_missing"
    assert queues[SCHEDULER_COMMANDS].messages == 0


def test_draining_is_confirmed_or_refused(world: World) -> None:
    world.host("h1")
    world.portal.fleet.drain("h1", True, "root")
    (sent,) = world.broker.pending(SCHEDULER_COMMANDS)
    assert decode(sent.type, sent.body) == DrainRequested("h1", True, "root")
    with pytest.raises(Problem) as caught:
        world.portal.fleet.drain("ghost", True, "root")
    assert caught.value.reason is Refused.NO_SUCH_HOST
    world.broker.crash()
    with pytest.raises(Problem) as caught:
        world.portal.fleet.drain("h1", False, "root")
    assert caught.value.reason is Refused.QUEUE_AWAY


def test_every_reason_makes_a_sentence(world: World) -> None:
    session = world.session(A, "alice", State.RUNNING)
    for reason in Reason:
        desktop = world.portal.desktops._from_session(replace(session, reason=reason, state=State.STOPPING), False, {})
        assert desktop.sentence.startswith("It is being stopped.") and len(desktop.sentence) > 25
