"""What a report means for the ledger. Pure.

A guest's entry is read the same way whether it came as an event or in a heartbeat, so a lost event costs only time.
The one conclusion that needs a whole heartbeat is absence: a session is proven absent from its host when the host
has processed its command number (`generation <= last_generation`) and does not list it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from deskfleet.schemas.errors import Reason
from deskfleet.schemas.host import GuestReport, HostReport, Phase
from deskfleet.schemas.session import Birth, Event, Outcome, Session, State

#: Refusals that say nothing about the host: the command was late, and costs the session no attempt.
NOT_COUNTED = frozenset({Reason.STALE, Reason.FENCED})


@dataclass(frozen=True, slots=True)
class Step:
    """An event for a session of the ledger; `counted` when a failure of the host stands behind it."""

    session: Session
    event: Event
    outcome: Outcome | None = None
    reason: Reason | None = None
    detail: str = ""
    counted: bool = False
    birth: Birth | None = None


@dataclass(frozen=True, slots=True)
class StopGuest:
    """A guest that must not run: unknown, ended, or the stale copy of a session that lives elsewhere."""

    sid: str
    generation: int
    outcome: Outcome
    reason: Reason


@dataclass(frozen=True, slots=True)
class LetRun:
    """A guest that does not know yet for how long it may run."""

    session: Session


Action = Step | StopGuest | LetRun


def on_guest(session: Session | None, host: str, guest: GuestReport, max_attempts: int) -> Action | None:
    """What one guest's entry asks for; None when ledger and host agree."""
    if session is None or not session.on_host or session.host != host:
        return _stray(session, guest)
    if guest.generation != session.generation:
        # An older copy on the same host is this very guest: the start that is on its way raises its number.
        # A newer one can't be: numbers come from us. Either way the next report settles it.
        return None
    if guest.phase is Phase.ENDED:
        return _ended(session, guest, max_attempts)
    if session.state is State.STOPPING:
        return None  # the sweep repeats the stop
    if guest.phase is Phase.STOPPING:
        return Step(session, Event.STOP, guest.outcome or Outcome.STOPPED, guest.reason, guest.detail)
    if guest.phase is Phase.RUNNING and session.state is not State.RUNNING:
        return Step(session, Event.READY, birth=guest.birth)
    if guest.phase is Phase.STARTING and session.state is State.ASSIGNED:
        return Step(session, Event.ACCEPTED)
    if guest.phase is Phase.RUNNING and guest.lifetime_s is not None and guest.lifetime_s < session.lifetime_s:
        return LetRun(session)
    if guest.phase is Phase.RUNNING and guest.detail != session.detail:
        return Step(session, Event.TELL, detail=guest.detail)
    return None


def _stray(session: Session | None, guest: GuestReport) -> StopGuest | None:
    if guest.phase in (Phase.ENDED, Phase.STOPPING):
        return None
    outcome = (session.outcome if session else None) or Outcome.STOPPED
    return StopGuest(guest.sid, guest.generation, outcome, Reason.ORPHAN)


def _ended(session: Session, guest: GuestReport, max_attempts: int) -> Step:
    outcome = guest.outcome or Outcome.FAILED
    never_ran = not guest.ran and session.state in (State.ASSIGNED, State.STARTING)
    if never_ran and outcome is Outcome.FAILED:
        return failed_start(session, guest.reason, guest.detail, max_attempts)
    return Step(session, Event.GONE, outcome, guest.reason, guest.detail)


def failed_start(session: Session, reason: Reason | None, detail: str, max_attempts: int) -> Step:
    """A session that its host could not start: to the queue again, or given up after `max_attempts` failures."""
    counted = reason not in NOT_COUNTED
    if counted and session.attempt + 1 >= max_attempts:
        text = f"{session.host}: {detail}" if detail else session.host
        return Step(session, Event.GIVE_UP, Outcome.FAILED, reason, text, counted=True)
    return Step(session, Event.RETRY, None, reason, detail, counted)


def absent(sessions: Iterable[Session], report: HostReport, max_attempts: int) -> Iterator[Step]:
    """The sessions of a host that its heartbeat proves absent."""
    listed = {guest.sid for guest in report.guests}
    for session in sessions:
        if session.sid in listed:
            continue
        if session.generation > report.last_generation:
            continue  # the command may still be under way
        if session.state in (State.ASSIGNED, State.STARTING):
            yield failed_start(session, Reason.ABSENT, "the host does not hold it", max_attempts)
        else:
            yield Step(session, Event.GONE, Outcome.LOST, Reason.ABSENT)


def on_report(
    sessions: Mapping[str, Session], here: Mapping[str, Session], report: HostReport, max_attempts: int
) -> Iterator[Action]:
    """Everything that one heartbeat asks for. `sessions` are all live ones by sid, `here` those of this host."""
    for guest in report.guests:
        action = on_guest(sessions.get(guest.sid), report.host, guest, max_attempts)
        if action:
            yield action
    yield from absent(here.values(), report, max_attempts)
