"""Real faults of others that are about signing in: cases C01 to C04, C07 and C12, by the portal's own pages."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from marshmallow import ValidationError
from support.portals import PASSWORD, Browser, World, settings, signed_in

from deskfleet.portal.app import create_app
from deskfleet.portal.auth import Identity
from deskfleet.portal.cli_local import _values
from deskfleet.portal.methods import Answers, build
from deskfleet.schemas.session import State

SID = "b" * 32
LDAP = {"servers": ["ldaps://d.example.org"], "realm": "example.org", "base": "dc=example,dc=org"}
IMAP = {"servers": ["imaps://m.example.org"], "realm": "example.org"}
OIDC = {"issuer": "https://id.example.org", "client_id": "x", "realm": "example.org"}
HEADER = {"proxies": ["10.0.0.0/8"], "realm": ""}
MAIL = {"server": "localhost", "sender": "desktops@example.org"}


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


def subsets(fields: dict[str, str]) -> list[dict[str, str]]:
    return [dict(some) for size in range(len(fields)) for some in itertools.combinations(fields.items(), size)]


def test_c01_no_set_of_fields_left_out_gives_more_rights(world: World, app: Flask) -> None:
    browser = Browser(app)
    for fields in subsets({"user": "alice", "password": PASSWORD, "next": "/admin/"}):
        if {"user", "password"} <= set(fields):
            continue
        for path in ("/login", "/login/mail", "/login/code", "/logout"):
            assert browser.post(path, fields).status_code in (302, 303, 400, 401, 404, 429), (path, fields)
            assert browser.get("/desktops").status_code == 302
    launch = {"machine": "purge", "seal": "x", "cpus": "1", "memory_mib": "512", "persistent": "yes", "user": "alice"}
    for fields in subsets(launch):
        answer = browser.post("/launch/desktop", fields)
        assert answer.status_code == 302 and answer.headers["Location"].startswith("/login")
    assert world.sent() == []


@pytest.mark.parametrize("lacks", ["auth", "database", "secret_key", "ticket_keys", "public_url"])
def test_c01_a_setting_left_out_is_no_start(lacks: str) -> None:
    with pytest.raises(ValidationError) as caught:
        from deskfleet.portal.settings import PortalSchema

        whole = {
            "public_url": "http://127.0.0.1:8080", "console_url": "ws://127.0.0.1:8090/console",
            "broker_url": "amqp://x@127.0.0.1/", "database": "sqlite:////x", "secret_key": "k" * 40,
            "ticket_keys": ["t" * 40], "auth": ["local"],
        }  # fmt: skip
        PortalSchema().load({key: value for key, value in whole.items() if key != lacks})
    assert lacks in caught.value.messages


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"auth": []}, ["auth"]),
        ({"auth": ["ldap"]}, ["auth"]),
        ({"auth": ["nobody"]}, ["auth"]),
        ({"auth": ["local", "local"]}, ["auth"]),
        ({"auth": ["email"], "email": {"domains": ["example.org"]}}, ["auth"]),
        ({"auth": ["email"], "email": {"domains": []}, "mail": MAIL}, ["email", "domains"]),
        ({"auth": ["email"], "email": {"domains": ["*"]}, "mail": MAIL}, ["email", "domains"]),
        ({"ldap": {k: v for k, v in LDAP.items() if k != "realm"}}, ["ldap", "realm"]),
        ({"ldap": LDAP | {"servers": []}}, ["ldap", "servers"]),
        ({"ldap": LDAP | {"servers": ["d.example.org"]}}, ["ldap", "servers"]),
        ({"ldap": LDAP | {"servers": ["ldap://user:word@d.example.org"]}}, ["ldap", "servers"]),
        ({"ldap": LDAP | {"servers": ["imaps://d.example.org"]}}, ["ldap", "servers"]),
        ({"ldap": LDAP | {"bind_dn": "cn=x"}}, ["ldap", "bind_password"]),
        ({"ldap": LDAP | {"bind_dn": "cn=x", "bind_password": ""}}, ["ldap", "bind_password"]),
        ({"ldap": LDAP | {"user_filter": "(uid=alice)"}}, ["ldap", "user_filter"]),
        ({"ldap": LDAP | {"user_filter": "(uid={user}"}}, ["ldap", "user_filter"]),
        ({"ldap": LDAP | {"user_filter": ""}}, ["ldap", "user_filter"]),
        ({"ldap": LDAP | {"group_filter": "(member={dn})"}}, ["ldap", "group_base"]),
        ({"ldap": LDAP | {"ca": "/nonexistent"}}, ["ldap", "ca"]),
        ({"imap": IMAP | {"realm": "", "send_address": True}}, ["imap", "send_address"]),
        ({"imap": IMAP | {"realm": "Example.org"}}, ["imap", "realm"]),
        ({"header": HEADER | {"proxies": ["0.0.0.0/0"]}}, ["header", "proxies"]),
        ({"header": HEADER | {"proxies": []}}, ["header", "proxies"]),
        ({"header": HEADER | {"user_header": "X_User"}}, ["header", "user_header"]),
        ({"oidc": OIDC | {"issuer": "http://id.example.org"}}, ["oidc", "issuer"]),
        ({"oidc": OIDC | {"id_claim": "email"}}, ["oidc", "domains"]),
        ({"oidc": {k: v for k, v in OIDC.items() if k != "realm"}}, ["oidc", "realm"]),
        ({"oidc": OIDC | {"scopes": "email"}}, ["oidc", "scopes"]),
    ],
)
def test_a_fault_in_a_section_is_told_by_its_key(changes: dict[str, Any], where: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        settings(**changes)
    found: Any = caught.value.messages
    for key in where:
        assert key in found, caught.value.messages
        found = found[key]


@pytest.mark.parametrize("kind", ["ldap", "imap", "smtp"])
def test_c07_in_clear_only_by_a_word_that_says_so_and_it_is_logged(
    world: World, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {**(LDAP if kind == "ldap" else IMAP), "servers": [f"{kind}://d.example.org"], "starttls": False}
    with pytest.raises(ValidationError, match="can be read on the way"):
        settings(**{kind: plain})
    loaded = settings(auth=[kind], **{kind: plain | {"insecure": True}})
    answers = Answers(world.portal.counts.logins, world.clock)
    build(loaded, world.portal.accounts, world.portal.store, world.clock, None, answers)
    assert f"insecure: passwords go in clear to a server of [portal.{kind}]" in caplog.text
    caplog.clear()
    local = settings(auth=[kind], **{kind: plain | {"servers": [f"{kind}://localhost"]}})
    build(local, world.portal.accounts, world.portal.store, world.clock, None, answers)
    assert caplog.text == ""


def test_c02_nobodys_desktop_is_stopped_without_a_login_or_by_another(world: World, app: Flask) -> None:
    world.session(SID, "alice", State.RUNNING)
    nobody, bob, alice = Browser(app), signed_in(app, "bob"), signed_in(app, "alice")
    for what in (SID, SID + ".json", f"..%2f{SID}", f"%2fetc%2f{SID}"):
        for path in (f"/desktops/{what}/stop", f"/api/v1/sessions/{what}/stop", f"/desktops/{what}/extend"):
            for browser, token in (
                (nobody, nobody.csrf()),
                (bob, bob.csrf("/desktops")),
                (bob, alice.csrf("/desktops")),
            ):
                answer = browser.client.post(path, headers={"X-CSRFToken": token})
                assert answer.status_code in (302, 400, 401, 404), (path, answer.status_code)
    assert world.sent() == []


@pytest.mark.parametrize("name", [".", ".....", ".*", "boss1|x", "BOSS1", "boss1@other-domain", "boss"])
def test_c03_an_administrator_is_one_by_exact_id(tmp_path: Path, name: str) -> None:
    world = World(tmp_path, admins=["boss1"])
    world.portal.accounts.add(name, PASSWORD)
    browser = signed_in(create_app(world.portal), name)
    assert {browser.get(path).status_code for path in ("/admin/", "/api/v1/hosts", "/api/v1/audit")} == {403}
    world.close()


def test_c04_no_password_or_cookie_stands_in_a_log_or_a_file(
    world: World, app: Flask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    browser = signed_in(app, "alice")
    Browser(app).log_in("alice", "canary-wrong-password")
    cookie = browser.client.get_cookie("deskfleet", domain="127.0.0.1")
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert cookie
    for canary in (PASSWORD, "canary-wrong-password", cookie.value):
        assert canary not in caplog.text and canary.encode() not in kept


def test_c04_settings_are_shown_without_their_secrets() -> None:
    loaded = settings(
        auth=["ldap", "oidc"],
        ldap=LDAP | {"bind_dn": "cn=portal", "bind_password": "canary-one"},
        oidc=OIDC | {"client_secret": "canary-two"},
    )
    shown = f"{loaded!r} {_values(loaded)} {loaded.ldap and _values(loaded.ldap)}"
    assert "canary" not in shown and "cn=portal" in shown


# C12.


def test_c12_the_id_is_new_at_each_login_and_the_old_one_dead(world: World, app: Flask) -> None:
    browser = signed_in(app, "alice")
    first = browser.client.get_cookie("deskfleet", domain="127.0.0.1")
    browser.log_in("alice")
    second = browser.client.get_cookie("deskfleet", domain="127.0.0.1")
    assert first and second and first.value != second.value
    thief = Browser(app)
    thief.client.set_cookie("deskfleet", first.value, domain="127.0.0.1")
    assert thief.get("/desktops").status_code == 302 and browser.get("/desktops").status_code == 200


def test_c12_a_login_ends_when_nobody_uses_it_and_at_its_own_end(tmp_path: Path) -> None:
    world = World(tmp_path, login_s=10_000, login_idle_s=1000)
    world.portal.accounts.add("alice", PASSWORD)
    app = create_app(world.portal)
    used, idle = signed_in(app, "alice"), signed_in(app, "alice")
    for _ in range(12):
        world.clock.now += 800
        assert used.get("/desktops").status_code == 200
    assert idle.get("/desktops").status_code == 302
    world.clock.now += 500
    assert used.get("/desktops").status_code == 302, "and however much it is used, it has an end"
    signed_in(app, "alice")
    world.clock.now += 1001
    world.portal.sweep()
    with world.portal.store.reading() as connection:
        from deskfleet.portal.tables import login

        assert connection.execute(login.select()).all() == []
    world.close()


def test_c12_without_an_idle_limit_there_is_none(tmp_path: Path) -> None:
    world = World(tmp_path, login_s=100_000, login_idle_s=0)
    secret = world.portal.logins.open(Identity("alice", "local"), 100_000)
    world.clock.now += 90_000
    world.portal.sweep()
    assert world.portal.logins.find(secret) is not None
    world.close()


def test_c12_every_form_of_the_login_needs_the_pages_own_token(app: Flask) -> None:
    for path in ("/login", "/login/mail", "/login/code"):
        for token in ("", "x"):
            answer = Browser(app).client.post(path, data={"user": "alice", "password": PASSWORD, "csrf_token": token})
            assert answer.status_code == 400, path


def test_c12_only_the_ways_in_use_answer(app: Flask) -> None:
    browser = Browser(app)
    assert browser.post("/login/mail", {"address": "ada@example.org"}).status_code == 404
    assert browser.get("/login/oidc").status_code == browser.get("/login/oidc/return?code=x&state=y").status_code == 404


def test_the_login_page_shows_the_ways_in_use(tmp_path: Path) -> None:
    everything = {"auth": ["ldap", "oidc", "email"], "ldap": LDAP, "oidc": OIDC | {"title": "<b>Id</b>"},
                  "email": {"domains": ["example.org"]}, "mail": MAIL}  # fmt: skip
    for number, (changes, shown) in enumerate(
        [
            (everything, ("password", "address", "/login/oidc")),
            ({"auth": ["local"]}, ("password",)),
            ({"auth": ["oidc"], "oidc": OIDC}, ("/login/oidc",)),
            ({"auth": ["header"], "header": HEADER}, ("the sign-in of your site",)),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        world = World(folder, **changes)
        page = Browser(create_app(world.portal)).get("/login").text
        every = ("password", "address", "/login/oidc", "the sign-in of your site")
        marks = {"password": 'name="password"', "address": 'name="address"'}
        assert [mark for mark in every if marks.get(mark, mark) in page] == list(shown)
        assert "<b>Id" not in page
        world.close()
