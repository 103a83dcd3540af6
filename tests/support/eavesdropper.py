"""A server that says what it is told to and keeps every byte that it gets, before and inside TLS."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType


class Eavesdropper:
    """Listens on a port of its own. `answer` makes the reply to a piece of what was received; b"" is silence.

    After a reply that ends with `upgrade` it begins TLS, if it has a `context`; with `at_once` from the first byte.
    """

    def __init__(
        self,
        answer: Callable[[bytes], bytes],
        greeting: bytes = b"",
        context: ssl.SSLContext | None = None,
        at_once: bool = False,
        upgrades: Callable[[bytes], bool] = lambda piece: False,
    ) -> None:
        self.got = b""
        self.inside = b""
        self.connections = 0
        self._answer = answer
        self._greeting = greeting
        self._context = context
        self._at_once = at_once
        self._upgrades = upgrades
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError):
            if self._at_once:
                connection = self._wrap(connection)
            connection.sendall(self._greeting)
            while piece := connection.recv(65536):
                self.got += piece
                if isinstance(connection, ssl.SSLSocket):
                    self.inside += piece
                connection.sendall(self._answer(piece))
                if self._context and not isinstance(connection, ssl.SSLSocket) and self._upgrades(piece):
                    connection = self._wrap(connection)

    def _wrap(self, connection: socket.socket) -> ssl.SSLSocket:
        assert self._context
        wrapped = self._context.wrap_socket(connection, server_side=True)
        self._open.append(wrapped)
        return wrapped

    def close(self) -> None:
        """Stop."""
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.close()

    def __enter__(self) -> Eavesdropper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
