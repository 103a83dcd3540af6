"""Between the bus and the agent's rules: commands in, reports and heartbeats out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from deskfleet.agent.core import Agent
from deskfleet.runtime.bus import Bus, Delivery, Outgoing
from deskfleet.schemas import topology
from deskfleet.schemas.errors import DecodeError
from deskfleet.schemas.host import GuestReport, HostReport
from deskfleet.schemas.messages import HostFence, VmReport, VmStart, VmStop, decode, encode

log = logging.getLogger(__name__)


class Link:
    """One agent's side of the bus. `describe` makes the heartbeat with the given sequence number."""

    def __init__(self, host: str, bus: Bus, agent: Agent, describe: Callable[[int], HostReport]) -> None:
        self._host = host
        self._bus = bus
        self._agent = agent
        self._describe = describe
        self._seq = 0

    def start(self) -> None:
        """Consume this host's commands; say at each connect what is here."""
        self._bus.on_connect(self.beat)
        self._bus.consume(topology.host_queue(self._host), self.on_delivery, exclusive=True)
        self._bus.start()

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one command. It is acknowledged once its effect is in the journal."""
        try:
            message = decode(delivery.type, delivery.body)
        except DecodeError as error:
            log.error("a command can't be read: %s", error)
            delivery.reject()
            return
        match message:
            case VmStart():
                self._agent.start(message)
            case VmStop():
                self._agent.stop(message)
            case HostFence():
                self._agent.fence(message)
                self.beat()
            case _:
                log.error("an agent takes no %s", delivery.type)
                delivery.reject()
                return
        delivery.ack()

    def report(self, guest: GuestReport) -> None:
        """Say that a guest changed. Not repeated when it is lost: the next heartbeat says the same."""
        kind, body = encode(VmReport(self._host, guest))
        self._send(Outgoing(topology.EVENTS, topology.report_key(self._host), kind, body, correlation_id=guest.sid))

    def beat(self) -> None:
        """Send a heartbeat now."""
        self._seq += 1
        kind, body = encode(self._describe(self._seq))
        key = topology.heartbeat_key(self._host)
        self._send(Outgoing(topology.EVENTS, key, kind, body, durable=False, mandatory=False))

    def _send(self, message: Outgoing) -> None:
        if self._bus.connected:
            self._bus.publish(message)
