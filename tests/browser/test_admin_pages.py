"""The administrator's pages in a real browser: what is typed to confirm, and what updates by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from support.fake_console import FakeConsole
from support.portals import PASSWORD, World
from support.sites import Site

from deskfleet.runtime.bus import Outgoing
from deskfleet.schemas.messages import LaunchRequested, StopRequested
from deskfleet.schemas.session import Resources, State
from deskfleet.schemas.topology import DEAD
from deskfleet.schemas.wire import encode

SID = "a" * 32
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with FakeConsole(HOSTILE) as console:
        site = Site(tmp_path, console)
        site.world.portal.accounts.add("boss", PASSWORD, admin=True)
        site.world.host("h1")
        yield site
        site.hush()
        site.world.close()
        assert site.complaints == []


def bury(world: World, user: str) -> str:
    """A launch that nobody took, as the portal keeps it; its name."""
    kind, body = encode(LaunchRequested(SID, user, (), "desktop", Resources(2, 1024, 4), True, 3600, 600))
    world.bus.publish(Outgoing(DEAD, "", kind, body)).result(0)
    assert world.broker.deliver_one(DEAD)
    return world.portal.letters.newest()[0].name


def test_a_dead_letter_is_sent_again_and_another_discarded(browser: Browser, site: Site) -> None:
    first = bury(site.world, HOSTILE * 10)
    page = site.page(browser, "boss", viewport={"width": 360, "height": 740})
    page.goto(f"{site.url}/admin/queues/")
    page.click(f"#look-{first}")
    expect(page.locator("pre")).to_contain_text(HOSTILE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a long line scrolls in its own box"
    page.click("#replay")
    page.wait_for_url("**/admin/queues/")
    (sent,) = site.world.sent()
    assert isinstance(sent, LaunchRequested) and sent.sid == SID
    second = bury(site.world, "bob")
    page.click(f"#look-{second}")  # it has appeared by itself
    page.fill("input[name=typed]", "zzzz")
    page.click("#discard")
    expect(page.locator("[data-reason=not_confirmed]")).to_be_visible()
    page.fill("input[name=typed]", second[:4])
    page.click("#discard")
    page.wait_for_url("**/admin/queues/")
    assert site.world.portal.letters.count() == 0 and len(site.world.sent()) == 1
    page.context.close()


def test_what_is_shown_is_stopped_by_its_number_and_nothing_else(browser: Browser, site: Site) -> None:
    for number, user in enumerate(("ann", "ann", "bob")):
        site.world.session(f"{number:032x}", user, State.RUNNING)
    page = site.page(browser, "boss")
    page.goto(f"{site.url}/admin/sessions")
    page.select_option("select[name=user]", "ann")
    page.click(".filter button")
    expect(page.locator("tr[data-sid]")).to_have_count(2)
    page.fill("input[name=typed]", "2")
    site.world.session("f" * 32, "ann", State.RUNNING)
    expect(page.locator("tr[data-sid]")).to_have_count(3)  # by itself, and what was typed is still there
    assert page.input_value("input[name=typed]") == "2"
    page.click("#stop-all")
    expect(page.locator("[data-reason=not_confirmed]")).to_be_visible()
    assert site.world.sent() == []
    page.fill("input[name=typed]", "3")
    page.click("#stop-all")
    page.wait_for_url("**/admin/sessions?user=ann")
    assert {stop.sid for stop in site.world.sent() if isinstance(stop, StopRequested)} == {
        f"{0:032x}",
        f"{1:032x}",
        "f" * 32,
    }
    page.context.close()


def test_a_host_over_time_as_charts_and_as_a_table_that_renew_themselves(browser: Browser, site: Site) -> None:
    page = site.page(browser, "boss", viewport={"width": 360, "height": 740})
    page.clock.install()
    page.goto(f"{site.url}/admin/hosts/h1")
    expect(page.locator("#no-figures")).to_be_visible()
    for load in (1.0, 2.0):
        site.world.host("h1", load1=load)
        site.world.portal.sample()
        site.world.clock.now += 60
    page.clock.run_for(61_000)
    expect(page.locator("#no-figures")).to_be_hidden()
    expect(page.locator(".charts canvas")).to_have_count(4)
    page.click("#charts summary")
    # Every third minute is told, from the newest on: a load of 2, and before that nothing is known.
    expect(page.locator("#figures tbody tr")).to_have_count(20)
    rows = page.locator("#figures tbody tr").all()[:2]
    assert [row.locator("td").nth(1).inner_text() for row in rows] == ["2", "unknown"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("[data-span=month]")
    expect(page.locator("#no-figures")).to_be_visible()
    expect(page.locator(".charts canvas")).to_have_count(0)
    page.context.close()
