"""Which host fetches an image: the choice, and the real scheduler with hosts that say what an agent would say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine
from support.hosts import IMAGE, MACHINE, NOW, host, index, moment, want
from support.scheduler_stage import FakeHost, Stage, launch, sid

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.filters import verdict
from deskfleet.scheduler.hosts import HostState, Usage
from deskfleet.scheduler.images import PATIENCE_S, fetcher
from deskfleet.schemas import topology
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Fetch, FetchFault, FetchState
from deskfleet.schemas.messages import CatalogueImage, StopRequested
from deskfleet.schemas.session import State

FETCHING = Fetch(IMAGE, FetchState.FETCHING, 40, 2000)
FAILED = Fetch(IMAGE, FetchState.FAILED, 0, 0, FetchFault.WRONG_DIGEST, "another SHA-256")


def bare(name: str, *fetches: Fetch, **changes: object) -> HostState:
    """A host that does not hold the image, and can fetch."""
    return host(name, images=(), fetches=fetches, **changes)


FULL = Usage(1, 0, 16000)
CHOICES: list[tuple[str, list[HostState], str]] = [
    ("nobody can", [host("h1", images=()), host("h2", images=())], ""),
    ("one can", [host("h1", images=()), bare("h2")], "h2"),
    ("the best of two", [bare("h1", load1=20.0), bare("h2")], "h2"),
    ("one does already", [bare("h1"), bare("h2", FETCHING, load1=20.0)], "h2"),
    ("one has it in its queue", [bare("h1"), bare("h2", Fetch(IMAGE, FetchState.WAITING), load1=20.0)], "h2"),
    ("one that fetches and will not take it", [bare("h1"), bare("h2", FETCHING, draining=True)], "h1"),
    ("one that has failed", [bare("h1", load1=20.0), bare("h2", FAILED)], "h1"),
    ("all have failed", [bare("h1", FAILED), bare("h2", FAILED)], ""),
    ("one without room", [bare("h1", usage=FULL), bare("h2", load1=20.0)], "h2"),
    ("all without room, and nobody holds it", [bare("h1", usage=FULL)], "h1"),
    ("all without room, but one holds it", [bare("h1", usage=FULL), host("h2", usage=FULL)], ""),
    ("the one that holds it is full", [bare("h1"), host("h2", usage=FULL)], "h1"),
    ("the one that holds it is drained, the other full", [bare("h1", usage=FULL), host("h2", draining=True)], "h1"),
    ("silent, drained, dead", [bare("h1", heard=NOW - 99), bare("h2", draining=True), bare("h3", dead=True)], ""),
]  # fmt: skip


@pytest.mark.parametrize(("hosts", "chosen"), [row[1:] for row in CHOICES], ids=[row[0] for row in CHOICES])
def test_who_fetches(hosts: list[HostState], chosen: str) -> None:
    assert fetcher(want(), index(hosts).walk(want()), moment()) == chosen


def test_whoever_was_asked_is_left_to_it() -> None:
    hosts = index([bare("h1"), bare("h2", load1=20.0)])
    assert fetcher(want(), hosts.walk(want()), moment(), {"h2"}) == "h2"


def test_a_fetch_that_never_moves_is_not_waited_for() -> None:
    stuck = bare("h1", FETCHING)
    hosts = [stuck, bare("h2", load1=20.0)]
    later = NOW + PATIENCE_S
    for state in hosts:
        assert state.report
        state.take(replace(state.report, seq=2), later, moment().policy)
    assert fetcher(want(), hosts, moment(now=later)) == "h2"
    assert stuck.report
    stuck.take(replace(stuck.report, fetches=(replace(FETCHING, percent=45),)), later, moment().policy)
    assert fetcher(want(), hosts, moment(now=later)) == "h1"


def test_the_words() -> None:
    def says(state: HostState) -> str:
        found = verdict(want(), state, moment())
        assert found
        return found.sentence

    assert says(bare("h3", FETCHING)) == "h3: fetching the image, 40 %"
    assert says(bare("h3", Fetch(IMAGE, FetchState.WAITING))) == "h3: fetches the image next"
    assert says(bare("h3", FAILED)) == "h3: could not fetch this image: another SHA-256"
    assert says(bare("h3")) == "h3: does not hold this image yet, and can fetch it"
    assert says(host("h3", images=())) == "h3: does not hold this image"


# --- the real scheduler -----------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrate(made)
    yield made
    made.dispose()


@pytest.fixture
def stage(engine: Engine) -> Stage:
    return Stage(engine, Settings())


def says(host: FakeHost, **changes: object) -> None:
    host.report = replace(host.report, **changes)  # type: ignore[arg-type]


def wanted(host: FakeHost) -> list[tuple[str, ...]]:
    return [message.wanted for message in host.images if message.wanted]


def reasons(stage: Stage) -> dict[str, Reason]:
    wait = stage.reader.wait(sid(1))
    return {found.host: found.reason for found in wait.verdicts} if wait else {}


def test_a_launch_of_an_image_that_no_host_holds_waits_and_makes_one_fetch_it(stage: Stage) -> None:
    hosts = [stage.host("h1", images=(), fetches=()), stage.host("h2", images=(), fetches=())]
    stage.pass_time(40)  # the time in which nothing is called impossible is over
    stage.ask(launch(1))
    stage.pass_time(2)
    assert stage.session(sid(1)).state is State.QUEUED
    assert reasons(stage) == {"h1": Reason.IMAGE_FETCHABLE, "h2": Reason.IMAGE_FETCHABLE}
    (one,) = [each for each in hosts if wanted(each)]
    assert wanted(one) == [(IMAGE,)]
    assert one.images[-1].images == (CatalogueImage(IMAGE, MACHINE.file, MACHINE.format),)
    says(one, fetches=(FETCHING,))
    stage.pass_time(60)
    assert reasons(stage)[one.name] is Reason.IMAGE_FETCHING
    assert wanted(one) == [(IMAGE,)] and sum(len(wanted(each)) for each in hosts) == 1, "said once, and to one"
    says(one, images=(IMAGE,), fetches=())
    stage.pass_time(6)
    assert stage.session(sid(1)).host == one.name


def test_a_wish_that_is_lost_is_said_again(stage: Stage) -> None:
    one = stage.host("h1", images=(), fetches=())
    stage.pass_time(6)
    stage.ask(launch(1))
    stage.lose[topology.host_queue("h1")] = 1
    stage.pass_time(12)
    assert wanted(one) and set(wanted(one)) == {(IMAGE,)}


def test_another_host_fetches_when_one_has_failed(stage: Stage) -> None:
    hosts = [stage.host("h1", images=(), fetches=()), stage.host("h2", images=(), fetches=())]
    stage.ask(launch(1))
    stage.pass_time(3)
    (one,) = [each for each in hosts if wanted(each)]
    (other,) = [each for each in hosts if each is not one]
    says(one, fetches=(FAILED,))
    stage.pass_time(12)
    assert set(wanted(other)) == {(IMAGE,)}
    assert stage.session(sid(1)).state is State.QUEUED


def test_hosts_that_fetch_are_told_the_catalogue_and_its_changes_and_others_nothing(stage: Stage) -> None:
    one, plain = stage.host("h1", fetches=()), stage.host("h2")
    stage.pass_time(12)
    (told,) = one.images
    assert told.wanted == () and told.images == (CatalogueImage(IMAGE, MACHINE.file, MACHINE.format),)
    newer = replace(MACHINE, name="newer", sha256="b" * 64, file="newer.iso")
    stage.machines = {"tiny": MACHINE, "newer": newer, "twin": replace(newer, name="twin")}
    stage.pass_time(12)
    assert [image.sha256 for image in one.images[-1].images] == [IMAGE, "b" * 64] and len(one.images) == 2
    assert plain.images == []


@pytest.mark.parametrize("why", ["cancelled", "started elsewhere"])
def test_nothing_is_wanted_for_whoever_no_longer_waits(stage: Stage, why: str) -> None:
    one = stage.host("h1", images=(), fetches=())
    stage.lose[topology.host_queue("h1")] = 1_000
    stage.ask(launch(1))
    stage.pass_time(3)
    if why == "cancelled":
        stage.ask(StopRequested(sid(1), "ann", False))
    else:
        stage.host("h2")
    stage.pass_time(6)
    stage.lose.clear()
    stage.pass_time(20)
    assert wanted(one) == [] and one.images, "it was told of the catalogue alone"
