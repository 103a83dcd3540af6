"""The relay on real sockets: exact bytes, back-pressure, half close, cut; plain and TLS."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import select
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.consoles import Authority

from deskfleet.proxy.dial import client_context
from deskfleet.proxy.routes import Route
from deskfleet.proxy.tls import CHUNK, TlsSocket
from deskfleet.proxy.tunnel import BUFFER, Relay, Tunnel, tune

ROUTE = Route("a" * 32, 7, "h1", "127.0.0.1:1")
BIG = 100 * 1024 * 1024
LIMIT = 120.0
Contexts = tuple[ssl.SSLContext, ssl.SSLContext] | None


def tcp_pair(narrow: bool = False) -> tuple[socket.socket, socket.socket]:
    """A connection; a narrow one takes a few KiB from its second end before it wants the first to read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.socket()
        if narrow:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
        if narrow:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return near, far


def shaken(sock: TlsSocket) -> bool:
    try:
        sock.do_handshake()
    except BlockingIOError:
        return False
    return True


class Bench:
    """A tunnel with the test at both ends: `browser` and `host` are blocking sockets."""

    def __init__(self, relay: Relay, contexts: Contexts, narrow: bool) -> None:
        self.browser, near = tcp_pair(narrow)
        self.host, plain = tcp_pair()
        for sock in (near, plain):
            tune(sock)
        far: socket.socket | TlsSocket = plain
        if contexts:
            server, client = contexts
            far = tls = TlsSocket(plain, client, "h1")
            box: list[ssl.SSLSocket] = []
            raw = self.host
            thread = threading.Thread(target=lambda: box.append(server.wrap_socket(raw, server_side=True)))
            thread.start()
            while not shaken(tls):
                select.select([tls], [], [], LIMIT)
            thread.join()
            self.host = box[0]
        for sock in (self.browser, self.host):
            sock.settimeout(LIMIT)
        self.endings: list[str | None] = []
        self.tunnel = Tunnel(relay, ROUTE, near, far, lambda tunnel: self.endings.append(tunnel.ending))

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.tunnel.close("drained")
        self.browser.close()
        self.host.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(params=["plain", "tls"])
def contexts(request: pytest.FixtureRequest, authority: Authority, tmp_path: Path) -> Contexts:
    if request.param == "plain":
        return None
    host, proxy = authority.issue("h1", "serverAuth"), authority.issue("proxy", "clientAuth")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(cafile=authority.ca)
    server.load_cert_chain(host.cert, host.key)
    return server, client_context(authority.ca, proxy.cert, proxy.key)


def play(
    contexts: Contexts, act: Callable[[Bench], Awaitable[None]], half_close_s: float = LIMIT, narrow: bool = False
) -> None:
    async def run() -> None:
        relay = Relay(asyncio.get_running_loop(), half_close_s)
        with Bench(relay, contexts, narrow) as bench:
            await asyncio.wait_for(act(bench), LIMIT)

    asyncio.run(run())


def end_writing(sock: socket.socket) -> None:
    """Half close as the kind of socket does it; what the peer sends meanwhile must not get lost."""
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(0)
        with contextlib.suppress(ssl.SSLWantReadError):
            sock.unwrap()
        sock.settimeout(LIMIT)
    else:
        sock.shutdown(socket.SHUT_WR)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    # A TLS socket that has sent close_notify before says the end like this.
    with contextlib.suppress(ssl.SSLZeroReturnError):
        while part := sock.recv(1 << 16):
            data += part
    return bytes(data)


def pattern(seed: bytes, length: int) -> Callable[[int], bytes]:
    """Blocks that differ from each other, so that a lost, doubled or swapped one shows."""
    base = hashlib.shake_128(seed).digest(1 << 20)
    return lambda number: number.to_bytes(8, "big") + base[8 : min(1 << 20, length - (number << 20))]


def exchange(sock: socket.socket, blocks: Callable[[int], bytes]) -> str:
    """Send BIG bytes and receive as many at once, on one thread, as OpenSSL wants it; the digest of what came."""
    sock.setblocking(False)
    state, left, number, out = hashlib.sha256(), BIG, 0, memoryview(blocks(0))
    while left or out:
        moved = False
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            part = sock.recv(1 << 18) if left else b""
            assert part or not left, "closed early"
            state.update(part)
            left -= len(part)
            moved = bool(part)
        with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError):
            sent = sock.send(out) if out else 0
            out = out[sent:]
            moved = moved or bool(sent)
            if not out and number + 1 < BIG >> 20:
                number += 1
                out = memoryview(blocks(number))
        if not moved:
            assert any(select.select([sock] if left else [], [sock] if out else [], [], LIMIT)), "stalled"
    return state.hexdigest()


def test_100_mib_each_way_arrive_byte_for_byte(contexts: Contexts) -> None:
    def expected(blocks: Callable[[int], bytes]) -> str:
        state = hashlib.sha256()
        for number in range(BIG >> 20):
            state.update(blocks(number))
        return state.hexdigest()

    up, down = pattern(b"up", BIG), pattern(b"down", BIG)

    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"")
        got_down, got_up = await asyncio.gather(
            asyncio.to_thread(exchange, bench.browser, up), asyncio.to_thread(exchange, bench.host, down)
        )
        assert got_up == expected(up)
        assert got_down == expected(down)
        assert bench.tunnel.moved == (BIG, BIG)

    play(contexts, act)


def test_small_messages_pass_both_ways_after_the_first_words(contexts: Contexts) -> None:
    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"101 and early")
        assert await asyncio.to_thread(bench.browser.recv, 100) == b"101 and early"
        for number in range(200):
            for source, sink in ((bench.browser, bench.host), (bench.host, bench.browser)):
                source.sendall(b"%d" % number)
                assert await asyncio.to_thread(sink.recv, 100) == b"%d" % number

    play(contexts, act)


def test_a_reader_that_stalls_stops_the_writer(contexts: Contexts) -> None:
    """What the proxy holds is one buffer a direction; the rest stays with the sender."""

    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"")
        for sink, source, pump in (
            (bench.browser, bench.host, bench.tunnel._down),
            (bench.host, bench.browser, bench.tunnel._up),
        ):
            source.setblocking(False)
            sent, quiet = 0, 0
            while quiet < 50:  # nothing is taken any more
                try:
                    sent += source.send(b"x" * 65536)
                    quiet = 0
                except (BlockingIOError, ssl.SSLWantWriteError):
                    quiet += 1
                await asyncio.sleep(0.01)
            assert pump.rest is not None
            assert len(pump.rest) <= BUFFER
            assert len(getattr(bench.tunnel._host.sock, "_unsent", b"")) <= CHUNK + 1024
            source.settimeout(LIMIT)
            before = pump.moved
            await asyncio.sleep(0.2)
            assert pump.moved == before, "it reads on although nobody takes anything"

            def drain(sink: socket.socket = sink, total: int = sent + 65536) -> int:
                got = 0
                while got < total:
                    got += len(sink.recv(1 << 20))
                return got

            # The block that was refused goes again: TLS has taken a part of it already.
            _, got = await asyncio.gather(asyncio.to_thread(source.sendall, b"x" * 65536), asyncio.to_thread(drain))
            assert got == sent + 65536
            assert pump.rest is None

    play(contexts, act)


def test_half_close_by_the_browser_lets_the_host_finish(contexts: Contexts) -> None:
    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"")
        bench.browser.sendall(b"last words")
        bench.browser.shutdown(socket.SHUT_WR)
        assert await asyncio.to_thread(read_all, bench.host) == b"last words"
        assert bench.endings == []
        bench.host.sendall(b"y" * 1_000_000)
        end_writing(bench.host)
        assert await asyncio.to_thread(read_all, bench.browser) == b"y" * 1_000_000
        await until(lambda: bench.endings == ["closed"])

    play(contexts, act)


def test_half_close_by_the_host_lets_the_browser_finish(contexts: Contexts) -> None:
    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"")
        bench.host.sendall(b"z" * 1_000_000)
        end_writing(bench.host)
        assert await asyncio.to_thread(read_all, bench.browser) == b"z" * 1_000_000
        assert bench.endings == []
        bench.browser.sendall(b"bye")
        bench.browser.shutdown(socket.SHUT_WR)
        assert await asyncio.to_thread(read_all, bench.host) == b"bye"
        await until(lambda: bench.endings == ["closed"])

    play(contexts, act)


def test_an_end_without_close_notify_is_an_end(contexts: Contexts) -> None:
    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"")
        bench.host.sendall(b"data")
        socket.socket.shutdown(bench.host, socket.SHUT_WR)
        assert await asyncio.to_thread(read_all, bench.browser) == b"data"

    play(contexts, act)


def test_the_end_is_seen_behind_a_browser_that_stalls(contexts: Contexts) -> None:
    """The end arrives while the last bytes can't be passed on yet; nothing more will wake the host's side."""

    async def act(bench: Bench) -> None:
        bench.host.sendall(b"x" * 30_000)
        end_writing(bench.host)
        bench.tunnel.start(b"")
        await until(lambda: bench.tunnel._down.rest is not None)
        assert await asyncio.to_thread(read_all, bench.browser) == b"x" * 30_000
        assert bench.endings == []

    play(contexts, act, narrow=True)


@pytest.mark.parametrize("side", ["browser", "host"])
def test_a_half_closed_tunnel_does_not_live_for_ever(contexts: Contexts, side: str) -> None:
    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"")
        end_writing(getattr(bench, side))
        await until(lambda: bench.endings == ["half_closed"])

    play(contexts, act, half_close_s=0.05)


def test_a_reset_ends_both_sides(contexts: Contexts) -> None:
    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"")
        bench.browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        bench.browser.close()
        await until(lambda: bench.endings == ["reset"])
        with contextlib.suppress(OSError):  # a reset says the same
            assert await asyncio.to_thread(bench.host.recv, 10) == b""

    play(contexts, act)


def test_after_a_cut_nothing_reaches_the_guest(contexts: Contexts) -> None:
    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"")
        bench.browser.sendall(b"before")
        assert await asyncio.to_thread(bench.host.recv, 100) == b"before"
        bench.browser.sendall(b"keys")
        bench.tunnel.close("cut")
        assert bench.endings == ["cut"]
        with contextlib.suppress(OSError):
            assert await asyncio.to_thread(bench.host.recv, 100) == b""
        bench.tunnel.close("closed")
        assert bench.endings == ["cut"], "closing twice is once"

    play(contexts, act)


def test_a_cut_throws_away_what_a_stalled_host_has_not_taken(contexts: Contexts) -> None:
    async def act(bench: Bench) -> None:
        bench.tunnel.start(b"")
        bench.browser.setblocking(False)
        sent, quiet = 0, 0
        while quiet < 30:
            try:
                sent += bench.browser.send(b"k" * 65536)
                quiet = 0
            except BlockingIOError:
                quiet += 1
            await asyncio.sleep(0.01)
        bench.tunnel.close("cut")
        got = 0
        with contextlib.suppress(OSError):
            while part := await asyncio.to_thread(bench.host.recv, 1 << 20):
                got += len(part)
        assert got < sent

    play(contexts, act)
