"""An agent's heartbeats and the scheduler, both real, over a broker that loses what a test wants lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.consoles import report

from deskfleet.agent.link import Link
from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.reader import Reader
from deskfleet.ledger.writer import Writer
from deskfleet.runtime.memory_bus import MemoryBroker
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.decisions import Settings
from deskfleet.schemas import topology
from deskfleet.schemas.host import Host


class Stage:
    """A scheduler that was there first, and the agent of h1, which has yet to connect."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.broker = MemoryBroker(random.Random(1), self)
        engine = open_engine(f"sqlite:///{folder}/ledger.db")
        migrate(engine)
        self.reader = Reader(engine)
        self.deferred: list[Callable[[], None]] = []
        bus = self.broker.connect(
            "scheduler", lambda action: action(), declare=topology.core() + topology.for_host("h1")
        )
        self.scheduler = Scheduler(Writer(engine), bus, self, dict, Settings(), self.deferred.append)
        self.scheduler.start()
        bus.start()
        self.truth = report()
        self.link = Link(
            "h1",
            self.broker.connect("agent-h1", lambda action: action()),
            None,  # type: ignore[arg-type]  no command comes that it would take
            lambda seq: replace(self.truth, seq=seq),
            self.monotonic,
            lambda _: None,
            lambda _: None,
            lambda _: None,
        )

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1.7e9 + self.now

    def work(self) -> None:
        """Everything that is under way comes to rest, and what hosts said is stored."""
        self.broker.run()
        while self.deferred:
            self.deferred.pop(0)()
            self.broker.run()
        self.scheduler.sweep()

    def lose(self, act: Callable[[], None]) -> None:
        act()
        self.broker.drop(topology.SCHEDULER_HEARTBEATS)

    def stored(self) -> Host | None:
        return next(iter(self.reader.hosts()), None)


@pytest.fixture
def on(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_a_host_whose_first_heartbeat_was_lost_is_asked_and_recorded(on: Stage) -> None:
    on.lose(on.link.start)
    on.work()
    assert on.stored() is None
    on.link.beat()
    on.work()
    host = on.stored()
    assert host and host.name == "h1" and host.report and host.report.cpus == 2


def test_a_lost_change_is_asked_for_at_the_next_small_heartbeat(on: Stage) -> None:
    on.link.start()
    on.work()
    on.truth = replace(on.truth, images=("a" * 64,))
    on.lose(on.link.beat)
    on.work()
    host = on.stored()
    assert host and host.report and host.report.images == ()
    on.now += 5.0
    on.link.beat()
    on.work()
    host = on.stored()
    assert host and host.report and host.report.images == ("a" * 64,)


def test_a_restarted_scheduler_asks_for_what_it_does_not_hold(on: Stage) -> None:
    on.link.start()
    on.work()
    on.scheduler.fleet.hosts.clear()
    on.scheduler.fleet.load([Host("h1")], [])
    on.truth = replace(on.truth, load1=0.7)
    on.link.beat()
    on.work()
    state = on.scheduler.fleet.hosts["h1"]
    assert state.report is not None and state.report.load1 == 0.7
