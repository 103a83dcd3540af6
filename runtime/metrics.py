"""Metrics and health over HTTP: /metrics for Prometheus, /healthz (the process answers), /readyz (it can do its work).

The server is for a monitoring system on a closed network, and still takes nothing for granted: it reads one bounded
request head within one deadline, answers GET only, and serves a bounded number of peers at a time.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from deskfleet.runtime.service import Clock, SystemClock

log = logging.getLogger(__name__)

_LONGEST_HEAD = 8_192
_SECONDS = 5.0
_MOST_PEERS = 16
_TEXT = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus text exposition format
_JSON = "application/json"


#: By this variable prometheus_client learns, when it is imported, that several processes count together, and where.
SHARED_COUNTS = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """The metrics of one service, in a registry of their own; names begin with deskfleet_SERVICE_.

    Where SHARED_COUNTS is set, what any of its processes counts is in the registry of each; a gauge, and what begins
    with process_, is that process's own.
    """

    def __init__(self, service: str) -> None:
        self.registry = self._counted = CollectorRegistry()
        if SHARED_COUNTS in os.environ:
            self.registry = CollectorRegistry()
            MultiProcessCollector(self.registry)  # type: ignore[no-untyped-call]
        self._prefix = f"deskfleet_{service}"
        ProcessCollector(registry=self.registry)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """Something that only grows."""
        return Counter(name, text, labels, namespace=self._prefix, registry=self._counted)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Something that goes up and down, and is asked for when the metrics are."""
        self.registry.register(_Asked(f"{self._prefix}_{name}", text, value))

    def histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        """How something is distributed; `buckets` are upper bounds, in the unit that the name ends with."""
        return Histogram(name, text, labels, namespace=self._prefix, registry=self._counted, buckets=buckets)


class _Asked(Collector):
    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterable[Metric]:
        yield gauge_of(self._name, self._text, "", {"": self._value()})

    def describe(self) -> Iterable[Metric]:
        """Its name, so that the registry need not ask for the value to know it."""
        return [GaugeMetricFamily(self._name, self._text)]


def gauge_of(name: str, text: str, label: str, values: Mapping[Any, float]) -> Metric:
    """A gauge for a collector that reads at scrape time; `values` by the label's values, or under "" without label."""
    family = GaugeMetricFamily(name, text, labels=[label] if label else [])
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    return family


def counter_of(name: str, text: str, label: str, values: Mapping[Any, float]) -> Metric:
    """The same for something that only grows."""
    family = CounterMetricFamily(name, text, labels=[label] if label else [])
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    return family


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a process can do its work now, and if not, why, in words for whoever is on call."""

    ready: bool
    reasons: tuple[str, ...] = ()


class MetricsServer:
    """A running server; close() ends it. `port` is the real one when 0 was asked for."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self.port: int = server.server_address[1]
        self._thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and wait until it did."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve(
    address: str,
    port: int,
    registry: CollectorRegistry,
    health: Callable[[], Health],
    clock: Clock | None = None,
) -> MetricsServer:
    """Serve on `address` (IPv4 or IPv6) in threads of its own. OSError when the port is taken."""
    return MetricsServer(_Server(address, port, registry, health, clock or SystemClock()))


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        address: str,
        port: int,
        registry: CollectorRegistry,
        health: Callable[[], Health],
        clock: Clock,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.registry = registry
        self.health = health
        self.clock = clock
        self._room = threading.Semaphore(_MOST_PEERS)
        super().__init__((address, port), _Request)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()  # no thread was started that would do it
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, *_: Any) -> None:
        log.exception("a monitoring request failed")


class _Request(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        end = self.server.clock.monotonic() + _SECONDS
        try:
            line = self._request_line(end)
            if line is None:
                return
            status, kind, body = self._answer(line)
            allow = "Allow: GET\r\n" if status.startswith("405") else ""
            head = (
                f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{allow}"
                "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
            )
            self._limit(end)
            self.request.sendall(head.encode() + body)
        except OSError:
            return  # the peer left or is too slow

    def _limit(self, end: float) -> None:
        self.request.settimeout(max(0.001, end - self.server.clock.monotonic()))

    def _request_line(self, end: float) -> bytes | None:
        """The first line of the head, "" when the head is too long, None when the peer left before its end."""
        head = b""
        while b"\r\n\r\n" not in head:
            if len(head) > _LONGEST_HEAD:
                return b""
            self._limit(end)
            part = self.request.recv(4096)
            if not part:
                return None
            head += part
        return head.split(b"\r\n", 1)[0]

    def _answer(self, line: bytes) -> tuple[str, str, bytes]:
        parts = line.split(b" ")
        if not line:
            return "431 Request Header Fields Too Large", _JSON, b"{}"
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            return "400 Bad Request", _JSON, b"{}"
        if parts[0] != b"GET":
            return "405 Method Not Allowed", _JSON, b"{}"
        path = parts[1].split(b"?", 1)[0]
        if path == b"/metrics":
            return self._metrics()
        if path == b"/healthz":
            return "200 OK", _JSON, b'{"alive": true}'
        if path == b"/readyz":
            return self._ready()
        return "404 Not Found", _JSON, b"{}"

    def _metrics(self) -> tuple[str, str, bytes]:
        try:
            return "200 OK", _TEXT, generate_latest(self.server.registry)
        except Exception:
            log.exception("a metrics collector failed")
            return "500 Internal Server Error", _JSON, b"{}"

    def _ready(self) -> tuple[str, str, bytes]:
        try:
            health = self.server.health()
        except Exception:
            log.exception("the health check failed")
            health = Health(False, ("the health check itself failed; see the log",))
        body = json.dumps({"ready": health.ready, "reasons": list(health.reasons)}).encode()
        return ("200 OK" if health.ready else "503 Service Unavailable"), _JSON, body
