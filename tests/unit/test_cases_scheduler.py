"""Cases C29 to C36 and C41 as far as they are the scheduler's: the real one, over the in-memory broker and a ledger.

Each docstring says the right outcome. Of the same cases stand elsewhere: C29 a stop before its launch
(test_scheduler_core), what an agent does with repeated commands (test_agent_core), twenty clicks (system/test_fleet);
C30 to C32 with a real broker (contract/test_cases_scheduler_broker), C31 losses between portal and ledger and C41 at
random (sim); C33 a paused leader (test_leadership, system/test_standby), C34 the order of hosts and a host that grows
(test_placement), each hostile figure on the wire (test_messages), C35 the agent's own lock (test_agent_core), C36
device trees, the functions of a group (test_gpus, test_placement), C41 guests that outlive kills (system/test_fleet).
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select
from support.hosts import POLICY, gpu
from support.scheduler_stage import Control, FakeHost, Stage, launch, sid

from deskfleet.ledger import tables
from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.lease import Lease
from deskfleet.ledger.writer import Conflict, Writer
from deskfleet.runtime.bus import Delivery
from deskfleet.runtime.memory_bus import MemoryBroker
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.intake import requested
from deskfleet.scheduler.policy import Caps
from deskfleet.schemas import topology
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import HostBeat, beat_of, inventory_digest
from deskfleet.schemas.messages import HostDeclaredDead, LaunchRequested, StopRequested, VmReport
from deskfleet.schemas.session import Event, Outcome, Resources, State, place
from deskfleet.schemas.wire import encode

#: One CPU promised for each that a host has, so that a host of eight takes eight.
EXACT = replace(POLICY, cpu_overcommit=1.0)


def make(folder: Path, **policy: object) -> Stage:
    engine = open_engine(f"sqlite:///{folder}/ledger.db")
    migrate(engine)
    return Stage(engine, Settings(policy=replace(EXACT, **policy)))  # type: ignore[arg-type]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return make(tmp_path)


def starts(stage: Stage) -> Counter[str]:
    """How often each session was told to start, anywhere."""
    return Counter(start.sid for host in stage.hosts.values() for start in host.starts)


# --- C29: one click, two machines --------------------------------------------------------------------------------


@pytest.mark.parametrize("times", range(1, 6))
def test_c29_a_launch_delivered_one_to_five_times_is_one_start(stage: Stage, times: int) -> None:
    """One request, one row, one machine on one host: whether it is repeated at once, while it runs, or after it."""
    hosts = [stage.host("h1"), stage.host("h2")]
    for _ in range(times):
        stage.ask(launch(1))
    stage.work()
    for _ in range(times):
        stage.ask(launch(1))
    stage.pass_time(30)
    assert [host.running() for host in hosts].count({sid(1)}) == 1 and starts(stage) == {sid(1): 1}
    (holder,) = (host for host in hosts if host.guests)
    holder.end(sid(1))
    for _ in range(times):
        stage.ask(launch(1))
    stage.pass_time(30)
    assert starts(stage) == {sid(1): 1} and stage.session(sid(1)).outcome is Outcome.GUEST_OFF
    assert len(stage.reader.recent()) == 1 and stage.dead_letters() == 0


@pytest.mark.parametrize("order", sorted(set(itertools.permutations("LLSS"))), ids="".join)
def test_c29_launches_and_stops_in_any_order_end_stopped_and_start_at_most_once(stage: Stage, order: str) -> None:
    """The stop wins in every order, also over a launch that is delivered late or again."""
    host = stage.host("h1")
    for letter in order:
        stage.ask(launch(1) if letter == "L" else StopRequested(sid(1), "ann", False))
        stage.work()
    stage.pass_time(15)
    assert stage.session(sid(1)).state is State.ENDED
    assert host.running() == set() and starts(stage)[sid(1)] <= 1


def test_c29_yesterdays_whole_queue_delivered_again_does_nothing(stage: Stage) -> None:
    """Acknowledged messages that come back days later start nothing and stop nothing."""
    host = stage.host("h1")
    yesterday = [launch(number) for number in range(4)] + [StopRequested(sid(0), "ann", False)]
    for message in yesterday:
        stage.ask(message)
    stage.pass_time(10)
    host.end(sid(1))
    stage.pass_time(10)
    before = [(s.sid, s.state, s.outcome, s.generation) for s in stage.reader.recent()]
    random.Random(3).shuffle(yesterday)
    for message in yesterday:
        stage.ask(message)
    stage.pass_time(10)
    assert [(s.sid, s.state, s.outcome, s.generation) for s in stage.reader.recent()] == before
    assert set(starts(stage).values()) == {1} and host.running() == {sid(2), sid(3)}


def test_c29_a_repeat_is_charged_once(tmp_path: Path) -> None:
    """Five deliveries of one launch count once against a person's cap."""
    stage = make(tmp_path, user_caps=Caps(sessions=2))
    host = stage.host("h1")
    for number in (1, 1, 1, 1, 1, 2, 3):
        stage.ask(launch(number))
    stage.pass_time(5)
    assert host.running() == {sid(1), sid(2)}
    waits = stage.reader.wait(sid(3))
    assert waits and [verdict.reason for verdict in waits.verdicts] == [Reason.USER_CAP]


def test_c29_reports_that_come_late_and_again_bring_nothing_back(stage: Stage) -> None:
    """What has ended stays ended, whatever is said of it later."""
    host = stage.host("h1")
    stage.ask(launch(1))
    stage.work()
    runs = host.guests[sid(1)]
    host.end(sid(1))
    stage.work()
    for _ in range(3):
        host.send(topology.report_key("h1"), VmReport("h1", runs))
        stage.work()
    session = stage.session(sid(1))
    assert (session.state, session.outcome) == (State.ENDED, Outcome.GUEST_OFF)
    assert {stop.sid for stop in host.stops} == {sid(1)}, "and if it did run, it would be told to stop"


# --- C31: message lost without a word ----------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    "queues",
    [
        ("host.h1",),
        (topology.SCHEDULER_REPORTS,),
        (topology.SCHEDULER_HEARTBEATS,),
        ("host.h1", topology.SCHEDULER_REPORTS, topology.SCHEDULER_HEARTBEATS),
    ],
    ids=["start", "echo", "heartbeat", "all"],
)
def test_c31_whatever_is_lost_the_desktop_runs_once(stage: Stage, queues: tuple[str, ...], times: int) -> None:
    """Starts, echoes, heartbeats that vanish cost time and nothing else."""
    host = stage.host("h1")
    stage.work()
    stage.ask(launch(1))
    stage.lose.update(dict.fromkeys(queues, times))
    stage.pass_time(60)
    assert all(stage.lose[queue] < times for queue in queues), "something was lost of each"
    assert stage.session(sid(1)).state is State.RUNNING and host.running() == {sid(1)}


def test_c31_every_accepted_request_ends_in_exactly_one_way(stage: Stage) -> None:
    """With a broker that dies again and again, each request runs, is refused with a reason, or was cancelled."""
    hosts = [stage.host(f"h{number}") for number in range(4)]
    rng = random.Random(5)
    stage.work()
    stopped = set()
    for number in range(40):
        wanted = launch(number, machine=rng.choice(["tiny", "tiny", "tiny", "gone"]))
        stage.ask(wanted)
        if rng.random() < 0.2:
            stage.ask(StopRequested(sid(number), "ann", False))
            stopped.add(sid(number))
        for queue in rng.sample(stage.broker.queues(), 3):
            stage.broker.deliver_one(queue)
        if rng.random() < 0.3:
            stage.control.flush()
        if rng.random() < 0.2:
            stage.broker.crash()
            stage.broker.recover()
    stage.pass_time(120)
    ends = Counter()
    for number in range(40):
        session = stage.session(sid(number))
        where = [host.name for host in hosts if session.sid in host.running()]
        if session.state is State.RUNNING:
            assert where == [session.host]
            ends["runs"] += 1
        elif session.outcome is Outcome.REJECTED:
            assert session.reason is Reason.UNKNOWN_MACHINE and where == []
            ends["refused"] += 1
        elif session.state is State.ENDED:
            assert session.sid in stopped and where == []
            ends["stopped"] += 1
        else:
            assert session.state is State.QUEUED and stage.reader.wait(session.sid) is not None
            ends["waits"] += 1
    assert sum(ends.values()) == 40 and min(ends["runs"], ends["refused"], ends["stopped"]) > 0


# --- C33: split brain --------------------------------------------------------------------------------------------


def split(stage: Stage) -> tuple[Control, Control]:
    """A cut between two halves of the broker: a scheduler on each side, one ledger, and each has heard of h1, and
    believes that its one GPU is free."""
    left = stage.control
    stage.host("h1", gpus=(gpu(1),))
    stage.work()
    other = MemoryBroker(random.Random(2), stage.clock)
    first, stage.broker = stage.broker, other
    there = FakeHost(stage, "h1", gpus=(gpu(1),))
    right = stage.start()
    there.beat()
    stage.hosts = {"h1": there}
    stage.work()
    stage.broker = first
    return left, right


def tell(control: Control, message: LaunchRequested) -> None:
    """A message reaches one of two schedulers, which decides it at once."""
    kind, body = encode(message)
    control.scheduler.on_delivery(
        Delivery("q", topology.COMMANDS, "scheduler", kind, body, "m", message.sid, "portal", False, lambda _: None)
    )
    control.flush()


def holds(stage: Stage) -> dict[tuple[str, str], str]:
    """Which session holds which function of which host."""
    with stage.engine.connect() as connection:
        return {(row.host, row.address): row.sid for row in connection.execute(select(tables.gpu_hold))}


def whole(session: str) -> dict[tuple[str, str], str]:
    """The first GPU of h1 is held whole."""
    return {("h1", address): session for address in gpu(1).functions}


def test_c33_c35_two_schedulers_never_give_one_gpu_twice(stage: Stage) -> None:
    """Both sides accept work; the one that comes second finds its number taken, decides anew and lets it wait."""
    left, right = split(stage)
    tell(left, launch(1, resources=Resources(1, 256, 1, 1)))
    tell(right, launch(2, resources=Resources(1, 256, 1, 1)))
    assert (stage.session(sid(1)).state, stage.session(sid(2)).state) == (State.ASSIGNED, State.QUEUED)
    assert holds(stage) == whole(sid(1))
    wait = stage.reader.wait(sid(2))
    assert wait and [verdict.reason for verdict in wait.verdicts] == [Reason.GPU_BUSY]
    assert len(left.scheduler.fleet.on("h1")) == len(right.scheduler.fleet.on("h1")) == 1, "both know it now"


def test_c33_numbers_of_two_schedulers_never_repeat(stage: Stage) -> None:
    """Each command number of a host is given out once, whoever decides."""
    left, right = split(stage)
    for number in range(1, 7):
        tell((left, right)[number % 2], launch(number))
    numbers = [session.generation for session in stage.reader.live()]
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    assert {session.state for session in stage.reader.live()} == {State.ASSIGNED}


def test_c35_the_second_claim_of_a_gpu_is_a_conflict(stage: Stage) -> None:
    """Two transactions decided on the same picture: the second is refused by the ledger itself and leaves nothing."""
    stage.host("h1", gpus=(gpu(1),))
    stage.work()
    one, two = Writer(stage.engine), Writer(stage.engine)
    sessions = [requested(launch(number, resources=Resources(1, 256, 1, 1)), 1.0, EXACT) for number in (1, 2)]
    with one.begin() as tx:
        for session in sessions:
            assert tx.add(session)
    with one.begin() as tx:
        placed = place(sessions[0], "h1", tx.claim("h1", 0), gpu(1).functions)
        tx.save(sessions[0], placed, Event.PLACE)
    with pytest.raises(Conflict), two.begin() as tx:
        tx.claim("h1", 0)
    with pytest.raises(Conflict), two.begin() as tx:
        tx.save(sessions[1], place(sessions[1], "h1", tx.claim("h1", 1), gpu(1).functions[1:]), Event.PLACE)
    assert holds(stage) == whole(sid(1))
    assert stage.session(sid(2)).state is State.QUEUED
    (host,) = stage.reader.hosts()
    assert host.generation == 1, "the number of the failed claim was not used up"


def test_c33_a_deposed_scheduler_settles_nothing_and_sends_nothing(tmp_path: Path) -> None:
    """It was paused for longer than its lease: what it held goes to the one that leads, and is decided once."""
    stage = make(tmp_path)
    stage.control.bus.stop()
    old, new = (Lease(stage.engine, name) for name in ("old", "new"))
    assert old.take(old.look())
    paused = stage.start(old)
    host = stage.host("h1")
    stage.work()
    assert new.take(new.look())
    stage.ask(launch(1))
    stage.work()
    assert paused.scheduler.over and host.starts == [] and stage.reader.session(sid(1)) is None
    paused.scheduler.sweep()
    stage.start(new)
    paused.bus.stop()
    stage.pass_time(10)
    assert host.running() == {sid(1)} and starts(stage) == {sid(1): 1}


# --- C34: everyone to the same host ------------------------------------------------------------------------------


NONSENSE = [
    ("load1", "NaN"),
    ("load1", "-1"),
    ("load1", '"low"'),
    ("load1", "Infinity"),
    ("cpus", "-8"),
    ("cpus", "1000000"),
    ("cpus", "60000"),
    ("cpus", "null"),
    ("memory_mib", "-1"),
    ("memory_mib", "1e300"),
    ("memory_mib", "4294967296"),
    ("memory_free_mib", '"much"'),
    ("memory_free_mib", "99999999"),
    ("disk_free_mib", "[]"),
    ("guests", '{"a": 1}'),
    ("seq", "NaN"),
]


@pytest.mark.parametrize(
    ("field", "value", "small"),
    [(field, value, False) for field, value in NONSENSE]
    + [(field, value, True) for field, value in NONSENSE if field in HostBeat.__slots__],
)
def test_c34_a_host_that_reports_nonsense_is_marked_and_harms_nobody(
    stage: Stage, field: str, value: str, small: bool
) -> None:
    """NaN, negative, strings, a million cores: the host gets nothing new, the scheduler and the other host go on; the
    host is believed again once it makes sense."""
    bad, good = stage.host("h1"), stage.host("h2", cpus=2)
    stage.work()
    said = bad.say()
    said = replace(said, digest=inventory_digest(said))
    bad.send(topology.heartbeat_key("h1"), said)
    stage.work()
    kind, body = encode(beat_of(replace(said, seq=9)) if small else replace(said, seq=9))
    content = json.loads(body)
    content[field] = "HERE"
    bad.send_raw(topology.heartbeat_key("h1"), kind, json.dumps(content).replace('"HERE"', value).encode())
    stage.work()
    for number in range(3):
        stage.ask(launch(number))
    stage.work()
    assert stage.scheduler.healthy and stage.scheduler.fleet.hosts["h1"].distrust
    assert (len(good.running()), len(bad.running())) == (2, 0)
    wait = stage.reader.wait(sid(2))
    assert wait and ("h1", Reason.NOT_TRUSTED) in [(verdict.host, verdict.reason) for verdict in wait.verdicts]
    bad.report = replace(said, seq=20, incarnation="i2")
    bad.beat()
    stage.pass_time(2)
    assert bad.running() == {sid(2)}


def test_c34_a_first_report_of_a_million_cores_draws_no_work(stage: Stage) -> None:
    """Neither what can't be read nor what is more than any host has attracts placement."""
    readable, unreadable = stage.host("h1", cpus=60_000), FakeHost(stage, "h2", cpus=1_000_000)
    stage.hosts["h2"] = unreadable
    unreadable.beat()
    stage.work()
    stage.ask(launch(1))
    stage.work()
    assert stage.session(sid(1)).state is State.QUEUED
    assert readable.starts == [] and unreadable.starts == []


def test_c34_a_thousand_launches_in_a_second_spread_evenly_and_the_rest_queue_in_order(tmp_path: Path) -> None:
    """Fifty equal hosts, reports ten seconds old that show free memory for ever: no host is promised more than its
    limit, counts differ by one at most at every moment, nobody is lost, and who waits has a place in order."""
    stage = make(tmp_path, fresh_s=60.0)
    hosts = [stage.host(f"h{number:02}", cpus=16, memory_mib=4608, memory_free_mib=4608) for number in range(50)]
    stage.work()
    stage.clock.now += 10.0
    for number in range(1000):
        stage.ask(launch(number, user=f"u{number}", lifetime_s=3600 + number))
        stage.clock.now += 0.001
        if number % 37 == 36:
            stage.work()
            counts = [state.usage.sessions for state in stage.scheduler.fleet.hosts.values()]
            assert max(counts) - min(counts) <= 1
            assert all(state.usage.memory_mib <= 4608 for state in stage.scheduler.fleet.hosts.values())
    stage.work()
    assert sorted(len(host.running()) for host in hosts) == [16] * 50
    assert [len(host.starts) for host in hosts] == [16] * 50
    live = stage.reader.live()
    assert len(live) == 1000 and Counter(session.state for session in live)[State.RUNNING] == 800
    waiting = [session.sid for session in live if session.state is State.QUEUED]
    assert waiting == [sid(number) for number in range(800, 1000)], "who asked first was placed first"
    waits = [stage.reader.wait(entry) for entry in waiting]
    assert [wait.place for wait in waits if wait] == list(range(1, 201))
    assert all(wait.verdicts for wait in waits if wait)
    for host in hosts[:3]:
        host.end(next(iter(host.running())))
    stage.work()
    still = [session.sid for session in stage.reader.live() if session.state is State.QUEUED]
    assert still == waiting[3:], "those in front are next"


def test_c34_measured_memory_is_a_limit_too(stage: Stage) -> None:
    """A host whose memory is really used up, whatever is promised on it, gets nothing new."""
    stage.host("h1", memory_free_mib=255)
    stage.ask(launch(1))
    stage.work()
    wait = stage.reader.wait(sid(1))
    assert wait and [verdict.reason for verdict in wait.verdicts] == [Reason.MEMORY_SHORT]


def test_c34_a_burst_of_plain_and_gpu_launches_gives_each_what_it_asked_for(stage: Stage) -> None:
    """GPU hosts are left to those who need them while others have room, and no wait for a GPU holds up the rest."""
    plain = [stage.host(f"p{number}") for number in range(3)]
    cards = [stage.host(f"g{number}", gpus=(gpu(1), gpu(2))) for number in range(2)]
    stage.work()
    for number in range(24):
        stage.ask(launch(number, user=f"u{number}", resources=Resources(1, 256, 1, int(number % 4 == 0))))
    stage.work()
    by_host = {host.name: [start.resources.gpus for start in host.starts] for host in (*plain, *cards)}
    assert sum(by_host["g0"]) == sum(by_host["g1"]) == 2
    assert sorted(len(by_host[host.name]) for host in plain) == [6, 6, 6]
    assert all(gpus == 0 for host in plain for gpus in by_host[host.name])
    assert len(holds(stage)) == 8
    waiting = [session for session in stage.reader.live() if session.state is State.QUEUED]
    assert len(waiting) == 2 and all(session.resources.gpus for session in waiting)


# --- C35, C36: GPUs ----------------------------------------------------------------------------------------------


def test_c35_no_late_report_frees_a_gpu_that_was_just_promised(stage: Stage) -> None:
    """A heartbeat that was sent before the start lists no guest; the GPU stays held, also over a restart."""
    host = stage.host("h1", gpus=(gpu(1),))
    stage.work()
    late = host.say()
    host.deaf = True
    stage.ask(launch(1, resources=Resources(1, 256, 1, 1)))
    stage.work()
    host.deaf = False
    host.send(topology.heartbeat_key("h1"), late)
    while stage.broker.deliver_one(topology.SCHEDULER_HEARTBEATS):
        stage.control.flush()
    assert stage.session(sid(1)).state is State.ASSIGNED and len(holds(stage)) == 2
    stage.control.bus.stop()
    stage.start()
    host.beat()
    stage.ask(launch(2, resources=Resources(1, 256, 1, 1)))
    stage.work()
    assert host.running() == {sid(1)} and stage.session(sid(2)).state is State.QUEUED


@pytest.mark.parametrize("seed", range(5))
def test_c35_a_gpu_belongs_to_one_session_at_every_moment(stage: Stage, seed: int) -> None:
    """Launches, stops, ends, silence and restarts of the scheduler at random: no function of a GPU is ever held by two,
    in the ledger or on the host; in the end all are free again."""
    rng = random.Random(seed)
    host = stage.host("h1", gpus=tuple(gpu(number) for number in range(1, 4)), cpus=64)
    stage.work()
    asked = 0
    for _ in range(120):
        match rng.randrange(7):
            case 0 | 1:
                asked += 1
                stage.ask(launch(asked, resources=Resources(1, 256, 1, 1)))
            case 2 if asked:
                stage.ask(StopRequested(sid(rng.randint(1, asked)), "ann", False))
            case 3 if host.running():
                host.end(rng.choice(sorted(host.running())))
            case 4:
                host.deaf = not host.deaf
            case 5:
                stage.control.bus.stop()
                stage.start()
            case _:
                stage.pass_time(rng.choice([1, 12]))
        if rng.random() < 0.7:
            stage.work()
        running = {start.sid: start.gpu_addresses for start in host.starts if start.sid in host.running()}
        used = [address for addresses in running.values() for address in addresses]
        assert len(used) == len(set(used)), "two guests on one GPU"
        # What runs holds its GPU in the ledger until the host has said that it ended.
        held = holds(stage)
        assert all(held["h1", address] == entry for entry, addresses in running.items() for address in addresses)
    host.deaf = False
    for number in range(1, asked + 1):
        stage.ask(StopRequested(sid(number), "ann", False))
    stage.pass_time(60)
    assert asked > 3 and holds(stage) == {} and stage.reader.live() == [] and host.running() == set()


def test_c36_a_gpu_that_is_not_offered_is_given_to_nobody_and_the_host_says_so(stage: Stage) -> None:
    """A group that is not viable is no GPU: the request waits with the reason, it never gets a machine without one."""
    host = stage.host("h1", gpus=(gpu(1, offered=False),))
    stage.ask(launch(1, resources=Resources(1, 256, 1, 1)))
    stage.pass_time(5)
    wait = stage.reader.wait(sid(1))
    assert wait and [verdict.reason for verdict in wait.verdicts] == [Reason.GPU_NONE] and host.starts == []


def test_c36_a_gpu_that_vanishes_or_moves_is_not_given_again_under_its_old_address(stage: Stage) -> None:
    """Its session is left alone; who comes next gets what the host offers then, or waits."""
    host = stage.host("h1", gpus=(gpu(1),))
    stage.ask(launch(1, resources=Resources(1, 256, 1, 1)))
    stage.work()
    host.report = replace(host.report, gpus=())
    stage.ask(launch(2, resources=Resources(1, 256, 1, 1)))
    stage.pass_time(10)
    assert host.running() == {sid(1)} and stage.session(sid(1)).state is State.RUNNING
    assert stage.session(sid(2)).state is State.QUEUED
    host.end(sid(1), Outcome.LOST)
    host.report = replace(host.report, gpus=(gpu(5),), boot_id="b2", incarnation="i2")
    stage.pass_time(10)
    assert host.running() == {sid(2)} and host.starts[-1].gpu_addresses == gpu(5).functions


# --- C41: a "dead" host that is alive ----------------------------------------------------------------------------


@pytest.fixture
def two(stage: Stage) -> tuple[FakeHost, FakeHost]:
    """h1 runs two desktops, h2 runs two."""
    hosts = stage.host("h1"), stage.host("h2")
    for number in range(4):
        stage.ask(launch(number, lifetime_s=24 * 3600))
    stage.work()
    assert [len(host.running()) for host in hosts] == [2, 2]
    return hosts


@pytest.mark.parametrize("seconds", [5, 20, 1800])
def test_c41_a_silent_host_keeps_its_sessions_and_gets_nothing_new(
    stage: Stage, two: tuple[FakeHost, FakeHost], seconds: int
) -> None:
    """However long it is cut off: nothing of it is started elsewhere, and after it is back all is as it was."""
    cut, other = two
    before = stage.reader.live()
    cut.deaf = True
    stage.pass_time(seconds, heard=[other])
    stage.ask(launch(9))
    stage.pass_time(10, heard=[other])
    assert sid(9) in other.running() or seconds == 5
    assert [session for session in stage.reader.live() if session.sid != sid(9)] == before
    cut.deaf = False
    stage.pass_time(30)
    assert [session for session in stage.reader.live() if session.sid != sid(9)] == before
    assert stage.session(sid(9)).state is State.RUNNING
    assert set(starts(stage).values()) == {1} and cut.stops == other.stops == []


def test_c41_with_every_host_silent_launches_wait_and_nothing_is_lost(
    stage: Stage, two: tuple[FakeHost, FakeHost]
) -> None:
    """Half an hour without a word of anybody: sessions stay, new launches wait with the reason, and start after it."""
    before = stage.reader.live()
    for host in two:
        host.deaf = True
    stage.pass_time(1800, heard=[])
    stage.ask(launch(9))
    stage.pass_time(3, heard=[])
    wait = stage.reader.wait(sid(9))
    assert wait and {verdict.reason for verdict in wait.verdicts} == {Reason.SILENT}
    for host in two:
        host.deaf = False
    stage.pass_time(30)
    assert [session for session in stage.reader.live() if session.sid != sid(9)] == before
    assert stage.session(sid(9)).state is State.RUNNING and set(starts(stage).values()) == {1}


@pytest.mark.parametrize("order", list(itertools.permutations(["broker", "scheduler", "hosts"])), ids="-".join)
def test_c41_after_half_an_hour_without_the_control_side_every_session_is_what_it_was(
    stage: Stage, two: tuple[FakeHost, FakeHost], order: tuple[str, ...]
) -> None:
    """Broker and scheduler are gone and come back in any order: no session is stopped, moved or started again."""
    before = [(session.sid, session.state, session.host, session.generation) for session in stage.reader.live()]
    runs = [host.running() for host in two]
    stage.control.bus.stop()
    stage.broker.crash()
    for host in two:
        host.bus.disconnect()
    stage.clock.now += 1800.0
    for part in order:
        if part == "broker":
            stage.broker.recover()
        elif part == "scheduler":
            stage.start()
        else:
            for host in two:
                host.deaf = False
                host.beat()
        stage.clock.now += 10.0
    for host in two:
        host.deaf = False
    stage.pass_time(60)
    after = [(session.sid, session.state, session.host, session.generation) for session in stage.reader.live()]
    assert after == before and [host.running() for host in two] == runs
    assert set(starts(stage).values()) == {1} and all(host.stops == [] for host in two)


def test_c41_a_host_that_was_declared_dead_is_fenced_and_cleaned_before_it_is_used_again(
    stage: Stage, two: tuple[FakeHost, FakeHost]
) -> None:
    """Its sessions end as lost; a start that was under way comes true no more; back again, it is told to stop what was
    given up, passes the burnt number, and only then gets work."""
    cut, other = two
    lost = cut.running()
    cut.deaf = True
    stage.pass_time(1)
    other.report = replace(other.report, cpus=2)  # no room there, without growing
    stage.ask(launch(7))
    stage.pass_time(20, heard=[other])
    under_way = stage.session(sid(7))
    assert (under_way.state, under_way.host) == (State.ASSIGNED, "h1"), "sent before anybody knew"
    number = under_way.generation
    stage.ask(HostDeclaredDead("h1", "root"))
    stage.work()
    for entry in (*lost, sid(7)):
        session = stage.session(entry)
        assert (session.state, session.outcome, session.reason) == (State.ENDED, Outcome.LOST, Reason.HOST_DEAD)
    stage.ask(launch(8))
    stage.pass_time(10, heard=[other])
    wait = stage.reader.wait(sid(8))
    assert wait and ("h1", Reason.DECLARED_DEAD) in [(verdict.host, verdict.reason) for verdict in wait.verdicts]

    late = [start for start in stage.broker.pending(topology.host_queue("h1")) if start.correlation_id == sid(7)]
    cut.deaf = False
    cut.beat()
    (host,) = (host for host in stage.reader.hosts() if host.name == "h1")
    assert host.dead and host.generation > number
    stage.pass_time(30)
    assert {stop.sid for stop in cut.stops} >= lost
    assert max(fence.generation for fence in cut.fences) >= host.generation
    assert late and sid(7) not in cut.running(), "the old command is void, or was stopped at once"
    assert cut.running() == {sid(8)} and stage.session(sid(8)).state is State.RUNNING
    assert not next(host.dead for host in stage.reader.hosts() if host.name == "h1")
    assert starts(stage)[sid(8)] == 1 and lost.isdisjoint(other.running())


def test_c41_a_dead_host_that_still_runs_what_was_given_up_gets_nothing_new(
    stage: Stage, two: tuple[FakeHost, FakeHost]
) -> None:
    """As long as it is not clean it is not used, however often it reports."""
    cut, other = two
    cut.deaf = True
    stage.pass_time(20, heard=[other])
    stage.ask(HostDeclaredDead("h1", "root"))
    stage.work()
    stubborn = tuple(cut.guests.values())
    cut.deaf = False
    for number in range(3):
        cut.guests = {guest.sid: guest for guest in stubborn}
        cut.beat()
        while stage.broker.deliver_one(topology.SCHEDULER_HEARTBEATS):
            stage.control.flush()
        assert stage.scheduler.fleet.hosts["h1"].dead, f"after {number + 1} reports"
    stage.work()
    stage.pass_time(20)
    assert not stage.scheduler.fleet.hosts["h1"].dead and cut.running() == set()


def test_c41_a_host_that_answers_is_not_declared_dead(stage: Stage, two: tuple[FakeHost, FakeHost]) -> None:
    """A wrong verdict kills nobody's work."""
    stage.ask(HostDeclaredDead("h1", "root"))
    stage.pass_time(10)
    assert {session.state for session in stage.reader.live()} == {State.RUNNING}
    assert not stage.scheduler.fleet.hosts["h1"].dead and two[0].stops == []


def test_c41_a_date_that_jumps_changes_no_decision(stage: Stage, two: tuple[FakeHost, FakeHost]) -> None:
    """Years forward, years back: nobody is silent, nobody has waited too long, nothing ends."""
    stage.ask(launch(9, resources=Resources(8, 256, 1)))
    stage.work()
    for shift in (1e9, -1e9, 0.0):
        stage.clock.shift = shift
        stage.pass_time(20)
        assert [session.state for session in stage.reader.live()] == [State.RUNNING] * 4 + [State.QUEUED]
    assert set(starts(stage).values()) == {1} and all(host.stops == [] for host in two)
