"""What hosts had over time: kept once a minute, thinned to quarters of an hour, with gaps where nothing was known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import func, select
from support.portals import PASSWORD, World, bearer, signed_in

from deskfleet.portal import tables
from deskfleet.portal.app import create_app
from deskfleet.portal.history import Span
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import Resources
from deskfleet.schemas.topology import SCHEDULER_COMMANDS

MIDNIGHT = 1_700_006_400  # 2023-11-15 00:00 UTC
BEGUN = MIDNIGHT - 1_700_000_000  # as the clock of these tests counts
ADMIN = "root@example.org"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.clock.now = BEGUN
    yield world
    world.close()


def pass_minutes(world: World, many: int, load: float = 1.0) -> None:
    for _ in range(many):
        world.host(load1=load)
        world.portal.sample()
        world.clock.now += 60


def kept(world: World, step: int) -> int:
    with world.portal.store.reading() as connection:
        query = select(func.count()).where(tables.sample.c.step == step)
        return connection.scalar(query) or 0


def test_a_minute_is_kept_once_whoever_samples(world: World) -> None:
    world.host(load1=1.0)
    other = world.build()
    for second in (0, 15, 30, 45):
        world.clock.now = BEGUN + second
        world.portal.sample()
        other.sample()
        other.history.keep(other.fleet.hosts(), {})  # two that asked whether it is due at the same moment
    other.store.close()
    series = world.portal.history.of("h1", Span.HOUR)
    assert (kept(world, 60), series.step, series.times[-1]) == (1, 60, MIDNIGHT)
    assert {name: values[-1] for name, values in series.figures.items()} == {
        "cpus": 8,
        "load1": 1.0,
        "memory_mib": 32768,
        "memory_free_mib": 20000,
        "disk_mib": 500_000,
        "disk_free_mib": 400_000,
        "guests": 0,
        "gpus": 1,
        "gpus_used": 0,
    }
    assert series.figures["load1"][:-1] == [None] * 60


def test_a_silent_host_leaves_a_gap_and_no_stale_figure(world: World) -> None:
    pass_minutes(world, 2)
    for _ in range(3):  # it says nothing more
        world.portal.sample()
        world.clock.now += 60
    pass_minutes(world, 1, load=2.0)
    assert world.portal.history.of("h1", Span.HOUR).figures["load1"][-6:] == [1.0, 1.0, None, None, None, 2.0]


def test_a_chart_does_not_end_in_a_gap_before_this_minute_is_sampled(world: World) -> None:
    pass_minutes(world, 2)
    series = world.portal.history.of("h1", Span.HOUR)
    assert (series.times[-1], series.figures["load1"][-1]) == (MIDNIGHT + 60, 1.0)


def test_quarters_of_an_hour_are_means_of_what_is_over_also_after_the_portal_was_away(world: World) -> None:
    pass_minutes(world, 10, load=1.0)
    pass_minutes(world, 10, load=4.0)
    assert kept(world, 900) == 1
    world.clock.now = BEGUN + 3600  # away in the middle of the second quarter
    pass_minutes(world, 1)
    series = world.portal.history.of("h1", Span.MONTH)
    assert series.step == 900 and series.times[-4:] == [MIDNIGHT + 900 * quarter for quarter in range(4)]
    assert series.figures["load1"][-4:] == [2.0, 4.0, None, None]


def test_what_is_too_old_is_forgotten_and_the_means_stay(world: World) -> None:
    pass_minutes(world, 31)
    world.clock.now += 26 * 3600
    world.portal.prune()
    assert (kept(world, 60), kept(world, 900)) == (0, 2)
    world.clock.now += 32 * 24 * 3600
    world.portal.prune()
    assert kept(world, 900) == 0


def test_an_unreadable_ledger_ends_no_thread(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.ledger.dispose()
    for file in Path(world.ledger_url.removeprefix("sqlite:///")).parent.glob("ledger.db*"):
        file.write_bytes(b"not a database")
    world.portal.sample()
    assert "keeping the figures of the hosts" in caplog.text and kept(world, 60) == 0


def test_administrators_ask_by_page_and_api_and_get_the_same(world: World) -> None:
    pass_minutes(world, 3)
    world.portal.accounts.add(ADMIN, PASSWORD)
    app = create_app(world.portal)
    answer = app.test_client().get("/api/v1/hosts/h1/history?span=hour", headers=bearer(world, ADMIN))
    assert answer.json["figures"]["load1"][-3:] == [1.0] * 3
    for path, status, reason in (
        ("/api/v1/hosts/h2/history", 404, "no_such_host"),
        ("/api/v1/hosts/h1/history?span=year", 422, "bad_fields"),
    ):
        refused = app.test_client().get(path, headers=bearer(world, ADMIN))
        assert (refused.status_code, refused.json["reason"]) == (status, reason)
    page = signed_in(app, ADMIN).get("/admin/hosts/h1").text
    assert 'data-history="/api/v1/hosts/h1/history"' in page


def test_how_long_a_queue_was_never_seen_empty_is_told_whether_or_not_a_page_is_open(world: World) -> None:
    def busy() -> float | None:
        (found,) = [queue.busy_s for queue in world.portal.fleet.queues() if queue.name == SCHEDULER_COMMANDS]
        return found

    assert busy() is None
    world.portal.outbox.launch(LaunchRequested("a" * 32, "ada", (), "desktop", Resources(1, 512, 1), False, 3600, 3600))
    for _ in range(40):
        world.portal.sample()
        world.clock.now += 15
    assert busy() == 600
    world.portal.accounts.add(ADMIN, PASSWORD)
    assert "not empty for 10 min" in signed_in(create_app(world.portal), ADMIN).get("/admin/queues/").text
    world.broker.drop(SCHEDULER_COMMANDS)
    world.portal.sample()
    assert busy() is None
