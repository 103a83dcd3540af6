"""The life of a session, as data.

Everything that decides a session's state lives in this file. It does not know who calls it: the scheduler applies
events here, the documents draw their diagram from the same table.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from deskfleet.schemas.errors import IllegalTransition, Reason


class State(StrEnum):
    """Where a session is in its life; `ENDED` is the one final state."""

    QUEUED = "queued"
    ASSIGNED = "assigned"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


class Outcome(StrEnum):
    """How a session ended."""

    STOPPED = "stopped"
    GUEST_OFF = "guest_off"
    DISCONNECTED = "disconnected"
    EXPIRED = "expired"
    IDLE = "idle"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    NO_CAPACITY = "no_capacity"
    FAILED = "failed"
    LOST = "lost"


class Event(StrEnum):
    """What can happen to a session."""

    PLACE = "place"  # the scheduler chose a host
    REJECT = "reject"  # the request can never be served
    GIVE_UP = "give_up"  # waited too long, or failed too often
    ACCEPTED = "accepted"  # the host wrote the command into its journal
    READY = "ready"  # the guest's display answers
    EXTEND = "extend"  # it may run longer
    TELL = "tell"  # its host says how it is while it runs
    RETRY = "retry"  # the host could not start it, or proved that it does not hold it
    STOP = "stop"  # somebody, or a limit, ends it
    GONE = "gone"  # the host no longer runs it


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.PLACE): State.ASSIGNED,
    (State.QUEUED, Event.REJECT): State.ENDED,
    (State.QUEUED, Event.GIVE_UP): State.ENDED,
    (State.QUEUED, Event.STOP): State.ENDED,
    (State.ASSIGNED, Event.ACCEPTED): State.STARTING,
    (State.ASSIGNED, Event.READY): State.RUNNING,
    (State.ASSIGNED, Event.RETRY): State.QUEUED,
    (State.ASSIGNED, Event.GIVE_UP): State.ENDED,
    (State.ASSIGNED, Event.STOP): State.STOPPING,
    (State.ASSIGNED, Event.GONE): State.ENDED,
    (State.STARTING, Event.READY): State.RUNNING,
    (State.STARTING, Event.RETRY): State.QUEUED,
    (State.STARTING, Event.GIVE_UP): State.ENDED,
    (State.STARTING, Event.STOP): State.STOPPING,
    (State.STARTING, Event.GONE): State.ENDED,
    (State.RUNNING, Event.EXTEND): State.RUNNING,
    (State.RUNNING, Event.TELL): State.RUNNING,
    (State.RUNNING, Event.STOP): State.STOPPING,
    (State.RUNNING, Event.GONE): State.ENDED,
    (State.STOPPING, Event.GONE): State.ENDED,
}

#: States in which a session holds resources on its host.
ON_HOST = frozenset({State.ASSIGNED, State.STARTING, State.RUNNING, State.STOPPING})


@dataclass(frozen=True, slots=True)
class Resources:
    """What a desktop is given: virtual CPUs, memory (MiB), disk (GiB, virtual size), GPUs of one model."""

    cpus: int
    memory_mib: int
    disk_gib: int
    gpus: int = 0
    gpu_model: str = ""


class Birth(StrEnum):
    """How a guest came to be: forked from a template, or booted, and why not forked."""

    FORKED = "forked"
    BOOTED = "booted"
    NO_TEMPLATE = "no_template"
    TEMPLATE_RESTS = "template_rests"
    FORK_FAILED = "fork_failed"


@dataclass(frozen=True, slots=True)
class Session:
    """One launch request and what became of it.

    Times are UNIX seconds for display only; no decision compares them. `generation` is the number under which the
    host was told to start it (0 while unplaced); `attempt` counts placements whose failure was the host's.
    `groups` are the person's at the time of the request; `queue_class` is the class that it waits in. `birth` is how it
    came to be, once it runs.
    """

    sid: str
    user: str
    machine: str
    resources: Resources
    persistent: bool
    lifetime_s: int
    state: State = State.QUEUED
    outcome: Outcome | None = None
    reason: Reason | None = None
    detail: str = ""
    host: str = ""
    generation: int = 0
    attempt: int = 0
    gpu_addresses: tuple[str, ...] = field(default=())
    wait_s: int = 0
    waited_s: float = 0.0
    groups: tuple[str, ...] = ()
    queue_class: str = ""
    birth: Birth | None = None
    created_at: float = 0.0
    changed_at: float = 0.0

    @property
    def on_host(self) -> bool:
        """Whether the session holds resources on a host."""
        return self.state in ON_HOST


def next_state(state: State, event: Event) -> State:
    """The state after `event`.

    Raises:
        IllegalTransition: the table has no such entry.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"a session that is {state} can't take {event}") from None


def advance(
    session: Session,
    event: Event,
    *,
    outcome: Outcome | None = None,
    reason: Reason | None = None,
    detail: str = "",
) -> Session:
    """Apply `event` and return the new session; the given one is unchanged.

    An end must carry an outcome. Going back to the queue drops host, GPUs and generation, so nothing stays promised.
    A stop records its outcome at once; the end that follows keeps it, whatever the host says about the way it ended.

    Raises:
        IllegalTransition: the event does not apply in this state, or an end has no outcome.
    """
    state = next_state(session.state, event)
    if state is State.ENDED and (outcome or session.outcome) is None:
        raise IllegalTransition(f"{event} ends a session and must say with which outcome")
    if session.state is State.STOPPING:
        outcome, reason = session.outcome, session.reason
        detail = session.detail or detail
    changed = replace(session, state=state, outcome=outcome, reason=reason, detail=detail)
    if state is State.QUEUED:
        return replace(changed, host="", generation=0, gpu_addresses=(), outcome=None, birth=None)
    return changed


def place(session: Session, host: str, generation: int, gpu_addresses: tuple[str, ...] = (), why: str = "") -> Session:
    """Assign a queued session to `host` under `generation`; `why` says what spoke for the host.

    Raises:
        IllegalTransition: the session is not queued.
    """
    placed = advance(session, Event.PLACE, detail=why)
    return replace(placed, host=host, generation=generation, gpu_addresses=gpu_addresses)
