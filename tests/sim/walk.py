"""Seeded random walks through the cluster: what people, time and bad luck do to it.

python tests/sim/walk.py --seeds 10000 --first 0      many walks; a failing one is shrunk and written down
python tests/sim/walk.py --replay FILE                one walk again, from the file
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from sim.process import Violation
from sim.steps import Step, Steps
from sim.world import World

#: Kinds of faults. Each walk has some of them only, so that rare pairs meet undisturbed.
FAULTS = (
    "drop",
    "duplicate",
    "reorder",
    "delay",
    "echo",
    "cut",
    "kill_broker",
    "block",
    "kill_agent",
    "kill_agent_at",
    "kill_scheduler",
    "kill_scheduler_at",
    "kill_portal",
    "kill_proxy",
    "pause",
    "pause_leader",
    "ledger_away",
    "ledger_commit",
    "portal_store",
    "disk",
    "reboot",
    "reinstall",
    "reboot_moved",
    "device",
    "start_fails",
    "slow",
    "guest_dies",
    "hangs",
    "odd_ticket",
    "forge",
    "declare_dead",
    "drain",
    "clock",
    "upgrade_qemu",
)
STEPS = 250
USERS = ("ann", "bo", "zoë")


class Chooser:
    """Draws the next step of a walk. It looks at the world only to propose what makes sense."""

    def __init__(self, world: World, steps: Steps, rng: random.Random) -> None:
        self.world = world
        self.steps = steps
        self.rng = rng
        #: What follows from earlier steps and happens soon.
        self._planned: list[Step] = []
        self._usual: list[Callable[[], Step | None]] = [
            *[self._wait] * 5,
            *[self._launch] * 4,
            *[self._person] * 3,
            *[self._viewer] * 7,
        ]
        self._bad = [fault for fault in FAULTS if fault in world.faults and hasattr(self, f"_{fault}")]

    def next(self) -> Step:
        """One step."""
        while True:
            draw = self.rng.random()
            if draw < 0.1 and self._bad:
                step = getattr(self, f"_{self.rng.choice(self._bad)}")()
            elif draw < 0.2:
                step = self._mend()
            elif draw < 0.33 and self._planned:
                step = self._planned.pop(0)
            elif draw < 0.75:
                step = self._progress()
            else:
                step = self.rng.choice(self._usual)()
            if step:
                return tuple(step)

    # --- what goes on anyway --------------------------------------------------------------------------------

    def _progress(self) -> Step | None:
        """Something that waits to be done is done: a message is delivered, a batch committed, a guest started."""
        world, rng, faults = self.world, self.rng, self.world.faults
        steps: list[Step] = []
        for queue in world.broker.queues():
            if queue != "dead" and world.broker.pending(queue):
                steps.append(("deliver", queue, rng.choice([1, 1, 2, 10])))
        for process in (*world.deciders, world.portal):
            if process.busy:
                steps += [("flush", process.name)] * 2
        for node in world.nodes.values():
            if node.todo and node.alive and not node.paused:
                wrong = ("start_fails" in faults or "hangs" in faults) and rng.random() < 0.35
                index = rng.randrange(len(node.todo)) if "slow" in faults else 0
                steps += [("work", node.host, index, wrong)] * 2
        for proxy in world.proxies:
            if proxy.opening and rng.random() < 0.2:
                steps.append(("go_on", proxy.name, rng.randrange(len(proxy.opening))))
        return rng.choice(steps) if steps else None

    def _wait(self) -> Step:
        if self.rng.random() < 0.01:
            return "wait", 700.0
        return "wait", self.rng.choice([0.1, 0.5, 1.0, 1.0, 2.0, 5.0, 12.0, 40.0])

    def _launch(self) -> Step:
        rng = self.rng
        if self.world.evidence.requests and rng.random() < 0.2:
            return "again", self._sid()
        return (
            "launch",
            f"{rng.getrandbits(128):032x}",
            rng.choice(USERS),
            "tiny" if rng.random() > 0.03 else "gone",
            rng.choice([1, 1, 2, 4]),
            rng.choice([256, 512, 1024, 2048]),
            int(rng.random() < 0.3),
            rng.random() < 0.5,
            rng.choice([60, 600, 36000]),
        )

    def _sid(self) -> str:
        return self.rng.choice(list(self.world.evidence.requests) or [""])

    def _running(self) -> str:
        ready = [vm.sid for node in self.world.nodes.values() for vm in node.vms.values() if vm.ready]
        return self.rng.choice(ready) if ready else ""

    def _person(self) -> Step | None:
        if self.rng.random() < 0.7:
            return "stop", self._sid(), self.rng.random() < 0.2
        sid = self._running()
        return ("power_off", sid) if sid else None

    def _viewer(self) -> Step | None:
        rng, door = self.rng, self.rng.choice(self.world.proxies)
        if door.consoles and rng.random() < 0.3:
            console = rng.randrange(len(door.consoles))
            watched = door.consoles[console].vm.sid
            return ("stop", watched, False) if rng.random() < 0.5 else ("leave", door.name, console)
        held = len(self.steps.tickets)
        if held and rng.random() < 0.4:
            return "knock", door.name, rng.randrange(held)
        sid = self._running()
        if not sid:
            return None
        nonce = f"{rng.getrandbits(128):032x}"
        open_it: list[Step] = [("go_on", door.name, 0), ("go_on", door.name, 0)]
        end_it: list[Step] = [("stop", sid, False), ("deliver", door.queue, 10)]
        turn = rng.random()
        self._planned.append(("knock", door.name, held))
        if turn < 0.3:
            # The end comes while the host is dialled.
            self._planned += [*end_it, *open_it]
        elif turn < 0.6:
            # The end comes before a second ticket is used; with it comes old news.
            self._planned += [*open_it, ("ticket", sid, nonce[::-1]), *end_it]
            if "echo" in self.world.faults:
                self._planned.append(("echo", "session.changed.v1", f"session.{sid}", sid, rng.randrange(3)))
            self._planned += [("deliver", door.queue, 10), ("knock", door.name, held + 1)]
        else:
            self._planned += open_it
        if "odd_ticket" in self.world.faults and rng.random() < 0.5:
            return "odd_ticket", sid, nonce, rng.choice(["number", "number", "host", "key"])
        return "ticket", sid, nonce

    def _mend(self) -> Step | None:
        """Something that is broken comes back."""
        world = self.world
        broken: list[Step] = [("start", name) for name, process in world.processes.items() if not process.alive]
        broken += [("resume", name) for name, process in world.processes.items() if process.paused]
        if world.broker.up:
            broken += [("join", n) for n, p in world.processes.items() if p.alive and not p.connected]
        else:
            broken.append(("start_broker",))
        if world.broker.blocked:
            broken.append(("block", False))
        broken += [("database", "ledger", False)] * world.ledger.away
        broken += [("database", "portal", False)] * world.requests.away
        broken += [("disk", node.host, "") for node in world.nodes.values() if node.disk.trouble]
        for node in world.nodes.values():
            broken += [
                ("card", node.host, i, True, True) for i, c in enumerate(node.cards) if not (c.there and c.bound)
            ]
        broken += [("arrive", index) for index in range(len(self.steps.late))]
        return self.rng.choice(broken) if broken else None

    # --- bad luck -------------------------------------------------------------------------------------------

    def _message(self) -> tuple[str, int, int] | None:
        broker = self.world.broker
        waiting = [(q, len(broker.pending(q))) for q in broker.queues() if q != "dead" and broker.pending(q)]
        # Commands are what matters most; heartbeats and announcements come by the dozen.
        waiting += [entry for entry in waiting if entry[0].startswith(("host.", "scheduler.commands"))] * 4
        if not waiting:
            return None
        queue, count = self.rng.choice(waiting)
        return queue, self.rng.randrange(count), count

    def _drop(self) -> Step | None:
        found = self._message()
        return ("drop", *found[:2]) if found else None

    def _duplicate(self) -> Step | None:
        found = self._message()
        return ("duplicate", *found[:2], self.rng.choice([1, 1, 2, 5])) if found else None

    def _reorder(self) -> Step | None:
        found = self._message()
        return ("reorder", *found[:2], self.rng.randrange(found[2])) if found else None

    def _delay(self) -> Step | None:
        found = self._message()
        return ("delay", *found[:2]) if found else None

    def _echo(self) -> Step | None:
        sent = self.world.evidence.sent[-80:]
        if not sent:
            return None
        message = self.rng.choice(sent)[1]
        return "echo", message.type, message.routing_key, message.correlation_id, self.rng.randrange(3)

    def _host(self) -> str:
        return self.rng.choice(list(self.world.nodes))

    def _process(self) -> str:
        return self.rng.choice(list(self.world.processes))

    def _decider(self) -> str:
        return self.rng.choice(self.world.deciders).name

    def _cut(self) -> Step:
        return "cut", self._process()

    def _kill_broker(self) -> Step:
        return ("kill_broker",)

    def _block(self) -> Step:
        return "block", True

    def _kill_agent(self) -> Step:
        return "kill", f"agent-{self._host()}"

    def _kill_agent_at(self) -> Step:
        return "kill_at", f"agent-{self._host()}", self.rng.randrange(1, 8)

    def _kill_scheduler(self) -> Step:
        return "kill", self._decider()

    def _kill_scheduler_at(self) -> Step:
        return "kill_at", self._decider(), self.rng.randrange(1, 10)

    def _kill_portal(self) -> Step:
        return ("kill", "portal") if self.rng.random() < 0.5 else ("kill_at", "portal", self.rng.randrange(1, 5))

    def _kill_proxy(self) -> Step:
        return "kill", self.rng.choice(self.world.proxies).name

    def _pause(self) -> Step:
        return "pause", self._process()

    def _pause_leader(self) -> Step | None:
        leading = [decider.name for decider in self.world.deciders if decider.leads]
        if not leading:
            return None
        self._planned += [("wait", 5.0), ("resume", leading[0]), ("flush", leading[0])]
        return "pause", leading[0]

    def _ledger_away(self) -> Step:
        return "database", "ledger", True

    def _ledger_commit(self) -> Step:
        return "fail_commit", "ledger", self.rng.choice(["before", "after"]), self.rng.choice([2, 3, 5, 5, 5])

    def _portal_store(self) -> Step:
        if self.rng.random() < 0.4:
            return "database", "portal", True
        return "fail_commit", "portal", self.rng.choice(["before", "after"]), 1

    def _disk(self) -> Step:
        return "disk", self._host(), self.rng.choice(["full", "read-only"])

    def _reboot(self) -> Step:
        return "reboot", self._host(), self.rng.random() < 0.5

    def _reinstall(self) -> Step:
        return "reinstall", self._host()

    def _reboot_moved(self) -> Step:
        return "reboot_moved", self._host(), self.rng.randrange(1, 4)

    def _device(self) -> Step:
        broker = self.world.broker
        awaited = [host for host in ("h2", "h3") if broker.pending(f"host.{host}")]
        self._planned.insert(0, ("wait", 5.0))  # until the agent has looked
        return "card", self.rng.choice(awaited or ["h2", "h3"]), self.rng.randrange(2), self.rng.random() < 0.5, False

    def _guest_dies(self) -> Step | None:
        sid = self._running()
        return ("guest_dies", sid) if sid else None

    def _upgrade_qemu(self) -> Step:
        return "upgrade_qemu", self._host()

    def _forge(self) -> Step:
        return "forge", self._host(), self._running() or self._sid(), self.rng.choice(["stop", "gone"])

    def _declare_dead(self) -> Step:
        silent = [node.host for node in self.world.nodes.values() if not node.connected or node.paused]
        if silent and self.rng.random() < 0.5:
            return "declare_dead", self.rng.choice(silent)
        # What matters is what runs there: it is given up, and must not be left when the host is back.
        busy = [node.host for node in self.world.nodes.values() if any(vm.ready for vm in node.vms.values())]
        host = self.rng.choice(busy) if busy else self._host()
        self._planned += [("wait", 20.0), ("declare_dead", host), ("join", f"agent-{host}")]
        return "cut", f"agent-{host}"

    def _drain(self) -> Step:
        return "drain", self._host(), self.rng.random() < 0.6

    def _clock(self) -> Step:
        names = [name for name in self.world.processes if name.startswith(("scheduler", "agent"))]
        shift = self.rng.choice([-3600.0, -90.0, 0.0, 90.0, 86400.0, 6e8])
        return "clock", self.rng.choice(names), shift, self.rng.random() < 0.3


class Walk:
    """One history: drawn by a seed, or repeated from a list of steps. `run` raises Violation."""

    def __init__(self, seed: int, steps: Sequence[Step] | None = None, faults: Iterable[str] | None = None) -> None:
        self.seed = seed
        self.faults = frozenset(self.drawn(seed) if faults is None else faults)
        self._rng = random.Random(seed)
        self.world = World(seed, self.faults, self._rng.choice([30, 600, 6000]))
        self.steps: list[Step] = list(steps or ())
        self._given = steps is not None

    @staticmethod
    def drawn(seed: int) -> frozenset[str]:
        """The kinds of faults that a seed draws."""
        rng = random.Random(f"faults {seed}")
        return frozenset(fault for fault in FAULTS if rng.random() < 0.3)

    def decisions(self) -> list[object]:
        """Everything that was decided, in order: what hosts were told, and every step of every session."""
        query = "SELECT sid, event, state, host, reason, detail FROM session_event ORDER BY id"
        return [*self.world.evidence.decisions, *self.world.evidence.spawns, *self.world.ledger.rows(query)]

    def run(self, count: int = STEPS) -> str:
        """Walk, let it come to rest, end everything, begin anew; the hash of the event log."""
        try:
            hands = Steps(self.world)
            if self._given:
                for step in self.steps:
                    hands.do(tuple(step))
            else:
                chooser = Chooser(self.world, hands, self._rng)
                for _ in range(count):
                    self.steps.append(chooser.next())
                    hands.do(self.steps[-1])
            self._finish()
            return self.world.evidence.log.hexdigest()
        finally:
            self.world.close()

    def _finish(self) -> None:
        world, evidence = self.world, self.world.evidence
        world.mend()
        hands = Steps(world)
        for host in world.nodes:
            hands.do(("drain", host, False))
        world.rest()
        live = [sid for sid, state in world.ledger.rows("SELECT sid, state FROM session") if state != "ended"]
        for sid in live:
            world.portal.stop(sid, evidence.requests[sid].user, False)
        # As large as a host each, so that every host must be of use again.
        probes = [f"{self.seed:031x}{number}" for number in range(len(world.nodes))]
        for probe in probes:
            hands.do(("launch", probe, "ann", "tiny", 4, 256, 0, True, 36000))
        world.rest()
        left = sorted(row for row in world.ledger.rows("SELECT sid, state FROM session") if row[1] != "ended")
        if left != [(probe, "running") for probe in probes]:
            raise Violation(f"I11: at rest there is {left}, where {probes} should run")
        hands.do(("ticket", probes[0], probes[0]))
        hands.do(("knock", world.proxies[0].name, len(hands.tickets) - 1))
        world.move()
        if not any(console.vm.sid == probes[0] for console in world.proxies[0].consoles):
            raise Violation(f"I11: {probes[0]} runs and can't be seen")
        for probe in probes:
            world.portal.stop(probe, "ann", False)
        world.rest(least_s=0.0)
        if world.proxies[0].consoles:
            raise Violation("I7: a console is open, and nothing runs")
        evidence.log.update(repr(world.ledger.rows("SELECT * FROM session_event ORDER BY id")).encode())
