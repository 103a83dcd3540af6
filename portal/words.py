"""Sizes, times and states as people say them, in the language of who asks; in English when nobody does."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from babel.numbers import format_decimal

from deskfleet.portal import details
from deskfleet.portal.languages import N_, gettext, language, ngettext
from deskfleet.schemas.errors import SENTENCES, Reason
from deskfleet.schemas.session import Birth, Outcome, Resources, State
from deskfleet.schemas.template import BIRTHS, TemplateState
from deskfleet.schemas.verdict import Forecast, Outlook

OUTCOMES: dict[Outcome, str] = {
    Outcome.STOPPED: N_("Stopped"),
    Outcome.GUEST_OFF: N_("Shut down from inside"),
    Outcome.DISCONNECTED: N_("Ended after the last viewer left"),
    Outcome.EXPIRED: N_("Reached its end of life"),
    Outcome.IDLE: N_("Ended because nobody used it"),
    Outcome.CANCELLED: N_("Cancelled before it started"),
    Outcome.REJECTED: N_("Refused"),
    Outcome.NO_CAPACITY: N_("Found no room"),
    Outcome.FAILED: N_("Failed"),
    Outcome.LOST: N_("Lost with its host"),
}

#: The states of a desktop as badges show them; `saved`, `sent` and `unknown` are the portal's own.
STATES: dict[str, str] = {
    "saved": N_("saved"),
    "sent": N_("sent"),
    "unknown": N_("unknown"),
    State.QUEUED: N_("queued"),
    State.ASSIGNED: N_("assigned"),
    State.STARTING: N_("starting"),
    State.RUNNING: N_("running"),
    State.STOPPING: N_("stopping"),
    State.ENDED: N_("ended"),
}

_TEMPLATES: dict[TemplateState, str] = {
    TemplateState.WAITING: N_("waits to be made"),
    TemplateState.BUILDING: N_("is being made"),
    TemplateState.TESTING: N_("is being tried"),
    TemplateState.READY: N_("ready"),
    TemplateState.RESTING: N_("rests: forks of it failed"),
    TemplateState.FAILED: N_("could not be made"),
    TemplateState.DROPPED: N_("dropped"),
}


def state(name: str) -> str:
    """A state of a desktop."""
    return gettext(STATES[name])


def outcome(found: Outcome | None) -> str:
    """How a desktop ended."""
    return gettext(OUTCOMES[found] if found else N_("Ended"))


#: Why a message died, in the broker's words (RabbitMQ, x-death).
CAUSES = {
    "rejected": N_("nobody could read or apply it"),
    "expired": N_("nobody took it in time"),
    "delivery_limit": N_("it was tried too often"),
    "maxlen": N_("the queue was full"),
}


def cause(name: str) -> str:
    """Why a message died; a word that is not known is shown as it is."""
    return gettext(CAUSES[name]) if name in CAUSES else name or gettext("unknown")


def reason(found: Reason | None) -> str:
    """The sentence of a reason; empty when there is none."""
    return gettext(SENTENCES[found]) if found else ""


def birth(name: str) -> str:
    """How a desktop came to be; empty while that is not known."""
    return gettext(BIRTHS[Birth(name)]) if name else ""


def template_state(state: TemplateState) -> str:
    """How far a host is with a template."""
    return gettext(_TEMPLATES[state])


def number(value: float) -> str:
    """With at most one decimal: 3, 1.5"""
    return format_decimal(value, format="0.#", locale=language())


def memory(mib: int) -> str:
    """512 MiB, 1 GiB, 1.5 GiB."""
    if mib < 1024:
        return gettext("%(number)s MiB", number=mib)
    if mib < 1024 * 1024:
        return gettext("%(number)s GiB", number=number(mib / 1024))
    return gettext("%(number)s TiB", number=number(mib / 1024 / 1024))


def size(resources: Resources, between: str = " · ") -> str:
    """2 CPUs · 4 GiB memory · 20 GiB disk · 1 GPU"""
    parts = [
        ngettext("%(num)s CPU", "%(num)s CPUs", resources.cpus),
        gettext("%(amount)s memory", amount=memory(resources.memory_mib)),
        gettext("%(number)s GiB disk", number=resources.disk_gib),
    ]
    if resources.gpus:
        gpus = ngettext("%(num)s GPU", "%(num)s GPUs", resources.gpus)
        parts.append(f"{gpus} {resources.gpu_model}".rstrip())
    return between.join(parts)


def duration(seconds: float) -> str:
    """45 s, 5 min, 2 h 5 min, 3 days 4 h; rounded down."""
    left = max(0, int(seconds))
    days, left = divmod(left, 86_400)
    hours, left = divmod(left, 3600)
    minutes, rest = divmod(left, 60)
    if days:
        return ngettext("%(num)s day", "%(num)s days", days) + (f" {hours} h" if hours else "")
    if hours:
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    return f"{minutes} min" if minutes else f"{rest} s"


def about(seconds: float) -> str:
    """An estimate, in whole minutes rounded up: 1 min, 12 min, 2 h 5 min"""
    return duration(60 * max(1, math.ceil(seconds / 60)))


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th; 1er, 2e"""
    if language() == "fr":
        return "1er" if number == 1 else f"{number}e"
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def forecast(found: Forecast | None) -> str:
    """What a request can expect, in the words of the launch page; None means that nobody can tell."""
    if found is None:
        return gettext("Whether it starts at once can't be told right now.")
    if found.outlook is Outlook.NOW:
        return gettext("Ready at once") if found.instant else gettext("Starts now")
    if found.outlook is Outlook.NEVER:
        if found.largest:
            return gettext("Never fits: the largest is %(size)s", size=size(found.largest, ", "))
        return gettext("Never fits. %(why)s", why=_why(found))
    place = gettext("%(place)s in the queue", place=ordinal(found.place)) if found.place else ""
    if found.estimate_s is None:
        return gettext("Waits; nobody can tell how long") + (f" ({place})" if place else "")
    return gettext("Waits: about %(time)s", time=about(found.estimate_s)) + (f", {place}" if place else "")


def never(found: Forecast) -> str:
    """Why a launch is refused that would never fit, with the largest size that would."""
    if not found.largest:
        return _why(found)
    largest = gettext("The largest that fits is %(size)s.", size=size(found.largest, ", "))
    return f"{_why(found)} {largest}"


def _why(found: Forecast) -> str:
    return details.say(found.why) if found.why else reason(Reason.NEVER_FITS)


def detail(text: str) -> str:
    """What the scheduler noted in English beside a step, as far as the form of it is known."""
    return details.say(text)


def ago(then: float, now: float) -> str:
    """just now, 20 s ago, 3 h 2 min ago"""
    return gettext("just now") if now - then < 2 else gettext("%(time)s ago", time=duration(now - then))


def offset(seconds: float) -> str:
    """The time since the click: +0.12 s, +14 s, +3 min"""
    if seconds < 10:
        return "+" + format_decimal(max(0.0, seconds), format="0.00", locale=language()) + " s"
    return f"+{duration(seconds)}"


def utc(at: float) -> str:
    """A time that a page shows in full when asked."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def iso(at: float) -> str:
    """The same for programs (RFC 3339)."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def ladder(low: int, default: int, high: int, chosen: int) -> list[int]:
    """The sizes that a form offers within a range: doubling from the lowest, with the default, the highest, and what
    was chosen before."""
    steps = {low, default, high} | ({chosen} if low <= chosen <= high else set())
    step = 1
    while step < high:
        if step > low:
            steps.add(step)
        step *= 2
    return sorted(steps)


def image_state(fetch: str, done: int, mib: int, detail: str) -> str:
    """How far an image is on a host: held; fetching, 40 % of 19.5 GiB; waits for its turn; failed: …"""
    if fetch == "fetching":
        if mib:
            return gettext("fetching, %(percent)s %% of %(size)s", percent=done, size=memory(mib))
        return gettext("fetching, %(percent)s %%", percent=done)
    if fetch == "failed":
        return gettext("could not be fetched: %(detail)s", detail=detail)
    return gettext("waits for its turn") if fetch == "waiting" else gettext("held")


def percent(part: float, whole: float) -> int:
    """How full something is, 0 to 100; 0 when it has no size."""
    return max(0, min(100, round(100 * part / whole))) if whole > 0 else 0
