"""measures: how many hosts, at a heartbeat every 5 s, one core of the scheduler takes from the broker to the ledger

A real broker, the real scheduler process and a ledger file. One connection speaks for all agents: its login may name
others as senders (RabbitMQ's impersonator tag), so that each message reaches the scheduler as its own agent's. First
every host sends a full heartbeat; then all send small ones; then, as the baseline, some hosts send nothing but full
ones with 25 guests. Meanwhile the broker's queue is kept from running empty, and too short for messages to expire in
it. Last all hosts send small ones every 5 s, as in life. A phase ends when the ledger shows the last heartbeat of every
host; what is counted is the CPU time that the scheduler's process has used meanwhile, its sweeps and commits included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy"), str(ROOT / "tests")]

import pika  # type: ignore[import-untyped]  # noqa: E402
import psutil  # noqa: E402
from demo.broker import PrivateBroker, free_port  # noqa: E402
from demo.definitions import definitions  # noqa: E402
from demo.fleet import Service  # noqa: E402
from demo.keys import Keys  # noqa: E402
from sqlalchemy import Engine, insert, select  # noqa: E402
from support.postgres import PrivatePostgres  # noqa: E402

from deskfleet.ledger import tables  # noqa: E402
from deskfleet.ledger.engine import migrate, open_engine  # noqa: E402
from deskfleet.runtime.rights import permission, user  # noqa: E402
from deskfleet.schemas import topology  # noqa: E402
from deskfleet.schemas.host import GuestReport, HostReport, Phase, beat_of, inventory_digest  # noqa: E402
from deskfleet.schemas.messages import HostBeat  # noqa: E402
from deskfleet.schemas.session import State  # noqa: E402
from deskfleet.schemas.wire import encode  # noqa: E402

INTERVAL_S = 5.0
LOGIN = "all-agents"
IMAGES = tuple(f"{number:064x}" for number in range(5))
#: The queue is filled up to here: the scheduler never waits for long, and no message for as long as it is kept.
DEPTH = 500
CHUNK = 100
PATIENCE_S = 600.0


def name(number: int) -> str:
    return f"h{number:05}"


def sid(host: int, guest: int) -> str:
    return f"{host:016x}{guest:016x}"


def report(number: int, guests: int) -> HostReport:
    """The full heartbeat of a host whose guests all run."""
    listed = tuple(GuestReport(sid(number, guest), guest + 1, Phase.RUNNING, True, 1) for guest in range(guests))
    made = HostReport(
        host=name(number),
        incarnation=f"{number:016x}",
        seq=0,
        boot_id=f"{number:036x}",
        last_generation=guests,
        fenced=False,
        console=f"{name(number)}.example.org:6080",
        accel="kvm",
        cpus=64,
        memory_mib=262_144,
        load1=0.0,
        memory_free_mib=131_072,
        disk_mib=4_000_000,
        disk_free_mib=3_000_000,
        images=IMAGES,
        guests=listed,
        version="1.0",
    )
    return replace(made, digest=inventory_digest(made))


def fill(engine: Engine, hosts: int, full: int, guests: int) -> None:
    """A ledger in which the first `full` hosts run their guests."""
    common = {
        "machine": "desktop", "cpus": 2, "memory_mib": 4096, "disk_gib": 20, "gpus": 0, "gpu_model": "",
        "persistent": True, "lifetime_s": 86_400, "state": State.RUNNING.value, "created_at": 0.0, "changed_at": 0.0,
    }  # fmt: skip
    with engine.begin() as connection:
        connection.execute(
            insert(tables.host), [{"name": name(n), "generation": guests if n < full else 0} for n in range(hosts)]
        )
        for number in range(full):
            rows = [
                {
                    **common,
                    "sid": sid(number, guest),
                    "user": f"u{guest}",
                    "host": name(number),
                    "generation": guest + 1,
                }
                for guest in range(guests)
            ]
            connection.execute(insert(tables.session), rows)


class Agents:
    """Every agent's side of the bus, on one connection."""

    def __init__(self, url: str) -> None:
        self._channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
        self._seq: dict[str, int] = {}

    def send(self, message: HostReport | HostBeat, load1: float) -> Callable[[], None]:
        """What sends this heartbeat with the host's next number and that load; made before the clock runs."""
        kind, body = encode(replace(message, seq=0, load1=load1))
        before, after = body.split(b'"seq":0,', 1)
        properties = pika.BasicProperties(
            type=kind, user_id=f"agent-{message.host}", delivery_mode=1, content_type="application/json"
        )
        key = topology.heartbeat_key(message.host)

        def publish() -> None:
            self._seq[message.host] = seq = self._seq.get(message.host, 0) + 1
            self._channel.basic_publish(
                topology.EVENTS, key, before + b'"seq":%d,' % seq + after, properties, mandatory=False
            )

        return publish

    def rush(self, sends: list[Callable[[], None]]) -> None:
        """Send all, and let the queue neither run empty nor overflow."""
        for start in range(0, len(sends), CHUNK):
            while self._depth() > DEPTH:
                time.sleep(0.01)
            for publish in sends[start : start + CHUNK]:
                publish()

    def pace(self, sends: list[Callable[[], None]], rate: float) -> None:
        """Send so many a second, evenly."""
        begun = time.monotonic()
        for number, publish in enumerate(sends):
            early_s = begun + number / rate - time.monotonic()
            if early_s > 0.001:
                time.sleep(early_s)
            publish()

    def _depth(self) -> int:
        found = self._channel.queue_declare(topology.SCHEDULER_HEARTBEATS, passive=True)
        return int(found.method.message_count)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kind: str
    heartbeats: int
    wall_s: float
    cpu_s: float
    broker_s: float

    @property
    def per_cpu_s(self) -> float:
        """Heartbeats handled in a second of the scheduler's CPU time."""
        return self.heartbeats / self.cpu_s


class Bench:
    """Agents, scheduler and ledger, running."""

    def __init__(self, agents: Agents, engine: Engine, scheduler: int, broker: int) -> None:
        self._agents = agents
        self._engine = engine
        self._processes = psutil.Process(scheduler), psutil.Process(broker)
        self._round = 0

    def _stored(self) -> dict[str, float]:
        """The load of each host as the ledger shows it."""
        query = select(tables.host.c.name, tables.host.c.report, tables.host.c.figures)
        with self._engine.connect() as connection:
            return {
                row.name: json.loads(row.figures)[0] if row.figures else json.loads(row.report)["load1"]
                for row in connection.execute(query)
                if row.report
            }

    def measure(self, kind: str, messages: list[HostReport] | list[HostBeat], rounds: int, rate: float = 0.0) -> Row:
        """Send `rounds` heartbeats for each host, at `rate` a second or as fast as they are taken, and wait until the
        ledger holds the last of each."""
        sends = []
        for _ in range(rounds):
            self._round += 1
            # The load tells the rounds apart. It stays below what would move a host in the order of placement.
            sends += [self._agents.send(message, self._round / 1000) for message in messages]
        begun, before = time.monotonic(), self._used()
        if rate:
            self._agents.pace(sends, rate)
        else:
            self._agents.rush(sends)
        last = {message.host: self._round / 1000 for message in messages}
        while not last.items() <= self._stored().items():
            if time.monotonic() - begun > PATIENCE_S:
                raise SystemExit(f"the ledger does not show the last {kind} heartbeat of every host")
            time.sleep(0.5)
        after = self._used()
        cpu_s, broker_s = (new - old for new, old in zip(after, before, strict=True))
        return Row(kind, len(sends), time.monotonic() - begun, cpu_s, broker_s)

    def _used(self) -> list[float]:
        times = [process.cpu_times() for process in self._processes]
        return [spent.user + spent.system for spent in times]


@contextmanager
def stage(folder: Path, postgresql: bool, hosts: int, full: int, guests: int, profile: str) -> Iterator[Bench]:
    """Everything started, the ledger filled."""
    keys = Keys(folder / "keys")
    document = definitions((), keys)
    document["users"].append(user(LOGIN, keys.secret(LOGIN), ["impersonator"]))
    document["permissions"].append(permission(LOGIN, "^$", "^events$", "^$"))
    broker = PrivateBroker(folder / "broker", document)
    database = PrivatePostgres(folder / "pg") if postgresql else None
    scheduler: Service | None = None
    try:
        broker.start()
        url = f"sqlite:///{folder}/ledger.db"
        if database:
            database.start()
            url = database.database("ledger")
        engine = open_engine(url)
        migrate(engine)
        fill(engine, hosts, full, guests)
        (folder / "catalogue").mkdir()
        port = free_port()
        settings = {
            "scheduler": {
                "broker_url": broker.url("scheduler", keys.secret("broker-scheduler")),
                "ops_listen": f"127.0.0.1:{port}",
            },
            "ledger": {"url": url},
            "machines": {"catalogue": str(folder / "catalogue")},
        }
        config = folder / "deskfleet.toml"
        config.touch(0o600)
        lines = [
            f"[{part}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in s.items()) for part, s in settings.items()
        ]
        config.write_text("\n".join(lines))
        argv = [sys.executable, *(["-m", "cProfile", "-o", profile] if profile else []), "-m", "deskfleet.scheduler"]
        scheduler = Service("scheduler", [*argv, "--config", str(config)], port, folder / "scheduler.log")
        scheduler.start()
        deadline = time.monotonic() + 120
        while not scheduler.ready():
            if not scheduler.running() or time.monotonic() > deadline:
                raise SystemExit(f"the scheduler does not start:\n{scheduler.last_words()}")
            time.sleep(0.1)
        yield Bench(Agents(broker.url(LOGIN, keys.secret(LOGIN))), engine, scheduler.pid, broker.pid)
    finally:
        if scheduler:
            scheduler.stop()
        if database:
            database.stop()
        broker.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=10_000)
    parser.add_argument("--full-hosts", type=int, default=1_000, help="so many of them have guests (default 1000)")
    parser.add_argument("--guests", type=int, default=25, help="of each of those (default 25)")
    parser.add_argument("--rounds", type=int, default=5, help="heartbeats of each host in a phase (default 5)")
    parser.add_argument("--postgresql", action="store_true", help="instead of SQLite")
    parser.add_argument("--profile", default="", help="write the scheduler's cProfile here (its figures are slower)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dfb", dir="/tmp", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        folder.chmod(0o711)
        full = min(options.full_hosts, options.hosts)
        reports = [report(number, options.guests if number < full else 0) for number in range(options.hosts)]
        with stage(folder, options.postgresql, options.hosts, full, options.guests, options.profile) as bench:
            beats = [beat_of(entry) for entry in reports]
            rows = [
                bench.measure("first full", reports, 1),
                bench.measure("small", beats, options.rounds),
                bench.measure("full", reports[:full], options.rounds),
                bench.measure("small, paced", beats, options.rounds, options.hosts / INTERVAL_S),
            ]
    print(f"{options.hosts} hosts, {full} of them with {options.guests} guests; CPU time of the scheduler's process")
    print(f"{'heartbeats':12} {'handled':>8} {'wall s':>7} {'CPU s':>7} {'broker':>7} {'per CPU s':>10}  hosts at 5 s")
    for row in rows:
        figures = f"{row.heartbeats:8} {row.wall_s:7.1f} {row.cpu_s:7.2f} {row.broker_s:7.2f}"
        print(f"{row.kind:12} {figures} {row.per_cpu_s:10.0f} {row.per_cpu_s * INTERVAL_S:13.0f}")
    small, baseline = (row.per_cpu_s * INTERVAL_S for row in rows[1:3])
    share = rows[3].cpu_s / (options.rounds * INTERVAL_S)
    print(f"{options.hosts} hosts with a heartbeat every {INTERVAL_S:g} s take {share:.0%} of a core")
    result = {
        "hosts_at_5s_per_core": round(small),
        "full_hosts_at_5s_per_core": round(baseline),
        "ratio": round(small / baseline, 1),
        "hosts": options.hosts,
        "core_share_of_hosts": round(share, 2),
        "guests_of_full": options.guests,
        "ledger": "postgresql" if options.postgresql else "sqlite",
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
