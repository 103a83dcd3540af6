"""A site's own logo, colour, terms and contact; and a portal below a path."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marshmallow import ValidationError
from support.portals import PASSWORD, Browser, World, settings, signed_in

from deskfleet.portal.app import create_app
from deskfleet.portal.brand import _NIGHT, _WHITE, BrandSchema, contrast, readable, rgb, stylesheet

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 20
SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "brand"
    folder.mkdir()
    (folder / "logo.png").write_bytes(PNG)
    (folder / "logo.svg").write_bytes(SVG)
    (folder / "page.svg").write_bytes(b"<!doctype html><svg></svg>")
    (folder / "big.png").write_bytes(PNG + bytes(256 * 1024))
    (folder / "terms.txt").write_text("First <b>rule</b>.\n\nSecond rule.")
    (folder / "terms.fr.txt").write_text("Première règle.")
    (folder / "latin.txt").write_bytes(b"r\xe8gle")
    (folder / "empty.txt").write_text("  \n")
    return folder


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"accent": "red"}, "accent"),
        ({"accent": "#12345"}, "accent"),
        ({"accent": "#123456;} body {display: none"}, "accent"),
        ({"contact": "javascript:alert(1)"}, "contact"),
        ({"contact": "http://example.org"}, "contact"),
        ({"contact": "help@example.org?bcc=x@example.org"}, "contact"),
        ({"contact": "https:// x"}, "contact"),
        ({"logo": "{}/page.svg"}, "logo"),
        ({"logo": "{}/terms.txt"}, "logo"),
        ({"logo": "{}/big.png"}, "logo"),
        ({"logo": "{}/none.png"}, "logo"),
        ({"terms": "{}/latin.txt"}, "terms"),
        ({"terms": "{}/empty.txt"}, "terms"),
        ({"terms": "{}/none.txt"}, "terms"),
        ({"colour": "#123456"}, "colour"),
    ],
)
def test_what_is_not_good_is_refused_at_the_start(files: Path, changes: dict[str, str], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        BrandSchema().load({name: value.replace("{}", str(files)) for name, value in changes.items()})
    assert list(caught.value.messages) == [key]


@given(st.from_regex(r"\A#[0-9a-f]{6}\Z"))
def test_any_colour_makes_text_that_can_be_read(accent: str) -> None:
    assert contrast(readable(rgb(accent), _WHITE, (0, 0, 0)), _WHITE) >= 4.5
    assert contrast(readable(rgb(accent), _NIGHT, _WHITE), _NIGHT) >= 4.5
    assert contrast((0, 0, 0), _WHITE) == pytest.approx(21)


def test_a_colour_that_can_be_read_stays_as_it_is() -> None:
    assert "--pico-primary-background: #8a1538;" in stylesheet("#8a1538")


@pytest.fixture
def branded(tmp_path: Path, files: Path) -> Iterator[World]:
    brand = {
        "logo": str(files / "logo.svg"),
        "accent": "#8A1538",
        "terms": str(files / "terms.txt"),
        "contact": "help@example.org",
    }
    world = World(tmp_path, brand=brand, title="Campus desktops")
    world.portal.accounts.add("ada", PASSWORD)
    yield world
    world.close()


def test_the_pages_show_what_the_site_calls_its_own(branded: World) -> None:
    browser = Browser(create_app(branded.portal))
    page = browser.get("/login").text
    version = branded.portal.settings.brand.version
    assert "Campus desktops</a>" in page and 'href="mailto:help@example.org"' in page and 'href="/terms"' in page
    assert f'src="/brand/{version}/logo"' in page
    sheet = browser.get(f"/brand/{version}/accent.css")
    assert sheet.mimetype == "text/css" and "immutable" in sheet.headers["Cache-Control"]
    assert "help@example.org" in browser.get("/nowhere").text
    ada = signed_in(create_app(branded.portal), "ada")
    assert all('href="/terms"' in ada.get(path).text.split("<footer")[0] for path in ("/launch", "/launch/desktop"))


def test_which_terms_somebody_launched_under_is_on_record(branded: World, files: Path, tmp_path: Path) -> None:
    ada = signed_in(create_app(branded.portal), "ada")
    found = re.search(r'name="seal" value="([^"]+)"', ada.get("/launch/desktop").text)
    assert found
    ada.post("/launch/desktop", {"seal": found[1]}, token=ada.csrf("/desktops"))
    (entry,) = (entry for entry in branded.portal.audit.newest() if entry.action == "launch")
    before = branded.portal.settings.brand.terms_name
    assert entry.detail == f"desktop, terms {before}" and len(before) == 12
    (files / "terms.txt").write_text("Another rule.")
    (tmp_path / "again").mkdir()
    other = World(tmp_path / "again", brand={"terms": str(files / "terms.txt")})
    assert other.portal.settings.brand.terms_name not in ("", before)
    other.close()


def test_a_logo_is_a_picture_and_nothing_more(branded: World) -> None:
    browser = Browser(create_app(branded.portal))
    logo = browser.get(f"/brand/{branded.portal.settings.brand.version}/logo")
    assert (logo.mimetype, logo.data) == ("image/svg+xml", SVG)
    assert logo.headers["Content-Security-Policy"] == "default-src 'none'; style-src 'unsafe-inline'; sandbox"
    assert logo.headers["X-Content-Type-Options"] == "nosniff"
    other = browser.get("/brand/0123456789abcdef/logo")
    assert other.status_code == 404 and other.headers["Cache-Control"] == "no-store"


def test_terms_are_text_in_the_language_of_the_page(branded: World) -> None:
    browser = Browser(create_app(branded.portal))
    page = browser.get("/terms").text
    assert "<p>First &lt;b&gt;rule&lt;/b&gt;.</p><p>Second rule.</p>" in page
    assert "Première règle." in browser.get("/terms", headers={"Accept-Language": "fr"}).text


def test_a_site_without_a_brand_has_none(tmp_path: Path) -> None:
    world = World(tmp_path)
    browser = Browser(create_app(world.portal))
    page = browser.get("/login").text
    assert "/brand/" not in page and "/terms" not in page and "mailto:" not in page
    version = world.portal.settings.brand.version
    for path in ("/terms", f"/brand/{version}/logo", f"/brand/{version}/accent.css"):
        assert browser.get(path).status_code == 404
    world.close()


@pytest.mark.parametrize("path", ["/a b", "/a//b", "/../x", "/a/../b", "/<x>", "/.x"])
def test_a_path_that_servers_read_differently_is_refused(path: str) -> None:
    with pytest.raises(ValidationError):
        settings(public_url=f"https://site.example{path}")


def test_below_a_path_everything_stays_below_it(tmp_path: Path) -> None:
    public = "https://site.example/desktops"
    world = World(tmp_path, public_url=public + "/", console_url="wss://site.example/desktops/console")
    world.portal.accounts.add("ada", PASSWORD)
    told = world.portal.settings
    assert (told.public_url, told.origin, told.path) == (public, "https://site.example", "/desktops")
    app = create_app(world.portal)
    browser = Browser(app, "https://site.example")
    answer = browser.get("/desktops/desktops?x=1")
    assert answer.headers["Location"] == "/desktops/login?next=/desktops/desktops?x%3D1"
    token = browser.csrf("/desktops/login")
    form = {"user": "ada", "password": PASSWORD, "next": "/desktops/launch"}
    answer = browser.post("/desktops/login", form, token, headers={"Referer": public})
    assert answer.headers["Location"] == "/desktops/launch"
    cookies = [value for value in answer.headers.getlist("Set-Cookie") if value.startswith("__Secure-deskfleet=")]
    assert len(cookies) == 1 and "Path=/desktops;" in cookies[0] + ";" and "Secure" in cookies[0]
    page = browser.get("/desktops/launch").text
    links = [
        part.split('"')[0] for mark in ('href="', 'src="', 'action="', 'hx-get="') for part in page.split(mark)[1:]
    ]
    assert links and all(link.startswith(("/desktops/", "#")) for link in links)
    assert browser.get("/desktops/api/v1/machines").json
    assert browser.get("/desktops/api/v1/openapi.json").json["servers"] == [{"url": "/desktops"}]  # type: ignore[index]
    assert [browser.get(path).status_code for path in ("/", "/login", "/desktopsx", "/api/v1/machines")] == [404] * 4
    token = browser.csrf("/desktops/launch")
    for target in ("/elsewhere", "/desktopsx", "//evil.example"):
        answer = browser.post("/desktops/language", {"language": "fr", "next": target}, token)
        assert answer.headers["Location"] == "/desktops/", "the rest of the host is another application's"
    assert "Path=/desktops/" in answer.headers["Set-Cookie"]
    world.close()
