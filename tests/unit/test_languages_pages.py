"""Pages, refusals and mails in the language of who reads them; programs get English."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from babel.support import NullTranslations
from flask import Flask
from flask.testing import FlaskClient
from support.furnished import ADMIN, FAILED, PERSON, QUEUED, RUNNING, Shown, furnish
from support.portals import MACHINE, Browser, World, signed_in

from deskfleet.portal import details, languages
from deskfleet.portal.app import create_app
from deskfleet.portal.languages import COOKIE, HEADER, choose
from deskfleet.portal.tables import FIGURES
from deskfleet.scheduler.policy import Caps, Policy
from deskfleet.scheduler.turns import capped
from deskfleet.schemas.machine import GpuPolicy, parse_machine
from deskfleet.schemas.session import Resources

#: What stands on pages and is nobody's text: the data of the furnished world, and each language's own name.
DATA = [
    "Deskfleet",
    "English",
    "Français",
    "Linux desktop",
    "Graphics workstation",
    "Classroom",
    "For tests",
    "ada@example.org",
    "boss",
    "grace@example.org",
    "help@example.org",
    "Shuts down on Friday at 18:00; save your work.",
    "guests are not fully limited: no cpu controller",
    "no way to reset it",
    "A4000",
    "Be kind",
    "kvm",
    "local",
    "login",
    "launch",
    "drain",
    "desktop",
    "UTC",
    " min",
    "workstation",
    "classroom",
    "portal",
    "Nightly run",
    "What is there",
    *sorted(FIGURES, reverse=True),  # what begins with another comes before it
]
PLACE = re.compile(r"(%\(\w+\)s|%%|\{\w+\}|</?\w+>)")


class _Masked(NullTranslations):
    """Every text as it would be in a language whose every letter is ░: what can still be read was not translated."""

    def gettext(self, message: str) -> str:
        return "".join(part if PLACE.fullmatch(part) else re.sub(r"\w", "░", part) for part in PLACE.split(message))

    def ngettext(self, one: str, many: str, num: int) -> str:
        return self.gettext(many)

    ugettext, ungettext = gettext, ngettext


class _Read(HTMLParser):
    """What a page says: its texts, and the attributes that are read out or shown."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self._skip = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip += tag in ("style", "code")
        spoken = ("title", "aria-label", "alt", "placeholder", "data-label", "data-title", "data-what")
        self.said += [value for name, value in attrs if name in spoken and value]

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag in ("style", "code")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.said.append(re.sub(r'"\w+":', "", data) if data.lstrip().startswith("{") else data)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    terms = tmp_path / "terms.txt"
    terms.write_text("Be kind.")
    world = World(tmp_path, brand={"terms": str(terms), "contact": "help@example.org"})
    yield world
    world.close()


@pytest.fixture(autouse=True)
def pages(world: World) -> tuple[Shown, ...]:
    return furnish(world)


@pytest.fixture
def app(world: World) -> Flask:
    return create_app(world.portal)


def speaking(browser: Browser, language: str) -> Browser:
    client: FlaskClient = browser.client
    client.set_cookie(COOKIE, language, domain="127.0.0.1")
    return browser


def test_nothing_on_any_page_is_left_in_english(
    app: Flask, world: World, pages: tuple[Shown, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    browsers = {user: signed_in(app, user) if user else Browser(app) for user in {shown.user for shown in pages}}
    monkeypatch.setattr(languages, "catalogue", lambda name: _Masked() if name == "fr" else NullTranslations())
    left = {}
    for shown in pages:
        page = speaking(browsers[shown.user], "fr").get(shown.path)
        reader = _Read()
        reader.feed(page.text)
        text = " ".join(reader.said).replace("\\u2591", "░")
        for known in [*DATA, "\\u2026", RUNNING]:
            text = text.replace(known, " ")
        text = re.sub(r"\b[0-9a-f]{8,}\b", " ", text)
        words = set(re.findall(r"[A-Za-zÀ-ÿ]{2,}", re.sub(r"\{\w+\}", "", text)))
        left[shown.name] = sorted(words)
        assert "░" in text
    assert {name: words for name, words in left.items() if words} == {}


@pytest.mark.parametrize(
    ("chosen", "accepted", "expected"),
    [
        (None, [], "fr"),
        (None, ["en-GB", "fr"], "en"),
        (None, ["de", "fr-CA", "en"], "fr"),
        (None, ["de"], "fr"),
        ("en", ["fr"], "en"),
        ("de", ["en"], "en"),
        ("../../x", [], "fr"),
    ],
)
def test_the_choice_counts_then_the_browser_then_the_site(
    chosen: str | None, accepted: list[str], expected: str
) -> None:
    assert choose(chosen, accepted, ("en", "fr"), "fr") == expected


def test_a_page_says_its_language_and_that_it_may_be_another(app: Flask) -> None:
    browser = Browser(app)
    page = browser.get("/login", headers={"Accept-Language": "fr-CA,en;q=0.5"})
    assert '<html lang="fr">' in page.text and "Se connecter" in page.text
    assert "Accept-Language" in page.headers["Vary"]
    assert '<html lang="en">' in browser.get("/login", headers={"Accept-Language": "de,fr;q=0"}).text


def test_a_site_offers_what_it_is_told_to(world: World) -> None:
    app = create_app(world.build(languages=["fr"]))
    page = Browser(app).get("/login", headers={"Accept-Language": "en"})
    assert '<html lang="fr">' in page.text and "/language" not in page.text


def test_the_switch_sets_a_cookie_goes_back_and_is_remembered_for_mails(app: Flask, world: World) -> None:
    ada = signed_in(app, PERSON)
    assert world.portal.people.language(PERSON) == "en"
    answer = ada.post("/language", {"language": "fr", "next": "/desktops?x=1"})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/desktops?x=1")
    (cookie,) = [value for value in answer.headers.getlist("Set-Cookie") if value.startswith(COOKIE)]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Path=/" in cookie
    assert "Mes bureaux" in ada.get("/desktops").text
    assert world.portal.people.language(PERSON) == "fr"
    assert ada.post("/language", {"language": "fr", "next": "//evil.example"}).headers["Location"] == "/"
    assert ada.post("/language", {"language": "xx", "next": "/"}).status_code == 422
    assert ada.client.post("/language", data={"language": "en"}).status_code == 400, "no token of ours"


def test_programs_get_english_and_the_pages_own_scripts_their_language(app: Flask) -> None:
    ada = speaking(signed_in(app, PERSON), "fr")
    path, headers = f"/api/v1/sessions/{RUNNING}", {"Accept-Language": "fr"}
    assert ada.get(path, headers=headers).json["sentence"] == "It runs on host h1."  # type: ignore[index]
    french = ada.get(path, headers={HEADER: "fr"}).json["sentence"]  # type: ignore[index]
    assert french == "Il fonctionne sur l’hôte h1."
    assert ada.get(path, headers={HEADER: "xx"}).json["sentence"] == "It runs on host h1."  # type: ignore[index]


def test_french_pages_say_sentences_with_figures_in_french(app: Flask) -> None:
    ada = speaking(signed_in(app, PERSON), "fr")
    page = ada.get(f"/progress/{QUEUED}").text
    assert "h1: 2,1 Gio de mémoire libres sur 31,0, 8,1 demandés" in page.replace("\u00a0", " ")
    assert "sans nouvelles depuis 900" in page and "Vous êtes <strong>2e</strong>" in page
    assert "Échec. La machine virtuelle" in ada.get(f"/progress/{FAILED}").text


def test_the_audit_stays_english(app: Flask, world: World) -> None:
    boss = speaking(signed_in(app, ADMIN), "fr")
    world.session("e" * 32, PERSON, lifetime_s=25 * 3600)
    assert boss.post(f"/desktops/{'e' * 32}/extend").status_code == 303
    assert world.portal.audit.newest(1)[0].detail == f"to 1 day 2 h, of {PERSON}"


def known(text: str) -> bool:
    """Whether a sentence, and each that stands in it, has a form; the entries of a list of caps are tried by say()."""
    found = details.form_of(text)
    return found is not None and ("text" not in found[1] or known(found[1]["text"]))


def test_every_cap_and_every_fault_of_a_size_has_a_form() -> None:
    want = Resources(4, 2048, 10, 1)
    for caps in (Caps(sessions=0), Caps(cpus=1), Caps(memory_mib=1), Caps(gpus=0)):
        for policy in (Policy(user_caps=caps), Policy(group_caps=(("staff", caps),))):
            broken = capped("ada", ("staff",), want, {}, {}, policy)
            assert broken is not None and known(broken.detail)
    needs = parse_machine("m", MACHINE.format(title="M", gpu="required", users="[]", digest="ab" * 32))
    takes = replace(needs, gpu=GpuPolicy.OPTIONAL, gpu_models=("A100",))
    none = replace(needs, gpu=GpuPolicy.NEVER)
    faults = [
        *needs.problems(Resources(99, 1, 999)),
        *needs.problems(replace(want, gpus=2)),
        *takes.problems(replace(want, gpu_model="T4")),
        *none.problems(want),
    ]
    assert len(faults) == 7 and all(known(fault) for fault in faults)


@pytest.mark.parametrize(
    ("english", "french"),
    [
        ("7 hosts: The host has too little free memory.", "7 hôtes : L’hôte n’a pas assez de mémoire libre."),
        ("you have 3 of 4 CPUs in use, 2 wanted", "vous avez 3 CPU utilisés sur 4, 2 demandés"),
        (
            "the largest that fits is 4 CPUs, 7.5 GiB of memory, 50 GiB of disk",
            "la plus grande taille possible est 4 CPU, 7,5 Gio de mémoire, 50 Gio de disque",
        ),
        (
            "No host could ever give this size. Choose a smaller one. One person may have at most: 4 CPUs, 2 desktops.",
            "Aucun hôte ne pourra jamais offrir cette taille. Choisissez-en une plus petite. "
            "Une personne peut avoir au plus : 4 CPU, 2 bureaux.",
        ),
        ("fetching the image, 40 %", "récupère l’image, 40 %"),
        ("something that nobody foresaw: 5 %", "something that nobody foresaw: 5 %"),
        ("CPUs: 99 is not between 1 and 8", "CPU : 99 n’est pas compris entre 1 et 8"),
    ],
)
def test_sentences_of_other_parts_are_said_by_their_form(app: Flask, english: str, french: str) -> None:
    with app.test_request_context("/login", headers={"Accept-Language": "fr"}):
        assert details.say(english).replace("\u00a0", " ").replace("\u202f", " ") == french
    with app.test_request_context("/login", headers={"Accept-Language": "en"}):
        assert details.say(english) == english
