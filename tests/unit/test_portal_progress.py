"""The stages from click to desktop, and how often a page asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.portals import World

from deskfleet.portal.desktops import Desktop
from deskfleet.portal.progress import pause_ms, stages
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import Event, Resources, State

SID = "a" * 32


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def seen(world: World) -> list[tuple[str, float | None]]:
    return [(s.status, s.after_s) for s in stages(world.portal.desktops.story(found(world)), world.clock.wall())]


def found(world: World) -> Desktop:
    desktop = world.portal.desktops.find(SID)
    assert desktop
    return desktop


def ask(world: World) -> None:
    world.portal.outbox.launch(LaunchRequested(SID, "alice", (), "desktop", Resources(2, 1024, 4), True, 3600, 600))


def test_each_step_is_told_with_its_time_from_the_click(world: World) -> None:
    ask(world)
    world.clock.now += 2
    assert seen(world) == [("done", 0), ("current", 2), ("ahead", None), ("ahead", None), ("ahead", None)]
    now = world.clock.wall()
    session = world.session(SID, "alice", State.QUEUED, created_at=now, changed_at=now)
    world.clock.now += 3
    assert seen(world) == [("done", 0), ("done", 2), ("current", 5), ("ahead", None), ("ahead", None)]
    for event, done in ((Event.PLACE, 3), (Event.ACCEPTED, 4), (Event.READY, 5)):
        session = world.step(session, event)
        assert [status for status, _ in seen(world)].count("done") == done
    assert "current" not in [status for status, _ in seen(world)]


def test_back_in_the_queue_means_back_to_its_stage(world: World) -> None:
    session = world.session(SID, "alice", State.STARTING)
    world.step(session, Event.RETRY)
    assert [status for status, _ in seen(world)] == ["done", "done", "current", "ahead", "ahead"]


def test_an_end_shows_how_far_it_came(world: World) -> None:
    session = world.session(SID, "alice", State.STARTING)
    world.step(session, Event.GONE)
    assert [status for status, _ in seen(world)] == ["done", "done", "done", "done", "ahead"]


def test_an_end_before_the_scheduler_knew_shows_that(world: World) -> None:
    world.broker.crash()
    ask(world)
    world.tick(601)
    assert [status for status, _ in seen(world)] == ["done", "ahead", "ahead", "ahead", "ahead"]


def test_a_page_asks_often_at_first_then_less_and_never_about_what_is_over(world: World) -> None:
    ask(world)
    assert pause_ms(found(world), world.clock.wall()) == 150
    world.clock.now += 4
    assert pause_ms(found(world), world.clock.wall()) == 1000
    now = world.clock.wall()
    session = world.session(SID, "alice", State.QUEUED, created_at=now - 4, changed_at=now)
    assert pause_ms(found(world), now) == 150, "something has just happened"
    world.step(session, Event.STOP)
    assert pause_ms(found(world), now) == 0


def test_every_session_state_has_its_stages(world: World) -> None:
    for number, state in enumerate(State):
        sid = f"{number:032x}"
        world.session(sid, "alice", state)
        desktop = world.portal.desktops.find(sid)
        assert desktop
        shown = stages(world.portal.desktops.story(desktop), world.clock.wall())
        assert len(shown) == 5 and shown[0].status == "done"


def test_reasons_of_the_portals_own_do_not_clash_with_the_schedulers() -> None:
    assert "not_taken_up" not in set(Reason)
