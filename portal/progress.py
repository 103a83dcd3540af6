"""The way from the click to the desktop, as the progress page draws it. Pure."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

from deskfleet.portal import words
from deskfleet.portal.desktops import Desktop, Story
from deskfleet.portal.languages import N_, gettext
from deskfleet.portal.words import ordinal
from deskfleet.schemas.session import Event, State

# A desktop that is on its way well mostly starts within this time, and a person watches every step of it.
_CLOSE_WATCH_S = 3.0
_FAST_MS, _SLOW_MS = 150, 1000
# The page counts the seconds of the first minute by itself; after it, the time is told in minutes.
_COUNTED_S = 60

#: What each stage waits for: its name, and the states of a desktop that has reached it.
_STAGES: tuple[tuple[str, frozenset[str]], ...] = (
    (N_("Asked for"), frozenset({"saved", "sent", "queued", "assigned", "starting", "running"})),
    (N_("Taken up"), frozenset({"queued", "assigned", "starting", "running"})),
    (N_("Host chosen"), frozenset({"assigned", "starting", "running"})),
    (N_("Starting"), frozenset({"starting", "running"})),
    (N_("Ready"), frozenset({"running"})),
)
_EVENTS = {Event.PLACE: 2, Event.ACCEPTED: 3, Event.READY: 4}


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: "done", "current" (waited for) or "ahead"; `after_s` is when it was reached, from the click, `note`
    how."""

    name: str
    status: str
    after_s: float | None
    note: str = ""

    @property
    def counted(self) -> bool:
        """Whether its seconds go on while the page is looked at."""
        return self.status == "current" and self.after_s is not None and self.after_s < _COUNTED_S


def stages(story: Story, now: float) -> list[Stage]:
    """The stages of a desktop's start, in order. A desktop that went back to the queue begins again after Taken up."""
    desktop = story.desktop
    since = story.asked_at
    taken_up = desktop.created_at if _reached(desktop, 1) or story.steps else None
    times: list[float | None] = [since, taken_up, None, None, None]
    for step in story.steps:
        if step.event is Event.RETRY:
            times[2:] = [None, None, None]
        elif step.event in _EVENTS:
            times[_EVENTS[step.event]] = step.at
    reached = [_reached(desktop, number) for number in range(len(_STAGES))]
    if desktop.over or desktop.state == State.STOPPING:
        reached = [True, *(time is not None for time in times[1:])]
    first_ahead = reached.index(False) if False in reached else len(reached)
    found = []
    for number, (name, _) in enumerate(_STAGES):
        status = "done" if number < first_ahead else "ahead"
        if number == first_ahead and desktop.waiting:
            status = "current"
        at = times[number] if status == "done" else now if status == "current" else None
        found.append(Stage(gettext(name), status, None if at is None else max(0.0, at - since)))
    found[-1] = replace(found[-1], note=words.birth(desktop.birth))
    return found


def headline(story: Story) -> str:
    """How far it is, in the words of a tab that is not looked at."""
    desktop = story.desktop
    if desktop.over:
        return gettext("Ended")
    if desktop.host_silent:
        return gettext("Unknown")
    if desktop.running:
        return gettext("Ready")
    if desktop.state == State.STOPPING:
        return gettext("Stopping")
    if story.place:
        return gettext("%(place)s in the queue", place=ordinal(story.place))
    return gettext("Starting") if desktop.host else gettext("Waiting")


def _reached(desktop: Desktop, number: int) -> bool:
    return desktop.state in _STAGES[number][1]


def pause_ms(desktop: Desktop, now: float) -> int:
    """How long the page waits before it asks again; 0 when there is nothing left to ask."""
    if desktop.over:
        return 0
    fresh = min(abs(now - desktop.created_at), abs(now - desktop.changed_at)) < _CLOSE_WATCH_S
    return _FAST_MS if fresh else _SLOW_MS


def look(desktop: Desktop, now: float, *about: str) -> str:
    """A short hash over what decides how a desktop's progress is shown, but for the time that has passed; `about` is
    what the page itself depends on.

    Steps are not asked for: the scheduler writes them with the session, which changes with each.
    """
    shown = (replace(desktop, time_left_s=None), pause_ms(desktop, now), about)
    return hashlib.blake2b(repr(shown).encode(), digest_size=8).hexdigest()


def good_until(story: Story, now: float) -> int:
    """Until when (UNIX seconds) the times on a page stay right while nothing happens: the next full minute."""
    minutes = math.floor((now - story.asked_at) / _COUNTED_S) + 1
    return math.ceil(story.asked_at + minutes * _COUNTED_S)
