"""Which templates a host keeps, makes, lends and gives up; with templates that are made of nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from support.hosts import MACHINE

from deskfleet.agent.argv import Paths, qemu
from deskfleet.agent.processes import option
from deskfleet.agent.seal import Program, describes, digest, frozen, order, processor
from deskfleet.agent.template_store import Files, Template, TemplateError
from deskfleet.agent.templates import MOST_FAILURES, RETRY_S, Room, Rules, Slot, Templates, next_to_make, to_give_up
from deskfleet.schemas.machine import (
    Drivers,
    Format,
    Instant,
    Machine,
    MachineError,
    Os,
    ReadyBy,
    Share,
    Size,
    parse_machine,
)
from deskfleet.schemas.messages import HostTemplates, TemplateOrdered
from deskfleet.schemas.session import Birth
from deskfleet.schemas.template import Blueprint, TemplateOrder, TemplateState, blueprints

DESKTOP = replace(
    MACHINE,
    name="desktop",
    os=Os.LINUX,
    format=Format.QCOW2,
    instant=Instant(ReadyBy.MARK, Share.MACHINE, (Size(2, 1024),)),
)
(BLUEPRINT,) = blueprints(DESKTOP)
KEY = BLUEPRINT.key
ROOM = Room(load1=0.0, cpus=4, memory_free_mib=16_000)


class Stage:
    """A host whose templates take no time and no memory; what is made, removed and told is kept."""

    def __init__(self, left: dict[str, Template] | None = None) -> None:
        self.now = 1000.0
        self.room = ROOM
        self.sealed = "s1"
        self.made: list[str] = []
        self.removed: list[Template] = []
        self.states: list[TemplateState] = []
        self.fault: Exception | None = None
        self.meanwhile: Callable[[], None] = lambda: None
        self.left = left or {}
        self.forks: Counter[str] = Counter()
        self.kept = Templates(
            store=self,
            build=self.build,
            seal=lambda _: self.sealed,
            images=lambda: frozenset({MACHINE.sha256}),
            room=lambda: self.room,
            forks=lambda: self.forks,
            now=lambda: self.now,
            changed=self.changed,
        )

    def load(self, clean: Callable[[str], None]) -> dict[str, Template]:
        clean("the guest that was making one")
        return self.left

    def remove(self, template: Template) -> None:
        self.removed.append(template)

    def changed(self) -> None:
        self.states += [slot.state for slot in self.kept.slots.values()]

    async def build(self, blueprint: Blueprint, seal: str, testing: Callable[[], None]) -> Template:
        self.made.append(blueprint.machine)
        testing()
        self.meanwhile()
        if self.fault:
            raise self.fault
        return template(blueprint, seal)

    def told(self, *wanted: Blueprint) -> None:
        self.kept.told(HostTemplates("h1", "0" * 16, wanted))

    def tend(self) -> None:
        asyncio.run(self.kept.tend())

    def order(self, wish: TemplateOrder) -> None:
        self.kept.ordered(TemplateOrdered("h1", KEY, wish, "root"))

    @property
    def state(self) -> TemplateState:
        return self.kept.report()[0].state

    def lend(self) -> tuple[Template | None, Birth]:
        return self.kept.lend(order(BLUEPRINT, "a" * 32))


def template(blueprint: Blueprint, seal: str = "s1") -> Template:
    return Template(blueprint, seal, 1, 0, Files(Path("/nowhere")), NOTHING, 0)


NOTHING = 0  # a descriptor that is open, of no size


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture
def ready(stage: Stage) -> Stage:
    stage.told(BLUEPRINT)
    stage.tend()
    return stage


# --- life -------------------------------------------------------------------------------------------------------


def test_what_is_wanted_is_made_tried_and_lent(stage: Stage) -> None:
    assert stage.lend() == (None, Birth.NO_TEMPLATE)
    stage.told(BLUEPRINT)
    assert stage.state is TemplateState.WAITING and stage.lend() == (None, Birth.NO_TEMPLATE)
    stage.tend()
    assert stage.states[-3:] == [TemplateState.BUILDING, TemplateState.TESTING, TemplateState.READY]
    assert stage.lend() == (template(BLUEPRINT), Birth.FORKED)
    stage.kept.worked(KEY)
    (said,) = stage.kept.report()
    assert (said.serving, said.hits, said.misses, said.machine) == (True, 1, 1, "desktop")
    stage.tend()
    assert stage.made == ["desktop"], "once"


def test_what_is_not_wanted_any_more_goes(ready: Stage) -> None:
    ready.told()
    assert len(ready.removed) == 1 and ready.kept.report() == ()


def test_what_is_withdrawn_while_it_is_made_goes_when_it_is_done(stage: Stage) -> None:
    stage.told(BLUEPRINT)
    stage.meanwhile = stage.told
    stage.tend()
    assert stage.removed == [template(BLUEPRINT)] and stage.kept.report() == ()


def test_a_launch_that_asks_for_none_boots(ready: Stage) -> None:
    assert ready.kept.lend(replace(order(BLUEPRINT, "a" * 32), template="")) == (None, Birth.BOOTED)


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "9" * 64},
        {"machine": "other"},
        {"os": Os.WINDOWS},
        {"drivers": Drivers.COMPATIBLE},
        {"format": Format.RAW},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_nobody_gets_another_machine_than_the_one_that_was_asked_for(ready: Stage, changes: dict[str, object]) -> None:
    start = replace(order(BLUEPRINT, "a" * 32), **changes)  # type: ignore[arg-type]
    assert not describes(BLUEPRINT, start)
    assert ready.kept.lend(start) == (None, Birth.NO_TEMPLATE)


def test_nobody_gets_a_smaller_size_either(ready: Stage) -> None:
    start = order(BLUEPRINT, "a" * 32)
    small = replace(start, resources=replace(start.resources, memory_mib=512))
    assert ready.kept.lend(small) == (None, Birth.NO_TEMPLATE)


def test_a_template_of_another_qemu_is_never_forked_and_made_anew(ready: Stage) -> None:
    ready.sealed = "s2"
    assert ready.lend() == (None, Birth.NO_TEMPLATE)
    assert ready.removed == [template(BLUEPRINT)]
    ready.tend()
    assert ready.lend() == (template(BLUEPRINT, "s2"), Birth.FORKED)


def test_it_is_made_anew_also_when_nobody_asks_for_it(ready: Stage) -> None:
    ready.sealed = "s2"
    ready.tend()
    assert ready.made == ["desktop", "desktop"] and ready.removed == [template(BLUEPRINT)]


def test_without_qemu_nothing_is_made(stage: Stage) -> None:
    stage.told(BLUEPRINT)
    stage.sealed = ""
    stage.tend()
    assert not stage.made and "qemu is missing" in stage.kept.report()[0].detail


def test_what_a_former_agent_made_serves_until_it_is_not_wanted() -> None:
    stage = Stage({KEY: template(BLUEPRINT)})
    cleaned: list[str] = []
    stage.kept.recover(cleaned.append)
    assert cleaned == ["the guest that was making one"]
    assert stage.lend() == (template(BLUEPRINT), Birth.FORKED)
    stage.told(BLUEPRINT)
    stage.tend()
    assert not stage.made and not stage.removed
    stage.told()
    assert stage.removed == [template(BLUEPRINT)]


def test_a_fault_of_ours_does_not_end_the_care_for_templates(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        monkeypatch.setattr("deskfleet.agent.templates._LOOK_S", 0.0)
        stage.told(BLUEPRINT)
        stage.fault = ZeroDivisionError()
        caring = asyncio.create_task(stage.kept.keep())
        while not stage.made:
            await asyncio.sleep(0)
        stage.fault, stage.now = None, stage.now + 1e6
        while len(stage.made) < 2 or stage.state is not TemplateState.READY:
            await asyncio.sleep(0)
        caring.cancel()

    asyncio.run(work())


# --- what fails -------------------------------------------------------------------------------------------------


def test_one_that_can_not_be_made_is_tried_again_later_and_later(stage: Stage) -> None:
    stage.told(BLUEPRINT)
    stage.fault = TemplateError("the screen never stands still")
    stage.tend()
    assert stage.state is TemplateState.FAILED and "never stands still" in stage.kept.report()[0].detail
    tries = []
    for _ in range(600):
        stage.now += 10.0
        before = len(stage.made)
        stage.tend()
        if len(stage.made) > before:
            tries.append(stage.now)
    waits = [later - earlier for earlier, later in pairwise([1000.0, *tries])]
    assert waits[:4] == [RETRY_S, 2 * RETRY_S, 4 * RETRY_S, 8 * RETRY_S]


def test_a_new_one_that_fails_leaves_the_old_one_serving(ready: Stage) -> None:
    ready.fault = TemplateError("no")
    ready.order(TemplateOrder.REBUILD)
    assert ready.lend()[1] is Birth.FORKED, "while it waits"
    ready.meanwhile = lambda: ready.states.append(TemplateState.READY if ready.lend()[0] else TemplateState.FAILED)
    ready.tend()
    assert ready.states[-2] is TemplateState.READY, "while it is made"
    assert ready.lend()[1] is Birth.FORKED and not ready.removed, "and after that"


def test_forks_that_fail_rest_the_template_until_it_was_made_anew(ready: Stage) -> None:
    for _ in range(MOST_FAILURES - 1):
        ready.kept.failed(KEY, "qemu ended")
    assert ready.lend()[1] is Birth.FORKED
    ready.kept.worked(KEY)
    for _ in range(MOST_FAILURES):
        assert ready.lend()[1] is Birth.FORKED, "one that works begins the count anew"
        ready.kept.failed(KEY, "qemu ended")
    assert ready.lend() == (None, Birth.TEMPLATE_RESTS)
    assert ready.state is TemplateState.RESTING and "qemu ended" in ready.kept.report()[0].detail
    ready.tend()
    assert ready.made == ["desktop"], "not at once"
    ready.now += RETRY_S
    ready.tend()
    assert ready.lend()[1] is Birth.FORKED


# --- orders -----------------------------------------------------------------------------------------------------


def test_a_dropped_one_stays_away_until_it_is_ordered_again(ready: Stage) -> None:
    ready.order(TemplateOrder.DROP)
    assert ready.removed and ready.state is TemplateState.DROPPED
    ready.told(BLUEPRINT)
    ready.tend()
    assert ready.made == ["desktop"] and ready.lend() == (None, Birth.NO_TEMPLATE)
    ready.order(TemplateOrder.REBUILD)
    ready.tend()
    assert ready.lend()[1] is Birth.FORKED


def test_one_that_is_dropped_while_it_is_made_goes_when_it_is_done(stage: Stage) -> None:
    stage.told(BLUEPRINT)
    stage.meanwhile = lambda: stage.order(TemplateOrder.DROP)
    stage.tend()
    assert stage.removed == [template(BLUEPRINT)] and stage.state is TemplateState.DROPPED


def test_an_order_for_one_that_is_not_here_does_nothing(stage: Stage) -> None:
    stage.order(TemplateOrder.REBUILD)
    assert stage.kept.report() == ()


# --- room -------------------------------------------------------------------------------------------------------

RULES = Rules(most_load=0.5, floor_mib=1000)


def slots(**changes: object) -> list[Slot]:
    return [replace(Slot(BLUEPRINT), **changes)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("room", "detail"),
    [
        (Room(2.0, 4, 2024), ""),
        (Room(2.1, 4, 2024), "waits until the host is less busy (load 2.1)"),
        (Room(0.0, 4, 2023), "waits for 2024 MiB of free memory (2023 MiB are free)"),
    ],
)
def test_nothing_is_made_on_a_busy_or_a_full_host(room: Room, detail: str) -> None:
    (slot,) = found = slots()
    assert (next_to_make(found, room, RULES, 0.0) is None) == bool(detail)
    assert slot.detail == detail


def test_one_that_is_not_due_does_not_hold_up_another() -> None:
    other = Slot(replace(BLUEPRINT, machine="other"))
    assert next_to_make([*slots(due=99.0), other], ROOM, RULES, 1.0) is other


def test_the_one_that_was_not_used_for_the_longest_time_goes_when_memory_runs_short() -> None:
    used = Slot(BLUEPRINT, template(BLUEPRINT), used_at=9.0)
    unused = Slot(replace(BLUEPRINT, machine="other"), template(BLUEPRINT), used_at=3.0)
    empty = Slot(replace(BLUEPRINT, machine="third"))
    assert to_give_up([used, unused, empty], replace(ROOM, memory_free_mib=999), RULES) is unused
    assert to_give_up([used, unused, empty], replace(ROOM, memory_free_mib=1000), RULES) is None
    assert to_give_up([empty], replace(ROOM, memory_free_mib=0), RULES) is None


def test_what_was_given_up_stays_away_for_a_while(ready: Stage) -> None:
    ready.room = replace(ROOM, memory_free_mib=10)
    ready.tend()
    assert len(ready.removed) == 1 and ready.lend() == (None, Birth.NO_TEMPLATE)
    ready.room = ROOM
    ready.tend()
    assert len(ready.made) == 1
    ready.now += Rules().hold_s
    ready.tend()
    assert len(ready.made) == 2


# --- the seal ---------------------------------------------------------------------------------------------------


def test_the_seal_is_over_qemu_processor_devices_and_image() -> None:
    base = (BLUEPRINT, "qemu 7.2", "", "tcg", 1)
    others: list[tuple[Blueprint, str, str, str, int]] = [
        (replace(BLUEPRINT, sha256="9" * 64), *base[1:]),  # type: ignore[list-item]
        (BLUEPRINT, "qemu 7.2.1", "", "tcg", 1),
        (BLUEPRINT, "qemu 7.2", "EPYC", "tcg", 1),
        (BLUEPRINT, "qemu 7.2", "", "kvm", 1),
        (BLUEPRINT, "qemu 7.2", "", "tcg", 2),
    ]
    assert digest(*base) == digest(*base)
    assert len({digest(*each) for each in (base, *others)}) == len(others) + 1


def test_qemu_is_asked_for_its_version_again_when_its_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = [b"QEMU 7.2", b"QEMU 8.0"]
    program = Program("qemu", lambda _: said.pop(0))
    assert program.version() == ""
    (tmp_path / "qemu").write_text("one")
    (tmp_path / "qemu").chmod(0o755)
    first = program.version()
    assert "7.2" in first and program.version() == first and len(said) == 1
    (tmp_path / "qemu").write_text("another")
    assert "8.0" in program.version()
    (tmp_path / "qemu").unlink()
    assert program.version() == ""


def test_the_processor_matters_where_guests_see_it(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel\t\t: 17\ncpu MHz\t\t: 2000\nflags\t\t: a b\n\nprocessor\t: 1\n")
    assert processor("tcg", info) == ""
    assert processor("kvm", info) == "model\t\t: 17\nflags\t\t: a b"


# --- command lines ----------------------------------------------------------------------------------------------


def line(*, disk: Path | None) -> list[str]:
    paths = Paths(Path("/run/x"), Path("/disks/x.qcow2"), Path("/images/d.qcow2"))
    form = frozen(BLUEPRINT, 7, 3, shared=disk is None, disk=disk)
    return qemu(order(BLUEPRINT, "a" * 32), paths, accel="tcg", network_fd=None, frozen=form)


def devices(line: list[str]) -> list[str]:
    return [word for flag, word in pairwise(line) if flag == "-device"]


def test_a_fork_has_the_very_devices_of_its_template() -> None:
    made, fork = line(disk=None), line(disk=Path("/t/disk.qcow2"))
    assert devices(made) == devices(fork)
    for name in ("-m", "-smp", "-machine", "-cpu", "-rtc"):
        assert option(made, name) == option(fork, name) != ""
    assert made.count("pcie-root-port,id=port0,chassis=2") == 1


def test_a_template_has_nothing_of_a_person_and_nothing_that_keeps_its_state_from_being_saved() -> None:
    made = line(disk=None)
    assert not [word for word in made if "vdagent" in word or "netdev" in word or "mac=" in word]
    assert option(made, "-incoming") == "" and option(line(disk=Path("/t/d")), "-incoming") == "defer"


def test_what_a_fork_writes_is_its_own() -> None:
    fork = line(disk=Path("/t/disk.qcow2"))
    memory = next(word for word in fork if word.startswith("memory-backend-file"))
    assert memory.endswith("mem-path=/proc/self/fd/7,share=off")
    disk = next(word for word in fork if '"node-name":"disk"' in word)
    assert '"backing":{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"/t/disk.qcow2"}' in disk


# --- the catalogue ----------------------------------------------------------------------------------------------

ENTRY = """
title = "Desktop"
text = "A desktop"
os = "linux"
[image]
file = "d.qcow2"
format = "qcow2"
sha256 = "%s"
[cpus]
min = 1
default = 2
max = 4
[memory_mib]
min = 512
default = 1024
max = 8192
[disk_gib]
min = 1
default = 4
max = 8
[access]
users = ["*"]
""" % ("a" * 64)


def parsed(text: str) -> Machine:
    return parse_machine("d", ENTRY + text)


def test_a_machine_is_kept_ready_in_its_default_size_unless_sizes_are_named() -> None:
    assert parsed("").instant is None
    assert parsed("[instant]").instant == Instant(ReadyBy.STILL, Share.MACHINE, (Size(2, 1024),))
    named = parsed('[instant]\nready = "mark"\nshare = "never"\nsizes = [{cpus = 4, memory_mib = 4096}]').instant
    assert named == Instant(ReadyBy.MARK, Share.NEVER, (Size(4, 4096),))
    assert blueprints(parsed('[instant]\nshare = "never"'))[0].copied


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[instant]\nsizes = [{cpus = 8, memory_mib = 1024}]", "outside the machine's sizes"),
        ('[instant]\nshare = "group"', "needs [access] groups"),
        ('[gpu]\npolicy = "required"\n[instant]', "can't be kept ready"),
        ('[instant]\nready = "soon"', "ready"),
        ("[instant]\nwhen = 1", "Unknown field"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(text: str, words: str) -> None:
    with pytest.raises(MachineError, match="instant") as caught:
        parsed(text)
    assert words in str(caught.value)
