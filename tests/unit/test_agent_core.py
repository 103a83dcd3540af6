"""The agent's rules: what is obeyed, what is refused, and what time does. Walks through crashes are in tests/sim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from deskfleet.agent.core import REMEMBER_RUN_S, REMEMBER_S, Agent
from deskfleet.agent.journal import Entry, JournalError
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu, GuestReport, Phase
from deskfleet.schemas.machine import Firmware, Format, Os, Video
from deskfleet.schemas.messages import (
    HostFence,
    VmExtend,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import Outcome, Resources

IMAGE = "a" * 64
SID, OTHER = "1" * 32, "2" * 32
GPU = Gpu("0000:01:00.0", "A100", 1, ("0000:01:00.0", "0000:01:00.1"), True)


def start(sid: str = SID, generation: int = 1, **changes: object) -> VmStart:
    order = VmStart(
        sid, generation, "ann", "tiny", Os.OTHER, IMAGE, Format.ISO, Video.STD, Firmware.BIOS,
        Resources(1, 128, 1), (), False, 3600, 60, 600,
    )  # fmt: skip
    return replace(order, **changes)  # type: ignore[arg-type]


class Journal:
    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.generation: int | None = 0
        self.full = False

    def load(self) -> tuple[dict[str, Entry], int | None]:
        return dict(self.entries), self.generation

    def _room(self) -> None:
        if self.full:
            raise JournalError("the journal can't be written: No space left on device")

    def put(self, entry: Entry) -> None:
        self._room()
        self.entries[entry.sid] = entry

    def forget(self, sid: str) -> None:
        self._room()
        self.entries.pop(sid, None)

    def set_generation(self, generation: int) -> None:
        self._room()
        self.generation = generation


class Hypervisor:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.runs: set[str] = set()
        self.cpu: float | None = 0.0
        self.touches = 0
        self.said: list[str] = []

    def cpu_s(self, _: str) -> float | None:
        return self.cpu

    def touched(self, _: str) -> int:
        return self.touches

    def warn(self, entry: Entry, text: str) -> None:
        self.said.append(text)

    def launch(self, entry: Entry) -> None:
        self.calls.append(("launch", entry.sid))

    def shutdown(self, entry: Entry) -> None:
        self.calls.append(("shutdown", entry.sid))

    def adopt(self, entry: Entry) -> bool:
        self.calls.append(("adopt", entry.sid))
        return entry.sid in self.runs

    def clean(self, sid: str) -> None:
        self.calls.append(("clean", sid))


class Bench:
    """An agent with everything around it in hand."""

    def __init__(self) -> None:
        self.journal, self.hypervisor = Journal(), Hypervisor()
        self.now = 1000.0
        self.boot = "boot-1"
        self.reports: list[GuestReport] = []
        self.agent = self.restart()

    def restart(self, *, told: bool = True) -> Agent:
        """The agent starts anew; the scheduler has `told` it where the numbers are."""
        self.hypervisor.calls.clear()
        self.agent = Agent(
            self.boot,
            self.journal,
            self.hypervisor,
            self.reports.append,
            lambda: self.now,
            lambda: frozenset({IMAGE}),
            lambda: (GPU,),
        )
        self.agent.recover()
        if told:
            self.agent.fence(HostFence("h1", self.agent.last_generation))
        return self.agent

    @property
    def said(self) -> tuple[Phase, Outcome | None, Reason | None]:
        report = self.reports[-1]
        return report.phase, report.outcome, report.reason

    def run(self, sid: str = SID, generation: int = 1, **changes: object) -> None:
        self.agent.start(start(sid, generation, **changes))
        self.agent.ready(sid)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_start_is_in_the_journal_before_anything_is_made(bench: Bench) -> None:
    seen: list[bool] = []
    bench.hypervisor.launch = lambda entry: seen.append(entry.sid in bench.journal.entries)  # type: ignore[method-assign]
    bench.agent.start(start())
    assert seen == [True]
    assert bench.agent.last_generation == 1


def test_c29_a_repeated_start_is_one_guest_and_takes_the_higher_number(bench: Bench) -> None:
    bench.run()
    for generation in (1, 5, 3):
        bench.agent.start(start(generation=generation))
    assert bench.hypervisor.calls == [("launch", SID)]
    assert bench.agent.last_generation == 5
    assert [r.generation for r in bench.reports][-2:] == [5, 5]
    assert bench.said == (Phase.RUNNING, None, None)


def test_a_late_start_is_refused_as_stale(bench: Bench) -> None:
    bench.run(generation=4)
    bench.agent.start(start(OTHER, 3))
    assert bench.said == (Phase.ENDED, Outcome.FAILED, Reason.STALE)
    assert bench.hypervisor.calls == [("launch", SID)]


def test_c29_a_stop_that_overtakes_its_start_wins(bench: Bench) -> None:
    bench.agent.stop(VmStop(SID, 2, Outcome.STOPPED, Reason.STOPPED_BY_USER))
    bench.agent.start(start(generation=2))
    assert bench.hypervisor.calls == []
    assert bench.said == (Phase.ENDED, Outcome.STOPPED, Reason.STOPPED_BY_USER)


def test_a_stop_under_an_older_number_leaves_the_newer_guest(bench: Bench) -> None:
    bench.run(generation=5)
    bench.agent.stop(VmStop(SID, 4, Outcome.STOPPED, Reason.ORPHAN))
    assert ("shutdown", SID) not in bench.hypervisor.calls


def test_what_has_run_is_never_started_again_here(bench: Bench) -> None:
    bench.run()
    bench.agent.exited(SID)
    bench.agent.start(start(generation=9))
    assert bench.hypervisor.calls.count(("launch", SID)) == 1
    assert bench.said == (Phase.ENDED, Outcome.GUEST_OFF, Reason.GUEST_OFF)
    assert bench.reports[-1].generation == 9


def test_a_start_that_failed_may_be_tried_again_under_a_new_number(bench: Bench) -> None:
    bench.agent.start(start())
    bench.agent.failed(SID, Reason.QEMU_EXITED, "last words")
    assert bench.said == (Phase.ENDED, Outcome.FAILED, Reason.QEMU_EXITED)
    bench.agent.start(start(generation=2))
    assert bench.hypervisor.calls.count(("launch", SID)) == 2


def test_a_missing_image_is_refused_with_its_reason(bench: Bench) -> None:
    bench.agent.start(start(sha256="b" * 64))
    assert bench.said == (Phase.ENDED, Outcome.FAILED, Reason.IMAGE_MISSING)
    assert bench.agent.last_generation == 1


def test_c28_a_journal_that_can_t_be_written_starts_nothing_and_can_still_stop(bench: Bench) -> None:
    bench.run()
    bench.journal.full = True
    bench.agent.start(start(OTHER, 2))
    assert bench.said == (Phase.ENDED, Outcome.FAILED, Reason.STATE_UNWRITABLE)
    bench.journal.full = False
    bench.agent.start(start(OTHER, 2))
    assert ("launch", OTHER) not in bench.hypervisor.calls, "a refusal must hold even though it was not durable"
    bench.journal.full = True
    bench.agent.stop(VmStop(SID, 1, Outcome.STOPPED, Reason.STOPPED_BY_USER))
    assert ("shutdown", SID) in bench.hypervisor.calls
    bench.agent.exited(SID)
    assert bench.said == (Phase.ENDED, Outcome.STOPPED, Reason.STOPPED_BY_USER)


def test_c35_a_gpu_is_never_given_twice_whatever_the_scheduler_says(bench: Bench) -> None:
    bench.run(gpu_addresses=GPU.functions)
    bench.agent.start(start(OTHER, 2, gpu_addresses=("0000:01:00.1",)))
    assert bench.said == (Phase.ENDED, Outcome.FAILED, Reason.GPU_UNAVAILABLE)
    bench.agent.exited(SID)
    bench.agent.start(start(OTHER, 3, gpu_addresses=GPU.functions))
    assert ("launch", OTHER) in bench.hypervisor.calls


@pytest.mark.parametrize("addresses", [("0000:01:00.0",), ("0000:02:00.0",), ("0000:01:00.0", "0000:02:00.0")])
def test_only_a_whole_gpu_that_is_offered_is_given(bench: Bench, addresses: tuple[str, ...]) -> None:
    bench.agent.start(start(gpu_addresses=addresses))
    assert bench.said == (Phase.ENDED, Outcome.FAILED, Reason.GPU_UNAVAILABLE)


@pytest.mark.parametrize("journal", [None, 3])
def test_an_agent_that_begins_starts_nothing_before_it_is_told_the_number(bench: Bench, journal: int | None) -> None:
    bench.journal.generation = journal
    bench.restart(told=False)
    bench.agent.start(start(generation=7))
    assert bench.said == (Phase.ENDED, Outcome.FAILED, Reason.FENCED)
    bench.agent.fence(HostFence("h1", 7))
    bench.agent.start(start(generation=7))
    assert bench.said[2] is Reason.STALE
    bench.agent.start(start(generation=8))
    assert bench.hypervisor.calls == [("launch", SID)]
    bench.restart(told=False)
    assert bench.agent.fenced and bench.agent.last_generation == 8


def test_a_start_that_a_full_disk_refused_is_not_obeyed_when_it_comes_again_to_a_new_life(bench: Bench) -> None:
    """The refusal was only in memory, and the scheduler has sent the session elsewhere on the strength of it."""
    bench.journal.full = True
    bench.agent.start(start(generation=5))
    assert bench.said[2] is Reason.STATE_UNWRITABLE
    bench.journal.full = False
    bench.restart(told=False)
    bench.agent.start(start(generation=5))
    bench.agent.fence(HostFence("h1", 5))
    bench.agent.start(start(generation=5))
    assert bench.hypervisor.calls == [] and bench.said[2] is Reason.STALE


def test_c37_a_restart_takes_over_what_runs_and_ends_what_does_not(bench: Bench) -> None:
    bench.run(SID, 1)
    bench.run(OTHER, 2)
    bench.hypervisor.runs = {SID}
    bench.restart()
    phases = {entry.sid: entry.phase for entry in bench.agent.entries}
    assert phases == {SID: Phase.RUNNING, OTHER: Phase.ENDED}
    assert ("clean", OTHER) in bench.hypervisor.calls and ("clean", SID) not in bench.hypervisor.calls
    assert bench.said == (Phase.ENDED, Outcome.GUEST_OFF, Reason.GUEST_OFF)


def test_a_restart_before_the_guest_was_up_is_a_failed_start(bench: Bench) -> None:
    bench.agent.start(start())
    bench.restart()
    assert bench.said == (Phase.ENDED, Outcome.FAILED, Reason.AGENT_RESTARTED)


def test_a_restart_finishes_a_stop_that_was_under_way(bench: Bench) -> None:
    bench.run()
    bench.agent.stop(VmStop(SID, 1, Outcome.STOPPED, Reason.STOPPED_BY_USER))
    bench.hypervisor.runs = {SID}
    bench.restart()
    assert bench.hypervisor.calls == [("adopt", SID), ("shutdown", SID)]


def test_after_a_reboot_everything_has_ended(bench: Bench) -> None:
    bench.run()
    bench.boot, bench.now = "boot-2", 5.0
    bench.restart()
    assert bench.said == (Phase.ENDED, Outcome.LOST, Reason.HOST_REBOOTED)
    assert ("adopt", SID) not in bench.hypervisor.calls


def test_the_end_of_a_lifetime_stops_a_guest(bench: Bench) -> None:
    bench.run(lifetime_s=100, persistent=True)
    bench.now += 99
    bench.agent.tick()
    assert ("shutdown", SID) not in bench.hypervisor.calls
    bench.now += 1
    bench.agent.tick()
    bench.agent.tick()
    assert bench.said == (Phase.STOPPING, Outcome.EXPIRED, Reason.EXPIRED)
    bench.agent.exited(SID)
    assert bench.said == (Phase.ENDED, Outcome.EXPIRED, Reason.EXPIRED)


def test_a_lifetime_goes_on_counting_over_a_restart(bench: Bench) -> None:
    bench.run(lifetime_s=100, persistent=True)
    bench.now += 60
    bench.hypervisor.runs = {SID}
    bench.restart()
    bench.now += 40
    bench.agent.tick()
    assert ("shutdown", SID) in bench.hypervisor.calls


def test_a_guest_may_run_longer_never_shorter_and_keeps_that_over_a_restart(bench: Bench) -> None:
    bench.run(lifetime_s=100, persistent=True)
    bench.hypervisor.runs.add(SID)
    for lifetime_s in (300, 200):
        bench.agent.extend(VmExtend(SID, 1, lifetime_s))
        assert bench.reports[-1].lifetime_s == 300
    bench.now += 150
    bench.restart()
    bench.agent.tick()
    assert bench.agent.guests()[0].left_s == 150.0
    bench.now += 150
    bench.agent.tick()
    assert bench.said == (Phase.STOPPING, Outcome.EXPIRED, Reason.EXPIRED)


def test_no_other_guest_and_no_earlier_one_is_let_run_longer(bench: Bench) -> None:
    bench.run(generation=5, lifetime_s=100)
    before = list(bench.reports)
    for late in (VmExtend(SID, 4, 900), VmExtend("f" * 32, 9, 900)):
        bench.agent.extend(late)
    assert bench.reports == before and bench.agent.guests()[0].lifetime_s == 100


def idle_after(bench: Bench, seconds: int, cpu_share: float, touch_every_s: int = 0) -> None:
    for second in range(seconds):
        bench.now += 1
        if touch_every_s and second % touch_every_s == 0:
            bench.hypervisor.touches += 1
        if bench.hypervisor.cpu is not None:
            bench.hypervisor.cpu += cpu_share
        bench.agent.tick()


def test_c42_a_guest_at_work_or_in_use_is_not_idle(bench: Bench) -> None:
    bench.run(persistent=True, idle_s=600, lifetime_s=10**6)
    idle_after(bench, 2000, cpu_share=0.5)
    assert bench.said[0] is Phase.RUNNING, "a job without a viewer"
    bench.agent.viewers(SID, 1)
    idle_after(bench, 2000, cpu_share=0.0, touch_every_s=500)
    assert bench.said[0] is Phase.RUNNING, "somebody who reads, and scrolls now and then"
    for count in (0, 1, 0):
        bench.agent.viewers(SID, count)
        idle_after(bench, 590, cpu_share=0.0)
    assert bench.said[0] is Phase.RUNNING, "somebody who comes and goes"
    bench.hypervisor.cpu = None
    idle_after(bench, 2000, cpu_share=0.0)
    assert bench.said[0] is Phase.RUNNING, "nobody knows"


def test_a_guest_that_nobody_uses_and_that_does_nothing_ends_as_idle(bench: Bench) -> None:
    bench.run(persistent=True, idle_s=600, lifetime_s=10**6)
    bench.agent.viewers(SID, 1)
    idle_after(bench, 100, cpu_share=0.5)
    bench.agent.viewers(SID, 0)
    idle_after(bench, 590, cpu_share=0.005)
    assert bench.said[0] is Phase.RUNNING
    idle_after(bench, 20, cpu_share=0.005)
    assert bench.said == (Phase.STOPPING, Outcome.IDLE, Reason.IDLE)


def test_a_window_that_was_left_open_keeps_nothing_alive(bench: Bench) -> None:
    bench.run(persistent=True, idle_s=600, lifetime_s=10**6)
    bench.agent.viewers(SID, 1)
    idle_after(bench, 620, cpu_share=0.0)
    assert bench.said == (Phase.STOPPING, Outcome.IDLE, Reason.IDLE)


def told(bench: Bench, seconds: float, extend_to: int = 0) -> list[str]:
    """What the person in the guest is told as time passes, looked at every ten seconds."""
    bench.hypervisor.said.clear()
    if extend_to:
        bench.agent.extend(VmExtend(SID, 7, extend_to))
    for _ in range(int(seconds // 10)):
        bench.now += 10
        bench.agent.tick()
    return list(bench.hypervisor.said)


def test_a_person_is_told_30_and_5_minutes_before_the_end_in_the_guest_too(bench: Bench) -> None:
    bench.run(persistent=True, lifetime_s=7200, generation=7)
    ends = "This desktop ends in {} min. Save your work."
    assert told(bench, 5390) == []
    assert told(bench, 300) == [ends.format(30)]
    assert told(bench, 300, extend_to=10800) == [], "there is time again"
    assert told(bench, 4820) == [ends.format(30), ends.format(5)]
    assert bench.said == (Phase.STOPPING, Outcome.EXPIRED, Reason.EXPIRED)


def test_a_short_life_is_not_full_of_warnings(bench: Bench) -> None:
    bench.run(persistent=True, lifetime_s=1200)
    assert told(bench, 1190) == ["This desktop ends in 5 min. Save your work."]


def test_an_idle_guest_is_told_before_it_ends_and_again_when_it_is_idle_again(bench: Bench) -> None:
    bench.run(persistent=True, lifetime_s=10**6, idle_s=1200)
    idle = "Nobody uses this desktop. It ends in 5 min, unless somebody does."
    assert told(bench, 950) == [idle]
    bench.hypervisor.touches += 1
    assert told(bench, 800) == []
    assert told(bench, 300) == [idle]
    bench.agent.viewers(SID, 1)
    assert told(bench, 800) == []


def test_a_guest_tells_how_much_of_its_lifetime_is_left_while_it_runs(bench: Bench) -> None:
    bench.agent.start(start(lifetime_s=100))
    assert bench.reports[-1].left_s is None
    bench.now += 50
    bench.agent.ready(SID)
    assert bench.reports[-1].left_s == 100
    bench.now += 30
    assert [guest.left_s for guest in bench.agent.guests()] == [70]
    bench.hypervisor.runs.add(SID)
    bench.restart()
    assert [guest.left_s for guest in bench.agent.guests()] == [70]
    bench.now += 80
    assert [guest.left_s for guest in bench.agent.guests()] == [0]
    bench.agent.tick()
    assert bench.reports[-1].left_s is None


def test_c42_single_shot_ends_only_when_the_last_viewer_stays_away_for_the_grace(bench: Bench) -> None:
    bench.run(grace_s=60, connect_s=600)
    bench.agent.viewers(SID, 1)
    bench.agent.viewers(SID, 0)
    bench.now += 59
    bench.agent.tick()
    bench.agent.viewers(SID, 2)
    bench.agent.viewers(SID, 1)
    bench.now += 3000
    bench.agent.tick()
    assert ("shutdown", SID) not in bench.hypervisor.calls
    bench.agent.viewers(SID, 0)
    bench.now += 60
    bench.agent.tick()
    assert bench.said == (Phase.STOPPING, Outcome.DISCONNECTED, Reason.DISCONNECTED)


def test_single_shot_ends_when_nobody_ever_connects(bench: Bench) -> None:
    bench.run(connect_s=600)
    bench.now += 599
    bench.agent.tick()
    assert ("shutdown", SID) not in bench.hypervisor.calls
    bench.now += 1
    bench.agent.tick()
    assert bench.said == (Phase.STOPPING, Outcome.DISCONNECTED, Reason.NEVER_CONNECTED)


def test_a_persistent_guest_needs_no_viewer(bench: Bench) -> None:
    bench.run(persistent=True, lifetime_s=10**6)
    bench.agent.viewers(SID, 1)
    bench.agent.viewers(SID, 0)
    bench.now += 10**5
    bench.agent.tick()
    assert ("shutdown", SID) not in bench.hypervisor.calls


def test_cleaning_comes_before_the_report_that_frees_its_place(bench: Bench) -> None:
    bench.run()
    order: list[str] = []
    bench.hypervisor.clean = lambda _: order.append("clean")  # type: ignore[method-assign]
    report: Callable[[GuestReport], None] = lambda _: order.append("report")  # noqa: E731
    bench.agent._report = report
    bench.agent.exited(SID)
    assert order == ["clean", "report"]


@pytest.mark.parametrize(("ran", "remembered_s"), [(False, REMEMBER_S), (True, REMEMBER_RUN_S)])
def test_the_ended_are_listed_for_a_while_and_their_number_outlives_them(
    bench: Bench, ran: bool, remembered_s: float
) -> None:
    """Longer when they have run: a scheduler that was cut off must hear of it, lest it starts them again."""
    if ran:
        bench.run(generation=9)
    else:
        bench.agent.start(start(generation=9))
    bench.agent.exited(SID)
    bench.now += remembered_s
    bench.agent.tick()
    assert [g.phase for g in bench.agent.guests()] == [Phase.ENDED]
    bench.now += 1
    bench.agent.tick()
    assert bench.agent.guests() == () and bench.journal.entries == {}
    bench.restart()
    assert bench.agent.last_generation == 9


def test_c28_what_is_told_of_a_running_guest_is_reported_once_and_kept_over_a_restart(bench: Bench) -> None:
    bench.run(persistent=True)
    bench.hypervisor.runs.add(SID)
    bench.agent.says(SID, "Paused")
    before = len(bench.reports)
    bench.agent.says(SID, "Paused")
    bench.agent.says("f" * 32, "Paused")
    assert (bench.reports[-1].phase, bench.reports[-1].detail, len(bench.reports)) == (Phase.RUNNING, "Paused", before)
    bench.restart()
    assert bench.agent.guests()[0].detail == "Paused"
    bench.agent.says(SID, "")
    assert bench.reports[-1].detail == ""
    bench.agent.exited(SID)
    bench.agent.says(SID, "Paused")
    assert bench.said == (Phase.ENDED, Outcome.GUEST_OFF, Reason.GUEST_OFF) and bench.reports[-1].detail == ""
