"""python -m deskfleet.agent.trial: start a machine once on this computer, look at its screen, and clear it away.

The same hypervisor code as in the agent, so a machine that shows its picture here starts on a host like this one. It
needs neither broker nor settings, and does not meet an agent that runs here: folders and user id are its own. The
guest gets no network. `deskfleet machine test` calls it; the answer is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deskfleet.agent.accel import Accel, choose
from deskfleet.agent.facts import boot_id
from deskfleet.agent.hypervisor import QemuHypervisor
from deskfleet.agent.images import Disks, ImageIndex
from deskfleet.agent.journal import Entry
from deskfleet.agent.processes import spawn
from deskfleet.agent.qmp import MonitorError, monitor
from deskfleet.agent.starter import Config
from deskfleet.schemas.errors import DeskfleetError, Reason
from deskfleet.schemas.host import Phase
from deskfleet.schemas.machine import Machine, parse_machine
from deskfleet.schemas.messages import VmStart
from deskfleet.schemas.session import Birth

#: The guest's user when we are root: just below those that agents give to their guests by default.
_UIDS = range(199_999, 200_000)
_DAY_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class Result:
    """How it went: `running` (with a picture), `failed` or `ended`; milliseconds until the display answered."""

    phase: str
    accel: str
    ready_ms: int = 0
    reason: str = ""
    detail: str = ""
    screenshot: str = ""


class _News:
    """What the hypervisor tells of the one guest."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.over = asyncio.Event()
        self.reason = ""
        self.detail = ""

    def ready(self, _sid: str, _birth: Birth) -> None:
        self.up.set()

    def failed(self, _sid: str, reason: Reason, detail: str) -> None:
        self.reason, self.detail = reason.value, detail
        self.over.set()

    def exited(self, _sid: str, detail: str = "") -> None:
        self.detail = detail
        self.over.set()

    def viewers(self, _sid: str, _count: int) -> None:
        pass

    def says(self, _sid: str, text: str) -> None:
        self.detail = text


def order(machine: Machine, sid: str) -> VmStart:
    """The command that starts this machine in its default size."""
    return VmStart(
        sid=sid,
        generation=1,
        user="trial",
        machine=machine.name,
        os=machine.os,
        sha256=machine.sha256,
        format=machine.format,
        video=machine.video,
        firmware=machine.firmware,
        resources=machine.defaults,
        gpu_addresses=(),
        persistent=True,
        lifetime_s=_DAY_S,
        grace_s=0,
        connect_s=_DAY_S,
        drivers=machine.drivers,
    )


async def attempt(machine: Machine, images: Path, target: Path, seconds: float, accel: Accel) -> Result:
    """Start the machine, wait so long, put its screen into the new file `target`, end it.

    Raises:
        DeskfleetError: the picture can't be taken.
        OSError: no room for the guest's files, or `target` exists.
    """
    with tempfile.TemporaryDirectory(prefix="df-test-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for part in (folder, folder / "run", folder / "disks", folder / "templates"):
            part.mkdir(exist_ok=True)
            part.chmod(0o711)
        index = ImageIndex(images, folder / "images.json")
        await asyncio.to_thread(index.add, machine.file)
        uids = _UIDS if os.geteuid() == 0 else None
        config = Config(run=folder / "run", accel=accel.name, network="none", uids=uids, powerdown_s=0.0)
        hypervisor = QemuHypervisor(config, index, Disks(folder / "disks", folder / "templates"), spawn)
        hypervisor.news = news = _News()
        sid = uuid.uuid4().hex
        entry = Entry(sid, 1, boot_id(), Phase.STARTING, order(machine, sid))
        try:
            begun = time.monotonic()
            hypervisor.launch(entry)
            await _first(news.up, news.over)
            ready_ms = int((time.monotonic() - begun) * 1000)
            with suppress(TimeoutError):
                await asyncio.wait_for(news.over.wait(), seconds)
            if news.over.is_set():
                phase = "failed" if news.reason else "ended"
                return Result(phase, accel.name, 0 if news.reason else ready_ms, news.reason, news.detail)
            await _picture(folder / "run" / sid, target)
            hypervisor.shutdown(entry)
            await news.over.wait()
            return Result("running", accel.name, ready_ms, screenshot=str(target))
        finally:
            hypervisor.clean(sid)
            await hypervisor.close()


async def _stoppable(work: Coroutine[Any, Any, Result]) -> Result:
    """Run until the end or a signal; everything is cleared away after either."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


async def _first(*events: asyncio.Event) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


async def _picture(run: Path, target: Path) -> None:
    """The screen as PNG. qemu writes it into the guest's own folder, since it may write nowhere else."""
    async with monitor(run / "rescue.sock") as qemu:
        await qemu.command("screendump", {"filename": str(run / "screen.png"), "format": "png"})
    with (run / "screen.png").open("rb") as source, target.open("xb") as copy:
        shutil.copyfileobj(source, copy)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the guest ran and was looked at, else 1."""
    parser = argparse.ArgumentParser(prog="deskfleet.agent.trial", description="Starts a machine once.")
    parser.add_argument("--entry", type=Path, required=True, help="the catalogue entry, NAME.toml")
    parser.add_argument("--images", type=Path, required=True, help="the folder of its image")
    parser.add_argument("--screenshot", type=Path, required=True, help="a new PNG file")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long it runs before it is looked at")
    options = parser.parse_args(arguments)
    accel = choose()
    try:
        machine = parse_machine(options.entry.stem, options.entry.read_text("utf-8"))
        work = attempt(machine, options.images, options.screenshot, options.seconds, accel)
        result = asyncio.run(_stoppable(work))
    except asyncio.CancelledError:
        result = Result("failed", accel.name, detail="stopped by a signal")
    except MonitorError as error:
        result = Result("failed", accel.name, reason=Reason.START_TIMEOUT.value, detail=str(error))
    except (DeskfleetError, OSError) as error:
        result = Result("failed", accel.name, detail=str(error))
    print(json.dumps(asdict(result)))
    return 0 if result.phase == "running" else 1


if __name__ == "__main__":
    sys.exit(main())
