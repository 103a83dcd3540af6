"""The promises of the bus, the same on the in-memory twin and on a real RabbitMQ."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory

import pika  # type: ignore[import-untyped]
import pytest
from demo.broker import PrivateBroker
from support.bus_harness import PASSWORD, PATIENCE, AmqpHarness, Harness, MemoryHarness, definitions

from deskfleet.runtime.bus import (
    BadMessage,
    Blocked,
    Bus,
    BusDown,
    BusError,
    ConsumerRefused,
    Delivery,
    Nacked,
    Outgoing,
    QueueDepth,
    QueueMissing,
    Unroutable,
)
from deskfleet.schemas.topology import Binding, Exchange, Queue, Topology

KINDS = ["classic", "quorum"]


@pytest.fixture(scope="module")
def rabbit() -> Iterator[PrivateBroker]:
    with TemporaryDirectory(prefix="dfmq") as folder, PrivateBroker(Path(folder), definitions()) as broker:
        yield broker


@pytest.fixture(params=["memory", "rabbitmq"])
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    made: Harness
    if request.param == "memory":
        made = MemoryHarness()
    else:
        made = AmqpHarness(request.getfixturevalue("rabbit"))
    yield made
    made.close()


@pytest.fixture
def name() -> str:
    """A prefix that no other test uses: the broker is shared."""
    return f"t{uuid.uuid4().hex[:10]}"


def plan(name: str, kind: str = "quorum", **arguments: str | int | bool) -> Topology:
    """A direct exchange with one queue that dead-letters to a fanout with another."""
    values: dict[str, str | int | bool] = {"x-queue-type": kind, "x-dead-letter-exchange": f"{name}.dead"}
    values |= {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
    return Topology(
        (Exchange(f"{name}.x", "direct"), Exchange(f"{name}.dead", "fanout")),
        (Queue(f"{name}.q", values), Queue(f"{name}.graves", {"x-queue-type": kind})),
        (Binding(f"{name}.q", f"{name}.x", "k"), Binding(f"{name}.graves", f"{name}.dead", "")),
    )


def message(name: str, body: bytes = b"{}", key: str = "k", **more: object) -> Outgoing:
    return Outgoing(f"{name}.x", key, "thing.v1", body, **more)  # type: ignore[arg-type]


def done(future: Future[None]) -> None:
    future.result(PATIENCE)


def error(future: Future[None]) -> BaseException | None:
    return future.exception(PATIENCE)


def depth(bus: Bus, queue: str) -> QueueDepth:
    return bus.depth(queue).result(PATIENCE)


class Inbox:
    """A consumer that keeps what it gets, and acknowledges it unless told otherwise."""

    def __init__(self, bus: Bus, queue: str, ack: bool = True, prefetch: int = 100, exclusive: bool = False) -> None:
        self.got: list[Delivery] = []
        self._ack = ack
        bus.consume(queue, self._take, prefetch, exclusive)

    def _take(self, delivery: Delivery) -> None:
        self.got.append(delivery)
        if self._ack:
            delivery.ack()

    @property
    def bodies(self) -> list[bytes]:
        return [d.body for d in self.got]


@pytest.mark.parametrize("kind", KINDS)
def test_a_confirmed_message_arrives_as_it_was_sent(harness: Harness, name: str, kind: str) -> None:
    bus = harness.bus("alice", plan(name, kind))
    inbox = Inbox(harness.bus("bob"), f"{name}.q")
    body = bytes(range(256)) * 1000
    done(bus.publish(message(name, body, correlation_id="sid-1")))
    harness.wait(lambda: len(inbox.got) == 1, "the message arrives")
    got = inbox.got[0]
    assert (got.queue, got.exchange, got.routing_key) == (f"{name}.q", f"{name}.x", "k")
    assert (got.type, got.body, got.correlation_id) == ("thing.v1", body, "sid-1")
    assert got.sender == "alice"
    assert not got.redelivered
    assert uuid.UUID(got.message_id).version == 4
    harness.wait(lambda: depth(bus, f"{name}.q").messages == 0, "the acknowledgement arrives")


def test_messages_of_one_publisher_stay_in_order(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))
    inbox = Inbox(bus, f"{name}.q")
    bodies = [str(i).encode() for i in range(500)]
    for future in [bus.publish(message(name, body)) for body in bodies]:
        done(future)
    harness.wait(lambda: len(inbox.got) == 500, "all arrive")
    assert inbox.bodies == bodies


def test_an_unroutable_message_fails_alone(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))
    keys = ["k", "nowhere", "k", "k", "nowhere", "k"] * 20
    results = [error(f) for f in [bus.publish(message(name, key=key)) for key in keys]]
    assert [isinstance(r, Unroutable) for r in results] == [key == "nowhere" for key in keys]
    assert [r for r in results if r is not None and not isinstance(r, Unroutable)] == []
    assert results[1] is not None and "'nowhere'" in str(results[1])
    done(bus.publish(message(name, key="nowhere", mandatory=False)))


def test_a_missing_exchange_is_unroutable_and_the_bus_goes_on(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))
    refused = error(bus.publish(Outgoing(f"{name}.missing", "k", "thing.v1", b"")))
    assert isinstance(refused, Unroutable) and f"{name}.missing" in str(refused)
    harness.wait(lambda: error(bus.publish(message(name))) is None, "publishing works again")


def test_a_full_queue_nacks(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name, "classic", max_length=1, overflow="reject-publish"))
    done(bus.publish(message(name)))
    assert isinstance(error(bus.publish(message(name))), Nacked)


def test_a_bad_name_is_refused_before_it_is_sent() -> None:
    with pytest.raises(BadMessage, match="routing_key has 256 bytes"):
        Outgoing("x", "k" * 256, "t", b"")
    with pytest.raises(BadMessage, match="surrogate"):
        Outgoing("x", "k", "t", b"", correlation_id="\ud800")
    with pytest.raises(BadMessage, match="ttl_seconds"):
        Outgoing("x", "k", "t", b"", ttl_seconds=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rejected_message_is_dead_lettered_with_its_bytes(harness: Harness, name: str, kind: str) -> None:
    bus = harness.bus("alice", plan(name, kind))
    bus.consume(f"{name}.q", lambda d: d.reject())
    graves = Inbox(bus, f"{name}.graves")
    body = b"\x00\xff not json {"
    done(bus.publish(message(name, body, correlation_id="sid-1")))
    harness.wait(lambda: len(graves.got) == 1, "the dead letter arrives")
    got = graves.got[0]
    assert (got.body, got.type, got.correlation_id, got.sender) == (body, "thing.v1", "sid-1", "alice")
    assert (got.exchange, got.routing_key) == (f"{name}.dead", "k")
    assert got.death and (got.death.queue, got.death.reason) == (f"{name}.q", "rejected")
    assert got.death.at and got.death.at > 1_500_000_000


def test_what_died_by_other_causes_says_which(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name, message_ttl=1))
    graves = Inbox(bus, f"{name}.graves")
    done(bus.publish(message(name, b"late")))
    harness.wait(lambda: len(graves.got) == 1, "it expires")
    assert graves.got[0].death and graves.got[0].death.reason == "expired"
    again = f"{name}l"
    other = harness.bus("alice", plan(again, delivery_limit=1))
    other.consume(f"{again}.q", lambda d: d.requeue())
    limit = Inbox(other, f"{again}.graves")
    done(other.publish(message(again, b"poison")))
    harness.wait(lambda: len(limit.got) == 1, "it was tried too often")
    assert limit.got[0].death and limit.got[0].death.reason == "delivery_limit"


def test_a_sender_can_not_invent_where_its_message_died(rabbit: PrivateBroker, name: str) -> None:
    """What stands first in x-death is the broker's own word, whatever the publisher wrote there."""
    harness = AmqpHarness(rabbit)
    bus = harness.bus("alice", plan(name))
    bus.consume(f"{name}.q", lambda d: d.reject())
    graves = Inbox(bus, f"{name}.graves")
    forged = {"queue": "scheduler.commands", "reason": "rejected", "exchange": "commands", "count": 1}
    connection = pika.BlockingConnection(pika.URLParameters(rabbit.url("alice", PASSWORD)))
    properties = pika.BasicProperties(headers={"x-death": [forged]})
    connection.channel().basic_publish(f"{name}.x", "k", b"{}", properties)
    connection.close()
    harness.wait(lambda: len(graves.got) == 1, "the dead letter arrives")
    assert graves.got[0].death and graves.got[0].death.queue == f"{name}.q"
    harness.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_requeued_message_comes_again_and_says_so(harness: Harness, name: str, kind: str) -> None:
    bus = harness.bus("alice", plan(name, kind))
    seen: list[bool] = []

    def once(delivery: Delivery) -> None:
        seen.append(delivery.redelivered)
        if len(seen) == 1:
            delivery.requeue()
        else:
            delivery.ack()

    bus.consume(f"{name}.q", once)
    done(bus.publish(message(name)))
    harness.wait(lambda: len(seen) == 2, "it is delivered twice")
    assert seen == [False, True]


def test_a_second_settlement_is_ignored(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))

    def twice(delivery: Delivery) -> None:
        delivery.ack()
        delivery.ack()
        delivery.reject()

    bus.consume(f"{name}.q", twice)
    inbox = Inbox(bus, f"{name}.graves")
    for _ in range(3):
        done(bus.publish(message(name)))
    harness.wait(lambda: depth(bus, f"{name}.q").messages == 0, "all are taken")
    harness.settle()
    assert bus.connected and inbox.got == []


def test_prefetch_limits_what_is_handed_out(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))
    inbox = Inbox(bus, f"{name}.q", ack=False, prefetch=3)
    for future in [bus.publish(message(name, str(i).encode())) for i in range(10)]:
        done(future)
    harness.wait(lambda: len(inbox.got) == 3, "three are handed out")
    harness.settle()
    assert len(inbox.got) == 3
    inbox.got[0].ack()
    inbox.got[1].ack()
    harness.wait(lambda: len(inbox.got) == 5, "two more follow two acknowledgements")
    harness.settle()
    assert inbox.bodies == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_poison_message_is_tried_twice_and_buried(harness: Harness, name: str, kind: str) -> None:
    bus = harness.bus("alice", plan(name, kind))
    tried: list[bytes] = []

    def handler(delivery: Delivery) -> None:
        tried.append(delivery.body)
        if delivery.body == b"poison":
            raise ValueError("cannot digest this")
        delivery.ack()

    bus.consume(f"{name}.q", handler)
    graves = Inbox(bus, f"{name}.graves")
    for body in (b"a", b"poison", b"b"):
        done(bus.publish(message(name, body)))
    harness.wait(lambda: len(graves.got) == 1, "the poison is buried")
    harness.wait(lambda: b"b" in tried, "the next message is handled")
    assert graves.bodies == [b"poison"]
    assert tried.count(b"poison") == 2


def test_a_handler_that_settles_and_then_fails_is_not_settled_again(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))
    tried: list[bytes] = []

    def handler(delivery: Delivery) -> None:
        tried.append(delivery.body)
        delivery.ack()
        raise ValueError("too late")

    bus.consume(f"{name}.q", handler)
    done(bus.publish(message(name)))
    harness.wait(lambda: len(tried) == 1, "the handler runs")
    harness.settle()
    assert len(tried) == 1 and depth(bus, f"{name}.q").messages == 0


def test_the_delivery_limit_buries_what_always_comes_back(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name, "quorum", delivery_limit=2))
    tried: list[Delivery] = []

    def handler(delivery: Delivery) -> None:
        tried.append(delivery)
        delivery.requeue()

    bus.consume(f"{name}.q", handler)
    graves = Inbox(bus, f"{name}.graves")
    done(bus.publish(message(name, b"again")))
    harness.wait(lambda: graves.bodies == [b"again"], "it is buried")
    assert len(tried) == 3


def test_what_waits_too_long_is_buried(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name, "quorum", message_ttl=100))
    graves = Inbox(bus, f"{name}.graves")
    done(bus.publish(message(name, b"queue limit")))
    harness.wait(lambda: len(graves.got) == 1, "the queue's TTL buries it")
    other = f"{name}o"
    bus2 = harness.bus("bob", plan(other, "quorum"))
    graves2 = Inbox(bus2, f"{other}.graves")
    done(bus2.publish(message(other, b"own limit", ttl_seconds=0.1)))
    harness.wait(lambda: graves2.bodies == [b"own limit"], "the message's own TTL buries it")


def test_a_full_queue_drops_its_oldest(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name, "classic", max_length=2))
    graves = Inbox(bus, f"{name}.graves")
    for body in (b"1", b"2", b"3"):
        done(bus.publish(message(name, body)))
    harness.wait(lambda: graves.bodies == [b"1"], "the oldest is buried")
    assert depth(bus, f"{name}.q").messages == 2


def test_topic_and_fanout_routing(harness: Harness, name: str) -> None:
    patterns = {"one": "host.*.vm", "all": "host.#", "exact": "host.h1.vm", "other": "session.*"}
    topology = Topology(
        (Exchange(f"{name}.x", "topic"),),
        tuple(Queue(f"{name}.{q}", {"x-queue-type": "classic"}) for q in patterns),
        (
            *(Binding(f"{name}.{q}", f"{name}.x", pattern) for q, pattern in patterns.items()),
            # A second matching binding still gives one copy.
            Binding(f"{name}.all", f"{name}.x", "#"),
        ),
    )
    bus = harness.bus("alice", topology)
    inboxes = {q: Inbox(bus, f"{name}.{q}") for q in patterns}
    keys = ["host.h1.vm", "host.h2.vm", "host.h1.a.b", "host", "session.s1"]
    for key in keys:
        done(bus.publish(message(name, key.encode(), key=key)))
    expected = {
        "one": [b"host.h1.vm", b"host.h2.vm"],
        "all": [k.encode() for k in keys],
        "exact": [b"host.h1.vm"],
        "other": [b"session.s1"],
    }
    harness.wait(lambda: {q: i.bodies for q, i in inboxes.items()} == expected, "each gets its own")


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_connection_gives_unsettled_messages_to_the_next(harness: Harness, name: str, kind: str) -> None:
    publisher = harness.bus("alice", plan(name, kind))
    consumer = harness.bus("bob")
    events: list[str] = []
    consumer.on_connect(lambda: events.append("connect"))
    consumer.on_disconnect(lambda: events.append("disconnect"))
    inbox = Inbox(consumer, f"{name}.q", ack=False)
    for body in (b"1", b"2"):
        done(publisher.publish(message(name, body)))
    harness.wait(lambda: len(inbox.got) == 2, "both are handed out")
    harness.disconnect(consumer, "bob")
    harness.wait(lambda: len(inbox.got) == 4, "both come again after the reconnect")
    assert [(d.body, d.redelivered) for d in inbox.got[2:]] == [(b"1", True), (b"2", True)]
    # Acknowledging what belongs to the lost connection changes nothing and breaks nothing.
    inbox.got[0].ack()
    inbox.got[1].reject()
    inbox.got[2].ack()
    inbox.got[3].ack()
    harness.wait(lambda: events == ["disconnect", "connect"], "the callbacks run")
    harness.settle()
    assert consumer.connected and depth(publisher, f"{name}.q").messages == 0
    assert depth(publisher, f"{name}.graves").messages == 0
    done(publisher.publish(message(name, b"3")))
    harness.wait(lambda: inbox.bodies[4:] == [b"3"], "the consumer is still there")


def test_publishing_without_a_connection_fails_at_once(harness: Harness, name: str) -> None:
    bus = harness.new_bus("alice", plan(name))
    future = bus.publish(message(name))
    assert future.done() and isinstance(future.exception(), BusDown)
    asked = bus.depth(f"{name}.q")
    assert asked.done() and isinstance(asked.exception(), BusDown)
    assert not bus.connected


def test_after_a_broker_crash_everything_comes_back(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))
    inbox = Inbox(bus, f"{name}.q", ack=False, prefetch=1)
    connects: list[None] = []
    bus.on_connect(lambda: connects.append(None))
    for body in (b"1", b"2"):
        done(bus.publish(message(name, body)))
    harness.wait(lambda: inbox.bodies == [b"1"], "the first is handed out")
    harness.crash()
    harness.wait(lambda: not bus.connected, "the loss is noticed")
    assert isinstance(error(bus.publish(message(name))), BusDown)
    harness.recover()
    harness.wait(lambda: bus.connected and len(connects) == 1, "it connects again")
    harness.wait(lambda: len(inbox.got) == 2, "the unsettled one comes again")
    assert inbox.got[1].redelivered
    inbox.got[1].ack()
    harness.wait(lambda: inbox.bodies == [b"1", b"1", b"2"], "the stored one follows")
    inbox.got[2].ack()
    done(bus.publish(message(name, b"3")))
    harness.wait(lambda: inbox.bodies[3:] == [b"3"], "new ones arrive")


def test_an_exclusive_queue_lives_as_long_as_its_connection(harness: Harness, name: str) -> None:
    harness.bus("alice", Topology((Exchange(f"{name}.x", "topic"),)))
    topology = Topology(
        (),
        (Queue(f"{name}.own", {"x-queue-type": "classic"}, durable=False, exclusive=True, auto_delete=True),),
        (Binding(f"{name}.own", f"{name}.x", "#"),),
    )
    bus, other = harness.bus("bob", topology), harness.bus("alice")
    inbox = Inbox(bus, f"{name}.own")
    done(other.publish(message(name, b"1", durable=False)))
    harness.wait(lambda: inbox.bodies == [b"1"], "it arrives")
    harness.disconnect(bus, "bob")
    harness.wait(lambda: bus.connected, "it is back")
    harness.wait(lambda: error(other.publish(message(name, b"2"))) is None, "the queue is declared again")
    harness.wait(lambda: b"2" in inbox.bodies, "and consumed")
    bus.stop()
    harness.wait(lambda: isinstance(error(other.publish(message(name))), Unroutable), "it goes with its owner")


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_exclusive_consumer_is_refused(harness: Harness, name: str, kind: str) -> None:
    first, second = harness.bus("alice", plan(name, kind)), harness.bus("bob")
    fatal: list[BusError] = []
    second.on_fatal(fatal.append)
    mine = Inbox(first, f"{name}.q", exclusive=True)
    harness.wait(lambda: depth(first, f"{name}.q").consumers == 1, "the first consumes")
    theirs = Inbox(second, f"{name}.q", exclusive=True)
    harness.wait(lambda: len(fatal) == 1, "the second is refused")
    assert isinstance(fatal[0], ConsumerRefused) and f"{name}.q" in str(fatal[0])
    for _ in range(5):
        done(first.publish(message(name)))
    harness.wait(lambda: len(mine.got) == 5, "the first gets all")
    assert theirs.got == []
    first.stop()
    done(second.publish(message(name)))
    harness.wait(lambda: len(theirs.got) == 1, "the second takes over when the first is gone")
    assert len(fatal) == 1


def test_a_single_active_consumer_hands_over(harness: Harness, name: str) -> None:
    first, second = harness.bus("alice", plan(name, single_active_consumer=True)), harness.bus("bob")
    active = Inbox(first, f"{name}.q")
    harness.wait(lambda: depth(first, f"{name}.q").consumers == 1, "the first consumes")
    standby = Inbox(second, f"{name}.q")
    harness.settle()
    # A quorum queue counts only the one that is active.
    assert depth(first, f"{name}.q").consumers == 1
    for _ in range(5):
        done(second.publish(message(name)))
    harness.wait(lambda: len(active.got) == 5, "the active one gets all")
    first.stop()
    for _ in range(5):
        done(second.publish(message(name)))
    harness.wait(lambda: len(standby.got) == 5, "the standby takes over")
    assert len(active.got) == 5


def test_depth_counts_and_a_missing_queue_is_an_error(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))
    for _ in range(3):
        done(bus.publish(message(name)))
    harness.wait(lambda: depth(bus, f"{name}.q") == QueueDepth(f"{name}.q", 3, 0), "three wait")
    missing = [bus.depth(f"{name}.missing") for _ in range(5)]
    for asked in missing:
        assert isinstance(asked.exception(PATIENCE), QueueMissing)
    done(bus.publish(message(name)))


def test_consuming_begins_when_the_queue_appears(harness: Harness, name: str) -> None:
    early = harness.bus("bob")
    inbox = Inbox(early, f"{name}.q")
    harness.settle()
    bus = harness.bus("alice", plan(name))
    done(bus.publish(message(name, b"at last")))
    harness.wait(lambda: inbox.bodies == [b"at last"], "it arrives")


def test_ticks_come_while_connected_and_while_not(harness: Harness) -> None:
    bus = harness.new_bus()
    ticks: list[bool] = []
    bus.every(0.05, lambda: ticks.append(bus.connected))
    bus.start()
    harness.wait(lambda: len(ticks) >= 3 and ticks[-1], "ticks come")


def test_a_failing_tick_and_callback_harm_nothing(harness: Harness, name: str) -> None:
    bus = harness.new_bus("alice", plan(name))
    ticks: list[None] = []

    def bad() -> None:
        ticks.append(None)
        raise ValueError("tick")

    bus.every(0.05, bad)
    bus.on_connect(bad)
    bus.start()
    harness.wait(lambda: len(ticks) >= 4 and bus.connected, "it goes on ticking")
    done(bus.publish(message(name)))


def test_stop_returns_what_was_not_settled(harness: Harness, name: str) -> None:
    bus, other = harness.bus("alice", plan(name)), harness.bus("bob")
    inbox = Inbox(bus, f"{name}.q", ack=False)
    done(bus.publish(message(name)))
    harness.wait(lambda: len(inbox.got) == 1, "it is handed out")
    gone: list[None] = []
    bus.on_disconnect(lambda: gone.append(None))
    bus.stop()
    assert isinstance(error(bus.publish(message(name))), BusDown)
    harness.wait(lambda: depth(other, f"{name}.q") == QueueDepth(f"{name}.q", 1, 0), "it is back in its queue")
    inbox.got[0].ack()
    harness.settle()
    assert depth(other, f"{name}.q").messages == 1 and gone == []


def test_a_blocked_broker_refuses_and_recovers(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))
    harness.block()
    try:
        # RabbitMQ tells a connection that it is blocked when it publishes; that first message is stored later.
        first = bus.publish(message(name, b"first"))
        harness.wait(lambda: isinstance(bus.publish(message(name)).exception(PATIENCE), Blocked), "it is refused")
        assert bus.connected
    finally:
        harness.unblock()
    harness.wait(lambda: error(bus.publish(message(name))) is None, "it is taken again")
    assert first.done()


def test_eight_threads_lose_nothing(harness: Harness, name: str) -> None:
    bus = harness.bus("alice", plan(name))
    inbox = Inbox(bus, f"{name}.q", prefetch=500)
    failed: list[BaseException] = []

    def work(number: int) -> None:
        futures = [bus.publish(message(name, f"{number}.{i}".encode())) for i in range(1250)]
        failed.extend(e for e in (f.exception(PATIENCE) for f in futures) if e is not None)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    harness.wait(lambda: len(inbox.got) == 10_000, "all arrive")
    assert set(inbox.bodies) == {f"{n}.{i}".encode() for n in range(8) for i in range(1250)}
