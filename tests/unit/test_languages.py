"""The catalogues: complete, with the same placeholders, and in the typography of their language."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
import translate
from babel.messages.catalog import Catalog, Message
from babel.messages.pofile import read_po

from deskfleet.portal.languages import ENGLISH, NAMES

PORTAL = Path(__file__).parents[2] / "portal"
PLACE = re.compile(r"%\(\w+\)s|%%|\{\w+\}|</?\w+>")


@pytest.fixture(params=[name for name in NAMES if name != ENGLISH])
def catalogue(request: pytest.FixtureRequest) -> Catalog:
    with translate.catalogue_file(request.param).open("rb") as file:
        return read_po(file, locale=request.param)


def forms(message: Message) -> list[tuple[str, str]]:
    """Each form of a text beside its translation; a singular may leave out what a plural says."""
    if isinstance(message.id, str):
        return [(message.id, str(message.string))]
    return [(message.id[-1], text) for text in message.string]


def test_every_text_is_translated_and_no_translation_is_left_over(catalogue: Catalog) -> None:
    """`python deploy/translate.py` brings a catalogue up to date and says what is left to translate."""
    assert {message.id for message in translate.texts(catalogue)} == {
        m.id for m in translate.texts(translate.collect())
    }
    assert translate.untranslated(catalogue) == []
    assert not catalogue.obsolete


def test_translations_have_the_placeholders_and_tags_of_their_text(catalogue: Catalog) -> None:
    for message in translate.texts(catalogue):
        for text, translation in forms(message):
            assert sorted(PLACE.findall(translation)) == sorted(PLACE.findall(text)), text
            left = PLACE.sub("", translation)
            assert "%" not in left and "{" not in left and "<" not in left, f"a broken placeholder: {translation}"


def test_french_is_set_as_french_is(catalogue: Catalog) -> None:
    assert catalogue.locale and catalogue.locale.language == "fr"
    for message in translate.texts(catalogue):
        for _, text in forms(message):
            shown = PLACE.sub("x", text)
            assert "'" not in shown and '"' not in shown, f"the apostrophe is ’, quotes are « »: {text}"
            assert not re.search(r"[^\u202f][;!?](\s|$)|[^\u202f]%", shown), f"U+202F before ; ! ? %: {text}"
            assert not re.search(r"[^\u00a0]:(\s|$)", shown), f"U+00A0 before a colon: {text}"
            assert not re.search(r"«[^\u00a0]|[^\u00a0]»", shown), f"U+00A0 inside « »: {text}"


def test_no_text_of_a_template_stands_outside_of_gettext() -> None:
    for path in sorted((PORTAL / "templates").glob("*.html")):
        text = re.sub(r"\{#.*?#\}|\{\{.*?\}\}|\{%.*?%\}", "", path.read_text(), flags=re.DOTALL)
        spoken = re.findall(r'\s(?:title|aria-label|alt|placeholder)="([^"]*)"', text)
        text = unescape(re.sub(r"<!doctype html>|<[^>]*>", " ", text))
        assert not re.findall(r"[^\W\d_]{2,}", " ".join([text, *spoken])), path.name


def test_scripts_say_nothing_but_words_of_the_page() -> None:
    for scripts, page in (("site.js", "base.html"), ("desktop.js desktop-tools.js", "desktop.html")):
        texts = [(PORTAL / "static" / script).read_text() for script in scripts.split()]
        source = re.sub(r"//.*|/\*\*[\s\S]*?\*/", "", "\n".join(texts))
        (given,) = re.findall(r'id="words">\{\{(.*?)\}\}', (PORTAL / "templates" / page).read_text(), re.DOTALL)
        assert set(re.findall(r"\bwords\.(\w+)", source)) == set(re.findall(r'"(\w+)": _\(', given)), scripts
        literals = re.findall(r'"([^"\n]*)"|`([^`]*)`', source)
        assert not [
            text for pair in literals for text in pair if re.search(r"[A-Z][a-z]+ [a-z]+|[a-z] [a-z]+ [a-z]", text)
        ]
