"""A real agent with real qemu guests in one process, on an in-memory bus; and the images they start from."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from demo.broker import free_port

from deskfleet.agent.accel import choose
from deskfleet.agent.lending import Reset, reset
from deskfleet.agent.processes import Spawn, spawn
from deskfleet.agent.service import Service
from deskfleet.agent.settings import AgentSchema
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker
from deskfleet.runtime.service import SystemClock
from deskfleet.schemas import topology
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import GuestReport, HostReport, Phase
from deskfleet.schemas.machine import Machine, parse_machine
from deskfleet.schemas.messages import (
    HostFence,
    HostTemplates,
    Message,
    TemplateOrdered,
    VmLook,
    VmPicture,
    VmReport,
    VmStart,
    VmStop,
)
from deskfleet.schemas.session import Outcome, Resources
from deskfleet.schemas.wire import decode, encode

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 90.0


def build_tiny(folder: Path) -> Machine:
    """Build the tiny machine into `folder` and return its catalogue entry."""
    line = ["bash", str(ROOT / "deploy/build-machine"), "tiny", "--out", str(folder)]
    subprocess.run(line, check=True, capture_output=True)
    return parse_machine("tiny", (folder / "catalogue/tiny.toml").read_text())


def start_order(machine: Machine, sid: str, generation: int, **changes: object) -> VmStart:
    """The command that starts a guest of this machine."""
    values: dict[str, object] = {
        "sid": sid,
        "generation": generation,
        "user": "ann",
        "machine": machine.name,
        "os": machine.os,
        "sha256": machine.sha256,
        "format": machine.format,
        "video": machine.video,
        "firmware": machine.firmware,
        "resources": machine.defaults,
        "gpu_addresses": (),
        "persistent": True,
        "lifetime_s": 3600,
        "grace_s": 60,
        "connect_s": 600,
        "drivers": machine.drivers,
        **changes,
    }
    return VmStart(**values)  # type: ignore[arg-type]


class Host:
    """One host under test. Folders are short, since unix sockets' paths are."""

    def __init__(self, folder: Path, machine: Machine, images: Path, **settings: object) -> None:
        self.folder = folder
        self.machine = machine
        self.settings = AgentSchema().load(
            {
                "host": "h1",
                "broker_url": "amqp://unused",
                "state": str(folder / "s"),
                "run": str(folder / "r"),
                "images": str(images),
                "console_listen": f"127.0.0.1:{free_port()}",
                "console_address": "127.0.0.1:1",
                "first_uid": 50_000_000,
                "last_uid": 50_000_099,
                **settings,
            }
        )
        self.reports: list[GuestReport] = []
        self.heartbeats: list[HostReport] = []
        self.generation = 0
        self.service: Service
        self._broker = MemoryBroker(random.Random(1), SystemClock())
        self._broker.declare(topology.core() + topology.for_host("h1") + topology.for_portal("w1"))
        self.pictures: list[VmPicture] = []

    @property
    def run(self) -> Path:
        return self.settings.run  # type: ignore[no-any-return]

    async def __aenter__(self) -> Host:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()
        self.service.purge()

    async def end(self) -> None:
        """End the agent; its guests go on."""
        self._stop.set()
        await self._task
        self._bus.stop()

    async def start(
        self,
        spawner: Spawn = spawn,
        sysfs: Path = Path("/sys"),
        dev: Path = Path("/dev"),
        reset: Reset = reset,
    ) -> Host:
        """Start the agent."""
        loop = asyncio.get_running_loop()
        self._bus = bus = self._broker.connect("agent-h1", lambda action: loop.call_soon(action) and None)
        self.service = Service(
            self.settings, choose(), bus, SystemClock(), "test", spawn=spawner, sysfs=sysfs, dev=dev, reset=reset
        )
        self.service.recover()
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self.service.run(self._stop))
        self.send(HostFence("h1", 0))
        await self.until(lambda: not self.service.agent.fenced, "the fence")
        await self.until(lambda: self.machine.sha256 in self.heartbeats[-1].images, "the image")
        return self

    def send(self, message: VmStart | VmStop | HostFence | HostTemplates | TemplateOrdered) -> None:
        """Give the agent a command."""
        self._publish("scheduler", topology.host_queue("h1"), message)

    def look(self, sid: str) -> None:
        """Ask for a picture of a guest's screen, as a portal does."""
        self._publish("portal", topology.look_queue("h1"), VmLook(sid, "w1"))

    def _publish(self, login: str, queue: str, message: Message) -> None:
        bus = self._broker.connect(login, lambda action: action())
        bus.start()
        kind, body = encode(message)
        bus.publish(Outgoing(topology.COMMANDS, queue, kind, body)).result()
        bus.stop()

    def launch(self, sid: str, **changes: object) -> None:
        """Command a start under the next number."""
        self.generation += 1
        self.send(start_order(self.machine, sid, self.generation, **changes))

    def stop(self, sid: str) -> None:
        """Command a stop."""
        self.send(VmStop(sid, self.generation, Outcome.STOPPED, Reason.STOPPED_BY_USER))

    def _read(self) -> None:
        for queue in (topology.SCHEDULER_REPORTS, topology.SCHEDULER_HEARTBEATS, topology.pictures_queue("w1")):
            while self._broker.pending(queue):
                pending = self._broker.drop(queue)
                message = decode(pending.type, pending.body)
                if isinstance(message, VmReport):
                    self.reports.append(message.guest)
                elif isinstance(message, HostReport):
                    self.heartbeats.append(message)
                elif isinstance(message, VmPicture):
                    self.pictures.append(message)

    async def until(self, condition: Callable[[], object], what: str, patience_s: float = PATIENCE) -> None:
        """Let the agent work until something holds."""
        deadline = time.monotonic() + patience_s
        while True:
            for queue in (topology.host_queue("h1"), topology.look_queue("h1")):
                self._broker.deliver_one(queue)
            self._read()
            if (self.heartbeats or self.reports) and condition():
                return
            assert time.monotonic() < deadline, f"waited for {what}; reports: {self.reports[-3:]}"
            await asyncio.sleep(0.01)

    async def phase(self, sid: str, phase: Phase) -> GuestReport:
        """Wait until a guest is in a phase, and return its report."""
        found: list[GuestReport] = []

        def reached() -> bool:
            found[:] = [r for r in self.reports if r.sid == sid][-1:]
            return bool(found) and found[0].phase is phase

        await self.until(reached, f"{sid[:8]} to be {phase}")
        return found[0]

    def leftovers(self) -> list[str]:
        """Files and processes that an ended guest must not leave."""
        files = [str(p) for p in self.run.iterdir()] + [str(p) for p in (self.folder / "s/disks").iterdir()]
        return files + sorted(self.service.hypervisor.running())


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder directly below /tmp that other users may pass through."""
    folder = Path(tempfile.mkdtemp(prefix="df", dir="/tmp"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scenario(work: Callable[[], Awaitable[None]]) -> None:
    """Run an async test."""
    asyncio.run(work())  # type: ignore[arg-type]


def with_options(*extra: str) -> Spawn:
    """A spawner that adds options to qemu's line (and to nothing else)."""

    def wrapped(argv: Sequence[str], **how: Any) -> int:
        line = [*argv, *extra] if "qemu-system" in argv[0] else argv
        return spawn(line, **how)

    return wrapped


assert os.geteuid() == 0, "the system tests need root: guests get user ids of their own"
SMALL = Resources(1, 128, 1)
