"""The languages that people read: which a request gets, and their catalogues of words.

English stands in the code. A catalogue is read from its .po file when it is first needed and compiled in memory, so
that a fresh clone, a wheel and an upgrade hold no second file that could be missing or old.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path

from babel import Locale
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from babel.support import NullTranslations, Translations
from flask import Flask, has_request_context, request
from flask_babel import Babel, Domain, force_locale, get_domain, get_locale

#: The language of the code, of the API and of the command line.
ENGLISH = "en"
#: Every language that there is a catalogue for, by its own name.
NAMES = {ENGLISH: "English", "fr": "Français"}
COOKIE = "deskfleet-language"
#: By this header the pages' own scripts say which language their page is in; programs get English.
HEADER = "X-Deskfleet-Language"
TRANSLATIONS = Path(__file__).parent / "translations"


def N_(text: str) -> str:
    """Mark a text that stands in a table for translation, which happens where it is used."""
    return text


def gettext(text: str, /, **values: object) -> str:
    """A text in the language of who asks; `values` fill its placeholders, %(name)s."""
    return str(get_domain().gettext(text, **values))


def ngettext(one: str, many: str, num: int) -> str:
    """The form of a text for `num` things; the number stands as %(num)s in it."""
    return str(get_domain().ngettext(one, many, num))


@lru_cache
def catalogue(language: str) -> NullTranslations:
    """The words of one language; for English, the code's own."""
    if language == ENGLISH:
        return NullTranslations()
    compiled = BytesIO()
    with (TRANSLATIONS / language / "LC_MESSAGES" / "messages.po").open("rb") as source:
        write_mo(compiled, read_po(source, locale=language))
    compiled.seek(0)
    return Translations(compiled)


def language() -> str:
    """The language of the answer that is being written; English when none is."""
    locale = get_locale()
    return _name(locale) if locale else ENGLISH


@lru_cache
def _name(locale: Locale) -> str:
    """Its tag, which babel composes anew each time; every text asks for it."""
    return str(locale)


def choose(chosen: str | None, accepted: Sequence[str], offered: Sequence[str], default: str) -> str:
    """A language for a person: what they chose, else the first that their browser accepts, else the site's default.

    `accepted` are language tags in order of preference; of fr-CA the fr counts.
    """
    if chosen in offered:
        return str(chosen)
    for tag in accepted:
        name = tag.partition("-")[0].casefold()
        if name in offered:
            return name
    return default


@contextmanager
def english() -> Iterator[None]:
    """Write in English what is kept for administrators, whatever language the page is in."""
    if not has_request_context():
        yield
        return
    with force_locale(ENGLISH):
        yield


class _Domain(Domain):  # type: ignore[misc]  # flask_babel is not typed
    def get_translations(self) -> NullTranslations:
        return catalogue(language())


class _Babel(Babel):  # type: ignore[misc]
    @cached_property
    def domain_instance(self) -> _Domain:
        return _Domain()


def install(app: Flask, offered: Sequence[str], default: str, api: str) -> None:
    """Let every answer of an application be in the language of who asks; those below `api` only when they say which."""

    def select() -> str:
        if request.path.startswith(api):
            asked = request.headers.get(HEADER, ENGLISH)
            return asked if asked in offered else ENGLISH
        accepted = [tag for tag, quality in request.accept_languages if quality > 0]
        return choose(request.cookies.get(COOKIE), accepted, offered, default)

    _Babel(app, default_locale=default, locale_selector=select)
