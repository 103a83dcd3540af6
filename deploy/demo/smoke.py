"""One whole cycle as a person does it, in a real browser: sign in, launch, look, type, stop; nothing left behind."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageChops
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page, sync_playwright

from demo.fleet import Fleet

PATIENCE_MS = 90_000
CHROMIUM = "/usr/bin/chromium"
CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]


def sign_in(page: Page, url: str, user: str, password: str) -> None:
    """Through the sign-in page."""
    page.goto(f"{url}/login")
    page.fill("input[name=user]", user)
    page.fill("input[name=password]", password)
    page.click("button[type=submit]")
    page.wait_for_url(lambda there: "/login" not in there)


def launch(page: Page, url: str, machine: str) -> None:
    """From the launch page to the desktop page, which comes by itself."""
    page.goto(f"{url}/launch/{machine}")
    page.click("button[name=launch]")
    page.wait_for_url("**/desktop/**", timeout=PATIENCE_MS)
    page.wait_for_selector("[data-state=connected]", timeout=PATIENCE_MS)


def canvas(page: Page) -> Image.Image:
    """What the person sees of the guest."""
    return Image.open(io.BytesIO(page.locator("#screen canvas").first.screenshot())).convert("RGB")


def wait_picture(page: Page, good: Callable[[Image.Image], bool], what: str) -> Image.Image:
    """Look until the picture is good."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while True:
        picture = canvas(page)
        if good(picture):
            return picture
        if time.monotonic() > deadline:
            raise AssertionError(f"the screen never showed {what}")
        time.sleep(0.1)


def drawn(picture: Image.Image) -> bool:
    """Whether a guest has painted something: a blank screen has few colours."""
    return len(picture.getcolors(1 << 24) or []) > 50


def differs(before: Image.Image, after: Image.Image, box: tuple[float, float, float, float]) -> bool:
    """Whether a part of the picture (as shares of its size) has changed."""
    if before.size != after.size:
        return True
    width, height = before.size
    part = (int(box[0] * width), int(box[1] * height), int(box[2] * width), int(box[3] * height))
    return ImageChops.difference(before.crop(part), after.crop(part)).getbbox() is not None


#: Where the tiny guest shows what is typed, as shares of its screen.
TEXT_AREA = (0.12, 0.17, 0.88, 0.72)


def smoke(fleet: Fleet, screenshot: Path, say: Callable[[str], None]) -> int:
    """Run the cycle; 0 when all of it went well."""
    begun = time.monotonic()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        try:
            sign_in(page, fleet.url, "demo", fleet.keys.secret("login-demo", 9))
            launch(page, fleet.url, "tiny")
            # The list may hold desktops of earlier runs: only this one's end counts.
            sid = page.url.rsplit("/", 1)[1]
            before = wait_picture(page, drawn, "the guest's picture")
            say(f"the desktop is in the browser after {time.monotonic() - begun:.1f} s")
            page.keyboard.type("hello", delay=40)
            wait_picture(page, lambda now: differs(before, now, TEXT_AREA), "what was typed")
            page.screenshot(path=str(screenshot))
            say(f"typed, and the guest shows it; screenshot: {screenshot}")
            page.goto(f"{fleet.url}/desktops")
            page.click(f"#stop-{sid}")
            page.click("button[name=confirm-stop]")
            page.wait_for_selector(f"[data-sid='{sid}'][data-session-state=ended]", timeout=PATIENCE_MS)
            say("stopped")
        except (AssertionError, PlaywrightError) as error:
            page.screenshot(path=str(screenshot.with_suffix(".failed.png")))
            say(f"smoke test failed: {error}\n(what the browser showed: {screenshot.with_suffix('.failed.png')})")
            return 1
        finally:
            browser.close()
    left = [path for host in fleet.hosts for path in (fleet.state / host / "run").iterdir()]
    if left:
        say(f"smoke test failed: this is left of the desktop: {left}")
        return 1
    say(f"smoke test passed in {time.monotonic() - begun:.1f} s")
    return 0
