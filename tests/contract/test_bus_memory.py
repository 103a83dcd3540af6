"""What the in-memory broker adds to the bus for the simulator: steps, faults, and one history for one seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.bus_harness import TickingClock

from deskfleet.runtime.bus import BusDown, Delivery, Outgoing, QueueMissing
from deskfleet.runtime.memory_bus import MemoryBroker, MemoryBus
from deskfleet.runtime.memory_queues import topic_matches
from deskfleet.schemas.topology import Binding, Exchange, Queue, Topology

TOPOLOGY = Topology(
    (Exchange("x", "direct"), Exchange("dead", "fanout")),
    (
        Queue("q", {"x-queue-type": "quorum", "x-message-ttl": 60_000, "x-dead-letter-exchange": "dead"}),
        Queue("graves", {"x-queue-type": "quorum"}),
    ),
    (Binding("q", "x", "k"), Binding("graves", "dead", "")),
)


def setup(seed: int = 1) -> tuple[MemoryBroker, MemoryBus, TickingClock]:
    clock = TickingClock()
    broker = MemoryBroker(random.Random(seed), clock)
    bus = broker.connect("scheduler", lambda action: action(), TOPOLOGY)
    bus.start()
    return broker, bus, clock


def send(bus: MemoryBus, *bodies: bytes) -> None:
    for body in bodies:
        bus.publish(Outgoing("x", "k", "thing.v1", body)).result(0)


def bodies(broker: MemoryBroker, queue: str = "q") -> list[bytes]:
    return [m.body for m in broker.pending(queue)]


def test_nothing_moves_until_it_is_told_to() -> None:
    broker, bus, _ = setup()
    got: list[Delivery] = []
    bus.consume("q", got.append)
    send(bus, b"1", b"2")
    assert got == [] and bodies(broker) == [b"1", b"2"]
    assert broker.deliver_one("q")
    assert [d.body for d in got] == [b"1"] and bodies(broker) == [b"2"]
    assert broker.run() == 1
    assert not broker.deliver_one("q")
    with pytest.raises(QueueMissing):
        broker.deliver_one("nowhere")


def test_messages_can_be_dropped_duplicated_and_reordered() -> None:
    broker, bus, _ = setup()
    send(bus, b"1", b"2", b"3")
    assert broker.drop("q", 0).body == b"1"
    broker.duplicate("q", 0)
    assert bodies(broker) == [b"2", b"3", b"2"]
    assert broker.pending("q")[0].message_id == broker.pending("q")[2].message_id
    broker.move("q", 1, 0)
    assert bodies(broker) == [b"3", b"2", b"2"]


def test_a_disconnected_bus_gives_back_in_order_and_stays_away() -> None:
    broker, bus, _ = setup()
    got: list[Delivery] = []
    bus.consume("q", got.append)
    send(bus, b"1", b"2", b"3")
    broker.deliver_one("q")
    broker.deliver_one("q")
    bus.disconnect()
    assert bodies(broker) == [b"1", b"2", b"3"] and [m.deliveries for m in broker.pending("q")] == [1, 1, 0]
    assert not broker.deliver_one("q")
    assert isinstance(bus.publish(Outgoing("x", "k", "thing.v1", b"")).exception(0), BusDown)
    bus.reconnect()
    broker.run()
    assert [(d.body, d.redelivered) for d in got[2:]] == [(b"1", True), (b"2", True), (b"3", False)]


def test_a_handler_that_had_not_begun_when_the_connection_went_is_not_run() -> None:
    clock = TickingClock()
    broker = MemoryBroker(random.Random(1), clock)
    posted: list[Callable[[], None]] = []
    bus = broker.connect("agent", posted.append, TOPOLOGY)
    bus.start()
    got: list[Delivery] = []
    bus.consume("q", got.append)
    send(bus, b"1")
    broker.run()
    bus.disconnect()
    for action in posted:
        action()
    assert got == [] and bodies(broker) == [b"1"]


def test_time_is_the_given_clock_alone() -> None:
    broker, bus, clock = setup()
    ticks: list[float] = []
    bus.every(5.0, lambda: ticks.append(clock.now))
    send(bus, b"1")
    clock.now += 4.9
    broker.run_ticks()
    assert ticks == []
    clock.now += 0.1
    broker.run_ticks()
    broker.run_ticks()
    assert ticks == [clock.now]
    clock.now += 100
    assert bodies(broker) == [] and bodies(broker, "graves") == [b"1"]


def test_a_crash_loses_what_is_not_durable() -> None:
    broker, bus, _ = setup()
    send(bus, b"kept")
    bus.publish(Outgoing("x", "k", "thing.v1", b"lost", durable=False)).result(0)
    broker.crash()
    assert not bus.connected and bodies(broker) == [b"kept"]
    broker.recover()
    assert bus.connected


@pytest.mark.parametrize("seed", range(20))
def test_one_seed_gives_one_history(seed: int) -> None:
    history = _history(seed)
    assert history == _history(seed) and len(history) > 10


def _history(seed: int) -> list[tuple[str, bytes, bool]]:
    rng = random.Random(seed)
    broker, bus, clock = setup(seed)
    seen: list[tuple[str, bytes, bool]] = []

    def handler(delivery: Delivery) -> None:
        seen.append((delivery.message_id, delivery.body, delivery.redelivered))
        match rng.randrange(4):
            case 0:
                delivery.ack()
            case 1:
                delivery.requeue()
            case 2:
                delivery.reject()

    bus.consume("q", handler, prefetch=3)
    for _ in range(300):
        match rng.randrange(5):
            case 0:
                send(bus, rng.randbytes(2))
            case 1:
                broker.deliver_one("q")
            case 2 if broker.pending("q"):
                broker.duplicate("q")
            case 3:
                bus.disconnect()
                bus.reconnect()
            case 4:
                clock.now += 10
    return seen


@given(st.lists(st.sampled_from(["send", "deliver", "ack", "requeue", "cut"]), max_size=60))
def test_a_durable_message_is_never_lost_and_never_in_two_places(steps: list[str]) -> None:
    broker, bus, _ = setup()
    held: list[Delivery] = []
    bus.consume("q", held.append, prefetch=2)
    sent, acked = 0, 0
    for step in steps:
        if step == "send":
            send(bus, str(sent).encode())
            sent += 1
        elif step == "deliver":
            broker.deliver_one("q")
        elif step == "cut":
            bus.disconnect()
            bus.reconnect()
            held.clear()
        elif held:
            delivery = held.pop(0)
            delivery.ack() if step == "ack" else delivery.requeue()
            acked += step == "ack"
        places = bodies(broker) + [d.body for d in held]
        assert len(held) <= 2
        assert len(places) == len(set(places)) == sent - acked


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("#", "", True),
        ("#", "a.b.c", True),
        ("", "", True),
        ("*", "", False),
        ("*", "a", True),
        ("*", "a.b", False),
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.c", False),
        ("a.#.c", "a.c", True),
        ("a.#.c", "a.b.b.c", True),
        ("a.#", "a", True),
        ("a.#", "b", False),
        ("host.*.vm", "host.a.b.vm", False),
    ],
)
def test_topic_patterns(pattern: str, key: str, matches: bool) -> None:
    assert topic_matches(pattern, key) is matches
