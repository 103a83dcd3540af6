"""What a broker holds, as plain data: exchanges, bindings, queues and the messages in them.

Only what our topology uses is modelled: direct, topic and fanout exchanges; TTL, delivery limit, length limit,
dead-letter exchange, single active consumer, exclusive and auto-delete queues. Knows no bus and runs no handler.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from deskfleet.runtime.bus import ConsumerRefused, Death, Handler, QueueMissing
from deskfleet.runtime.service import Clock
from deskfleet.schemas.topology import Queue, Topology


@dataclass(frozen=True, slots=True)
class Pending:
    """A message that waits in a queue. `expires` is on the monotonic clock, None = never.

    `deliveries` counts how often it came back unsettled or requeued, as x-delivery-count does.
    """

    exchange: str
    routing_key: str
    type: str
    body: bytes
    message_id: str
    correlation_id: str
    sender: str
    durable: bool
    deliveries: int = 0
    expires: float | None = None
    death: Death | None = None


@dataclass(eq=False)
class Consumer:
    """Somebody who wants the messages of a queue, at most `prefetch` unsettled at once. `owner` is its connection."""

    owner: object
    queue: str
    handler: Handler
    prefetch: int
    exclusive: bool
    unsettled: int = 0


@dataclass(eq=False)
class _Queue:
    spec: Queue
    owner: object | None
    messages: list[Pending] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    expiring: bool = False  # whether any message that was put in may expire

    def argument(self, name: str) -> int | None:
        value = self.spec.arguments.get(name)
        return None if value is None else int(value)


def topic_matches(pattern: str, key: str) -> bool:
    """True when a topic binding matches a routing key: `*` is one word, `#` is any number of words."""

    def match(left: list[str], right: list[str]) -> bool:
        if not left:
            return not right
        if left[0] == "#":
            return any(match(left[1:], right[i:]) for i in range(len(right) + 1))
        return bool(right) and left[0] in ("*", right[0]) and match(left[1:], right[1:])

    # An empty key has no words, as RabbitMQ sees it.
    return match(pattern.split(".") if pattern else [], key.split(".") if key else [])


class Queues:
    """All exchanges, bindings and queues of one broker."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kinds: dict[str, str] = {"": "direct"}
        self._queues: dict[str, _Queue] = {}
        # By exchange, and then by binding key: what is bound, in order.
        self._bindings: dict[str, dict[str, dict[str, None]]] = {}

    def declare(self, topology: Topology, owner: object) -> None:
        """Create what does not exist yet; `owner` is the connection that an exclusive queue dies with."""
        for exchange in topology.exchanges:
            self._kinds.setdefault(exchange.name, exchange.kind)
        for queue in topology.queues:
            self._queues.setdefault(queue.name, _Queue(queue, owner if queue.exclusive else None))
        for binding in topology.bindings:
            self._bindings.setdefault(binding.exchange, {}).setdefault(binding.key, {})[binding.queue] = None

    def names(self) -> list[str]:
        """All queues, sorted."""
        return sorted(self._queues)

    def messages(self, queue: str) -> list[Pending]:
        """The live list of what waits in a queue, after expiry. Raises QueueMissing."""
        state = self._state(queue)
        self._expire(state)
        return state.messages

    def consumers(self, queue: str) -> int:
        """How many consumers a queue has. Raises QueueMissing.

        A quorum queue with a single active consumer counts that one only, as RabbitMQ 3.10 does.
        """
        state = self._state(queue)
        quorum = state.spec.arguments.get("x-queue-type") == "quorum"
        single = state.spec.arguments.get("x-single-active-consumer") and quorum
        return min(len(state.consumers), 1) if single else len(state.consumers)

    def has_exchange(self, name: str) -> bool:
        """True for a declared exchange and for the default one."""
        return name in self._kinds

    def targets(self, exchange: str, key: str) -> list[str]:
        """The queues that a message goes to, each once, in the order of their bindings."""
        if exchange == "":
            return [key] if key in self._queues else []
        kind, bound = self._kinds.get(exchange), self._bindings.get(exchange, {})
        found: dict[str, None] = {}
        for pattern in (key,) if kind == "direct" else bound:
            if pattern in bound and _matches(kind, pattern, key):
                found.update(bound[pattern])
        return [queue for queue in found if queue in self._queues]

    def put(self, queue: str, message: Pending, ttl: float | None = None) -> bool:
        """Append a message that may wait `ttl` seconds; False when the queue is full and refuses it."""
        state = self._state(queue)
        self._expire(state)
        longest = state.argument("x-max-length")
        if longest is not None and len(state.messages) >= longest:
            if state.spec.arguments.get("x-overflow", "drop-head") != "drop-head":
                return False
            self.bury(queue, state.messages.pop(0), "maxlen")
        milliseconds = state.argument("x-message-ttl")
        lives = [life for life in (ttl, None if milliseconds is None else milliseconds / 1000) if life is not None]
        expires = self._clock.monotonic() + min(lives) if lives else None
        state.messages.append(replace(message, expires=expires))
        state.expiring = state.expiring or expires is not None
        return True

    def give_back(self, queue: str, message: Pending) -> None:
        """Put an unsettled message back at the front, or bury it when it passed the queue's delivery limit."""
        state = self._queues.get(queue)
        if state is None:
            return
        message = replace(message, deliveries=message.deliveries + 1)
        limit = state.argument("x-delivery-limit")
        if limit is not None and message.deliveries > limit:
            self.bury(queue, message, "delivery_limit")
        else:
            state.messages.insert(0, message)

    def bury(self, queue: str, message: Pending, reason: str = "rejected") -> None:
        """Send a message to the dead-letter exchange of its queue, or lose it when there is none."""
        state = self._queues.get(queue)
        exchange = None if state is None else state.spec.arguments.get("x-dead-letter-exchange")
        if state is None or exchange is None:
            return
        key = str(state.spec.arguments.get("x-dead-letter-routing-key", message.routing_key))
        death = Death(queue, reason, float(int(self._clock.wall())))
        dead = replace(message, exchange=str(exchange), routing_key=key, deliveries=0, death=death)
        for target in self.targets(str(exchange), key):
            self.put(target, dead)

    def subscribe(self, consumer: Consumer) -> None:
        """Attach a consumer. Raises QueueMissing, ConsumerRefused."""
        others = self._state(consumer.queue).consumers
        if others and (consumer.exclusive or any(other.exclusive for other in others)):
            raise ConsumerRefused(f"the queue {consumer.queue!r} already has a consumer")
        others.append(consumer)

    def next_consumer(self, queue: str) -> Consumer | None:
        """Who gets the next message: the single active one, or the next in turn that has room. Raises QueueMissing."""
        state = self._state(queue)
        single = state.spec.arguments.get("x-single-active-consumer")
        for consumer in state.consumers[:1] if single else state.consumers:
            if consumer.unsettled < consumer.prefetch:
                if not single:
                    state.consumers.remove(consumer)
                    state.consumers.append(consumer)
                return consumer
        return None

    def leave(self, owner: object) -> None:
        """A connection is gone: its consumers leave, and the queues that live and die with them are deleted."""
        for name, state in list(self._queues.items()):
            before = len(state.consumers)
            state.consumers = [c for c in state.consumers if c.owner is not owner]
            emptied = before > 0 and not state.consumers
            if state.owner is owner or (state.spec.auto_delete and emptied):
                self._delete([name])

    def power_cut(self) -> None:
        """Forget what is not durable."""
        self._delete([name for name, state in self._queues.items() if not state.spec.durable])
        for state in self._queues.values():
            state.messages = [message for message in state.messages if message.durable]

    def _state(self, queue: str) -> _Queue:
        if queue not in self._queues:
            raise QueueMissing(f"there is no queue {queue!r}")
        return self._queues[queue]

    def _expire(self, state: _Queue) -> None:
        if not state.expiring:
            return
        now = self._clock.monotonic()
        gone = [m for m in state.messages if m.expires is not None and m.expires <= now]
        if gone:
            state.messages = [m for m in state.messages if m.expires is None or m.expires > now]
            for message in gone:
                self.bury(state.spec.name, message, "expired")

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            del self._queues[name]
            for bound in self._bindings.values():
                for queues in bound.values():
                    queues.pop(name, None)


def _matches(kind: str | None, pattern: str, key: str) -> bool:
    return kind == "fanout" or (topic_matches(pattern, key) if kind == "topic" else pattern == key)
