"""When a guest ends by itself, and what it is told before: lifetime, idleness, and who looks at it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from deskfleet.schemas.errors import Reason
from deskfleet.schemas.messages import VmStart
from deskfleet.schemas.session import Outcome

#: A guest that uses more than this share of one CPU, beyond a few seconds of housekeeping, is at work.
BUSY_SHARE = 0.05
BUSY_S = 5.0

#: How long before an end a guest is told, in minutes. Of a time hardly longer than that, nothing is told.
WARN_MIN = (30, 5)
IDLE_WARN_MIN = (5,)


@dataclass(slots=True)
class Watch:
    """What is known of a live guest in this life of the agent only. Times are seconds on the boot-time clock."""

    viewers: int = 0
    seen: bool = False
    empty_since: float | None = None
    used_at: float | None = None
    cpu_s: float = 0.0
    touched: int = 0
    warned: set[tuple[str, int]] = field(default_factory=set)


def count_viewers(watch: Watch, count: int, now: float) -> None:
    """So many consoles are open now. Who comes or goes uses the guest."""
    if watch.viewers != count:
        watch.viewers = count
        watch.seen = watch.seen or count > 0
        watch.empty_since = None if count else now
        watch.used_at = None


def notice_use(watch: Watch, cpu_s: float | None, touched: int, now: float) -> None:
    """Look whether a guest was used since the last look: a person typed or pointed, or it computed. A job that runs
    without a viewer is use, a window left open over night is none. What can't be told (None) counts as use."""
    busy = cpu_s is None or (
        watch.used_at is not None and cpu_s - watch.cpu_s > BUSY_SHARE * (now - watch.used_at) + BUSY_S
    )
    if watch.used_at is None or touched != watch.touched or busy:
        watch.used_at, watch.cpu_s, watch.touched = now, cpu_s or 0.0, touched


def due(start: VmStart, watch: Watch, left_s: float, now: float) -> tuple[Outcome, Reason] | None:
    """Why a running guest must end now, if it must. `left_s` are the seconds left of its lifetime."""
    if left_s <= 0:
        return Outcome.EXPIRED, Reason.EXPIRED
    if start.idle_s and watch.used_at is not None and now - watch.used_at >= start.idle_s:
        return Outcome.IDLE, Reason.IDLE
    if start.persistent or watch.empty_since is None:
        return None
    if watch.seen and now - watch.empty_since >= start.grace_s:
        return Outcome.DISCONNECTED, Reason.DISCONNECTED
    if not watch.seen and now - watch.empty_since >= start.connect_s:
        return Outcome.DISCONNECTED, Reason.NEVER_CONNECTED
    return None


def warnings(start: VmStart, watch: Watch, left_s: float, now: float) -> list[str]:
    """What the person in the guest has to be told now; each is told once, and again when its time was put off."""
    texts = []
    if _new(watch, "life", left_s, start.lifetime_s, WARN_MIN):
        texts.append(f"This desktop ends in {_minutes(left_s)}. Save your work.")
    if start.idle_s and watch.used_at is not None:
        idle_left_s = watch.used_at + start.idle_s - now
        if _new(watch, "idle", idle_left_s, start.idle_s, IDLE_WARN_MIN):
            texts.append(f"Nobody uses this desktop. It ends in {_minutes(idle_left_s)}, unless somebody does.")
    return texts


def _new(watch: Watch, what: str, left_s: float, whole_s: int, steps: tuple[int, ...]) -> bool:
    """Whether a step was reached that was not told yet; steps that lie ahead again can be told again."""
    reached = {(what, minutes) for minutes in steps if left_s <= 60 * minutes and whole_s >= 2 * 60 * minutes}
    told = {step for step in watch.warned if step[0] == what}
    watch.warned -= told - reached
    watch.warned |= reached
    return bool(reached - told)


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min"
