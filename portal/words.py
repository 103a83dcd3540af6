"""Sizes, times and states as people say them. Pure."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from deskfleet.schemas.errors import SENTENCES, Reason
from deskfleet.schemas.session import Outcome, Resources
from deskfleet.schemas.verdict import Forecast, Outlook

OUTCOMES: dict[Outcome, str] = {
    Outcome.STOPPED: "Stopped",
    Outcome.GUEST_OFF: "Shut down from inside",
    Outcome.DISCONNECTED: "Ended after the last viewer left",
    Outcome.EXPIRED: "Reached its end of life",
    Outcome.IDLE: "Ended because nobody used it",
    Outcome.CANCELLED: "Cancelled before it started",
    Outcome.REJECTED: "Refused",
    Outcome.NO_CAPACITY: "Found no room",
    Outcome.FAILED: "Failed",
    Outcome.LOST: "Lost with its host",
}


def memory(mib: int) -> str:
    """512 MiB, 1 GiB, 1.5 GiB."""
    if mib < 1024:
        return f"{mib} MiB"
    amount, unit = (mib / 1024, "GiB") if mib < 1024 * 1024 else (mib / 1024 / 1024, "TiB")
    return f"{round(amount, 1):g} {unit}"


def size(resources: Resources, between: str = " · ") -> str:
    """2 CPUs · 4 GiB memory · 20 GiB disk · 1 GPU"""
    parts = [
        f"{resources.cpus} CPU{'s' if resources.cpus != 1 else ''}",
        f"{memory(resources.memory_mib)} memory",
        f"{resources.disk_gib} GiB disk",
    ]
    if resources.gpus:
        parts.append(f"{resources.gpus} GPU{'s' if resources.gpus != 1 else ''} {resources.gpu_model}".rstrip())
    return between.join(parts)


def duration(seconds: float) -> str:
    """45 s, 5 min, 2 h 5 min, 3 days 4 h; rounded down."""
    left = max(0, int(seconds))
    days, left = divmod(left, 86_400)
    hours, left = divmod(left, 3600)
    minutes, rest = divmod(left, 60)
    if days:
        return f"{days} day{'s' if days > 1 else ''}" + (f" {hours} h" if hours else "")
    if hours:
        return f"{hours} h" + (f" {minutes} min" if minutes else "")
    return f"{minutes} min" if minutes else f"{rest} s"


def about(seconds: float) -> str:
    """An estimate, in whole minutes rounded up: 1 min, 12 min, 2 h 5 min"""
    return duration(60 * max(1, math.ceil(seconds / 60)))


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th"""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def forecast(found: Forecast | None) -> str:
    """What a request can expect, in the words of the launch page; None means that nobody can tell."""
    if found is None:
        return "Whether it starts at once can't be told right now."
    if found.outlook is Outlook.NOW:
        return "Starts now"
    if found.outlook is Outlook.NEVER:
        return (
            f"Never fits: the largest is {size(found.largest, ', ')}" if found.largest else f"Never fits. {_why(found)}"
        )
    place = f"{ordinal(found.place)} in the queue" if found.place else ""
    if found.estimate_s is None:
        return "Waits; nobody can tell how long" + (f" ({place})" if place else "")
    return f"Waits: about {about(found.estimate_s)}" + (f", {place}" if place else "")


def never(found: Forecast) -> str:
    """Why a launch is refused that would never fit, with the largest size that would."""
    return _why(found) + (f" The largest that fits is {size(found.largest, ', ')}." if found.largest else "")


def _why(found: Forecast) -> str:
    return found.why or SENTENCES[Reason.NEVER_FITS]


def ago(then: float, now: float) -> str:
    """just now, 20 s ago, 3 h 2 min ago"""
    return "just now" if now - then < 2 else f"{duration(now - then)} ago"


def offset(seconds: float) -> str:
    """The time since the click: +0.12 s, +14 s, +3 min"""
    if seconds < 10:
        return f"+{max(0.0, seconds):.2f} s"
    return f"+{duration(seconds)}"


def utc(at: float) -> str:
    """A time that a page shows in full when asked."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def iso(at: float) -> str:
    """The same for programs (RFC 3339)."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def ladder(low: int, default: int, high: int) -> list[int]:
    """The sizes that a form offers within a range: doubling from the lowest, with the default and the highest."""
    steps = {low, default, high}
    step = 1
    while step < high:
        if step > low:
            steps.add(step)
        step *= 2
    return sorted(steps)


def image_state(state: str, done: int, mib: int, detail: str) -> str:
    """How far an image is on a host: held; fetching, 40 % of 19.5 GiB; waits for its turn; failed: …"""
    if state == "fetching":
        return f"fetching, {done} %" + (f" of {memory(mib)}" if mib else "")
    if state == "failed":
        return f"could not be fetched: {detail}"
    return "waits for its turn" if state == "waiting" else state


def percent(part: float, whole: float) -> int:
    """How full something is, 0 to 100; 0 when it has no size."""
    return max(0, min(100, round(100 * part / whole))) if whole > 0 else 0
