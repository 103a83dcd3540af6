"""A real HTTP server that gives one image, or behaves as badly as a test wants."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


@dataclass
class ImageSource:
    """`content` by file name. `cut`: the connection ends after so many bytes; `hang`: it gives nothing more after so
    many until `free` is set; `announced`: the length that it claims; `redirect`: where it sends everybody."""

    content: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"one"'
    status: int = 200
    cut: int | None = None
    hang: int | None = None
    announced: int | None = None
    chunked: bool = False
    redirect: str = ""
    ranges: bool = True
    range_shift: int = 0
    tls: ssl.SSLContext | None = None
    port: int = 0
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)
    hanging: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """The folder's address."""
        return f"{'https://localhost' if self.tls else 'http://127.0.0.1'}:{self.port}/images"

    def ranges_asked(self) -> list[str]:
        """What each request wanted, "" for everything."""
        return [headers.get("Range", "") for _, headers in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    source: ClassVar[ImageSource]

    def do_GET(self) -> None:
        source = self.source
        source.requests.append((self.path, dict(self.headers)))
        self.close_connection = True
        if source.redirect:
            self.send_response(302)
            self.send_header("Location", source.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = source.content.get(self.path.partition("?")[0].rpartition("/")[2])
        if source.status != 200 or body is None:
            self.send_error(404 if body is None else source.status)
            return
        start = self._start(body)
        rest = body[start + source.range_shift if start else 0 :]
        self.send_response(206 if start else 200)
        if source.etag:
            self.send_header("ETag", source.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start + source.range_shift}-{len(body) - 1}/{len(body)}")
        if not source.chunked:
            self.send_header("Content-Length", str(len(rest) if source.announced is None else source.announced))
        self.end_headers()
        if source.hang is not None:
            self.wfile.write(rest[: source.hang])
            self.wfile.flush()
            source.hanging.set()
            source.free.wait(60)
            self.wfile.write(rest[source.hang :])
            return
        self.wfile.write(rest if source.cut is None else rest[: source.cut])

    def _start(self, body: bytes) -> int:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not wanted or not self.source.ranges or self.headers.get("If-Range") != self.source.etag:
            return 0
        return min(int(wanted[1]), len(body))

    def log_message(self, *_: object) -> None:
        """Nothing: tests read what was asked from `requests`."""

    def handle_one_request(self) -> None:
        """As usual, but a client that goes away is no news."""
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True


@contextmanager
def image_source(**behaviour: object) -> Iterator[ImageSource]:
    """A source on a port of its own."""
    source = ImageSource(**behaviour)  # type: ignore[arg-type]
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"source": source}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  clients that break off are what is tested
    if source.tls:
        server.socket = source.tls.wrap_socket(server.socket, server_side=True)
    source.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield source
    finally:
        source.free.set()
        server.shutdown()
        thread.join()
        server.server_close()
