"""A real agent in a process of its own that kills itself with SIGKILL at a chosen point, to see what is left then.

    python -m support.agent_process FOLDER IMAGES CATALOGUE_ENTRY

It talks to its scheduler by lines of JSON. CRASH_AT=n in the environment: it dies just before the n-th thing that it
does to the world on behalf of guests (files made, written, renamed, given away or removed, programs started, messages
sent or settled), as Python's own audit events tell them (PEP 578), so nothing in the product knows of it. The point is
written to FOLDER/died.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from deskfleet.agent.accel import Accel
from deskfleet.agent.service import Service, lock
from deskfleet.agent.settings import AgentSchema
from deskfleet.runtime.bus import Delivery, Outgoing
from deskfleet.runtime.memory_bus import MemoryBroker
from deskfleet.runtime.service import SystemClock
from deskfleet.schemas import topology

_FILES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chown", "os.chmod", "os.truncate", "shutil.rmtree"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_ABOUT_GUESTS = ("/journal/", "/disks/", "/templates/", "/r/")


class Doom:
    """Counts what happens to the world, and ends the process at one of them."""

    def __init__(self, at: int, note: Path) -> None:
        self.at = at
        self.note = note
        self.count = 0
        self._lock = threading.Lock()

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        what = self._deed(event, arguments)
        if not what:
            return
        with self._lock:
            self.count += 1
            if self.count != self.at:
                return
            fd = os.open(self.note, os.O_CREAT | os.O_WRONLY, 0o600)
            os.write(fd, what.encode())
            os.close(fd)
            os.kill(os.getpid(), signal.SIGKILL)

    def _deed(self, event: str, arguments: tuple[Any, ...]) -> str:
        if event in _FILES or event == "open":
            path = str(arguments[0])
            if not any(part in path for part in _ABOUT_GUESTS) or path == str(self.note):
                return ""
            if event == "open" and not (arguments[2] & _WRITES):
                return ""
            return f"{event} {path}"
        if event == "subprocess.Popen":
            # prlimit stands in front of it.
            return next((f"start {word}" for word in arguments[1] if "qemu-system" in word), "")
        return f"{event.removeprefix('deskfleet.')} {arguments[0]}" if event.startswith("deskfleet.") else ""


async def main(folder: Path, images: Path) -> None:
    loop = asyncio.get_running_loop()
    broker = MemoryBroker(random.Random(1), SystemClock())
    broker.declare(topology.core() + topology.for_host("h1"))
    bus = broker.connect("agent-h1", lambda action: loop.call_soon(action) and None)
    consume, publish = bus.consume, bus.publish

    def settling(handler: Any) -> Any:
        def handle(delivery: Delivery) -> None:
            settle = delivery.settle

            def settled(how: Any) -> None:
                sys.audit("deskfleet.settle", delivery.type)
                settle(how)

            delivery.settle = settled
            handler(delivery)

        return handle

    def publishing(message: Outgoing) -> Any:
        if message.type == "vm.report.v1":
            sys.audit("deskfleet.publish", message.type)
        return publish(message)

    bus.consume = lambda queue, handler, **how: consume(queue, settling(handler), **how)  # type: ignore[method-assign]
    bus.publish = publishing  # type: ignore[method-assign]
    settings = AgentSchema().load(
        {
            "host": "h1",
            "broker_url": "amqp://agent-h1:canary-of-the-broker@unused/",
            "state": str(folder / "s"),
            "run": str(folder / "r"),
            "images": str(images),
            "console_listen": os.environ["CONSOLE"],
            "console_address": "127.0.0.1:1",
            "network": "none",
            "first_uid": 51_000_000,
            "last_uid": 51_000_009,
            "powerdown_s": 0,
            "heartbeat_s": 0.5,
        }
    )
    with lock(settings.state):
        service = Service(settings, Accel("tcg", ""), bus, SystemClock(), "test")
        service.recover()
        work = asyncio.create_task(service.run(asyncio.Event()))
        scheduler = broker.connect("scheduler", lambda action: action())
        scheduler.start()

        async def obey() -> None:
            orders = asyncio.StreamReader()
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
            while line := await orders.readline():
                order = json.loads(line)
                queue = topology.host_queue("h1")
                scheduler.publish(Outgoing(topology.COMMANDS, queue, order["type"], order["body"].encode()))

        obeying = asyncio.create_task(obey())
        while not (work.done() or obeying.done()):
            broker.deliver_one(topology.host_queue("h1"))
            for queue in (topology.SCHEDULER_REPORTS, topology.SCHEDULER_HEARTBEATS):
                while broker.pending(queue):
                    said = broker.drop(queue)
                    print(json.dumps({"type": said.type, "body": said.body.decode()}), flush=True)
            await asyncio.sleep(0.002)


if __name__ == "__main__":
    doom = Doom(int(os.environ.get("CRASH_AT", "0")), Path(sys.argv[1]) / "died")
    sys.addaudithook(doom.hook)
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
