"""How long a desktop lasts, and letting it last longer: by page, by API, and never beyond what the site allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask
from support.portals import PASSWORD, Browser, World, signed_in

from deskfleet.portal.app import create_app
from deskfleet.schemas.messages import ExtendRequested
from deskfleet.schemas.session import State

MINE, OTHERS = "a" * 32, "b" * 32


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    for user in ("alice", "bob"):
        world.portal.accounts.add(user, PASSWORD)
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


def lifetime(world: World, sid: str = MINE) -> int:
    session = world.reader.session(sid)
    assert session
    return session.lifetime_s


def test_a_click_asks_for_an_hour_more_and_twice_the_same_click_asks_for_the_same(world: World, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    before = lifetime(world)
    for _ in range(2):
        assert alice.post(f"/desktops/{MINE}/extend", token=alice.csrf("/desktops")).status_code == 303
    assert world.sent() == [ExtendRequested(MINE, "alice", False, before + 3600)] * 2


def test_the_api_asks_for_any_time_up_to_the_longest(world: World, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    token, path = alice.csrf("/desktops"), f"/api/v1/sessions/{MINE}/extend"
    assert alice.post(path, json={"extra_s": 10**7}, token=token).status_code == 202
    longest = world.portal.settings.lifetime_max_s
    assert world.sent() == [ExtendRequested(MINE, "alice", False, longest)]
    for nonsense in ({}, {"extra_s": 0}, {"extra_s": -5}, {"extra_s": "1"}, {"extra_s": 60, "x": 1}):
        assert alice.post(path, json=nonsense, token=token).status_code == 422


def test_what_does_not_run_and_what_is_somebody_elses_is_refused(world: World, app: Flask, alice: Browser) -> None:
    world.session(MINE, "alice", State.QUEUED)
    world.session(OTHERS, "bob", State.RUNNING)
    token = alice.csrf("/desktops")
    for sid, status, reason in ((MINE, 409, "not_running"), (OTHERS, 404, "no_such_desktop")):
        answer = alice.post(f"/api/v1/sessions/{sid}/extend", json={"extra_s": 60}, token=token)
        assert (answer.status_code, answer.json["reason"]) == (status, reason)  # type: ignore[index]
    assert world.sent() == []
    boss = signed_in(app, "boss")
    boss.post(f"/api/v1/sessions/{OTHERS}/extend", json={"extra_s": 60}, token=boss.csrf("/desktops"))
    assert [message.admin for message in world.sent() if isinstance(message, ExtendRequested)] == [True]
    assert next(e.detail for e in world.portal.audit.newest() if e.action == "extend").endswith("of bob")


def test_the_last_half_hour_is_told_with_what_becomes_of_ones_work(world: World, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    assert "Then it ends" not in alice.get("/desktops").text
    world.clock.now += lifetime(world) - 1200
    world.host("h1")
    page = alice.get("/desktops").text
    assert "20 min left" in page and "Then it ends" in page and "1 h longer" in page


def test_at_the_longest_nothing_is_offered_and_asking_is_refused_in_words(world: World, alice: Browser) -> None:
    session = world.session(MINE, "alice", State.RUNNING, lifetime_s=world.portal.settings.lifetime_max_s)
    assert session.lifetime_s == world.portal.settings.lifetime_max_s
    assert "1 h longer" not in alice.get("/desktops").text
    answer = alice.post(f"/api/v1/sessions/{MINE}/extend", json={"extra_s": 60}, token=alice.csrf("/desktops"))
    assert (answer.status_code, answer.json["reason"]) == (409, "longest")  # type: ignore[index]


def test_without_the_queue_it_is_said(world: World, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    token = alice.csrf("/desktops")
    world.broker.crash()
    answer = alice.post(f"/api/v1/sessions/{MINE}/extend", json={"extra_s": 60}, token=token)
    assert (answer.status_code, answer.json["reason"]) == (503, "queue_away")  # type: ignore[index]
