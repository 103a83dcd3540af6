"""Links to a desktop: who may make one, whom it lets in, and how it ends everywhere at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask
from support.portals import KEY, PASSWORD, REPLICA, Browser, World, bearer, signed_in

from deskfleet.portal.accounts import Accounts
from deskfleet.portal.app import create_app
from deskfleet.portal.auth import Identity
from deskfleet.portal.grants import login_grant
from deskfleet.portal.scopes import Scope
from deskfleet.portal.store import Store
from deskfleet.runtime.bus import Outgoing
from deskfleet.runtime.memory_bus import MemoryBus
from deskfleet.schemas.messages import Console, ConsolesAsked, ConsolesListed, GrantRevoked, Message
from deskfleet.schemas.session import Event, State
from deskfleet.schemas.tickets import Ticket, Tickets
from deskfleet.schemas.topology import VIEWERS, for_proxy, proxy_queue, viewers_queue
from deskfleet.schemas.wire import decode, encode

MINE, OTHERS = "a" * 32, "b" * 32


class Site(World):
    """A portal with a proxy that only listens."""

    def __init__(self, folder: Path, **changes: object) -> None:
        super().__init__(folder, **changes)
        self.proxy: MemoryBus = self.broker.connect("proxy", lambda action: action(), for_proxy("r1"))
        self.proxy.start()
        for user in ("alice", "bob"):
            self.portal.accounts.add(user, PASSWORD)
        self.portal.accounts.add("boss", PASSWORD, admin=True)
        self.host("h1")
        self.session(MINE, "alice")

    def heard(self) -> list[Message]:
        """What the proxy was told since the last look."""
        found = []
        while self.broker.pending(proxy_queue("r1")):
            pending = self.broker.drop(proxy_queue("r1"))
            found.append(decode(pending.type, pending.body))
        return found

    def cut(self) -> list[str]:
        """The grants that ended."""
        return [message.grant for message in self.heard() if isinstance(message, GrantRevoked)]

    def ticket(self, answer: dict[str, object]) -> Ticket:
        return Tickets(["t" * 40]).verify(str(answer["ticket"]))


class Directory:
    """Somebody else's accounts, of which those in `gone` are no more."""

    def __init__(self, name: str, gone: set[str]) -> None:
        self.name = name
        self._gone = gone

    def current(self, identity: Identity) -> Identity | None:
        return None if identity.user in self._gone else identity


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path, sharing="anybody")
    yield site
    site.close()


@pytest.fixture
def app(site: Site) -> Flask:
    return create_app(site.portal)


@pytest.fixture
def alice(app: Flask) -> Browser:
    return signed_in(app, "alice")


def make(browser: Browser, audience: str = "signed_in", passphrase: str = "", lifetime_s: int = 3600) -> str:
    """A link, as its owner gets it on the page: the path behind the portal's address."""
    path = f"/desktops/{MINE}/share"
    data = {"audience": audience, "passphrase": passphrase, "lifetime_s": str(lifetime_s), "mode": "full"}
    answer = browser.post(path, data, token=browser.csrf(path))
    assert answer.status_code == 200, answer.text
    found = re.search(r'value="http://127.0.0.1:8080(/shared[^"]+)"', answer.text)
    assert found
    return found[1]


def enter(browser: Browser, link: str, passphrase: str = "") -> str:
    """Open a link as a guest does; the address of the desktop."""
    page = browser.get(link)
    assert page.status_code == 200, page.text
    data = {"link": link.partition("=")[2], "passphrase": passphrase}
    answer = browser.post("/shared", data, token=browser.csrf(link))
    assert answer.status_code == 303, answer.text
    return str(answer.headers["Location"])


def ticket(browser: Browser, desktop: str) -> tuple[int, dict[str, object]]:
    headers = {"Accept": "application/json"}
    found = re.search(r'name="csrf-token" content="([^"]+)"', browser.get(desktop).text)
    assert found
    answer = browser.post(f"{desktop}/ticket", json={}, token=found[1], headers=headers)
    return answer.status_code, answer.json or {}


def test_a_link_lets_a_guest_in_and_is_shown_once(site: Site, app: Flask, alice: Browser) -> None:
    link = make(alice)
    assert link not in alice.get(f"/desktops/{MINE}/share").text
    bob = signed_in(app, "bob")
    desktop = enter(bob, link)
    page = bob.get(desktop)
    assert page.status_code == 200 and "of alice" in page.text
    assert "1 h longer" not in page.text or "hidden" in page.text
    status, answer = ticket(bob, desktop)
    right = site.ticket(answer)
    assert (status, right.sid, right.user) == (200, MINE, "bob")
    assert right.grant == f"share-{desktop.rpartition('/')[2]}"
    assert bob.get(f"/desktop/{MINE}").status_code == 404, "the link opens the screen and nothing else"
    assert bob.get(f"/desktops/{MINE}/share").status_code == 404


def test_c20_a_link_that_was_taken_back_opens_nothing_and_is_cut(site: Site, app: Flask, alice: Browser) -> None:
    link = make(alice)
    bob = signed_in(app, "bob")
    desktop = enter(bob, link)
    name = desktop.rpartition("/")[2]
    site.heard()
    assert alice.post(f"/desktops/{MINE}/share/{name}/revoke", token=alice.csrf("/desktops")).status_code == 303
    assert site.cut() == [f"share-{name}"]
    assert bob.get(desktop).status_code == 404
    token = bob.csrf("/desktops")
    answer = bob.post(f"{desktop}/ticket", json={}, token=token, headers={"Accept": "application/json"})
    assert (answer.status_code, answer.json["reason"]) == (404, "bad_link")  # type: ignore[index]
    assert bob.get(link).status_code == 404
    assert name not in alice.get(f"/desktops/{MINE}/share").text


def test_c20_a_revocation_is_told_again_and_survives_a_broker_that_is_away(site: Site, alice: Browser) -> None:
    make(alice)
    (share,) = site.portal.shares.of(MINE)
    site.heard()
    site.bus.stop()
    assert site.portal.shares.revoke(MINE, share.name)
    site.clock.now += 600
    site.bus.start()
    for _ in range(3):
        site.portal.sweep()
        site.clock.now += 5
    told = site.cut()
    assert len(told) >= 2 and set(told) == {share.grant}
    site.clock.now += 120
    site.portal.sweep()
    assert site.cut() == [], "told long enough"


ENDINGS: dict[str, Callable[[Site], object]] = {
    "nobody used it": lambda site: setattr(site.clock, "now", site.clock.now + 7201),
    "its time is over": lambda site: setattr(site.clock, "now", site.clock.now + 12 * 3600 + 1),
    "account disabled elsewhere": lambda site: Accounts(Store(site.database), site.clock).set_disabled("alice", True),
    "another password": lambda site: site.portal.accounts.set_password("alice", "another horse battery"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_c20_however_a_login_ends_its_consoles_are_cut(site: Site, app: Flask, ending: str) -> None:
    alice = signed_in(app, "alice")
    right = site.ticket(alice.post(f"/api/v1/sessions/{MINE}/ticket", json={}).json or {})
    site.portal.sweep()
    assert site.cut() == []
    ENDINGS[ending](site)
    site.portal.sweep()
    assert site.cut() == [right.grant]


def test_c20_a_token_that_ends_cuts_what_is_open_by_it(site: Site, app: Flask, alice: Browser) -> None:
    for ended in ("removed", "expired"):
        headers = bearer(site, "alice")
        answer = app.test_client().post(f"/api/v1/sessions/{MINE}/ticket", headers=headers)
        right = site.ticket(answer.json or {})
        if ended == "removed":
            (token,) = site.portal.logins.tokens_of("alice")
            assert alice.post(f"/tokens/{token.name}/remove", token=alice.csrf("/tokens/")).status_code == 303
        else:
            site.clock.now += 3601
        site.portal.sweep()
        assert site.cut() == [right.grant], ended


def test_c20_a_directory_that_drops_somebody_cuts_them_and_keeps_their_token(site: Site, app: Flask) -> None:
    """As LDAP does: the account is another server's, and is asked about now and then."""
    gone: set[str] = set()
    directory = Directory("ldap", gone)
    site.portal.chain._all["ldap"] = directory
    kept = [site.portal.logins.open(Identity(user, "ldap"), 7200) for user in ("alice", "bob")]
    secret, _ = site.portal.logins.make_token(Identity("alice", "ldap"), "x", 7200, [Scope.DESKTOPS])
    site.portal.recheck()
    assert site.cut() == []
    gone.add("alice")
    site.portal.recheck()
    site.portal.sweep()
    assert sorted(site.cut()) == sorted([login_grant(kept[0]), login_grant(secret)])
    assert site.portal.logins.find(kept[0]) is None and site.portal.logins.find(kept[1]) is not None
    site.clock.now += 200
    site.portal.recheck()
    site.portal.sweep()
    assert site.cut() == [], "once is enough"
    headers = {"Authorization": f"Bearer {secret}"}
    assert app.test_client().get("/api/v1/sessions", headers=headers).status_code == 401
    gone.clear()
    site.portal.recheck()
    assert app.test_client().get("/api/v1/sessions", headers=headers).status_code == 200
    gone.add("alice")
    site.portal.recheck()
    site.portal.sweep()
    assert site.cut() == [login_grant(secret)], "and again, when it happens again"


def test_a_link_ends_by_itself_and_cuts(site: Site, app: Flask, alice: Browser) -> None:
    link = make(alice)
    bob = signed_in(app, "bob")
    desktop = enter(bob, link)
    site.heard()
    site.clock.now += 3601
    site.host("h1")
    assert bob.get(desktop).status_code == 404
    site.portal.sweep()
    assert site.cut() == [f"share-{desktop.rpartition('/')[2]}"]


def test_who_is_not_signed_in_gets_in_only_where_link_and_site_allow_it(site: Site, app: Flask, alice: Browser) -> None:
    stranger = Browser(app)
    answer = stranger.get(make(alice))
    assert answer.status_code == 302 and answer.headers["Location"].startswith("/login?next=/shared")
    desktop = enter(stranger, make(alice, "anybody"))
    status, right = ticket(stranger, desktop)
    assert (status, site.ticket(right).user) == (200, "guest")
    assert stranger.get("/desktops").status_code == 302


def test_a_site_that_allows_less_makes_and_opens_less(site: Site, app: Flask, alice: Browser) -> None:
    link = make(alice, "anybody")
    stranger = Browser(app)
    desktop = enter(stranger, link)
    for sharing, reason in (("signed_in", "sharing_off"), ("off", "sharing_off")):
        strict = create_app(site.build(sharing=sharing))
        owner, path = signed_in(strict, "alice"), f"/api/v1/sessions/{MINE}/shares"
        answer = owner.post(path, json={"audience": "anybody"}, token=owner.csrf("/desktops"))
        assert (answer.status_code, answer.json["reason"]) == (403, reason)  # type: ignore[index]
        assert Browser(strict).get(link).status_code == 404
        other = Browser(strict)
        with other.client.session_transaction() as cookie:
            cookie["opened"] = [desktop.rpartition("/")[2]]
        assert other.get(desktop).status_code == 404


def test_a_passphrase_is_asked_for_and_guessing_is_slowed_down(site: Site, app: Flask, alice: Browser) -> None:
    link = make(alice, "anybody", "open sesame")
    guest = Browser(app)
    token, secret = guest.csrf(link), link.partition("=")[2]
    for wrong in ("", "Open sesame", "x" * 500):
        answer = guest.post("/shared", {"link": secret, "passphrase": wrong}, token=token)
        assert answer.status_code == 401 and 'data-reason="wrong_passphrase"' in answer.text
    answer = guest.post("/shared", {"link": secret, "passphrase": "open sesame"}, token=token)
    assert answer.status_code == 429
    site.clock.now += 61
    assert enter(guest, link, "open sesame").startswith("/shared/")


def test_a_program_that_only_looks_at_a_link_opens_nothing(site: Site, app: Flask, alice: Browser) -> None:
    link = make(alice, "anybody")
    scanner = Browser(app)
    assert scanner.get(link).status_code == 200
    (share,) = site.portal.shares.of(MINE)
    assert scanner.get(f"/shared/{share.name}").status_code == 404


@pytest.mark.parametrize("link", ["", "x", "../../etc", "a" * 5000, "%00", "é"])
def test_what_is_no_link_opens_nothing(site: Site, app: Flask, link: str) -> None:
    assert Browser(app).get("/shared", query_string={"link": link}).status_code == 404
    assert Browser(app).get(f"/shared/{link or 'x'}").status_code == 404


def test_only_the_owner_shares_and_an_administrator_may_take_back(site: Site, app: Flask, alice: Browser) -> None:
    path = f"/api/v1/sessions/{MINE}/shares"
    for user in ("bob", "boss"):
        other = signed_in(app, user)
        assert other.post(path, json={}, token=other.csrf("/desktops")).status_code == 404
        assert other.get(f"/desktops/{MINE}/share").status_code == 404
    made = alice.post(path, json={}, token=alice.csrf("/desktops")).json
    assert made and made["link"].startswith("http://127.0.0.1:8080/shared?link=")
    bob = signed_in(app, "bob")
    assert (
        bob.client.delete(f"{path}/{made['name']}", headers={"X-CSRFToken": bob.csrf("/desktops")}).status_code == 404
    )
    assert app.test_client().delete(f"{path}/{made['name']}", headers=bearer(site, "boss")).status_code == 204
    assert site.portal.shares.of(MINE) == []


def test_watching_only_is_refused_rather_than_pretended(site: Site, alice: Browser) -> None:
    answer = alice.post(f"/api/v1/sessions/{MINE}/shares", json={"mode": "watch"}, token=alice.csrf("/desktops"))
    assert (answer.status_code, answer.json["reason"]) == (422, "watch_only")  # type: ignore[index]
    page = alice.post(f"/desktops/{MINE}/share", {"mode": "watch", "audience": "signed_in", "lifetime_s": "3600"})
    assert page.status_code == 422 and 'data-reason="watch_only"' in page.text
    assert site.portal.shares.of(MINE) == []


def test_a_desktop_that_ended_or_was_started_by_another_is_not_opened(site: Site, app: Flask, alice: Browser) -> None:
    link = make(alice, "anybody")
    guest = Browser(app)
    desktop = enter(guest, link)
    site.session(OTHERS, "alice", State.ENDED)
    answer = alice.post(f"/api/v1/sessions/{OTHERS}/shares", json={}, token=alice.csrf("/desktops"))
    assert (answer.status_code, answer.json["reason"]) == (409, "ended")  # type: ignore[index]
    session = site.reader.session(MINE)
    assert session
    site.step(session, Event.GONE)
    assert guest.get(desktop).status_code == 409


def test_c12_a_logout_cuts_the_consoles_of_that_login(site: Site, app: Flask, alice: Browser) -> None:
    answer = alice.post(f"/api/v1/sessions/{MINE}/ticket", json={}, token=alice.csrf("/desktops"))
    grant = site.ticket(answer.json or {}).grant
    other = signed_in(app, "alice").post(f"/api/v1/sessions/{MINE}/ticket", json={}).json
    site.heard()
    alice.post("/logout", token=alice.csrf("/desktops"))
    assert site.cut() == [grant]
    assert site.ticket(other or {}).grant != grant


def test_a_token_is_a_right_of_its_own(site: Site, app: Flask) -> None:
    headers = bearer(site, "alice")
    answer = app.test_client().post(f"/api/v1/sessions/{MINE}/ticket", headers=headers)
    assert site.ticket(answer.json or {}).grant == login_grant(headers["Authorization"].removeprefix("Bearer "))


def test_the_owner_sees_who_is_there(site: Site, alice: Browser) -> None:
    make(alice)
    (share,) = site.portal.shares.of(MINE)
    site.clock.now += 3
    site.heard()
    assert "Nobody" in alice.get(f"/desktops/{MINE}/share/part").text
    assert ConsolesAsked(MINE, REPLICA) in site.heard()
    listed = ConsolesListed(
        "r1", MINE, (Console("bob", share.grant, 61.0), Console("<b>eve</b>", "login-" + "0" * 16, 5))
    )
    kind, body = encode(listed)
    for bus, name in ((site.proxy, "proxy"), (site.broker.connect("agent-h1", lambda action: action()), "agent-h1")):
        if name != "proxy":
            bus.start()
        bus.publish(Outgoing(VIEWERS, REPLICA, kind, body, durable=False, mandatory=False))
        while site.broker.deliver_one(viewers_queue(REPLICA)):
            pass
    page = alice.get(f"/desktops/{MINE}/share/part").text
    assert page.count("<li>") == 2 and "bob, by a link" in page and "&lt;b&gt;eve" in page
    site.clock.now += 11
    assert "Nobody" in alice.get(f"/desktops/{MINE}/share/part").text, "what is old is not shown as if it were now"


def test_secrets_and_passphrases_are_not_kept(site: Site, alice: Browser, tmp_path: Path) -> None:
    link = make(alice, "anybody", "open sesame")
    site.portal.store.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("portal.db*"))
    assert link.partition("=")[2].encode() not in kept and b"open sesame" not in kept and KEY.encode() not in kept
