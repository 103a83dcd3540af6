"""What a site calls its own: logo, colour, terms, contact. Read and judged when the portal starts, served as it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from marshmallow import RAISE, Schema, ValidationError, fields, post_load, validates_schema

from deskfleet.portal.languages import NAMES

_PNG = b"\x89PNG\r\n\x1a\n"
_SVG = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<svg[\s>]", re.DOTALL)
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
_MAIL = re.compile(r"[^\s@<>\"?&]+@[^\s@<>\"?&]+")
_LARGEST_LOGO = 256 * 1024
_LARGEST_TERMS = 256 * 1024
# WCAG 2.2, 1.4.3 asks for 4.5; what is mixed for hovering must not fall below it either.
_CONTRAST = 4.8
_WHITE, _BLACK, _NIGHT = (255, 255, 255), (0, 0, 0), (0x18, 0x1C, 0x25)

Rgb = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Logo:
    """A picture: its bytes and the one type that it is served as."""

    content: bytes
    mimetype: str


@dataclass(frozen=True, slots=True)
class Brand:
    """`accent` is #rrggbb or empty, `terms` the text by language (empty: there are none), `contact` an address for
    mails, or of a page, or empty."""

    logo: Logo | None
    accent: str
    terms: Mapping[str, str]
    contact: str

    @property
    def contact_url(self) -> str:
        """Where the contact leads."""
        return f"mailto:{self.contact}" if _MAIL.fullmatch(self.contact) else self.contact

    @property
    def version(self) -> str:
        """Changes with logo and colour, so that browsers may keep them for ever."""
        content = self.logo.content if self.logo else b""
        return hashlib.sha256(self.accent.encode() + b"\0" + content).hexdigest()[:16]

    @property
    def terms_name(self) -> str:
        """Names the terms as they are now: 12 hex digits; "" when there are none."""
        text = json.dumps(dict(self.terms), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12] if self.terms else ""

    def terms_in(self, language: str) -> str:
        """The terms in a language, else as they are."""
        return self.terms.get(language) or self.terms.get("", "")


PLAIN = Brand(None, "", {}, "")


def _luminance(colour: Rgb) -> float:
    """Relative luminance (WCAG 2.2)."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Rgb, other: Rgb) -> float:
    """The contrast between two colours, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _mix(colour: Rgb, with_: Rgb, share: float) -> Rgb:
    red, green, blue = (round(c + (w - c) * share) for c, w in zip(colour, with_, strict=True))
    return red, green, blue


def readable(colour: Rgb, against: Rgb, towards: Rgb) -> Rgb:
    """The colour, as much nearer to `towards` as it takes to be readable against another one."""
    steps = (_mix(colour, towards, step / 20) for step in range(21))
    return next(mixed for mixed in steps if contrast(mixed, against) >= _CONTRAST)


def rgb(text: str) -> Rgb:
    """#rrggbb as numbers."""
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def _hex(colour: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def stylesheet(accent: str) -> str:
    """Pico's accent in a site's colour: shades of it that can be read, for light and for dark pages."""
    filled = readable(rgb(accent), _WHITE, _BLACK)
    text = readable(rgb(accent), _NIGHT, _WHITE)
    return (
        _rules(":root:not([data-theme])", filled, filled, _mix(filled, _BLACK, 0.2))
        + "@media only screen and (prefers-color-scheme: dark) {\n"
        + _rules(":root:not([data-theme])", text, filled, _mix(text, _WHITE, 0.3))
        + "}\n"
    )


def _rules(selector: str, text: Rgb, filled: Rgb, hover: Rgb) -> str:
    darker = _mix(filled, _BLACK, 0.15)
    values = {
        "--pico-primary": _hex(text),
        "--pico-primary-hover": _hex(hover),
        "--pico-primary-underline": _hex(text) + "80",
        "--pico-primary-hover-underline": _hex(hover),
        "--pico-primary-background": _hex(filled),
        "--pico-primary-border": _hex(filled),
        "--pico-primary-hover-background": _hex(darker),
        "--pico-primary-hover-border": _hex(darker),
        "--pico-primary-focus": _hex(text) + "80",
        "--pico-primary-inverse": "#fff",
        "--busy": _hex(text),
    }
    return f"{selector} {{\n" + "".join(f"  {name}: {value};\n" for name, value in values.items()) + "}\n"


def read_logo(path: str) -> Logo:
    """A logo from its file. Raises ValueError when it is no PNG or SVG, OSError when it can't be read."""
    with Path(path).open("rb") as file:
        content = file.read(_LARGEST_LOGO + 1)
    if len(content) > _LARGEST_LOGO:
        raise ValueError(f"is larger than {_LARGEST_LOGO // 1024} KiB")
    if content.startswith(_PNG):
        return Logo(content, "image/png")
    if _SVG.match(content):
        return Logo(content, "image/svg+xml")
    raise ValueError("is neither a PNG nor an SVG picture")


def read_terms(path: str) -> dict[str, str]:
    """The terms from their file, and from those beside it for single languages: terms.txt, terms.fr.txt.

    Raises ValueError when one is empty, too large or not UTF-8, OSError when the file can't be read.
    """
    plain = Path(path)
    files = {"": plain, **{language: plain.with_suffix(f".{language}{plain.suffix}") for language in NAMES}}
    found = {}
    for language, file in files.items():
        if language and not file.exists():
            continue
        with file.open("rb") as opened:
            content = opened.read(_LARGEST_TERMS + 1)
        try:
            text = content.decode().replace("\r\n", "\n").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{file.name} is not UTF-8 text") from None
        if not text or len(content) > _LARGEST_TERMS:
            raise ValueError(f"{file.name} is empty, or larger than {_LARGEST_TERMS // 1024} KiB")
        found[language] = text
    return found


class BrandSchema(Schema):
    """[portal.brand]: how a site looks. Everything may be left out."""

    class Meta:
        unknown = RAISE

    logo = fields.Str(load_default="")
    accent = fields.Str(load_default="")
    terms = fields.Str(load_default="")
    contact = fields.Str(load_default="")

    @validates_schema
    def _alone(self, data: Mapping[str, Any], **_: Any) -> None:
        wrong: dict[str, list[str]] = {}
        if data["accent"] and not _COLOUR.fullmatch(data["accent"]):
            wrong["accent"] = ["must be a colour as #rrggbb"]
        if data["contact"] and not _MAIL.fullmatch(data["contact"]) and not _is_page(data["contact"]):
            wrong["contact"] = ["must be a mail address, or the address of a page (https://…)"]
        if wrong:
            raise ValidationError(wrong)

    @post_load
    def _make(self, data: dict[str, Any], **_: Any) -> Brand:
        wrong: dict[str, list[str]] = {}
        logo, terms = None, dict[str, str]()
        try:
            logo = read_logo(data["logo"]) if data["logo"] else None
        except (OSError, ValueError) as error:
            wrong["logo"] = [_why(error)]
        try:
            terms = read_terms(data["terms"]) if data["terms"] else {}
        except (OSError, ValueError) as error:
            wrong["terms"] = [_why(error)]
        if wrong:
            raise ValidationError(wrong)
        return Brand(logo, data["accent"].lower(), terms, data["contact"])


def _is_page(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme == "https" and bool(parts.hostname) and text.isprintable() and " " not in text


def _why(error: OSError | ValueError) -> str:
    return f"can't be read: {error.strerror or type(error).__name__}" if isinstance(error, OSError) else str(error)
