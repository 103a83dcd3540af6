"""Asking other machines about passwords: each in its turn, none for too long, and one that fails rests for a while."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

from deskfleet.portal.auth_settings import Endpoint
from deskfleet.runtime.service import Clock
from deskfleet.schemas.errors import DeskfleetError

_Found = TypeVar("_Found")

_FIRST_REST_S = 2.0
_LONGEST_REST_S = 60.0


class Away(DeskfleetError):
    """Raised when a server can't be asked; the text is for the log, and holds nothing that was typed."""


class Deadline:
    """Ends a conversation that takes too long altogether: a socket's own limit begins anew with every byte.

    It keeps a second descriptor of the connection, so that it works whatever has been wrapped around the first.
    """

    def __init__(self, seconds: float) -> None:
        self._lock = threading.Lock()
        self._watched: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def watch(self, connected: socket.socket) -> None:
        """Cut this connection, too, when the time is over."""
        with self._lock:
            # Not dup(): of a TLS socket there can be no second one.
            copy = os.dup(connected.fileno())
            self._watched.append(socket.socket(connected.family, connected.type, connected.proto, copy))

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()
        with self._lock:
            for connected in self._watched:
                connected.close()
            self._watched.clear()

    def _cut(self) -> None:
        with self._lock:
            for connected in self._watched:
                with suppress(OSError):  # the other side was faster
                    connected.shutdown(socket.SHUT_RDWR)


@dataclass(slots=True)
class _Rest:
    failures: int = 0
    until: float = 0.0
    why: str = ""


class Servers:
    """The servers of one method. One that can't be asked is left alone, for longer each time, and then tried by one
    person while the others still do without it."""

    def __init__(self, endpoints: Sequence[Endpoint], timeout_s: float, clock: Clock) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._rests = {endpoint: _Rest() for endpoint in endpoints}

    def ask(self, question: Callable[[Endpoint], _Found]) -> _Found:
        """The answer of the first server that can be asked. Raises Away when none can.

        After the time for one conversation no further server is begun with, so it takes twice that at most.
        """
        begun = self._clock.monotonic()
        reasons = []
        for endpoint in self._rests:
            if not self._take(endpoint):
                reasons.append(f"{endpoint} rests after: {self._rests[endpoint].why}")
            elif self._clock.monotonic() - begun >= self._timeout_s:
                break
            else:
                try:
                    found = question(endpoint)
                except Away as error:
                    self._failed(endpoint, str(error))
                    reasons.append(f"{endpoint}: {error}")
                else:
                    self._worked(endpoint)
                    return found
        raise Away("; ".join(reasons))

    def _take(self, endpoint: Endpoint) -> bool:
        with self._lock:
            rest, now = self._rests[endpoint], self._clock.monotonic()
            if now < rest.until:
                return False
            if rest.failures:
                rest.until = now + self._timeout_s
            return True

    def _failed(self, endpoint: Endpoint, why: str) -> None:
        with self._lock:
            rest = self._rests[endpoint]
            pause = min(_LONGEST_REST_S, _FIRST_REST_S * 2.0 ** min(rest.failures, 10))
            rest.failures, rest.why = rest.failures + 1, why
            rest.until = self._clock.monotonic() + pause

    def _worked(self, endpoint: Endpoint) -> None:
        with self._lock:
            self._rests[endpoint] = _Rest()
