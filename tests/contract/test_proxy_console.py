"""The console path from real processes: broker, deskfleet-proxy, websockify under mutual TLS, unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.console_fleet import (
    BANNER,
    KEY,
    PATIENCE,
    ConsoleFleet,
    ConsoleHost,
    Display,
    Process,
    Proxy,
    accepts,
    free_port,
    hello,
    stream,
    until,
)
from support.consoles import GRANT, ORIGIN, WS_KEY, ticket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from deskfleet.runtime.bus import AccessRefused, BusDown
from deskfleet.schemas.host import Phase
from deskfleet.schemas.session import State
from deskfleet.schemas.tickets import Tickets

S, T = "a" * 32, "b" * 32


@pytest.fixture(scope="module")
def fleet() -> Iterator[ConsoleFleet]:
    with tempfile.TemporaryDirectory(prefix="dfc", ignore_cleanup_errors=True) as folder:
        made = ConsoleFleet(Path(folder))
        yield made
        made.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a unix socket's path has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dfh", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture
def host(fleet: ConsoleFleet, folder: Path) -> Iterator[ConsoleHost]:
    made = ConsoleHost("h1", folder, fleet.authority)
    made.start()
    made.show(S, 7)
    made.show(T, 8)
    yield made
    made.stop()


@pytest.fixture
def proxy(fleet: ConsoleFleet, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    made = Proxy(fleet, name=f"proxy-{abs(hash(request.node.nodeid))}")
    made.start()
    yield made
    if made.process and made.process.child.poll() is None:
        made.process.end(kill=True)


def reach(fleet: ConsoleFleet, host: ConsoleHost, proxy: Proxy, sid: str = S, generation: int = 7) -> None:
    """Let the proxy hear of the host, and wait until the display answers through it."""
    fleet.beat(host)
    until(lambda: proxy.knows(sid, generation), "the display is reached")


def test_a_ticket_opens_its_desktop_once(fleet: ConsoleFleet, host: ConsoleHost, proxy: Proxy) -> None:
    reach(fleet, host, proxy)
    text = Tickets([KEY]).sign(ticket(S, 7))
    with proxy.connect(S, text=text) as console:
        assert console.subprotocol == "binary"
        assert console.recv(PATIENCE) == hello(S)
        console.send(b"\x04key")
        assert console.recv(PATIENCE) == b"\x04key"
        assert proxy.figure("tunnels") == 1
    with proxy.connect(T, 8) as console:
        assert console.recv(PATIENCE) == hello(T, 8)
    assert proxy.refusal(S, text=text) == (403, "ticket_used")
    assert proxy.refusal(S, 6) == (409, "session_moved")
    assert proxy.refusal("c" * 32) == (409, "session_ended"), "its host has listed what it runs"
    assert proxy.refusal(S, host="h9") == (502, "host_silent")
    host.hide(T)
    assert proxy.refusal(T, 8) == (409, "session_ended"), "the host says that it is not there"
    assert proxy.refusal(S, origin="https://evil.example") == (403, "bad_origin")
    assert proxy.refusal(S, origin=None) == (403, "bad_origin")


def test_what_a_person_types_is_told_to_the_host_and_what_the_page_says_by_itself_is_not(
    fleet: ConsoleFleet, host: ConsoleHost, proxy: Proxy
) -> None:
    reach(fleet, host, proxy)
    opening, wish, key = b"RFB 003.008\n\x01\x01", b"\x03\x01" + bytes(8), b"\x04\x01\x00\x00\x00\x00\x00a"
    for sid, generation, said in ((S, 7, opening + wish * 3), (T, 8, opening + wish + key)):
        with proxy.connect(sid, generation) as console:
            assert console.recv(PATIENCE) == hello(sid, generation)
            console.send(said)
            echoed = b""
            while len(echoed) < len(said):
                echoed += console.recv(PATIENCE)
            assert echoed == said
    assert [path.name for path in host.inputs.iterdir()] == [T]


def test_c20_a_right_that_is_taken_back_cuts_what_was_opened_by_it_and_nothing_else(
    fleet: ConsoleFleet, host: ConsoleHost, proxy: Proxy
) -> None:
    reach(fleet, host, proxy)
    tickets, link = Tickets([KEY]), "share-" + "1" * 16
    mine, guest = (tickets.sign(ticket(S, 7, grant=grant)) for grant in (GRANT, link))
    with proxy.connect(S, text=mine) as owner, proxy.connect(S, text=guest) as other:
        assert owner.recv(PATIENCE) == other.recv(PATIENCE) == hello(S)
        fleet.revoke(link)
        with pytest.raises(ConnectionClosed):
            other.recv(PATIENCE)
        owner.send(b"still here")
        assert owner.recv(PATIENCE) == b"still here"
    assert proxy.refusal(S, text=tickets.sign(ticket(S, 7, grant=link))) == (403, "revoked")


def test_100_mib_go_out_and_come_back_byte_for_byte(fleet: ConsoleFleet, host: ConsoleHost, proxy: Proxy) -> None:
    """Through the proxy, mutual TLS and websockify, and back, both directions at once."""
    reach(fleet, host, proxy)
    blocks = stream("console", 100 << 20)
    url = proxy.url(Tickets([KEY]).sign(ticket(S, 7)))

    async def run() -> None:
        # Not the blocking client, which does not read while a send waits. A browser does.
        async with connect(url, origin=ORIGIN, subprotocols=["binary"], max_size=None, proxy=None) as console:  # type: ignore[list-item,arg-type]
            assert not console.protocol.extensions, "compression was offered and is not used"
            assert await console.recv() == hello(S)

            async def send() -> None:
                for block in blocks:
                    await console.send(block)

            sending = asyncio.create_task(send())
            left, place, at = sum(map(len, blocks)), 0, 0
            while left:
                part = await console.recv()
                assert isinstance(part, bytes)
                left -= len(part)
                while part:
                    want = blocks[place][at : at + len(part)]
                    assert part[: len(want)] == want
                    part, at = part[len(want) :], at + len(want)
                    if at == len(blocks[place]):
                        place, at = place + 1, 0
            await sending

    asyncio.run(asyncio.wait_for(run(), PATIENCE))


def test_a_session_that_ends_takes_its_consoles_along(fleet: ConsoleFleet, host: ConsoleHost, proxy: Proxy) -> None:
    reach(fleet, host, proxy)
    with proxy.connect(S) as console, proxy.connect(T, 8) as other:
        console.recv(PATIENCE)
        other.recv(PATIENCE)
        fleet.announce(S, State.STOPPING)
        with pytest.raises(ConnectionClosed):
            console.recv(PATIENCE)
        heard = host.displays[S].heard
        with contextlib.suppress(ConnectionClosed):
            console.send(b"after")
        other.send(b"on")
        assert other.recv(PATIENCE) == b"on"
        assert host.displays[S].heard == heard
    assert proxy.refusal(S) == (409, "session_ended")


def test_a_host_can_speak_for_itself_only(fleet: ConsoleFleet, host: ConsoleHost, proxy: Proxy, folder: Path) -> None:
    """The broker does not let h2 publish as h1, and what h2 may say leads nobody of h1's astray."""
    reach(fleet, host, proxy)
    with pytest.raises(AccessRefused):
        fleet.send("agent-h2", "host.h1.heartbeat", host.beat())

    def lie() -> bool:  # the broker has closed the channel after the last one
        with contextlib.suppress(BusDown):
            fleet.send("agent-h2", "host.h2.heartbeat", host.beat())
            return True
        return False

    until(lie, "h2 has sent h1's heartbeat under its own name")
    evil = ConsoleHost("h2", folder, fleet.authority)
    evil.start()
    evil.show(S, 7)
    fleet.beat(evil)
    until(lambda: proxy.figure("hosts") == 2, "h2's claim has come in")
    assert proxy.knows(S)
    assert evil.displays[S].visitors == 0
    evil.stop()
    assert 'dropped_total{reason="wrong_sender"} 1.0' in proxy.ask("/metrics")


def test_a_host_must_show_its_own_certificate(
    fleet: ConsoleFleet, host: ConsoleHost, proxy: Proxy, folder: Path
) -> None:
    """A host that gives another's address, a stranger's certificate, or none."""
    impostor = ConsoleHost("h2", folder, fleet.authority)
    impostor.guests["d" * 32] = (9, Phase.RUNNING)
    host.show("d" * 32, 9)
    impostor.address = host.address
    fleet.beat(impostor)
    until(lambda: proxy.refusal("d" * 32, 9, host="h2") == (502, "host_failed"), "h1's certificate does not name h2")
    assert "certificate" in proxy.log.read_text()
    plain = ConsoleHost("h1", folder / "plain", None)
    plain.start()
    plain.show(S, 7)
    fleet.beat(plain)
    until(lambda: proxy.refusal(S) == (502, "host_failed"), "no TLS")
    assert plain.displays[S].heard == 0
    plain.stop()


@pytest.mark.parametrize("who", ["nobody", "another host", "a stranger"])
def test_only_proxies_may_connect_to_a_host(fleet: ConsoleFleet, host: ConsoleHost, folder: Path, who: str) -> None:
    from support.consoles import Authority

    context = ssl.create_default_context(cafile=fleet.authority.ca)
    if who == "another host":
        pair = fleet.authority.issue("h2", "serverAuth")
        context.load_cert_chain(pair.cert, pair.key)
    elif who == "a stranger":
        pair = Authority(folder / "other").issue("proxy", "clientAuth")
        context.load_cert_chain(pair.cert, pair.key)
    with socket.create_connection(("127.0.0.1", host.port)) as plain, pytest.raises(OSError):
        plain.settimeout(PATIENCE)
        with context.wrap_socket(plain, server_hostname="h1") as sock:
            sock.sendall(upgrade(f"/websockify?token={S}.{'5' * 32}"))
            # With TLS 1.3 the client hears of it when it reads.
            assert sock.recv(100) == b"", "it was answered"
            raise ConnectionResetError
    assert not (host.nonces / ("5" * 32)).exists()


def upgrade(target: str, method: str = "GET") -> bytes:
    return (
        f"{method} {target} HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {WS_KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


def ask(port: int, data: bytes, address: str = "127.0.0.1") -> bytes:
    """All that is answered, up to the first frame of an open console."""
    with socket.create_connection((address, port), timeout=PATIENCE) as sock:
        sock.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                answer += part
                if BANNER in answer:
                    break
        return answer


def test_a_console_server_serves_consoles_and_nothing_else(folder: Path) -> None:
    host = ConsoleHost("h1", folder, None)
    host.start(cwd="/etc")
    host.show(S, 7)
    secrets = [f"{number:032x}" for number in range(1, 9)]
    good = f"/websockify?token={S}."
    for data, status in (
        (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", b"405"),
        (b"GET /passwd HTTP/1.1\r\nHost: h\r\n\r\nGET /passwd HTTP/1.1\r\nHost: h\r\n\r\n", b"405"),
        (b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n", b"405"),
        (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n", b"501"),
        (b"GET " + good.encode() + b"x HTTP/9.9\r\n\r\n", b"505"),
        (upgrade("/"), b"400"),
        (upgrade("/websockify"), b"400"),
        (upgrade(f"/other?token={S}.{secrets[0]}"), b"400"),
        (upgrade(f"http://h{good}{secrets[0]}"), b"400"),
        (upgrade(f"{good}{secrets[0]}&x=1"), b"400"),
        (upgrade("/websockify?token=../../etc/passwd"), b"400"),
        (upgrade(f"/websockify?token={T}.{secrets[0]}"), b"404"),
        (upgrade(good + secrets[1]), b"101"),
        (upgrade(good + secrets[1]), b"403"),
        (upgrade(good + secrets[2]).replace(b": 13", b": 99"), b"400"),
    ):
        answer = ask(host.port, data)
        assert answer.split(b" ")[1] == status, data
        assert b"root:" not in answer
        assert answer.count(b"HTTP/1.1") == 1, "one request a connection"
    host.stop()
    log = (host.folder / "console.log").read_text()
    assert f"console of {S} opened" in log
    for secret in [*secrets, "token=", "/passwd"]:
        assert secret not in log


def test_ipv6_all_the_way(fleet: ConsoleFleet, folder: Path) -> None:
    host = ConsoleHost("h1", folder, fleet.authority, "::1")
    host.start()
    host.show(S, 7)
    proxy = Proxy(fleet, "proxy6", "::1")
    proxy.start()
    reach(fleet, host, proxy)
    assert proxy.process
    assert proxy.process.end() == 0
    host.stop()


MARKER = "content that no ticket covers"


def test_no_second_request_reaches_a_host_that_serves_files(fleet: ConsoleFleet, folder: Path) -> None:
    """Behind it a real websockify with --web, which would serve the file to anybody who reaches it."""
    web = folder / "web"
    web.mkdir()
    (web / "secret.txt").write_text(MARKER)
    port = free_port()
    sink = Display(folder / "run", S)
    Path(folder / "tokens").write_text("")
    argv = [str(Path(sys.executable).parent / "websockify"), "--web", str(web), "--unix-target"]
    host = Process([*argv, str(sink.folder / "vnc.sock"), f"127.0.0.1:{port}"], folder / "websockify.log")
    until(lambda: accepts(port), "websockify listens")
    assert MARKER.encode() in ask(port, b"GET /secret.txt HTTP/1.0\r\n\r\n"), "the trap is armed"
    proxy = Proxy(fleet, "proxy-plain", tls_cert="", tls_key="", tls_ca="")
    proxy.start()
    described = ConsoleHost("h1", folder / "h", None)
    described.address = f"127.0.0.1:{port}"
    described.guests[S] = (7, Phase.RUNNING)
    described.highest = 7
    reach(fleet, described, proxy)
    second = b"GET /secret.txt HTTP/1.1\r\nHost: h\r\n\r\n"
    key, version = f"Sec-WebSocket-Key: {WS_KEY}\r\n", "Sec-WebSocket-Version: 13\r\n"
    tries = [
        ("Upgrade: websocket\r\nConnection: Upgrade\r\n" + key + "Sec-WebSocket-Version: 777\r\n", b"400"),
        ("Upgrade: foo\r\nConnection: keep-alive\r\n", b"400"),
        ("Upgrade: websocket\r\nConnection: keep-alive\r\n" + key + version, b"400"),
        ("Upgrade: websocket\r\nConnection: Upgrade\r\nContent-Length: 0\r\n" + key + version, b"400"),
        ("Upgrade: websocket\r\nConnection: Upgrade\r\nTransfer-Encoding: chunked\r\n" + key + version, b"400"),
        ("Upgrade: websocket\r\nConnection: Upgrade\r\n" + key + version, b"400"),
        ("Upgrade: websocket\r\nConnection: Upgrade\r\nX: y\n\nGET /secret.txt HTTP/1.1\r\n" + key + version, b"400"),
    ]
    for lines, status in tries:
        text = Tickets([KEY]).sign(ticket(S, 7))
        first = f"GET /console?ticket={text} HTTP/1.1\r\nHost: x\r\nOrigin: https://portal.example\r\n{lines}\r\n"
        answer = ask(proxy.port, first.encode() + second)
        assert answer.split(b" ")[1] == status
        assert MARKER.encode() not in answer
    # In a segment of its own the second request comes too late: by then the host speaks WebSocket.
    text = Tickets([KEY]).sign(ticket(S, 7))
    first = f"GET /console?ticket={text} HTTP/1.1\r\nHost: x\r\nOrigin: https://portal.example\r\n{tries[5][0]}\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE) as sock:
        sock.sendall(first.encode())
        answer = sock.recv(65536)
        sock.sendall(second)
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(65536):
                answer += part
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert MARKER.encode() not in answer
    proxy.process.end()  # type: ignore[union-attr]
    host.end()
    sink.close()


def test_no_ticket_or_token_stands_in_any_log(fleet: ConsoleFleet, host: ConsoleHost, proxy: Proxy) -> None:
    reach(fleet, host, proxy)
    right = ticket(S, 7)
    text = Tickets([KEY]).sign(right)
    for _ in range(2):
        with contextlib.suppress(InvalidStatus), proxy.connect(S, text=text) as console:
            console.recv(PATIENCE)
    bad = text[:-3] + "AAA"
    assert proxy.refusal(S, text=bad) == (403, "bad_ticket")
    assert proxy.refusal(S, text=text, origin="https://evil.example") == (403, "bad_origin")
    ask(proxy.port, f"GET /console?ticket={text} HTTP/1.1\nHost: x\n\n".encode())
    processes = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    proxy.process.end()  # type: ignore[union-attr]
    host.stop()
    logs = {
        path: path.read_text(errors="replace") for path in [*fleet.folder.rglob("*.log"), host.folder / "console.log"]
    }
    assert "opened by ana@example.org" in logs[proxy.log]
    for name, content in [*logs.items(), ("the process list", processes)]:
        for secret in (text, bad, max(text.split("."), key=len), right.nonce, KEY):
            assert secret not in content, name
