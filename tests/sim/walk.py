"""Seeded random walks through the cluster: what people, time and bad luck do to it.

python tests/sim/walk.py --seeds 10000 --first 0 [--steps 400]
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sim.world import Crash, Node, Violation, World

from deskfleet.schemas.session import State

FAULTS = (
    "drop",
    "duplicate",
    "reorder",
    "cut",
    "kill_agent",
    "kill_agent_at_write",
    "kill_scheduler",
    "kill_scheduler_at_publish",
    "kill_broker",
    "reboot",
    "start_fails",
    "journal_lost",
    "clock",
    "slow",
)


class Walk:
    """One history. Raises Violation when an invariant breaks."""

    def __init__(self, seed: int, steps: int = 250) -> None:
        rng = random.Random(seed)
        # Swarm: each walk has some kinds of faults only, so that rare pairs meet undisturbed.
        on = frozenset(fault for fault in FAULTS if rng.random() < 0.35)
        self.world = World(seed, on)
        self.count = steps

    def run(self) -> str:
        """Walk, let it come to rest, check, end everything, check again; the hash of the history."""
        world = self.world
        for _ in range(self.count):
            self.step()
            world.check()
        world.settle(120)
        world.check_at_rest()
        world.stop_everything()
        world.settle(60)
        world.check_at_rest()
        if world.live():
            raise Violation(f"I1: {[s.sid for s in world.live()]} do not end")
        world.log.update(repr(world.spawns).encode())
        return world.log.hexdigest()

    def step(self) -> None:
        """One random thing happens."""
        world, rng = self.world, self.world.rng
        usual = [self.deliver] * 8 + [self.work] * 5 + [self.flush] * 3 + [self.pass_time] * 3
        usual += [self.launch] * 2 + [self.stop, self.power_off]
        unusual = [(fault, getattr(self, fault)) for fault in FAULTS if fault in world.faults and hasattr(self, fault)]
        if unusual and rng.random() < 0.12:
            name, action = rng.choice(unusual)
        else:
            action = rng.choice(usual)
            name = action.__name__
        world.note(f"{name} {action() or ''}")

    # --- what goes on anyway --------------------------------------------------------------------------------

    def deliver(self) -> str:
        waiting = [q for q in self.world.broker.queues() if self.world.broker.pending(q)]
        if not waiting:
            return ""
        queue = self.world.rng.choice(waiting)
        self.world.broker.deliver_one(queue)
        return queue

    def work(self) -> str:
        busy = [node for node in self.world.nodes.values() if node.todo and node.bus]
        if busy:
            node = self.world.rng.choice(busy)
            node.todo.pop(self.world.rng.randrange(len(node.todo)) if "slow" in self.world.faults else 0)()
            return node.name
        return ""

    def flush(self) -> None:
        self.world.flush()

    def pass_time(self) -> None:
        self.world.clock.now += self.world.rng.choice([0.1, 1.0, 3.0, 12.0])
        self.world.broker.run_ticks()
        if self.world.rng.random() < 0.2:
            self.world.portal_sweep()
        for node in self.world.nodes.values():
            if node.bus is None and self.world.rng.random() < 0.5:
                node.start()
        if self.world.scheduler is None and self.world.rng.random() < 0.5:
            self.world.start_scheduler()
        if not self.world.broker.up:
            self.world.broker.recover()

    def launch(self) -> str:
        request = self.world.random_request()
        self.world.ask(request)
        if self.world.rng.random() < 0.3:
            self.world.ask(request)  # a double click
        return request.sid

    def stop(self) -> str:
        if self.world.asked:
            sid = self.world.rng.choice(list(self.world.asked))
            self.world.ask_stop(sid)
            return sid
        return ""

    def power_off(self) -> str:
        node = self.world.rng.choice(list(self.world.nodes.values()))
        ready = [vm.sid for vm in node.vms.values() if vm.ready and not vm.going_down]
        if ready and self.world.rng.random() < 0.3:
            node.power_off(ready[0])
            return ready[0]
        return ""

    # --- bad luck -------------------------------------------------------------------------------------------

    def _message(self) -> tuple[str, int] | None:
        waiting = [q for q in self.world.broker.queues() if q != "dead" and self.world.broker.pending(q)]
        if not waiting:
            return None
        queue = self.world.rng.choice(waiting)
        return queue, self.world.rng.randrange(len(self.world.broker.pending(queue)))

    def drop(self) -> str:
        found = self._message()
        if found:
            self.world.broker.drop(*found)
        return str(found)

    def duplicate(self) -> str:
        found = self._message()
        if found:
            self.world.broker.duplicate(*found)
        return str(found)

    def reorder(self) -> str:
        found = self._message()
        if found:
            count = len(self.world.broker.pending(found[0]))
            self.world.broker.move(found[0], found[1], self.world.rng.randrange(count))
        return str(found)

    def _node(self) -> Node:
        return self.world.rng.choice(list(self.world.nodes.values()))

    def cut(self) -> str:
        node = self._node()
        if node.bus:
            if node.bus.connected:
                node.bus.disconnect()
            else:
                node.bus.reconnect()
        return node.name

    def kill_agent(self) -> str:
        node = self._node()
        node.kill()
        return node.name

    def kill_agent_at_write(self) -> str:
        node = self._node()
        if node.bus is None:
            return ""
        node.disk.die = self.world.rng.choice(["before", "after"])
        try:
            self.world.broker.deliver_one(f"host.{node.name}")
            while node.todo and node.disk.die:
                node.todo.pop(0)()
        except Crash:
            node.kill()
        node.disk.die = ""
        return node.name

    def kill_scheduler(self) -> None:
        self.world.kill_scheduler()

    def kill_scheduler_at_publish(self) -> None:
        world = self.world
        if world.scheduler is None:
            return
        world.scheduler_bus.die_at = world.rng.choice([1, 1, 2, 3])
        try:
            for queue in ("scheduler.commands", "scheduler.reports", "scheduler.heartbeats"):
                world.broker.deliver_one(queue)
            world.flush()
            world.scheduler.sweep()
        except Crash:
            world.kill_scheduler()
        world.scheduler_bus.die_at = 0

    def kill_broker(self) -> None:
        self.world.broker.crash()

    def reboot(self) -> str:
        node = self._node()
        node.reboot()
        return node.name

    def journal_lost(self) -> str:
        """A host is installed anew: no guests, no journal."""
        node = self._node()
        known = {s.sid for s in self.world.sessions() if s.state in (State.RUNNING, State.STOPPING, State.ENDED)}
        # What ran there and was never reported is beyond anybody's knowledge, and its machine is gone.
        for sid, host in list(self.world.readied.items()):
            if host == node.name and sid not in known:
                del self.world.readied[sid]
        node.reboot()
        node.disk.entries.clear()
        node.disk.generation = None
        node.files.clear()
        return node.name

    def clock(self) -> None:
        self.world.clock.shift = self.world.rng.choice([-3600.0, 0.0, 86400.0, 6e8])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    started, bad = time.monotonic(), 0
    for seed in range(options.first, options.first + options.seeds):
        walk = Walk(seed, options.steps)
        try:
            walk.run()
        except (Violation, Exception) as error:
            bad += 1
            print(f"seed {seed}: {type(error).__name__}: {error}  (faults: {', '.join(sorted(walk.world.faults))})")
            if options.seeds == 1:
                print("\n".join(walk.world.steps))
                raise
    print(f"{options.seeds} seeds, {bad} bad, {time.monotonic() - started:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
