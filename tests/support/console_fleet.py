"""A fleet's console path from real processes: broker, proxies, console servers; displays and agents are the test's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import random
import secrets
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import websockets.sync.client as ws
from demo.broker import PrivateBroker, free_port
from demo.definitions import definitions
from demo.keys import Keys
from support.consoles import ORIGIN, Authority, report, ticket
from websockets.exceptions import InvalidStatus

from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.service import SystemClock
from deskfleet.schemas import topology
from deskfleet.schemas.host import Phase, beat_of
from deskfleet.schemas.messages import GrantRevoked, Message, SessionChanged
from deskfleet.schemas.session import Outcome, State
from deskfleet.schemas.tickets import Tickets
from deskfleet.schemas.wire import encode

PATIENCE = 120.0
KEY = "t" * 48
BANNER = b"RFB 003.008\n"


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait for a condition, generously; return what it returned."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)
    return value


def accepts(port: int, address: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5):
        return True
    return False


class Process:
    """A child whose output goes to a file. It dies with us, so that a failed test leaves nothing behind."""

    def __init__(self, argv: list[str], log: Path, **options: Any) -> None:
        self.log = log
        with log.open("ab") as sink:
            self.child = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                **options,
            )

    def end(self, kill: bool = False) -> int:
        if kill:
            self.child.kill()
        else:
            self.child.terminate()
        return self.child.wait(PATIENCE)


def hello(sid: str, generation: int = 7) -> bytes:
    """What the display of this very start of a session says first."""
    return BANNER + f"{sid} {generation}".encode()


class Display(socketserver.ThreadingUnixStreamServer):
    """A VNC server of sorts: says who it is, then echoes."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, sid: str, generation: int = 7) -> None:
        self.folder = folder / sid
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hello = hello(sid, generation)
        self.heard = self.visitors = 0
        (self.folder / "vnc.sock").unlink(missing_ok=True)
        super().__init__(str(self.folder / "vnc.sock"), _Echo)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        (self.folder / "vnc.sock").unlink(missing_ok=True)

    def handle_error(self, *_: object) -> None:
        """A console that was cut resets its connection."""


class _Echo(socketserver.BaseRequestHandler):
    server: Display

    def handle(self) -> None:
        # Like qemu it reads whatever its own sending does: websockify's sends block, and both would wait for ever.
        parts: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.server.visitors += 1
        parts.put(self.server.hello)
        threading.Thread(target=self._send, args=(parts,), daemon=True).start()
        while data := self.request.recv(1 << 18):
            self.server.heard += len(data)
            parts.put(data)
        parts.put(b"")

    def _send(self, parts: queue.SimpleQueue[bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := parts.get():
                self.request.sendall(data)


class ConsoleHost:
    """A host: its console server as a process, and displays in its run folder."""

    def __init__(self, name: str, folder: Path, authority: Authority | None, address: str = "127.0.0.1") -> None:
        self.name, self.folder, self.authority = name, folder / name, authority
        self.run, self.nonces, self.inputs = self.folder / "run", self.folder / "nonces", self.folder / "inputs"
        for made in (self.run, self.nonces, self.inputs):
            made.mkdir(parents=True)
        self.host, self.port = address, free_port()
        self.address = f"[{address}]:{self.port}" if ":" in address else f"{address}:{self.port}"
        self.displays: dict[str, Display] = {}
        self.guests: dict[str, tuple[int, Phase]] = {}
        self.life, self.seq, self.highest = secrets.token_hex(8), 0, 0
        self.process: Process | None = None

    def start(self, **options: Any) -> None:
        argv = [sys.executable, "-m", "deskfleet.agent.console", "--listen", self.address]
        argv += ["--run-dir", str(self.run), "--nonce-dir", str(self.nonces), "--input-dir", str(self.inputs)]
        if self.authority:
            pair = self.authority.issue(self.name, "serverAuth")
            argv += ["--cert", pair.cert, "--key", pair.key, "--ca", self.authority.ca]
        self.process = Process(argv, self.folder / "console.log", **options)
        until(lambda: accepts(self.port, self.host), "the console server listens")

    def show(self, sid: str, generation: int) -> None:
        """A guest runs here."""
        if sid in self.displays:
            self.hide(sid)
        self.displays[sid] = Display(self.run, sid, generation)
        self.guests[sid] = (generation, Phase.RUNNING)
        self.highest = max(self.highest, generation)

    def hide(self, sid: str) -> None:
        """It does no more."""
        self.displays.pop(sid).close()
        del self.guests[sid]

    def beat(self, small: bool = False) -> Message:
        self.seq += 1
        told = report(self.name, self.guests, self.seq, self.life, self.address, self.highest)
        return beat_of(told) if small else told

    def stop(self) -> None:
        if self.process:
            self.process.end()
        for sid in list(self.displays):
            self.hide(sid)


class ConsoleFleet:
    """Broker and certificates, and whatever hosts and proxies a test starts."""

    def __init__(self, folder: Path, hosts: tuple[str, ...] = ("h1", "h2")) -> None:
        self.folder = folder
        self.keys = Keys(folder / "keys")
        self.authority = Authority(folder / "ca")
        self.broker = PrivateBroker(folder / "broker", definitions(hosts, self.keys))
        self.broker.start()
        self._buses: dict[str, AmqpBus] = {}
        self.processes: list[Process] = []

    def bus(self, login: str) -> AmqpBus:
        if login not in self._buses:
            url = self.broker.url(login, self.keys.secret(f"broker-{login}"))
            bus = AmqpBus(
                [url], name=login, dispatch=lambda action: action(), clock=SystemClock(), rng=random.Random(1)
            )
            bus.start()
            self._buses[login] = bus
        until(lambda: self._buses[login].connected, f"{login} is connected")
        return self._buses[login]

    def send(self, login: str, key: str, message: Message, exchange: str = topology.EVENTS) -> None:
        """Publish as a login; raises what the broker answers."""
        kind, body = encode(message)
        self.bus(login).publish(Outgoing(exchange, key, kind, body, mandatory=False)).result(PATIENCE)

    def beat(self, host: ConsoleHost, small: bool = False) -> None:
        self.send(f"agent-{host.name}", topology.heartbeat_key(host.name), host.beat(small))

    def announce(self, sid: str, state: State, host: str = "h1", generation: int = 7) -> None:
        outcome = Outcome.STOPPED if state in (State.STOPPING, State.ENDED) else None
        self.send("scheduler", topology.session_key(sid), SessionChanged(sid, state, outcome, host, generation))

    def revoke(self, grant: str) -> None:
        """Say that a right has ended, as a portal does."""
        self.send("portal", "", GrantRevoked(grant), topology.CONSOLES)

    def close(self) -> None:
        for bus in self._buses.values():
            bus.stop()
        for process in self.processes:
            if process.child.poll() is None:
                process.end(kill=True)
        self.broker.stop()


class Proxy:
    """A proxy process with settings of its own."""

    def __init__(self, fleet: ConsoleFleet, name: str = "proxy", address: str = "127.0.0.1", **settings: Any) -> None:
        self.fleet, self.address = fleet, address
        self.port, self.ops_port = free_port(), free_port()
        pair = fleet.authority.issue("proxy", "clientAuth")
        listen = f"[{address}]:{self.port}" if ":" in address else f"{address}:{self.port}"
        values = {
            "listen": listen,
            "ops_listen": f"127.0.0.1:{self.ops_port}",
            "broker_url": fleet.broker.url("proxy", fleet.keys.secret("broker-proxy")),
            "origins": [ORIGIN],
            "ticket_keys": [KEY],
            "tls_cert": pair.cert,
            "tls_key": pair.key,
            "tls_ca": fleet.authority.ca,
            "settle_s": 0.5,
            **settings,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
        self.config = fleet.folder / f"{name}.toml"
        self.config.touch(0o600)
        self.config.write_text("\n".join(["[proxy]", *lines, ""]))
        self.log = fleet.folder / f"{name}.log"
        self.process: Process | None = None

    def start(self) -> None:
        self.process = Process([sys.executable, "-m", "deskfleet.proxy", "--config", str(self.config)], self.log)
        self.fleet.processes.append(self.process)
        until(lambda: self.ready() or self._ended(), "the proxy is ready")

    def _ended(self) -> bool:
        assert self.process
        assert self.process.child.poll() is None, self.log.read_text()[-2000:]
        return False

    def ready(self) -> bool:
        try:
            return json.loads(self.ask("/readyz"))["ready"] is True
        except OSError:
            return False

    def ask(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ops_port}{path}", timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    def figure(self, name: str) -> float:
        for line in self.ask("/metrics").splitlines():
            if line.startswith(f"deskfleet_proxy_{name} "):
                return float(line.split()[1])
        return 0.0

    def url(self, text: str) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"ws://{host}:{self.port}/console?ticket={text}"

    def connect(
        self, sid: str, generation: int = 7, text: str = "", host: str = "h1", **options: Any
    ) -> ws.ClientConnection:
        """A browser that has just fetched a ticket; raises InvalidStatus when it is refused."""
        signed = text or Tickets([KEY]).sign(ticket(sid, generation, host))
        settings = {"origin": ORIGIN, "subprotocols": ["binary"], "max_size": None, "open_timeout": PATIENCE}
        return ws.connect(self.url(signed), proxy=None, ping_interval=None, **{**settings, **options})

    def refusal(
        self, sid: str, generation: int = 7, text: str = "", host: str = "h1", **options: Any
    ) -> tuple[int, str]:
        try:
            with self.connect(sid, generation, text, host, **options):
                pass
        except InvalidStatus as error:
            return error.response.status_code, json.loads(error.response.body)["reason"]
        raise AssertionError("it was let in")

    def knows(self, sid: str, generation: int = 7, host: str = "h1") -> bool:
        """Whether the display of a session can be reached and is its own."""
        try:
            with self.connect(sid, generation, host=host) as console:
                return bool(console.recv(PATIENCE) == hello(sid, generation))
        except InvalidStatus:
            return False


def stream(seed: str, size: int) -> list[bytes]:
    """Blocks of 256 KiB, `size` bytes in all, no two alike."""
    base = hashlib.shake_128(seed.encode()).digest(256 * 1024)
    return [number.to_bytes(8, "big") + base[8:] for number in range(size // len(base))]
