"""What people and administrators see of machines that are kept ready."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Flask
from support.portals import PASSWORD, Browser, World, bearer, signed_in

from deskfleet.portal.app import create_app
from deskfleet.schemas.messages import TemplateOrdered
from deskfleet.schemas.session import Birth, State
from deskfleet.schemas.template import TemplateOrder, TemplateReport, TemplateState
from deskfleet.schemas.topology import SCHEDULER_COMMANDS
from deskfleet.schemas.wire import decode

KEY = "0123456789abcdef"
READY = TemplateReport(KEY, "desktop", "", 2, 1024, TemplateState.READY, True, 364, 1_000, 3, 7, 2)
HOSTILE = '"><script>alert(1)</script>'


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.portal.accounts.add("boss", PASSWORD, admin=True)
    world.portal.accounts.add("alice", PASSWORD)
    world.host("h1", templates=(READY,))
    yield world
    world.close()


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.portal)


@pytest.fixture
def boss(app: Flask) -> Browser:
    return signed_in(app, "boss")


@pytest.fixture
def alice(app: Flask) -> Browser:
    return signed_in(app, "alice")


def orders(world: World) -> list[TemplateOrdered]:
    messages = [decode(m.type, m.body) for m in world.broker.pending(SCHEDULER_COMMANDS)]
    return [message for message in messages if isinstance(message, TemplateOrdered)]


def instant(world: World) -> None:
    with (world.catalogue / "desktop.toml").open("a") as file:
        file.write("\n[instant]\n")


# --- before and after the click ---------------------------------------------------------------------------------


def test_what_is_ready_at_once_says_so_before_the_click(world: World, alice: Browser) -> None:
    assert world.forecast
    assert "Starts now" in alice.get("/launch/desktop/outlook").text
    world.forecast = replace(world.forecast, instant=True)
    assert "Ready at once" in alice.get("/launch/desktop/outlook").text


def launch(world: World, alice: Browser, state: State) -> tuple[str, str]:
    """Launch what is in this state by then; the session, and where the person is sent."""
    found = re.search(r'name="seal" value="([^"]+)"', alice.get("/launch/desktop").text)
    assert found
    sid = world.portal.seals.open(found[1], "alice", "desktop")
    world.session(sid, "alice", state)
    answer = alice.post("/launch/desktop", {"seal": found[1]}, token=alice.csrf("/desktops"))
    assert answer.status_code == 303
    return sid, answer.headers["Location"]


def test_a_desktop_that_runs_within_a_second_is_shown_at_once(world: World, alice: Browser) -> None:
    instant(world)
    sid, where = launch(world, alice, State.RUNNING)
    assert where == f"/desktop/{sid}"


@pytest.mark.parametrize("state", [State.STARTING, State.QUEUED])
def test_else_its_start_is_watched(world: World, alice: Browser, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskfleet.portal.actions._LOOKS", 2)
    instant(world)
    sid, where = launch(world, alice, state)
    assert where == f"/progress/{sid}"


def test_nobody_waits_for_a_machine_that_boots(world: World, alice: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskfleet.portal.actions.time.sleep", lambda _: pytest.fail("it was waited for"))
    sid, where = launch(world, alice, State.STARTING)
    assert where == f"/progress/{sid}"


def test_the_stages_say_how_it_came_to_be(world: World, alice: Browser) -> None:
    world.session("a" * 32, "alice", State.ENDED, birth=Birth.FORK_FAILED)
    text = alice.get(f"/progress/{'a' * 32}").text
    assert "Booted: the ready copy of this machine could not be used this time." in text
    answer = alice.client.get(f"/api/v1/sessions/{'a' * 32}", headers=bearer(world, "alice"))
    assert answer.json and answer.json["birth"] == "fork_failed"


# --- the administrator ------------------------------------------------------------------------------------------


def test_an_administrator_sees_what_a_host_keeps_ready(world: World, boss: Browser) -> None:
    text = boss.get("/admin/hosts/h1").text
    row = text[text.index(f'data-template="{KEY}"') :]
    for words in ("desktop", "2 CPUs", "1 GiB", "ready", "364 MiB", "7 of 9"):
        assert words in row[: row.index("</tr>")], words
    world.host("h1", templates=())
    assert "It keeps none ready." in boss.get("/admin/hosts/h1").text
    world.host("h1")
    assert "Kept ready" not in boss.get("/admin/hosts/h1").text


def test_c12_what_a_host_says_of_its_templates_is_only_text(world: World, boss: Browser) -> None:
    world.host("h1", templates=(replace(READY, detail=HOSTILE, tenant=HOSTILE),))
    assert "<script>alert" not in boss.get("/admin/hosts/h1").text


@pytest.mark.parametrize("order", TemplateOrder)
def test_a_template_is_made_anew_or_dropped(world: World, boss: Browser, order: TemplateOrder) -> None:
    wish = TemplateOrdered("h1", KEY, order, "boss")
    answer = boss.post(f"/admin/hosts/h1/templates/{KEY}", {"order": order.value}, token=boss.csrf("/desktops"))
    assert answer.status_code == 303 and orders(world) == [wish]
    answer = boss.client.post(
        f"/api/v1/hosts/h1/templates/{KEY}", json={"order": order.value}, headers=bearer(world, "boss")
    )
    assert answer.status_code == 204 and orders(world) == [wish, wish]
    noted = [entry for entry in world.portal.audit.newest() if "template" in entry.action]
    assert [(entry.actor, entry.target, entry.detail) for entry in noted] == [("boss", "h1", KEY)] * 2


@pytest.mark.parametrize(
    ("path", "order", "status"),
    [
        (f"/admin/hosts/h1/templates/{KEY}", "burn", 422),
        ("/admin/hosts/h1/templates/0000000000000000", "drop", 404),
        (f"/admin/hosts/h9/templates/{KEY}", "drop", 404),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(
    world: World, boss: Browser, path: str, order: str, status: int
) -> None:
    assert boss.post(path, {"order": order}, token=boss.csrf("/desktops")).status_code == status
    assert not orders(world)
