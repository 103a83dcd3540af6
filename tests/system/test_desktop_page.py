"""A person at a browser: sign in, launch, see the guest, type, lose each part of the service, go on, stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo.fleet import Fleet
from demo.smoke import (
    CHROMIUM,
    CHROMIUM_ARGS,
    PATIENCE_MS,
    TEXT_AREA,
    canvas,
    differs,
    drawn,
    launch,
    sign_in,
    smoke,
    wait_picture,
)
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.fleets import running_fleet
from support.screen import identity, read_identity

OUT = Path(__file__).parents[1] / "out"
#: Where the tiny guest shows the beginning of what is typed, beside an open menu.
TEXT_BESIDE = (0.11, 0.17, 0.5, 0.5)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with running_fleet() as running:
        yield running


def test_the_smoke_test_of_the_demo_passes(fleet: Fleet) -> None:
    said: list[str] = []
    assert smoke(fleet, OUT / "smoke.png", said.append) == 0, said


@pytest.fixture
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser, fleet: Fleet) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    violations: list[str] = []
    page.on("console", lambda message: violations.append(message.text) if "Content Security" in message.text else None)
    sign_in(page, fleet.url, "demo", fleet.keys.secret("login-demo", 9))
    yield page
    assert violations == []


def sid_of(page: Page) -> str:
    return page.url.rsplit("/", 1)[1]


def test_the_screen_is_this_very_guest_and_survives_the_loss_of_every_part(page: Page, fleet: Fleet) -> None:
    launch(page, fleet.url, "tiny")
    sid = sid_of(page)
    wait_picture(page, lambda now: read_identity(now) == identity(sid) or drawn(now), "the guest")
    host = next(host for host in fleet.hosts if (fleet.state / host / "run" / sid).exists())
    for victim in (f"agent-{host}", "scheduler", "proxy", "broker"):
        if victim == "broker":
            assert fleet.broker
            fleet.broker.kill()
            fleet.broker.start()
        else:
            fleet.services[victim].kill()
            fleet.services[victim].start()
        for name in fleet.services:
            fleet.wait_ready(name)
        page.wait_for_selector("[data-state=connected]", timeout=PATIENCE_MS)
        before = canvas(page)
        page.keyboard.type("x", delay=40)
        wait_picture(page, lambda now, before=before: differs(before, now, TEXT_AREA), f"typing after {victim}")
    page.screenshot(path=str(OUT / "desktop.png"))


def test_c15_the_page_connects_only_where_the_server_says(page: Page, fleet: Fleet) -> None:
    launch(page, fleet.url, "tiny")
    asked: list[str] = []
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.goto(f"{page.url}?host=127.0.0.1&port=1&path=evil&token=x#host=127.0.0.1&port=1")
    page.wait_for_selector("[data-state=connected]", timeout=PATIENCE_MS)
    assert asked and all(url.startswith(fleet.console_url) for url in asked)


def test_before_the_click_the_scheduler_says_what_to_expect(page: Page, fleet: Fleet) -> None:
    page.goto(f"{fleet.url}/launch")
    expect(page.locator("article[data-machine=tiny] .outlook")).to_have_text("Starts now", timeout=PATIENCE_MS)
    fleet.services["scheduler"].kill()
    page.reload()
    expect(page.locator("article[data-machine=tiny] .outlook")).to_contain_text("can't be told", timeout=PATIENCE_MS)
    fleet.services["scheduler"].start()
    fleet.wait_ready("scheduler")
    launch(page, fleet.url, "tiny")


def test_pages_of_person_and_administrator(browser: Browser, page: Page, fleet: Fleet) -> None:
    for name in ("launch", "launch/tiny", "desktops"):
        page.goto(f"{fleet.url}/{name}")
        page.screenshot(path=str(OUT / f"{name.replace('/', '-')}.png"))
    assert page.goto(f"{fleet.url}/admin/").status == 403  # type: ignore[union-attr]
    other = browser.new_page(viewport={"width": 1280, "height": 900})
    sign_in(other, fleet.url, "admin", fleet.keys.secret("login-admin", 9))
    other.goto(f"{fleet.url}/admin/")
    for host in fleet.hosts:
        assert other.get_by_role("cell", name=host, exact=True).count() >= 1
    assert other.get_by_text("scheduler.commands").count() == 1
    time.sleep(2.5)  # one poll of the page, which must leave it whole
    assert other.get_by_text("scheduler.commands").count() == 1
    other.screenshot(path=str(OUT / "admin.png"), full_page=True)


def settled(page: Page) -> Image.Image:
    """The text on the screen once no more of it comes."""
    before = canvas(page)
    while True:
        time.sleep(1)
        now = canvas(page)
        if not differs(before, now, TEXT_BESIDE):
            return now
        before = now


def test_keys_clipboard_and_view_are_at_hand(page: Page, fleet: Fleet) -> None:
    launch(page, fleet.url, "tiny")
    sid = sid_of(page)
    page.wait_for_selector("[data-state=connected]", timeout=PATIENCE_MS)
    wait_picture(page, lambda now: read_identity(now) == identity(sid) or drawn(now), "the guest")
    expect(page.locator("#hint")).to_be_visible()
    page.click("#hint-close")
    page.click("summary:has-text('Clipboard')")
    before = canvas(page)
    page.fill("#clip-text", "Hi, you!\n(1+2)*3")
    page.click("#clip-type")
    expect(page.locator("#clip-said")).to_have_text("Typed.")
    wait_picture(page, lambda now: differs(before, now, TEXT_BESIDE), "the typed text")
    typed = settled(page)
    for odd in ("é", "ß", "€", "😀"):
        page.fill("#clip-text", f"a{odd}b")
        page.click("#clip-type")
        expect(page.locator("#clip-said")).to_contain_text(f"“{odd}” can't be typed")
    assert not differs(typed, settled(page), TEXT_BESIDE), "of a text that can't be typed nothing is"
    page.screenshot(path=str(OUT / "desktop-clipboard.png"))
    page.keyboard.press("Escape")
    expect(page.locator("#clip[open]")).to_have_count(0)
    page.click("summary:has-text('View')")
    page.select_option("#view", "own")
    page.select_option("#quality", "slow")
    page.click("summary:has-text('Keys')")
    expect(page.locator("details[open]")).to_have_count(1)
    page.click("[data-hold=shift], [data-hold=ctrl]")
    expect(page.locator("[data-hold=ctrl]")).to_have_attribute("aria-pressed", "true")
    page.click("[data-hold=ctrl]")
    page.screenshot(path=str(OUT / "desktop-keys.png"))
    full_of_text = canvas(page)
    page.click("#keys")
    wait_picture(page, lambda now: differs(full_of_text, now, TEXT_BESIDE), "the guest that Ctrl-Alt-Del has restarted")
    page.reload()
    page.wait_for_selector("[data-state=connected]", timeout=PATIENCE_MS)
    expect(page.locator("#view")).to_have_value("own")
    expect(page.locator("#hint")).to_be_hidden()
    assert sid_of(page) == sid
