"""The desktops of everybody, as an administrator narrows them down. Pure but for the ledger that is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

from deskfleet.portal.desktops import Desktop
from deskfleet.schemas.session import State

#: A page shows so many; the filter is for the others.
MOST_SHOWN = 200
_LONGEST = 320


@dataclass(frozen=True, slots=True)
class Filter:
    """Which desktops are meant; what is empty matches all. `text` is looked for in everything that a row shows, the
    others must be equal."""

    user: str = ""
    host: str = ""
    state: str = ""
    machine: str = ""
    text: str = ""

    @classmethod
    def of(cls, given: Mapping[str, str]) -> Filter:
        """From a query or a form; what is no field is left out."""
        return cls(**{field.name: given.get(field.name, "").strip()[:_LONGEST] for field in fields(cls)})

    @property
    def given(self) -> dict[str, str]:
        """The fields that narrow anything."""
        return {name: value for name, value in asdict(self).items() if value}

    def matches(self, desktop: Desktop) -> bool:
        """Whether a desktop is meant."""
        equal = ("user", desktop.user), ("host", desktop.host), ("state", desktop.shown), ("machine", desktop.machine)
        if any(wanted and wanted != found for wanted, found in ((getattr(self, name), v) for name, v in equal)):
            return False
        shown = (desktop.sid, desktop.user, desktop.host, desktop.machine, desktop.title, desktop.sentence)
        return not self.text or any(self.text.casefold() in word.casefold() for word in shown)


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who is signed in or has desktops; counts only."""

    user: str
    logins: int
    running: int
    waiting: int


def people(logins: Mapping[str, int], desktops: Iterable[Desktop]) -> list[Person]:
    """Who is there now, by name; `logins` is how many logins each has."""
    running: dict[str, int] = {}
    waiting: dict[str, int] = {}
    for desktop in desktops:
        counted = waiting if desktop.state == State.QUEUED else running
        counted[desktop.user] = counted.get(desktop.user, 0) + 1
    names = sorted({*logins, *running, *waiting}, key=str.casefold)
    return [Person(name, logins.get(name, 0), running.get(name, 0), waiting.get(name, 0)) for name in names]
