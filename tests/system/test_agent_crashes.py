"""A real agent with real guests, killed with SIGKILL at each point where it does something to the world, then started
again under a scheduler that goes on by the rules: no guest twice, none lost that ran, nothing left behind.

DESKFLEET_LONG=1 kills the second life as well, at each of its points.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest
from demo.broker import free_port
from support.guests import PATIENCE, ROOT, build_tiny, short_folder, start_order

from deskfleet.agent.argv import uuid_of
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import GuestReport, HostBeat, HostReport, Phase
from deskfleet.schemas.machine import Machine
from deskfleet.schemas.messages import HostFence, Message, VmReport, VmStart, VmStop
from deskfleet.schemas.session import Outcome
from deskfleet.schemas.wire import decode, encode

SID = "c" * 32
LONG = os.environ.get("DESKFLEET_LONG") == "1"
#: Stands in front of qemu: notes each start, and a start beside another one of the same guest.
WRAPPER = """#!/bin/sh
beside=$(pgrep -fc -- "qemu-system-x86_64.*-uuid {uuid}")
echo "$$ $((beside - 1))" >>{log}  # itself is one of them
exec /usr/bin/qemu-system-x86_64 "$@"
"""


@pytest.fixture(scope="module")
def images() -> Iterator[tuple[Path, Machine]]:
    with short_folder() as folder:
        machine = build_tiny(folder)
        yield folder / "images", machine


@dataclass
class Life:
    """One life of the agent's process, and what it says."""

    process: subprocess.Popen[str]
    heard: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        assert self.process.stdout
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            said = json.loads(line)
            self.heard.put(decode(said["type"], said["body"].encode()))

    def send(self, message: Message) -> None:
        kind, body = encode(message)
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has died; whoever listens learns of it
            self.process.stdin.write(json.dumps({"type": kind, "body": body.decode()}) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with contextlib.suppress(BrokenPipeError):  # a message that it died before reading is flushed here
                pipe.close()


class Scheduler:
    """Goes on with one session by the scheduler's rules, over as many lives of the agent as it takes."""

    def __init__(self, folder: Path, images: Path, machine: Machine) -> None:
        self.folder, self.images, self.machine = folder, images, machine
        self.console = f"127.0.0.1:{free_port()}"
        self.number = 0
        self.ran = self.over = False
        self.last: VmStart | VmStop | None = None
        self.heard: list[Message] = []
        self.spawns = folder / "spawns"
        self.spawns.touch()
        self.spawns.chmod(0o666)
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        wrapper = bin_folder / "qemu-system-x86_64"
        wrapper.write_text(WRAPPER.format(uuid=uuid_of(SID), log=self.spawns))
        wrapper.chmod(0o755)

    def life(self, crash_at: int = 0) -> Life:
        line = [sys.executable, "-m", "support.agent_process", str(self.folder), str(self.images)]
        environment = os.environ | {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}/tests:{ROOT}/deploy",
            "CONSOLE": self.console,
            "CRASH_AT": str(crash_at),
        }
        with (self.folder / "agent.log").open("a") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            return Life(subprocess.Popen(line, env=environment, text=True, **pipes))

    def log(self) -> str:
        return (self.folder / "agent.log").read_text()[-3000:]

    def clear(self) -> None:
        """End what a failed test may have left, and the console bridge."""
        pattern = f"--run-dir {self.folder}/r|unix:{self.folder}/r/"
        found = subprocess.run(["pgrep", "-f", "--", pattern], capture_output=True, text=True, check=False)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def command(self, life: Life, message: VmStart | VmStop) -> None:
        self.last = message
        life.send(message)

    def place(self, life: Life) -> None:
        """Claim the next number, and send a start under it."""
        self.number += 1
        self.command(life, start_order(self.machine, SID, self.number))

    def go_on(self, life: Life) -> bool:
        """Work until the session is over, or this life of the agent is; whether the session is over."""
        if self.last:
            life.send(self.last)  # what was not acknowledged comes again, and what was may
        deadline = time.monotonic() + PATIENCE
        begun = False
        listed: HostReport | None = None
        while not self.over:
            assert time.monotonic() < deadline, f"{self.log()}\n{self.heard[-5:]}"
            try:
                message = life.heard.get(timeout=0.05)
            except queue.Empty:
                if life.process.poll() is not None:
                    return False
                continue
            self.heard.append(message)
            if isinstance(message, VmReport):
                self.hear(life, message.guest)
            elif isinstance(message, HostReport | HostBeat):
                listed = message if isinstance(message, HostReport) else listed
                if message.fenced:
                    life.send(HostFence("h1", self.number))
                elif not begun and listed and self.machine.sha256 in listed.images:
                    begun = True
                    mine = [guest for guest in listed.guests if guest.sid == SID]
                    if mine:
                        self.hear(life, mine[0])
                    elif message.last_generation >= self.number:
                        assert not self.ran, "a guest that ran is gone, and nobody ended it"
                        self.place(life)
        return True

    def hear(self, life: Life, guest: GuestReport) -> None:
        if guest.generation < self.number and guest.phase is not Phase.RUNNING:
            return  # about an earlier try
        if guest.phase is Phase.RUNNING and not isinstance(self.last, VmStop):
            self.ran = True
            self.command(life, VmStop(SID, self.number, Outcome.STOPPED, Reason.STOPPED_BY_USER))
        elif guest.phase is Phase.ENDED:
            if self.ran or guest.ran or guest.outcome is Outcome.STOPPED:
                assert guest.outcome is Outcome.STOPPED, guest
                self.over = True
            elif guest.generation >= self.number:
                assert guest.reason in (Reason.AGENT_RESTARTED, Reason.FENCED, Reason.STALE), guest
                self.place(life)


def processes() -> list[str]:
    found = subprocess.run(["pgrep", "-fa", "--", f"-uuid {uuid_of(SID)}"], capture_output=True, text=True, check=False)
    return [line for line in found.stdout.splitlines() if "qemu-system" in line]


def left(folder: Path) -> list[str]:
    """What may not be there when the session is over."""
    places = (folder / "r", folder / "s/disks")
    unfinished = [path for path in (folder / "s").rglob("*") if path.suffix == ".tmp"]
    return [str(path) for place in places for path in place.iterdir()] + [str(p) for p in unfinished] + processes()


def attempt(images: tuple[Path, Machine], *crashes: int) -> list[str]:
    """One session with a crash at a point of each of so many lives of the agent, and one life without; what the agent
    was about to do each time. Fewer than asked for when it was over before."""
    with short_folder() as folder:
        scheduler = Scheduler(folder, *images)
        died: list[str] = []
        note = folder / "died"
        try:
            for crash_at in (*crashes, 0):
                life = scheduler.life(crash_at)
                over = scheduler.go_on(life)
                if over:
                    break
                assert note.exists() and life.process.wait() == -signal.SIGKILL, scheduler.log()
                died.append(note.read_text())
                note.unlink()
                life.end()
            assert scheduler.over, died
            deadline = time.monotonic() + PATIENCE
            while (remains := left(folder)) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert remains == [], (died, remains, scheduler.log())
            spawns = [line.split() for line in scheduler.spawns.read_text().splitlines()]
            assert all(beside == "0" for _, beside in spawns), f"two at once: {spawns}, {died}"
            assert len(spawns) <= scheduler.number, f"more starts than orders: {spawns}, {died}"
            secret = ["grep", "-rl", "canary-of-the-broker", str(folder)]
            assert subprocess.run(secret, capture_output=True, check=False).stdout == b"", "a secret was written"
            return died
        finally:
            life.end()
            scheduler.clear()


def test_no_point_of_a_crash_makes_two_guests_loses_one_or_leaves_anything(images: tuple[Path, Machine]) -> None:
    kinds = set()
    for point in itertools.count(1):
        died = attempt(images, point)
        if not died:
            break
        kinds.add(died[0].split()[0])
        for again in itertools.count(1) if LONG else ():
            if len(attempt(images, point, again)) < 2:
                break
    print(sorted(kinds))
    assert kinds >= {"open", "os.rename", "os.mkdir", "shutil.rmtree", "start", "publish", "settle"}, kinds
