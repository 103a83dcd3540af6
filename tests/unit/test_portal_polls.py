"""What the progress page asks again and again: cheap while nothing changes, and at once when anything does."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Flask
from sqlalchemy import event as on_engine
from sqlalchemy import update
from support.portals import PASSWORD, Browser, World, signed_in

from deskfleet.ledger import tables as ledger_tables
from deskfleet.ledger.reader import Wait
from deskfleet.portal import tables
from deskfleet.portal.app import create_app
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.session import Event, Session, State
from deskfleet.schemas.verdict import Verdict

SID = "a" * 32
SHORT = Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free")
HTMX = {"HX-Request": "true"}
SCRIPT = {"X-Deskfleet-Unattended": "yes"}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, login_idle_s=1000)
    for user in ("alice", "bob"):
        world.portal.accounts.add(user, PASSWORD)
    world.host("h1")
    yield world
    world.close()


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.portal)


@pytest.fixture
def alice(app: Flask) -> Browser:
    return signed_in(app, "alice")


def explain(world: World, place: int = 3, estimate_s: float | None = 700.0, verdict: Verdict = SHORT) -> None:
    with world.writer.begin() as tx:
        tx.explain([(SID, Wait(place, estimate_s, (verdict,)), 1.0)])


def queued(world: World) -> Session:
    """A desktop of Alice's that has waited long enough for its page to ask each second."""
    session = world.session(SID, "alice", State.QUEUED)
    explain(world)
    world.clock.now += 10
    return session


def next_poll(part: str) -> str:
    """What the page asks next, by the part that it shows."""
    found = re.search(r'hx-get="([^"]+)"', part)
    assert found
    return html.unescape(found[1])


def shown(browser: Browser) -> str:
    """Look at the page, and ask once in vain; what it asks from then on."""
    path = next_poll(browser.get(f"/progress/{SID}").text)
    same = browser.get(path, headers=HTMX)
    assert (same.status_code, same.data, "HX-Redirect" in same.headers) == (204, b"", False)
    return path


def touch_host(world: World, **values: object) -> None:
    with world.ledger.begin() as connection:
        connection.execute(update(ledger_tables.host).values(values))


CHANGES: dict[str, tuple[Callable[[World], object], str]] = {
    "place": (lambda world: explain(world, place=2), "<strong>2nd</strong>"),
    "estimate": (lambda world: explain(world, estimate_s=100.0), "about 2 min"),
    "no estimate": (lambda world: explain(world, estimate_s=None), "How long it takes is unknown"),
    "verdict": (lambda world: explain(world, verdict=replace(SHORT, detail="1.1 of 4 GiB free")), "1.1 of 4 GiB"),
    "stop": (lambda world: world.portal.outbox.stop(SID, "alice", False), "A stop is on its way."),
    "a minute": (lambda world: setattr(world.clock, "now", world.clock.now + 50), ">1 min…<"),
    "title": (lambda world: world.machine("desktop", "Another name"), "Another name"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_while_nothing_changes_the_answer_is_empty_and_each_change_is_shown_at_once(
    world: World, alice: Browser, change: str
) -> None:
    queued(world)
    path = shown(alice)
    make, text = CHANGES[change]
    make(world)
    part = alice.get(path, headers=HTMX)
    assert part.status_code == 200 and text in part.text
    again = next_poll(part.text)
    assert again != path and alice.get(again, headers=HTMX).status_code == 204


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"seen_at": 1.0}, "h1 does not answer"),
        ({"dead": True}, "h1 was declared dead"),
        ({"draining": True, "message": "new disks at noon"}, "new disks at noon"),
    ],
)
def test_what_happens_to_its_host_is_shown_at_once(
    world: World, alice: Browser, values: dict[str, object], text: str
) -> None:
    world.session(SID, "alice", State.STARTING)
    world.clock.now += 10
    path = shown(alice)
    touch_host(world, **values)
    assert text in alice.get(path, headers=HTMX).text


def test_each_step_is_shown_at_once_and_a_desktop_that_runs_opens(world: World, alice: Browser) -> None:
    session = queued(world)
    path = shown(alice)
    for step in (Event.PLACE, Event.ACCEPTED, Event.RETRY, Event.PLACE, Event.ACCEPTED):
        session = world.step(session, step)
        part = alice.get(path, headers=HTMX)
        assert part.status_code == 200
        path = next_poll(part.text)
    world.step(session, Event.READY)
    for _ in range(2):
        opened = alice.get(path, headers=HTMX)
        assert opened.headers["HX-Redirect"] == f"/desktop/{SID}"
        path = next_poll(opened.text)


def test_the_pause_between_questions_grows_by_itself(world: World, alice: Browser) -> None:
    world.session(SID, "alice", State.QUEUED)
    path = shown(alice)
    world.clock.now += 4
    assert 'hx-trigger="every 1000ms"' in alice.get(path, headers=HTMX).text


def test_another_language_is_another_page(world: World, alice: Browser) -> None:
    queued(world)
    path = shown(alice)
    alice.client.set_cookie("deskfleet-language", "fr", domain="127.0.0.1")
    assert "file" in alice.get(path, headers=HTMX).text


def test_a_new_login_gets_forms_that_it_can_send(world: World, alice: Browser) -> None:
    queued(world)
    path = shown(alice)
    alice.log_in("alice")
    part = alice.get(path, headers=HTMX)
    found = re.search(r'name="csrf_token" value="([^"]+)"', part.text)
    assert found
    assert alice.post(f"/desktops/{SID}/stop", token=found[1]).status_code == 303


def test_who_may_no_longer_look_learns_it_at_the_next_question(world: World, app: Flask, alice: Browser) -> None:
    queued(world)
    path = shown(alice)
    assert signed_in(app, "bob").get(path, headers=HTMX).status_code == 404
    world.portal.accounts.set_disabled("alice", True)
    assert alice.get(path, headers=HTMX).headers["HX-Redirect"].startswith("/login")
    world.portal.accounts.set_disabled("alice", False)
    again = signed_in(app, "alice")
    path = shown(again)
    again.post("/logout", token=again.csrf("/desktops"))
    assert again.get(path, headers=HTMX).headers["HX-Redirect"].startswith("/login")


@pytest.mark.parametrize("until", ["", "x", "-1", "9" * 5000, "1e99"])
def test_a_question_that_makes_no_sense_gets_the_page(world: World, alice: Browser, until: str) -> None:
    queued(world)
    path = re.sub(r"until=\d+", f"until={until}", shown(alice))
    assert alice.get(path, headers=HTMX).status_code == 200


def test_a_question_in_vain_takes_four_statements_and_writes_nothing(world: World, alice: Browser) -> None:
    queued(world)
    path = shown(alice)
    world.clock.now += 35
    said: list[str] = []
    store = world.portal.store
    for engine in (store._reader, store._writer, world._reading):
        on_engine.listen(engine, "before_cursor_execute", lambda _c, _cursor, line, *_: said.append(line))
    assert alice.get(path, headers=HTMX).status_code == 204
    assert len(said) == 4 and all(line.startswith("SELECT") for line in said), said


def used_at(world: World) -> float:
    with world.portal.store.reading() as connection:
        return float(connection.execute(tables.login.select()).mappings().one()["used_at"])


def test_an_open_page_does_not_keep_a_login_alive(world: World, alice: Browser) -> None:
    queued(world)
    world.clock.now += 300
    assert alice.get("/desktops").status_code == 200
    began = used_at(world)
    assert began == world.clock.wall()
    polls = [
        (f"/progress/{SID}/part", HTMX),
        ("/desktops/part", HTMX),
        (f"/desktops/{SID}/picture", SCRIPT),
        (f"/api/v1/sessions/{SID}", SCRIPT),
    ]
    for _ in range(3):
        world.clock.now += 300
        assert {alice.get(path, headers=headers).status_code for path, headers in polls} <= {200, 204}
        assert used_at(world) == began
    world.clock.now += 101
    for path, headers in polls[:2]:
        assert alice.get(path, headers=headers).headers["HX-Redirect"].startswith("/login")
    assert alice.get("/desktops").status_code == 302


def test_whatever_a_person_does_keeps_it_alive(world: World, alice: Browser) -> None:
    queued(world)
    token = alice.csrf("/desktops")
    for act in (
        lambda: alice.get(f"/progress/{SID}"),
        lambda: alice.get(f"/api/v1/sessions/{SID}"),  # the page of a desktop that is typed on
        lambda: alice.post(f"/desktops/{SID}/stop", token=token, headers=HTMX),
    ):
        world.clock.now += 900
        assert act().status_code in (200, 303)
        assert used_at(world) == world.clock.wall()
