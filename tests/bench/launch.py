"""measures: from the click to qemu's exec (control overhead), and to the first frame through the proxy

A real fleet is started. Each round launches a desktop through the portal's API and, beside it, the same guest by plain
`qemu-img create` and qemu. The moment of exec is taken by a small program that stands in front of qemu on PATH.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy"), str(ROOT / "tests")]

from demo.__main__ import build  # noqa: E402
from demo.client import Client  # noqa: E402
from demo.fleet import Fleet  # noqa: E402
from support.guests import start_order  # noqa: E402
from support.rfb import Rfb, UnixStream, WebSocketStream  # noqa: E402

from deskfleet.agent import argv  # noqa: E402
from deskfleet.schemas.machine import Machine, parse_machine  # noqa: E402

#: The ancestor sleeps 1 s after the clone, 1 s after qemu's start, and 5 s after the page is sent.
ANCESTOR_WAITS_MS = 7000

STAMP = r"""
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
int main(int argc, char **argv) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], "-uuid")) {
            char path[512], text[64];
            snprintf(path, sizeof path, "%s/%s", STAMPS, argv[i + 1]);
            int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
            int n = snprintf(text, sizeof text, "%lld.%09ld", (long long)now.tv_sec, now.tv_nsec);
            if (fd < 0 || write(fd, text, n) != n) return 99;
            close(fd);
        }
    execv("/usr/bin/qemu-system-x86_64", argv);
    return 98;
}
"""


def now() -> float:
    """The clock that the stamp uses."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def stamper(folder: Path) -> Path:
    """Put a qemu-system-x86_64 that notes its start into a folder for PATH; where it notes them."""
    stamps, path = folder / "stamps", folder / "bin"
    for made in (stamps, path):
        made.mkdir()
    stamps.chmod(0o1777)
    (folder / "stamp.c").write_text(STAMP)
    line = ["gcc", "-O2", f'-DSTAMPS="{stamps}"', "-o", str(path / "qemu-system-x86_64"), str(folder / "stamp.c")]
    subprocess.run(line, check=True)
    os.environ["PATH"] = f"{path}:{os.environ['PATH']}"
    return stamps


def ours(fleet: Fleet, client: Client, stamps: Path) -> tuple[float, float, float]:
    """One launch through everything: seconds from the POST to exec, to the first frame, and from exec to the frame."""
    begun = now()
    sid = client.launch("tiny")
    client.until_running(sid, pause=0.005)
    viewer = Rfb(WebSocketStream(client.console(sid), fleet.url))
    viewer.picture()
    framed = now()
    executed = float((stamps / argv.uuid_of(sid)).read_text())
    viewer.close()
    client.stop(sid)
    client.until_ended(sid)
    return executed - begun, framed - begun, framed - executed


def plain(machine: Machine, folder: Path, number: int) -> float:
    """The same guest by hand: seconds from `qemu-img create` to the first frame on its unix socket."""
    sid = f"{number:032x}"
    run = folder / sid
    run.mkdir()
    paths = argv.Paths(run, run / "disk.qcow2", folder / "images" / machine.file)
    begun = now()
    size = f"{machine.disk_gib.default}G"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(paths.disk), size], check=True)
    line = argv.qemu(start_order(machine, sid, 1), paths, accel="tcg", network_fd=None)
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, cwd=run) as qemu:
        while True:
            try:
                viewer = Rfb(UnixStream(paths.vnc))
                break
            except OSError:
                time.sleep(0.002)
        viewer.picture()
        framed = now()
        viewer.close()
        qemu.kill()
    return framed - begun


def milliseconds(values: list[float], share: float) -> float:
    """A percentile in ms."""
    return round(1000 * statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1], 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dfb", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        stamps = stamper(folder)
        fleet = Fleet(folder / "fleet", say=print)
        build(fleet, "tiny")
        machine = parse_machine("tiny", (fleet.state / "catalogue/tiny.toml").read_text())
        by_hand = folder / "plain"
        by_hand.mkdir()
        (by_hand / "images").symlink_to(fleet.state / "images")
        try:
            fleet.start()
            client = Client(fleet.url, fleet.token("demo"))
            ours(fleet, client, stamps)  # the first makes the overlay's template
            rounds = []
            for number in range(options.launches):
                rounds.append((*ours(fleet, client, stamps), plain(machine, by_hand, number + 1)))
        finally:
            fleet.stop()
    overhead, framed, after, manual = (list(column) for column in zip(*rounds, strict=True))
    rows = (("POST to exec", overhead), ("exec to first frame", after), ("POST to first frame", framed))
    print(f"\n{options.launches} launches, ms{'':20} p50    p99")
    for text, values in (*rows, ("plain qemu-img + qemu to first frame", manual)):
        print(f"{text:38} {milliseconds(values, 0.5):7} {milliseconds(values, 0.99):7}")
    print(f"{'the ancestor only waits':38} {ANCESTOR_WAITS_MS:7}")
    result = {
        "overhead_ms_p50": milliseconds(overhead, 0.5),
        "overhead_ms_p99": milliseconds(overhead, 0.99),
        "first_frame_ms_p50": milliseconds(framed, 0.5),
        "exec_to_frame_ms_p50": milliseconds(after, 0.5),
        "plain_first_frame_ms_p50": milliseconds(manual, 0.5),
        "ratio_to_plain": round(statistics.median(framed) / statistics.median(manual), 2),
        "ancestor_fixed_waits_ms": ANCESTOR_WAITS_MS,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
