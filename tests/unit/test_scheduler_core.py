"""The scheduler's batches: what one bad message, a foreign sender or an absent ledger does to the others: nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.hosts import MACHINE, POLICY, ManualClock
from support.scheduling import Control

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.reader import Reader
from deskfleet.ledger.writer import Writer
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.decisions import Settings
from deskfleet.schemas import topology
from deskfleet.schemas.machine import Drivers, Firmware
from deskfleet.schemas.messages import LaunchRequested, StopRequested, VmStart
from deskfleet.schemas.session import Resources, State
from deskfleet.schemas.wire import encode

BAD = "b" * 32


class Bench:
    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.broker = MemoryBroker(random.Random(1), self.clock)
        engine = open_engine(f"sqlite:///{folder}/ledger.db")
        migrate(engine)
        self.reader = Reader(engine)
        self.deferred: list[Callable[[], None]] = []
        bus = self.broker.connect("scheduler", lambda action: action(), declare=topology.core())
        self.scheduler = Scheduler(
            Writer(engine), bus, self.clock, lambda: {"tiny": MACHINE}, Settings(policy=POLICY), self.deferred.append
        )
        self.scheduler.start()
        bus.start()

    def send(self, message: LaunchRequested | StopRequested, sender: str = "portal") -> None:
        bus = self.broker.connect(sender, lambda action: action())
        bus.start()
        kind, body = encode(message)
        bus.publish(Outgoing(topology.COMMANDS, "scheduler", kind, body)).result()
        bus.stop()

    def work(self) -> None:
        self.broker.run()
        while self.deferred:
            self.deferred.pop(0)()
        self.broker.run()

    def dead(self) -> int:
        return len(self.broker.pending(topology.DEAD))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def ask(sid: str) -> LaunchRequested:
    return LaunchRequested(sid, "ann", (), "tiny", Resources(1, 256, 1), False, 600, 600)


def test_a_batch_is_one_transaction_and_is_acknowledged_whole(bench: Bench) -> None:
    for number in range(5):
        bench.send(ask(f"{number:032x}"))
    bench.work()
    assert [session.state for session in bench.reader.live()] == [State.QUEUED] * 5
    assert bench.dead() == 0


def test_one_message_that_breaks_the_scheduler_spoils_only_itself(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are applied, it goes to the dead letters, and the cache is as the ledger."""
    decisions = bench.scheduler.decisions
    real = decisions._launch

    def broken(unit: object, request: LaunchRequested, now: float, wall: float) -> None:
        real(unit, request, now, wall)  # type: ignore[arg-type]
        if request.sid == BAD:
            raise KeyError("a fault of ours")

    monkeypatch.setattr(decisions, "_launch", broken)
    for sid in ("1" * 32, BAD, "2" * 32):
        bench.send(ask(sid))
    bench.work()
    assert sorted(session.sid for session in bench.reader.live()) == ["1" * 32, "2" * 32]
    assert sorted(bench.scheduler.fleet.sessions) == ["1" * 32, "2" * 32]
    assert bench.dead() == 1
    bench.send(ask("3" * 32))
    bench.work()
    assert len(bench.reader.live()) == 3


def test_a_fault_in_the_sweep_leaves_the_scheduler_working(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[object]:
        def job(_: object) -> None:
            raise KeyError("a fault of ours")

        return [job]

    with monkeypatch.context() as patched:
        patched.setattr(bench.scheduler.decisions, "overdue", broken)
        bench.scheduler.sweep()
    bench.send(ask("1" * 32))
    bench.work()
    assert bench.scheduler.healthy and len(bench.reader.live()) == 1


def test_what_an_agent_may_not_say_goes_to_the_dead_letters(bench: Bench) -> None:
    bench.send(ask("1" * 32), sender="agent-h1")
    bench.work()
    assert bench.reader.live() == [] and bench.dead() == 1


def test_c29_a_stop_that_comes_before_its_launch_wins(bench: Bench) -> None:
    bench.send(StopRequested("1" * 32, "ann", False))
    bench.send(ask("1" * 32))
    bench.work()
    session = bench.reader.session("1" * 32)
    assert session is not None and session.state is State.ENDED


def test_c28_what_a_host_tells_of_a_running_desktop_stands_with_it_and_changes_nothing_else() -> None:
    control = Control()
    host = control.host()
    sid = control.launch()
    before = control.session(sid)
    guest, end = host.guests[sid]
    for detail in ("Paused: the host's disk is full.", ""):
        control.wait(60)
        host.guests[sid] = replace(guest, detail=detail), end
        host.beat()
        control.work()
        assert control.session(sid) == replace(before, detail=detail), "its time began when it did"


@pytest.mark.parametrize("drivers", list(Drivers))
def test_a_host_is_told_what_the_catalogue_says_of_the_devices(drivers: Drivers) -> None:
    control = Control()
    control.machines["tiny"] = replace(MACHINE, drivers=drivers, firmware=Firmware.UEFI)
    host = control.host()
    control.launch()
    (start,) = [message for message in host.told if isinstance(message, VmStart)]
    assert (start.drivers, start.firmware, start.video) == (drivers, Firmware.UEFI, MACHINE.video)
