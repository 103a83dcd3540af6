"""Every page for everybody: axe-core finds nothing serious, in light and dark, on a desk and on a phone, in each
language; nothing breaks the content policy, nothing is wider than the screen, the keyboard reaches what the mouse does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from support.fake_console import FakeConsole
from support.furnished import PERSON, RUNNING, Shown, furnish
from support.sites import Site

AXE = Path(__file__).parents[1] / "vendor" / "axe.js"
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 800}
SERIOUS = ("serious", "critical")
PAGES: list[Shown] = []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "terms.txt").write_text("Be kind.")
    with FakeConsole() as console:
        brand = {"terms": str(folder / "terms.txt"), "contact": "help@example.org", "accent": "#ffd200"}
        site = Site(folder, console, brand=brand)
        try:
            PAGES[:] = furnish(site.world)
            yield site
        finally:
            site.hush()
            site.world.close()
    assert site.complaints == []


def findings(page: Page, rules: list[str]) -> list[str]:
    """What axe-core holds to be serious or worse, by all its rules or by some."""
    only = {"runOnly": rules} if rules else {}
    found = page.evaluate("options => axe.run(document, options)", {"resultTypes": ["violations"], **only})
    return [
        f"{entry['id']}: {node['html'][:200]} {node['failureSummary']}"
        for entry in found["violations"]
        if entry["impact"] in SERIOUS
        for node in entry["nodes"]
    ]


@pytest.mark.parametrize(("size", "language"), [(DESK, "en"), (PHONE, "fr")], ids=["desk", "phone"])
def test_nothing_serious_is_found_on_any_page(
    browser: Browser, site: Site, size: dict[str, int], language: str
) -> None:
    options = {"viewport": size, "color_scheme": "light", "locale": language, "reduced_motion": "reduce"}
    pages = {user: site.page(browser, user, **options) for user in {shown.user for shown in PAGES}}
    wrong = {}
    for shown in PAGES:
        page = pages[shown.user]
        page.emulate_media(color_scheme="light")
        answer = page.goto(site.url + shown.path)
        assert answer and answer.status == (404 if shown.name == "error" else 200), shown.name
        if shown.name == "desktop":
            page.wait_for_selector("[data-state=connected]")
        if shown.name == "host":
            page.wait_for_selector(".charts canvas")
        expect(page.locator("html")).to_have_attribute("lang", language)
        page.evaluate(f"() => {{ {AXE.read_text()} }}")  # by the debugger, which the page's policy does not bind
        wrong[shown.name] = findings(page, [])
        page.emulate_media(color_scheme="dark")
        wrong[shown.name] += findings(page, ["color-contrast"])  # nothing else differs in the dark
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if wide > 0:
            wrong[shown.name].append(f"it is {wide} pixels wider than the screen")
    for page in pages.values():
        page.context.close()
    assert {name: found for name, found in wrong.items() if found} == {}


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))


def test_the_keyboard_skips_to_the_content_and_a_dialog_keeps_it_until_escape(browser: Browser, site: Site) -> None:
    page = site.page(browser, PERSON, viewport=DESK)
    page.goto(f"{site.url}/desktops")
    page.keyboard.press("Tab")
    assert focused(page) == "To the content"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
    page.focus(f"#stop-{RUNNING}")
    page.keyboard.press("Enter")
    dialog = page.locator("#confirm")
    expect(dialog).to_be_visible()
    expect(dialog.locator("h2")).to_have_text("Stop Linux desktop?")
    for _ in range(4):
        page.keyboard.press("Tab")
        # Between its last button and its first one stands the browser itself.
        assert page.evaluate("document.activeElement === document.body || !!document.activeElement.closest('dialog')")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert focused(page) == f"stop-{RUNNING}"
    page.context.close()


def test_a_language_that_was_chosen_stays_chosen(browser: Browser, site: Site) -> None:
    page = site.page(browser, "", viewport=PHONE, locale="de")
    page.goto(f"{site.url}/login")
    expect(page.locator("h1")).to_have_text("Log in")
    page.get_by_role("button", name="Français").click()
    expect(page.locator("h1")).to_have_text("Se connecter")
    page.goto(f"{site.url}/terms")
    expect(page.locator("html")).to_have_attribute("lang", "fr")
    page.context.close()
