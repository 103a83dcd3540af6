"""How a service process lives: its clock, its main loop, its signals and its word to systemd.

The only module that reads clocks; everything else gets a `Clock`.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import queue
import signal
import socket
import time
from collections.abc import Callable, Mapping
from typing import Protocol

log = logging.getLogger(__name__)


class Clock(Protocol):
    """Where time comes from."""

    def monotonic(self) -> float:
        """Seconds since some fixed point; never goes back and is not moved by setting the date."""
        ...

    def wall(self) -> float:
        """Seconds since 1970 UTC; may jump either way."""
        ...


class SystemClock:
    """The machine's clocks.

    monotonic() is CLOCK_BOOTTIME: CLOCK_MONOTONIC stands still while a machine is suspended, so after a suspend a
    lease, a ticket or a session lifetime measured with it would look fresh although hours have passed.
    """

    def monotonic(self) -> float:
        """Seconds since boot, time in suspend included (clock_gettime(2))."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        """Seconds since 1970 UTC."""
        return time.time()


class Timer:
    """A call that MainLoop.call_later arranged; cancel() undoes it."""

    __slots__ = ("action", "due")

    def __init__(self, due: float, action: Callable[[], None]) -> None:
        self.due = due
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Do not run the action; harmless when it ran already."""
        self.action = None


class MainLoop:
    """One thread that runs what others post to it, in order, and timers. Exceptions are logged and the loop goes on.

    Everything passes through one SimpleQueue, the only queue whose put() may be called from a signal handler;
    the timers belong to the loop's thread alone, so there is no lock.
    """

    # queue waits are not measured by CLOCK_BOOTTIME, so a sleep is cut up: after a suspend, timers that fell due in
    # it run at most this many seconds late.
    _LONGEST_SLEEP = 1.0

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._stopping = False

    def post(self, action: Callable[[], None]) -> None:
        """Have `action` run on the loop's thread. Any thread, and signal handlers."""
        self._posted.put(action)

    def call_later(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Have `action` run once on the loop's thread, `seconds` from now. Any thread."""
        timer = Timer(self._clock.monotonic() + seconds, action)
        self.post(lambda: heapq.heappush(self._timers, (timer.due, next(self._order), timer)))
        return timer

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        """Have `action` run every `seconds` on the loop's thread; a late run is not made up for."""

        def run() -> None:
            self.call_later(seconds, run)
            action()

        self.call_later(seconds, run)

    def stop(self) -> None:
        """Make run() return after the action that is under way. Any thread, and signal handlers."""
        self._stopping = True
        self.post(lambda: None)

    def run(self) -> None:
        """Run until stop(). What was posted and not begun by then stays undone."""
        while not self._stopping:
            action = self._next()
            if action is None:
                continue
            try:
                action()
            except Exception:
                log.exception("an action on the main loop failed")

    def _next(self) -> Callable[[], None] | None:
        """The next thing to do; None after a cancelled timer or a sleep with nothing to do."""
        now = self._clock.monotonic()
        pause = self._LONGEST_SLEEP
        if self._timers:
            due = self._timers[0][0]
            if due <= now:
                return heapq.heappop(self._timers)[2].action
            pause = min(pause, due - now)
        try:
            return self._posted.get(timeout=pause)
        except queue.Empty:
            return None


def stop_on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` on SIGTERM and SIGINT. Main thread only (signal(2) by way of Python)."""

    def handle(*_: object) -> None:
        stop()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def notify_systemd(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send READY=1, STOPPING=1, WATCHDOG=1 or STATUS=... as sd_notify(3) does; False when nobody listens."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(1.0)
            channel.connect(address)
            channel.sendall(state.encode())
    except OSError as error:
        log.warning("cannot notify systemd: %s", error)
        return False
    return True


def watchdog_seconds(environ: Mapping[str, str] = os.environ) -> float | None:
    """How often to send WATCHDOG=1: half of what the unit's WatchdogSec allows (sd_watchdog_enabled(3)), or None."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdigit() or int(usec) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2_000_000
