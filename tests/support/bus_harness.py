"""The same tools over both buses: the in-memory twin and a private RabbitMQ."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from demo.broker import PrivateBroker

from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.bus import Bus
from deskfleet.runtime.memory_bus import MemoryBroker, MemoryBus
from deskfleet.runtime.rights import permission, user
from deskfleet.runtime.service import MainLoop, SystemClock
from deskfleet.schemas.topology import Topology

# Generous: a loaded machine with two cores may take long, and every wait ends as soon as its condition holds.
PATIENCE = 60.0
PASSWORD = "contract-test-password"


def definitions() -> dict[str, Any]:
    """alice and bob may do everything; mallory may publish to `m.events` under `host.mallory.` only and read `m.in`."""
    return {
        "users": [user(login, PASSWORD) for login in ("alice", "bob", "mallory")],
        "permissions": [
            permission("alice", ".*", ".*", ".*"),
            permission("bob", ".*", ".*", ".*"),
            permission("mallory", "^$", r"^m\.events$", r"^m\.in$"),
        ],
        "topic_permissions": [
            {
                "user": "mallory",
                "vhost": "/",
                "exchange": "m.events",
                "write": r"^host\.mallory\.",
                "read": "^$",
            }
        ],
    }


class TickingClock:
    """A clock that moves when told; `shift` is by how much its date is wrong."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.shift = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_700_000_000.0 + self.now + self.shift


class Harness(Protocol):
    """What a contract test needs from either side."""

    def bus(self, login: str = "alice", declare: Topology | None = None) -> Bus:
        """A started, connected bus."""
        ...

    def new_bus(self, login: str = "alice", declare: Topology | None = None) -> Bus:
        """A bus that was not started."""
        ...

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Let things happen until `condition` holds; AssertionError with `what` when it never does."""
        ...

    def settle(self) -> None:
        """Let happen what still wants to happen."""
        ...

    def disconnect(self, bus: Bus, login: str) -> None:
        """Break the connection of `bus`, alone of that login; it reconnects."""
        ...

    def crash(self) -> None:
        """Kill the broker."""
        ...

    def recover(self) -> None:
        """Start it again."""
        ...

    def block(self) -> None:
        """Make the broker take no more messages."""
        ...

    def unblock(self) -> None:
        """End block()."""
        ...

    def close(self) -> None:
        """Stop every bus that was made."""
        ...


class MemoryHarness:
    def __init__(self) -> None:
        self.clock = TickingClock()
        self.broker = MemoryBroker(random.Random(7), self.clock)
        self.posted: deque[Callable[[], None]] = deque()
        self._buses: list[MemoryBus] = []

    def new_bus(self, login: str = "alice", declare: Topology | None = None) -> MemoryBus:
        bus = self.broker.connect(login, self.posted.append, declare)
        self._buses.append(bus)
        return bus

    def bus(self, login: str = "alice", declare: Topology | None = None) -> MemoryBus:
        bus = self.new_bus(login, declare)
        bus.start()
        return bus

    def settle(self) -> None:
        for _ in range(20):
            self.clock.now += 0.05
            self.broker.run_ticks()
            self.broker.run()
            while self.posted:
                self.posted.popleft()()

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        for _ in range(100):
            if condition():
                return
            self.settle()
        raise AssertionError(f"never happened: {what}")

    def disconnect(self, bus: Bus, login: str) -> None:
        assert isinstance(bus, MemoryBus) and bus.login == login
        bus.disconnect()
        bus.reconnect()

    def crash(self) -> None:
        self.broker.crash()

    def recover(self) -> None:
        self.broker.recover()

    def block(self) -> None:
        self.broker.blocked = True

    def unblock(self) -> None:
        self.broker.blocked = False

    def close(self) -> None:
        for bus in self._buses:
            bus.stop()


class AmqpHarness:
    def __init__(self, broker: PrivateBroker) -> None:
        self.broker = broker
        self.loop = MainLoop(SystemClock())
        self._thread = threading.Thread(target=self.loop.run, name="handlers")
        self._thread.start()
        self._buses: list[AmqpBus] = []

    def new_bus(self, login: str = "alice", declare: Topology | None = None, **options: Any) -> AmqpBus:
        urls = options.pop("urls", None) or [self.broker.url(login, options.pop("password", PASSWORD))]
        bus = AmqpBus(
            urls,
            name=f"test {login}",
            dispatch=options.pop("dispatch", self.loop.post),
            clock=SystemClock(),
            rng=random.Random(7),
            declare=declare,
            **options,
        )
        self._buses.append(bus)
        return bus

    def bus(self, login: str = "alice", declare: Topology | None = None, **options: Any) -> AmqpBus:
        bus = self.new_bus(login, declare, **options)
        bus.start()
        self.wait(lambda: bus.connected, f"{login} connects")
        return bus

    def settle(self) -> None:
        """What must not happen gets this long to happen; a test that waits for something uses wait()."""
        time.sleep(0.4)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"never happened: {what}")
            time.sleep(0.01)

    def disconnect(self, bus: Bus, login: str) -> None:
        gone = threading.Event()
        bus.on_disconnect(gone.set)
        self.broker.ctl("close_all_user_connections", login, "test")
        assert gone.wait(PATIENCE)

    def crash(self) -> None:
        self.broker.kill()

    def recover(self) -> None:
        self.broker.start()

    def block(self) -> None:
        self.broker.ctl("set_vm_memory_high_watermark", "0.0000001")

    def unblock(self) -> None:
        self.broker.ctl("set_vm_memory_high_watermark", "0.4")

    def close(self) -> None:
        for bus in self._buses:
            bus.stop()
        self.loop.stop()
        self._thread.join()
