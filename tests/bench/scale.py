"""measures: a burst of launches on a large fleet, and how soon a restarted scheduler places, by sessions in the ledger

Burst: the real scheduler without a lease, in this process; its bus is in memory, and hands over at most 100 messages
that are not acknowledged, as the broker does; its ledger is an SQLite file in /dev/shm, so no disk is measured. All
hosts are equal and run the same number of desktops. All launches come at one moment; each host answers "running" once
all are placed. A launch's decision is counted with the whole transaction that held it. Then the same burst where only
a part fits: the rest waits.

Restart: the real scheduler process with a real broker and a ledger on disk (SQLite, then PostgreSQL), stopped in order
and started again. A launch waits in its queue. Hosts send full heartbeats evenly over five seconds, as they do when
they are asked after a restart. It ends when the ledger shows the launch as assigned; the time is that since the start
of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy"), str(ROOT / "tests")]

import pika  # type: ignore[import-untyped]  # noqa: E402
import psutil  # noqa: E402
from demo.broker import PrivateBroker, free_port  # noqa: E402
from demo.definitions import definitions  # noqa: E402
from demo.fleet import Service  # noqa: E402
from demo.keys import Keys  # noqa: E402
from sqlalchemy import Engine, insert, select  # noqa: E402
from support.hosts import MACHINE  # noqa: E402
from support.postgres import PrivatePostgres  # noqa: E402

from deskfleet.ledger import tables  # noqa: E402
from deskfleet.ledger.engine import migrate, open_engine  # noqa: E402
from deskfleet.ledger.writer import Writer  # noqa: E402
from deskfleet.runtime.bus import Delivery, Outgoing  # noqa: E402
from deskfleet.runtime.rights import permission, user  # noqa: E402
from deskfleet.runtime.service import SystemClock  # noqa: E402
from deskfleet.scheduler.core import Scheduler  # noqa: E402
from deskfleet.scheduler.decisions import Settings  # noqa: E402
from deskfleet.scheduler.policy import Policy  # noqa: E402
from deskfleet.schemas import topology  # noqa: E402
from deskfleet.schemas.host import GuestReport, HostReport, Phase, inventory_digest  # noqa: E402
from deskfleet.schemas.messages import LaunchRequested, Message, VmReport, VmStart  # noqa: E402
from deskfleet.schemas.session import Resources, State  # noqa: E402
from deskfleet.schemas.wire import decode, encode  # noqa: E402

#: So many messages the broker hands out before the first is acknowledged.
PREFETCH = 100
SIZE = Resources(1, 1024, 8)
#: Launches differ in this many lifetimes.
LIFETIMES = 600
LOGIN = "all-agents"
INTERVAL_S = 5.0
PATIENCE_S = 120.0


def name(number: int) -> str:
    return f"h{number:05}"


def sid(host: int, guest: int) -> str:
    return f"{host:016x}{guest:016x}"


def report(number: int, guests: int) -> HostReport:
    """The full heartbeat of a host whose guests all run; 64 CPUs and 256 GiB."""
    listed = tuple(GuestReport(sid(number, guest), guest + 1, Phase.RUNNING, True, 1) for guest in range(guests))
    made = HostReport(
        name(number), f"{number:016x}", 1, f"{number:036x}", guests, False, f"{name(number)}.example.org:6080", "kvm",
        64, 262_144, 0.0, 262_144, 4_000_000, 3_000_000, (MACHINE.sha256,), (), listed,
    )  # fmt: skip
    return replace(made, digest=inventory_digest(made))


def fill(engine: Engine, hosts: int, guests: int) -> None:
    """A ledger in which each host runs its guests."""
    common = {
        "machine": MACHINE.name, "cpus": SIZE.cpus, "memory_mib": SIZE.memory_mib, "disk_gib": SIZE.disk_gib, "gpus": 0,
        "gpu_model": "", "persistent": True, "lifetime_s": 86_400, "state": State.RUNNING.value, "created_at": 0.0,
        "changed_at": 0.0,
    }  # fmt: skip
    with engine.begin() as connection:
        connection.execute(insert(tables.host), [{"name": name(n), "generation": guests} for n in range(hosts)])
        for number in range(hosts):
            rows = [
                {
                    **common,
                    "sid": sid(number, n),
                    "user": f"u{number % 997}-{n}",
                    "host": name(number),
                    "generation": n + 1,
                }
                for n in range(guests)
            ]
            connection.execute(insert(tables.session), rows)


class Wire:
    """The scheduler's bus, and everybody at its other ends."""

    connected = True

    def __init__(self) -> None:
        self.scheduler: Scheduler | None = None
        #: The starts that hosts were told.
        self.starts: list[tuple[str, VmStart]] = []
        self.unsettled = 0
        self._deferred: list[Callable[[], None]] = []
        #: How long each batch took, and how many messages were in it.
        self.batches: list[tuple[float, int]] = []

    def consume(self, queue: str, handler: Callable[[Delivery], None]) -> None:
        """Messages are handed over by `hand`."""

    def every(self, seconds: float, tick: Callable[[], None]) -> None:
        """Sweeps are called where they are measured."""

    def defer(self, action: Callable[[], None]) -> None:
        self._deferred.append(action)

    def publish(self, message: Outgoing) -> Future[None]:
        if message.exchange == topology.COMMANDS:
            command = decode(message.type, message.body)
            if isinstance(command, VmStart):
                self.starts.append((message.routing_key.removeprefix("host."), command))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def hand(self, messages: Iterable[tuple[str, str, bytes]]) -> float:
        """Hand over encoded messages (sender, type, body) and have them decided; the seconds that it took."""
        waiting = list(messages)
        assert self.scheduler
        begun = time.perf_counter()
        for first in range(0, len(waiting), PREFETCH):
            batch = waiting[first : first + PREFETCH]
            self.unsettled += len(batch)
            at = time.perf_counter()
            for sender, kind, body in batch:
                self.scheduler.on_delivery(Delivery("q", "", "", kind, body, "", "", sender, False, self._settled))
            while self._deferred:
                self._deferred.pop(0)()
            self.batches.append((time.perf_counter() - at, len(batch)))
        return time.perf_counter() - begun

    def _settled(self, how: object) -> None:
        assert how == "ack", how
        self.unsettled -= 1


def sent(sender: str, message: Message) -> tuple[str, str, bytes]:
    """A message as the broker hands it over."""
    return sender, *encode(message)


@dataclass
class Burst:
    """What a burst came to; times in seconds."""

    asked: int
    load_s: float
    heartbeats_s: float
    placing_s: float = 0.0
    answers_s: float = 0.0
    sweep_s: float = 0.0
    decisions_s: list[float] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    twice: int = 0
    counts: list[int] = field(default_factory=list)
    places: list[int | None] = field(default_factory=list)

    @property
    def spread(self) -> int:
        """How far apart the hosts' numbers of desktops are."""
        return max(self.counts) - min(self.counts)

    @property
    def p99_s(self) -> float:
        ordered = sorted(self.decisions_s)
        return ordered[len(ordered) * 99 // 100]


def burst(engine: Engine, hosts: int, guests: int, launches: int, room: int = 200) -> Burst:
    """`launches` at one moment on `hosts` that run `guests` each and take `room` at most."""
    fill(engine, hosts, guests)
    wire, clock = Wire(), SystemClock()
    settings = Settings(policy=Policy(max_sessions=room, fresh_s=3600.0))
    machines = {MACHINE.name: MACHINE}
    at = time.perf_counter()
    scheduler = Scheduler(Writer(engine), wire, clock, lambda: machines, settings, wire.defer)  # type: ignore[arg-type]
    wire.scheduler = scheduler
    scheduler.start()
    load_s = time.perf_counter() - at
    heartbeats = [sent(f"agent-{name(n)}", report(n, guests)) for n in range(hosts)]
    random.Random(1).shuffle(heartbeats)
    made = Burst(launches, load_s, wire.hand(heartbeats))
    asked = [f"{number:032x}" for number in range(1 << 100, (1 << 100) + launches)]
    requests = [
        sent(
            "portal",
            LaunchRequested(entry, f"v{n % 3001}", (), MACHINE.name, SIZE, False, 3600 * (1 + n % LIFETIMES), 3600),
        )
        for n, entry in enumerate(asked)
    ]
    wire.batches.clear()
    made.placing_s = wire.hand(requests)
    made.decisions_s = [seconds for seconds, count in wire.batches for _ in range(count)]
    answers = [
        sent(f"agent-{host}", VmReport(host, GuestReport(start.sid, start.generation, Phase.RUNNING, True)))
        for host, start in wire.starts
    ]
    made.answers_s = wire.hand(answers)
    at = time.perf_counter()
    scheduler.sweep()
    made.sweep_s = time.perf_counter() - at
    assert wire.unsettled == 0 and scheduler.healthy
    _look(engine, made, asked, [start.sid for _, start in wire.starts], hosts)
    return made


def _look(engine: Engine, made: Burst, asked: Sequence[str], starts: Sequence[str], hosts: int) -> None:
    """What the ledger holds in the end."""
    table = tables.session
    query = select(table.c.sid, table.c.state, table.c.host, table.c.place).order_by(table.c.ordinal)
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    ours = {row.sid: row for row in rows}
    made.states = Counter(ours[entry].state for entry in asked if entry in ours)
    made.lost = sum(entry not in ours for entry in asked) + sum(row.state == State.ENDED.value for row in rows)
    made.twice = len(starts) - len(set(starts))
    on = Counter(row.host for row in rows if row.host)
    made.counts = [on[name(number)] for number in range(hosts)]
    made.places = [row.place for row in rows if row.state == State.QUEUED.value]


# --- restart -----------------------------------------------------------------------------------------------------


class Agents(threading.Thread):
    """Every host's full heartbeats over five seconds, again and again."""

    def __init__(self, url: str, hosts: int, guests: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._bodies = [encode(replace(report(n, guests), seq=0)) for n in range(hosts)]
        self._over = threading.Event()

    def run(self) -> None:
        connection = pika.BlockingConnection(pika.URLParameters(self._url))
        channel = connection.channel()
        begun, number = time.monotonic(), 0
        while not self._over.is_set():
            time.sleep(max(0.0, begun + number * INTERVAL_S / len(self._bodies) - time.monotonic()))
            host = number % len(self._bodies)
            kind, body = self._bodies[host]
            numbered = body.replace(b'"seq":0,', b'"seq":%d,' % (number + 1))
            properties = pika.BasicProperties(type=kind, user_id=f"agent-{name(host)}", delivery_mode=1)
            channel.basic_publish(topology.EVENTS, topology.heartbeat_key(name(host)), numbered, properties)
            number += 1
        connection.close()

    def end(self) -> None:
        self._over.set()
        self.join()


@dataclass
class Restarted:
    """Seconds until the first placement, after an orderly stop and after a kill, and the process's memory then."""

    stopped_s: float
    killed_s: float
    rss_mib: float


def restart(folder: Path, postgresql: bool, hosts: int, guests: int) -> Restarted:
    """A scheduler that starts over a ledger full of sessions."""
    folder.mkdir()
    folder.chmod(0o711)
    with ExitStack() as stack:
        keys = Keys(folder / "keys")
        document = definitions((), keys)
        document["users"].append(user(LOGIN, keys.secret(LOGIN), ["impersonator"]))
        document["permissions"].append(permission(LOGIN, "^$", "^(events|commands)$", "^$"))
        broker = stack.enter_context(PrivateBroker(folder / "broker", document))
        url = f"sqlite:///{folder}/ledger.db"
        if postgresql:
            database = PrivatePostgres(folder / "pg")
            stack.callback(database.stop)
            database.start()
            url = database.database("ledger")
        engine = open_engine(url)
        stack.callback(engine.dispose)
        migrate(engine)
        fill(engine, hosts, guests)
        port = free_port()
        config = _config(folder, broker.url("scheduler", keys.secret("broker-scheduler")), url, port)
        argv = [sys.executable, "-m", "deskfleet.scheduler", "--config", str(config)]
        scheduler = Service("scheduler", argv, port, folder / "scheduler.log")
        stack.callback(scheduler.stop)
        agents = broker.url(LOGIN, keys.secret(LOGIN))
        times = []
        for number, end in enumerate((scheduler.stop, scheduler.stop, scheduler.kill)):
            if number:  # the first start declares the queues, and compiles
                end()
            times.append(_first_placement(scheduler, engine, agents, hosts, guests, number))
        return Restarted(times[1], times[2], psutil.Process(scheduler.pid).memory_info().rss / (1 << 20))


def _config(folder: Path, broker_url: str, ledger: str, port: int) -> Path:
    (folder / "catalogue").mkdir()
    (folder / "catalogue" / "tiny.toml").write_text(
        'title = "Tiny"\ntext = "A machine for the bench"\nos = "other"\n'
        f'image = {{ file = "tiny.iso", format = "iso", sha256 = "{MACHINE.sha256}" }}\n'
        "cpus = { min = 1, default = 1, max = 8 }\nmemory_mib = { min = 64, default = 512, max = 4096 }\n"
        'disk_gib = { min = 1, default = 1, max = 64 }\naccess = { users = ["*"] }\n'
    )
    config = folder / "deskfleet.toml"
    config.touch(0o600)
    config.write_text(
        f'[scheduler]\nbroker_url = "{broker_url}"\nops_listen = "127.0.0.1:{port}"\n'
        f'[ledger]\nurl = "{ledger}"\n[machines]\ncatalogue = "{folder}/catalogue"\n'
    )
    return config


def _first_placement(scheduler: Service, engine: Engine, url: str, hosts: int, guests: int, number: int) -> float:
    asked = f"{(1 << 100) + number:032x}"
    kind, body = encode(LaunchRequested(asked, "ann", (), MACHINE.name, SIZE, False, 3600, 3600))
    agents = Agents(url, hosts, guests)
    begun = time.monotonic()
    scheduler.start()
    if number == 0:  # nothing can be sent before the exchanges are there
        _wait(scheduler, scheduler.ready)
    agents.start()
    try:
        connection = pika.BlockingConnection(pika.URLParameters(url))
        properties = pika.BasicProperties(type=kind, user_id=LOGIN, delivery_mode=2)
        connection.channel().basic_publish(topology.COMMANDS, "scheduler", body, properties)
        connection.close()
        query = select(tables.session.c.state).where(tables.session.c.sid == asked)

        def placed() -> bool:
            with engine.connect() as reading:
                return reading.scalar(query) == State.ASSIGNED.value

        _wait(scheduler, placed)
        return time.monotonic() - begun
    finally:
        agents.end()


def _wait(scheduler: Service, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if not scheduler.running() or time.monotonic() > deadline:
            raise SystemExit(f"the scheduler does not get there:\n{scheduler.last_words()}")
        time.sleep(0.01)


# --- the whole ---------------------------------------------------------------------------------------------------


def show(title: str, made: Burst) -> None:
    states = ", ".join(f"{count} {state}" for state, count in sorted(made.states.items()))
    print(f"{title}: {states}; lost {made.lost}, started twice {made.twice}, hosts differ by {made.spread}")
    print(f"  ledger read in {made.load_s:.2f} s; first heartbeats of all hosts {made.heartbeats_s:.2f} s")
    rate = made.asked / made.placing_s
    print(f"  decided in {made.placing_s:.2f} s ({rate:.0f}/s), p99 {made.p99_s * 1000:.0f} ms", end="")
    print(f"; answers of hosts {made.answers_s:.2f} s; one sweep {made.sweep_s:.2f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2_000)
    parser.add_argument("--guests", type=int, default=25, help="that run on each host before (default 25)")
    parser.add_argument("--launches", type=int, default=10_000)
    parser.add_argument("--part", choices=("burst", "queue", "restart"), help="only this one")
    parser.add_argument("--profile", default="", help="write cProfile's figures of burst and queue here (slower)")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    parts = (options.part,) if options.part else ("burst", "queue", "restart")
    for part in [entry for entry in parts if entry != "restart"]:
        made = _burst_part(options, part)
        if part == "burst":
            result |= {
                "burst_s": round(made.placing_s + made.answers_s, 2),
                "launches_per_s": round(made.asked / made.placing_s),
                "decision_p99_ms": round(made.p99_s * 1000, 1),
                "spread": made.spread,
                "lost": made.lost,
            }
        else:
            result |= {
                "queue_burst_s": round(made.placing_s, 2),
                "queue_decision_p99_ms": round(made.p99_s * 1000, 1),
                "queue_waiting": made.states[State.QUEUED.value],
                "queue_lost": made.lost,
                "queue_sweep_s": round(made.sweep_s, 2),
            }
    if "restart" in parts:
        with tempfile.TemporaryDirectory(prefix="dfb", dir="/tmp", ignore_cleanup_errors=True) as text:
            Path(text).chmod(0o711)
            for sessions in (10_000, 50_000):
                for kind in ("sqlite", "postgresql"):
                    hosts = sessions // options.guests
                    again = restart(Path(text) / f"{kind}{sessions}", kind == "postgresql", hosts, options.guests)
                    print(
                        f"restart with {sessions} sessions on {hosts} hosts, {kind}: first placement after "
                        f"{again.stopped_s:.2f} s ({again.killed_s:.2f} s after a kill), {again.rss_mib:.0f} MiB",
                        flush=True,
                    )
                    result[f"restart_{sessions}_s_{kind}"] = round(again.stopped_s, 2)
                    result[f"restart_{sessions}_s_{kind}_after_kill"] = round(again.killed_s, 2)
                    result["rss_mib"] = round(again.rss_mib)
    print(json.dumps(result))
    return 0


def _burst_part(options: argparse.Namespace, part: str) -> Burst:
    # Where only a part fits: two more on each host.
    room = 200 if part == "burst" else options.guests + 2
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="dfb") as folder:
        engine = open_engine(f"sqlite:///{folder}/ledger.db")
        migrate(engine)
        if options.profile:
            import cProfile

            profiler = cProfile.Profile()
            made = profiler.runcall(burst, engine, options.hosts, options.guests, options.launches, room)
            profiler.dump_stats(f"{options.profile}.{part}")
        else:
            made = burst(engine, options.hosts, options.guests, options.launches, room)
        engine.dispose()
    print(f"{options.hosts} hosts, {options.hosts * options.guests} desktops running, {options.launches} launches")
    show("burst" if part == "burst" else "burst of which a part fits", made)
    if made.lost or made.twice or made.spread > 1:
        raise SystemExit("launches were lost, doubled, or not spread evenly")
    return made


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
