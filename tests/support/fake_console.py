"""A console without a guest: WebSocket and RFB 3.8 (RFC 6143), one plain picture, and it can fall silent."""

from __future__ import annotations

import struct
import threading
import time
from types import TracebackType

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

WIDTH, HEIGHT = 64, 48
#: Bytes after the type of a client message of fixed length (RFC 6143, 7.5; 248 and 255 are extensions of noVNC's).
_FIXED = {0: 19, 3: 9, 4: 7, 5: 5}


class FakeConsole:
    """Listens on a free loopback port. `silent` makes it swallow everything, as a dead network path would."""

    def __init__(self, name: str = "guest") -> None:
        self.silent = threading.Event()
        self.paths: list[str] = []
        self._name = name.encode()
        self._open: list[ServerConnection] = []
        self._server = serve(self._serve, "127.0.0.1", 0, subprotocols=["binary"], compression=None)  # type: ignore[list-item]
        self.port: int = self._server.socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> FakeConsole:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.cut()
        self._server.shutdown()
        self._thread.join()

    def cut(self) -> None:
        """Close every connection."""
        for connection in list(self._open):
            connection.close()

    def _serve(self, connection: ServerConnection) -> None:
        assert connection.request
        self.paths.append(connection.request.path)
        self._open.append(connection)
        try:
            _Session(connection, self.silent, self._name).run()
        except ConnectionClosed:
            pass
        finally:
            self._open.remove(connection)


class _Session:
    def __init__(self, connection: ServerConnection, silent: threading.Event, name: bytes) -> None:
        self._connection = connection
        self._silent = silent
        self._name = name
        self._buffer = b""

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            part = self._connection.recv()
            assert isinstance(part, bytes)
            self._buffer += part
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def run(self) -> None:
        # Who comes while nothing answers is not greeted either: a greeting would end the "reconnecting" that a page
        # shows within an instant, and nobody could see it for certain.
        while self._silent.is_set():
            time.sleep(0.02)
        self._connection.send(b"RFB 003.008\n")
        self._take(12)
        self._connection.send(b"\x01\x01")  # one security type: none
        self._take(1)
        self._connection.send(bytes(4))  # accepted
        self._take(1)
        pixels = struct.pack(">BBBBHHHBBBxxx", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
        size = struct.pack(">HH", WIDTH, HEIGHT)
        self._connection.send(size + pixels + struct.pack(">I", len(self._name)) + self._name)
        while True:
            self._message(self._take(1)[0])

    def _message(self, kind: int) -> None:
        if kind == 2:  # SetEncodings
            (count,) = struct.unpack(">xH", self._take(3))
            self._take(4 * count)
        elif kind == 6:  # ClientCutText
            (length,) = struct.unpack(">xxxi", self._take(7))
            self._take(abs(length))
        else:
            body = self._take(_FIXED[kind])
            # An incremental request waits for a change, and nothing ever changes here.
            if kind == 3 and not body[0] and not self._silent.is_set():
                self._picture(*struct.unpack(">HHHH", body[1:]))

    def _picture(self, x: int, y: int, width: int, height: int) -> None:
        head = struct.pack(">BxHHHHHi", 0, 1, x, y, width, height, 0)
        self._connection.send(head + b"\x40\xa0\xe0\x00" * (width * height))
