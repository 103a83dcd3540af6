"""One proxy process: news from the bus into the routes, cuts, and what is counted."""

from __future__ import annotations

import asyncio
import logging

from deskfleet.proxy.routes import RouteTable, WrongSender
from deskfleet.proxy.server import Server
from deskfleet.proxy.stats import Stats
from deskfleet.runtime.bus import Bus, Delivery
from deskfleet.runtime.metrics import Health, Metrics
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DecodeError
from deskfleet.schemas.host import HostReport
from deskfleet.schemas.messages import SessionChanged, decode

log = logging.getLogger(__name__)

EXPIRE_S = 30.0


class News:
    """Feeds the routes from the bus, and cuts consoles whose session has ended."""

    def __init__(self, routes: RouteTable, server: Server, stats: Stats, clock: Clock) -> None:
        self._routes = routes
        self._server = server
        self._stats = stats
        self._clock = clock

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one message; what can't be read or was sent by somebody else is dropped and counted."""
        try:
            self._take(delivery)
        except DecodeError as error:
            self._stats.dropped["unreadable"] += 1
            log.warning("a message from %s can't be read: %s", delivery.sender or "nobody", error)
        except WrongSender as error:
            self._stats.dropped["wrong_sender"] += 1
            log.warning("%s", error)
        delivery.ack()

    def _take(self, delivery: Delivery) -> None:
        message = decode(delivery.type, delivery.body)
        now = self._clock.monotonic()
        if isinstance(message, HostReport):
            for sid in self._routes.heartbeat(delivery.sender, message, now):
                self._server.cut(sid, message.host)
        elif isinstance(message, SessionChanged):
            if self._routes.announce(delivery.sender, message, now):
                self._server.cut(message.sid)
        else:
            raise WrongSender(f"a {delivery.type} is nothing for a proxy")

    async def expire(self) -> None:
        """Forget old routes, now and then, until cancelled."""
        while True:
            await asyncio.sleep(EXPIRE_S)
            self._routes.expire(self._clock.monotonic())


def health(bus: Bus, routes: RouteTable, clock: Clock) -> Health:
    """Ready once every live host has had the time for a heartbeat. Later a broker that is away hurts no console that
    is open, but new ones may be sent elsewhere."""
    reasons = []
    if not bus.connected:
        reasons.append("the broker is not connected")
    if not routes.settled(clock.monotonic()):
        reasons.append("hosts have not had the time to report")
    return Health(not reasons, tuple(reasons))


def measure(metrics: Metrics, server: Server, routes: RouteTable, stats: Stats) -> None:
    """Offer the counts to a scrape. All are read there, so a tunnel costs nothing for being counted."""
    metrics.gauge("tunnels", "Consoles that are open").set_function(lambda: len(server.tunnels))
    metrics.gauge("opened", "Consoles opened since the start").set_function(lambda: stats.opened)
    metrics.gauge("hosts", "Hosts with routes").set_function(lambda: routes.size[0])
    moved = metrics.gauge("bytes", "Bytes of consoles that have ended", ["direction"])
    moved.labels("up").set_function(lambda: stats.up)
    moved.labels("down").set_function(lambda: stats.down)
    metrics.gauge("refused", "Connections refused since the start").set_function(stats.refused.total)
    metrics.gauge("dropped", "Messages dropped since the start").set_function(stats.dropped.total)
