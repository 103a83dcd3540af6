"""A running proxy server without a process: real sockets, one host that does as it is told, everything on one loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from support.consoles import GRANT, KEYS, ORIGIN, WS_KEY, head, report, ticket

from deskfleet.proxy.dial import Dialler
from deskfleet.proxy.gate import Gate
from deskfleet.proxy.handshake import accept
from deskfleet.proxy.routes import RouteTable
from deskfleet.proxy.server import Limits, Server
from deskfleet.proxy.stats import Stats
from deskfleet.proxy.tunnel import Relay
from deskfleet.schemas.host import Phase
from deskfleet.schemas.tickets import Tickets

S, T = "a" * 32, "b" * 32
PATIENCE = 60.0
GRANTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: " + accept(WS_KEY.encode()) + b"\r\nSec-WebSocket-Protocol: binary\r\n\r\n"
)


@dataclass
class Host:
    """A host's console port. It notes each request head, answers `says`, and echoes."""

    says: bytes = GRANTED
    pause: asyncio.Event | None = None
    heads: list[bytes] = field(default_factory=list)
    got: bytearray = field(default_factory=bytearray)
    serving: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            if self.pause:
                await self.pause.wait()
            writer.write(self.says)
            while data := await reader.read(65536):
                self.got += data
                writer.write(data)
                await writer.drain()
        writer.close()
        self.serving -= 1


@dataclass
class Stage:
    """A running proxy and one host."""

    server: Server
    routes: RouteTable
    stats: Stats
    host: Host
    port: int
    host_port: int
    seq: int = 1
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def hear(self, guests: dict[str, tuple[int, Phase]], console: str = "") -> None:
        self.seq += 1
        address = console or f"127.0.0.1:{self.host_port}"
        told = report("h1", guests, self.seq, console=address, last_generation=9)
        for sid in self.routes.heartbeat("agent-h1", told, time.monotonic()):
            self.server.cut(sid, "h1")

    async def open(
        self, data: bytes | None = None, port: int = 0, address: str = "127.0.0.1"
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(address, port or self.port)
        self.writers.append(writer)
        writer.write(request() if data is None else data)
        return reader, writer

    async def connect(self, sid: str = S, grant: str = GRANT) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await self.open(request(sid, grant=grant))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        return reader, writer

    async def refused(self, data: bytes | None = None) -> tuple[int, str]:
        """Status and reason of the answer, which must be whole and be followed by the end."""
        reader, writer = await self.open(data)
        answer = await reader.read()
        writer.close()
        top, _, body = answer.partition(b"\r\n\r\n")
        document = json.loads(body)
        assert document["message"].endswith(".")
        return int(top.split()[1]), document["reason"]


def request(sid: str = S, generation: int = 7, host: str = "h1", grant: str = GRANT, **changes: str) -> bytes:
    return head(f"/console?ticket={Tickets(KEYS).sign(ticket(sid, generation, host, grant=grant))}", **changes)


@contextlib.asynccontextmanager
async def stage(
    limits: Limits | None = None,
    host: Host | None = None,
    dial_s: float = PATIENCE,
    plain_anywhere: bool = False,
    address: str = "127.0.0.1",
) -> AsyncIterator[Stage]:
    loop = asyncio.get_running_loop()
    host = host or Host()
    listener = await asyncio.start_server(host.serve, "127.0.0.1", 0)
    routes, stats = RouteTable(600.0, 0.0), Stats()
    routes.listening(time.monotonic())
    gate = Gate("/console", frozenset({ORIGIN}), Tickets(KEYS))
    dialler = Dialler(None, plain_anywhere, dial_s)
    server = Server(gate, routes, dialler, Relay(loop, PATIENCE), limits or Limits(), stats, time.monotonic)
    port = server.listen(address, 0)
    made = Stage(server, routes, stats, host, port, listener.sockets[0].getsockname()[1])
    made.hear({S: (7, Phase.RUNNING), T: (8, Phase.RUNNING)})
    try:
        yield made
    finally:
        server.stop_accepting()
        await server.drain(0.0, asyncio.Event())
        listener.close()
        for writer in made.writers:
            writer.close()
        if host.pause:
            host.pause.set()
        await until(lambda: not host.serving)


def play(act: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(act(), PATIENCE)

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)
