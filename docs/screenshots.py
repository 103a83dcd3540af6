"""python docs/screenshots.py [NAME...]: pictures of pages, as wide as a phone and as a desk, into docs/screens.

Needs what tests/run installs (Chromium, the assets). The desktops that are shown have a plain picture for a screen.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "deploy")]

from demo.smoke import CHROMIUM, CHROMIUM_ARGS  # noqa: E402
from support.fake_console import FakeConsole  # noqa: E402
from support.furnished import furnish  # noqa: E402
from support.sites import Site  # noqa: E402

OUT = ROOT / "docs" / "screens"
_WIDTHS = {"phone": (360, 740), "desk": (1280, 800)}
_LARGEST = 60 * 1024
#: Which pages are kept in the repository at which width; the others are made when they are named.
_KEPT = {
    "login": ("phone",),
    "launch": ("phone", "desk"),
    "machine": ("desk",),
    "desktops": ("phone", "desk"),
    "progress": ("phone", "desk"),
    "share": ("desk",),
    "admin": ("phone", "desk"),
    "host": ("desk",),
}


def _small(png: bytes) -> bytes:
    """The picture with a palette of few colours, so that it is small."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for colours in (64, 32, 16):
        small = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
        if small.tell() <= _LARGEST:
            break
    return small.getvalue()


def _take(page: Page, path: Path) -> None:
    page.wait_for_timeout(1_500)  # the outlook and the small pictures are asked for after the page
    height = page.evaluate("document.documentElement.scrollHeight")
    width = page.viewport_size["width"] if page.viewport_size else 0
    page.screenshot(path=str(path), full_page=True, clip={"x": 0, "y": 0, "width": width, "height": min(height, 1600)})
    path.write_bytes(_small(path.read_bytes()))


def main(named: list[str]) -> int:
    """Make the pictures of the pages that are named, in OUT; without names, of those that are kept."""
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, FakeConsole() as console, sync_playwright() as playwright:
        terms = Path(folder) / "terms.txt"
        terms.write_text("Use desktops for work and study only.\n\nWhat you leave on a single-shot desktop is erased.")
        site = Site(Path(folder), console, brand={"terms": str(terms), "contact": "help@example.org"})
        try:
            every = furnish(site.world)
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
            for width, (across, down) in _WIDTHS.items():
                size = {"width": across, "height": down}
                pages = {user: site.page(browser, user, viewport=size) for user in {shown.user for shown in every}}
                for shown in every:
                    if shown.name in named or (not named and width in _KEPT.get(shown.name, ())):
                        pages[shown.user].goto(site.url + shown.path)
                        _take(pages[shown.user], OUT / f"{shown.name}-{width}.png")
            browser.close()
        finally:
            site.hush()
            site.world.close()
        for complaint in site.complaints:
            print(complaint, file=sys.stderr)
    return bool(site.complaints)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
