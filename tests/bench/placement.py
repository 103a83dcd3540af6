"""measures: how fast a host is chosen among 10 to 10,000, and claimed durably on SQLite and PostgreSQL

The choice is the product's own (scheduler/placement.py) without the ledger: 20,000 mixed requests (CPUs, memory, one of
40 images, a fifth with one of four GPU models, a third with one of twelve labels) on hosts half of whose CPUs are in
use; each choice takes its room, and one random session gives room back. Beside it, in the same run and on the same
requests: the naive loop over every host (each answer must be the same) and a chain of filters in the shape of Nova's
scheduler (a pass over the list of hosts for each filter, then a weight for each that is left, then a sort).

Claimed: launch requests through the real scheduler, from the delivered message to the committed claim, on 5,000 hosts;
many at once (commits are grouped), and one by one at 100 a second for the latency. The bus is in memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from support.postgres import PrivatePostgres  # noqa: E402

from deskfleet.ledger.engine import migrate, open_engine  # noqa: E402
from deskfleet.ledger.writer import Writer  # noqa: E402
from deskfleet.runtime.bus import Outgoing  # noqa: E402
from deskfleet.runtime.memory_bus import MemoryBroker  # noqa: E402
from deskfleet.runtime.service import SystemClock  # noqa: E402
from deskfleet.scheduler.core import Scheduler  # noqa: E402
from deskfleet.scheduler.decisions import Settings  # noqa: E402
from deskfleet.scheduler.filters import FILTERS, Moment, Want, free_gpu  # noqa: E402
from deskfleet.scheduler.hosts import HostState, Usage  # noqa: E402
from deskfleet.scheduler.placement import Index, NoFit, choose, naive, rank  # noqa: E402
from deskfleet.scheduler.policy import Policy, Pool  # noqa: E402
from deskfleet.schemas import topology  # noqa: E402
from deskfleet.schemas.host import Gpu, HostReport  # noqa: E402
from deskfleet.schemas.machine import Firmware, Format, GpuPolicy, Machine, Os, Range, Video  # noqa: E402
from deskfleet.schemas.messages import LaunchRequested  # noqa: E402
from deskfleet.schemas.session import Resources, State  # noqa: E402
from deskfleet.schemas.wire import encode  # noqa: E402

NOW = 1000.0
IMAGES = [f"{n:064x}" for n in range(40)]
MODELS = ["A", "B", "C", "D"]
LABELS = [f"label-{n}" for n in range(12)]
POLICY = Policy(
    cpu_overcommit=1.0,
    host_reserve_mib=0,
    guest_overhead_mib=0,
    fresh_s=1e9,
    pools=tuple(Pool(label, (f"*-{n:02d}-*", f"*-{n + 12:02d}-*")) for n, label in enumerate(LABELS)),
)


def report(name: str, rng: random.Random) -> HostReport:
    """A host of one of four sizes; a tenth have two GPUs of one model."""
    cpus = rng.choice([16, 32, 64, 128])
    gpus: tuple[Gpu, ...] = ()
    if rng.random() < 0.1:
        model = rng.choice(MODELS)
        addresses = [f"0000:0{n}:00.0" for n in (1, 2)]
        gpus = tuple(Gpu(address, model, n, (address,), True) for n, address in enumerate(addresses))
    return HostReport(
        name, "i", 1, "b", 0, False, "127.0.0.1:1", "kvm", cpus, cpus * 4096, rng.uniform(0, cpus), cpus * 4096,
        1 << 30, 1 << 29, tuple(rng.sample(IMAGES, 20)), gpus,
    )  # fmt: skip


def hosts(count: int, rng: random.Random) -> list[HostState]:
    """Hosts half of whose CPUs are in use."""
    made = []
    for number in range(count):
        state = HostState(f"h-{number % 30:02d}-{number}")
        state.belongs(POLICY.pools)
        said = report(state.name, rng)
        state.take(said, NOW, POLICY)
        used = rng.randint(0, said.cpus)
        state.usage = Usage(used // 4, used, used * 4096)
        made.append(state)
    return made


def wants(count: int, rng: random.Random) -> list[Want]:
    """Mixed requests."""
    made = []
    for number in range(count):
        cpus = rng.choice([1, 2, 2, 4, 8])
        gpu = rng.random() < 0.2
        size = Resources(cpus, cpus * rng.choice([1024, 2048, 4096]), 20, int(gpu), rng.choice(MODELS) if gpu else "")
        label = frozenset({rng.choice(LABELS)}) if rng.random() < 0.3 else frozenset[str]()
        made.append(Want(f"s{number}", size, rng.choice(IMAGES), 3600.0, label))
    return made


class Room:
    """Takes and gives back room, the same for each way of choosing."""

    def __init__(self, states: list[HostState], moved: Callable[[HostState], None], seed: int) -> None:
        self._states = {state.name: state for state in states}
        self._moved = moved
        self._rng = random.Random(seed)
        self._held: list[tuple[HostState, Resources, frozenset[str]]] = []

    def settle(self, want: Want, name: str | None) -> None:
        """`want` went to the host of this name; one random session ends."""
        if name is not None:
            state, size = self._states[name], want.resources
            gpu = free_gpu(want, state, Moment(NOW, POLICY)) if size.gpus else None
            functions = frozenset(gpu.functions) if gpu else frozenset[str]()
            self._use(state, size, functions, +1)
            self._held.append((state, size, functions))
        if self._held and self._rng.random() < 0.9:
            number = self._rng.randrange(len(self._held))
            self._held[number], self._held[-1] = self._held[-1], self._held[number]
            self._use(*self._held.pop(), -1)

    def _use(self, state: HostState, size: Resources, functions: frozenset[str], sign: int) -> None:
        used = state.usage
        state.usage = Usage(
            used.sessions + sign, used.cpus + sign * size.cpus, used.memory_mib + sign * size.memory_mib
        )
        state.gpus_held = state.gpus_held | functions if sign > 0 else state.gpus_held - functions
        self._moved(state)


def chain(want: Want, states: list[HostState], at: Moment) -> HostState | None:
    """Nova's shape: each filter makes a new list, then all that are left are weighed and sorted."""
    left = states
    for check in FILTERS:
        left = [state for state in left if check(want, state, at) is None]
    weighed = sorted(left, key=lambda state: rank(want, state))
    return weighed[0] if weighed else None


def timed(
    pick: Callable[[Want], str | None], room: Room, requests: list[Want], seconds: float
) -> tuple[float, float, list[str | None]]:
    """Decisions a second with claim and release, p99 of the decision alone (us), and the answers."""
    times, answers = [], []
    began = time.perf_counter()
    for want in requests:
        start = time.perf_counter()
        name = pick(want)
        times.append(time.perf_counter() - start)
        room.settle(want, name)
        answers.append(name)
        if time.perf_counter() - began > seconds:
            break
    took = time.perf_counter() - began
    return len(answers) / took, statistics.quantiles(times, n=100)[98] * 1e6, answers


def decisions(count: int, seconds: float, seed: int) -> dict[str, float]:
    """The product, the naive loop and the chain on the same hosts and requests."""
    at = Moment(NOW, POLICY)
    requests = wants(20_000, random.Random(seed))
    found: dict[str, tuple[float, float, list[str | None]]] = {}
    for way in ("product", "naive", "chain"):
        states = hosts(count, random.Random(seed))
        index = Index(POLICY)
        for state in states:
            index.put(state)
        room = Room(states, index.put, seed)

        def product(want: Want, index: Index = index) -> str | None:
            choice = choose(want, index.walk(want), at)
            return None if isinstance(choice, NoFit) else choice.host

        def loop(want: Want, states: list[HostState] = states) -> str | None:
            best = naive(want, states, at)
            return best.name if best else None

        def nova(want: Want, states: list[HostState] = states) -> str | None:
            best = chain(want, states, at)
            return best.name if best else None

        gc.collect()
        pick = {"product": product, "naive": loop, "chain": nova}[way]
        found[way] = timed(pick, room, requests, seconds if way == "product" else max(seconds, 2.0))
    for way in ("naive", "chain"):
        other = found[way][2]
        assert other == found["product"][2][: len(other)] or found["product"][2] == other[: len(found["product"][2])], (
            f"{way} chose otherwise at {count} hosts"
        )
    placed = sum(answer is not None for answer in found["product"][2]) / len(found["product"][2])
    return {
        "per_s": found["product"][0],
        "p99_us": found["product"][1],
        "naive_per_s": found["naive"][0],
        "chain_per_s": found["chain"][0],
        "compared": min(len(found[way][2]) for way in found),
        "placed": placed,
    }


# --- claimed, durably -----------------------------------------------------------------------------------------

MACHINE = Machine(
    "bench", "Bench", "A machine", Os.LINUX, "bench.qcow2", Format.QCOW2, IMAGES[0], Video.STD, Firmware.BIOS,
    Range(1, 1, 64), Range(64, 512, 1 << 20), Range(1, 1, 64), GpuPolicy.NEVER, users=("*",),
)  # fmt: skip


class Claims:
    """The real scheduler over an in-memory bus; its hosts say nothing after their first report."""

    def __init__(self, url: str, count: int) -> None:
        self.engine = open_engine(url)
        migrate(self.engine)
        self.broker = MemoryBroker(random.Random(1), SystemClock())
        self.deferred: list[Callable[[], None]] = []
        self._sids = 0
        bus = self.broker.connect("scheduler", lambda action: action(), declare=topology.core())
        policy = replace(POLICY, pools=(), max_sessions=100_000)
        self.scheduler = Scheduler(
            Writer(self.engine), bus, SystemClock(), lambda: {"bench": MACHINE}, Settings(policy=policy),
            self.deferred.append,
        )  # fmt: skip
        self.scheduler.start()
        bus.start()
        rng = random.Random(2)
        for number in range(count):
            name = f"h{number}"
            self.broker.declare(topology.EXCHANGES_ONLY + topology.for_host(name))
            said = replace(
                report(name, rng), images=(IMAGES[0],), cpus=512, memory_mib=1 << 22, memory_free_mib=1 << 22
            )
            self.send(f"agent-{name}", topology.EVENTS, topology.heartbeat_key(name), encode(said))
        self.work()
        self.portal = self.broker.connect("portal", lambda action: action())
        self.portal.start()

    def send(self, login: str, exchange: str, key: str, message: tuple[str, bytes]) -> None:
        bus = self.broker.connect(login, lambda action: action())
        bus.start()
        bus.publish(Outgoing(exchange, key, *message)).result()
        bus.stop()

    def launch(self) -> None:
        self._sids += 1
        size = Resources(1, 512, 1)
        request = LaunchRequested(f"{self._sids:032x}", f"u{self._sids % 500}", (), "bench", size, False, 3600, 600)
        self.portal.publish(Outgoing(topology.COMMANDS, "scheduler", *encode(request))).result()

    def work(self) -> None:
        """Deliver what waits for the scheduler and run its batches. Nothing reads the hosts' queues."""
        while True:
            moved = 0
            for queue in (topology.SCHEDULER_COMMANDS, topology.SCHEDULER_HEARTBEATS):
                # As many as the scheduler takes at once from the broker: its prefetch.
                while moved < 100 and self.broker.deliver_one(queue):
                    moved += 1
            while self.deferred:
                moved += 1
                self.deferred.pop(0)()
            if not moved:
                return

    def claimed(self) -> int:
        return sum(session.state is State.ASSIGNED for session in self.scheduler.fleet.sessions.values())


def claims(url: str, count: int, burst: int, paced: int) -> tuple[float, float]:
    """Claims a second of a burst, and the p99 (ms) of one at a time at 100 a second."""
    bench = Claims(url, count)
    for _ in range(burst):
        bench.launch()
    gc.collect()
    began = time.perf_counter()
    bench.work()
    took = time.perf_counter() - began
    assert bench.claimed() == burst, f"{bench.claimed()} of {burst} claimed"
    times = []
    due = time.perf_counter()
    for _ in range(paced):
        due += 0.01
        time.sleep(max(0.0, due - time.perf_counter()))
        bench.launch()
        bench.work()
        times.append(time.perf_counter() - due)
    assert bench.claimed() == burst + paced
    bench.engine.dispose()
    return burst / took, statistics.quantiles(times, n=100)[98] * 1e3


@contextmanager
def ledgers() -> Iterator[dict[str, str]]:
    """A SQLite file on this machine's disk, and a PostgreSQL that syncs."""
    with tempfile.TemporaryDirectory(prefix="dfpl", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        server = PrivatePostgres(Path(folder) / "pg", fsync=True)
        server.start()
        try:
            yield {"sqlite": f"sqlite:///{folder}/ledger.db", "postgresql": server.database("ledger")}
        finally:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each size and way")
    parser.add_argument("--hosts", type=int, nargs="*", default=[10, 100, 1000, 10_000])
    parser.add_argument("--burst", type=int, default=5000)
    parser.add_argument("--paced", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    result: dict[str, object] = {}
    per_s, p99 = {}, {}
    heads = ("decisions/s", "p99 us", "naive/s", "chain/s", "x chain", "same answers")
    print(f"{'hosts':>7}" + "".join(f"{head:>13}" for head in heads))
    for count in options.hosts:
        found = decisions(count, options.seconds, options.seed)
        per_s[str(count)], p99[str(count)] = round(found["per_s"]), round(found["p99_us"], 1)
        ratio = found["per_s"] / found["chain_per_s"]
        result[f"ratio_chain_{count}"] = round(ratio, 1)
        result[f"ratio_naive_{count}"] = round(found["per_s"] / found["naive_per_s"], 1)
        figures = (
            found["per_s"],
            found["p99_us"],
            found["naive_per_s"],
            found["chain_per_s"],
            ratio,
            found["compared"],
        )
        print(f"{count:>7}" + "".join(f"{figure:>13,.0f}" for figure in figures) + f"   placed {found['placed']:.0%}")
    result.update(decisions_per_s=per_s, p99_us=p99)
    with ledgers() as urls:
        for name, url in urls.items():
            rate, p99_ms = claims(url, 5000, options.burst, options.paced)
            result[f"claimed_per_s_{name}"], result[f"claim_p99_ms_{name}"] = round(rate), round(p99_ms, 2)
            print(f"{name}: {rate:,.0f} durable claims/s at 5,000 hosts; p99 {p99_ms:.1f} ms at 100/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
