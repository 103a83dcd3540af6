"""Load for the console benchmark: a far end that echoes and streams, clients that measure, and /proc accounting.

Everything is counted in records of 64 payload bytes from the client (one masked frame each): "P…" is echoed, "S" +
uint32 starts an endless stream of frames of that size. The far end speaks WebSocket, as a host does, or bare records,
as a display behind websockify does. No Python object is made for a frame, so that the load stays cheaper than what it
measures.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import ssl
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from deskfleet.proxy.handshake import accept

RECORD = 64
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
GRANTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Protocol: binary\r\nSec-WebSocket-Accept: " + accept(KEY) + b"\r\n\r\n"
)


# --- accounting ---------------------------------------------------------------------------------------------------


def tree(pids: Iterable[int]) -> list[int]:
    """The processes and all that descend from them."""
    found: list[int] = []
    todo = list(pids)
    while todo:
        pid = todo.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                todo += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
            found.append(pid)
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time used by every thread of the processes and their living descendants (proc(5), schedstat)."""
    total = 0
    for pid in tree(pids):
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9


def pss_kib(pids: Iterable[int]) -> int:
    """Proportional set size: what the processes cost, shared pages divided among those who share them."""
    total = 0
    for pid in tree(pids):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total


# --- frames -------------------------------------------------------------------------------------------------------


def frame(payload: bytes, masked: bool = False) -> bytes:
    """One binary WebSocket frame (RFC 6455 section 5.2); the mask is zero."""
    size, bit = len(payload), 0x80 if masked else 0
    if size < 126:
        head = struct.pack("!BB", 0x82, bit | size)
    elif size < 65536:
        head = struct.pack("!BBH", 0x82, bit | 126, size)
    else:
        head = struct.pack("!BBQ", 0x82, bit | 127, size)
    return head + (b"\0\0\0\0" if masked else b"") + payload


PING = frame(b"P".ljust(RECORD, b"."), masked=True)
PONG = frame(b"P".ljust(RECORD, b"."))


def stream_order(size: int) -> bytes:
    return frame((b"S" + struct.pack("<I", size)).ljust(RECORD, b"."), masked=True)


# --- the far end --------------------------------------------------------------------------------------------------


class _Peer:
    """One connection of the far end."""

    def __init__(self, sock: socket.socket, bare: bool) -> None:
        self.sock, self.bare = sock, bare
        self.head = not bare
        self.unit = RECORD if bare else RECORD + 6
        self.inbox = b""
        self.out: bytes | memoryview = b""
        self.stream: memoryview | None = None

    def take(self, data: bytes) -> None:
        self.inbox += data
        if self.head and b"\r\n\r\n" in self.inbox:
            self.inbox = self.inbox.split(b"\r\n\r\n", 1)[1]
            self.out, self.head = GRANTED, False
        if not self.bare and not self.head and self.inbox and self.inbox[0] & 15 == 8:
            raise ConnectionError("closed")
        while not self.head and len(self.inbox) >= self.unit:
            record, self.inbox = self.inbox[: self.unit], self.inbox[self.unit :]
            if not self.bare:  # the clients' masks are zero, the proxies change nothing
                record = record[6:]
            if record[:1] == b"S":
                payload = bytes(struct.unpack("<I", record[1:5])[0])
                self.stream = memoryview(payload if self.bare else frame(payload))
            else:
                self.out = bytes(self.out) + (record if self.bare else frame(record))

    def push(self) -> None:
        if self.out:
            self.out = self.out[self.sock.send(self.out) :]
        if not self.out and self.stream:
            self.out = self.stream[self.sock.send(self.stream) :]

    def busy(self) -> bool:
        return bool(self.out) or self.stream is not None


def far_end(listener: socket.socket, bare: bool) -> None:
    """Serve for ever on one thread."""
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    peers: dict[int, _Peer] = {}
    while True:
        for fd, event in poll.poll():
            if fd == listener.fileno():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sock, _ = listener.accept()
                        sock.setblocking(False)
                        if sock.family != socket.AF_UNIX:
                            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        peers[sock.fileno()] = _Peer(sock, bare)
                        poll.register(sock, select.EPOLLIN)
                continue
            peer = peers[fd]
            try:
                if event & ~select.EPOLLOUT:
                    data = peer.sock.recv(65536)
                    if not data:
                        raise ConnectionError("closed")
                    peer.take(data)
                peer.push()
            except BlockingIOError:
                pass
            except OSError:
                poll.unregister(fd)
                peers.pop(fd).sock.close()
                continue
            poll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if peer.busy() else 0))


def tls_far_end(listener: socket.socket, context: ssl.SSLContext) -> None:
    """The same under TLS, a thread a connection: OpenSSL's blocking calls are the cheapest here."""

    def serve(plain: socket.socket) -> None:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as sock:
            peer = _Peer(sock, bare=False)
            while data := sock.recv(65536):
                peer.take(data)
                if peer.out:
                    sock.sendall(peer.out)
                    peer.out = b""
                while peer.stream:
                    sock.sendall(peer.stream)

    threading.stack_size(256 * 1024)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


# --- clients ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What is measured: where it listens, how number n asks for its console, and whose CPU and memory are charged."""

    name: str
    port: int
    target: Callable[[int], str]
    pids: tuple[int, ...] = ()


def connect(target: Target, number: int = 0) -> socket.socket:
    """An open WebSocket."""
    sock = socket.create_connection(("127.0.0.1", target.port), timeout=60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(
        b"GET " + target.target(number).encode() + b" HTTP/1.1\r\nHost: portal.example\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: " + KEY + b"\r\nOrigin: https://portal.example\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: binary\r\n\r\n"
    )
    head = b""
    while b"\r\n\r\n" not in head:
        part = sock.recv(4096)
        if not part:
            break
        head += part
    if not head.startswith(b"HTTP/1.1 101 "):
        sock.close()
        raise ConnectionError(f"{target.name} refuses: {head[:300]!r}")
    return sock


def echo(sock: socket.socket) -> None:
    """One record there and back."""
    sock.sendall(PING)
    left = len(PONG)
    while left:
        part = sock.recv(left)
        if not part:
            raise ConnectionError("closed instead of an echo")
        left -= len(part)


def bulk(target: Target, streams: int, seconds: float, size: int = 65536) -> dict[str, float]:
    """Endless streams as fast as they go: MB/s over all, and CPU seconds of the target for a GB."""
    socks = [connect(target, number) for number in range(streams)]
    poll = select.epoll()
    by_fd = {sock.fileno(): sock for sock in socks}
    for sock in socks:
        sock.sendall(stream_order(size))
        sock.setblocking(False)
        poll.register(sock, select.EPOLLIN)
    buffer = bytearray(1 << 18)
    total, begun, cpu, warm = 0, 0.0, 0.0, time.monotonic() + 0.4
    while True:
        now = time.monotonic()
        if not begun and now > warm:
            begun, total, cpu = now, 0, cpu_seconds(target.pids)
        if begun and now - begun > seconds:
            break
        for fd, _ in poll.poll(0.2):
            count = by_fd[fd].recv_into(buffer)
            if not count:
                raise ConnectionError(f"{target.name} closed a stream")
            total += count
    cpu, passed = cpu_seconds(target.pids) - cpu, time.monotonic() - begun
    for sock in socks:
        sock.close()
    return {"mb_s": total / passed / 1e6, "cpu_s_gb": cpu / (total / 1e9)}


def ping(target: Target, count: int) -> dict[str, float]:
    """One record after the other: microseconds for a round trip, and the target's CPU for it."""
    with connect(target) as sock:
        for _ in range(50):
            echo(sock)
        times, cpu = [], cpu_seconds(target.pids)
        for _ in range(count):
            begun = time.perf_counter()
            echo(sock)
            times.append((time.perf_counter() - begun) * 1e6)
        cpu = cpu_seconds(target.pids) - cpu
    quantiles = statistics.quantiles(times, n=100)
    return {"p50_us": statistics.median(times), "p99_us": quantiles[98], "cpu_us_echo": cpu / count * 1e6}


def setup(target: Target, count: int) -> dict[str, float]:
    """Connect, upgrade, one echo, close, one after the other: milliseconds for each."""
    times = []
    for number in range(count):
        begun = time.perf_counter()
        with connect(target, number) as sock:
            echo(sock)
        times.append((time.perf_counter() - begun) * 1e3)
    return {"open_ms": statistics.median(times)}


def idle(target: Target, count: int) -> dict[str, float]:
    """Open consoles that do nothing: KiB for each, and how many of them still answer."""
    before, socks = pss_kib(target.pids), []
    try:
        socks = [connect(target, number) for number in range(count)]
        held = pss_kib(target.pids) - before
        cpu, begun = cpu_seconds(target.pids), time.monotonic()
        time.sleep(1.0)
        busy = (cpu_seconds(target.pids) - cpu) / (time.monotonic() - begun)
        for sock in socks:
            echo(sock)
        used = pss_kib(target.pids) - before
    finally:
        for sock in socks:
            sock.close()
    return {"idle_kib": held / count, "used_kib": used / count, "alive": len(socks), "idle_cores": busy}


def main() -> None:
    """Be a far end, in a process of its own."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--unix", default="", help="speak bare records on this socket")
    parser.add_argument("--tls", nargs=3, metavar=("CERT", "KEY", "CA"))
    options = parser.parse_args()
    if options.unix:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(options.unix)
    else:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", options.port))
    listener.listen(4096)
    if options.tls:
        from deskfleet.agent.console import server_context

        tls_far_end(listener, server_context(*options.tls))
    far_end(listener, bare=bool(options.unix))


if __name__ == "__main__":
    main()
