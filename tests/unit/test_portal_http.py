"""The portal from outside: who may do what, what a browser is told, and what never gets out."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from support.portals import PASSWORD, Browser, World, bearer, signed_in

from deskfleet.ledger.reader import Wait
from deskfleet.portal.app import create_app
from deskfleet.portal.audit import Entry
from deskfleet.portal.auth import Identity
from deskfleet.portal.scopes import Scope
from deskfleet.portal.web import access
from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import Gpu
from deskfleet.schemas.messages import StopRequested
from deskfleet.schemas.session import State
from deskfleet.schemas.verdict import Verdict

MINE, OTHERS, NOBODYS = "a" * 32, "b" * 32, "c" * 32

#: What each route needs. A new route must be entered here, and so be thought about.
ACCESS = {
    "static": "public",
    "openapi": "public",
    "pages.login": "public",
    "sign_in.mail": "public",
    "sign_in.code": "public",
    "sign_in.oidc": "public",
    "sign_in.oidc_return": "public",
    "pages.home": "person",
    "pages.logout": "person",
    "pages.language": "public",
    "brand.logo": "public",
    "brand.accent": "public",
    "brand.terms": "public",
    "pages.launch": "person",
    "pages.machine": "person",
    "pages.outlook": "person",
    "pages.machine_picture": "person",
    "pages.progress_page": "person",
    "pages.progress_part": "person",
    "pages.desktops": "person",
    "pages.desktops_part": "person",
    "pages.stop": "person",
    "pages.picture": "person",
    "pages.last": "person",
    "pages.extend": "person",
    "pages.desktop": "person",
    "sharing.share": "person",
    "sharing.share_part": "person",
    "sharing.make": "person",
    "sharing.revoke": "person",
    "sharing.link": "public",
    "sharing.open_link": "public",
    "sharing.desktop": "public",
    "sharing.ticket": "public",
    "sharing.state": "public",
    "api.shares": "person",
    "api.make_share": "person",
    "api.drop_share": "person",
    "api.consoles": "person",
    "admin.page": "admin",
    "admin.part": "admin",
    "lists.sessions": "admin",
    "lists.sessions_part": "admin",
    "lists.stop_all": "admin",
    "lists.people_page": "admin",
    "lists.people_part": "admin",
    "lists.machines": "admin",
    "lists.machines_part": "admin",
    "lists.health": "admin",
    "lists.health_part": "admin",
    "lists.audit": "admin",
    "lists.export": "admin",
    "queues.page": "admin",
    "queues.part": "admin",
    "queues.letter": "admin",
    "queues.replay": "admin",
    "queues.discard": "admin",
    "queues.discard_all": "admin",
    "admin.host_page": "admin",
    "admin.drain": "admin",
    "admin.declare_dead": "admin",
    "admin.order_template": "admin",
    "admin.undrain": "admin",
    "admin.stop": "admin",
    "api.machines": "person",
    "api.placement": "person",
    "api.launch": "person",
    "api.sessions": "person",
    "api.session": "person",
    "api.stop": "person",
    "api.extend": "person",
    "api.ticket": "person",
    "api.tokens": "person",
    "api.make_token": "person",
    "api.drop_token": "person",
    "api.hosts": "admin",
    "api.one_host": "admin",
    "api.drain": "admin",
    "api.declare_dead": "admin",
    "api.order_template": "admin",
    "api.undrain": "admin",
    "api_admin.everybody": "admin",
    "api_admin.stop_all": "admin",
    "api_admin.people_now": "admin",
    "api_admin.queues": "admin",
    "api_admin.images": "admin",
    "api_admin.history": "admin",
    "tokens.page": "person",
    "tokens.make": "person",
    "tokens.remove": "person",
    "api_admin.letters": "admin",
    "api_admin.letter": "admin",
    "api_admin.replay": "admin",
    "api_admin.discard": "admin",
    "api_admin.discard_all": "admin",
    "api_admin.health": "admin",
    "api_admin.audit": "admin",
}


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


def audit(world: World, action: str) -> list[Entry]:
    return [entry for entry in world.portal.audit.newest() if entry.action == action]


# Who may do what.


def test_every_route_has_a_rule_that_somebody_thought_about(app: Flask) -> None:
    with app.test_request_context("/"):
        assert {rule.endpoint: access(rule.endpoint) for rule in app.url_map.iter_rules()} == ACCESS


def every_call(app: Flask) -> list[tuple[str, str, str]]:
    """(endpoint, method, path) of all routes, with another person's desktop as the thing meant."""
    values = {"sid": OTHERS, "host": "h1", "name": "desktop", "filename": "site.css", "version": "x", "form": "csv"}
    values["key"] = "0" * 16
    calls = []
    with app.test_request_context("/"):
        for rule in app.url_map.iter_rules():
            path = app.url_map.bind("127.0.0.1").build(rule.endpoint, {a: values[a] for a in rule.arguments})
            calls += [(rule.endpoint, method, path) for method in sorted((rule.methods or set()) - {"OPTIONS", "HEAD"})]
    return calls


def test_without_a_login_nothing_is_answered_or_changed(world: World, app: Flask) -> None:
    world.session(OTHERS, "bob", State.RUNNING)
    browser = Browser(app)
    token = browser.csrf()
    for endpoint, method, path in every_call(app):
        if ACCESS[endpoint] == "public":
            continue
        answer = browser.client.open(path, method=method, data={"csrf_token": token})
        if path.startswith("/api/"):
            assert (answer.status_code, answer.json["reason"]) == (401, "not_logged_in"), path  # type: ignore[index]
        else:
            assert answer.status_code in (302, 303) and answer.headers["Location"].startswith("/login"), path
    assert world.sent() == [] and world.broker.pending("scheduler.commands") == ()


def test_a_person_reaches_no_page_of_the_administrator(world: World, app: Flask, alice: Browser) -> None:
    token = alice.csrf("/desktops")
    for endpoint, method, path in every_call(app):
        if ACCESS[endpoint] == "admin":
            headers = {"X-CSRFToken": token}
            answer = alice.client.open(path, method=method, headers=headers)
            assert answer.status_code == 403, path
    assert world.broker.pending("scheduler.commands") == ()
    assert len(audit(world, "refused")) == sum(1 for endpoint, *_ in every_call(app) if ACCESS[endpoint] == "admin")


#: What shows or gives away somebody's screen is its owner's alone; the rest of a desktop is an administrator's too.
OWNERS_ALONE = {
    "pages.picture",
    "pages.last",
    "sharing.share",
    "sharing.share_part",
    "sharing.make",
    "api.make_share",
}
#: What is not there although one may ask for it: no last picture was kept, and no link of that name exists.
NOTHING_THERE = {"pages.last", "sharing.revoke", "api.drop_share"}


@pytest.mark.parametrize("state", [State.QUEUED, State.STARTING, State.RUNNING, State.STOPPING, State.ENDED])
def test_every_route_to_a_desktop_knows_its_owner_in_every_state(world: World, app: Flask, state: State) -> None:
    """Generated from the route table: nobody, another person, the owner and an administrator, on every method."""
    world.session(OTHERS, "bob", state)
    people = {name: signed_in(app, name) for name in ("alice", "bob", "boss")}
    tokens = {name: browser.csrf("/desktops") for name, browser in people.items()}
    with app.test_request_context("/"):
        of_a_desktop = {rule.endpoint for rule in app.url_map.iter_rules() if "sid" in rule.arguments}
    assert of_a_desktop >= OWNERS_ALONE
    for endpoint, method, path in every_call(app):
        if endpoint not in of_a_desktop or ACCESS[endpoint] != "person":
            continue
        for name, browser in people.items():
            answer = browser.client.open(
                path,
                method=method,
                headers={"X-CSRFToken": tokens[name]},
                json={"extra_s": 60} if endpoint == "api.extend" else {},
            )
            may = name == "bob" or (name == "boss" and endpoint not in OWNERS_ALONE)
            said = f"{name} {method} {path} in {state}: {answer.status_code}"
            if not may or endpoint in NOTHING_THERE:
                assert answer.status_code == 404, said
            else:
                assert answer.status_code in (200, 201, 202, 204, 302, 303, 409, 422), said
    assert {(request.actor, request.sid) for request in world.sent() if isinstance(request, StopRequested)} <= {
        ("bob", OTHERS),
        ("boss", OTHERS),
    }


@pytest.mark.parametrize("name", [".", ".....", ".*", "alice|boss", "BOSS", "bos", "boss@elsewhere", "root"])
def test_an_administrator_is_one_by_exact_name_only(world: World, app: Flask, name: str) -> None:
    world.portal.accounts.add(name, PASSWORD)
    browser = signed_in(app, name)
    for path in ("/admin/", "/admin/part", "/api/v1/hosts", "/api/v1/queues", "/api/v1/audit"):
        assert browser.get(path).status_code == 403


@pytest.mark.parametrize("name", ["boss ", " boss", "boss\0", "boss\t"])
def test_a_name_with_trimmings_is_not_that_name(app: Flask, name: str) -> None:
    assert Browser(app).log_in(name).status_code == 401


def test_another_persons_desktop_is_as_one_that_does_not_exist(world: World, app: Flask, alice: Browser) -> None:
    world.session(OTHERS, "bob", State.RUNNING)
    before = world.reader.session(OTHERS)
    token = alice.csrf("/desktops")
    paths = ["/progress/{}", "/progress/{}/part", "/desktop/{}", "/api/v1/sessions/{}"]
    posts = ["/desktops/{}/stop", "/desktops/{}/extend"]
    posts += [f"/api/v1/sessions/{{}}/{what}" for what in ("stop", "ticket")]
    for method, path in [("GET", p) for p in paths] + [("POST", p) for p in posts]:
        answers = []
        for sid in (OTHERS, NOBODYS):
            answer = alice.client.open(path.format(sid), method=method, headers={"X-CSRFToken": token})
            answers.append((answer.status_code, answer.text.replace(sid, "SID")))
        assert answers[0] == answers[1] and answers[0][0] == 404, path
    assert world.reader.session(OTHERS) == before and world.sent() == []
    assert len(audit(world, "refused")) == len(paths) + len(posts)


@pytest.mark.parametrize(
    "sid",
    ["..%2f" + OTHERS, OTHERS + ".json", OTHERS.upper(), "%2fetc%2fpasswd", OTHERS + "%00", "x" * 5000, "..", "*"],
)
def test_nothing_else_is_a_name_of_a_desktop(world: World, app: Flask, alice: Browser, sid: str) -> None:
    world.session(OTHERS, "bob", State.RUNNING)
    for path in (f"/desktops/{sid}/stop", f"/api/v1/sessions/{sid}/stop", f"/api/v1/sessions/{sid}/ticket"):
        assert alice.post(path, json={}).status_code in (404, 405), path
    assert alice.get(f"/desktop/{sid}").status_code in (302, 404)
    assert world.sent() == []


@pytest.mark.parametrize(
    "path", ["/desktops/{}/stop", "/api/v1/sessions/{}/stop", "/admin/sessions/{}/stop", "/logout"]
)
def test_nothing_changes_by_get(world: World, app: Flask, path: str) -> None:
    world.session(MINE, "boss", State.RUNNING)
    boss = signed_in(app, "boss")
    assert boss.get(path.format(MINE)).status_code == 405
    assert world.sent() == [] and boss.get("/desktops").status_code == 200


def test_the_administrator_may_stop_and_see_anybodys_desktop_and_it_is_noted(world: World, app: Flask) -> None:
    world.session(OTHERS, "bob", State.RUNNING)
    boss = signed_in(app, "boss")
    assert boss.post(f"/api/v1/sessions/{OTHERS}/ticket", json={}, token=boss.csrf("/desktops")).status_code == 200
    assert boss.post(f"/admin/sessions/{OTHERS}/stop", token=boss.csrf("/desktops")).status_code == 303
    assert [(e.actor, e.target, e.detail) for e in audit(world, "console")] == [("boss", OTHERS, "of bob")]
    assert [(e.actor, e.target, e.detail) for e in audit(world, "stop")] == [("boss", OTHERS, "of bob")]
    (stop,) = world.sent()
    assert stop.admin  # type: ignore[union-attr]


# Logging in.


def test_wrong_and_unknown_get_the_same_answer(app: Flask) -> None:
    texts = set()
    for user, password in (
        ("alice", "wrong-password"),
        ("ghost", "wrong-password"),
        ("alice", ""),
        ("alice", "\u200b"),
    ):
        answer = Browser(app).log_in(user, password)
        assert answer.status_code == 401
        texts.add(re.sub(r'value="[^"]*"', "", answer.text).replace("content=", ""))
    messages = {re.search(r"Name or password is wrong", text) is not None for text in texts}
    assert messages == {True}


@pytest.mark.parametrize("body", [{}, {"user": "alice"}, {"password": PASSWORD}, {"user": "", "password": ""}])
def test_a_login_with_fields_left_out_is_no_login(app: Flask, body: dict[str, str]) -> None:
    browser = Browser(app)
    assert browser.post("/login", body).status_code == 401
    assert browser.get("/desktops").status_code == 302


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"user":"alice","password":[]}', b"\xff\xfe", b"{" * 9000])
def test_a_login_in_json_is_no_login(app: Flask, body: bytes) -> None:
    browser = Browser(app)
    answer = browser.client.post(
        "/login", data=body, content_type="application/json", headers={"X-CSRFToken": browser.csrf()}
    )
    assert answer.status_code in (400, 401)
    assert browser.get("/desktops").status_code == 302


def test_guessing_is_slowed_and_says_for_how_long(app: Flask) -> None:
    browser = Browser(app)
    answers = [browser.log_in("alice", "wrong-password") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [401, 401, 401, 429, 429]
    assert "Try again in" in answers[-1].text
    assert browser.log_in("alice").status_code == 429, "the right password waits as well"


def test_the_browser_that_a_person_uses_is_not_shut_out_by_others(world: World, app: Flask, alice: Browser) -> None:
    alice.post("/logout", token=alice.csrf("/desktops"))
    attackers = Browser(app)
    for _ in range(10):
        attackers.log_in("alice", "wrong-password")
    assert attackers.log_in("alice").status_code == 429
    assert alice.log_in("alice").status_code == 303


def test_the_id_from_before_the_login_is_worth_nothing(app: Flask) -> None:
    victim = Browser(app)
    before = victim.csrf()
    planted = victim.client.get_cookie("deskfleet", domain="127.0.0.1")
    victim.log_in("alice")
    after = victim.client.get_cookie("deskfleet", domain="127.0.0.1")
    assert planted and after and planted.value != after.value
    attacker = Browser(app)
    attacker.client.set_cookie("deskfleet", planted.value, domain="127.0.0.1")
    assert attacker.get("/desktops").status_code == 302
    assert victim.post("/api/v1/sessions", json={"machine": "desktop"}, token=before).status_code == 400


def test_a_login_is_dead_on_the_server_after_logout(app: Flask, alice: Browser) -> None:
    cookie = alice.client.get_cookie("deskfleet", domain="127.0.0.1")
    token = alice.csrf("/desktops")
    assert cookie and alice.post("/logout", token=token).status_code == 303
    thief = Browser(app)
    thief.client.set_cookie("deskfleet", cookie.value, domain="127.0.0.1")
    assert thief.get("/desktops").status_code == 302
    assert thief.get("/api/v1/sessions").status_code == 401
    assert thief.post("/api/v1/sessions", json={"machine": "desktop"}, token=token).status_code == 401


def test_a_disabled_account_is_out_at_its_next_click(world: World, alice: Browser) -> None:
    world.portal.accounts.set_disabled("alice", True)
    assert alice.get("/desktops").status_code == 302


@pytest.mark.parametrize(
    ("wanted", "goes"),
    [
        ("/desktops", "/desktops"),
        ("/progress/x?y=1", "/progress/x?y=1"),
        ("https://evil.example/", "/"),
        ("//evil.example/", "/"),
        ("/\\evil.example/", "/"),
        ("/\t/evil.example", "/"),
        ("javascript:alert(1)", "/"),
        ("", "/"),
    ],
)
def test_a_login_leads_to_our_own_pages_only(app: Flask, wanted: str, goes: str) -> None:
    answer = Browser(app).post("/login", {"user": "alice", "password": PASSWORD, "next": wanted})
    assert (answer.status_code, answer.headers["Location"]) == (303, goes)


def test_secure_cookies_and_a_login_over_tls_behind_a_front_proxy(tmp_path: Path) -> None:
    other = World(tmp_path, public_url="https://portal.example.org", console_url="wss://console.example.org/console")
    other.portal.accounts.add("alice", PASSWORD)
    browser = Browser(create_app(other.portal), "https://portal.example.org")
    answer = browser.log_in("alice")  # no Referer: our own policy forbids browsers to send one
    assert answer.status_code == 303
    (cookie,) = [value for value in answer.headers.getlist("Set-Cookie") if value.startswith("__Host-deskfleet=")]
    assert {"Secure", "HttpOnly", "Path=/", "SameSite=Lax"} <= {part.strip() for part in cookie.split(";")}
    assert "Domain" not in cookie
    assert "max-age=31536000" in browser.get("/desktops").headers["Strict-Transport-Security"]
    other.close()


# Other sites.


@pytest.mark.parametrize("path", ["/login", "/logout", "/launch/desktop", f"/desktops/{MINE}/stop", "/api/v1/sessions"])
@pytest.mark.parametrize("token", ["", "x", "IjEi.Zz.zz"])
def test_no_change_without_the_pages_own_token(world: World, alice: Browser, path: str, token: str) -> None:
    world.session(MINE, "alice", State.RUNNING)
    for content in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data", "application/json"):
        answer = alice.client.post(
            path, data=b'{"machine":"desktop"}', content_type=content, headers={"X-CSRFToken": token}
        )
        assert answer.status_code == 400, content
    assert world.sent() == []
    assert alice.get("/desktops").status_code == 200


def test_one_persons_token_does_not_work_for_another(world: World, app: Flask, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    bob = signed_in(app, "bob")
    answer = bob.post(f"/desktops/{MINE}/stop", token=alice.csrf("/desktops"))
    assert answer.status_code == 400 and world.sent() == []


def test_a_bearer_token_stands_for_itself_and_needs_no_csrf(world: World, app: Flask, alice: Browser) -> None:
    client = app.test_client()
    made = client.post("/api/v1/sessions", json={"machine": "desktop"}, headers=bearer(world, "bob"))
    assert made.status_code == 202 and made.json["user"] == "bob"  # type: ignore[index]
    wrong = {"Authorization": "Bearer dft_nonsense"}
    assert alice.get("/api/v1/sessions", headers=wrong).status_code == 401, "the cookie must not step in"
    refused = alice.client.post("/api/v1/sessions", json={"machine": "desktop"}, headers=wrong)
    assert refused.status_code == 401
    assert len(world.sent()) == 1


@pytest.mark.parametrize("scheme", ["bearer ", "BEARER ", "Bearer", "Bearer  ", "Basic YWxpY2U6eA=="])
def test_no_other_authorization_header_gets_round_csrf(world: World, alice: Browser, scheme: str) -> None:
    answer = alice.client.post("/api/v1/sessions", json={"machine": "desktop"}, headers={"Authorization": scheme})
    assert answer.status_code in (400, 401) and world.sent() == []


@pytest.mark.parametrize("scope", Scope)
def test_a_token_does_on_each_route_what_its_scope_says(world: World, app: Flask, scope: Scope) -> None:
    """An administrator's token, who may do everything: what is refused is refused for the scope."""
    world.portal.accounts.add("root@example.org", PASSWORD)
    headers, wrong = bearer(world, "root@example.org", scope), []
    only_asks = {"api.placement"}
    for endpoint, method, path in every_call(app):
        changes = method != "GET" and endpoint not in only_asks
        enough = {
            ("admin", True): {Scope.FLEET},
            ("admin", False): {Scope.FLEET, Scope.FLEET_READ},
            ("person", True): {Scope.FLEET, Scope.DESKTOPS},
            ("public", True): {Scope.FLEET, Scope.DESKTOPS},
        }.get((ACCESS[endpoint], changes), set(Scope))
        answer = app.test_client().open(path, method=method, headers=headers, buffered=True)
        refused = b"out_of_scope" in answer.data
        if refused is (scope in enough) or (refused and answer.status_code != 403):
            wrong.append((endpoint, method, answer.status_code))
    assert wrong == [], wrong


def test_an_administrators_token_without_that_scope_is_anybodys(world: World, app: Flask) -> None:
    world.portal.accounts.add("root@example.org", PASSWORD)
    world.session(OTHERS, "bob", State.RUNNING)
    for scope, status in ((Scope.DESKTOPS, 404), (Scope.FLEET_READ, 403), (Scope.FLEET, 200)):
        answer = app.test_client().post(
            f"/api/v1/sessions/{OTHERS}/stop", headers=bearer(world, "root@example.org", scope)
        )
        assert answer.status_code == status, scope
    assert (
        app.test_client()
        .get(f"/api/v1/sessions/{OTHERS}", headers=bearer(world, "root@example.org", Scope.FLEET_READ))
        .json
    )


def test_tokens_are_made_shown_and_removed_by_their_page(world: World, app: Flask, alice: Browser) -> None:
    page = alice.post("/tokens/", {"label": "  night  run ", "scope": "desktops:read", "days": "7"})
    secret = re.search(r"dft_[\w-]{40,}", page.text)
    assert page.status_code == 200 and secret
    (made,) = world.portal.logins.tokens_of("alice")
    assert (made.label, made.scopes, made.expires_at - made.created_at) == ("night run", (Scope.DESKTOPS_READ,), 604800)
    again = alice.get("/tokens/").text
    assert "night run" in again and secret[0] not in again and "fleet:read" not in again
    assert world.portal.audit.newest()[0].detail == "desktops:read: night run"
    for wrong in ({"label": ""}, {"label": "x" * 81}, {"scope": "all"}, {"days": "5000"}, {"days": "x"}):
        answer = alice.post("/tokens/", {"label": "x", "scope": "desktops", "days": "7", **wrong})
        assert answer.status_code == 422 and 'data-reason="bad_fields"' in answer.text
    assert Browser(app).client.post(f"/tokens/{made.name}/remove").status_code == 302
    assert alice.post(f"/tokens/{made.name}/remove").status_code == 303
    assert world.portal.logins.tokens_of("alice") == []


def test_nobody_has_more_than_fifty_tokens(world: World, alice: Browser) -> None:
    for _ in range(50):
        world.portal.logins.make_token(Identity("alice", "local"), "x", 3600, [Scope.DESKTOPS])
    answer = alice.post("/api/v1/tokens", json={"label": "one more"})
    assert (answer.status_code, answer.json["reason"]) == (409, "too_many_tokens")


def test_a_token_makes_no_tokens(world: World, app: Flask) -> None:
    client, headers = app.test_client(), bearer(world, "alice")
    assert client.post("/api/v1/tokens", json={"label": "x"}, headers=headers).status_code == 403
    assert client.get("/api/v1/tokens", headers=headers).status_code == 403
    assert len(world.portal.logins.tokens_of("alice")) == 1


def test_what_every_answer_tells_the_browser(app: Flask, alice: Browser) -> None:
    for path in ("/desktops", "/login", "/nothing", "/api/v1/sessions", "/admin/", "/static/x/site.css"):
        headers = alice.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert policy["connect-src"] == "'self' ws://127.0.0.1:8090"
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'" and policy["form-action"] == "'self'"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"


def test_no_page_needs_what_the_policy_forbids(world: World, app: Flask) -> None:
    world.session(MINE, "boss", State.RUNNING)
    world.session("d" * 32, "boss", State.QUEUED)
    boss = signed_in(app, "boss")
    for path in pages("d" * 32):
        text = boss.get(path).text
        assert not re.search(
            r"<script(?! type=.application/json|[^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=|javascript:|hx-on|hx-vals=.js",
            text,
        ), path


def pages(waiting: str) -> list[str]:
    return [
        "/launch",
        "/launch/desktop",
        "/desktops",
        f"/desktop/{MINE}",
        f"/progress/{waiting}",
        "/admin/",
        "/nothing",
    ]


def test_what_depends_on_who_asks_is_kept_by_no_cache(world: World, app: Flask, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    for endpoint, method, path in every_call(app):
        if method == "GET" and endpoint != "static":
            headers = alice.get(path.replace(OTHERS, MINE)).headers
            assert headers["Cache-Control"] == "no-store", path
            assert "Cookie" in headers["Vary"]


def test_files_that_caches_may_keep_carry_nobodys_cookie(app: Flask, alice: Browser) -> None:
    page = alice.get("/desktops").text
    (address,) = set(re.findall(r'href="(/static/[^"]*site\.css[^"]*)"', page))
    answer = alice.get(address)
    assert answer.status_code == 200 and "immutable" in answer.headers["Cache-Control"]
    assert "Set-Cookie" not in answer.headers and "Cookie" not in answer.headers.get("Vary", "")
    old = alice.get(re.sub(r"/static/[^/]+/", "/static/another-release/", address))
    assert old.status_code == 200 and "immutable" not in old.headers["Cache-Control"]


@pytest.mark.parametrize(
    "path", ["../app.py", "..%2fapp.py", "%2e%2e/settings.py", "/etc/passwd", "vendor/../../app.py"]
)
def test_nothing_beside_the_static_files_is_served(app: Flask, path: str) -> None:
    answer = Browser(app).get(f"/static/x/{path}")
    assert answer.status_code in (302, 308, 404) and "import" not in answer.text


# Launching.


def seal(browser: Browser, machine: str = "desktop") -> str:
    found = re.search(r'name="seal" value="([^"]+)"', browser.get(f"/launch/{machine}").text)
    assert found
    return found[1]


def test_twenty_clicks_on_one_form_are_one_desktop(world: World, alice: Browser) -> None:
    form = {"seal": seal(alice), "cpus": "4", "memory_mib": "2048", "persistent": "yes"}
    token = alice.csrf("/desktops")
    answers = [alice.post("/launch/desktop", form, token=token) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {303}
    assert len({answer.headers["Location"] for answer in answers}) == 1
    (request,) = world.sent()
    assert (request.resources.cpus, request.resources.memory_mib, request.persistent) == (4, 2048, True)  # type: ignore[union-attr]
    assert len(alice.get("/api/v1/sessions").json["sessions"]) == 1  # type: ignore[index]


def test_a_form_is_good_for_its_own_person_and_machine(world: World, app: Flask, alice: Browser) -> None:
    world.machine("other")
    bob = signed_in(app, "bob")
    stolen = seal(alice)
    assert bob.post("/launch/desktop", {"seal": stolen}, token=bob.csrf("/desktops")).status_code == 400
    assert alice.post("/launch/other", {"seal": stolen}, token=alice.csrf("/desktops")).status_code == 400
    assert world.sent() == []


def test_a_form_with_any_field_left_out_gives_no_more_than_the_whole(world: World, alice: Browser) -> None:
    whole = {
        "seal": seal(alice),
        "cpus": "2",
        "memory_mib": "1024",
        "disk_gib": "4",
        "lifetime_s": "3600",
        "persistent": "yes",
    }
    token = alice.csrf("/desktops")
    for count in range(len(whole) + 1):
        for names in itertools.combinations(whole, count):
            answer = alice.post("/launch/desktop", {name: whole[name] for name in names}, token=token)
            assert answer.status_code == (303 if "seal" in names else 400)
    assert len(world.sent()) == 1, "one seal, one desktop, whatever else stood in the form"


@pytest.mark.parametrize(
    "change",
    [
        {"cpus": "64"},
        {"cpus": "two"},
        {"cpus": "-1"},
        {"cpus": "9" * 40},
        {"memory_mib": "1"},
        {"gpu": "any"},
        {"lifetime_s": "99999999"},
        {"seal": "forged"},
    ],
)
def test_a_form_that_asks_for_too_much_is_refused_in_words(
    world: World, alice: Browser, change: dict[str, str]
) -> None:
    answer = alice.post("/launch/desktop", {"seal": seal(alice), **change}, token=alice.csrf("/desktops"))
    assert 400 <= answer.status_code < 500 and 'role="alert"' in answer.text
    assert world.sent() == []


def test_where_a_gpu_may_be_chosen_it_is_said_what_it_is_for(world: World, alice: Browser) -> None:
    for name, policy in (("lab", "optional"), ("render", "required"), ("plain", "never")):
        world.machine(name, gpu=policy)
        said = "rendering off-screen" in alice.get(f"/launch/{name}").text
        assert said is (policy != "never")


def test_the_api_takes_the_callers_own_id_once(world: World, app: Flask) -> None:
    client = app.test_client()
    mine, his = bearer(world, "alice"), bearer(world, "bob")
    body = {"machine": "desktop", "sid": MINE}
    assert [client.post("/api/v1/sessions", json=body, headers=mine).status_code for _ in range(3)] == [202, 200, 200]
    answer = client.post("/api/v1/sessions", json=body, headers=his)
    assert (answer.status_code, answer.json["reason"]) == (409, "sid_taken")  # type: ignore[index]
    assert len(world.sent()) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"machine": "desktop", "admin": True},
        {"machine": "desktop", "user": "boss"},
        {"machine": "desktop", "cpus": "2"},
        {"machine": "desktop", "cpus": True},
        {"machine": "desktop", "cpus": 1.5},
        {"machine": "desktop", "persistent": "yes"},
        {"machine": "desktop", "sid": "../../etc"},
        {"machine": ["desktop"]},
        {},
        [],
        None,
        "desktop",
    ],
)
def test_the_api_refuses_what_it_does_not_know(world: World, app: Flask, body: Any) -> None:
    answer = app.test_client().post("/api/v1/sessions", json=body, headers=bearer(world, "alice"))
    assert 400 <= answer.status_code < 500 and answer.json["reason"] and answer.json["message"]  # type: ignore[index]
    assert world.sent() == []


def test_a_machine_of_others_is_not_offered_and_not_started(world: World, app: Flask, alice: Browser) -> None:
    world.machine("secret", title="Secret project", users='["bob"]')
    assert "Secret project" not in alice.get("/launch").text
    assert alice.get("/launch/secret").status_code == alice.get("/launch/ghost").status_code == 404
    answer = app.test_client().post("/api/v1/sessions", json={"machine": "secret"}, headers=bearer(world, "alice"))
    assert answer.status_code == 404


def test_one_person_can_not_fill_the_disk_with_requests(world: World, app: Flask) -> None:
    client, headers = app.test_client(), bearer(world, "alice")
    world.broker.crash()
    answers = [client.post("/api/v1/sessions", json={"machine": "desktop"}, headers=headers) for _ in range(30)]
    assert {answer.status_code for answer in answers[:20]} == {202}
    assert {answer.status_code for answer in answers[20:]} == {429}
    assert client.post("/api/v1/sessions", json={"machine": "desktop"}, headers=bearer(world, "bob")).status_code == 202


# When something is away.


def test_with_the_broker_down_a_launch_is_held_and_says_so(world: World, alice: Browser) -> None:
    world.broker.crash()
    answer = alice.post("/launch/desktop", {"seal": seal(alice)}, token=alice.csrf("/desktops"))
    assert answer.status_code == 303
    page = answer.headers["Location"]
    world.tick(5)
    assert "queue can&#39;t be reached" in alice.get(page).text
    assert "unknown" in signed_in_admin(world).get("/admin/").text
    world.broker.recover()
    world.tick(5)
    assert len(world.sent()) == 1 and "waits for the scheduler" in alice.get(page).text


def signed_in_admin(world: World) -> Browser:
    return signed_in(create_app(world.portal), "boss")


def hide(url: str) -> None:
    path = Path(url.removeprefix("sqlite:///"))
    for part in path.parent.glob(path.name + "*"):
        part.unlink()


def test_with_the_ledger_away_a_launch_is_still_accepted(world: World, alice: Browser) -> None:
    form = {"seal": seal(alice)}
    token = alice.csrf("/desktops")
    world.ledger.dispose()
    world.portal.fleet._reader._engine.dispose()
    hide(world.ledger_url)
    answer = alice.post("/launch/desktop", form, token=token)
    assert answer.status_code == 303 and len(world.sent()) == 1
    assert alice.get(answer.headers["Location"]).status_code == 200
    assert alice.get("/desktops").status_code == 200
    gone = alice.get(f"/progress/{OTHERS}")
    assert gone.status_code == 503 and "keep running" in gone.text


def test_with_its_own_database_away_the_portal_says_so_plainly(
    world: World, alice: Browser, caplog: pytest.LogCaptureFixture
) -> None:
    world.portal.store.close()
    hide(world.database)
    for path in ("/desktops", "/launch", "/admin/", "/login", "/api/v1/sessions"):
        answer = alice.get(path)
        assert answer.status_code == 503, path
        assert "can&#39;t be read" in answer.text or "can't be read" in answer.text
        assert not re.search(r"sqlite|portal\.db|Traceback|/tmp|OperationalError", answer.text, re.IGNORECASE)
    reference = re.search(r"[0-9a-f]{8}", alice.get("/api/v1/sessions").json["reference"])  # type: ignore[index]
    assert reference and reference[0] in caplog.text


def test_a_fault_of_ours_gives_a_sentence_and_a_reference(
    world: World, alice: Browser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("secret path /var/lib/thing")

    monkeypatch.setattr(type(world.portal.desktops), "of_user", broken)
    for path in ("/desktops", "/api/v1/sessions"):
        answer = alice.get(path)
        assert answer.status_code == 500 and "/var/lib" not in answer.text and "Traceback" not in answer.text
        reference = re.search(r"\b[0-9a-f]{8}\b", answer.text)
        assert reference and any(reference[0] in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/nothing", {}, 404),
        ("GET", "/%00", {}, 404),
        ("GET", "/desktops?" + "x" * 3000, {}, 200),
        ("PUT", "/desktops", {}, 405),
        ("TRACE", "/desktops", {}, 405),
        ("POST", "/launch/desktop", {"data": b"x" * 300_000, "content_type": "application/x-www-form-urlencoded"}, 413),
        ("POST", "/login", {"data": {f"f{n}": (None, "x") for n in range(2)}}, 400),
    ],
)
def test_odd_requests_get_plain_answers(
    alice: Browser, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    answer = alice.client.open(path, method=method, **options)
    assert answer.status_code == status and "Traceback" not in answer.text


def test_a_form_with_a_million_parts_is_refused(alice: Browser) -> None:
    body = b"".join(b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' for _ in range(3000)) + b"--x--\r\n"
    answer = alice.client.post("/login", data=body, content_type="multipart/form-data; boundary=x")
    assert answer.status_code in (400, 413)


# What comes from elsewhere is text.

HOSTILE = ["<img src=x onerror=alert(1)>", '"><svg/onload=alert(1)>', "{{7*7}}", "${7*7}", "'-alert(1)-'"]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_from_elsewhere_are_shown_as_text(world: World, app: Flask, text: str) -> None:
    world.machine("desktop", title=text.replace('"', '\\"'))
    name = text.replace("\\", "")
    world.portal.accounts.add(name, PASSWORD, admin=True)
    gpu = Gpu("0000:01:00.0", text, 1, ("0000:01:00.0",), True, text)
    world.host("h1", gpus=(gpu,), problems=(text,), version=text)
    world.session(MINE, name, State.RUNNING)
    waiting = world.session("d" * 32, name, State.QUEUED)
    with world.writer.begin() as tx:
        tx.explain([(waiting.sid, Wait(1, 90.0, (Verdict("h1", Reason.MEMORY_SHORT, text),)), 1.0)])
        tx.drain("h1", True, text)
    browser = signed_in(app, name)
    for path in pages(waiting.sid):
        page = browser.get(path).text
        assert text not in page or text in ("{{7*7}}", "${7*7}"), path
        assert ">49<" not in page and "<img src=x" not in page and "<svg/onload" not in page
    assert browser.get("/api/v1/hosts").content_type == "application/json"


def test_a_wrong_name_is_given_back_as_text(app: Flask) -> None:
    answer = Browser(app).log_in(HOSTILE[1], "wrong-password")
    assert answer.status_code == 401 and HOSTILE[1] not in answer.text


# The console.


def test_the_address_that_the_command_line_prints_is_a_page(world: World, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    assert alice.get(f"/desktop/{MINE}").status_code == 200
    waiting = world.session("d" * 32, "alice", State.QUEUED)
    assert alice.get(f"/desktop/{waiting.sid}").headers["Location"] == f"/progress/{waiting.sid}"


def test_a_ticket_is_for_a_running_desktop_only(world: World, alice: Browser) -> None:
    token = alice.csrf("/desktops")
    expected = {
        State.QUEUED: (409, "not_running"),
        State.ASSIGNED: (409, "not_running"),
        State.STARTING: (409, "not_running"),
        State.RUNNING: (200, None),
        State.STOPPING: (409, "not_running"),
        State.ENDED: (409, "ended"),
    }
    for number, (state, (status, reason)) in enumerate(expected.items()):
        sid = f"{number:032x}"
        session = world.session(sid, "alice", state)
        answer = alice.post(f"/api/v1/sessions/{sid}/ticket", json={}, token=token)
        assert (answer.status_code, (answer.json or {}).get("reason")) == (status, reason), state
        if status == 200:
            ticket = world.portal.tickets.verify(answer.json["ticket"])  # type: ignore[index]
            assert (ticket.sid, ticket.user, ticket.generation) == (sid, "alice", session.generation)
            assert answer.json["console_url"] == "ws://127.0.0.1:8090/console"  # type: ignore[index]


def test_every_ticket_is_a_new_one(world: World, alice: Browser) -> None:
    world.session(MINE, "alice", State.RUNNING)
    token = alice.csrf("/desktops")
    answers = [alice.post(f"/api/v1/sessions/{MINE}/ticket", json={}, token=token) for _ in range(5)]
    nonces = {world.portal.tickets.verify(answer.json["ticket"]).nonce for answer in answers}  # type: ignore[index]
    assert len(nonces) == 5


def test_tickets_and_passwords_stand_in_no_log_and_no_page(
    world: World, app: Flask, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    world.session(MINE, "alice", State.RUNNING)
    alice = Browser(app)
    alice.log_in("alice", "canary-wrong-password")
    alice.log_in("alice")
    ticket = alice.post(f"/api/v1/sessions/{MINE}/ticket", json={}, token=alice.csrf("/desktops")).json["ticket"]  # type: ignore[index]
    cookie = alice.client.get_cookie("deskfleet", domain="127.0.0.1")
    assert cookie
    page = alice.get(f"/desktop/{MINE}?ticket={ticket}&host=evil.example&port=1&path=x").text
    kept = caplog.text + "".join(str(entry) for entry in world.portal.audit.newest())
    for secret in (ticket, PASSWORD, "canary-wrong-password", cookie.value):
        assert secret not in kept
    assert ticket not in page and "evil.example" not in page


def test_the_viewer_looks_at_nothing_in_its_own_address() -> None:
    import deskfleet.portal.app

    static = Path(deskfleet.portal.app.__file__).parent / "static"
    code = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in static.glob("*.js"))
    assert not re.search(r"location\.(search|hash|href)|URLSearchParams|document\.(URL|referrer)|new URL\(", code)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", code)


def test_the_access_log_has_routes_and_nothing_that_opens_anything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path, access_log=True)
    world.portal.accounts.add("alice", PASSWORD)
    browser = signed_in(create_app(world.portal), "alice")
    caplog.set_level("INFO", "deskfleet.portal.access")
    browser.get(f"/progress/{OTHERS}?secret=opensesame")
    browser.get("/shared/opensesame")
    browser.get("/nowhere/opensesame")
    world.close()
    lines = [record.getMessage() for record in caplog.records if record.name == "deskfleet.portal.access"]
    assert lines[0].startswith("GET /progress/<sid> alice 404 ")
    assert len(lines) == 3 and not [line for line in lines if "opensesame" in line or OTHERS in line]
