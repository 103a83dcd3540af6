"""The main loop, signals, systemd's protocol, clocks, and the backoff."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.bus_harness import TickingClock

from deskfleet.runtime.bus import Delivery, Settlement, Tick, backoff, run_handler
from deskfleet.runtime.service import MainLoop, SystemClock, notify_systemd, stop_on_signals, watchdog_seconds


def run(loop: MainLoop) -> threading.Thread:
    thread = threading.Thread(target=loop.run)
    thread.start()
    return thread


def test_posted_work_runs_in_order_on_one_thread() -> None:
    loop = MainLoop(SystemClock())
    ran: list[tuple[int, str]] = []

    def post(number: int) -> None:
        loop.post(lambda: ran.append((number, threading.current_thread().name)))

    for number in range(100):
        post(number)
    loop.post(loop.stop)
    thread = run(loop)
    thread.join()
    assert ran == [(n, thread.name) for n in range(100)]


def test_an_exception_does_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    loop = MainLoop(SystemClock())

    def fail() -> None:
        raise ValueError("oops")

    loop.post(fail)
    loop.post(loop.stop)
    loop.run()
    assert "oops" in caplog.text


def test_stop_ends_a_waiting_loop_and_leaves_the_rest_undone() -> None:
    loop = MainLoop(SystemClock())
    thread = run(loop)
    loop.stop()
    thread.join()
    ran: list[None] = []
    loop.post(lambda: ran.append(None))
    loop.run()
    assert ran == []


def test_timers_run_in_the_order_of_their_time_by_the_given_clock() -> None:
    clock = TickingClock()
    loop = MainLoop(clock)
    ran: list[str] = []
    loop.call_later(20, lambda: ran.append("c"))
    loop.call_later(10, lambda: ran.append("a"))
    loop.call_later(10, lambda: ran.append("b"))
    cancelled = loop.call_later(10, lambda: ran.append("never"))
    cancelled.cancel()
    loop.call_later(30, loop.stop)
    loop.post(lambda: setattr(clock, "now", clock.now + 40))
    loop.run()
    assert ran == ["a", "b", "c"]


def test_a_timer_does_not_run_early() -> None:
    clock = TickingClock()
    loop = MainLoop(clock)
    ran: list[float] = []
    loop.call_later(5, lambda: ran.append(clock.now))
    began = clock.now
    steps = iter([4.9, 0.2])

    def step() -> None:
        clock.now += next(steps)
        loop.post(lambda: loop.post(step) if not ran else loop.stop())

    loop.post(step)
    loop.run()
    assert ran == [pytest.approx(began + 5.1)]


def test_every_goes_on_after_a_failure_and_makes_up_for_nothing() -> None:
    clock = TickingClock()
    loop = MainLoop(clock)
    ran: list[float] = []

    def tick() -> None:
        ran.append(clock.now)
        if len(ran) == 3:
            loop.stop()
        loop.post(lambda: setattr(clock, "now", clock.now + 35))
        raise ValueError("tick")

    loop.every(10, tick)
    loop.post(lambda: setattr(clock, "now", clock.now + 10))
    loop.run()
    assert len(ran) == 3 and ran[1] - ran[0] == 35


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_the_loop(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    loop = MainLoop(SystemClock())
    try:
        stop_on_signals(loop.stop)
        loop.post(lambda: os.kill(os.getpid(), number))
        loop.run()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told(tmp_path: Path, kind: str) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"@deskfleet-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name.replace("@", "\0"))
        systemd.settimeout(60)
        assert notify_systemd("READY=1", {"NOTIFY_SOCKET": name})
        assert systemd.recv(100) == b"READY=1"


def test_without_systemd_nothing_happens(tmp_path: Path) -> None:
    assert not notify_systemd("READY=1", {})
    assert not notify_systemd("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "missing")})


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_asked(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_seconds(environ) == seconds


def test_the_system_clock_counts_suspended_time() -> None:
    clock = SystemClock()
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= clock.monotonic() <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert abs(clock.wall() - time.time()) < 60


@given(st.integers(0, 10**9), st.integers())
def test_backoff_is_bounded_and_never_zero(attempt: int, seed: int) -> None:
    delay = backoff(attempt, random.Random(seed))
    assert 0.125 <= delay <= 8.0


@given(st.integers(0, 40), st.integers(), st.integers())
def test_backoff_grows(attempt: int, seed: int, other: int) -> None:
    """Three tries later the least wait is longer than the longest was, until the cap."""
    early, late = backoff(attempt, random.Random(seed)), backoff(attempt + 3, random.Random(other))
    assert late > early or late >= 4.0


def test_backoff_is_a_function_of_the_given_randomness() -> None:
    assert [backoff(n, random.Random(1)) for n in range(9)] == [backoff(n, random.Random(1)) for n in range(9)]
    assert len({backoff(3, random.Random(seed)) for seed in range(50)}) > 40


@pytest.mark.parametrize(("redelivered", "expected"), [(False, [Settlement.REQUEUE]), (True, [Settlement.REJECT])])
def test_a_failing_handler_gives_back_once(redelivered: bool, expected: list[Settlement]) -> None:
    settled: list[Settlement] = []
    delivery = Delivery("q", "x", "k", "t", b"", "id", "", "", redelivered, settled.append)

    def handler(_: Delivery) -> None:
        raise ValueError("no")

    run_handler(handler, delivery)
    assert settled == expected


def test_a_tick_that_still_runs_is_not_started_again() -> None:
    waiting: list[Callable[[], None]] = []
    ran: list[None] = []
    tick = Tick(1.0, lambda: ran.append(None))

    def dispatch(action: Callable[[], None]) -> bool:
        waiting.append(action)
        return True

    tick.begin(dispatch)
    tick.begin(dispatch)
    assert len(waiting) == 1
    waiting.pop()()
    tick.begin(dispatch)
    assert len(waiting) == 1 and len(ran) == 1
    waiting.clear()
    tick.running = False
    tick.begin(lambda _: False)
    tick.begin(dispatch)
    assert len(waiting) == 1
