"""What administrators do with dead letters and with many desktops, by a page or by the API: each change is audited."""

from __future__ import annotations

from deskfleet.portal.dead_letters import Letter
from deskfleet.portal.desktops import Desktop
from deskfleet.portal.errors import Problem, Refused
from deskfleet.portal.languages import gettext
from deskfleet.portal.services import services
from deskfleet.portal.session_list import Filter
from deskfleet.portal.web import client_address, person

#: So many desktops are stopped by one request: each is a write that must be on the disk.
MOST_STOPS = 500


def replay(name: str) -> Letter:
    """Send a dead letter again. Raises Problem."""
    letter = services().letters.replay(name)
    _note("replay", letter)
    return letter


def discard(name: str) -> Letter:
    """Forget a dead letter. Raises Problem."""
    letter = services().letters.discard(name)
    _note("discard", letter)
    return letter


def discard_all(count: int, up_to: int) -> int:
    """Forget every dead letter up to a number; `count` is how many whoever asks believes them to be.

    Raises:
        Problem: they are not so many.
    """
    letters = services().letters
    if letters.count(up_to) != count:
        raise Problem(Refused.NOT_CONFIRMED)
    dropped = letters.discard_all(up_to)
    services().audit.note(person().user, client_address(), "discard all", detail=f"{dropped} dead letters")
    return dropped


def _note(action: str, letter: Letter) -> None:
    detail = f"{letter.type} of {letter.sender or 'nobody'}, {letter.cause} in {letter.queue}"
    services().audit.note(person().user, client_address(), action, letter.sid or letter.name, detail)


def stop_all(which: Filter, count: int) -> list[Desktop]:
    """Store a stop for each desktop that matches; `count` is how many whoever asks believes them to be.

    Raises:
        Problem: they are not so many, or too many for one request.
    """
    parts, who = services(), person()
    found = [desktop for desktop in parts.desktops.live() if which.matches(desktop)]
    if not found or len(found) != count:
        raise Problem(Refused.NOT_CONFIRMED)
    if len(found) > MOST_STOPS:
        message = gettext("These are more than %(number)s desktops: narrow the filter first.", number=MOST_STOPS)
        raise Problem(Refused.BAD_FIELDS, message)
    for desktop in found:
        # First the line, then the deed: a stop without its line would be nobody's.
        parts.audit.note(who.user, client_address(), "stop", desktop.sid, f"of {desktop.user}, one of {len(found)}")
        parts.outbox.stop(desktop.sid, who.user, who.admin)
    return found
