"""Two schedulers on one PostgreSQL ledger and one RabbitMQ: whatever becomes of the one that leads, the other goes on
within five seconds, and the one that comes back harms nothing."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from demo.broker import PrivateBroker, free_port
from demo.definitions import definitions
from demo.keys import Keys
from support.guests import short_folder
from support.postgres import PrivatePostgres
from support.relay import Relay
from support.stub_host import StubHost

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.reader import Reader
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.service import MainLoop, SystemClock
from deskfleet.schemas import topology
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import Resources, State
from deskfleet.schemas.wire import encode

IMAGE = "a" * 64
MACHINE = f"""
title = "Tiny"
text = "A machine that no host really has"
os = "other"
image = {{ file = "tiny.iso", format = "iso", sha256 = "{IMAGE}" }}
cpus = {{ min = 1, default = 1, max = 2 }}
memory_mib = {{ min = 64, default = 64, max = 128 }}
disk_gib = {{ min = 1, default = 1, max = 1 }}
access = {{ users = ["*"] }}
"""
PATIENCE_S = 30.0


class Process:
    """A scheduler that reaches broker and ledger through relays of its own, so that it can be cut off alone."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.broker = stage.stack.enter_context(Relay(("127.0.0.1", stage.broker.port)))
        self.ledger = stage.stack.enter_context(Relay(f"{stage.folder}/pg/.s.PGSQL.5432"))
        self.ops = free_port()
        self._config = stage.folder / f"{name}.toml"
        password = stage.keys.secret("broker-scheduler")
        url = stage.ledger_url.split("@/")[1].split("?")[0]
        self._config.write_text(
            f"[scheduler]\nbroker_url = 'amqp://scheduler:{password}@127.0.0.1:{self.broker.port}/%2F'\n"
            f"ops_listen = '127.0.0.1:{self.ops}'\nmax_sessions = 10000\n"
            f"[ledger]\nurl = 'postgresql+psycopg://deskfleet@127.0.0.1:{self.ledger.port}/{url}'\n"
            f"[machines]\ncatalogue = '{stage.folder}/catalogue'\n"
        )
        self._config.chmod(0o600)
        self.process: subprocess.Popen[bytes] | None = None
        self._log = (stage.folder / f"{name}.log").open("ab")
        self.start()

    def start(self) -> None:
        if self.process is not None:
            self.process.wait(PATIENCE_S)
        argv = [sys.executable, "-m", "deskfleet.scheduler", "--config", str(self._config)]
        self.process = subprocess.Popen(argv, stdout=self._log, stderr=self._log)

    def leads(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ops}/metrics", timeout=1) as answer:
                return "deskfleet_scheduler_leader 1.0" in answer.read().decode()
        except OSError:
            return False

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()


class Stage:
    """Broker, PostgreSQL, one host that says yes, somebody who asks for desktops all the time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.keys = Keys(folder / "keys")
        (folder / "catalogue").mkdir()
        (folder / "catalogue" / "tiny.toml").write_text(MACHINE)
        folder.chmod(0o755)
        postgres = PrivatePostgres(folder / "pg")
        postgres.start()
        self.stack.callback(postgres.stop)
        self.ledger_url = postgres.database("ledger")
        engine = open_engine(self.ledger_url)
        migrate(engine)
        self.stack.callback(engine.dispose)
        self.reader = Reader(engine)
        self.broker = self.stack.enter_context(PrivateBroker(folder / "mq", definitions(["h1"], self.keys)))
        self.schedulers = [Process(self, name) for name in ("one", "two")]
        for scheduler in self.schedulers:
            self.stack.callback(scheduler.end)
        self.loop = MainLoop(SystemClock())
        thread = threading.Thread(target=self.loop.run)
        thread.start()
        self.stack.callback(thread.join)
        self.stack.callback(self.loop.stop)
        self.host = StubHost("h1", self._url("agent-h1"), self.loop, SystemClock(), IMAGE)
        self.stack.callback(self.host.bus.stop)
        self.portal = AmqpBus(
            [self._url("portal")],
            name="portal",
            dispatch=self.loop.post,
            clock=SystemClock(),
            rng=random.Random(2),
        )
        self.stack.callback(self.portal.stop)
        self.portal.start()
        self.asked: dict[str, float] = {}
        self._asking = threading.Event()

    def _url(self, login: str) -> str:
        return f"amqp://{login}:{self.keys.secret(f'broker-{login}')}@127.0.0.1:{self.broker.port}/%2F"

    def ask(self) -> str:
        sid = secrets.token_hex(16)
        request = LaunchRequested(sid, "ann", (), "tiny", Resources(1, 64, 1), False, 3600, 600)
        kind, body = encode(request)
        self.portal.publish(Outgoing(topology.COMMANDS, "scheduler", kind, body, correlation_id=sid)).result(10)
        self.asked[sid] = time.monotonic()
        return sid

    def ask_for(self, seconds: float, pause: float = 0.05) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.ask()
            time.sleep(pause)

    def leader(self) -> Process:
        found: list[Process] = []

        def one_leads() -> bool:
            found[:] = [scheduler for scheduler in self.schedulers if scheduler.leads()]
            return len(found) == 1

        wait(one_leads, "one scheduler leads")
        return found[0]

    def running(self, sid: str) -> bool:
        session = self.reader.session(sid)
        return session is not None and session.state is State.RUNNING

    def everything_runs_once(self) -> None:
        def late() -> list[str]:
            sessions = [self.reader.session(sid) for sid in self.asked]
            found = [session for session in sessions if session and session.state is not State.RUNNING]
            return [f"{session.sid} {session.state} {self.reader.wait(session.sid)}" for session in found]

        wait(lambda: None not in [self.reader.session(sid) for sid in self.asked], "all is known")
        wait(lambda: not late(), f"everything that was asked for runs; late: {late()}")
        assert len({session.sid for session in self.reader.live()}) == len(self.asked)
        # Command numbers never repeat: each belongs to one start of one session.
        numbers: dict[int, str] = {}
        for start in self.host.starts:
            assert numbers.setdefault(start.generation, start.sid) == start.sid
        assert {start.sid for start in self.host.starts} == set(self.asked)


def wait(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with short_folder() as folder, ExitStack() as stack:
        stack.callback(_show_logs, folder)
        stage = Stage(folder, stack)
        wait(lambda: stage.portal.connected and stage.host.bus.connected, "portal and host are connected")
        stage.leader()
        sid = stage.ask()
        wait(lambda: stage.running(sid), "the first desktop runs")
        yield stage


def _show_logs(folder: Path) -> None:
    """Seen when a test failed."""
    for path in sorted(folder.glob("*.log")):
        print(f"--- {path.name}", *(line[:300] for line in path.read_text().splitlines()[-40:]), sep="\n")


def kill(process: Process) -> None:
    assert process.process
    process.process.kill()
    process.process.wait()


def pause(process: Process) -> None:
    assert process.process
    os.kill(process.process.pid, signal.SIGSTOP)


def cut_off(process: Process) -> None:
    process.broker.cut()
    process.ledger.cut()


def cut_broker(process: Process) -> None:
    process.broker.cut()


def cut_ledger(process: Process) -> None:
    process.ledger.cut()


def end(process: Process) -> None:
    assert process.process
    process.process.terminate()


def go_on(process: Process) -> None:
    assert process.process
    os.kill(process.process.pid, signal.SIGCONT)


def heal(process: Process) -> None:
    process.broker.heal()
    process.ledger.heal()


@pytest.mark.parametrize(
    ("harm", "mend"),
    [
        (kill, Process.start),
        (pause, go_on),
        (cut_off, heal),
        (cut_broker, heal),
        (cut_ledger, heal),
        (end, Process.start),
    ],
    ids=["killed", "c33-paused", "c41-cut-off", "cut-off-from-the-broker", "cut-off-from-the-ledger", "ended"],
)
def test_the_other_goes_on_and_the_one_that_comes_back_harms_nothing(
    stage: Stage, harm: Callable[[Process], object], mend: Callable[[Process], object]
) -> None:
    leader = stage.leader()
    stage.ask_for(1.0)  # under load
    harm(leader)
    sid = stage.ask()
    took = wait(lambda: stage.running(sid), "a desktop that was asked for after it runs")
    stage.ask_for(1.0)
    others = [scheduler for scheduler in stage.schedulers if scheduler is not leader]
    assert [scheduler.leads() for scheduler in others] == [True]
    mend(leader)
    stage.ask_for(2.0)
    stage.everything_runs_once()
    assert stage.leader() in others, "the one that came back stands by"
    print(json.dumps({"harm": harm.__name__, "goes_on_s": round(took, 2), "asked": len(stage.asked)}))
