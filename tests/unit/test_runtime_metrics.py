"""The monitoring port: what it answers, and that nobody can hold it up."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator

import pytest
from support.bus_harness import TickingClock

from deskfleet.runtime.metrics import Health, Metrics, MetricsServer, serve


class Site:
    def __init__(self) -> None:
        self.health: Health | Exception = Health(True)
        self.metrics = Metrics("test")
        self.clock = TickingClock()
        self.server: MetricsServer = serve("127.0.0.1", 0, self.metrics.registry, self.check, self.clock)

    def check(self) -> Health:
        if isinstance(self.health, Exception):
            raise self.health
        return self.health

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=60)

    def ask(self, head: bytes) -> tuple[int, dict[str, str], bytes]:
        with self.connect() as peer:
            peer.sendall(head)
            answer = b""
            while part := peer.recv(65536):
                answer += part
        raw, body = answer.split(b"\r\n\r\n", 1)
        status, *lines = raw.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert int(headers["Content-Length"]) == len(body)
        return int(status.split()[1]), headers, body

    def get(self, path: str) -> tuple[int, dict[str, str], bytes]:
        return self.ask(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.server.close()


def test_metrics_are_served(site: Site) -> None:
    site.metrics.counter("launches_total", "Launches.", ["outcome"]).labels("ok").inc(3)
    site.metrics.gauge("sessions", "Sessions.", lambda: 2.0)
    site.metrics.histogram("start_seconds", "Start.", [0.1, 1]).observe(0.5)
    status, headers, body = site.get("/metrics?x=1")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b'deskfleet_test_launches_total{outcome="ok"} 3.0' in body
    assert b"deskfleet_test_sessions 2.0" in body
    assert b'deskfleet_test_start_seconds_bucket{le="1.0"} 1.0' in body
    assert b"process_resident_memory_bytes" in body


def test_ready_and_alive_are_two_questions(site: Site) -> None:
    assert site.get("/readyz")[0] == 200
    site.health = Health(False, ("not connected to the broker",))
    status, _, body = site.get("/readyz")
    assert status == 503 and json.loads(body) == {"ready": False, "reasons": ["not connected to the broker"]}
    assert site.get("/healthz")[0] == 200
    site.health = ValueError("bug")
    assert site.get("/readyz")[0] == 503


def test_a_failing_collector_is_an_error_and_no_crash(site: Site) -> None:
    class Bad:
        def collect(self) -> list[object]:
            raise ValueError("no ledger")

        def describe(self) -> list[object]:
            return []

    site.metrics.registry.register(Bad())  # type: ignore[arg-type]
    assert site.get("/metrics")[0] == 500
    assert site.get("/healthz")[0] == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"HEAD /metrics HTTP/1.1\r\n\r\n", 405),
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../readyz HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"GET /metrics SSH-2.0\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 404),
        (b"GET /" + b"a" * 20_000, 431),
    ],
)
def test_other_requests_are_refused(site: Site, head: bytes, status: int) -> None:
    got, headers, _ = site.ask(head)
    assert got == status
    assert headers.get("Allow") == ("GET" if status == 405 else None)


def test_a_slow_peer_is_dropped_at_the_deadline(site: Site) -> None:
    with site.connect() as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        site.clock.now += 6
        slow.sendall(b"X: 1\r\n")
        assert slow.recv(100) == b""


def test_silent_peers_cannot_use_up_the_server(site: Site) -> None:
    peers = [site.connect() for _ in range(40)]
    try:
        for peer in peers[16:]:
            # No room: closed at once, without an answer.
            with contextlib.suppress(ConnectionResetError):
                assert peer.recv(100) == b""
        for peer in peers[:16]:
            peer.close()
        # The places of those who left are free again, as soon as their threads noticed.
        assert _until_served(site) == 200
    finally:
        for peer in peers:
            peer.close()


def _until_served(site: Site) -> int:
    for _ in range(1000):
        try:
            return site.get("/healthz")[0]
        except (ConnectionError, ValueError):
            continue
    raise AssertionError("never served again")


def test_ipv6_and_a_taken_port() -> None:
    clock = TickingClock()
    server = serve("::1", 0, Metrics("v6").registry, lambda: Health(True), clock)
    try:
        with socket.create_connection(("::1", server.port), timeout=60) as peer:
            peer.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert peer.recv(100).startswith(b"HTTP/1.1 200")
        with pytest.raises(OSError):
            serve("::1", server.port, Metrics("again").registry, lambda: Health(True), clock)
    finally:
        server.close()
