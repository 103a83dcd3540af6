"""The proxy's process: the real gate, routes, news and way of opening a console; the network behind it is simulated."""

from __future__ import annotations

import re
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sim.control import KEYS
from sim.host import Node, Vm
from sim.process import Clock, Process

from deskfleet.agent.console import TokenRefused
from deskfleet.proxy.gate import Gate
from deskfleet.proxy.handshake import HostAnswer, HostHandshake, accept
from deskfleet.proxy.refusals import Refusal
from deskfleet.proxy.routes import Route, RouteTable
from deskfleet.proxy.server import Limits, Server
from deskfleet.proxy.service import News
from deskfleet.proxy.stats import Stats
from deskfleet.schemas import topology
from deskfleet.schemas.tickets import Tickets

if TYPE_CHECKING:
    from sim.world import World

ORIGIN = "https://portal.test"
_HEAD = (
    "GET /console?ticket={} HTTP/1.1\r\nHost: portal.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\nOrigin: " + ORIGIN + "\r\n\r\n"
)
_REQUEST = re.compile(rb"GET /websockify\?token=([0-9a-f.]+) .*?Sec-WebSocket-Key: (\S+)\r\n", re.DOTALL | re.I)


@dataclass(eq=False)
class Viewer:
    """Somebody with a ticket, in place of a browser's socket."""

    ticket: str
    admitted_at: float
    opening: Coroutine[Any, Any, None] | None = None
    refused: str = ""


class Console:
    """An open console, in place of proxy/tunnel.py: no bytes, but who looks at what."""

    def __init__(self, relay: Any, route: Route, viewer: Viewer, leg: _HostLeg, on_close: Any) -> None:
        self.opened_at = relay.loop.time()
        self.route, self.viewer, self.vm = route, viewer, leg.vm
        self.ending: str | None = None
        self.moved = (0, 0)
        self._relay, self._on_close = relay, on_close

    def start(self, _first: bytes) -> None:
        if self.vm.exists:
            self._relay.opened(self)
        else:
            self.close("closed")  # its machine ended while the console was being opened

    def close(self, ending: str) -> None:
        if self.ending is None:
            self.ending = ending
            self._on_close(self)
            self._relay.closed(self)


class _Line:
    """The way to the hosts: dialling waits until the world lets it go on."""

    def __init__(self, nodes: dict[str, Node]) -> None:
        self._nodes = nodes

    async def open(self, route: Route, handshake: HostHandshake) -> tuple[_HostLeg, HostAnswer]:
        """proxy/dial.py's, with the real handshake on both sides."""
        await _Pause()
        found = _REQUEST.match(handshake.request)
        assert found, handshake.request
        vm: Vm | None = None
        try:
            vm = self._nodes[route.host].open_console(found[1].decode())
            lines = b"101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            lines += b"Sec-WebSocket-Accept: " + accept(found[2])
        except TokenRefused as refused:
            lines = b"%d No\r\nContent-Length: 0" % refused.status
        answer = handshake.feed(b"HTTP/1.1 " + lines + b"\r\n\r\n")
        assert answer and vm
        await _Pause()
        return _HostLeg(vm), answer


class _HostLeg:
    """A connection to a guest's display."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm

    def close(self) -> None:
        """Nothing to give back."""


class _Pause:
    def __await__(self) -> Generator[None]:
        yield


class Door(Process):
    """One proxy process."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(f"proxy-{number}", "proxy", world.broker, Clock(world.time), world.evidence)
        self.world = world
        self.opening: list[Viewer] = []
        self.consoles: list[Console] = []
        #: The sessions whose end this process was told.
        self.told_over: set[str] = set()
        self.gate: Gate
        self.routes: RouteTable
        self.server: Server

    def run(self) -> None:
        bus = self.connect(topology.for_proxy(self._replica))
        self.told_over = set()
        now = self.clock.monotonic
        loop = SimpleNamespace(time=now)
        relay = SimpleNamespace(loop=loop, opened=self._opened, closed=self._closed)
        self.gate = Gate("/console", frozenset({ORIGIN}), Tickets(KEYS, self.clock.wall))
        self.routes, stats = RouteTable(120.0, 10.0), Stats()
        line: Any = _Line(self.world.nodes)
        self.server = Server(self.gate, self.routes, line, relay, Limits(), stats, now)
        news = News(self.routes, self.server, stats, self.clock, bus, self._replica)
        bus.on_connect(news.on_connect)
        bus.consume(self.queue, news.on_delivery, prefetch=500)
        bus.every(30.0, lambda: self.routes.expire(now()))
        bus.start()

    @property
    def _replica(self) -> str:
        return f"{self.name.replace('-', '')}x{self.lives}"

    @property
    def queue(self) -> str:
        """Its queue on the broker."""
        return topology.proxy_queue(self._replica)

    def kill(self) -> None:
        super().kill()
        for viewer in self.opening:
            assert viewer.opening
            viewer.opening.close()
        self.opening.clear()
        for console in list(self.consoles):
            self._closed(console)

    # --- viewers --------------------------------------------------------------------------------------------

    def knock(self, ticket: str) -> str:
        """A browser comes with a ticket; it gets as far as the host is dialled."""
        if not self.alive or self.paused:
            return "no answer"
        viewer = Viewer(ticket, self.world.time.wall())
        try:
            admission = self.gate.admit(_HEAD.format(ticket).encode(), "192.0.2.7")
        except Refusal as refusal:
            return refusal.reason
        viewer.opening = self.server._open(viewer, admission)
        self.opening.append(viewer)
        word = self.go_on(viewer)
        if word == "opening":
            self.world.evidence.let_in(self, admission.ticket.sid)
        return word

    def go_on(self, viewer: Viewer) -> str:
        """The network moves one step for a viewer."""
        assert viewer.opening
        try:
            viewer.opening.send(None)
            return "opening"
        except StopIteration:
            self.opening.remove(viewer)
            return "open"
        except Refusal as refusal:
            self.opening.remove(viewer)
            return refusal.reason

    def _opened(self, console: Console) -> None:
        self.consoles.append(console)
        self.world.evidence.opened(self, console)
        self._tell(console.vm)

    def _closed(self, console: Console) -> None:
        if console in self.consoles:
            self.consoles.remove(console)
            self._tell(console.vm)

    def _tell(self, vm: Vm) -> None:
        for node in self.world.nodes.values():
            if node.vms.get(vm.sid) is vm:
                node.count_viewers(vm)

    def looking_at(self, vm: Vm) -> int:
        """How many consoles are open on a machine."""
        return sum(console.vm is vm for console in self.consoles)

    def guest_gone(self, vm: Vm) -> None:
        """A machine closed its end."""
        for console in [console for console in self.consoles if console.vm is vm]:
            console.close("closed")

    def leave(self, number: int) -> None:
        """A viewer closes the window."""
        if self.consoles:
            self.consoles[number % len(self.consoles)].close("closed")
