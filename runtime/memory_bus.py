"""The bus without a broker: the same promises as `amqp`, in memory, for tests and for the cluster simulator.

Nothing happens by itself: no thread, no clock of its own, no choice that is not the caller's. Messages lie in their
queues until deliver_one(), run() or a fault moves them, and a future is resolved before publish() returns.
Permissions are the real broker's business and are not modelled.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from deskfleet.runtime.bus import (
    Blocked,
    BusDown,
    BusError,
    ConsumerRefused,
    Delivery,
    Dispatch,
    Handler,
    Listeners,
    Nacked,
    Outgoing,
    QueueDepth,
    QueueMissing,
    Settlement,
    Tick,
    Unroutable,
    run_handler,
)
from deskfleet.runtime.memory_queues import Consumer, Pending, Queues
from deskfleet.runtime.service import Clock
from deskfleet.schemas.topology import Topology

log = logging.getLogger(__name__)


class MemoryBroker:
    """A broker driven by hand. `rng` makes message ids, `clock` decides what has expired; one seed, one history."""

    def __init__(self, rng: random.Random, clock: Clock) -> None:
        self.clock = clock
        self.up = True
        self.blocked = False
        self._rng = rng
        # A portal publishes from many threads. The lock is never held while a handler runs.
        self._lock = threading.RLock()
        self._queues = Queues(clock)
        self._buses: list[MemoryBus] = []

    def connect(self, login: str, dispatch: Dispatch, declare: Topology | None = None) -> MemoryBus:
        """A bus for `login`; it connects at start() and declares `declare` each time it does."""
        bus = MemoryBus(self, login, dispatch, declare)
        self._buses.append(bus)
        return bus

    def declare(self, topology: Topology, owner: object = None) -> None:
        """Create what does not exist yet; consumers that waited for a queue get it."""
        with self._lock:
            self._queues.declare(topology, owner)
        for bus in list(self._buses):
            bus.attach()

    # Driving it.

    def queues(self) -> list[str]:
        """The names of all queues, sorted."""
        return self._queues.names()

    def pending(self, queue: str) -> tuple[Pending, ...]:
        """What waits in a queue, next to be delivered first. Raises QueueMissing."""
        with self._lock:
            return tuple(self._queues.messages(queue))

    def deliver_one(self, queue: str) -> bool:
        """Hand the first message of a queue to the consumer whose turn it is; False when either is lacking."""
        with self._lock:
            messages = self._queues.messages(queue)
            consumer = self._queues.next_consumer(queue) if messages else None
            if consumer is None:
                return False
            bus = consumer.owner
            assert isinstance(bus, MemoryBus)
            begin = bus.take(consumer, messages.pop(0))
        bus.dispatch(begin)
        return True

    def run(self, limit: int = 100_000) -> int:
        """Deliver round the queues until nothing moves; returns the number of rounds. RuntimeError beyond `limit`."""
        for rounds in range(limit):
            moved = False
            for queue in self.queues():
                with contextlib.suppress(QueueMissing):  # a handler may have deleted it
                    moved |= self.deliver_one(queue)
            if not moved:
                return rounds
        raise RuntimeError(f"messages still move after {limit} rounds; queues: {self.queues()}")

    def run_ticks(self) -> None:
        """Dispatch every tick that is due by the clock."""
        for bus in list(self._buses):
            bus.run_ticks()

    # Faults.

    def drop(self, queue: str, index: int = 0) -> Pending:
        """Lose a waiting message without a trace."""
        with self._lock:
            return self._queues.messages(queue).pop(index)

    def duplicate(self, queue: str, index: int = 0) -> None:
        """Put a second copy of a waiting message at the end of its queue."""
        with self._lock:
            messages = self._queues.messages(queue)
            messages.append(messages[index])

    def move(self, queue: str, source: int, target: int) -> None:
        """Reorder: take out the message at `source` and insert it at `target`."""
        with self._lock:
            messages = self._queues.messages(queue)
            messages.insert(target, messages.pop(source))

    def crash(self) -> None:
        """The broker dies: every bus loses its connection, and what is not durable is gone."""
        self.up = False
        for bus in list(self._buses):
            bus.disconnect()
        with self._lock:
            self._queues.power_cut()

    def recover(self) -> None:
        """The broker is back, and every started bus connects again."""
        self.up = True
        for bus in list(self._buses):
            bus.reconnect()

    # For MemoryBus.

    def accept(self, message: Outgoing, sender: str) -> BusError | None:
        """Route one published message; what its publisher is told, None when it is stored or may be lost."""
        with self._lock:
            if self.blocked:
                return Blocked("the broker takes no messages at the moment")
            if not self._queues.has_exchange(message.exchange):
                return Unroutable(f"there is no exchange {message.exchange!r}")
            targets = self._queues.targets(message.exchange, message.routing_key)
            if message.mandatory and not targets:
                return Unroutable(f"no queue takes {message.routing_key!r} from exchange {message.exchange!r}")
            pending = Pending(
                message.exchange,
                message.routing_key,
                message.type,
                message.body,
                str(uuid.UUID(int=self._rng.getrandbits(128), version=4)),
                message.correlation_id,
                sender,
                message.durable,
            )
            full = [queue for queue in targets if not self._queues.put(queue, pending, message.ttl_seconds)]
            return Nacked(f"the queue {full[0]!r} is full") if full else None

    def subscribe(self, consumer: Consumer) -> None:
        """Raises QueueMissing, ConsumerRefused."""
        with self._lock:
            self._queues.subscribe(consumer)

    def settle(self, queue: str, message: Pending, how: Settlement) -> None:
        """Forget, bury or give back one message that was handed out."""
        with self._lock:
            if how is Settlement.REJECT:
                self._queues.bury(queue, message)
            elif how is Settlement.REQUEUE:
                self._queues.give_back(queue, message)

    def leave(self, bus: MemoryBus, held: list[tuple[str, Pending]]) -> None:
        """A connection is gone: its unsettled messages go back, in their order; who was refused may try again."""
        with self._lock:
            self._queues.leave(bus)
            for queue, message in reversed(held):
                self._queues.give_back(queue, message)
        for other in list(self._buses):
            other.attach()

    def forget(self, bus: MemoryBus) -> None:
        """A bus was stopped for good; forgetting it twice is harmless."""
        self._buses = [other for other in self._buses if other is not bus]

    def depth(self, queue: str) -> QueueDepth:
        """Raises QueueMissing."""
        with self._lock:
            return QueueDepth(queue, len(self._queues.messages(queue)), self._queues.consumers(queue))


class MemoryBus(Listeners):
    """One login's connection to a MemoryBroker; made by MemoryBroker.connect()."""

    def __init__(self, broker: MemoryBroker, login: str, dispatch: Dispatch, declare: Topology | None) -> None:
        super().__init__(dispatch)
        self.login = login
        self._broker = broker
        self._declare = declare
        self._started = False
        self._connected = False
        self._wanted: list[Consumer] = []
        self._attached: list[Consumer] = []
        self._refused: set[Consumer] = set()
        self._held: dict[int, tuple[Consumer, Pending]] = {}
        self._tags = itertools.count(1)
        self._ticks: list[Tick] = []

    @property
    def connected(self) -> bool:
        """True while messages can be published."""
        return self._connected

    def publish(self, message: Outgoing) -> Future[None]:
        """See Bus.publish; the future is resolved already."""
        error = self._broker.accept(message, self.login) if self._connected else BusDown("not connected")
        future: Future[None] = Future()
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
        return future

    def consume(self, queue: str, handler: Handler, prefetch: int = 100, exclusive: bool = False) -> None:
        """See Bus.consume."""
        self._wanted.append(Consumer(self, queue, handler, prefetch, exclusive))
        self.attach()

    def every(self, seconds: float, tick: Callable[[], None]) -> None:
        """See Bus.every; MemoryBroker.run_ticks() is what makes it tick."""
        self._ticks.append(Tick(seconds, tick, self._broker.clock.monotonic() + seconds))

    def depth(self, queue: str) -> Future[QueueDepth]:
        """See Bus.depth; the future is resolved already."""
        future: Future[QueueDepth] = Future()
        try:
            if not self._connected:
                raise BusDown("not connected")
            future.set_result(self._broker.depth(queue))
        except BusError as error:
            future.set_exception(error)
        return future

    def start(self) -> None:
        """Connect when the broker is up, else when it recovers."""
        self._started = True
        self.reconnect()

    def stop(self, timeout: float = 5.0) -> None:  # noqa: ARG002 - the contract's signature
        """See Bus.stop. There is nothing to wait for: handlers that were not begun are not run any more."""
        self._on_disconnect.clear()
        self.disconnect()
        self._started = False
        self._ticks.clear()
        self._broker.forget(self)

    # Faults.

    def disconnect(self) -> None:
        """Lose the connection: unsettled messages go back to their queues; no reconnect by itself."""
        if not self._connected:
            return
        self._connected = False
        held, self._held, self._attached = self._held, {}, []
        self._broker.leave(self, [(consumer.queue, message) for consumer, message in held.values()])
        self.announce(connected=False)

    def reconnect(self) -> None:
        """Connect again after disconnect(), when started and the broker is up."""
        if not self._started or self._connected or not self._broker.up:
            return
        self._connected = True
        if self._declare is not None:
            self._broker.declare(self._declare, self)
        self.attach()
        self.announce(connected=True)

    # For MemoryBroker.

    def attach(self) -> None:
        """Subscribe what is not subscribed yet."""
        for consumer in [c for c in self._wanted if self._connected and c not in self._attached]:
            try:
                consumer.unsettled = 0
                self._broker.subscribe(consumer)
                self._attached.append(consumer)
                self._refused.discard(consumer)
            except QueueMissing as error:
                log.info("%s consumes nothing yet: %s", self.login, error)
            except ConsumerRefused as error:
                if consumer not in self._refused:
                    self._refused.add(consumer)
                    self.fatal(error)

    def take(self, consumer: Consumer, message: Pending) -> Callable[[], None]:
        """Hand out one message; returns the action that runs its handler."""
        tag = next(self._tags)
        self._held[tag] = (consumer, message)
        consumer.unsettled += 1
        delivery = Delivery(
            consumer.queue,
            message.exchange,
            message.routing_key,
            message.type,
            message.body,
            message.message_id,
            message.correlation_id,
            message.sender,
            message.deliveries > 0,
            partial(self._settle, tag),
            death=message.death,
        )
        return partial(self._begin, tag, consumer.handler, delivery)

    def run_ticks(self) -> None:
        """Dispatch the ticks that are due and not running."""
        now = self._broker.clock.monotonic()
        for tick in self._ticks:
            if tick.due <= now:
                tick.due = now + tick.seconds
                tick.begin(self.dispatch)

    def _begin(self, tag: int, handler: Handler, delivery: Delivery) -> None:
        # The connection went before the handler began: the message is somebody else's by now.
        if tag in self._held:
            run_handler(handler, delivery)

    def _settle(self, tag: int, how: Settlement) -> None:
        if tag not in self._held:
            log.info("stale %s ignored: the connection it belongs to is gone", how)
            return
        consumer, message = self._held.pop(tag)
        consumer.unsettled -= 1
        self._broker.settle(consumer.queue, message, how)
