"""Waiting, and what people are told about it: before the click, while it waits, and when a host does not answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask
from support.portals import PASSWORD, Browser, World, bearer, signed_in

from deskfleet.ledger.reader import Wait
from deskfleet.portal.app import create_app
from deskfleet.portal.outlook import Forecasts
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.messages import DrainRequested, HostDeclaredDead
from deskfleet.schemas.session import Resources, State
from deskfleet.schemas.topology import SCHEDULER_COMMANDS
from deskfleet.schemas.verdict import Forecast, Outlook, Verdict
from deskfleet.schemas.wire import decode

MINE = "a" * 32
SHORT = Verdict("h1", Reason.MEMORY_SHORT, "2.1 of 4 GiB free")
CAP = Verdict("", Reason.USER_CAP, "2 of 2 desktops in use")
LARGEST = Resources(8, 16384, 100)
NEVER = Forecast(Outlook.NEVER, why="No host has 32 CPUs.", largest=LARGEST)
WAITS = Forecast(Outlook.WAITS, place=3, estimate_s=700.0, verdicts=(SHORT, CAP))
UNTOLD = "Whether it starts at once can&#39;t be told right now."


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.portal.accounts.add("alice", PASSWORD)
    world.portal.accounts.add("boss", PASSWORD, admin=True)
    world.host("h1")
    yield world
    world.close()


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.portal)


@pytest.fixture
def alice(app: Flask) -> Browser:
    return signed_in(app, "alice")


def impatient(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that does not answer, and a portal that waits for it only a moment."""
    world.forecast = None
    monkeypatch.setattr(world.portal.forecasts, "_patience_s", 0.01)
    assert isinstance(world.portal.forecasts, Forecasts)


# Before the click.


@pytest.mark.parametrize(
    ("forecast", "tone", "text"),
    [
        (Forecast(Outlook.NOW, "h1", why="most room"), "now", "Starts now"),
        (WAITS, "waits", "Waits: about 12 min, 3rd in the queue"),
        (Forecast(Outlook.WAITS, place=1), "waits", "Waits; nobody can tell how long (1st in the queue)"),
        (NEVER, "never", "Never fits: the largest is 8 CPUs, 16 GiB memory, 100 GiB disk"),
        (Forecast(Outlook.NEVER), "never", "Never fits. No host could ever give this size. Choose a smaller one."),
        (Forecast(Outlook.NEVER, why="One may have 4."), "never", "Never fits. One may have 4."),
    ],
)
def test_what_a_launch_can_expect_is_told_beside_the_form(
    world: World, alice: Browser, forecast: Forecast, tone: str, text: str
) -> None:
    world.forecast = forecast
    part = alice.get("/launch/desktop/outlook?cpus=4&memory_mib=2048&persistent=no").text
    assert f'<p data-outlook="{tone}">{text}</p>' in part
    assert [line for line in ("h1: 2.1 of 4 GiB free", "2 of 2 desktops in use") if line in part] == [
        verdict.sentence for verdict in forecast.verdicts
    ]
    (asked,) = world.questions
    assert (asked.user, asked.resources) == ("alice", Resources(4, 2048, 4))
    assert world.sent() == [], "a question is no launch"


def test_both_launch_pages_ask_for_it_without_the_secrets_of_their_forms(alice: Browser) -> None:
    for path in ("/launch", "/launch/desktop"):
        (box,) = re.findall(r'<div class="outlook"[^>]*>', alice.get(path).text)
        assert 'hx-get="/launch/desktop/outlook"' in box
        assert 'hx-params="cpus,memory_mib,disk_gib,gpu,lifetime_s,persistent"' in box


def test_when_nobody_can_tell_the_page_says_so_and_the_launch_is_stored(
    world: World, alice: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(world, monkeypatch)
    answer = alice.get("/launch/desktop/outlook")
    assert answer.status_code == 200 and UNTOLD in answer.text
    assert start(alice).status_code == 303
    world.broker.crash()
    answer = alice.get("/launch/desktop/outlook")
    assert answer.status_code == 200 and UNTOLD in answer.text
    assert start(alice).status_code == 303
    world.broker.recover()
    world.tick(5)
    assert len({message.sid for message in world.sent()}) == 2, "none is lost for that"


def start(browser: Browser, **fields: str) -> object:
    seal = re.search(r'name="seal" value="([^"]+)"', browser.get("/launch/desktop").text)
    assert seal
    return browser.post("/launch/desktop", {"seal": seal[1], **fields}, token=browser.csrf("/desktops"))


def test_what_never_fits_is_refused_at_once_with_the_largest_size(world: World, app: Flask, alice: Browser) -> None:
    world.forecast = NEVER
    answer = start(alice, cpus="8")
    assert answer.status_code == 422  # type: ignore[attr-defined]
    page = answer.text  # type: ignore[attr-defined]
    assert 'data-reason="never_fits"' in page
    assert "No host has 32 CPUs. The largest that fits is 8 CPUs, 16 GiB memory, 100 GiB disk." in page
    refused = app.test_client().post("/api/v1/sessions", json={"machine": "desktop"}, headers=bearer(world, "alice"))
    assert (refused.status_code, refused.json["reason"]) == (422, "never_fits")  # type: ignore[index]
    assert world.sent() == [] and world.portal.outbox.waiting() == 0


def test_what_waits_is_taken(world: World, alice: Browser) -> None:
    world.forecast = WAITS
    assert start(alice).status_code == 303  # type: ignore[attr-defined]
    assert len(world.sent()) == 1


def test_a_launch_that_was_stored_stays_so_whatever_is_said_of_it_later(world: World, app: Flask) -> None:
    client, headers = app.test_client(), bearer(world, "alice")
    body = {"machine": "desktop", "sid": MINE}
    assert client.post("/api/v1/sessions", json=body, headers=headers).status_code == 202
    world.forecast = NEVER
    assert client.post("/api/v1/sessions", json=body, headers=headers).status_code == 200
    assert len(world.questions) == 1


@pytest.mark.parametrize("query", ["cpus=99", "cpus=two", "gpu=any", "persistent=perhaps", "lifetime_s=1"])
def test_a_size_that_the_machine_does_not_allow_is_told_without_a_question(
    world: World, alice: Browser, query: str
) -> None:
    answer = alice.get(f"/launch/desktop/outlook?{query}")
    assert answer.status_code == 200 and 'data-outlook="never"' in answer.text
    assert world.questions == []


def test_a_machine_of_others_is_not_asked_about(world: World, app: Flask, alice: Browser) -> None:
    world.machine("secret", users='["bob"]')
    assert alice.get("/launch/secret/outlook").status_code == 404
    answer = app.test_client().post("/api/v1/placements", json={"machine": "secret"}, headers=bearer(world, "alice"))
    assert answer.status_code == 404 and world.questions == []


def test_the_api_answers_for_a_would_be_launch(
    world: World, app: Flask, alice: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, headers = app.test_client(), bearer(world, "alice")
    world.forecast = WAITS
    body = {"machine": "desktop", "cpus": 4, "lifetime_s": 600}
    answer = client.post("/api/v1/placements", json=body, headers=headers)
    assert answer.status_code == 200
    assert answer.json == {
        "machine": "desktop",
        "resources": {"cpus": 4, "memory_mib": 1024, "disk_gib": 4, "gpus": 0, "gpu_model": ""},
        "outlook": "waits",
        "sentence": "Waits: about 12 min, 3rd in the queue",
        "host": "",
        "place": 3,
        "estimate_s": 700.0,
        "why": "",
        "largest": None,
        "verdicts": [
            {"host": "h1", "reason": "memory_short", "sentence": "h1: 2.1 of 4 GiB free"},
            {"host": "", "reason": "user_cap", "sentence": "2 of 2 desktops in use"},
        ],
        "instant": False,
    }
    world.forecast = NEVER
    never = client.post("/api/v1/placements", json=body, headers=headers).json
    assert never["outlook"] == "never" and never["largest"]["cpus"] == 8  # type: ignore[index]
    for bad in ({**body, "sid": MINE}, {"machine": "desktop", "cpus": 99}, {"machine": "desktop", "cpus": "2"}, {}):
        assert client.post("/api/v1/placements", json=bad, headers=headers).status_code == 422
    impatient(world, monkeypatch)
    unknown = client.post("/api/v1/placements", json=body, headers=headers)
    assert unknown.status_code == 200 and unknown.json["outlook"] == "unknown"  # type: ignore[index]
    assert alice.post("/api/v1/placements", json=body, token="").status_code == 400
    assert world.sent() == []


# While it waits.


def queued(world: World, wait: Wait | None = None) -> None:
    session = world.session(MINE, "alice", State.QUEUED)
    if wait:
        with world.writer.begin() as tx:
            tx.explain([(session.sid, wait, 5.0)])


@pytest.mark.parametrize(
    ("wait", "texts", "headline", "estimate_s"),
    [
        (Wait(1, 90.0, (SHORT, CAP)), ["<strong>next</strong>", "latest in <strong>about 2 min"], "1st in", 90.0),
        (Wait(12, None, (SHORT,)), ["<strong>12th</strong>", "How long it takes is unknown"], "12th in", None),
        (None, ["waits for a place"], "Waiting", None),
    ],
)
def test_the_progress_page_tells_place_estimate_and_every_reason(
    world: World, alice: Browser, wait: Wait | None, texts: list[str], headline: str, estimate_s: float | None
) -> None:
    queued(world, wait)
    verdicts = wait.verdicts if wait else ()
    for path in (f"/progress/{MINE}", f"/progress/{MINE}/part"):
        page = alice.get(path).text
        for text in texts:
            assert text in page
        found = re.findall(r'<li data-reason="([a-z_]+)">([^<]*)</li>', page)
        assert found == [(verdict.reason.value, verdict.sentence) for verdict in verdicts]
        assert f'data-title="{headline}' in page
    told = alice.get(f"/api/v1/sessions/{MINE}").json
    assert told["estimate_s"] == estimate_s and told["place"] == (wait.place if wait else None)  # type: ignore[index]


def test_waiting_is_cancelled_by_a_plain_button(world: World, alice: Browser) -> None:
    queued(world, Wait(1, None, ()))
    page = alice.get(f"/progress/{MINE}").text
    form = re.search(rf'<form method="post" action="(/desktops/{MINE}/stop)">.*?Cancel</button>', page, re.DOTALL)
    assert form and alice.post(form[1], token=alice.csrf("/desktops")).status_code == 303
    (stop,) = world.sent()
    assert stop.sid == MINE
    assert "disabled>Cancel" in alice.get(f"/progress/{MINE}").text


def test_a_tab_tells_when_its_desktop_is_ready(world: World, alice: Browser) -> None:
    for number, (state, headline) in enumerate(
        {
            State.QUEUED: "Waiting",
            State.ASSIGNED: "Starting",
            State.STARTING: "Starting",
            State.STOPPING: "Stopping",
            State.ENDED: "Ended",
        }.items()
    ):
        sid = f"{number:032x}"
        world.session(sid, "alice", state)
        assert f"<title>{headline} · Linux desktop · Deskfleet</title>" in alice.get(f"/progress/{sid}").text
    world.session(MINE, "alice", State.RUNNING)
    assert alice.get(f"/progress/{MINE}/part").headers["HX-Redirect"] == f"/desktop/{MINE}"
    assert "<title>Ready · Linux desktop · Deskfleet</title>" in alice.get(f"/desktop/{MINE}").text


# A host that does not answer.

UNKNOWN = {
    State.ASSIGNED: "h1 does not answer; whether it starts the desktop can't be told.",
    State.STARTING: "h1 does not answer; whether it starts the desktop can't be told.",
    State.RUNNING: "h1 does not answer; the desktop may well run on.",
    State.STOPPING: "h1 does not answer; the desktop is stopped as soon as it does.",
}


@pytest.mark.parametrize("state", UNKNOWN)
def test_on_a_silent_host_nothing_is_said_to_run_for_sure(
    world: World, app: Flask, alice: Browser, state: State
) -> None:
    world.session(MINE, "alice", state)
    world.host("h1", seen_ago=300)
    sentence = UNKNOWN[state].replace("'", "&#39;")
    boss = signed_in(app, "boss")
    assert sentence in alice.get("/desktops").text and sentence in alice.get(f"/progress/{MINE}").text
    for page in (alice.get("/desktops").text, alice.get(f"/progress/{MINE}/part").text, boss.get("/admin/").text):
        assert 'data-session-state="unknown"' in page and 'data-tone="running"' not in page
        assert f'data-session-state="{state}"' not in page
    told = alice.get(f"/api/v1/sessions/{MINE}").json
    assert told["host_silent"] and told["sentence"] == UNKNOWN[state]  # type: ignore[index]
    assert [s["host_silent"] for s in alice.get("/api/v1/sessions").json["sessions"]] == [True]  # type: ignore[index]


def test_the_screen_on_a_silent_host_may_still_be_tried_and_comes_back_by_itself(world: World, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    world.host("h1", seen_ago=300)
    assert alice.get(f"/progress/{MINE}").status_code == 200
    assert "HX-Redirect" not in alice.get(f"/progress/{MINE}/part").headers
    assert f'href="/desktop/{MINE}"' in alice.get(f"/progress/{MINE}").text
    assert "h1 does not answer; the desktop may well run on." in alice.get(f"/desktop/{MINE}").text
    world.host("h1", seen_ago=1)
    assert alice.get(f"/progress/{MINE}/part").headers["HX-Redirect"] == f"/desktop/{MINE}"
    assert "h1 does not answer" not in alice.get(f"/desktop/{MINE}").text
    assert not alice.get(f"/api/v1/sessions/{MINE}").json["host_silent"]  # type: ignore[index]


def test_what_waits_or_has_ended_is_not_unknown_because_a_host_is_silent(world: World, alice: Browser) -> None:
    world.session(MINE, "alice", State.ENDED)
    world.session("b" * 32, "alice", State.QUEUED)
    world.host("h1", seen_ago=300)
    assert [s["host_silent"] for s in alice.get("/api/v1/sessions").json["sessions"]] == [False, False]  # type: ignore[index]


def test_a_host_that_was_declared_dead_gives_its_desktops_up(world: World, app: Flask, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    with world.writer.begin() as tx:
        tx.set_dead("h1", True)
    assert "h1 was declared dead, so this desktop is given up." in alice.get("/desktops").text
    boss = signed_in(app, "boss")
    page = boss.get("/admin/").text
    assert 'data-dead="yes"' in page and "It was declared dead" in page
    assert boss.get("/api/v1/hosts").json[0]["dead"]  # type: ignore[index]
    assert 'id="declare-dead"' not in boss.get("/admin/hosts/h1").text


# What an administrator does.


def commands(world: World) -> list[object]:
    return [decode(message.type, message.body) for message in world.broker.pending(SCHEDULER_COMMANDS)]


def test_draining_tells_the_people_why(world: World, app: Flask, alice: Browser) -> None:
    boss = signed_in(app, "boss")
    token = boss.csrf("/desktops")
    assert boss.post("/admin/hosts/h1/drain", {"text": "New disks\n on  Friday"}, token=token).status_code == 303
    world.session(MINE, "alice", State.RUNNING)
    assert boss.post("/api/v1/hosts/h1/drain", json={"text": "Soon"}, token=token).status_code == 204
    assert boss.post("/api/v1/hosts/h1/drain", json={}, token=token).status_code == 204
    assert commands(world) == [DrainRequested("h1", True, "boss", text) for text in ("New disks on Friday", "Soon", "")]
    with world.writer.begin() as tx:
        tx.drain("h1", True, "New disks on <b>Friday</b>")
    for page in (
        alice.get("/desktops").text,
        alice.get(f"/desktop/{MINE}").text,
        boss.get("/admin/").text,
        boss.get("/admin/hosts/h1").text,
    ):
        assert "New disks on &lt;b&gt;Friday&lt;/b&gt;" in page
    assert alice.get(f"/api/v1/sessions/{MINE}").json["host_message"] == "New disks on <b>Friday</b>"  # type: ignore[index]
    with world.writer.begin() as tx:
        tx.drain("h1", False, "New disks on Friday")
    assert "New disks" not in alice.get("/desktops").text, "over, whatever text is left"


def test_a_text_that_is_too_long_is_refused(world: World, app: Flask) -> None:
    boss = signed_in(app, "boss")
    token = boss.csrf("/desktops")
    answer = boss.post("/admin/hosts/h1/drain", {"text": "x" * 401}, token=token)
    assert answer.status_code == 422 and "at most 400 characters" in answer.text
    assert boss.post("/api/v1/hosts/h1/drain", json={"text": "x" * 401}, token=token).status_code == 422
    assert boss.post("/admin/hosts/h1/drain", {"text": "x" * 400}, token=token).status_code == 303
    assert len(commands(world)) == 1


def test_declaring_dead_needs_the_typed_name(world: World, app: Flask) -> None:
    world.session(MINE, "alice", State.RUNNING)
    boss = signed_in(app, "boss")
    token = boss.csrf("/desktops")
    page = boss.get("/admin/hosts/h1").text
    assert "It answers right now" in page and "It holds 1 desktop." in page
    for typed in ({}, {"name": ""}, {"name": "h2"}, {"name": "H1"}, {"name": " h1"}):
        answer = boss.post("/admin/hosts/h1/declare-dead", typed, token=token)
        assert answer.status_code == 422 and "Nothing was done" in answer.text
    assert commands(world) == []
    assert boss.post("/admin/hosts/h1/declare-dead", {"name": "h1"}, token=token).status_code == 303
    assert boss.post("/api/v1/hosts/h1/declare-dead", json={}, token=token).status_code == 204
    assert commands(world) == [HostDeclaredDead("h1", "boss")] * 2
    assert [entry.target for entry in world.portal.audit.newest() if entry.action == "declare dead"] == ["h1", "h1"]
    assert boss.post("/api/v1/hosts/ghost/declare-dead", json={}, token=token).status_code == 404
    assert boss.get("/admin/hosts/ghost").status_code == 404
    world.broker.crash()
    assert boss.post("/admin/hosts/h1/declare-dead", {"name": "h1"}, token=token).status_code == 503
