"""A TCP relay of our own, so that one of several clients of a server has a path of its own, which can be cut.

A cut is the kernel's: it drops every packet of the relay's port on the loopback interface (nftables; root only), as a
network that is gone does.
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import threading
from types import TracebackType

_CHUNK = 65536


class Relay:
    """Listens on a free loopback port and passes everything to `target`: (host, port), or the path of a unix socket."""

    def __init__(self, target: tuple[str, int] | str) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._stop = threading.Event()
        self._cut = False
        self._thread = threading.Thread(target=self._run, name="relay")

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.heal()
        self._stop.set()
        self._thread.join()

    def cut(self) -> None:
        """Nothing passes any more, either way; nobody is told."""
        table = f"inet deskfleet_cut_{self.port}"
        rules = [f"tcp {end} {self.port} drop" for end in ("dport", "sport")]
        chain = "\n".join(["type filter hook input priority 0;", *(f'iifname "lo" {rule}' for rule in rules)])
        _nft(f"table {table} {{\nchain input {{\n{chain}\n}}\n}}\n")
        self._cut = True

    def heal(self) -> None:
        """Everything passes again."""
        if self._cut:
            _nft(f"delete table inet deskfleet_cut_{self.port}")
            self._cut = False

    def _dial(self) -> socket.socket:
        if isinstance(self._target, str):
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            return far
        return socket.create_connection(self._target)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            pairs: dict[socket.socket, socket.socket] = {}
            while not self._stop.is_set():
                for key, _ in selector.select(0.05):
                    near = key.fileobj
                    assert isinstance(near, socket.socket)
                    if near is self._listener:
                        self._join(selector, pairs)
                    elif near in pairs:
                        self._pass(selector, pairs, near)
            for end in [*pairs, self._listener]:
                end.close()

    def _join(self, selector: selectors.BaseSelector, pairs: dict[socket.socket, socket.socket]) -> None:
        near, _ = self._listener.accept()
        try:
            far = self._dial()
        except OSError:
            near.close()
            return
        pairs[near], pairs[far] = far, near
        selector.register(near, selectors.EVENT_READ)
        selector.register(far, selectors.EVENT_READ)

    def _pass(
        self, selector: selectors.BaseSelector, pairs: dict[socket.socket, socket.socket], near: socket.socket
    ) -> None:
        far = pairs[near]
        try:
            data = near.recv(_CHUNK)
            far.sendall(data)
        except OSError:
            data = b""
        if not data:
            for end in (near, far):
                selector.unregister(end)
                del pairs[end]
                end.close()


def _nft(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True, capture_output=True)
