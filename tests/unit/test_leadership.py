"""Who leads, as time goes by: on a clock of the test's own, over the in-memory bus."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.exc import OperationalError
from support.hosts import MACHINE, POLICY, ManualClock

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.lease import Lease
from deskfleet.ledger.writer import Writer
from deskfleet.runtime.bus import Bus
from deskfleet.runtime.memory_bus import MemoryBroker, MemoryBus
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.leadership import PATIENCE_S, TAKEOVER_S, Leadership, is_gone, owner_name
from deskfleet.schemas import topology


class Candidate:
    """One scheduler process."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.engine: Engine = open_engine(stage.url)
        self.away = False
        event.listen(self.engine, "begin", self._fail)
        self.deferred: list[Callable[[], None]] = []
        self._stage = stage
        self.buses: list[MemoryBus] = []
        self.leadership = Leadership(Lease(self.engine, name), stage.clock, self._bus, self._scheduler)

    def _fail(self, _: object) -> None:
        if self.away:
            raise OperationalError("BEGIN", {}, Exception("gone"))

    def _bus(self) -> Bus:
        bus = self._stage.broker.connect("scheduler", lambda action: action(), declare=topology.core())
        self.buses.append(bus)
        return bus

    def _scheduler(self, lease: Lease, bus: Bus) -> Scheduler:
        return Scheduler(
            Writer(self.engine, lease), bus, self._stage.clock, lambda: {"tiny": MACHINE}, Settings(policy=POLICY),
            self.deferred.append,
        )  # fmt: skip

    @property
    def leads(self) -> bool:
        return self.leadership.scheduler is not None


class Stage:
    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder}/ledger.db"
        engine = open_engine(self.url)
        migrate(engine)
        engine.dispose()
        self.clock = ManualClock()
        self.broker = MemoryBroker(random.Random(1), self.clock)
        self.one, self.two = Candidate(self, "one"), Candidate(self, "two")

    def pass_time(self, seconds: float, *awake: Candidate) -> None:
        for _ in range(round(seconds / 0.25)):
            self.clock.now += 0.25
            for candidate in awake:
                candidate.leadership.tick()

    def consumers(self) -> int:
        return self.broker.depth(topology.SCHEDULER_COMMANDS).consumers


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path)
    stage.pass_time(1, stage.one, stage.two)
    assert stage.one.leads and not stage.two.leads and stage.consumers() == 1
    return stage


def test_the_one_that_leads_goes_on_and_the_other_stands_by(stage: Stage) -> None:
    stage.pass_time(60, stage.one, stage.two)
    assert stage.one.leads and not stage.two.leads


def test_silence_is_counted_by_who_stands_by_and_a_date_changes_nothing(stage: Stage) -> None:
    stage.clock.shift = 20 * 365 * 86400.0
    stage.pass_time(TAKEOVER_S - 0.5, stage.two)
    assert not stage.two.leads
    stage.pass_time(1, stage.two)
    assert stage.two.leads


def test_c33_a_paused_leader_that_wakes_up_steps_down_and_stands_by(stage: Stage) -> None:
    stage.pass_time(5, stage.two)
    assert stage.two.leads
    stage.pass_time(1, stage.one, stage.two)
    assert stage.two.leads and not stage.one.leads
    assert stage.consumers() == 1
    stage.pass_time(10, stage.one)
    assert stage.one.leads, "and leads again when its turn comes"


def test_a_leader_without_broker_lets_the_other_lead_at_once(stage: Stage) -> None:
    stage.one.buses[-1].disconnect()
    stage.pass_time(PATIENCE_S + 0.5, stage.one, stage.two)
    assert stage.two.leads and not stage.one.leads


def test_a_leader_without_ledger_steps_down_and_gives_back_what_it_held(stage: Stage) -> None:
    stage.one.away = True
    stage.pass_time(TAKEOVER_S + 1, stage.one, stage.two)
    assert stage.two.leads and not stage.one.leads and stage.consumers() == 1
    stage.one.away = False
    stage.pass_time(5, stage.one, stage.two)
    assert stage.two.leads and not stage.one.leads


def test_nobody_leads_without_the_broker_and_somebody_does_once_it_is_back(stage: Stage) -> None:
    stage.broker.crash()
    stage.pass_time(5, stage.one, stage.two)
    assert not stage.one.leads and not stage.two.leads
    stage.broker.recover()
    stage.pass_time(1, stage.one, stage.two)
    assert [stage.one.leads, stage.two.leads].count(True) == 1


def test_an_orderly_stop_hands_over_at_once(stage: Stage) -> None:
    stage.one.leadership.stop()
    stage.pass_time(0.5, stage.two)
    assert stage.two.leads and stage.consumers() == 1


def test_only_a_process_of_this_boot_and_namespace_that_is_not_there_is_surely_gone(tmp_path: Path) -> None:
    mine = owner_name()
    host, here, number = mine.split(" ")
    assert not is_gone(mine), "it is this very process"
    (tmp_path / number).mkdir()
    assert not is_gone(mine, tmp_path)
    assert is_gone(f"{host} {here} 999999999")
    for stranger in (f"{host} other-boot/pid:[1] 999999999", "", "nonsense", f"{host} {here} x", f"{host} {here} "):
        assert not is_gone(stranger)


def test_nobody_waits_for_a_leader_that_was_killed_on_this_machine(stage: Stage) -> None:
    stage.two.leadership._is_gone = lambda owner: owner == "one"
    stage.pass_time(0.5, stage.two)
    assert stage.two.leads
