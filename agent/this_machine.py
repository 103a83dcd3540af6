"""How preflight asks the machine that it runs on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from pathlib import Path

from deskfleet.agent import accel
from deskfleet.agent.gpus import find_gpus
from deskfleet.agent.preflight import Machine
from deskfleet.agent.settings import AgentSettings
from deskfleet.runtime.amqp import AmqpBus
from deskfleet.runtime.amqp_wire import BadBrokerUrl, trust
from deskfleet.runtime.bus import BusError
from deskfleet.runtime.service import SystemClock
from deskfleet.schemas import topology
from deskfleet.schemas.config import address

_PATIENCE_S = 5.0


def this_machine(settings: AgentSettings, *, running: bool | None = None) -> Machine:
    """The machine as it is. `running`: an agent works here; None = find out by its lock."""
    return Machine(
        settings=settings,
        root=Path("/"),
        run=_run,
        probe=partial(accel.probe, uid=settings.uids.start if os.geteuid() == 0 else None),
        gpus=partial(find_gpus, Path("/sys"), settings.gpu_names),
        listen=_listen,
        broker=partial(_broker, settings),
        disk=_disk,
        memlock=_memlock,
        is_root=os.geteuid() == 0,
        running=_is_locked(settings.state) if running is None else running,
    )


def _run(argv: Sequence[str]) -> tuple[int, str]:
    environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S,
            check=False, env=environ,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stdout + done.stderr


def _listen(where: str) -> str:
    host, port = address(where)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _disk(folder: Path) -> tuple[int, int, int]:
    found = os.statvfs(folder)
    # A file system that makes inodes as it goes (btrfs) has none to count.
    inodes = found.f_favail if found.f_files else 1
    return found.f_frsize * found.f_bavail, found.f_frsize * found.f_blocks, inodes


def _memlock() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _is_locked(state: Path) -> bool:
    with contextlib.suppress(OSError), (state / "agent.lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _broker(settings: AgentSettings) -> tuple[str, int]:
    """Connect once, with the agent's own login, and ask for this host's queue."""
    up = threading.Event()
    problems: list[str] = []
    now: Callable[[Callable[[], None]], None] = lambda action: action()  # noqa: E731  each callback at once, on its thread
    try:
        bus = AmqpBus(
            settings.broker_url.reveal().split(),
            name=f"preflight of {settings.host}",
            dispatch=now,
            clock=SystemClock(),
            rng=random.Random(),  # noqa: S311  jitter of the reconnects
            tls=trust(settings.broker_ca),
        )
    except BadBrokerUrl as error:
        return str(error), 0
    bus.on_connect(up.set)
    bus.on_fatal(lambda error: problems.append(str(error)))
    bus.start()
    try:
        if not up.wait(_PATIENCE_S):
            return problems[0] if problems else "the broker can't be reached", 0
        return "", bus.depth(topology.host_queue(settings.host)).result(_PATIENCE_S).consumers
    except (BusError, FutureTimeout) as error:
        return f"this host's queue: {error}", 0
    finally:
        bus.stop()
