"""Which hosts keep a template of which machine, and who is placed on one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine
from support.hosts import MACHINE, POLICY, host, index, moment, want
from support.scheduler_stage import FakeHost, Stage, launch, sid

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.hosts import HostState, Usage
from deskfleet.scheduler.placement import NoFit, Placement, choose
from deskfleet.schemas.machine import Instant, Machine, ReadyBy, Share, Size
from deskfleet.schemas.messages import DrainRequested, TemplateOrdered
from deskfleet.schemas.session import Birth, Resources, State
from deskfleet.schemas.template import (
    Blueprint,
    TemplateOrder,
    TemplateReport,
    TemplateState,
    blueprints,
    fitting,
    tenant,
)

SMALL, LARGE = Size(1, 1024), Size(4, 4096)
INSTANT = replace(MACHINE, instant=Instant(ReadyBy.MARK, Share.MACHINE, (LARGE, SMALL)))
KEY = blueprints(INSTANT)[0].key


def sized(cpus: int, memory_mib: int, disk_gib: int = 10, gpus: int = 0) -> Resources:
    return Resources(cpus, memory_mib, disk_gib, gpus)


def kept(blueprint: Blueprint, state: TemplateState = TemplateState.READY, mib: int = 500) -> TemplateReport:
    serving = state is TemplateState.READY
    return TemplateReport(
        blueprint.key, blueprint.machine, blueprint.tenant, blueprint.cpus, blueprint.memory_mib, state, serving, mib
    )


# --- which template a size is forked from -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "template"),
    [
        (sized(1, 1024), SMALL),
        (sized(2, 2048), SMALL),
        (sized(4, 4096), LARGE),
        (sized(6, 8192), LARGE),
        (sized(3, 8192), SMALL),
        (sized(1, 1024 + 128), SMALL),
        (sized(1, 1024 + 100), None),
        (sized(1, 512), None),
        (sized(1, 1024, disk_gib=1), None),
        (sized(1, 1024, gpus=1), None),
    ],
)
def test_a_size_is_forked_from_the_largest_template_that_can_grow_to_it(size: Resources, template: Size | None) -> None:
    machine = replace(INSTANT, disk_gib=replace(INSTANT.disk_gib, min=1, default=10))
    found = fitting(machine, size, ())
    assert (Size(found.cpus, found.memory_mib) if found else None) == template


def test_a_machine_that_is_not_instant_has_none() -> None:
    assert blueprints(MACHINE) == () and fitting(MACHINE, sized(1, 1024), ()) is None


def test_groups_share_with_themselves_only() -> None:
    shared = replace(INSTANT, groups=("staff", "course"), instant=Instant(ReadyBy.MARK, Share.GROUP, (SMALL,)))
    size = sized(1, 1024)
    keys = {group: fitting(shared, size, (group,)) for group in ("staff", "course")}
    assert len({found.key for found in keys.values() if found}) == 2
    assert fitting(shared, size, ("other",)) is None, "whom only a name lets in, boots"
    assert tenant(shared, ("zoo", "staff", "course")) == "course", "always the same of several"
    assert tenant(INSTANT, ("staff",)) == ""


def test_whatever_makes_a_template_another_one_changes_its_key() -> None:
    base = blueprints(INSTANT)[0]
    others = [
        replace(base, sha256="9" * 64),
        replace(base, cpus=2),
        replace(base, most_cpus=99),
        replace(base, ready=ReadyBy.STILL),
        replace(base, copied=True),
        replace(base, tenant="staff"),
    ]
    assert len({each.key for each in (base, *others)}) == len(others) + 1


# --- placement --------------------------------------------------------------------------------------------------


def test_a_host_that_has_it_ready_comes_first_while_it_has_room() -> None:
    full = Usage(1, 0, 16000)
    plain, warm = host("h1"), host("h2", load1=20.0, serving=frozenset({KEY}))

    def chosen(*hosts: HostState, **changes: object) -> str:
        wanted = want(template=KEY, **changes)
        found = choose(wanted, index(hosts).walk(wanted), moment())
        return found.host if isinstance(found, Placement) else ""

    assert chosen(plain, warm) == "h2"
    assert chosen(plain, host("h2", usage=full, serving=frozenset({KEY}))) == "h1"
    assert chosen(plain, warm, avoid=frozenset({"h2"})) == "h1"
    assert chosen(host("h1", usage=full), warm, avoid=frozenset({"h2"})) == "h2"


def test_templates_count_as_memory_that_is_taken() -> None:
    reports = (kept(blueprints(INSTANT)[0], mib=15_000),)
    assert isinstance(choose(want(), [host("h1", templates=reports)], moment()), NoFit)
    assert host("h1", templates=reports).memory_offered == 16384 - POLICY.host_reserve_mib - 15_000


# --- the real scheduler -----------------------------------------------------------------------------------------


@pytest.fixture
def machines() -> dict[str, Machine]:
    return {INSTANT.name: replace(INSTANT, instant=Instant(ReadyBy.MARK, Share.MACHINE, (SMALL,)))}


@pytest.fixture
def stage(tmp_path: Path, machines: dict[str, Machine]) -> Iterator[Stage]:
    engine: Engine = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrate(engine)
    made = Stage(engine, Settings())
    made.machines = machines
    yield made
    engine.dispose()


def told(*hosts: FakeHost) -> dict[str, list[str]]:
    """The machines that each host was told last to keep ready."""
    return {each.name: [b.machine for b in each.templates[-1].blueprints] if each.templates else [] for each in hosts}


def has(host: FakeHost, state: TemplateState = TemplateState.READY, mib: int = 500) -> None:
    reports = tuple(kept(blueprint, state, mib) for blueprint in host.templates[-1].blueprints)
    host.report = replace(host.report, templates=reports)


def test_a_machine_is_kept_ready_on_so_many_hosts(stage: Stage) -> None:
    hosts = [stage.host(f"h{number}", templates=()) for number in range(1, 5)]
    old = stage.host("old")
    stage.pass_time(12)
    assert told(*hosts) == {"h1": ["tiny"], "h2": ["tiny"], "h3": [], "h4": []}
    assert not old.templates, "it never keeps any"
    before = [len(each.templates) for each in hosts]
    stage.pass_time(60)
    assert [len(each.templates) for each in hosts] == before, "said once"


def test_another_host_takes_over_from_one_that_is_drained_or_silent(stage: Stage) -> None:
    hosts = [stage.host(f"h{number}", templates=()) for number in range(1, 4)]
    stage.pass_time(12)
    for each in hosts[:2]:
        has(each)
    stage.ask(DrainRequested("h1", True, "root"))
    stage.pass_time(12)
    assert told(*hosts) == {"h1": [], "h2": ["tiny"], "h3": ["tiny"]}
    has(hosts[2])
    hosts[1].deaf = True
    stage.ask(DrainRequested("h1", False, "root"))
    stage.pass_time(40)
    assert told(*hosts)["h1"] == ["tiny"] and told(*hosts)["h3"] == ["tiny"], "who has it keeps it"


def test_a_restarted_scheduler_leaves_templates_where_they_are(stage: Stage, machines: dict[str, Machine]) -> None:
    ready = (kept(blueprints(machines["tiny"])[0]),)
    hosts = [stage.host("h1", templates=()), stage.host("h2", templates=ready), stage.host("h3", templates=ready)]
    stage.pass_time(12)
    assert told(*hosts) == {"h1": [], "h2": ["tiny"], "h3": ["tiny"]}


def test_a_dropped_template_is_made_elsewhere(stage: Stage) -> None:
    hosts = [stage.host(f"h{number}", templates=()) for number in range(1, 4)]
    stage.pass_time(12)
    has(hosts[0])
    has(hosts[1], TemplateState.DROPPED, mib=0)
    stage.pass_time(12)
    assert told(*hosts)["h3"] == ["tiny"]


def test_a_launch_names_the_template_and_goes_where_it_is(stage: Stage) -> None:
    hosts = [stage.host(f"h{number}", templates=()) for number in range(1, 4)]
    stage.pass_time(12)
    has(hosts[1])
    hosts[1].born = Birth.FORKED
    stage.pass_time(6)
    stage.ask(launch(1, resources=sized(1, 1024, 1)))
    stage.pass_time(1)
    (start,) = hosts[1].starts
    assert start.template and start.template == hosts[1].templates[-1].blueprints[0].key
    assert stage.session(sid(1)).birth is Birth.FORKED


def test_templates_give_way_to_people_who_wait_for_the_memory(stage: Stage) -> None:
    one = stage.host("h1", templates=(), memory_mib=8192, memory_free_mib=8000)
    stage.pass_time(12)
    assert told(one) == {"h1": ["tiny"]}
    has(one, mib=2000)
    stage.pass_time(6)
    stage.ask(launch(1, resources=replace(INSTANT.defaults, memory_mib=7000)))
    stage.pass_time(12)
    assert stage.session(sid(1)).state is State.QUEUED
    assert told(one) == {"h1": []}
    one.report = replace(one.report, templates=())
    stage.pass_time(6)
    assert stage.session(sid(1)).host == "h1"
    stage.pass_time(700)
    assert told(one) == {"h1": ["tiny"]}, "they come back"


def test_an_administrators_order_reaches_the_host(stage: Stage) -> None:
    one = stage.host("h1", templates=())
    stage.pass_time(12)
    has(one)
    stage.pass_time(6)
    key = one.templates[-1].blueprints[0].key
    for order in (
        TemplateOrdered("h1", key, TemplateOrder.REBUILD, "root"),
        TemplateOrdered("h1", "0" * 16, TemplateOrder.DROP, "root"),
        TemplateOrdered("h9", key, TemplateOrder.DROP, "root"),
    ):
        stage.ask(order)
        stage.pass_time(1)
    assert one.orders == [TemplateOrdered("h1", key, TemplateOrder.REBUILD, "root")]
