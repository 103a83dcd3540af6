"""The console path while its processes come and go: draining, restarts in any order."""

from __future__ import annotations

import contextlib
import random
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.console_fleet import PATIENCE, ConsoleFleet, ConsoleHost, Proxy, accepts, hello, until
from websockets.exceptions import ConnectionClosed, WebSocketException

from deskfleet.runtime.bus import BusError
from deskfleet.schemas.host import Phase
from deskfleet.schemas.session import State

S, T = "a" * 32, "b" * 32


@pytest.fixture(scope="module")
def fleet() -> Iterator[ConsoleFleet]:
    with tempfile.TemporaryDirectory(prefix="dfc", ignore_cleanup_errors=True) as folder:
        made = ConsoleFleet(Path(folder))
        yield made
        made.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a unix socket's path has 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dfh", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.mark.parametrize("hurried", [False, True])
def test_sigterm_drains_and_a_second_one_does_not_wait(fleet: ConsoleFleet, folder: Path, hurried: bool) -> None:
    host = ConsoleHost("h1", folder, fleet.authority)
    host.start()
    host.show(S, 7)
    proxy = Proxy(fleet, f"proxy-drain-{hurried}", drain_s=PATIENCE)
    proxy.start()
    fleet.beat(host)
    until(lambda: proxy.knows(S), "the display is reached")
    assert proxy.process
    with proxy.connect(S) as console:
        console.recv(PATIENCE)
        proxy.process.child.send_signal(signal.SIGTERM)
        until(lambda: not accepts(proxy.port), "it takes nobody new")
        console.send(b"still")
        assert console.recv(PATIENCE) == b"still"
        if hurried:
            proxy.process.child.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionClosed):
                console.recv(PATIENCE)
    assert proxy.process.child.wait(PATIENCE) == 0
    host.stop()


@pytest.mark.parametrize("kill", [False, True])
def test_one_small_heartbeat_brings_desktops_back_after_a_restart(
    fleet: ConsoleFleet, folder: Path, kill: bool
) -> None:
    """The list of what a host runs comes once a minute; nobody waits for it."""
    host = ConsoleHost("h1", folder, fleet.authority)
    host.start()
    host.show(S, 7)
    host.show(T, 8)
    proxy = Proxy(fleet, f"proxy-small-{kill}")
    proxy.start()
    fleet.beat(host)
    until(lambda: proxy.knows(S), "the display is reached")
    assert proxy.process
    proxy.process.end(kill)
    proxy.start()
    assert proxy.refusal(S) == (502, "host_silent"), "it has heard nothing yet"
    fleet.beat(host, small=True)
    until(lambda: proxy.figure("hosts") == 1, "the heartbeat has come in")
    with proxy.connect(S) as console, proxy.connect(T, 8) as other:
        assert console.recv(PATIENCE) == hello(S)
        assert other.recv(PATIENCE) == hello(T, 8)
        fleet.announce(S, State.STOPPING)
        with pytest.raises(ConnectionClosed):
            console.recv(PATIENCE)
        host.guests[T] = (8, Phase.ENDED)
        fleet.beat(host)
        with pytest.raises(ConnectionClosed):
            other.recv(PATIENCE)
    assert proxy.refusal("c" * 32) == (409, "session_ended"), "now its host has listed what it runs"
    host.guests[T] = (8, Phase.RUNNING)
    host.stop()
    proxy.process.end(kill=True)


def test_restarts_in_any_order_never_show_another_desktop(fleet: ConsoleFleet, folder: Path) -> None:
    """Each display says whose it is, and of which start. Sessions move while processes die and full heartbeats are
    lost, and some hosts go on showing what has been started anew elsewhere; a wrong name is never read."""
    rng = random.Random(22)
    hosts = [ConsoleHost(name, folder, fleet.authority) for name in ("h1", "h2")]
    for host in hosts:
        host.start()
    proxies = [Proxy(fleet, f"proxy-c22-{number}", settle_s=0.2) for number in range(2)]
    for proxy in proxies:
        proxy.start()
    numbers = {host.name: 10 for host in hosts}
    where: dict[str, tuple[ConsoleHost, int]] = {}
    sids = [f"{number:032x}" for number in range(20)]
    wrong: list[tuple[str, object]] = []
    right = [0]
    done = threading.Event()

    def place(sid: str) -> None:
        host = rng.choice([host for host in hosts if sid not in where or host is not where[sid][0]])
        numbers[host.name] += 1
        host.show(sid, numbers[host.name])
        where[sid] = host, numbers[host.name]  # tickets are for what runs

    def look() -> None:
        mine = random.Random(threading.get_ident())
        while not done.is_set():
            sid, proxy = mine.choice(sids), mine.choice(proxies)
            host, generation = where[sid]
            try:
                with proxy.connect(sid, generation, host=host.name, open_timeout=10) as console:
                    said = console.recv(10)
            except (WebSocketException, OSError, EOFError):  # refused, cut, or nobody there
                continue
            if said == hello(sid, generation):
                right[0] += 1
            else:
                wrong.append((sid, said))

    for sid in sids:
        place(sid)

    def beat() -> None:
        for host in hosts:
            with contextlib.suppress(BusError):
                fleet.beat(host, small=rng.random() < 0.5)

    viewers = [threading.Thread(target=look) for _ in range(3)]
    for viewer in viewers:
        viewer.start()
    try:
        steps = ["proxy0", "proxy1", "h1", "h2", "move", "move", "move", "broker", "proxy0", "move", "h1", "move"]
        rng.shuffle(steps)
        for step in steps:
            if step == "broker":
                fleet.broker.restart()
            elif step == "move":
                for sid in rng.sample(sids, 5):
                    old, _ = where[sid]
                    place(sid)
                    if rng.random() < 0.5:
                        old.hide(sid)
            elif step.startswith("proxy"):
                proxy = proxies[int(step[-1])]
                assert proxy.process
                proxy.process.end(kill=rng.random() < 0.5)
                proxy.start()
            else:
                host = hosts[int(step[-1]) - 1]
                assert host.process
                host.process.end(kill=rng.random() < 0.5)
                host.start()
            seen = right[0]
            until(lambda seen=seen: beat() or right[0] >= seen + 25, f"desktops are seen after {step}")  # type: ignore[misc]
    finally:
        done.set()
        for viewer in viewers:
            viewer.join()
    assert wrong == []
    for sid in sids:
        for proxy in proxies:
            until(lambda sid=sid, proxy=proxy: beat() or proxy.knows(sid, where[sid][1], where[sid][0].name), sid)  # type: ignore[misc]
    for host in hosts:
        host.stop()
