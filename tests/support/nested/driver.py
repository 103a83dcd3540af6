"""Inside the outer guest: one real agent, told what to do line by line over the second serial port, in JSON.

Every answer tells the GPUs as the agent's heartbeats would, besides what was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import tty
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support import guests
from support.guests import Host, short_folder

from deskfleet.agent.accel import Accel
from deskfleet.agent.processes import spawn
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import parse_machine


def spawn_no_bridge(argv: Sequence[str], **how: Any) -> int:
    """Nobody looks at the consoles here, and the bridge would take its share of a slow machine."""
    if "qemu-system" not in argv[0]:
        raise FileNotFoundError(2, "not in this machine", argv[0])
    return spawn(argv, **how)


async def obey(host: Host, order: dict[str, Any]) -> object:
    """Do what a line asks for."""
    match order:
        case {"shell": str(script)}:
            done = await asyncio.to_thread(
                subprocess.run, ["sh", "-c", script], capture_output=True, text=True, check=False
            )
            return [done.returncode, done.stdout + done.stderr]
        case {"launch": str(sid), "gpu": list(addresses)}:
            host.launch(sid, gpu_addresses=tuple(addresses))
            await host.until(lambda: phase_of(host, sid) in (Phase.RUNNING, Phase.ENDED), "the launch's outcome")
        case {"stop": str(sid)}:
            host.stop(sid)
            await host.phase(sid, Phase.ENDED)
        case {"look": _}:
            await host.service.lending.refresh(host.service._held)  # what it does every five seconds
    return [asdict(report) for report in host.reports]


def phase_of(host: Host, sid: str) -> Phase | None:
    """Where a guest is, as its last report says."""
    return next((report.phase for report in reversed(host.reports) if report.sid == sid), None)


async def begin(folder: Path, after: Host | None = None) -> Host:
    """Start the agent, `after` a former one on the same state has ended as by a restart of its service."""
    machine = parse_machine("painter", Path("/images/painter.toml").read_text())
    host = Host(folder, machine, Path("/images"), network="none", powerdown_s=0, hugepages="gpu", disk_floor_mib=0)
    if after:
        after._stop.set()
        await after._task
        host.generation = after.generation
    return await host.start(spawn_no_bridge)


async def work() -> None:
    """Serve until the machine is switched off."""
    guests.choose = lambda: Accel("tcg", "")  # type: ignore[assignment]  # the probe would be a guest more
    with short_folder() as folder, open("/dev/ttyS1", "r+b", buffering=0) as line:
        tty.setraw(line.fileno())
        host = await begin(folder)
        line.write(b'"ready"\n')
        while True:
            order = json.loads(await asyncio.to_thread(line.readline))
            answer: dict[str, object] = {}
            if "restart" in order:
                host = await begin(folder, after=host)
            with contextlib.suppress(AssertionError):
                answer["said"] = await obey(host, order)
            host.service.link.beat()
            answer["gpus"] = [asdict(gpu) for gpu in host.service.lending.gpus(())]
            line.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    asyncio.run(work())
