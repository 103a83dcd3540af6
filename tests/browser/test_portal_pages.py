"""The portal's pages in a real browser, against a console without a guest: what a person meets, good days and bad."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from support.fake_console import FakeConsole
from support.portals import PASSWORD
from support.sites import PATIENCE_MS, Site

from deskfleet.ledger.reader import Wait
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.messages import (
    DrainRequested,
    ExtendRequested,
    HostDeclaredDead,
    LaunchRequested,
)
from deskfleet.schemas.session import Event, Resources, State
from deskfleet.schemas.topology import SCHEDULER_COMMANDS
from deskfleet.schemas.verdict import Forecast, Outlook, Verdict
from deskfleet.schemas.wire import decode

SID = "a" * 32
SHORT = Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free")
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with FakeConsole(HOSTILE) as console:
        site = Site(tmp_path, console)
        site.world.portal.accounts.add("alice", PASSWORD)
        site.world.portal.accounts.add("boss", PASSWORD, admin=True)
        site.world.host("h1")
        yield site
        site.hush()
        site.world.close()
        assert site.complaints == []


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def test_one_click_and_each_step_shows_until_the_desktop_opens_by_itself(browser: Browser, site: Site) -> None:
    page = site.page(browser, "alice")
    page.dblclick("article[data-machine=desktop] button[name=start]")
    page.wait_for_url("**/progress/*")
    sid = page.url.rsplit("/", 1)[1]
    (request,) = site.world.sent()
    assert isinstance(request, LaunchRequested) and request.sid == sid, "a double click is one request"
    site.world.tick()
    expect(page.locator("[aria-current=step] .name")).to_have_text("Taken up")
    site.world.take_up()
    with site.world.writer.begin() as tx:
        tx.explain([(sid, Wait(1, 90.0, (Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free"),)), 1.0)])
    expect(page.locator("[aria-current=step] .name")).to_have_text("Host chosen")
    expect(page.locator("#progress")).to_contain_text("You are next")
    expect(page.locator("#progress")).to_contain_text("h1: 2.1 of 4 GiB free")
    expect(page.locator("#progress")).to_contain_text("at the latest in about 2 min")
    expect(page).to_have_title("1st in the queue · Linux desktop · Deskfleet")
    session = site.world.reader.session(sid)
    assert session
    for event in (Event.PLACE, Event.ACCEPTED, Event.READY):
        session = site.world.step(session, event)
    page.wait_for_url(f"**/desktop/{sid}")
    page.wait_for_selector("[data-state=connected]")
    expect(page).to_have_title("Ready · Linux desktop · Deskfleet")


def test_seconds_go_on_while_the_portal_has_nothing_new_to_say(browser: Browser, site: Site) -> None:
    site.world.session(SID, "alice", State.QUEUED)
    page = site.page(browser, "alice")
    answers: list[int] = []
    page.on("response", lambda answer: answers.append(answer.status) if "/part?" in answer.url else None)
    page.goto(f"{site.url}/progress/{SID}")
    page.evaluate("document.getElementById('progress').dataset.mark = 'kept'")
    expect(page.locator("[aria-current=step] .after")).to_have_text("2 s…")  # no clock but the page's own moves here
    assert len(answers) >= 2 and set(answers) == {204}
    assert page.locator("#progress").get_attribute("data-mark") == "kept"
    with site.world.writer.begin() as tx:
        tx.explain([(SID, Wait(2, None, ()), 1.0)])
    expect(page.locator("#progress")).to_contain_text("You are 2nd")
    expect(page.locator("[aria-current=step] .after")).to_have_text("1 s…")


def test_what_can_be_expected_stands_beside_each_machine_and_is_asked_once(browser: Browser, site: Site) -> None:
    site.world.forecast = Forecast(Outlook.WAITS, place=3, estimate_s=700.0, verdicts=(SHORT,))
    page = site.page(browser, "alice")
    box = page.locator("article[data-machine=desktop] .outlook")
    expect(box).to_contain_text("Waits: about 12 min, 3rd in the queue")
    page.wait_for_timeout(1_500)
    assert len(site.world.questions) == 1, "nobody changed anything, so nothing is asked again"


def test_a_changed_size_is_asked_about_once_it_stays(browser: Browser, site: Site) -> None:
    page = site.page(browser, "alice")
    page.goto(f"{site.url}/launch/desktop")
    expect(page.locator(".outlook")).to_have_text("Starts now")
    site.world.questions.clear()
    site.world.forecast = Forecast(Outlook.WAITS, verdicts=(SHORT,))
    for key in ("Home", "ArrowRight", "End"):
        page.get_by_role("slider", name="CPUs").press(key)
    expect(page.locator(".outlook p")).to_have_text("Waits; nobody can tell how long")
    assert [asked.resources.cpus for asked in site.world.questions] == [8]
    page.click(".outlook summary")
    expect(page.locator(".outlook li")).to_have_text("h1: 2.1 of 4 GiB free")
    site.world.forecast = Forecast(Outlook.NEVER, largest=Resources(2, 4096, 64))
    page.get_by_role("slider", name="Memory").press("End")
    expect(page.locator(".outlook")).to_contain_text("Never fits: the largest is 2 CPUs, 4 GiB")
    page.click("button[name=launch]")
    expect(page.locator("[data-reason=never_fits]")).to_contain_text("The largest that fits is 2 CPUs, 4 GiB")
    assert page.input_value("select[name=memory_mib]") == "8192", "what was filled in is still there"
    assert site.world.sent() == []


def test_when_the_portal_does_not_answer_the_question_the_form_still_works(browser: Browser, site: Site) -> None:
    page = site.page(browser, "alice")
    page.goto(f"{site.url}/launch/desktop")
    expect(page.locator(".outlook")).to_have_text("Starts now")
    site.hush()
    page.get_by_role("slider", name="CPUs").press("ArrowRight")
    expect(page.locator(".outlook")).to_contain_text("can't be told right now")
    site.listen(site.port)
    page.click("button[name=launch]")
    page.wait_for_url("**/progress/*")


def test_waiting_is_cancelled_by_one_click(browser: Browser, site: Site) -> None:
    waiting = site.world.session(SID, "alice", State.QUEUED)
    page = site.page(browser, "alice")
    page.goto(f"{site.url}/progress/{waiting.sid}")
    page.click("text=Cancel")
    until(lambda: len(site.world.sent()) == 1, "the stop is sent")


def test_a_host_that_falls_silent_turns_the_state_to_unknown_and_back(browser: Browser, site: Site) -> None:
    site.world.session(SID, "alice", State.RUNNING)
    page = site.page(browser, "alice")
    page.goto(f"{site.url}/desktops")
    badge = page.locator(f"[data-sid='{SID}'] .badge")
    expect(badge).to_have_text("running")
    site.world.host("h1", seen_ago=300)
    expect(badge).to_have_text("unknown")
    expect(page.locator(f"[data-sid='{SID}']")).to_contain_text("h1 does not answer; the desktop may well run on.")
    site.world.host("h1", seen_ago=1)
    expect(badge).to_have_text("running")


def test_an_administrator_changes_a_host_without_any_script(browser: Browser, site: Site) -> None:
    page = site.page(browser, "boss", java_script_enabled=False)
    page.goto(f"{site.url}/admin/hosts/h1")
    page.fill("input[name=text]", "New disks on Friday")
    page.click("#drain")
    page.wait_for_url("**/admin/")
    page.goto(f"{site.url}/admin/hosts/h1")
    page.fill("input[name=name]", "h2")
    page.click("#declare-dead")
    expect(page.locator("[role=alert]")).to_contain_text("Nothing was done")
    page.fill("input[name=name]", "h1")
    page.click("#declare-dead")
    page.wait_for_url("**/admin/")
    messages = [decode(m.type, m.body) for m in site.world.broker.pending(SCHEDULER_COMMANDS)]
    assert messages == [DrainRequested("h1", True, "boss", "New disks on Friday"), HostDeclaredDead("h1", "boss")]


@contextmanager
def opened(browser: Browser, site: Site, query: str = "") -> Iterator[Page]:
    site.world.session(SID, "alice", State.RUNNING)
    page = site.page(browser, "alice")
    page.goto(f"{site.url}/desktop/{SID}{query}")
    page.wait_for_selector("[data-state=connected]")
    yield page
    page.context.close()


def test_what_the_guest_calls_itself_is_shown_as_text(browser: Browser, site: Site) -> None:
    with opened(browser, site) as page:
        expect(page.locator("#name")).to_have_text(HOSTILE)
        assert page.locator("#bar img").count() == 0


def test_the_page_goes_where_the_server_says_whatever_its_address_holds(browser: Browser, site: Site) -> None:
    with FakeConsole() as foreign:
        query = f"?host=127.0.0.1&port={foreign.port}&path=console&token=x&autoconnect=1&encrypt=0"
        with opened(browser, site, f"{query}#{query[1:]}"):
            assert foreign.paths == []
            assert all(re.fullmatch(r"/console\?ticket=[\w.-]+", path) for path in site.console.paths)


def test_a_silent_cut_is_noticed_and_mended_with_a_fresh_ticket(browser: Browser, site: Site) -> None:
    with opened(browser, site) as page:
        site.console.silent.set()
        page.wait_for_selector("[data-state=reconnecting]")
        site.console.silent.clear()
        page.wait_for_selector("[data-state=connected]")
    assert len(site.console.paths) >= 2 and len(set(site.console.paths)) == len(site.console.paths)


def test_a_quiet_desktop_is_not_taken_for_a_dead_one(browser: Browser, site: Site) -> None:
    with opened(browser, site) as page:
        page.wait_for_timeout(12_000)  # longer than it takes to notice a silent cut
        assert page.get_attribute("#state", "data-state") == "connected"
    assert len(site.console.paths) == 1


def test_a_portal_that_is_away_does_not_end_the_desktop(browser: Browser, site: Site) -> None:
    with opened(browser, site) as page:
        site.hush()
        site.console.cut()
        expect(page.locator("#state")).to_contain_text("portal does not answer")
        site.listen(site.port)
        page.wait_for_selector("[data-state=connected]")


def test_an_end_is_told_with_its_reason_and_nothing_tries_again(browser: Browser, site: Site) -> None:
    with opened(browser, site) as page:
        session = site.world.reader.session(SID)
        assert session
        site.world.step(site.world.step(session, Event.STOP), Event.GONE)
        site.console.cut()
        expect(page.locator("#message")).to_contain_text("Stopped")
        tries = len(site.console.paths)
        page.wait_for_timeout(2_000)
        assert len(site.console.paths) == tries


def test_after_a_logout_elsewhere_the_page_asks_for_a_login_and_comes_back(browser: Browser, site: Site) -> None:
    with opened(browser, site) as page:
        site.world.portal.accounts.set_password("alice", PASSWORD + "!")
        site.console.cut()
        page.wait_for_url("**/login?**")
        page.fill("input[name=user]", "alice")
        page.fill("input[name=password]", PASSWORD + "!")
        page.keyboard.press("Enter")
        page.wait_for_url(f"**/desktop/{SID}")


def test_stopping_asks_first_and_works_by_keyboard(browser: Browser, site: Site) -> None:
    site.world.session(SID, "alice", State.RUNNING)
    page = site.page(browser, "alice")
    page.goto(f"{site.url}/desktops")
    page.focus(f"#stop-{SID}")
    page.keyboard.press("Enter")
    expect(page.locator("#confirm")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#confirm")).to_be_hidden()
    assert site.world.sent() == []
    page.focus(f"#stop-{SID}")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    until(lambda: len(site.world.sent()) == 1, "the stop is sent")
    expect(page.locator(f"#stop-{SID}")).to_be_disabled()


def test_polling_keeps_the_focus_and_tells_when_the_portal_is_away(browser: Browser, site: Site) -> None:
    site.world.session(SID, "alice", State.RUNNING)
    page = site.page(browser, "alice")
    page.goto(f"{site.url}/desktops")
    page.focus(f"#stop-{SID}")
    with page.expect_response("**/desktops/part"):
        pass
    page.wait_for_timeout(200)
    assert page.evaluate("document.activeElement.id") == f"stop-{SID}"
    site.hush()
    expect(page.locator("#offline")).to_be_visible()
    site.listen(site.port)
    expect(page.locator("#offline")).to_be_hidden()


def test_no_hostile_name_becomes_more_than_text_on_any_page(browser: Browser, site: Site) -> None:
    site.world.machine("desktop", title=HOSTILE)
    site.world.portal.accounts.add(HOSTILE, PASSWORD, admin=True)
    site.world.session(SID, HOSTILE, State.RUNNING)
    waiting = site.world.session("b" * 32, HOSTILE, State.QUEUED)
    site.world.host("h1", problems=(HOSTILE,))
    with site.world.writer.begin() as tx:
        tx.drain("h1", True, HOSTILE)
        tx.explain([(waiting.sid, Wait(2, 90.0, (Verdict("h1", Reason.MEMORY_SHORT, HOSTILE),)), 1.0)])
    site.world.forecast = Forecast(Outlook.NEVER, why=HOSTILE, verdicts=(Verdict("h1", Reason.MEMORY_SHORT, HOSTILE),))
    page = site.page(browser, HOSTILE)
    paths = (
        "launch",
        "launch/desktop",
        "launch/desktop/outlook",
        "desktops",
        f"progress/{waiting.sid}",
        f"desktop/{SID}",
    )
    for path in (
        *paths,
        "admin/",
        "admin/hosts/h1",
        "admin/audit",
        "admin/sessions",
        "admin/people",
        "admin/machines",
        "nothing",
    ):
        page.goto(f"{site.url}/{path}")
        if path == "launch":
            expect(page.locator(".outlook")).to_contain_text(HOSTILE)
        assert page.locator("img:not([data-picture])").count() == 0, path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_a_phone(browser: Browser, site: Site, scheme: str) -> None:
    site.world.session(SID, "boss", State.RUNNING)
    waiting = site.world.session("b" * 32, "boss", State.QUEUED)
    with site.world.writer.begin() as tx:
        tx.drain("h1", True, "Maintenance_" * 30)
        tx.explain(
            [(waiting.sid, Wait(2, 90.0, (Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free, " * 20),)), 1.0)]
        )
    site.world.forecast = Forecast(Outlook.WAITS, place=3, estimate_s=700.0, verdicts=(SHORT,) * 30)
    page = site.page(browser, "boss", viewport={"width": 360, "height": 740}, color_scheme=scheme)
    paths = (
        "launch",
        "launch/desktop",
        "desktops",
        f"progress/{waiting.sid}",
        f"desktop/{SID}",
        "admin/",
        "admin/hosts/h1",
        "admin/audit",
        "admin/sessions",
        "admin/people",
        "admin/machines",
        "admin/queues/",
        "admin/health",
    )
    for path in paths:
        page.goto(f"{site.url}/{path}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


def test_the_end_is_told_on_the_desktops_own_page_and_put_off_by_a_click(browser: Browser, site: Site) -> None:
    site.world.session(SID, "alice", State.RUNNING, lifetime_s=240)
    page = site.page(browser, "alice")
    page.goto(f"{site.url}/desktop/{SID}")
    page.wait_for_selector("[data-state=connected]")
    expect(page.locator("#ending")).to_contain_text("ends in 4 min. Save your work.")
    assert page.get_attribute("#ending", "data-soon") is not None
    page.click("#ending button")
    until(lambda: bool(site.world.sent()), "the longer time was asked for")
    assert site.world.sent() == [ExtendRequested(SID, "alice", False, 240 + 3600)]
    session = site.world.reader.session(SID)
    assert session
    longer = replace(session, lifetime_s=240 + 3600)
    with site.world.writer.begin() as tx:
        tx.save(session, longer, Event.EXTEND)
    expect(page.locator("#ending")).to_be_hidden()
    page.context.close()


def test_a_person_who_looks_elsewhere_is_told_that_the_desktop_is_ready(site: Site, browser: Browser) -> None:
    page = site.page(browser, "alice", permissions=["notifications"])
    page.add_init_script(
        """
        window.told = [];
        window.Notification = class {
          static permission = "granted";
          constructor(title, options) { window.told.push(options.body); }
          addEventListener() {}
        };
        Object.defineProperty(document, "visibilityState", { get: () => "hidden" });
        """
    )
    site.world.host("h1")
    site.world.session(SID, "alice", State.RUNNING)
    page.goto(f"{site.url}/desktop/{SID}")
    page.wait_for_selector("[data-state=connected]")
    page.wait_for_function("window.told.length > 0")
    assert page.evaluate("window.told") == ["Your desktop is ready."]
