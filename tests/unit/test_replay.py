"""Recorded requests under another policy: what the replay says is what the scheduler's rules make of the record."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.hosts import IMAGE, POLICY, gpu, report

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.writer import Transaction, Writer
from deskfleet.scheduler.policy import Caps, QueueClass
from deskfleet.scheduler.replay import Fate, Request, Result, percentile, replay
from deskfleet.scheduler.replay_command import main
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.machine import Machine, parse_machine
from deskfleet.schemas.session import Event, Outcome, Resources, Session, State, advance, place

TINY = f"""
title = "Tiny"
text = "A machine of the record"
os = "other"
image = {{ file = "tiny.iso", format = "iso", sha256 = "{IMAGE}" }}
cpus = {{ min = 1, default = 1, max = 16 }}
memory_mib = {{ min = 64, default = 512, max = 32768 }}
disk_gib = {{ min = 1, default = 1, max = 8 }}
gpu = {{ policy = "optional" }}
access = {{ users = ["*"] }}
"""
MACHINES: Mapping[str, Machine] = {"tiny": parse_machine("tiny", TINY)}
EXACT = replace(POLICY, cpu_overcommit=1.0)
HOUR = 3600.0


def asked(sid: str, cpus: int = 4, user: str = "ann", **changes: object) -> Session:
    session = Session(sid, user, "tiny", Resources(cpus, 1024, 1), False, 8 * 3600, wait_s=3600)
    return replace(session, **changes)  # type: ignore[arg-type]


def request(sid: str, at: float, holds_s: float = HOUR, patience_s: float = HOUR, **changes: object) -> Request:
    return Request(asked(sid, **changes), at, holds_s, patience_s)  # type: ignore[arg-type]


#: Two hosts of eight CPUs: two desktops of four, then one of eight, then one that no host could ever give.
DAY = [
    request("a", 0.0),
    request("b", 60.0),
    request("big", 120.0, cpus=8, patience_s=2 * HOUR),
    request("huge", 180.0, cpus=9),
]
HOSTS = [report("h1"), report("h2")]


def test_pack_leaves_a_host_for_the_large_request_that_spread_makes_wait() -> None:
    spread = replay(DAY, HOSTS, MACHINES, EXACT)
    pack = replay(DAY, HOSTS, MACHINES, replace(EXACT, spread=False))
    fates = {"a": Fate.PLACED, "b": Fate.PLACED, "big": Fate.PLACED, "huge": Fate.REFUSED}
    assert spread.fates == pack.fates == fates
    assert spread.hosts["a"] != spread.hosts["b"] and pack.hosts["a"] == pack.hosts["b"]
    assert spread.waits == {"a": 0.0, "b": 0.0, "big": HOUR - 120.0}
    assert pack.waits == {"a": 0.0, "b": 0.0, "big": 0.0}
    # Over the 180 s to the last request: 4 CPUs of 16, 8 from 60 s on, and with pack all 16 from 120 s on.
    assert spread.figures()["cpus_mean"] == pytest.approx((60 * 4 + 120 * 8) / (180 * 16), abs=1e-4)
    assert pack.figures()["cpus_mean"] == pytest.approx((60 * 4 + 60 * 8 + 60 * 16) / (180 * 16), abs=1e-4)
    assert (spread.figures()["cpus_peak"], pack.figures()["cpus_peak"]) == (0.75, 1.0)
    assert (spread.figures()["hosts_mean"], pack.figures()["hosts_mean"]) == (1.67, 1.33)


def test_who_waits_longer_than_patience_gives_up_and_who_is_placed_at_that_moment_does_not() -> None:
    record = [request("a", 0.0, cpus=8), request("b", 0.0, patience_s=HOUR - 1), request("c", 0.0, patience_s=HOUR)]
    result = replay(record, HOSTS[:1], MACHINES, EXACT)
    assert result.fates == {"a": Fate.PLACED, "b": Fate.GAVE_UP, "c": Fate.PLACED}
    assert result.waits["c"] == HOUR


def test_caps_and_classes_count_as_in_the_queue() -> None:
    policy = replace(EXACT, classes=(QueueClass("first", users=("eve",)),), user_caps=Caps(sessions=1))
    record = [
        request("a", 0.0, cpus=8, user="bob"),
        request("ann", 1.0, cpus=8),
        request("eve", 2.0, cpus=8, user="eve"),
        request("eve2", 2.0, cpus=1, user="eve", patience_s=1.0),
    ]
    record = [replace(entry, patience_s=max(entry.patience_s, 4 * HOUR)) for entry in record[:3]] + record[3:]
    result = replay(record, HOSTS[:1], MACHINES, policy)
    assert result.waits["eve"] == HOUR - 2.0 and result.waits["ann"] == 2 * HOUR - 1.0
    assert result.fates["eve2"] is Fate.GAVE_UP


def test_what_hosts_reported_about_their_load_does_not_count() -> None:
    busy = report("h1", load1=1000.0, memory_free_mib=0)
    assert replay([request("a", 0.0)], [busy], MACHINES, EXACT).fates == {"a": Fate.PLACED}


@pytest.mark.parametrize("spread", [True, False])
def test_every_request_ends_in_exactly_one_class(spread: bool) -> None:
    rng = random.Random(20)
    record, now = [], 0.0
    for number in range(400):
        now += rng.expovariate(1 / 60)
        gpus = int(rng.random() < 0.1)
        size = Resources(rng.choice([1, 2, 4, 8, 16]), rng.choice([512, 4096, 16384, 32768]), 1, gpus)
        holds, patience = rng.choice([0.0, rng.uniform(1, 4 * HOUR)]), rng.choice([0.0, rng.uniform(1, HOUR)])
        session = asked(f"s{number}", user=f"u{rng.randrange(9)}", resources=size)
        record.append(Request(session, now, holds, patience))
    hosts = [report(f"h{n}", gpus=(gpu(1), gpu(2)) if n == 0 else ()) for n in range(5)]
    result = replay(record, hosts, MACHINES, replace(EXACT, spread=spread))
    assert set(result.fates) == {entry.session.sid for entry in record} and len(record) == 400
    placed = {sid for sid, fate in result.fates.items() if fate is Fate.PLACED}
    assert set(result.waits) == set(result.hosts) == placed
    assert set(result.fates.values()) == set(Fate)
    figures = result.figures()
    assert figures["placed"] + figures["refused"] + figures["gave_up"] == 400
    patience = {entry.session.sid: entry.patience_s for entry in record}
    assert all(0 <= waited <= patience[sid] for sid, waited in result.waits.items())
    assert never_over_promised(record, result)
    assert 0 < figures["cpus_mean"] <= figures["cpus_peak"] <= 1
    assert 0 < figures["memory_mean"] <= figures["memory_peak"] <= 1
    assert result == replay(record, hosts, MACHINES, replace(EXACT, spread=spread)), "the same record, the same result"


def never_over_promised(record: list[Request], result: Result) -> bool:
    """Counted anew from who ran where and when: at no moment more than a host has."""
    for host in set(result.hosts.values()):
        changes = []
        for entry in record:
            if result.hosts.get(entry.session.sid) == host:
                begun = entry.at + result.waits[entry.session.sid]
                size = entry.session.resources
                changes += [
                    (begun, 1, size.cpus, size.memory_mib),
                    (begun + entry.holds_s, 0, -size.cpus, -size.memory_mib),
                ]
        cpus = memory = 0
        for _, _, more_cpus, more_memory in sorted(changes):
            cpus, memory = cpus + more_cpus, memory + more_memory
            if cpus > 8 or memory > 16384:
                return False
    return True


def test_percentiles_are_values_that_were_met() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(range(1, 101), 0.99) == 99


# --- the command, on a ledger file -------------------------------------------------------------------------------


class Clock:
    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return 1_000_000.0


class Stage:
    """A settings file, a catalogue, and a ledger that the writer has filled."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "deskfleet.toml"
        self.ledger = folder / "ledger.db"
        (folder / "catalogue").mkdir()
        (folder / "catalogue" / "tiny.toml").write_text(TINY)
        self.config.write_text(
            "[scheduler]\nbroker_url = 'amqp://scheduler:some-password@127.0.0.1/'\ncpu_overcommit = 1\n"
            "host_reserve_mib = 0\nguest_overhead_mib = 0\n"
            f"[ledger]\nurl = 'sqlite:///{self.ledger}'\n[machines]\ncatalogue = '{folder}/catalogue'\n"
        )
        self.engine = open_engine(f"sqlite:///{self.ledger}")
        migrate(self.engine)

    def hosts(self, *names: str) -> None:
        with Writer(self.engine).begin() as tx:
            for name in names:
                tx.add_host(name)
            tx.save_reports([(report(name), 1.0) for name in names])

    def ran(self, sid: str, at: float, seconds: float | None, **changes: object) -> None:
        """A request that was placed at once; it ran for so long, or still does."""
        with Writer(self.engine).begin() as tx:
            session = replace(asked(sid), created_at=at, changed_at=at, **changes)  # type: ignore[arg-type]
            assert tx.add(session)
            session = self.step(tx, session, place(session, "h1", 1), Event.PLACE)
            # The command was sent again: no new start.
            session = self.step(tx, session, replace(session, generation=2, changed_at=at + 10), Event.PLACE)
            session = self.step(tx, session, replace(advance(session, Event.READY), changed_at=at + 20), Event.READY)
            if seconds is not None:
                ended = advance(session, Event.GONE, outcome=Outcome.GUEST_OFF)
                self.step(tx, session, replace(ended, changed_at=at + seconds), Event.GONE)

    def ended(self, sid: str, at: float, event: Event, outcome: Outcome, after: float, **changes: object) -> None:
        """A request that never ran."""
        with Writer(self.engine).begin() as tx:
            session = replace(asked(sid), created_at=at, changed_at=at, **changes)  # type: ignore[arg-type]
            assert tx.add(session)
            gone = replace(advance(session, event, outcome=outcome, reason=Reason.NEVER_FITS), changed_at=at + after)
            self.step(tx, session, gone, event)

    def step(self, tx: Transaction, before: Session, after: Session, event: Event) -> Session:
        tx.save(before, after, event)
        return after

    def day(self) -> None:
        """What `DAY` holds, and what an older catalogue offered."""
        self.hosts("h1", "h2")
        self.ran("a", 900_000.0, HOUR)
        self.ran("b", 900_060.0, HOUR)
        self.ran("big", 900_120.0, HOUR, resources=Resources(8, 1024, 1), wait_s=7200)
        self.ended("huge", 900_180.0, Event.REJECT, Outcome.REJECTED, 0.0, resources=Resources(9, 1024, 1))
        self.ended("old", 900_180.0, Event.REJECT, Outcome.REJECTED, 0.0, machine="gone")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def figures(stage: Stage, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["--config", str(stage.config), "--json", *arguments], Clock()) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(stage: Stage, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["--config", str(stage.config), *arguments], Clock()) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err


def test_the_recorded_day_is_read_from_the_ledger(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.day()
    before = stage.ledger.read_bytes()
    found = figures(stage, capsys)
    assert (found["requests"], found["left_out"], found["hosts"], found["span_s"]) == (4, 1, 2, 180.0)
    assert (found["as_set"]["policy"], found["tried"]["policy"]) == ("spread", "pack")
    assert found["as_set"]["wait_p99_s"] == HOUR - 120.0 and found["tried"]["wait_p99_s"] == 0.0
    for name in ("as_set", "tried"):
        assert (found[name]["placed"], found[name]["refused"], found[name]["gave_up"]) == (3, 1, 0)
    assert stage.ledger.read_bytes() == before


def test_the_table_has_a_row_for_each_figure(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.day()
    assert main(["--config", str(stage.config)], Clock()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 requests (1 left out) of 0.0 days on 2 hosts"
    rows = {line[:24].strip(): line[24:].split() for line in lines[2:]}
    assert rows["policy"] == ["spread", "pack"]
    assert rows["wait p99, s"] == ["3480.0", "0.0"]
    assert rows["CPUs promised, peak"] == ["75.0%", "100.0%"]


def test_options_are_settings_and_are_checked_like_them(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.day()
    more = figures(stage, capsys, "--set", "cpu_overcommit=2")
    assert (more["as_set"]["refused"], more["tried"]["refused"]) == (1, 0)
    assert more["tried"]["policy"] == "spread" and more["tried"]["wait_p99_s"] == 0.0
    capped = figures(stage, capsys, "--set", "user_caps.sessions=1", "--weight", "memory=2", "--policy", "pack")
    assert (capped["tried"]["policy"], capped["tried"]["wait_p99_s"]) == ("pack", 2 * HOUR - 120)
    assert "scheduler.cpu_overcomit: unknown key; did you mean 'cpu_overcommit'?" in refusal(
        stage, capsys, "--set", "cpu_overcomit=2"
    )
    assert "scheduler.weights.memmory" in refusal(stage, capsys, "--weight", "memmory=2")
    assert "scheduler.weights.memory" in refusal(stage, capsys, "--weight", "memory=-1")
    assert "nothing to compare" in refusal(stage, capsys, "--policy", "spread")
    assert "nothing to compare" in refusal(stage, capsys, "--set", "grace_s=5")
    with pytest.raises(SystemExit, match="2"):
        main(["--config", str(stage.config), "--set", "cpu_overcommit"])


def test_what_never_ran_or_still_runs_gets_a_length_and_a_patience(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.hosts("h1")
    whole = Resources(8, 1024, 1)
    stage.ran("a", 900_000.0, 1000.0, resources=whole)
    # Cancelled after 600 s: nobody waits longer here than there.
    stage.ended("b", 900_000.0, Event.STOP, Outcome.CANCELLED, 600.0, resources=whole)
    # Gave up then; now it has its turn after the 1000 s, and runs as long as the usual desktop.
    stage.ended("c", 900_000.0, Event.GIVE_UP, Outcome.NO_CAPACITY, 500.0, resources=whole, wait_s=1500)
    stage.ran("d", 900_001.0, None, resources=whole, wait_s=3000)
    found = figures(stage, capsys)["as_set"]
    assert (found["placed"], found["gave_up"]) == (3, 1)
    assert found["wait_p99_s"] == 1999.0


def test_only_the_last_days_are_played(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.hosts("h1")
    stage.ran("old", 1_000_000.0 - 3 * 86400, 60.0)
    stage.ran("new", 1_000_000.0 - 1 * 86400, 60.0)
    assert figures(stage, capsys)["requests"] == 2
    assert figures(stage, capsys, "--since", "1.5")["requests"] == 1
    assert "no request of that time" in refusal(stage, capsys, "--since", "0.5")
    with pytest.raises(SystemExit, match="2"):
        main(["--config", str(stage.config), "--since", "0"])


def test_a_host_that_was_declared_dead_is_left_out(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.day()
    with Writer(stage.engine).begin() as tx:
        tx.set_dead("h2", True)
    assert figures(stage, capsys)["hosts"] == 1


def test_without_a_ledger_or_a_record_it_says_so(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no request" in refusal(stage, capsys)
    stage.ran("a", 900_000.0, 60.0, machine="gone")
    assert "no report of a host" in refusal(stage, capsys)
    stage.hosts("h1")
    assert "catalogue" in refusal(stage, capsys)
    stage.engine.dispose()
    text = stage.config.read_text()
    stage.config.write_text(text.replace("ledger.db", "nowhere.db"))
    assert "the ledger can't be read" in refusal(stage, capsys)
    assert not (stage.ledger.parent / "nowhere.db").exists()
    stage.config.write_text(text.replace("ledger.db", "deskfleet.toml"))
    assert "the ledger can't be read" in refusal(stage, capsys)
    stage.config.unlink()
    assert "cannot be read" in refusal(stage, capsys)


def test_a_ledger_of_another_revision_is_refused(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with stage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
    assert "deskfleet migrate" in refusal(stage, capsys)


def test_a_session_that_came_back_from_a_failed_start_held_its_last_host_only(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.hosts("h1")
    at, whole = 900_000.0, Resources(8, 1024, 1)
    with Writer(stage.engine).begin() as tx:
        session = replace(asked("a"), created_at=at, changed_at=at, resources=whole)
        tx.add(session)
        session = stage.step(tx, session, place(session, "h1", 1), Event.PLACE)
        session = stage.step(tx, session, replace(advance(session, Event.RETRY), changed_at=at + 50), Event.RETRY)
        session = stage.step(tx, session, replace(place(session, "h1", 2), changed_at=at + 100), Event.PLACE)
        session = stage.step(tx, session, replace(advance(session, Event.READY), changed_at=at + 101), Event.READY)
        ended = replace(advance(session, Event.GONE, outcome=Outcome.STOPPED), changed_at=at + 300)
        assert stage.step(tx, session, ended, Event.GONE).state is State.ENDED
    stage.ran("b", at, 60.0, resources=whole, wait_s=250)
    assert figures(stage, capsys)["as_set"]["wait_p99_s"] == 200.0
