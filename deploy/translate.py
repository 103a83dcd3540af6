"""python deploy/translate.py: collect the texts that people read, and bring the catalogues (.po) up to date with them.

Keeps every translation whose English text is still there, adds new texts without one, drops the others, and prints what
is left to translate (exit 1). Texts are what stands in _(…), gettext(…), ngettext(…) and N_(…), and the sentences of
deskfleet.schemas.errors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po, write_po

from deskfleet.portal.languages import ENGLISH, NAMES, TRANSLATIONS
from deskfleet.schemas.errors import SENTENCES
from deskfleet.schemas.template import BIRTHS

ROOT = Path(__file__).parents[1]
_METHODS = [("**.py", "python"), ("templates/**.html", "jinja2")]
_KEYWORDS = {"_": None, "gettext": None, "N_": None, "ngettext": (1, 2)}
_SENTENCES = "schemas/errors.py"
_BIRTHS = "schemas/template.py"
_HEADER = """\
# Texts of Deskfleet in another language; deploy/translate.py keeps them in step with the code.
# French typography: ’ is the apostrophe, a narrow no-break space (U+202F) stands before ; ! ? %, a no-break space
# (U+00A0) before : and inside « », and between a figure and its unit."""


def catalogue_file(language: str) -> Path:
    """Where a language's catalogue stands."""
    return TRANSLATIONS / language / "LC_MESSAGES" / "messages.po"


def collect() -> Catalog:
    """Every text of the portal, with the files that use it, in an order that does not change by itself."""
    found: dict[str | tuple[str, ...], set[str]] = {}
    options = {"templates/**.html": {"extensions": "jinja2.ext.i18n", "silent": "false"}}
    for file, _, message, _, _ in extract_from_dir(ROOT / "portal", _METHODS, options, _KEYWORDS):
        found.setdefault(message, set()).add(f"portal/{file}")
    for sentence in SENTENCES.values():
        found.setdefault(sentence, set()).add(_SENTENCES)
    for sentence in BIRTHS.values():
        found.setdefault(sentence, set()).add(_BIRTHS)
    catalog = Catalog(project="deskfleet", charset="utf-8", fuzzy=False)
    for message, files in sorted(found.items(), key=lambda item: (min(item[1]), str(item[0]))):
        flags = ["python-format"] if "%(" in str(message) else []
        catalog.add(message, locations=[(file, 0) for file in sorted(files)], flags=flags)
    return catalog


def merge(old: Catalog, language: str) -> Catalog:
    """The texts of now with the translations that `old` has for them."""
    new = Catalog(
        locale=language,
        project="deskfleet",
        version="1",
        charset="utf-8",
        fuzzy=False,
        creation_date=old.creation_date,
        revision_date=old.creation_date,
        last_translator="-",
        language_team="-",
        msgid_bugs_address="-",
        header_comment=_HEADER,
    )
    if old:
        # Not Babel's own, which change with its releases: to French, 2.19 gives a third form, for millions.
        new.mime_headers = [("Plural-Forms", old.plural_forms)]
    for message in texts(collect()):
        known = old.get(message.id)
        new.add(message.id, known.string if known else "", locations=message.locations, flags=message.flags)
    return new


def texts(catalog: Catalog) -> Iterator[Message]:
    """The entries without the header."""
    return (message for message in catalog if message.id)


def untranslated(catalog: Catalog) -> list[str]:
    """What has no translation, or one that nobody has looked at."""
    return [
        str(message.id)
        for message in texts(catalog)
        if message.fuzzy or not all([message.string] if isinstance(message.string, str) else message.string)
    ]


def main() -> int:
    """Write the catalogues."""
    left = []
    for language in NAMES:
        if language == ENGLISH:
            continue
        path = catalogue_file(language)
        old = Catalog(locale=language)
        if path.exists():
            with path.open("rb") as file:
                old = read_po(file, locale=language)
        new = merge(old, language)
        with path.open("wb") as file:
            write_po(file, new, width=0, omit_header=False, include_lineno=False, ignore_obsolete=True)
        left += [f"{language}: {text}" for text in untranslated(new)]
    print("\n".join(left) or "everything is translated")
    return bool(left)


if __name__ == "__main__":
    sys.exit(main())
