"""The launch form: sizes by name, the last choice, GPUs that are free, pictures of machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flask import Flask
from support.portals import MACHINE, PASSWORD, Browser, World, signed_in

from deskfleet.portal import forms
from deskfleet.portal.app import create_app
from deskfleet.schemas.host import Gpu
from deskfleet.schemas.machine import GpuPolicy, Machine, Range, parse_machine
from deskfleet.schemas.messages import LaunchRequested
from deskfleet.schemas.session import Event, Resources, State, place

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)


def machine(**changes: object) -> Machine:
    text = MACHINE.format(title="M", gpu="never", users='["*"]', digest="ab" * 32)
    return replace(parse_machine("desktop", text), **changes)  # type: ignore[arg-type]


def launched(name: str = "desktop", **changes: object) -> LaunchRequested:
    size = Resources(4, 2048, 8)
    values: dict[str, object] = {"resources": size, "persistent": True, "lifetime_s": 7200, "wait_s": 60}
    return LaunchRequested("a" * 32, "ann", (), name, **values | changes)  # type: ignore[arg-type]


def test_sizes_have_names_and_the_same_one_has_one_name() -> None:
    names = [(preset.name, preset.resources.cpus) for preset in forms.presets(machine())]
    assert names == [("Small", 1), ("Standard", 2), ("Large", 8)]
    fixed = Range(2, 2, 2)
    assert forms.presets(machine(cpus=fixed, memory_mib=Range(64, 64, 64), disk_gib=Range(1, 1, 1))) == []
    two = forms.presets(machine(cpus=Range(1, 1, 4), memory_mib=Range(64, 64, 64), disk_gib=Range(1, 1, 1)))
    assert [preset.name for preset in two] == ["Small", "Large"]
    needs = forms.presets(machine(gpu=GpuPolicy.REQUIRED))
    assert {preset.resources.gpus for preset in needs} == {1}


def test_the_last_launch_of_the_machine_counts_while_it_is_allowed() -> None:
    newest = [launched("other"), launched(), launched(lifetime_s=60)]
    assert forms.last(machine(), newest, 10_000) == newest[1]
    assert forms.last(machine(cpus=Range(1, 1, 2)), newest, 10_000) is None, "it is smaller now"
    assert forms.last(machine(), newest, 3600) is None, "nothing lasts so long any more"
    assert forms.last(machine(), [], 3600) is None


def test_a_form_is_filled_in_as_it_was_sent() -> None:
    assert forms.filled(launched(), may_persist=True) == {
        "cpus": "4",
        "memory_mib": "2048",
        "disk_gib": "8",
        "gpu": "",
        "persistent": "yes",
        "lifetime_s": "7200",
    }
    assert forms.filled(launched(), may_persist=False)["persistent"] == "no"
    for model, field in (("", "any"), ("A100", "A100")):
        assert forms.filled(launched(resources=Resources(1, 1, 1, 1, model)), may_persist=True)["gpu"] == field


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    for user in ("alice", "bob"):
        world.portal.accounts.add(user, PASSWORD)
    world.host("h1")
    yield world
    world.close()


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.portal)


def seal(browser: Browser, path: str) -> str:
    return browser.get(path).text.split('name="seal" value="')[1].split('"')[0]


def test_a_click_on_the_card_starts_what_was_chosen_last_time(world: World, app: Flask) -> None:
    alice = signed_in(app, "alice")
    chosen = {"cpus": "3", "memory_mib": "3000", "disk_gib": "5", "lifetime_s": "5400", "persistent": "yes"}
    alice.post("/launch/desktop", {"seal": seal(alice, "/launch/desktop"), **chosen})
    page = alice.get("/launch/desktop").text
    for value in ("3", "3000", "5", "5400"):
        assert f'<option value="{value}" selected>' in page
    cards = alice.get("/launch").text
    assert "As last time:" in cards and "3 CPUs" in cards
    fields = dict(
        part.split('" value="') for part in cards.split('<input type="hidden" name="')[1:] if "cpus" in part[:6]
    )
    assert fields["cpus"].startswith('3"')
    assert "As last time:" not in signed_in(app, "bob").get("/launch").text


def test_free_gpus_are_counted_by_model_and_drained_hosts_are_not(world: World, app: Flask) -> None:
    world.machine("gpu", gpu="optional")
    gpus = tuple(Gpu(f"0000:0{n}:00.0", "A100", n, (f"0000:0{n}:00.0",), n < 4) for n in range(1, 5))
    world.host("h1", gpus=gpus)
    world.host("h2", gpus=(Gpu("0000:01:00.0", "T4", 1, ("0000:01:00.0",), True),))
    session = world.session("a" * 32, "bob", State.QUEUED)
    with world.writer.begin() as tx:
        placed = place(session, "h1", tx.claim("h1", tx.hosts()[0].generation))
        tx.save(session, replace(placed, gpu_addresses=("0000:02:00.0",)), Event.PLACE)
    assert world.portal.fleet.free_gpus() == {"A100": (2, 3), "T4": (1, 1)}
    assert "3 of 4 free now" in signed_in(app, "alice").get("/launch/gpu").text
    with world.writer.begin() as tx:
        tx.drain("h2", True)
    assert "T4" in world.portal.fleet.free_gpus(), "asked a moment ago"
    world.clock.now += 6
    world.host("h1", gpus=gpus)
    world.host("h2", gpus=(Gpu("0000:01:00.0", "T4", 1, ("0000:01:00.0",), True),))
    assert world.portal.fleet.free_gpus() == {"A100": (2, 3)}


def test_a_picture_beside_the_entry_is_on_the_card(world: World, app: Flask) -> None:
    world.machine("secret", users='["bob"]')
    for name in ("desktop", "secret", "nomachine"):
        (world.catalogue / f"{name}.png").write_bytes(PNG)
    alice = signed_in(app, "alice")
    assert 'src="/launch/desktop/picture"' in alice.get("/launch").text
    answer = alice.get("/launch/desktop/picture")
    assert (answer.data, answer.mimetype) == (PNG, "image/png")
    for name in ("secret", "nomachine", "..", "desktop.png"):
        assert alice.get(f"/launch/{name}/picture").status_code == 404
    for wrong in (b"<svg onload=alert(1)>", PNG + bytes(600 * 1024)):
        (world.catalogue / "desktop.png").write_bytes(wrong)
        assert alice.get("/launch/desktop/picture").status_code == 404
