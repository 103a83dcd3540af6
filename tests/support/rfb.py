"""A small RFB 3.8 client (RFC 6143) over any byte stream: reads the framebuffer, types, clicks."""

from __future__ import annotations

import socket
import ssl
import struct
from pathlib import Path
from typing import Protocol

from PIL import Image
from websockets.sync.client import ClientConnection, connect

LIMIT = 60.0
_DESKTOP_SIZE = -223


class Stream(Protocol):
    """Bytes both ways."""

    def read(self, count: int) -> bytes: ...

    def write(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class UnixStream:
    """A VNC server's unix socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT)
        self._socket.connect(str(path))

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            if not more:
                raise EOFError("the VNC server has closed the connection")
            data += more
        return data

    def write(self, data: bytes) -> None:
        self._socket.sendall(data)

    def close(self) -> None:
        self._socket.close()


class WebSocketStream:
    """A VNC server behind a WebSocket, as a browser reaches it."""

    def __init__(self, url: str, origin: str, context: ssl.SSLContext | None = None) -> None:
        self.connection: ClientConnection = connect(
            url,
            origin=origin,  # type: ignore[arg-type]
            subprotocols=["binary"],  # type: ignore[list-item]
            compression=None,
            max_size=None,
            open_timeout=LIMIT,
            ssl=context,
            proxy=None,
            legacy=True,  # a plain connection, closed by close()
        )
        self._rest = b""

    def read(self, count: int) -> bytes:
        while len(self._rest) < count:
            message = self.connection.recv(timeout=LIMIT)
            assert isinstance(message, bytes)
            self._rest += message
        data, self._rest = self._rest[:count], self._rest[count:]
        return data

    def write(self, data: bytes) -> None:
        self.connection.send(data)

    def close(self) -> None:
        self.connection.close()


class Rfb:
    """A viewer: handshake at once, then pictures on demand (raw encoding, 32 bits a pixel)."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        assert stream.read(12) == b"RFB 003.008\n"
        stream.write(b"RFB 003.008\n")
        assert 1 in stream.read(stream.read(1)[0]), "the server asks for a password"
        stream.write(b"\x01")
        assert stream.read(4) == bytes(4)
        stream.write(b"\x01")
        self.width, self.height = struct.unpack("!HH", stream.read(4))
        stream.read(16)
        self.name = stream.read(struct.unpack("!I", stream.read(4))[0]).decode()
        # Little-endian BGRX, which Pillow calls BGRX.
        stream.write(struct.pack("!BxxxBBBBHHHBBBxxx", 0, 32, 24, 0, 1, 255, 255, 255, 16, 8, 0))
        stream.write(struct.pack("!BxHii", 2, 2, 0, _DESKTOP_SIZE))

    def picture(self) -> Image.Image:
        """The whole framebuffer now."""
        while True:
            self._stream.write(struct.pack("!BBHHHH", 3, 0, 0, 0, self.width, self.height))
            canvas = Image.new("RGB", (self.width, self.height))
            if self._update(canvas):
                return canvas

    def _update(self, canvas: Image.Image) -> bool:
        """Take one update in; False when the size changed in it."""
        read = self._stream.read
        while (kind := read(1)[0]) != 0:
            if kind == 3:  # ServerCutText
                read(3)
                read(struct.unpack("!I", read(4))[0])
            elif kind != 2:  # Bell
                raise AssertionError(f"unexpected message {kind}")
        whole = True
        for _ in range(struct.unpack("!xH", read(3))[0]):
            x, y, width, height, encoding = struct.unpack("!HHHHi", read(12))
            if encoding == _DESKTOP_SIZE:
                self.width, self.height, whole = width, height, False
            else:
                pixels = read(width * height * 4)
                if width and height:
                    canvas.paste(Image.frombytes("RGB", (width, height), pixels, "raw", "BGRX"), (x, y))
        return whole

    def key(self, keysym: int) -> None:
        """Press and release a key (X11 keysym)."""
        for down in (1, 0):
            self._stream.write(struct.pack("!BBxxI", 4, down, keysym))

    def type(self, text: str) -> None:
        """Type lower-case text."""
        for character in text:
            self.key(ord(character))

    def click(self, x: int, y: int) -> None:
        """Move the pointer and click the left button."""
        for buttons in (0, 1, 0):
            self._stream.write(struct.pack("!BBHH", 5, buttons, x, y))

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
