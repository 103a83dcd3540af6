"""The relay: opaque bytes between a browser and a host, with back-pressure.

Readiness callbacks, one shared buffer and plain send calls. asyncio's streams were rejected (3.6 times the CPU per
byte), transports too (from Python 3.12 on they keep the buffer instead of copying it), uvloop as well (0.23 aborts
under churn), and splice: it can't be used once the host's leg is TLS, which is the rule.

Each direction reads only when everything read before has left, so it holds one buffer at most. The browser's leg is
plain (TLS ends in front of the proxy); the host's leg is TLS or, on loopback, plain.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Literal

from deskfleet.proxy.routes import Route
from deskfleet.proxy.tls import TlsSocket

BUFFER = 256 * 1024
#: A peer that takes no byte and answers no probe for so long is gone (ms, TCP_USER_TIMEOUT of tcp(7)).
USER_TIMEOUT_MS = 60_000
_ABORT = struct.pack("ii", 1, 0)  # struct linger: on, 0 s

#: Why a tunnel ended: a label of the metrics.
Ending = Literal["closed", "reset", "half_closed", "cut", "drained"]


def tune(sock: socket.socket) -> None:
    """Set what both legs need: no Nagle delay on tiny key and pointer events, and an end to dead peers."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)


class _Leg:
    """One socket of a tunnel and what the loop watches on it. `inbound` reads from it, `outbound` writes to it."""

    __slots__ = ("fd", "inbound", "loop", "outbound", "reading", "receive", "send", "sock", "writing")
    inbound: _Pump
    outbound: _Pump
    receive: Callable[[memoryview], int]
    send: Callable[[bytes | memoryview], int]

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket | TlsSocket) -> None:
        self.loop, self.sock, self.fd = loop, sock, sock.fileno()
        self.receive, self.send = sock.recv_into, sock.send
        self.reading = self.writing = False

    def writes(self) -> bool:
        return self.outbound.rest is not None

    def ended(self) -> bool:
        """Whether the end is known here before the kernel tells."""
        return False

    def readable(self) -> None:
        self.inbound.step()

    def writable(self) -> None:
        self.outbound.flush()

    def watch(self) -> None:
        """Bring what the loop watches into line with what the two pumps wait for."""
        if self.fd < 0:
            return
        read, write = self.inbound.reads(), self.writes()
        if read is not self.reading:
            self.reading = read
            if read:
                self.loop.add_reader(self.fd, self.readable)
            else:
                self.loop.remove_reader(self.fd)
        if write is not self.writing:
            self.writing = write
            if write:
                self.loop.add_writer(self.fd, self.writable)
            else:
                self.loop.remove_writer(self.fd)

    def end_writing(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)  # type: ignore[union-attr]  # of this class it is a plain socket

    def close(self, abort: bool) -> None:
        self.loop.remove_reader(self.fd)
        self.loop.remove_writer(self.fd)
        self.fd = -1
        if abort:  # what the kernel still holds is thrown away
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
        self.sock.close()


class _TlsLeg(_Leg):
    """A leg with TLS: it may have encrypted bytes to send although its pump has none."""

    __slots__ = ()
    sock: TlsSocket

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: TlsSocket) -> None:
        super().__init__(loop, sock)
        self.send = self._send

    def _send(self, data: bytes | memoryview) -> int:
        taken = self.sock.send(data)
        if self.sock.unsent:
            self.watch()
        return taken

    def writes(self) -> bool:
        return self.sock.unsent or super().writes()

    def ended(self) -> bool:
        return self.sock.ended

    def readable(self) -> None:
        self.inbound.step()
        self.watch()

    def writable(self) -> None:
        self.outbound.flush()
        self.watch()

    def end_writing(self) -> None:
        self.sock.end_writing()
        self.watch()


class _Pump:
    """One direction. `rest` is what the destination has not taken yet; while there is any, nothing is read."""

    __slots__ = ("dst", "moved", "over", "rest", "src", "tunnel")

    def __init__(self, tunnel: Tunnel, src: _Leg, dst: _Leg) -> None:
        self.tunnel, self.src, self.dst = tunnel, src, dst
        self.moved = 0
        self.over = False
        self.rest: bytes | None = None

    def reads(self) -> bool:
        return self.rest is None and not self.over

    def step(self) -> None:
        """Move what is there, up to a buffer."""
        buffer = self.tunnel.relay.buffer
        while True:
            try:
                count = self.src.receive(buffer)
            except BlockingIOError:
                return
            except OSError:
                self.tunnel.close("reset")
                return
            if not count:
                self._finish()
                return
            try:
                sent = self.dst.send(buffer[:count])
            except BlockingIOError:
                sent = 0
            except OSError:
                self.tunnel.close("reset")
                return
            self.moved += count
            if sent < count:
                self.rest = bytes(buffer[sent:count])
                self.src.watch()
                self.dst.watch()
                return
            if not self.src.ended():
                return

    def flush(self) -> None:
        """Send more of the rest; when all of it has left, read again."""
        rest = self.rest or b""
        try:
            sent = self.dst.send(rest)
        except BlockingIOError:
            return
        except OSError:
            self.tunnel.close("reset")
            return
        self.rest = rest[sent:] or None
        if self.rest is None:
            self.dst.watch()
            self.src.watch()
            if self.src.ended():
                self.step()

    def _finish(self) -> None:
        self.over = True
        self.src.watch()
        with contextlib.suppress(OSError):  # already gone; the next read says so
            self.dst.end_writing()
        self.tunnel.half_closed()


class Tunnel:
    """An open console. It lives until both sides have closed, one of them fails, or `close` is called."""

    __slots__ = ("_client", "_down", "_host", "_timer", "_up", "ending", "on_close", "opened_at", "relay", "route")

    def __init__(
        self,
        relay: Relay,
        route: Route,
        client: socket.socket,
        host: socket.socket | TlsSocket,
        on_close: Callable[[Tunnel], None],
    ) -> None:
        self.relay, self.route, self.on_close = relay, route, on_close
        self.opened_at = relay.loop.time()
        self.ending: Ending | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._client = _Leg(relay.loop, client)
        self._host = _TlsLeg(relay.loop, host) if isinstance(host, TlsSocket) else _Leg(relay.loop, host)
        self._up = _Pump(self, self._client, self._host)
        self._down = _Pump(self, self._host, self._client)
        self._client.inbound = self._host.outbound = self._up
        self._host.inbound = self._client.outbound = self._down

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes taken from the browser and from the host so far."""
        return self._up.moved, self._down.moved

    def start(self, first: bytes) -> None:
        """Send `first` to the browser (our 101 and what the host said since), then relay."""
        self._down.rest = first
        self._down.flush()
        self._client.watch()
        self._host.watch()

    def half_closed(self) -> None:
        """One direction has ended; the other gets a limited time, as a dead peer never ends it."""
        if self._up.over and self._down.over:
            self.close("closed")
        elif self._timer is None:
            self._timer = self.relay.loop.call_later(self.relay.half_close_s, self.close, "half_closed")

    def close(self, ending: Ending) -> None:
        """Close both sides at once. After "cut" the host's kernel sends nothing more, not even what it was given.

        Our side can't send a WebSocket close frame: it does not know where in the stream a frame ends.
        """
        if self.ending is not None:
            return
        self.ending = ending
        if self._timer:
            self._timer.cancel()
        self._host.close(abort=ending == "cut")
        self._client.close(abort=False)
        for pump in (self._up, self._down):
            pump.over, pump.rest = True, None
        self.on_close(self)


class Relay:
    """What all tunnels of a process share."""

    def __init__(self, loop: asyncio.AbstractEventLoop, half_close_s: float) -> None:
        self.loop = loop
        self.half_close_s = half_close_s
        self.buffer = memoryview(bytearray(BUFFER))
