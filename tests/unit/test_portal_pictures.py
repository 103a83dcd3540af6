"""Pictures of screens on the pages: asked for while somebody looks, believed from their host, shown to the owner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from flask import Flask
from support.portals import PASSWORD, REPLICA, Browser, World, bearer, signed_in

from deskfleet.portal.app import create_app
from deskfleet.portal.pictures import FRESH_S, SHOWN_S
from deskfleet.runtime.bus import Outgoing
from deskfleet.schemas.messages import VmLook, VmPicture
from deskfleet.schemas.session import State
from deskfleet.schemas.topology import EVENTS, last_key, look_queue, picture_key, pictures_queue
from deskfleet.schemas.wire import decode, encode

MINE, OTHERS = "a" * 32, "b" * 32
PNG = b"\x89PNG\r\n\x1a\n" + bytes.fromhex("0000000d") + b"IHDR" + bytes.fromhex("0000000400000003")


class Site(World):
    def wishes(self) -> list[VmLook]:
        """What host h1 is asked for; taken from its queue."""
        found = []
        while self.broker.pending(look_queue("h1")):
            pending = self.broker.drop(look_queue("h1"))
            found.append(decode(pending.type, pending.body))
        return found  # type: ignore[return-value]

    def send(self, picture: VmPicture, sender: str = "agent-h1") -> None:
        bus = self.broker.connect(sender, lambda action: action())
        bus.start()
        kind, body = encode(picture)
        key = last_key(picture.host) if picture.last else picture_key(picture.host, REPLICA)
        bus.publish(Outgoing(EVENTS, key, kind, body, durable=False, mandatory=False))
        while self.broker.deliver_one(pictures_queue(REPLICA)):
            pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    for user in ("alice", "bob"):
        site.portal.accounts.add(user, PASSWORD)
    site.portal.accounts.add("boss", PASSWORD, admin=True)
    site.host("h1")
    yield site
    site.close()


@pytest.fixture
def app(site: Site) -> Flask:
    return create_app(site.portal)


@pytest.fixture
def alice(app: Flask) -> Browser:
    return signed_in(app, "alice")


def picture(browser: Browser, sid: str = MINE) -> tuple[int, bytes]:
    answer = browser.get(f"/desktops/{sid}/picture")
    return answer.status_code, answer.data


def test_a_picture_is_asked_for_and_is_there_when_the_page_asks_again(site: Site, alice: Browser) -> None:
    site.session(MINE, "alice")
    assert picture(alice) == (204, b"")
    assert site.wishes() == [VmLook(MINE, REPLICA)]
    assert picture(alice) == (204, b"") and not site.wishes(), "one wish is on its way"
    site.send(VmPicture("h1", MINE, PNG, last=False))
    answer = alice.get(f"/desktops/{MINE}/picture")
    assert (answer.data, answer.mimetype, answer.headers["Cache-Control"]) == (PNG, "image/png", "no-store")
    assert not site.wishes(), "it is new"
    site.clock.now += FRESH_S + 1
    site.host("h1")
    assert picture(alice) == (200, PNG) and len(site.wishes()) == 1
    site.clock.now += SHOWN_S
    site.host("h1")
    assert picture(alice) == (204, b""), "what is old is not shown as if it were now"


@pytest.mark.parametrize("state", [State.QUEUED, State.STARTING, State.STOPPING, State.ENDED])
def test_only_a_running_desktop_has_a_screen(site: Site, alice: Browser, state: State) -> None:
    site.session(MINE, "alice", state)
    assert picture(alice) == (204, b"") and not site.wishes()


def test_a_silent_host_is_not_asked(site: Site, alice: Browser) -> None:
    site.session(MINE, "alice")
    site.host("h1", seen_ago=300)
    assert picture(alice) == (204, b"") and not site.wishes()


def test_nobody_else_sees_a_screen_not_even_an_administrator(site: Site, app: Flask) -> None:
    site.session(MINE, "alice")
    for user in ("bob", "boss"):
        other = signed_in(app, user)
        for kind in ("picture", "last"):
            assert other.get(f"/desktops/{MINE}/{kind}").status_code == 404
    assert not site.wishes()
    assert app.test_client().get(f"/desktops/{MINE}/picture").status_code == 302
    answer = app.test_client().get(f"/desktops/{MINE}/picture", headers=bearer(site, "alice"))
    assert answer.status_code == 204, "the owner's own token will do"


def test_a_host_is_believed_about_its_own_desktops_alone(site: Site, alice: Browser) -> None:
    site.session(MINE, "alice")
    picture(alice)
    site.send(VmPicture("h2", MINE, PNG, last=False), "agent-h2")
    site.send(VmPicture("h1", MINE, PNG, last=False), "agent-h2")
    site.send(VmPicture("h1", OTHERS, PNG, last=False))
    site.send(VmPicture("h2", MINE, PNG, last=True), "agent-h2")
    site.send(VmPicture("h1", OTHERS, PNG, last=True))
    assert picture(alice) == (204, b"")
    assert site.portal.pictures.last(MINE) is None and site.portal.pictures.last(OTHERS) is None


def test_the_last_picture_of_one_that_failed_is_on_its_page(site: Site, alice: Browser) -> None:
    site.session(MINE, "alice", State.ENDED)
    assert "/last" not in alice.get(f"/progress/{MINE}").text
    assert alice.get(f"/desktops/{MINE}/last").status_code == 404
    site.send(VmPicture("h1", MINE, PNG, last=True))
    site.send(VmPicture("h1", MINE, PNG + b"again", last=True))
    assert f'src="/desktops/{MINE}/last"' in alice.get(f"/progress/{MINE}").text
    assert alice.get(f"/desktops/{MINE}/last").data == PNG, "the first counts"
    site.clock.now += 31 * 24 * 3600
    site.portal.prune()
    assert site.portal.pictures.last(MINE) is None
