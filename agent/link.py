"""Between the bus and the agent's rules: commands in, reports and heartbeats out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from deskfleet.agent.core import Agent
from deskfleet.runtime.bus import Bus, Delivery, Outgoing
from deskfleet.schemas import topology
from deskfleet.schemas.errors import DecodeError
from deskfleet.schemas.host import GuestReport, HostReport, beat_of, inventory_digest
from deskfleet.schemas.messages import (
    HostFence,
    HostImages,
    HostInventory,
    HostTemplates,
    TemplateOrdered,
    VmExtend,
    VmLook,
    VmPicture,
    VmReport,
    VmStart,
    VmStop,
)
from deskfleet.schemas.wire import decode, decode_as, encode

log = logging.getLogger(__name__)

#: A full heartbeat comes at least this often (seconds): what has missed one and can't ask heals by it.
FULL_S = 60.0

# Logins on the broker.
_SCHEDULER = "scheduler"
_PORTAL = "portal"


class Link:
    """One agent's side of the bus. `describe` makes the heartbeat with the given sequence number; `look` is told of
    each wish to see a screen, `images` of what the catalogue names; `now` are seconds of a clock that never goes
    back."""

    def __init__(
        self,
        host: str,
        bus: Bus,
        agent: Agent,
        describe: Callable[[int], HostReport],
        now: Callable[[], float],
        look: Callable[[VmLook], None],
        images: Callable[[HostImages], None],
        templates: Callable[[HostTemplates | TemplateOrdered], None],
    ) -> None:
        self._host = host
        self._bus = bus
        self._agent = agent
        self._describe = describe
        self._now = now
        self._look = look
        self._images = images
        self._templates = templates
        self._seq = 0
        #: The digest of the last full heartbeat, and when it was sent; None when the next one has to be full.
        self._told: tuple[str, float] | None = None

    def start(self) -> None:
        """Consume this host's commands; say at each connect what is here."""
        self._bus.on_connect(self.tell)
        self._bus.consume(topology.host_queue(self._host), self.on_delivery, exclusive=True)
        self._bus.consume(topology.look_queue(self._host), self.on_look, exclusive=True)
        self._bus.start()

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one command. It is acknowledged once its effect is in the journal. Only the scheduler commands hosts;
        the broker vouches for the sender."""
        try:
            message = decode(delivery.type, delivery.body)
        except DecodeError as error:
            log.error("a command can't be read: %s", error)
            delivery.reject()
            return
        if delivery.sender != _SCHEDULER:
            log.error("%s may not command this host", delivery.sender or "an unknown sender")
            delivery.reject()
            return
        match message:
            case VmStart():
                self._agent.start(message)
            case VmStop():
                self._agent.stop(message)
            case VmExtend():
                self._agent.extend(message)
            case HostFence():
                self._agent.fence(message)
                self.beat()
            case HostImages():
                self._images(message)
            case HostTemplates() | TemplateOrdered():
                self._templates(message)
            case HostInventory():
                self.tell()
            case _:
                log.error("an agent takes no %s", delivery.type)
                delivery.reject()
                return
        delivery.ack()

    def on_look(self, delivery: Delivery) -> None:
        """Take the wish of a portal to see a screen."""
        delivery.ack()
        try:
            wish = decode_as(VmLook, delivery.type, delivery.body)
        except DecodeError as error:
            log.warning("a wish to see a screen can't be read: %s", error)
            return
        if delivery.sender != _PORTAL:
            log.warning("%s may not look at screens", delivery.sender or "an unknown sender")
            return
        self._look(wish)

    def show(self, sid: str, png: bytes, replica: str = "") -> None:
        """Send a picture to the portal process that asked for it, or, as the last one of a guest, to every one."""
        key = topology.picture_key(self._host, replica) if replica else topology.last_key(self._host)
        kind, body = encode(VmPicture(self._host, sid, png, last=not replica))
        self._send(Outgoing(topology.EVENTS, key, kind, body, durable=False, mandatory=False))

    def report(self, guest: GuestReport) -> None:
        """Say that a guest changed. Not repeated when it is lost: the next heartbeat says the same."""
        kind, body = encode(VmReport(self._host, guest))
        self._send(Outgoing(topology.EVENTS, topology.report_key(self._host), kind, body, correlation_id=guest.sid))

    def tell(self) -> None:
        """Send a full heartbeat now."""
        self._told = None
        self.beat()

    def beat(self) -> None:
        """Send a heartbeat now: a small one while the inventory is what the last full one has told."""
        self._seq += 1
        report, now = self._describe(self._seq), self._now()
        report = replace(report, digest=inventory_digest(report))
        if self._told and self._told[0] == report.digest and now - self._told[1] < FULL_S:
            kind, body = encode(beat_of(report))
        else:
            kind, body = encode(report)
            self._told = report.digest, now
        key = topology.heartbeat_key(self._host)
        self._send(Outgoing(topology.EVENTS, key, kind, body, durable=False, mandatory=False))

    def _send(self, message: Outgoing) -> None:
        if self._bus.connected:
            self._bus.publish(message)
