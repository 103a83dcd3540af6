"""The listener and the life of a connection: head, admission, host, tunnel. Knows neither bus nor settings file.

Everything runs on one asyncio loop. A connection is a task until its tunnel starts; a running tunnel is no task, only
callbacks, which keeps an idle console near one KiB.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from deskfleet.proxy.dial import Dialler
from deskfleet.proxy.gate import Admission, Gate
from deskfleet.proxy.handshake import MAX_HEAD, HostHandshake, complete, switching
from deskfleet.proxy.refusals import Refusal, Refused, answer
from deskfleet.proxy.routes import RouteTable
from deskfleet.proxy.stats import Stats
from deskfleet.proxy.tunnel import Ending, Relay, Tunnel, tune
from deskfleet.runtime.log import context
from deskfleet.schemas.messages import Console
from deskfleet.schemas.tickets import LIFETIME_S, SKEW_S, Ticket

log = logging.getLogger(__name__)

BACKLOG = 4096
_ACCEPTS_AT_ONCE = 64
_LINGER_S = 2.0
_TICKET_S = 2.0 * (LIFETIME_S + SKEW_S)
#: accept(2) fails with these while the process or the machine is short of something; trying at once would spin.
_SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True)
class Limits:
    """`tunnels` counts open and opening consoles, `per_session` those of one desktop, `heads` connections that have
    not shown a request yet. Times in seconds."""

    tunnels: int = 4000
    per_session: int = 8
    heads: int = 512
    head_s: float = 10.0


class Server:
    """Accepts browsers, and holds the open tunnels by session."""

    def __init__(
        self,
        gate: Gate,
        routes: RouteTable,
        dialler: Dialler,
        relay: Relay,
        limits: Limits,
        stats: Stats,
        now: Callable[[], float],
    ) -> None:
        self._gate, self._routes, self._dialler, self._relay = gate, routes, dialler, relay
        self._limits, self._stats, self._now = limits, stats, now
        self._loop = relay.loop
        self._listeners: list[socket.socket] = []
        #: Tasks that hold a connection without a right to it yet, or no more; the oldest first.
        self._waiting: dict[asyncio.Task[None] | None, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._taken: Counter[str] = Counter()
        self._tunnels: dict[str, dict[Tunnel, Ticket]] = {}
        #: Grants that were revoked lately, and when: a ticket that was signed before may still come.
        self._revoked: dict[str, float] = {}

    def listen(self, host: str, port: int) -> int:
        """Start accepting on an address (a literal, IPv4 or IPv6, zone allowed; [::] means both); return the port.

        With SO_REUSEPORT a new process can take over while the old one drains.
        """
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, number)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(BACKLOG)
        self._listeners.append(listener)
        self._loop.add_reader(listener, self._accept, listener)
        return int(listener.getsockname()[1])

    @property
    def tunnels(self) -> list[Tunnel]:
        """The open tunnels."""
        return [tunnel for group in self._tunnels.values() for tunnel in group]

    def cut(self, sid: str, host: str | None = None) -> int:
        """Close the consoles of a session at once, only those on `host` if given; return how many."""
        doomed = [tunnel for tunnel in self._tunnels.get(sid, ()) if host in (None, tunnel.route.host)]
        for tunnel in doomed:
            tunnel.close("cut")
        return len(doomed)

    def revoke(self, grant: str) -> int:
        """Close what was opened by a grant, and open nothing by it any more; return how many were closed."""
        now = self._now()
        self._revoked = {known: at for known, at in self._revoked.items() if now - at < _TICKET_S} | {grant: now}
        doomed = [tunnel for group in self._tunnels.values() for tunnel, by in group.items() if by.grant == grant]
        for tunnel in doomed:
            tunnel.close("cut")
        return len(doomed)

    def consoles(self, sid: str) -> tuple[Console, ...]:
        """The open consoles of a session."""
        now = self._loop.time()
        group = self._tunnels.get(sid, {})
        return tuple(Console(by.user, by.grant, now - tunnel.opened_at) for tunnel, by in group.items())

    def stop_accepting(self) -> None:
        """Close the listeners; what waits in their queues is accepted first, as closing would reset it."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            while self._accept(listener):
                pass
            listener.close()
        self._listeners.clear()

    async def drain(self, seconds: float, hurry: asyncio.Event) -> None:
        """After `stop_accepting`: let consoles live until they end by themselves, `seconds` have passed, or `hurry`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while (self._tasks or self._tunnels) and not hurry.is_set():
                    await asyncio.sleep(0.05)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for tunnel in self.tunnels:
            tunnel.close("drained")

    def _accept(self, listener: socket.socket) -> bool:
        """Accept a batch; whether there may be more."""
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in _SHORTAGE:
                    log.error("cannot accept connections: %s", error)
                    self._loop.remove_reader(listener)
                    self._loop.call_later(1.0, self._accept_again, listener)
                    return False
                continue  # that one connection failed (accept(2) passes its errors on)
            try:
                tune(sock)
            except OSError:
                sock.close()
                continue
            self._begin(sock, address[0])
        return True

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    def _begin(self, sock: socket.socket, peer: str) -> None:
        # A browser's head is here within milliseconds. When too many connections dawdle, the one that has done so
        # the longest goes, so that any number of slow ones never keeps a prompt one out.
        if len(self._waiting) >= self._limits.heads:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            if oldest:
                oldest.cancel()
        task = self._loop.create_task(self._serve(sock, peer))
        self._tasks.add(task)
        self._waiting[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._waiting.pop(task, None)
        if not task.cancelled() and task.exception():
            log.error("a connection failed inside the proxy", exc_info=task.exception())

    async def _serve(self, sock: socket.socket, peer: str) -> None:
        handed_over = False
        admission: Admission | None = None
        task = asyncio.current_task()
        try:
            head = await self._read_head(sock)
            admission = self._gate.admit(head, peer)
            self._waiting.pop(task, None)
            await self._open(sock, admission)
            handed_over = True
        except Refusal as refusal:
            self._stats.refused[refusal.reason] += 1
            with context(sid=admission.ticket.sid if admission else None):
                log.info("refused %s: %s", peer, refusal)
            self._waiting[task] = None
            await self._say(sock, answer(refusal))
        except OSError:
            pass  # the browser has gone
        finally:
            if not handed_over:
                sock.close()

    async def _read_head(self, sock: socket.socket) -> bytes:
        data = b""
        try:
            async with asyncio.timeout(self._limits.head_s):
                while not complete(data):
                    chunk = await self._loop.sock_recv(sock, MAX_HEAD + 1 - len(data))
                    if not chunk:
                        raise ConnectionResetError
                    data += chunk
        except TimeoutError:
            raise Refusal(Refused.HEAD_TIMEOUT) from None
        except asyncio.CancelledError:
            self._stats.refused[Refused.PROXY_FULL] += 1
            with contextlib.suppress(OSError):
                sock.send(answer(Refusal(Refused.PROXY_FULL)))
            raise
        return data

    async def _open(self, sock: socket.socket, admission: Admission) -> None:
        ticket = admission.ticket
        self._check_grant(ticket)
        route = self._routes.find(ticket.sid, ticket.generation, ticket.host, self._now())
        if self._taken.total() >= self._limits.tunnels:
            raise Refusal(Refused.PROXY_FULL)
        if self._taken[ticket.sid] >= self._limits.per_session:
            raise Refusal(Refused.SESSION_FULL)
        self._taken[ticket.sid] += 1
        try:
            handshake = HostHandshake(
                route.address, f"{ticket.sid}.{ticket.nonce}", admission.upgrade, str(admission.client)
            )
            host, granted = await self._dialler.open(route, handshake)
            try:
                # The session may have ended, or moved, while the host was asked.
                if self._routes.find(ticket.sid, ticket.generation, ticket.host, self._now()) != route:
                    raise Refusal(Refused.SESSION_MOVED)
                self._check_grant(ticket)
            except Refusal:
                host.close()
                raise
        except BaseException:
            self._release(ticket.sid)
            raise
        tunnel = Tunnel(self._relay, route, sock, host, self._closed)
        self._tunnels.setdefault(ticket.sid, {})[tunnel] = ticket
        self._stats.opened += 1
        with context(sid=route.sid, host=route.host):
            log.info("console %d opened by %s from %s", route.generation, ticket.user, admission.client)
        tunnel.start(switching(admission.upgrade, granted) + granted.early)

    def _check_grant(self, ticket: Ticket) -> None:
        if ticket.grant in self._revoked:
            raise Refusal(Refused.REVOKED)

    def _closed(self, tunnel: Tunnel) -> None:
        sid = tunnel.route.sid
        group = self._tunnels[sid]
        del group[tunnel]
        if not group:
            del self._tunnels[sid]
        self._release(sid)
        up, down = tunnel.moved
        ending: Ending = tunnel.ending or "closed"
        self._stats.ended(ending, up, down)
        seconds = round(self._loop.time() - tunnel.opened_at, 1)
        with context(sid=sid, host=tunnel.route.host):
            log.info("console closed (%s) after %s s: %d bytes up, %d down", ending, seconds, up, down)

    def _release(self, sid: str) -> None:
        self._taken[sid] -= 1
        if not self._taken[sid]:
            del self._taken[sid]

    async def _say(self, sock: socket.socket, text: bytes) -> None:
        """Send a last word, and read on for a moment: closing with unread bytes would reset it away."""
        with contextlib.suppress(OSError):  # gone, or too slow (TimeoutError is an OSError)
            async with asyncio.timeout(_LINGER_S):
                await self._loop.sock_sendall(sock, text)
                sock.shutdown(socket.SHUT_WR)
                for _ in range(64):
                    if not await self._loop.sock_recv(sock, MAX_HEAD):
                        break
