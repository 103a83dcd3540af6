"""What a proxy process does beside its connections: news from the bus into the routes, cuts, health and figures."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from deskfleet.proxy.routes import PORTAL_LOGIN, RouteTable, WrongSender
from deskfleet.proxy.server import Server
from deskfleet.proxy.stats import Stats
from deskfleet.runtime.bus import Bus, Delivery, Outgoing
from deskfleet.runtime.metrics import Health, counter_of, gauge_of
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DecodeError
from deskfleet.schemas.host import HostBeat, HostReport
from deskfleet.schemas.messages import ConsolesAsked, ConsolesListed, GrantRevoked, SessionChanged
from deskfleet.schemas.topology import VIEWERS
from deskfleet.schemas.wire import decode, encode

log = logging.getLogger(__name__)

EXPIRE_S = 30.0
_ANSWER_S = 5.0


class News:
    """Feeds the routes from the bus, cuts consoles whose session or right has ended, and tells portals who is there.
    `replica` names this process on the bus."""

    def __init__(self, routes: RouteTable, server: Server, stats: Stats, clock: Clock, bus: Bus, replica: str) -> None:
        self._routes = routes
        self._server = server
        self._stats = stats
        self._clock = clock
        self._bus = bus
        self._replica = replica

    def on_connect(self) -> None:
        """From now on heartbeats come in."""
        self._routes.listening(self._clock.monotonic())

    def on_delivery(self, delivery: Delivery) -> None:
        """Take one message; what can't be read or was sent by somebody else is dropped and counted."""
        try:
            self._take(delivery)
        except DecodeError as error:
            self._stats.dropped["unreadable"] += 1
            log.warning("a message from %s can't be read: %s", delivery.sender or "nobody", error)
        except WrongSender as error:
            self._stats.dropped["wrong_sender"] += 1
            log.warning("dropped: %s", error)
        delivery.ack()

    def _take(self, delivery: Delivery) -> None:
        message = decode(delivery.type, delivery.body)
        now = self._clock.monotonic()
        if isinstance(message, HostReport | HostBeat):
            for sid in self._routes.heartbeat(delivery.sender, message, now):
                self._server.cut(sid, message.host)
        elif isinstance(message, SessionChanged):
            if self._routes.announce(delivery.sender, message, now):
                self._server.cut(message.sid)
        elif isinstance(message, GrantRevoked | ConsolesAsked):
            if delivery.sender != PORTAL_LOGIN:
                raise WrongSender(f"a {delivery.type} from {delivery.sender or 'nobody'}")
            if isinstance(message, GrantRevoked):
                self._server.revoke(message.grant)
            else:
                self._list(message)
        else:
            raise WrongSender(f"a {delivery.type} from {delivery.sender or 'nobody'}, which no proxy takes")

    def _list(self, asked: ConsolesAsked) -> None:
        """Tell a portal who has a desktop open here. Those who have not are many, and silent."""
        consoles = self._server.consoles(asked.sid)
        if consoles and self._bus.connected:
            kind, body = encode(ConsolesListed(self._replica, asked.sid, consoles))
            answer = Outgoing(VIEWERS, asked.replica, kind, body, durable=False, mandatory=False, ttl_seconds=_ANSWER_S)
            self._bus.publish(answer)

    async def expire(self) -> None:
        """Forget old routes, now and then, until cancelled."""
        while True:
            await asyncio.sleep(EXPIRE_S)
            self._routes.expire(self._clock.monotonic())


def health(bus: Bus, routes: RouteTable, clock: Clock) -> Health:
    """Ready once every live host has had the time for a heartbeat. A broker that goes away later is named but changes
    nothing: known desktops can be opened without it."""
    reasons = []
    if not bus.connected:
        reasons.append("the broker is not connected")
    ready = routes.ready(clock.monotonic())
    if not ready:
        reasons.append("hosts have not had the time to report")
    return Health(ready, tuple(reasons))


class Figures(Collector):
    """The counts, read on the loop when somebody scrapes, so that being counted costs a tunnel nothing."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, server: Server, routes: RouteTable, stats: Stats, prefix: str
    ) -> None:
        self._loop, self._server, self._routes, self._stats = loop, server, routes, stats
        self._prefix = prefix

    def collect(self) -> Iterable[Metric]:
        """Called on the monitoring server's thread."""
        return asyncio.run_coroutine_threadsafe(self._read(), self._loop).result(5.0)

    async def _read(self) -> list[Metric]:
        stats, tunnels = self._stats, self._server.tunnels
        up, down = stats.up, stats.down
        for tunnel in tunnels:
            up, down = up + tunnel.moved[0], down + tunnel.moved[1]
        hosts, desktops = self._routes.size
        return [
            self._gauge("tunnels", "Consoles that are open", len(tunnels)),
            self._gauge("hosts", "Hosts with routes", hosts),
            self._gauge("desktops", "Desktops that full heartbeats have listed", desktops),
            self._counter("opened", "Consoles opened", "", {"": stats.opened}),
            self._counter(
                "bytes", "Bytes relayed: up from browsers, down from hosts", "direction", {"up": up, "down": down}
            ),
            self._counter("ended", "Consoles that have ended, by how", "ending", stats.endings),
            self._counter("refused", "Connections refused, by why", "reason", stats.refused),
            self._counter("dropped", "Messages of the bus dropped, by why", "reason", stats.dropped),
        ]

    def _gauge(self, name: str, text: str, value: int) -> Metric:
        return gauge_of(f"{self._prefix}_{name}", text, "", {"": value})

    def _counter(self, name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
        return counter_of(f"{self._prefix}_{name}", text, label, values)
