"""What every simulated process has: clocks of its own, a connection on which the world listens in, and points at which
it can die. Time only passes when the world says so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Protocol

from deskfleet.runtime.bus import Delivery, Handler, Outgoing, Settlement
from deskfleet.runtime.memory_bus import MemoryBroker, MemoryBus
from deskfleet.schemas.topology import Topology


class Violation(BaseException):
    """Raised when an invariant does not hold; the message begins with its number. Not an Exception: the product, in
    the midst of which it may be raised, must not log it away."""


class Crash(BaseException):
    """A process dies here. Not an Exception, so nothing in the product can catch it."""

    def __init__(self, process: Process) -> None:
        super().__init__(process.name)
        self.process = process


class Time:
    """The time that really passes, in seconds; no process can see it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1.7e9 + self.now


class Clock:
    """The clocks of one machine. `started` is when its boot-time clock stood at 0; the date can be off by `shift`
    seconds, and with `unsteady` it is set to something else each second."""

    def __init__(self, time: Time, started: float = 0.0) -> None:
        self._time = time
        self.started = started
        self.shift = 0.0
        self.unsteady = False

    def monotonic(self) -> float:
        return self._time.now - self.started

    def wall(self) -> float:
        wobble = int(self._time.now) * 7919 % 61 - 30 if self.unsteady else 0
        return self._time.wall() + self.shift + wobble

    def mend(self) -> None:
        """The date is right again."""
        self.shift, self.unsteady = 0.0, False


class Listener(Protocol):
    """Who hears what goes over the wires."""

    def published(self, process: Process, message: Outgoing) -> None: ...

    def delivered(self, process: Process, delivery: Delivery) -> None: ...

    def settled(self, process: Process, delivery: Delivery, how: Settlement) -> None: ...


class Wire:
    """A process's bus: the world listens in, and the process can die before each message and each acknowledgement."""

    def __init__(self, process: Process, bus: MemoryBus, listener: Listener) -> None:
        self._process = process
        self._bus = bus
        self._listener = listener

    @property
    def connected(self) -> bool:
        return self._bus.connected

    def publish(self, message: Outgoing) -> object:
        self._process.point()
        self._listener.published(self._process, message)
        return self._bus.publish(message)

    def consume(self, queue: str, handler: Handler, prefetch: int = 100, exclusive: bool = False) -> None:
        self._bus.consume(queue, partial(self._deliver, handler), prefetch, exclusive)

    def _deliver(self, handler: Handler, delivery: Delivery) -> None:
        delivery.settle = partial(self._settle, delivery, delivery.settle)
        self._listener.delivered(self._process, delivery)
        handler(delivery)

    def _settle(self, delivery: Delivery, settle: Callable[[Settlement], None], how: Settlement) -> None:
        self._process.point()
        self._listener.settled(self._process, delivery, how)
        settle(how)

    def __getattr__(self, name: str) -> object:
        return getattr(self._bus, name)


class Process(ABC):
    """A process: it can be started, killed at once or at its nth point, and paused. Subclasses fill in `run`."""

    def __init__(self, name: str, login: str, broker: MemoryBroker, clock: Clock, listener: Listener) -> None:
        self.name = name
        self.login = login
        self.clock = clock
        self.alive = False
        self.paused_at: float | None = None
        self.lives = 0
        #: How many points it passes before it dies; 0 is never.
        self.fuse = 0
        self._broker = broker
        self._listener = listener
        self._inbox: list[Callable[[], None]] = []
        self._bus: MemoryBus | None = None

    def start(self) -> None:
        """Start it, unless it lives."""
        if not self.alive:
            self.alive = True
            self.lives += 1
            self.run()

    @abstractmethod
    def run(self) -> None:
        """What it does when it starts."""

    def connect(self, declare: Topology | None = None) -> Wire:
        """Its connection, not yet started."""
        self._bus = self._broker.connect(self.login, self._dispatch, declare)
        return Wire(self, self._bus, self._listener)

    def _dispatch(self, action: Callable[[], None]) -> None:
        if self.paused:
            self._inbox.append(action)
        else:
            action()

    def do(self, action: Callable[[], None]) -> None:
        """Something happens to it, as soon as it runs; a dead one never hears of it."""
        if self.alive:
            self._dispatch(action)

    def point(self) -> None:
        """A point at which it may die."""
        if self.fuse:
            self.fuse -= 1
            if not self.fuse:
                raise Crash(self)

    def kill(self) -> None:
        """kill -9: what it held on the broker goes back."""
        self.alive, self.paused_at = False, None
        self.fuse = 0
        self._inbox.clear()
        if self._bus:
            self._bus.stop()
            self._bus = None

    @property
    def paused(self) -> bool:
        return self.paused_at is not None

    def pause(self, now: float) -> None:
        """SIGSTOP."""
        if self.alive and not self.paused:
            self.paused_at = now

    def resume(self) -> None:
        """It was paused, and goes on with what has piled up."""
        self.paused_at = None
        todo, self._inbox[:] = list(self._inbox), []
        for action in todo:
            action()

    def tick(self) -> None:
        """Its timers."""
        if self._bus and not self.paused:
            self._bus.run_ticks()

    @property
    def connected(self) -> bool:
        return self._bus is not None and self._bus.connected

    def disconnect(self) -> None:
        """The network is cut."""
        if self._bus:
            self._bus.disconnect()

    def reconnect(self) -> None:
        """The network is back."""
        if self._bus:
            self._bus.reconnect()
