"""What only a real RabbitMQ can do to the bus: permissions, TLS, hostile properties, silence, garbage."""

from __future__ import annotations

import logging
import socket
import ssl
import struct
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pika  # type: ignore[import-untyped]
import pytest
from demo.broker import PrivateBroker, free_port
from support.bus_harness import PASSWORD, PATIENCE, AmqpHarness, definitions

from deskfleet.runtime.amqp_wire import BadBrokerUrl
from deskfleet.runtime.bus import (
    AccessRefused,
    Blocked,
    BusDown,
    BusError,
    ConsumerRefused,
    Delivery,
    LoginRefused,
    Outgoing,
    Unroutable,
)
from deskfleet.schemas.topology import Binding, Exchange, Queue, Topology

EVENTS = Topology(
    (Exchange("m.events", "topic"),),
    (Queue("m.in", {"x-queue-type": "quorum"}), Queue("m.other", {"x-queue-type": "classic"})),
    (Binding("m.in", "m.events", "host.#"),),
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="dfmq") as made:
        yield Path(made)


@pytest.fixture(scope="module")
def tls_port(folder: Path) -> int:
    """A certificate for 127.0.0.1 that is its own authority, and the port on which the broker will use it."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=broker"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(
        [*command.split(), *files, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True
    )
    return free_port()


@pytest.fixture(scope="module")
def rabbit(folder: Path, tls_port: int) -> Iterator[PrivateBroker]:
    settings: dict[str, str | int] = {
        "listeners.ssl.1": f"127.0.0.1:{tls_port}",
        "ssl_options.certfile": str(folder / "cert.pem"),
        "ssl_options.keyfile": str(folder / "key.pem"),
        "ssl_options.verify": "verify_none",
    }
    with PrivateBroker(folder / "node", definitions(), settings=settings) as broker:
        yield broker


@pytest.fixture
def harness(rabbit: PrivateBroker) -> Iterator[AmqpHarness]:
    made = AmqpHarness(rabbit)
    yield made
    made.close()


@pytest.fixture
def queue(harness: AmqpHarness) -> str:
    """A fresh classic queue, reached through the default exchange."""
    name = f"t{uuid.uuid4().hex[:10]}"
    harness.bus("alice", Topology((), (Queue(name, {"x-queue-type": "classic"}),))).stop()
    return name


def to(queue: str, body: bytes = b"{}") -> Outgoing:
    return Outgoing("", queue, "thing.v1", body)


def keep(got: list[Delivery]) -> Callable[[Delivery], None]:
    """A handler that collects and acknowledges."""

    def handler(delivery: Delivery) -> None:
        got.append(delivery)
        delivery.ack()

    return handler


def error(future: Future[Any]) -> BaseException | None:
    return future.exception(PATIENCE)


# Addresses and logins.


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://u:secret-p@h/", "must begin with amqp"),
        ("amqp://h/", "login and password"),
        ("amqp://u@h/", "login and password"),
        ("amqp://u:secret-p@/", "host"),
        ("amqp://u:secret-p@h:port/", "broker address"),
        ("amqp://u:secret-p@h:99999/", "broker address"),
        ("amqp://u:secret-p@h/v?heartbeat=0", "nothing may follow"),
        ("amqp://u:secret-p@h/a/b", "%2F"),
        ("", "must begin"),
    ],
)
def test_a_bad_address_is_refused_without_showing_its_password(rabbit: PrivateBroker, url: str, problem: str) -> None:
    harness = AmqpHarness(rabbit)
    try:
        with pytest.raises(BadBrokerUrl, match=problem) as caught:
            harness.new_bus(urls=[url])
        assert "secret-p" not in str(caught.value)
    finally:
        harness.close()


def test_a_refused_login_is_said_once_and_tried_again(
    harness: AmqpHarness, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="deskfleet")
    login = f"late{uuid.uuid4().hex[:8]}"
    fatal: list[BusError] = []
    bus = harness.new_bus(login)
    bus.on_fatal(fatal.append)
    bus.start()
    harness.wait(lambda: len(fatal) == 1, "the refusal is reported")
    assert isinstance(fatal[0], LoginRefused) and login in str(fatal[0])
    harness.broker.ctl("add_user", login, PASSWORD)
    harness.broker.ctl("set_permissions", login, ".*", ".*", ".*")
    harness.wait(lambda: bus.connected, "it connects when the login works")
    bus.publish(to(queue)).result(PATIENCE)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR and "deskfleet" in r.name]
    assert len(said) == 1 and "refuses the login" in said[0] and PASSWORD not in caplog.text
    assert len(fatal) == 1


def test_a_refused_virtual_host_counts_as_a_refused_login(harness: AmqpHarness) -> None:
    fatal: list[BusError] = []
    bus = harness.new_bus(urls=[harness.broker.url("alice", PASSWORD, vhost="no/such")])
    bus.on_fatal(fatal.append)
    bus.start()
    harness.wait(lambda: len(fatal) == 1, "the refusal is reported")
    assert isinstance(fatal[0], LoginRefused) and "no/such" in str(fatal[0])


def test_dead_and_babbling_addresses_are_passed_over(harness: AmqpHarness, queue: str) -> None:
    """The first address refuses connections, the second speaks HTTP, the third sends random frames."""
    talkers = [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x01\x00\x00\x00\x00\x00\x04\xff\xff\xff\xff\xce" * 9]
    servers = [_babbler(words) for words in talkers]
    urls = [f"amqp://alice:{PASSWORD}@127.0.0.1:{port}/" for port in (free_port(), *(s.port for s in servers))]
    try:
        bus = harness.bus(urls=[*urls, harness.broker.url("alice", PASSWORD)], connect_timeout=2.0)
        bus.publish(to(queue)).result(PATIENCE)
        assert all(server.met.is_set() for server in servers)
    finally:
        for server in servers:
            server.close()


class _babbler:
    """Accepts connections and sends them the same bytes whatever they say."""

    def __init__(self, words: bytes) -> None:
        self.met = threading.Event()
        self._words = words
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer:
                self.met.set()
                peer.sendall(self._words)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


def test_tls_is_spoken_and_certificates_are_checked(
    harness: AmqpHarness, folder: Path, tls_port: int, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"amqps://alice:{PASSWORD}@127.0.0.1:{tls_port}/"
    trusting = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    harness.bus(urls=[url], tls=trusting).publish(to(queue)).result(PATIENCE)
    strict = harness.new_bus(urls=[url])
    strict.start()
    harness.wait(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text, "an unknown certificate is refused")
    assert not strict.connected
    wrong_name = harness.new_bus(urls=[url.replace("127.0.0.1", "localhost")], tls=trusting)
    wrong_name.start()
    harness.wait(lambda: "Hostname mismatch" in caplog.text, "another host's certificate is refused")
    assert not wrong_name.connected


# Permissions.


def test_permissions_refuse_one_message_and_the_bus_goes_on(harness: AmqpHarness) -> None:
    harness.bus("alice", EVENTS)
    bus = harness.bus("mallory")
    bus.publish(Outgoing("m.events", "host.mallory.vm", "thing.v1", b"")).result(PATIENCE)
    forged = error(bus.publish(Outgoing("m.events", "host.victim.vm", "thing.v1", b"")))
    assert isinstance(forged, AccessRefused) and "host.victim.vm" in str(forged)
    harness.wait(
        lambda: error(bus.publish(Outgoing("m.events", "host.mallory.vm", "thing.v1", b""))) is None, "it goes on"
    )
    elsewhere = error(bus.publish(to("m.in")))
    assert isinstance(elsewhere, AccessRefused)


def test_a_forbidden_message_takes_no_blame_to_others(harness: AmqpHarness) -> None:
    """Pipelined with good ones, the forbidden message alone is refused; the others are stored or unknown."""
    harness.bus("alice", EVENTS)
    bus = harness.bus("mallory")
    keys = ["host.mallory.vm", "host.victim.vm", "host.mallory.vm"]
    results = [error(f) for f in [bus.publish(Outgoing("m.events", key, "thing.v1", b"")) for key in keys]]
    assert isinstance(results[1], AccessRefused)
    assert all(r is None or isinstance(r, BusDown) for r in (results[0], results[2]))


def test_reading_a_depth_needs_no_permission(harness: AmqpHarness) -> None:
    """A passive declare needs neither configure nor read; an agent may look at the depth of any queue it can name."""
    harness.bus("alice", EVENTS)
    bus = harness.bus("mallory")
    assert bus.depth("m.in").result(PATIENCE).name == "m.in"
    assert bus.depth("m.other").result(PATIENCE).name == "m.other"


def test_consuming_without_permission_is_tried_again_and_logged(
    harness: AmqpHarness, caplog: pytest.LogCaptureFixture
) -> None:
    alice = harness.bus("alice", EVENTS)
    got: list[Delivery] = []
    harness.bus("mallory").consume("m.other", got.append)
    harness.wait(lambda: caplog.text.count("access to queue 'm.other'") >= 2, "it is tried again")
    alice.publish(to("m.other")).result(PATIENCE)
    harness.broker.ctl("set_permissions", "mallory", "^$", r"^m\.events$", r"^m\.(in|other)$")
    harness.wait(lambda: len(got) == 1, "it works once it is allowed")


def test_a_conflicting_topology_is_said_and_healed(harness: AmqpHarness, caplog: pytest.LogCaptureFixture) -> None:
    name = f"t{uuid.uuid4().hex[:10]}"
    alice = harness.bus("alice", Topology((), (Queue(name, {"x-queue-type": "classic"}),)))
    bob = harness.new_bus("bob", Topology((), (Queue(name, {"x-queue-type": "quorum"}),)))
    bob.start()
    harness.wait(lambda: f"inequivalent arg 'x-queue-type' for queue '{name}'" in caplog.text, "the reason is logged")
    assert not bob.connected
    alice.stop()
    harness.broker.ctl("delete_queue", name)
    harness.wait(lambda: bob.connected, "it connects once the old queue is gone")


# Hostile publishers.


def _publish_raw(harness: AmqpHarness, queue: str, properties: bytes, body: bytes) -> None:
    """Publish with a content header written by hand: class 60, weight 0, body size, then flags and values."""
    connection = pika.BlockingConnection(pika.URLParameters(harness.broker.url("mallory", PASSWORD)))
    channel = connection.channel()
    number = channel.channel_number
    method = pika.frame.Method(number, pika.spec.Basic.Publish(exchange="m.events", routing_key=queue)).marshal()
    header = struct.pack(">HHQ", 60, 0, len(body)) + properties
    frames = [(2, header), (3, body)]
    raw = method + b"".join(struct.pack(">BHI", kind, number, len(x)) + x + b"\xce" for kind, x in frames)
    connection._impl._adapter_emit_data(raw)
    # A round trip: the broker has read what came before it, or has closed the connection.
    try:
        connection.channel().close()
        connection.close()
    except pika.exceptions.AMQPConnectionError:
        pass


def _table(kind: bytes, value: bytes) -> bytes:
    entry = b"\x01h" + kind + value
    return struct.pack(">HI", 1 << 13, len(entry)) + entry


def _nested(depth: int) -> bytes:
    """The value of a table in a table in a table."""
    value = struct.pack(">I", 0)
    for _ in range(depth):
        value = struct.pack(">I", len(value) + 3) + b"\x01hF" + value
    return value


@pytest.mark.parametrize(
    "properties",
    [
        pytest.param(_table(b"d", struct.pack(">d", 1e300)), id="large"),
        pytest.param(_table(b"F", _nested(3000)), id="nested"),
        pytest.param(_table(b"T", struct.pack(">Q", 2**63)), id="far future"),
        pytest.param(_table(b"A", struct.pack(">I", 0)), id="empty list"),
        pytest.param(struct.pack(">H", 1 << 5) + b"\x02\xff\xfe", id="type not UTF-8"),
        pytest.param(struct.pack(">H", 1 << 10) + b"\x04\x00\r\n\x1b", id="control characters"),
    ],
)
def test_hostile_properties_reach_the_handler_as_an_ordinary_message(harness: AmqpHarness, properties: bytes) -> None:
    alice = harness.bus("alice", EVENTS)
    got: list[Delivery] = []
    alice.consume("m.in", keep(got))
    harness.settle()
    got.clear()
    lost: list[None] = []
    alice.on_disconnect(lambda: lost.append(None))
    _publish_raw(harness, "host.mallory.vm", properties, b"hostile")
    alice.publish(Outgoing("m.events", "host.a.vm", "thing.v1", b"honest")).result(PATIENCE)
    harness.wait(lambda: b"honest" in [d.body for d in got], "the next message arrives")
    hostile = [d for d in got if d.body == b"hostile"]
    assert [d.sender for d in hostile] == [""]
    assert lost == []


def test_a_sender_cannot_be_forged(harness: AmqpHarness) -> None:
    alice = harness.bus("alice", EVENTS)
    got: list[Delivery] = []
    alice.consume("m.in", keep(got))
    _publish_raw(harness, "host.mallory.vm", struct.pack(">H", 1 << 4) + b"\x05alice", b"forged")
    alice.publish(Outgoing("m.events", "host.a.vm", "thing.v1", b"honest")).result(PATIENCE)
    harness.wait(lambda: b"honest" in [d.body for d in got], "the next message arrives")
    assert b"forged" not in [d.body for d in got]


# Silence and limits.


def test_a_silent_broker_fails_confirms_in_time_and_is_left(harness: AmqpHarness, queue: str) -> None:
    """SIGSTOP: the connection stays open and nobody answers, neither confirms nor heartbeats."""
    bus = harness.bus("alice", confirm_timeout=1.0, heartbeat=2, max_outstanding=10)
    bus.publish(to(queue)).result(PATIENCE)
    harness.broker.pause()
    try:
        futures = [bus.publish(to(queue)) for _ in range(11)]
        assert futures[10].done() and isinstance(futures[10].exception(), Blocked)
        asked = bus.depth(queue)
        for future in futures[:10]:
            late = error(future)
            assert isinstance(late, BusDown) and "did not confirm within 1 s" in str(late)
        assert isinstance(error(asked), BusDown)
        harness.wait(lambda: not bus.connected, "missing heartbeats end the connection")
    finally:
        harness.broker.resume()
    harness.wait(lambda: bus.connected, "it is back")
    bus.publish(to(queue)).result(PATIENCE)


def test_confirms_lost_in_a_crash_fail(harness: AmqpHarness, queue: str) -> None:
    bus = harness.bus("alice")
    harness.broker.pause()
    futures = [bus.publish(to(queue)) for _ in range(100)]
    harness.crash()
    try:
        assert all(isinstance(error(future), BusDown) for future in futures)
    finally:
        harness.recover()


def test_a_long_blockade_ends_in_a_new_connection(harness: AmqpHarness, queue: str) -> None:
    bus = harness.bus("alice", blocked_timeout=1.0, confirm_timeout=1.0)
    events: list[str] = []
    bus.on_disconnect(lambda: events.append("down"))
    harness.block()
    try:
        first = bus.publish(to(queue))
        assert isinstance(error(first), (BusDown, Blocked))
        harness.wait(lambda: "down" in events, "the blocked connection is given up")
    finally:
        harness.unblock()
    harness.wait(lambda: bus.connected and error(bus.publish(to(queue))) is None, "publishing works again")


def test_a_slow_handler_costs_no_heartbeat(harness: AmqpHarness, queue: str) -> None:
    bus = harness.bus("alice", heartbeat=1)
    release, entered = threading.Event(), threading.Event()
    threads: list[str] = []
    lost: list[None] = []
    bus.on_disconnect(lambda: lost.append(None))

    def slow(delivery: Delivery) -> None:
        threads.append(threading.current_thread().name)
        entered.set()
        assert release.wait(PATIENCE)
        delivery.ack()

    bus.consume(queue, slow)
    bus.publish(to(queue)).result(PATIENCE)
    assert entered.wait(PATIENCE)
    # Five heartbeats' time in which the handler blocks; the I/O thread goes on, so publishing works all along.
    pause = threading.Event()
    for _ in range(10):
        pause.wait(0.5)
        bus.publish(to(queue)).result(PATIENCE)
    release.set()
    harness.wait(lambda: len(threads) == 11, "the rest is handled")
    harness.wait(lambda: bus.depth(queue).result(PATIENCE).messages == 0, "and acknowledged")
    assert set(threads) == {"handlers"} and lost == []


# Stopping.


def test_stop_lets_handlers_finish_and_their_answers_out(harness: AmqpHarness, queue: str) -> None:
    bus, other = harness.bus("alice"), harness.bus("bob")
    release, entered = threading.Event(), threading.Event()
    answers: list[Future[None]] = []

    def slow(delivery: Delivery) -> None:
        entered.set()
        assert release.wait(PATIENCE)
        answers.append(bus.publish(to(f"{queue}.answers", delivery.body)))
        delivery.ack()

    harness.bus("alice", Topology((), (Queue(f"{queue}.answers", {"x-queue-type": "classic"}),)))
    bus.consume(queue, slow)
    for body in (b"1", b"2", b"3"):
        bus.publish(to(queue, body)).result(PATIENCE)
    assert entered.wait(PATIENCE)
    stopper = threading.Thread(target=bus.stop, args=(PATIENCE,))
    stopper.start()
    release.set()
    stopper.join()
    assert [f.exception(0) for f in answers] == [None, None, None]
    assert other.depth(f"{queue}.answers").result(PATIENCE).messages == 3
    harness.wait(lambda: other.depth(queue).result(PATIENCE).messages == 0, "all were acknowledged")
    assert isinstance(error(bus.publish(to(queue))), BusDown)


def test_stop_on_the_handlers_thread_leaves_the_rest_to_the_broker(harness: AmqpHarness, queue: str) -> None:
    bus, other = harness.bus("alice"), harness.bus("bob")
    handled: list[bytes] = []
    stopped = threading.Event()

    def handler(delivery: Delivery) -> None:
        handled.append(delivery.body)
        delivery.ack()
        bus.stop(PATIENCE)
        stopped.set()

    for body in (b"1", b"2", b"3"):
        other.publish(to(queue, body)).result(PATIENCE)
    bus.consume(queue, handler)
    assert stopped.wait(PATIENCE)
    harness.wait(lambda: other.depth(queue).result(PATIENCE).messages == 2, "two are back in their queue")
    harness.settle()
    assert handled == [b"1"]


def test_stop_flushes_what_was_published(harness: AmqpHarness, queue: str) -> None:
    bus, other = harness.bus("alice"), harness.bus("bob")
    futures = [bus.publish(to(queue)) for _ in range(2000)]
    bus.stop(PATIENCE)
    assert [f.exception(0) for f in futures] == [None] * 2000
    harness.wait(lambda: other.depth(queue).result(PATIENCE).messages == 2000, "all are stored")


def test_stop_ends_although_the_broker_is_silent(harness: AmqpHarness, queue: str) -> None:
    bus = harness.bus("alice")
    harness.broker.pause()
    try:
        future = bus.publish(to(queue))
        bus.stop(0.5)
        assert future.done() and isinstance(future.exception(), BusDown)
    finally:
        harness.broker.resume()
    harness.new_bus().stop()  # never started


def test_stop_ends_an_attempt_that_hangs(rabbit: PrivateBroker) -> None:
    """The address accepts connections and says nothing."""
    harness = AmqpHarness(rabbit)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        bus = harness.new_bus(urls=[f"amqp://u:p@127.0.0.1:{mute.getsockname()[1]}/"], connect_timeout=PATIENCE)
        bus.start()
        mute.accept()[0].close()
        peer, _ = mute.accept()
        with peer:
            assert peer.recv(8) == b"AMQP\x00\x00\x09\x01"
            bus.stop(PATIENCE)
            assert peer.recv(8) == b""
    harness.close()


def test_a_dispatch_that_is_closed_is_survived(harness: AmqpHarness, queue: str) -> None:
    def closed(_: object) -> None:
        raise RuntimeError("the event loop is closed")

    bus, other = harness.bus("alice", dispatch=closed), harness.bus("bob")
    bus.consume(queue, lambda d: d.ack())
    other.publish(to(queue)).result(PATIENCE)
    bus.publish(to(queue)).result(PATIENCE)
    bus.stop(PATIENCE)
    harness.wait(lambda: other.depth(queue).result(PATIENCE).messages == 2, "both are back in their queue")


def test_an_exception_on_the_io_thread_costs_the_connection_only(harness: AmqpHarness, queue: str) -> None:
    bus = harness.bus("alice")
    events: list[str] = []
    bus.on_disconnect(lambda: events.append("down"))
    bus.on_connect(lambda: events.append("up"))

    def fault() -> None:
        raise ValueError("a bug in the library")

    bus.post(lambda: bus._loop.call_later(0, fault))
    harness.wait(lambda: events == ["down", "up"], "it connects again")
    bus.publish(to(queue)).result(PATIENCE)


def test_a_ghost_of_ourselves_is_outwaited(harness: AmqpHarness) -> None:
    """A consumer that was ours before its connection broke is not reported as another process at once."""
    name = f"t{uuid.uuid4().hex[:10]}"
    bus = harness.bus("alice", Topology((), (Queue(name, {"x-queue-type": "quorum"}),)), heartbeat=10)
    fatal: list[BusError] = []
    bus.on_fatal(fatal.append)
    got: list[Delivery] = []
    bus.consume(name, keep(got), exclusive=True)
    other = harness.bus("bob")
    other.publish(to(name)).result(PATIENCE)
    harness.wait(lambda: len(got) == 1, "it is ours")
    ghost = harness.bus("bob")
    ghost.consume(name, lambda d: d.reject())
    harness.wait(lambda: other.depth(name).result(PATIENCE).consumers == 2, "a ghost holds the queue too")
    harness.disconnect(bus, "alice")
    harness.wait(lambda: bus.connected, "it is back")
    harness.settle()
    assert fatal == []
    ghost.stop()
    other.publish(to(name)).result(PATIENCE)
    harness.wait(lambda: len(got) == 2, "it is ours again")
    assert fatal == [] and ConsumerRefused not in map(type, fatal)


def test_unroutable_and_refused_are_told_apart_under_load(harness: AmqpHarness, queue: str) -> None:
    bus = harness.bus("alice")
    targets = [queue if i % 3 else f"{queue}.nowhere" for i in range(900)]
    results = [error(f) for f in [bus.publish(to(target)) for target in targets]]
    assert [isinstance(r, Unroutable) for r in results] == [i % 3 == 0 for i in range(900)]
