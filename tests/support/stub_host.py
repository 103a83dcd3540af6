"""A host without guests: it speaks an agent's messages over the real bus and says "running" to every start."""

from __future__ import annotations

import random
from dataclasses import replace

from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.bus import Delivery, Outgoing
from deskfleet.runtime.service import Clock, MainLoop
from deskfleet.schemas import topology
from deskfleet.schemas.host import GuestReport, HostReport, Phase
from deskfleet.schemas.messages import (
    HostFence,
    Message,
    VmReport,
    VmStart,
    VmStop,
)
from deskfleet.schemas.wire import decode, encode


class StubHost:
    """One host with room for `cpus` CPUs. `starts` are the commands that it was given, in order."""

    def __init__(self, name: str, url: str, loop: MainLoop, clock: Clock, image: str, cpus: int = 4096) -> None:
        self.name = name
        self.starts: list[VmStart] = []
        self._image = image
        self._cpus = cpus
        self._seq = 0
        self._generation = 0
        self._fenced = True
        self._guests: dict[str, GuestReport] = {}
        self.bus = AmqpBus([url], name=name, dispatch=loop.post, clock=clock, rng=random.Random(1))
        self.bus.consume(topology.host_queue(name), self._on_delivery)
        self.bus.on_connect(self.beat)
        self.bus.every(1.0, self.beat)
        self.bus.start()

    def beat(self) -> None:
        """Send a full heartbeat."""
        self._seq += 1
        report = HostReport(
            self.name, "i1", self._seq, "b1", self._generation, self._fenced, "127.0.0.1:1", "tcg", self._cpus, 1 << 24,
            0.0, 1 << 24, 1 << 30, 1 << 29, (self._image,), (), tuple(self._guests.values()),
        )  # fmt: skip
        self._send(topology.heartbeat_key(self.name), report, durable=False)

    def _send(self, key: str, message: Message, durable: bool) -> None:
        kind, body = encode(message)
        if self.bus.connected:
            self.bus.publish(Outgoing(topology.EVENTS, key, kind, body, durable=durable, mandatory=False))

    def _on_delivery(self, delivery: Delivery) -> None:
        message = decode(delivery.type, delivery.body)
        if isinstance(message, HostFence):
            self._generation, self._fenced = max(self._generation, message.generation), False
            self.beat()
        elif isinstance(message, VmStart):
            self.starts.append(message)
            if message.generation > self._generation or message.sid in self._guests:
                self._tell(GuestReport(message.sid, message.generation, Phase.RUNNING, True))
        elif isinstance(message, VmStop) and message.sid in self._guests:
            ended = replace(self._guests[message.sid], phase=Phase.ENDED, outcome=message.outcome)
            self._tell(ended)
        delivery.ack()

    def _tell(self, guest: GuestReport) -> None:
        self._generation = max(self._generation, guest.generation)
        self._guests[guest.sid] = guest
        self._send(topology.report_key(self.name), VmReport(self.name, guest), durable=True)
