"""measures: from the click to the picture of a Linux desktop: forked from a template, and booted; memory of each fork

A real fleet with one host. A launch goes through the portal's API, broker, scheduler and agent, and its picture comes
through the proxy: it counts from when panel and terminal are there. The baseline is the same image, booted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "deploy"), str(ROOT / "tests")]

from demo.__main__ import build  # noqa: E402
from demo.client import Client  # noqa: E402
from demo.fleet import Fleet  # noqa: E402
from support.rfb import Rfb, WebSocketStream  # noqa: E402

from deskfleet.agent.argv import uuid_of  # noqa: E402
from deskfleet.agent.processes import arguments, pids  # noqa: E402

AMBER, PANEL = (255, 183, 3), (24, 36, 47)
CLOCK = (110, 36)  # the panel's right end, pixels
PATIENCE_S = 900.0


def there(picture: Image.Image) -> bool:
    """Whether terminal and panel are on the screen."""
    width, height = picture.size
    if height < 400 or picture.getpixel((width // 2, height - 3)) != PANEL:
        return False
    return AMBER in {picture.getpixel((x, 60)) for x in range(100, 700, 20)}


def click(client: Client, url: str, machine: str) -> tuple[str, float, Image.Image]:
    """Launch, and wait for the desktop's picture: session, seconds, picture."""
    begun = time.monotonic()
    sid = client.launch(machine, persistent=True)
    client.until_running(sid, pause=0.01)
    viewer = Rfb(WebSocketStream(client.console(sid), url))
    picture = viewer.picture()
    while not there(picture):
        if time.monotonic() - begun > PATIENCE_S:
            raise AssertionError(f"{machine} never showed a desktop")
        # Looking takes processor time, which a boot of minutes should not lose to it.
        time.sleep(max(0.02, (time.monotonic() - begun) / 50))
        viewer.close()
        viewer = Rfb(WebSocketStream(client.console(sid), url))
        picture = viewer.picture()
    seconds = time.monotonic() - begun
    viewer.close()
    return sid, seconds, picture


def at_once(client: Client, url: str, machine: str, count: int) -> list[tuple[str, float, Image.Image]]:
    """So many people click at the same time."""
    with ThreadPoolExecutor(count) as people:
        return list(people.map(lambda _: click(client, url, machine), range(count)))


def private_mib(sid: str) -> tuple[float, float]:
    """What a guest's qemu has written itself: all of it, and the guest's memory. Pages of a template are counted as
    private by the kernel while one process alone maps them, so only anonymous ones count."""
    (pid,) = (pid for pid in pids() if uuid_of(sid) in (line := arguments(pid)) and "qemu-system" in line[0])
    whole = guest = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = "memfd:deskfleet" in line
        elif line.startswith("Anonymous:"):
            kib = int(line.split()[1])
            whole += kib
            guest += kib if inside else 0
    return whole / 1024, guest / 1024


def end(client: Client, sids: list[str]) -> None:
    for sid in sids:
        client.stop(sid)
    for sid in sids:
        client.until_ended(sid)


def equal(picture: Image.Image, template: Image.Image) -> bool:
    """The same, but for the panel's clock."""
    if picture.size != template.size:
        return False
    difference = ImageChops.difference(picture.convert("RGB"), template.convert("RGB"))
    width, height = difference.size
    difference.paste((0, 0, 0), (width - CLOCK[0], height - CLOCK[1], width, height))
    return difference.getbbox() is None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=20, help="forks, one after the other (20)")
    parser.add_argument("--cold", type=int, default=1, help="boots, one after the other (1)")
    parser.add_argument("--cold-at-once", type=int, default=0, help="so many boots at once as well; minutes (0)")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds after which memory is looked at (20)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dfb", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        fleet = Fleet(
            folder / "fleet",
            hosts=1,
            say=print,
            overrides={"agent": {"powerdown_s": "0"}, "scheduler": {"cpu_overcommit": 16.0}},
        )
        build(fleet, "desktop")
        entry = fleet.state / "catalogue/desktop.toml"
        booted = entry.read_text().replace('[instant]\nready = "mark"\n', "")
        assert "[instant]" in entry.read_text() and "[instant]" not in booted
        (fleet.state / "catalogue/booted.toml").write_text(booted)
        try:
            fleet.start()
            client = Client(fleet.url, fleet.token("demo"))
            cold = []
            for _ in range(options.cold):
                sid, seconds, _ = click(client, fleet.url, "booted")
                cold.append(seconds)
                end(client, [sid])
            crowd = at_once(client, fleet.url, "booted", options.cold_at_once) if options.cold_at_once else []
            end(client, [sid for sid, *_ in crowd])
            while not fleet.kept_ready():
                time.sleep(1.0)
            time.sleep(6.0)  # a heartbeat tells the scheduler
            (kept,) = (fleet.state / fleet.hosts[0] / "instant").glob("*/picture.ppm")
            template = Image.open(kept).convert("RGB")
            forks, same = [], []
            for _ in range(options.launches):
                sid, seconds, picture = click(client, fleet.url, "desktop")
                assert client.session(sid)["birth"] == "forked"
                forks.append(seconds)
                same.append(equal(picture, template))
                time.sleep(2.0)  # it becomes one of its own
                end(client, [sid])
            eight = at_once(client, fleet.url, "desktop", 8)
            time.sleep(options.idle)
            weights = [private_mib(sid) for sid, *_ in eight]
            end(client, [sid for sid, *_ in eight])
        finally:
            fleet.stop()

    def ms(values: list[float]) -> int:
        return round(1000 * statistics.median(values))

    result = {
        "instant_ms_p50": ms(forks),
        "instant_8_at_once_ms_p50": ms([seconds for _, seconds, _ in eight]),
        "cold_ms_p50": ms(cold),
        "cold_at_once_ms_p50": ms([seconds for _, seconds, _ in crowd]) if crowd else None,
        "ratio": round(statistics.median(cold) / statistics.median(forks), 1),
        "private_mib": round(statistics.median(whole for whole, _ in weights)),
        "guest_private_mib": round(statistics.median(guest for _, guest in weights)),
        "picture_equal": all(same),
    }
    print(f"\n{options.launches} forks, {options.cold} boots, click to picture")
    for key, value in result.items():
        print(f"{key:28} {value}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
