"""measures: what an idle guest costs in memory and CPU, how soon its display answers, how fast 20 are taken over

A real agent runs N guests of the tiny machine; before that, as many are started by plain qemu with the very same
command lines (other folders). Memory is the proportional share (PSS of smaps_rollup) of qemu, and, for the agent, of
the agent itself (here: with the test around it) and of its console bridge. Then the agent is given up and another one
takes its guests over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy"), str(ROOT / "tests")]

import psutil  # noqa: E402
from support.guests import Host, build_tiny, start_order  # noqa: E402

from deskfleet.agent import argv  # noqa: E402
from deskfleet.schemas.host import Phase  # noqa: E402
from deskfleet.schemas.machine import Machine  # noqa: E402
from deskfleet.schemas.session import Resources  # noqa: E402

SIZE = Resources(1, 64, 1)
SETTLE_S = 5.0
WATCH_S = 10.0


def pss_mib(pid: int) -> float:
    """A process's share of memory (proc(5), smaps_rollup: Pss)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no Pss of {pid}")


def watch(pids: list[int]) -> tuple[float, float]:
    """Memory in MiB of all, and CPU seconds a second of all, once they have settled."""
    time.sleep(SETTLE_S)
    processes = [psutil.Process(pid) for pid in pids]
    before, begun = sum(sum(process.cpu_times()[:2]) for process in processes), time.monotonic()
    time.sleep(WATCH_S)
    used = sum(sum(process.cpu_times()[:2]) for process in processes) - before
    return sum(pss_mib(pid) for pid in pids), used / (time.monotonic() - begun)


def answers(socket_path: Path) -> bool:
    """Whether an RFB server greets there."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(socket_path))
            return client.recv(4) == b"RFB "
        except OSError:
            return False


def plain(machine: Machine, folder: Path, guests: int) -> tuple[float, float, list[float]]:
    """The same guests by hand: memory and CPU of all, and seconds to each one's display."""
    started, greeted = [], []
    try:
        for _ in range(guests):
            sid = uuid.uuid4().hex
            run = folder / sid
            run.mkdir()
            paths = argv.Paths(run, run / "disk.qcow2", folder.parent / "m/images" / machine.file)
            begun = time.monotonic()
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(paths.disk), "1G"], check=True)
            line = argv.qemu(start_order(machine, sid, 1, resources=SIZE), paths, accel="tcg", network_fd=None)
            started.append(subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=run))
            while not answers(paths.vnc):
                time.sleep(0.002)
            greeted.append(time.monotonic() - begun)
        return (*watch([process.pid for process in started]), greeted)
    finally:
        for process in started:
            process.kill()
            process.wait()


def qemus(run: Path) -> list[int]:
    """The qemu processes of an agent's guests."""
    mark = f"unix:{run}/"
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(mark in part for part in p.info["cmdline"] or [])]


async def ours(machine: Machine, folder: Path, guests: int) -> tuple[tuple[float, float], float, list[float], float]:
    """By the agent: memory and CPU of all qemus, MiB of what the agent keeps besides, seconds to each display, and to
    take all over."""
    host = Host(folder, machine, folder.parent / "m/images", network="none", picture_s=3600.0)
    greeted = []
    async with await host.start():
        sids = [uuid.uuid4().hex for _ in range(guests)]
        for sid in sids:
            begun = time.monotonic()
            host.launch(sid, resources=SIZE)
            await host.phase(sid, Phase.RUNNING)
            greeted.append(time.monotonic() - begun)
        pids = qemus(host.run)
        assert len(pids) == guests
        measured = await asyncio.to_thread(watch, pids)
        bridges = [
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if f"--run-dir={host.run}" in " ".join(process.info["cmdline"] or []).replace("--run-dir ", "--run-dir=")
        ]
        besides = pss_mib(os.getpid()) + sum(pss_mib(pid) for pid in bridges)
        await host.end()
        begun = time.monotonic()
        host.heartbeats.clear()
        await host.start()
        await host.until(
            lambda: sum(guest.phase is Phase.RUNNING for guest in host.heartbeats[-1].guests) == guests, "all"
        )
        adopted = time.monotonic() - begun
        assert sorted(qemus(host.run)) == sorted(pids)
    return measured, besides, greeted, adopted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guests", type=int, default=20)
    options = parser.parse_args()
    guests = options.guests
    with tempfile.TemporaryDirectory(prefix="dfd", dir="/tmp", ignore_cleanup_errors=True) as name:
        top = Path(name)
        top.chmod(0o711)
        for part in ("m", "plain", "a"):
            (top / part).mkdir(mode=0o711)
        machine = build_tiny(top / "m")
        by_hand, by_hand_cpu, by_hand_s = plain(machine, top / "plain", guests)
        (memory, cpu), besides, greeted, adopted = asyncio.run(ours(machine, top / "a", guests))
    rows = (
        ("memory of a guest's qemu, MiB", memory / guests, by_hand / guests),
        ("CPU of an idle guest, % of a core", 100 * cpu / guests, 100 * by_hand_cpu / guests),
        ("start to RFB greeting p50, ms", 1000 * statistics.median(greeted), 1000 * statistics.median(by_hand_s)),
    )
    print(f"\n{guests} idle guests of {SIZE.memory_mib} MiB{'':16} agent   plain qemu")
    for text, mine, other in rows:
        print(f"{text:38} {mine:8.1f} {other:12.1f}")
    print(f"{'agent and console bridge, MiB':38} {besides:8.1f}")
    print(f"{f'taking {guests} over, s':38} {adopted:8.2f}")
    result = {
        "guests_per_gib": round(1024 / (memory / guests), 1),
        "plain_guests_per_gib": round(1024 / (by_hand / guests), 1),
        "guests_per_core": round(guests / cpu, 1) if cpu else None,
        "plain_guests_per_core": round(guests / by_hand_cpu, 1) if by_hand_cpu else None,
        "rfb_ms_p50": round(1000 * statistics.median(greeted), 1),
        "plain_rfb_ms_p50": round(1000 * statistics.median(by_hand_s), 1),
        "agent_mib": round(besides, 1),
        f"adopt_{guests}_s": round(adopted, 2),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
