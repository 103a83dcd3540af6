"""Cases C30, C31 and C32 with the real scheduler, a real RabbitMQ and a host that answers over it.

Each docstring says the right outcome. The bus's own part of these cases (a slow handler, a broker that crashes or
blocks, unroutable messages) stands in test_bus and test_bus_amqp.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import pika  # type: ignore[import-untyped]
import pytest
from demo.broker import PrivateBroker
from demo.definitions import definitions
from demo.keys import Keys
from support.hosts import IMAGE, MACHINE
from support.stub_host import StubHost

from deskfleet.ledger.engine import migrate, open_engine
from deskfleet.ledger.reader import Reader
from deskfleet.ledger.writer import Writer
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.bus import BusError, Delivery, Outgoing
from deskfleet.runtime.rights import permission, user
from deskfleet.runtime.service import MainLoop, SystemClock
from deskfleet.scheduler.core import Scheduler
from deskfleet.scheduler.decisions import Settings
from deskfleet.scheduler.policy import Policy
from deskfleet.schemas import topology
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import LaunchRequested, VmStart
from deskfleet.schemas.session import Resources, State
from deskfleet.schemas.wire import encode

# Generous: every wait ends as soon as its condition holds.
PATIENCE_S = 60.0
HEARTBEAT_S = 2
HOST = "h1"
ADMIN = "tester"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mq")


@pytest.fixture(scope="module")
def keys(folder: Path) -> Keys:
    return Keys(folder / "keys")


@pytest.fixture(scope="module")
def broker(folder: Path, keys: Keys) -> Iterator[PrivateBroker]:
    document = definitions([HOST], keys)
    document["users"].append(user(ADMIN, keys.secret(ADMIN)))
    document["permissions"].append(permission(ADMIN, ".*", ".*", ".*"))
    with PrivateBroker(folder / "node", document) as made:
        yield made


class Stage:
    """A scheduler over a ledger of its own, a host that says "running" to every start, and somebody who asks."""

    def __init__(self, broker: PrivateBroker, keys: Keys, folder: Path) -> None:
        self.broker = broker
        self._keys = keys
        self.loop = MainLoop(SystemClock())
        self._thread = threading.Thread(target=self.loop.run)
        self._thread.start()
        self.engine = open_engine(f"sqlite:///{folder}/ledger.db")
        migrate(self.engine)
        self.reader = Reader(self.engine)
        self.losses: list[float] = []
        #: Called with every lookup of the catalogue, which each decision does.
        self.thinking: Callable[[], None] = lambda: None
        self.bus = self._bus("scheduler", self.loop.post, declare=topology.core())
        self.bus.on_disconnect(lambda: self.losses.append(time.monotonic()))
        settings = Settings(policy=Policy(max_sessions=10_000), reissue_s=1.0)
        self.scheduler = Scheduler(
            Writer(self.engine), self.bus, SystemClock(), self._machines, settings, self.loop.post
        )  # fmt: skip
        self.scheduler.start()
        self.portal = self._bus("portal", self.loop.post)
        # The host has a thread of its own: it answers also while the scheduler thinks.
        self._host_loop = MainLoop(SystemClock())
        self._host_thread = threading.Thread(target=self._host_loop.run)
        self._host_thread.start()
        self.host = StubHost(HOST, self._url(f"agent-{HOST}"), self._host_loop, SystemClock(), IMAGE)
        wait(lambda: self.portal.connected and self.host.bus.connected, "everybody is connected")

    def _url(self, login: str) -> str:
        return self.broker.url(login, self._keys.secret(login if login == ADMIN else f"broker-{login}"))

    def _bus(self, login: str, dispatch: Callable[[Callable[[], None]], None], **options: object) -> AmqpBus:
        bus = AmqpBus(
            [self._url(login)],
            name=login,
            dispatch=dispatch,
            clock=SystemClock(),
            rng=random.Random(3),
            heartbeat=HEARTBEAT_S,
            **options,  # type: ignore[arg-type]
        )
        bus.start()
        wait(lambda: bus.connected, f"{login} connects")
        return bus

    def _machines(self) -> dict[str, Machine]:
        self.thinking()
        return {"tiny": MACHINE}

    def ask(self, sid: str = "") -> str:
        """Somebody asks, until the broker has confirmed it."""
        request = launch(sid or secrets.token_hex(16))
        kind, body = encode(request)
        message = Outgoing(topology.COMMANDS, "scheduler", kind, body, correlation_id=request.sid)
        for _ in range(600):
            with suppress(BusError):
                self.portal.publish(message).result(PATIENCE_S)
                return request.sid
            time.sleep(0.1)
        raise AssertionError("the broker never confirmed the request")

    def state(self, sid: str) -> State | None:
        session = self.reader.session(sid)
        return session.state if session else None

    def runs(self, *sids: str) -> None:
        """Wait until all of them run; AssertionError when one does not, or was started as two guests."""
        wait(lambda: all(self.state(sid) is State.RUNNING for sid in sids), "everything that was asked for runs")
        numbers = [start.generation for start in self.host.starts]
        owners = {start.generation: start.sid for start in self.host.starts}
        assert all(owners[start.generation] == start.sid for start in self.host.starts), "one number, one session"
        live = [session.sid for session in self.reader.live()]
        assert len(live) == len(set(live)) and set(sids) <= set(live) and numbers

    def admin(self, work: Callable[[object], object]) -> None:
        """Change something at the broker."""
        connection = pika.BlockingConnection(pika.URLParameters(self._url(ADMIN)))
        try:
            work(connection.channel())
        finally:
            connection.close()

    def close(self) -> None:
        self.thinking = lambda: None
        for bus in (self.host.bus, self.portal, self.bus):
            bus.stop()
        for loop, thread in ((self._host_loop, self._host_thread), (self.loop, self._thread)):
            loop.stop()
            thread.join()
        self.engine.dispose()
        for queue in (*(q.name for q in topology.core().queues), topology.host_queue(HOST)):
            self.admin(lambda channel, queue=queue: channel.queue_purge(queue))  # type: ignore[misc,attr-defined]


def launch(sid: str) -> LaunchRequested:
    return LaunchRequested(sid, "ann", (), "tiny", Resources(1, 64, 1), False, 3600, 600)


def wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


@pytest.fixture
def stage(broker: PrivateBroker, keys: Keys, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(broker, keys, tmp_path)
    try:
        made.runs(made.ask())
        yield made
    finally:
        made.close()


def test_c30_a_decision_that_takes_longer_than_three_heartbeats_costs_no_connection(stage: Stage) -> None:
    """The broker hears from us while we think; nothing is delivered again, and every request is started once."""
    thought = threading.Event()

    def think() -> None:
        stage.thinking = lambda: None
        time.sleep(3.5 * HEARTBEAT_S)
        thought.set()

    before = len(stage.host.starts)
    stage.thinking = think
    asked = [stage.ask() for _ in range(10)]
    assert thought.wait(PATIENCE_S)
    stage.runs(*asked)
    assert stage.losses == [] and stage.bus.connected
    assert sorted(start.sid for start in stage.host.starts[before:]) == sorted(asked)


def test_c31_a_start_is_sent_again_when_the_hosts_queue_was_deleted(stage: Stage) -> None:
    """The broker says that nobody took it; the request stays assigned and visible, and runs once the queue is back."""
    stage.admin(lambda channel: channel.queue_delete(topology.host_queue(HOST)))  # type: ignore[attr-defined]
    before = len(stage.host.starts)
    asked = stage.ask()
    wait(lambda: stage.state(asked) is State.ASSIGNED, "it is decided all the same")
    first = stage.reader.session(asked)
    wait(lambda: stage.reader.session(asked) != first, "it was sent again, under a new number")
    assert len(stage.host.starts) == before
    stage.admin(declare_host)
    stage.runs(asked)
    assert {start.sid for start in stage.host.starts[before:]} == {asked}


def declare_host(channel: object) -> None:
    made = topology.for_host(HOST)
    for queue in made.queues:
        channel.queue_declare(queue.name, durable=True, arguments=dict(queue.arguments))  # type: ignore[attr-defined]
    for binding in made.bindings:
        channel.queue_bind(binding.queue, binding.exchange, binding.key)  # type: ignore[attr-defined]


def test_c31_a_start_is_sent_again_when_a_binding_was_gone(stage: Stage) -> None:
    """A wrong routing costs time and nothing else."""
    name = topology.host_queue(HOST)
    stage.admin(lambda channel: channel.queue_unbind(name, topology.COMMANDS, name))  # type: ignore[attr-defined]
    asked = stage.ask()
    wait(lambda: stage.state(asked) is State.ASSIGNED, "it is decided all the same")
    stage.admin(declare_host)
    stage.runs(asked)


@pytest.mark.parametrize("when", ["before", "after"])
def test_c31_a_broker_that_is_killed_at_a_publish_loses_nothing(stage: Stage, when: str) -> None:
    """Between commit and confirm of a start the broker dies by SIGKILL. After it is back, this request and those that
    were asked for meanwhile run, each once."""
    killed = threading.Event()
    real = stage.bus.publish

    def publish(message: Outgoing) -> Future[None]:
        if message.type != TYPE_OF_START or killed.is_set():
            return real(message)
        if when == "before":
            stage.broker.kill()
        sent = real(message)
        if when == "after":
            stage.broker.kill()
        killed.set()
        return sent

    stage.bus.publish = publish  # type: ignore[method-assign]
    first = stage.ask()
    assert killed.wait(PATIENCE_S)
    assert stage.state(first) is State.ASSIGNED, "the decision is in the ledger before anybody hears of it"
    stage.broker.start()
    others = [stage.ask() for _ in range(5)]
    stage.runs(first, *others)
    # What was asked for twice, because its confirm was lost, is one desktop.
    assert stage.ask(first) == first
    stage.runs(first, *others)
    assert len(stage.reader.live()) == 7


TYPE_OF_START = encode(
    VmStart(
        "0" * 32, 1, "ann", "tiny", MACHINE.os, IMAGE, MACHINE.format, MACHINE.video, MACHINE.firmware,
        Resources(1, 64, 1), (), False, 60, 1, 1,
    )
)[0]  # fmt: skip


def test_c32_a_broker_that_takes_nothing_stops_no_decision_and_needs_no_restart(stage: Stage) -> None:
    """With a memory alarm new launches are refused instead of hanging for ever; the scheduler goes on deciding, what it
    could not send waits in the ledger, what runs stays; afterwards all goes on over the same connection."""
    running = [session.sid for session in stage.reader.live()]
    arrived = launch(secrets.token_hex(16))
    kind, body = encode(arrived)
    delivery = Delivery(
        "q", topology.COMMANDS, "scheduler", kind, body, "m", arrived.sid, "portal", False, lambda _: None
    )
    stage.broker.ctl("set_vm_memory_high_watermark", "0.0000001")
    try:
        # The broker reads no more from whoever publishes; the first word of each is what makes it say so.
        wait(lambda: refused(stage, launch(secrets.token_hex(16))), "launches are refused")
        # This one had been delivered before.
        stage.loop.post(lambda: stage.scheduler.on_delivery(delivery))
        wait(lambda: stage.state(arrived.sid) is State.ASSIGNED, "it is decided")
        first = stage.reader.session(arrived.sid)
        wait(lambda: stage.reader.session(arrived.sid) != first, "and tried again, by the sweep")
        assert stage.scheduler.healthy and all(stage.state(sid) is State.RUNNING for sid in running)
    finally:
        stage.broker.ctl("set_vm_memory_high_watermark", "0.4")
    later = stage.ask()
    stage.runs(arrived.sid, later, *running)
    assert stage.losses == []


def refused(stage: Stage, request: LaunchRequested) -> bool:
    """Whether a launch is refused, instead of being neither confirmed nor refused."""
    kind, body = encode(request)
    sent = stage.portal.publish(Outgoing(topology.COMMANDS, "scheduler", kind, body))
    return isinstance(sent.exception(15.0), BusError)
