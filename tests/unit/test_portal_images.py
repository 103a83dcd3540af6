"""What an administrator sees of the images on a host: held, on the way, and what failed and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.portals import PASSWORD, World, report, signed_in

from deskfleet.portal import words
from deskfleet.portal.app import create_app
from deskfleet.portal.fleet import ImageView, images_on
from deskfleet.schemas.host import Fetch, FetchFault, FetchState

DESKTOP, OTHER, COMING, FAILED = ("ab" * 32, "1" * 64, "2" * 64, "3" * 64)
FETCHES = (
    Fetch(COMING, FetchState.FETCHING, 40, 20_000),
    Fetch(FAILED, FetchState.FAILED, 0, 0, FetchFault.WRONG_DIGEST, "<b>another</b> SHA-256"),
)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.portal.accounts.add("boss", PASSWORD, admin=True)
    yield world
    world.close()


def test_images_go_by_the_names_of_their_machines(world: World) -> None:
    world.machine("lab")  # the same image as "desktop"
    shown = images_on(report("h1", images=(OTHER, DESKTOP), fetches=FETCHES), world.portal.catalogue.machines())
    assert shown == [
        ImageView(COMING, (), "fetching", 40, 20_000),
        ImageView(FAILED, (), "failed", 0, 0, "wrong_digest", "<b>another</b> SHA-256"),
        ImageView(DESKTOP, ("desktop", "lab"), "held"),
        ImageView(OTHER, (), "held"),
    ]
    assert images_on(None, {}) == []


def test_the_pages_and_the_api_show_them(world: World) -> None:
    world.host("h1", images=(DESKTOP,), fetches=FETCHES)
    world.host("h2")
    boss = signed_in(create_app(world.portal), "boss")
    page = boss.get("/admin/hosts/h1").text
    for text in (
        f'data-image="{DESKTOP}" data-image-state="held"',
        f'data-image="{COMING}" data-image-state="fetching"',
        "fetching, 40 % of 19.5 GiB",
        "could not be fetched: &lt;b&gt;another&lt;/b&gt; SHA-256",
        "not in the catalogue",
        "It fetches what is needed by itself.",
    ):
        assert text in page, text
    assert "fetching, 40 % of 19.5 GiB" in boss.get("/admin/").text
    other = boss.get("/admin/hosts/h2").text
    assert "It holds none." in other and "It fetches none by itself" in other
    told = json.loads(boss.get("/api/v1/hosts/h1").text)
    assert (told["name"], told["report"]["images"]) == ("h1", [DESKTOP])
    assert told["images"][0] == {
        "sha256": COMING, "machines": [], "state": "fetching", "percent": 40, "mib": 20_000, "fault": "", "detail": "",
    }  # fmt: skip
    assert told["images"][1]["fault"] == "wrong_digest"
    assert boss.get("/api/v1/hosts/ghost").status_code == 404


def test_the_words() -> None:
    assert words.image_state("held", 100, 0, "") == "held"
    assert words.image_state("fetching", 0, 0, "") == "fetching, 0 %"
    assert words.image_state("waiting", 0, 0, "") == "waits for its turn"
