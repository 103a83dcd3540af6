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
from playwright.sync_api import Browser, Page, expect, sync_playwright
from support.fleets import running_fleet
from support.screen import identity, read_identity

OUT = Path(__file__).parents[1] / "out"


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
