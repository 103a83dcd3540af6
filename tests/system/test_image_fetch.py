"""An image that no host has: a launch makes the host fetch it, a kill -9 of the agent meanwhile costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from demo.client import Client
from demo.fleet import Fleet
from support.fleets import running_fleet
from support.guests import short_folder
from support.image_source import ImageSource, image_source
from support.rfb import LIMIT, Rfb, WebSocketStream
from support.screen import identity, read_identity


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.1)


def test_a_launch_of_an_image_on_no_host_leads_to_a_fetch_and_a_desktop() -> None:
    with short_folder() as own, image_source() as source:
        agent = {"images": str(own), "image_source": source.url, "image_room_mib": 16, "image_rate_mib_s": 0.4}
        with running_fleet(1, overrides={"agent": agent}) as fleet:
            for path in (fleet.state / "images").glob("tiny.*"):
                source.content[path.name] = path.read_bytes()
            _try(fleet, source)


def _try(fleet: Fleet, source: ImageSource) -> None:
    client, admin = Client(fleet.url, fleet.token("demo")), Client(fleet.url, fleet.token("admin"))
    (size,) = {len(content) for content in source.content.values()}
    source.hang = size // 2
    assert admin.call("GET", "/hosts")[0]["report"]["images"] == []
    sid = client.launch("tiny", persistent=True)

    def why() -> list[tuple[str, str]]:
        return [(v["reason"], v["sentence"]) for v in client.session(sid)["verdicts"]]

    wait(lambda: ("image_fetching", "h1: fetching the image, 50 %") in why(), "the reason")
    assert client.session(sid)["state"] == "queued"

    def held() -> list[tuple[list[str], str, int]]:
        return [(i["machines"], i["state"], i["percent"]) for i in admin.call("GET", "/hosts/h1")["images"]]

    # The scheduler decides by a report as it comes, and stores it with others within a second or so.
    wait(lambda: held() == [(["tiny"], "fetching", 50)], "the host's page")
    fleet.services["agent-h1"].kill()
    source.hang = None
    fleet.services["agent-h1"].start()
    session = client.until_running(sid)
    assert session["host"] == "h1"
    assert source.ranges_asked() == ["", f"bytes={size // 2}-"]
    viewer = Rfb(WebSocketStream(client.console(sid), fleet.url))
    wait(lambda: read_identity(viewer.picture()) == identity(sid), "the picture of this very guest")
    wait(lambda: admin.call("GET", "/hosts/h1")["images"][0]["state"] == "held", "the admin's view")
    client.stop(sid)
    client.until_ended(sid)
