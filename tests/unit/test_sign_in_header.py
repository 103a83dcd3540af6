"""Logging in by what a proxy in front says: believed from its addresses, taken out from everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from support.portals import PASSWORD, Browser, World, bearer
from werkzeug.test import TestResponse

from deskfleet.portal.app import create_app
from deskfleet.portal.auth_header import ProxyHeaders

PROXY, STRANGER = "10.0.0.7", "192.0.2.1"
SECTION = {
    "proxies": ["10.0.0.0/29", "fd00::/64"],
    "user_header": "X-Sso-User",
    "groups_header": "X-Sso-Groups",
    "realm": "example.org",
    "admin_groups": ["desk admins"],
}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, auth=["header", "local"], header=SECTION)
    yield world
    world.close()


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.portal)


def get(
    browser: Browser, path: str, user: str | None = None, peer: str = PROXY, groups: str = "", **more: Any
) -> TestResponse:
    headers = dict(more.pop("headers", {}))
    if user is not None:
        headers |= {"X-Sso-User": user.encode().decode("latin-1"), "X-Sso-Groups": groups}
    return browser.get(path, headers=headers, environ_base={"REMOTE_ADDR": peer}, **more)


def test_whom_the_proxy_names_is_logged_in_without_a_form(app: Flask, world: World) -> None:
    browser = Browser(app)
    answer = get(browser, "/desktops", "ada")
    assert answer.status_code == 302
    answer = get(browser, answer.headers["Location"], "ada")
    assert (answer.status_code, answer.headers["Location"]) == (303, "/desktops")
    assert "ada@example.org" in get(browser, "/desktops", "ada").text
    (login,) = [line for line in world.portal.audit.newest() if line.action == "login"]
    assert (login.actor, login.detail) == ("ada@example.org", "header")


@pytest.mark.parametrize("peer", [STRANGER, "10.0.0.8", "127.0.0.1", "fd00:0:0:1::1", "", "unix", "::ffff:10.0.0.7"])
def test_the_header_of_anybody_else_says_nothing(app: Flask, peer: str) -> None:
    browser = Browser(app)
    answer = get(browser, "/login", "ada", peer)
    assert answer.status_code == 200 and get(browser, "/desktops", "ada", peer).status_code == 302


def test_an_address_that_is_only_claimed_is_not_the_proxys(app: Flask) -> None:
    claims = {"X-Forwarded-For": PROXY, "X-Real-Ip": PROXY, "Forwarded": f"for={PROXY}"}
    assert get(Browser(app), "/login", "ada", STRANGER, headers=claims).status_code == 200


def test_the_headers_of_others_are_taken_out_before_anything_sees_them(world: World) -> None:
    headers = world.portal.headers
    assert isinstance(headers, ProxyHeaders)
    seen: list[dict[str, Any]] = []

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        del start_response
        seen.append(dict(environ))
        return []

    named = {"HTTP_X_SSO_USER": "ada"}
    assert headers.identify(named | {"REMOTE_ADDR": STRANGER}) is None, "and would not be believed if they were not"
    assert headers.identify(named | {"REMOTE_ADDR": PROXY}) is not None
    for peer in (STRANGER, PROXY):
        told = {"REMOTE_ADDR": peer, "HTTP_X_SSO_USER": "ada", "HTTP_X_SSO_GROUPS": "desk admins", "HTTP_HOST": "x"}
        list(headers.stripping(application)(told, None))  # type: ignore[arg-type]
    assert seen[0] == {"REMOTE_ADDR": STRANGER, "HTTP_HOST": "x"} and "HTTP_X_SSO_USER" in seen[1]


@pytest.mark.parametrize("name", ["", " ", "a\x01b", "evil,ada", "x" * 400, "\x7f"])
def test_a_name_that_is_none_is_nobody(app: Flask, name: str) -> None:
    browser = Browser(app)
    assert get(browser, "/login", name).status_code in (200, 403)
    assert get(browser, "/desktops", name).status_code == 302


def test_bytes_that_are_no_utf8_are_nobody(app: Flask) -> None:
    answer = Browser(app).get("/login", headers={"X-Sso-User": "ad\xe9"}, environ_base={"REMOTE_ADDR": PROXY})
    assert answer.status_code == 403


@pytest.mark.parametrize("name", ["gutiérrez", "经济", "O'Neil", "Company\\User", "a b", "a.b@c.org"])
def test_c09_names_of_any_letters(app: Flask, name: str) -> None:
    browser = Browser(app)
    assert get(browser, "/login", name).status_code == 303
    assert get(browser, "/desktops", name).status_code == 200


def test_groups_count_as_they_are_now(app: Flask) -> None:
    browser = Browser(app)
    get(browser, "/login", "boss", groups="staff, desk admins")
    assert get(browser, "/admin/", "boss", groups="desk admins,staff").status_code == 200
    assert get(browser, "/admin/", "boss", groups="staff").status_code == 403


def test_a_login_is_good_only_while_the_proxy_names_the_same_person(app: Flask) -> None:
    browser = Browser(app)
    get(browser, "/login", "ada")
    for user, peer in (("bob", PROXY), (None, PROXY), ("ada", STRANGER)):
        assert get(browser, "/desktops", user, peer).status_code == 302
    answer = get(browser, "/login?next=/desktops", "bob")
    assert answer.status_code == 303 and "bob@example.org" in get(browser, "/desktops", "bob").text


def test_who_logged_out_stays_out_until_they_ask(app: Flask) -> None:
    browser = Browser(app)
    get(browser, "/login", "ada")
    found = get(browser, "/desktops", "ada").text.partition('csrf_token" value="')[2].partition('"')[0]
    answer = browser.client.post(
        "/logout", data={"csrf_token": found}, headers={"X-Sso-User": "ada"}, environ_base={"REMOTE_ADDR": PROXY}
    )
    page = get(browser, answer.headers["Location"], "ada")
    assert page.status_code == 200 and "logged out" in page.text
    assert get(browser, "/login", "ada").status_code == 303


def test_a_token_stands_for_itself(app: Flask, world: World) -> None:
    headers = bearer(world, "ada@example.org")
    assert get(Browser(app), "/api/v1/sessions", "boss", headers=headers).status_code == 401, "no such local account"


def test_the_rescue_account_works_beside_it(app: Flask, world: World) -> None:
    world.portal.accounts.add("rescue", PASSWORD)
    browser = Browser(app)
    assert browser.log_in("rescue").status_code == 303 and browser.get("/desktops").status_code == 200
