"""Logging in by OpenID Connect, against a provider that speaks it, and then cheats."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey
from support.consoles import Authority
from support.oidc_provider import CLIENT, SECRET, Provider
from support.portals import Browser, World
from werkzeug.test import TestResponse

from deskfleet.portal.app import create_app


class Site:
    """A portal and its provider."""

    def __init__(self, folder: Path, tls: ssl.SSLContext | None = None, **changes: Any) -> None:
        self._world: World | None = None
        self.provider = Provider(self._now, tls)
        section = {
            "issuer": self.provider.issuer,
            "client_id": CLIENT,
            "client_secret": SECRET,
            "title": "Example ID",
            "realm": "example.org",
            "admin_groups": ["desk-admins"],
        } | changes
        self._world = World(folder, auth=["oidc"], oidc=section)
        self.app: Flask = create_app(self.world.portal)

    def _now(self) -> float:
        return self.world.clock.wall()

    @property
    def world(self) -> World:
        assert self._world
        return self._world

    def close(self) -> None:
        self.provider.close()
        self.world.close()

    def away(self, browser: Browser, target: str = "/desktops") -> str:
        """Where the portal sends the browser."""
        answer = browser.get(f"/login/oidc?next={target}")
        assert answer.status_code == 302, answer.text
        return answer.headers["Location"]

    def log_in(self, browser: Browser | None = None, **claims: Any) -> tuple[Browser, TestResponse]:
        """A whole login of somebody whom the provider calls by these claims."""
        self.provider.claims = {"sub": "ada"} | claims
        browser = browser or Browser(self.app)
        return browser, back(browser, self.provider.authorize(self.away(browser)))


def back(browser: Browser, url: str) -> TestResponse:
    parts = urlsplit(url)
    return browser.get(f"{parts.path}?{parts.query}")


def who(site: Site) -> list[tuple[str, str]]:
    return [(line.actor, line.detail) for line in site.world.portal.audit.newest() if line.action == "login"]


def test_a_whole_login_leads_where_the_person_wanted(tmp_path: Path) -> None:
    site = Site(tmp_path)
    browser = Browser(site.app)
    page = browser.get("/login?next=/desktops").text
    assert "Sign in with Example ID" in page and 'name="password"' not in page
    _, answer = site.log_in(browser)
    assert (answer.status_code, answer.headers["Location"]) == (302, "/desktops")
    assert browser.get("/desktops").status_code == 200 and who(site) == [("ada@example.org", "oidc")]
    count = site.world.portal.metrics.registry.get_sample_value
    assert count("deskfleet_portal_logins_total", {"method": "oidc", "result": "right"}) == 1
    site.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def test_groups_make_administrators(site: Site) -> None:
    boss, _ = site.log_in(groups=["desk-admins", "staff", 7])
    fan, _ = site.log_in(sub="fan", groups="staff")
    odd, _ = site.log_in(sub="odd", groups={"desk-admins": True})
    assert [b.get("/admin/").status_code for b in (boss, fan, odd)] == [200, 403, 403]


def _unsigned(claims: dict[str, Any]) -> str:
    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, claims)]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts) + "."


def _shared(claims: dict[str, Any]) -> str:
    return jwt.encode({"alg": "HS256"}, claims, OctKey.import_key(SECRET))


def _stranger(claims: dict[str, Any]) -> str:
    return jwt.encode({"alg": "ES256", "kid": "one"}, claims, ECKey.generate_key("P-256", {"kid": "one"}))


@pytest.mark.parametrize("sign", [_unsigned, _shared, _stranger, lambda _: "x.y.z"])
@pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")
def test_a_token_of_another_signature_is_no_login(site: Site, sign: Callable[[dict[str, Any]], str]) -> None:
    site.provider.sign = sign
    browser, answer = site.log_in()
    assert answer.status_code == 403 and browser.get("/desktops").status_code == 302 and who(site) == []


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "https://elsewhere.example"}, {"iss": None}, {"aud": "another client"}, {"aud": None},
        {"aud": ["another client"], "azp": CLIENT}, {"nonce": "another"}, {"nonce": None}, {"exp": 1}, {"exp": None},
        {"sub": None}, {"sub": ""}, {"sub": 7}, {"sub": "a\nb"}, {"sub": " "}, {"sub": "x" * 400},
    ],
)  # fmt: skip
def test_a_token_that_says_something_else_is_no_login(site: Site, claims: dict[str, Any]) -> None:
    browser, answer = site.log_in(**claims)
    assert answer.status_code == 403 and browser.get("/desktops").status_code == 302 and who(site) == []


def test_c12_an_answer_is_good_once_and_in_the_browser_that_asked(site: Site) -> None:
    site.provider.claims = {"sub": "ada"}
    mine, other = Browser(site.app), Browser(site.app)
    url = site.provider.authorize(site.away(mine))
    assert back(other, url).status_code == 403, "nobody can be logged in as somebody else by a link"
    site.away(other)
    assert back(other, url).status_code == 403
    assert back(mine, url).status_code == 302
    assert back(mine, url).status_code == 403
    assert len(who(site)) == 1


def test_c12_an_attempt_that_failed_is_over(site: Site) -> None:
    browser = Browser(site.app)
    url = site.provider.authorize(site.away(browser))
    assert back(browser, url.replace("code=", "code=x")).status_code == 403
    assert back(browser, url).status_code == 403 and who(site) == []


def test_a_state_of_another_attempt_is_refused(site: Site) -> None:
    browser = Browser(site.app)
    first = site.provider.authorize(site.away(browser))
    site.away(browser)
    assert back(browser, first).status_code == 403
    for answer in ("", "?code=x", "?state=&code=x", "?error=access_denied&state=x", "?code=x&state=%00%ff"):
        assert browser.get(f"/login/oidc/return{answer}").status_code == 403


def test_a_code_that_somebody_else_began_is_worth_nothing(site: Site) -> None:
    """PKCE: the verifier stays in the browser that began."""
    mine, thief = Browser(site.app), Browser(site.app)
    stolen = site.provider.authorize(site.away(mine)).partition("code=")[2].partition("&")[0]
    own = site.provider.authorize(site.away(thief))
    code = own.partition("code=")[2].partition("&")[0]
    assert back(thief, own.replace(code, stolen)).status_code == 403 and who(site) == []


def test_an_answer_that_names_another_issuer_is_refused(site: Site) -> None:
    browser = Browser(site.app)
    url = site.provider.authorize(site.away(browser))
    assert back(browser, url.partition("&iss=")[0] + "&iss=https://elsewhere.example").status_code == 403


def test_who_takes_too_long_begins_anew(site: Site) -> None:
    browser = Browser(site.app)
    url = site.provider.authorize(site.away(browser))
    site.world.clock.now += 901
    assert back(browser, url).status_code == 403 and who(site) == []


@pytest.mark.parametrize(
    "metadata", [{"issuer": "https://elsewhere.example"}, {"token_endpoint": "http://elsewhere.example/"}]
)
def test_a_provider_that_is_another_is_not_asked(site: Site, metadata: dict[str, Any]) -> None:
    site.provider.metadata = metadata
    assert Browser(site.app).get("/login/oidc").status_code == 503


def test_a_provider_that_is_away_is_told_as_such(site: Site) -> None:
    browser = Browser(site.app)
    url = site.provider.authorize(site.away(browser))
    site.provider.broken = True
    answer = back(browser, url)
    assert answer.status_code == 503 and "not your fault" in answer.text and who(site) == []
    site.provider.broken = False
    site.world.clock.now += 10
    assert site.log_in()[1].status_code == 302


def test_new_keys_are_noticed(site: Site) -> None:
    site.log_in()
    site.provider.key = ECKey.generate_key("P-256", {"kid": "two"})
    assert site.log_in()[1].status_code == 302


@pytest.mark.parametrize(
    ("claims", "user"),
    [
        ({"email": "Ada@Example.org", "email_verified": True}, "ada@example.org"),
        ({"email": "ada@example.org", "email_verified": False}, None),
        ({"email": "ada@example.org", "email_verified": "true"}, None),
        ({"email": "ada@example.org"}, None),
        ({"email": "boss@elsewhere.org", "email_verified": True}, None),
        ({"email": "boss@elsewhere.org,ada@example.org", "email_verified": True}, None),
        ({"email_verified": True}, None),
    ],
)
def test_an_address_is_an_id_when_it_is_verified_and_of_the_domain(
    tmp_path: Path, claims: dict[str, Any], user: str | None
) -> None:
    site = Site(tmp_path, id_claim="email", domains=["example.org"])
    try:
        _, answer = site.log_in(**claims)
        assert answer.status_code == (302 if user else 403)
        assert who(site) == ([(user, "oidc")] if user else [])
    finally:
        site.close()


def test_only_some_groups_may_log_in(tmp_path: Path) -> None:
    site = Site(tmp_path, allowed_groups=["staff"], groups_claim="roles")
    assert site.log_in(groups=["staff"])[1].status_code == 403
    assert site.log_in(roles=["staff"])[1].status_code == 302
    site.close()


def test_c07_a_provider_that_does_not_prove_its_name_is_away(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca")
    pair = authority.issue("localhost", "serverAuth")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pair.cert, pair.key)
    for ca, works in ((authority.ca, True), (Authority(tmp_path / "other").ca, False)):
        folder = tmp_path / str(works)
        folder.mkdir()
        site = Site(folder, tls, ca=ca)
        answer = Browser(site.app).get("/login/oidc")
        assert answer.status_code == (302 if works else 503)
        assert ("/token" in site.provider.asked) is False and bool(site.provider.asked) is works
        site.close()
